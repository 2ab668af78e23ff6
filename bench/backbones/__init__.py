"""Checkpoints: their shapes, where they are, where their FFNs sit."""
