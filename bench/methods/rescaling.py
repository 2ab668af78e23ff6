"""Scales of what a smaller encoder keeps, so that each sublayer gives again what the whole one gave.

Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from bench.backbones.encoder import Encoder, EncoderLayer, Tokens
from bench.backbones.model import TaskModel
from bench.backbones.surgery import ffn_out
from bench.backbones.write_out import written_encoder
from bench.training.stage import Batch, model_inputs

LIMIT = 10.0
"""Largest scale that is believed, in magnitude: beyond it the fit has gone astray (as in the paper)."""


@dataclass(frozen=True)
class Sublayer:
    """Attention or FFN of one layer.

    Attributes
    ----------
    layer
        The layer.
    attention
        Whether it is the attention.
    """

    layer: EncoderLayer
    attention: bool

    @property
    def out(self) -> nn.Linear:
        """The matrix on whose inputs the units act."""
        return self.layer.attention.o if self.attention else ffn_out(self.layer.ffn)

    @property
    def unit(self) -> int:
        """Inputs of ``out`` that belong to one head, or neuron."""
        return self.layer.attention.d_head if self.attention else 1

    def stream(self, tokens: Tokens) -> Tensor:
        """Return the residual stream behind the sublayer's addition, (B, n, d)."""
        x = self._norm(tokens.x) if self.layer.pre_norm else tokens.x
        if self.attention:
            return cast(Tensor, tokens.x + self.layer.attention(x, tokens.bias)[0])
        return cast(Tensor, tokens.x + self.layer.ffn(x))

    def read(self, stream: Tensor) -> Tensor:
        """Return what the next sublayer is given."""
        return stream if self.layer.pre_norm else self._norm(stream)

    def _norm(self, x: Tensor) -> Tensor:
        return cast(Tensor, (self.layer.attention_norm if self.attention else self.layer.ffn_norm)(x))


def sublayers(encoder: Encoder) -> list[Sublayer]:
    """Return all sublayers, bottom first."""
    return [Sublayer(cast(EncoderLayer, layer), attention) for layer in encoder.layers for attention in (True, False)]


@torch.no_grad()
def rescale(
    encoder: Encoder,
    whole: Encoder,
    states: Sequence[Tokens],
    damp: float,
    on_sublayer: Callable[[], None] = lambda: None,
) -> list[int]:
    """Scale the units of ``encoder`` so that its stream follows that of ``whole``, sublayer by sublayer.

    Each sublayer is fitted on what the sublayers below it give with their own scales. A fit with a scale beyond `LIMIT`
    is discarded, and the rest left as it is.

    Parameters
    ----------
    encoder
        The smaller encoder; its output matrices that change become its own.
    whole
        The encoder that it was cut from, with all its layers.
    states
        What the first layer is given.
    damp
        Weight of the scales' distance from 1.
    on_sublayer
        Called after each sublayer.

    Returns
    -------
    list of int
        Which of `sublayers` were changed.
    """
    xs, targets, changed = [tokens.x for tokens in states], [tokens.x for tokens in states], []
    trusted = True
    for i, (own, reference) in enumerate(zip(sublayers(encoder), sublayers(whole), strict=True)):
        wanted = [reference.stream(tokens.replace(x=x)) for tokens, x in zip(states, targets, strict=True)]
        if trusted and own.out.in_features:
            scales = fit_scales(own, [t.replace(x=x) for t, x in zip(states, xs, strict=True)], wanted, damp)
            trusted = bool(scales.abs().max() <= LIMIT)
            if trusted and (scales != 1).any():
                weight = own.out.weight
                own.out.weight = nn.Parameter(weight * scales.repeat_interleave(own.unit).to(weight), False)
                changed.append(i)
        xs = [own.read(own.stream(tokens.replace(x=x))) for tokens, x in zip(states, xs, strict=True)]
        targets = [reference.read(stream) for stream in wanted]
        on_sublayer()
    return changed


@torch.no_grad()
def fit_scales(sublayer: Sublayer, states: Iterable[Tokens], wanted: Iterable[Tensor], damp: float) -> Tensor:
    """Return the scales m of a sublayer's units, float64, (units,).

    With A the outputs of its units on all real tokens, and e what the stream lacks at m = 1, r = m - 1 minimises
    |A r - e|^2 + damp^2 |r|^2. That is the paper's problem, which it hands to LSMR. Here it is solved exactly, by its
    normal equations: a unit's output is an activation times a column of W, so that A'A is the second moment of the
    activations times W'W, entry by entry, and A, (tokens x d, units), is never formed.

    Parameters
    ----------
    sublayer
        The sublayer, with its units as they are.
    states
        What it is given.
    wanted
        The stream that it should leave, each (B, n, d).
    damp
        Weight of r.
    """
    weight = sublayer.out.weight
    d, width = weight.shape
    second = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    cross = torch.zeros(width, d, dtype=torch.float64, device=weight.device)
    seen: list[Tensor] = []
    hook = sublayer.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for tokens, target in zip(states, wanted, strict=True):
            lacking = (target - sublayer.stream(tokens))[tokens.mask].double()
            h = seen.pop()[tokens.mask].double()
            second += h.T @ h
            cross += h.T @ lacking
    finally:
        hook.remove()
    w, units = weight.double(), width // sublayer.unit
    gram = (second * (w.T @ w)).reshape(units, sublayer.unit, units, sublayer.unit).sum((1, 3))
    moment = (cross * w.T).sum(1).reshape(units, sublayer.unit).sum(1)
    regular = gram.cpu().numpy() + damp**2 * np.eye(units)
    r = scipy.linalg.solve(regular, moment.cpu().numpy(), assume_a="pos")
    return 1 + torch.from_numpy(r).to(weight.device)


@torch.no_grad()
def entering(model: TaskModel, batches: Iterable[Batch], tokens: int) -> list[Tokens]:
    """Return what the first encoder layer is given, batch by batch, until ``tokens`` real tokens are there."""
    states: list[Tokens] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        states.append(args[0])

    hook = written_encoder(model).layers[0].register_forward_pre_hook(note)
    try:
        for batch in batches:
            model(**model_inputs(batch))
            if sum(int(state.mask.sum()) for state in states) >= tokens:
                break
    finally:
        hook.remove()
    return states
