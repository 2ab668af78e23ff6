"""A backbone: a checkpoint of the BERT or T5 family, as transformers saves it, with its tokenizer."""

from pathlib import Path

from bench.backbones.catalogue import Checkpoint

BERT = Checkpoint(folder=Path(__file__).parent / "checkpoint")
