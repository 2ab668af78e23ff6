"""A linear map whose weights are kept in int8 and multiplied with inputs that are rounded to int8 on the way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LARGEST = 127
"""Largest magnitude used; -128 is left out, so that the range is symmetric."""


class Int8Linear(nn.Module):
    """Stands in for a linear map, with the same bias.

    Each row of the weights has a step size of its own, found once, and so has each input vector, found anew in every
    call; products and sums are of whole numbers and exact.

    Parameters
    ----------
    linear
        The map to stand in for, which stays as it is.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, step = _rounded(linear.weight.detach())
        self.weight, self.step = (
            nn.Parameter(weight, requires_grad=False),
            nn.Parameter(step[:, 0], requires_grad=False),
        )
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        whole, step = _rounded(x.flatten(0, -2))
        # in place, since on long batches the passes over memory cost as much as the product
        y = torch._int_mm(whole, self.weight.t()).to(x.dtype).mul_(step).mul_(self.step)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], len(self.step))


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in int8 and the step of each, (rows, 1): rows = int8 * step to the nearest."""
    step = (rows.abs().amax(1, keepdim=True) / _LARGEST).clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows / step).round_().to(torch.int8), step


def to_int8(module: nn.Module) -> None:
    """Let an `Int8Linear` stand in for every linear map inside ``module``."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
