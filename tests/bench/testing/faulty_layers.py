"""Layers of the methods in `faulty`, which must not import torch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.backbones.encoder import EncoderLayer
from bench.backbones.model import TaskOutput
from bench.backbones.write_out import written_encoder


class Around(nn.Module):
    """Stands in for an FFN and changes what it gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Masked(Around):
    def forward(self, u: Tensor) -> Tensor:
        return cast(Tensor, self.inner(u) * 0)


class MeanOfAll(Around):
    def forward(self, u: Tensor) -> Tensor:
        return cast(Tensor, self.inner(u) + u.mean(1, keepdim=True))


class Noisy(Around):
    def forward(self, u: Tensor) -> Tensor:
        return cast(Tensor, self.inner(u) * (1 + 0.1 * torch.randn(1)))


class Silent(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model
        self.model = model.model

    def forward(self, hidden: bool = False, **inputs: Tensor) -> TaskOutput:
        return TaskOutput(self.inner(**inputs).logits)


def wrap(model: Any, around: type[Around], layers: int = 1) -> Any:
    for layer in list(written_encoder(model).layers)[:layers]:
        cast(EncoderLayer, layer).ffn = around(cast(EncoderLayer, layer).ffn)
    return model
