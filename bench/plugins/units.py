"""The scales that adapters are fitted and trained in where the backbone's residual stream has no scale of its own.

BERT normalises its stream after every sublayer, so that all that a plugin sees is of one size. T5 normalises what a
sublayer reads and not what it leaves: its stream grows, and a few channels of a few tokens are thousands of times the
rest ("massive activations", Sun et al., COLM 2024). There an error counts by the stream that it is added to, which the
next norm divides by, and a step of one size for all weights is too large for some and nothing for others.
None of this is in the Variator paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.backbones.sites import EncoderView
from bench.plugins.layers import CompressionPair
from bench.plugins.plugin import Plugin

_LEAST = 1e-3
"""Smallest unit, as a share of the size of a typical channel: one that hardly varies is not blown up."""

_MOST = 100
"""Largest mean of a channel, in its units, with which it says anything that a constant does not."""


class Stream:
    """The residual stream that one FFN adds to, of the batch that is running.

    Parameters
    ----------
    norm
        The norm that makes the FFN's input of it.
    """

    def __init__(self, norm: nn.Module) -> None:
        self._handle = norm.register_forward_pre_hook(lambda _, args: setattr(self, "_now", args[0]))
        self._now: Tensor

    def weights(self, added: Tensor) -> Tensor:
        """Return what an error at each position counts, (batch, n), where the FFN adds ``added``, (batch, n, d).

        It is one over the mean square of the sum, by which the next norm divides the square of an error.
        """
        return 1 / (self._now + added).float().square().mean(-1).clamp_min(1e-12)

    def close(self) -> None:
        """Stop watching."""
        self._handle.remove()


@contextmanager
def streams(model: nn.Module) -> Iterator[list[Stream | None]]:
    """Watch the stream of every encoder layer, bottom first; ``None`` where it is normalised itself."""
    watched = [Stream(site.norm) if site.norm is not None else None for site in EncoderView(model).sites()]
    try:
        yield watched
    finally:
        for stream in watched:
            if stream is not None:
                stream.close()


@dataclass(frozen=True)
class Units:
    """Standard deviation of each channel around one FFN, errors weighed as `Stream.weights` says.

    Attributes
    ----------
    u
        Of the FFN's input, (d,).
    y
        Of its output on merged vectors, (d,).
    z
        Of what the decompression adapter has to add to that, (d,).
    """

    u: Tensor
    y: Tensor
    z: Tensor


def weighted_spread(values: Tensor, weights: Tensor) -> Tensor:
    """Return the `spread` of values (samples, d) with weights (samples, 1)."""
    return spread((weights * values.square()).sum(0), (weights * values).sum(0), weights.sum())


def spread(squares: Tensor, sums: Tensor, total: Tensor) -> Tensor:
    """Return the standard deviation of each channel from its weighted sums, none far below the median size."""
    std = (squares / total - (sums / total).square()).clamp_min(0).sqrt()
    sizes = (squares / total).sqrt()
    typical = sizes.median() if sizes.median() > 0 else sizes.max()
    return std.clamp_min(_LEAST * typical if typical > 0 else 1.0)


def varying(sums: Tensor, total: Tensor, units: Tensor) -> Tensor:
    """Return which channels vary about their mean: a nearly constant one, in its units, would rule any ridge."""
    return (sums / total).abs() < _MOST * units


def scaled(values: Tensor, units: Tensor) -> Tensor:
    """Return values (samples, d) in units, and zeros for channels that are nearly constant."""
    return torch.where(varying(values.sum(0), values.new_tensor(len(values)), units), values / units, 0)


class _Scaled(nn.Module):
    """A weight as the product of what is trained and a constant."""

    def __init__(self, unit: Tensor) -> None:
        super().__init__()
        self.unit: Tensor
        self.register_buffer("unit", unit, persistent=False)

    def forward(self, trained: Tensor) -> Tensor:
        return trained * self.unit

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.unit


Scale = tuple[nn.Module, str, Tensor]
"""A module, the name of one of its parameters, and the units of its entries, which broadcast to them."""


def plugin_scales(plugin: Plugin, units: Sequence[Units]) -> list[Scale]:
    """Return the units of a plugin's parameters, given those of its channels, a layer each.

    The scores before keys and values, which start as the mean, are left as they are.
    """
    scales: list[Scale] = []
    for child, unit in zip(plugin.pairs, units, strict=True):
        pair = cast(CompressionPair, child)
        if pair.compression == "attention":
            scales.append((pair.score, "weight", (1 / unit.u).repeat(pair.k)))
        if pair.decompression == "adapter":
            scales += [
                (pair.w1_y, "weight", 1 / unit.y),
                (pair.w1_u, "weight", 1 / unit.u),
                (pair.w2, "weight", unit.z.unsqueeze(1)),
                (pair.w2, "bias", unit.z),
            ]
    return scales


@contextmanager
def in_units(scales: Iterable[Scale]) -> Iterator[None]:
    """Let parameters be in their units for the length of a ``with`` block.

    What is computed stays the same, and so does what is stored afterwards. An optimiser whose step has one size for all
    entries then moves each by the same share of what it works on. Within the block a module's parameters have other
    names.
    """
    dressed: list[tuple[nn.Module, str]] = []
    try:
        for module, name, unit in scales:
            parametrize.register_parametrization(module, name, _Scaled(unit.to(getattr(module, name))))
            dressed.append((module, name))
        yield
    finally:
        for module, name in dressed:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
