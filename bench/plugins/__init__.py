"""The compression layers, and plugins that attach, switch, save and load."""
