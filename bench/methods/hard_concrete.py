"""Hard-concrete gates on the heads, neurons and sublayers of an encoder, and the multipliers that set their cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backbones.encoder import Encoder, EncoderLayer
from bench.backbones.surgery import ffn_out
from bench.methods.budget import UnitCosts

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
"""Temperature and stretch of the concrete distribution, as Louizos et al. set them."""

UNIT_START, SUBLAYER_START = 3.0, 4.0
"""log alpha at the start: every gate is 1 in evaluation, and in training a unit is shut in 1 of 100 draws."""

PENALTY_START = 100.0
"""Multiplier of the squared gap at the start. From 0 both multipliers wind up until the gates give way all at once and
fall far below the target; so much keeps the gates within a few hundredths of it throughout."""


class HardConcrete(nn.Module):
    """Gates that are 0 or 1 with a probability above 0 and still have a gradient.

    Parameters
    ----------
    shape
        Shape of the gates.
    start
        Their log alpha at the start.

    Notes
    -----
    Louizos, Welling and Kingma, "Learning sparse neural networks through L0 regularization", ICLR 2018, section 2.2.
    """

    def __init__(self, shape: tuple[int, ...], start: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full(shape, start))

    def forward(self) -> Tensor:
        """Return a sample in training, and in evaluation the gates by which a finished model is scaled."""
        logits: Tensor = self.log_alpha
        if self.training:
            logits = (torch.rand_like(logits).logit(eps=1e-6) + logits) / TEMPERATURE
        return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)

    def log_open(self) -> Tensor:
        """Return the logarithm of the probability that a sample is above 0."""
        return F.logsigmoid(self.log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


class Gates(nn.Module):
    """A gate for each head, neuron and sublayer; what a unit gives is multiplied by its own and its sublayer's.

    The output bias of a sublayer is not gated: it costs nothing, and a sublayer that is shut still gives it.

    Parameters
    ----------
    layers, heads, neurons
        Layers of the encoder, and heads and FFN neurons of each.

    Notes
    -----
    Xia, Zhong and Chen, "Structured pruning learns compact and accurate models", ACL 2022, section 3.1, without its
    gates on the residual stream's dimensions.
    """

    def __init__(self, layers: int, heads: int, neurons: int) -> None:
        super().__init__()
        self.heads = HardConcrete((layers, heads), UNIT_START)
        self.neurons = HardConcrete((layers, neurons), UNIT_START)
        self.sublayers = HardConcrete((layers, 2), SUBLAYER_START)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the heads, (layers, heads), and of the neurons, (layers, neurons)."""
        attention, ffn = self.sublayers().split(1, dim=1)
        return self.heads() * attention, self.neurons() * ffn

    def log_open(self) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the probability that a factor is above 0, in the shapes of `forward`."""
        attention, ffn = self.sublayers.log_open().split(1, dim=1)
        return self.heads.log_open() + attention, self.neurons.log_open() + ffn

    def expected_remaining(self, costs: UnitCosts) -> Tensor:
        """Return the expected share of the encoder's FLOPs in units that are open; the gates are independent."""
        heads, neurons = (log_open.exp().sum() for log_open in self.log_open())
        return (heads * costs.head + neurons * costs.neuron) / costs.dense

    @contextmanager
    def on(self, encoder: Encoder) -> Iterator[None]:
        """Gate ``encoder`` for the length of a ``with`` block; each forward pass draws anew."""
        drawn: tuple[Tensor, Tensor] = self()

        def draw(*_: Any) -> None:
            nonlocal drawn
            drawn = self()

        def scale(which: int, layer: int, width: int) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
                factor = drawn[which][layer].repeat_interleave(width)
                return (args[0] * factor.to(args[0].dtype),)

            return hook

        with ExitStack() as stack:
            stack.callback(encoder.register_forward_pre_hook(draw).remove)
            for i, (o, width, out) in enumerate(_outputs(encoder)):
                stack.callback(o.register_forward_pre_hook(scale(0, i, width)).remove)
                stack.callback(out.register_forward_pre_hook(scale(1, i, 1)).remove)
            yield

    @torch.no_grad()
    def fold(self, encoder: Encoder) -> None:
        """Multiply the factors into the matrices behind them; units whose factor is 0 can then be cut for free."""
        heads, neurons = self()
        for i, (o, width, out) in enumerate(_outputs(encoder)):
            o.weight.mul_(heads[i].repeat_interleave(width))
            out.weight.mul_(neurons[i])


def _outputs(encoder: Encoder) -> Iterator[tuple[nn.Linear, int, nn.Linear]]:
    """Yield, for each layer, the matrix behind its heads, the width of a head, and the matrix behind its neurons."""
    for module in encoder.layers:
        layer = cast(EncoderLayer, module)
        yield layer.attention.o, layer.attention.d_head, ffn_out(layer.ffn)


class Multipliers(nn.Module):
    """Lagrange multipliers of an equality, which a minimiser ascends: it is given their gradient reversed.

    Notes
    -----
    Wang, Wohlwend and Lei, "Structured pruning of large language models", EMNLP 2020.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor([0.0, PENALTY_START]))

    def forward(self, gap: Tensor) -> Tensor:
        """Return what is added to the loss for a quantity that is ``gap`` above its target."""
        # the value of the multipliers with minus their gradient
        reversed_values = 2 * self.values.detach() - self.values
        return (reversed_values * torch.stack((gap, gap.square()))).sum()
