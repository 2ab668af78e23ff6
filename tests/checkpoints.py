"""The tiny checkpoints, tasks and runs of `bench.testing`, and what these tests alone need beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.plugins.plugin import Plugin
from bench.testing.checkpoints import (
    FAMILIES,
    QUICK,
    Family,
    context,
    quick_config,
    task_file,
    tiny_checkpoint,
    tiny_model,
)

__all__ = [
    "FAMILIES",
    "QUICK",
    "Family",
    "context",
    "encode_hidden",
    "quick_config",
    "random_plugin",
    "task_file",
    "tiny_checkpoint",
    "tiny_model",
    "tokens",
]


def random_plugin(model: nn.Module, k: int, seed: int = 1, std: float = 0.2, **settings: Any) -> Plugin:
    """Return a plugin that fits ``model``, every parameter random and large enough to matter."""
    plugin = Plugin.for_model(model, k, **{"bottleneck": 8, **settings}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return plugin


def tokens(batch: int, n: int, seed: int = 0) -> Tensor:
    """Return random ids of words, (batch, n)."""
    return torch.randint(5, 60, (batch, n), generator=torch.Generator().manual_seed(seed))


def encode_hidden(model: Any, **inputs: Tensor) -> Tensor:
    """Return the encoder's output, (batch, n, d)."""
    encoder = model.bert if hasattr(model, "bert") else model.encoder
    hidden: Tensor = encoder(**inputs).last_hidden_state
    return hidden
