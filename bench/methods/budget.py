"""What a ratio lets the encoder cost, for methods that make it smaller. Imports no torch, so that a plan is instant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bench.backbones.spec import BackboneSpec
from bench.measure.closed_form import layer_macs


def refusal(method: str, ratio: float | None) -> str | None:
    """Return why ``ratio`` names no budget, or ``None``."""
    if ratio is None or ratio < 2 or ratio != int(ratio):
        return f"the ratio of {method} asks for what Variator costs at k, a whole number of at least 2; got {ratio}"
    return None


def off_budget(left: str, remaining: float, budget: float) -> str:
    """Return the note of a setting that costs something else than the budget; empty if it costs just that.

    Parameters
    ----------
    left
        What is left, in the plural.
    remaining, budget
        Shares of the encoder's FLOPs that remain and that were asked for.
    """
    if math.isclose(remaining, budget):
        return ""
    reason = "the nearest not above" if budget < 1 else "nothing is removed for"
    return f"{left} leave {remaining:.1%} of the encoder's FLOPs: {reason} the {budget:.1%} asked for"


@dataclass(frozen=True)
class UnitCosts:
    """MACs of the parts of an encoder that can be cut one by one, over all examples.

    Attributes
    ----------
    head, neuron
        One attention head, one FFN neuron.
    layer
        A whole layer of the backbone.
    layers
        Layers of the backbone.
    """

    head: int
    neuron: int
    layer: int
    layers: int

    @classmethod
    def of(cls, spec: BackboneSpec, lengths: Mapping[int, int]) -> UnitCosts:
        """Return the costs on ``lengths``, number of tokens -> number of examples, each alone and unpadded."""

        def macs(heads: int, neurons: int) -> int:
            return sum(times * layer_macs(spec, n, n, n, heads, neurons) for n, times in lengths.items())

        return cls(macs(1, 0), macs(0, 1), macs(spec.n_heads, spec.d_ff), spec.encoder_layers)

    @property
    def dense(self) -> int:
        """MACs of the whole encoder."""
        return self.layer * self.layers

    def remaining(self, heads: int, neurons: int) -> float:
        """Share of the encoder's FLOPs that so many heads and neurons, in all its layers together, leave."""
        return (heads * self.head + neurons * self.neuron) / self.dense
