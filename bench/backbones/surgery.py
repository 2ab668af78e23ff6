"""Make a written-out encoder smaller for good: fewer layers, heads and FFN neurons, in plain smaller matrices."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.backbones.encoder import Encoder, EncoderLayer


@dataclass(frozen=True)
class Structure:
    """What is left of an encoder.

    Attributes
    ----------
    layers
        Kept layers of the backbone, ascending.
    heads
        Of each kept layer, its kept heads.
    neurons
        Of each kept layer, its kept FFN neurons.
    """

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]

    @classmethod
    def whole(cls, encoder: Encoder) -> Structure:
        """Return the structure of an encoder that nothing was taken from."""
        layers = [cast(EncoderLayer, layer) for layer in encoder.layers]
        return cls(
            tuple(range(len(layers))),
            tuple(tuple(range(layer.attention.n_heads)) for layer in layers),
            tuple(tuple(range(ffn_out(layer.ffn).in_features)) for layer in layers),
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain lists."""
        return {
            "layers": list(self.layers),
            "heads": list(map(list, self.heads)),
            "neurons": list(map(list, self.neurons)),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Structure:
        """Read what `to_json` wrote."""
        return cls(tuple(fields["layers"]), tuple(map(tuple, fields["heads"])), tuple(map(tuple, fields["neurons"])))


def cut(encoder: Encoder, structure: Structure) -> None:
    """Take from ``encoder`` whatever ``structure`` does not name.

    The matrices that change are new tensors; the others stay shared with whoever shares them.
    """
    encoder.layers = nn.ModuleList(encoder.layers[i] for i in structure.layers)
    for module, heads, neurons in zip(encoder.layers, structure.heads, structure.neurons, strict=True):
        layer = cast(EncoderLayer, module)
        keep_heads(layer, heads)
        keep_neurons(layer, neurons)


def keep_heads(layer: EncoderLayer, heads: Sequence[int]) -> None:
    """Keep these heads of the backbone, ascending; with none, the output bias is all that is left."""
    attention = layer.attention
    if len(heads) == len(attention.heads):
        return
    have = attention.heads.tolist()
    places = torch.tensor([have.index(head) for head in heads], dtype=torch.long, device=attention.heads.device)
    rows = (places[:, None] * attention.d_head + torch.arange(attention.d_head, device=places.device)).flatten()
    for name in ("q", "k", "v"):
        setattr(attention, name, narrowed(getattr(attention, name), rows, 0))
    attention.o = narrowed(attention.o, rows, 1)
    attention.heads = attention.heads[places]


def keep_neurons(layer: EncoderLayer, neurons: Sequence[int]) -> None:
    """Keep these neurons of the FFN's inner layer, ascending; with none, the output bias is all that is left."""
    if len(neurons) == ffn_out(layer.ffn).in_features:
        return
    kept = torch.tensor(neurons, dtype=torch.long, device=ffn_out(layer.ffn).weight.device)
    ffn: Any = layer.ffn
    owners = [(ffn.intermediate, "dense", 0), (ffn, "dense", 1)] if hasattr(ffn, "intermediate") else [(ffn, "wo", 1)]
    owners += [(ffn, name, 0) for name in ("wi", "wi_0", "wi_1") if hasattr(ffn, name)]
    for owner, name, axis in owners:
        setattr(owner, name, narrowed(getattr(owner, name), kept, axis))


def ffn_out(ffn: nn.Module) -> nn.Linear:
    """Return the matrix that maps an FFN's neurons to its output; its input is what a neuron gives."""
    return cast(nn.Linear, ffn.dense if hasattr(ffn, "intermediate") else ffn.wo)


def ffn_in(ffn: nn.Module) -> tuple[nn.Linear, ...]:
    """Return the matrices that map an FFN's input to its neurons; two where it is gated, the activated one first."""
    if hasattr(ffn, "intermediate"):
        return (cast(nn.Linear, cast(Any, ffn).intermediate.dense),)
    return tuple(cast(nn.Linear, getattr(ffn, name)) for name in ("wi", "wi_0", "wi_1") if hasattr(ffn, name))


@torch.no_grad()
def narrowed(linear: nn.Linear, kept: Tensor, axis: int) -> nn.Linear:
    """Return a new matrix with the ``kept`` outputs (axis 0) or inputs (axis 1)."""
    weight = linear.weight.index_select(axis, kept)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # nothing is kept, which is meant
        small = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    small.weight = nn.Parameter(weight.clone(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        bias = linear.bias.index_select(0, kept) if axis == 0 else linear.bias
        small.bias = nn.Parameter(bias.clone(), requires_grad=linear.bias.requires_grad)
    return small
