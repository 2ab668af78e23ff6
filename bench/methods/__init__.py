"""One file a method; what a method is stands in ``base``."""
