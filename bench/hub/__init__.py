"""Plugins, results and studies on the Hugging Face Hub: there and back."""
