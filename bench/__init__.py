"""Benchmark suite around Variator: compression plugins for frozen pretrained language models."""

__version__ = "0.1.0"
