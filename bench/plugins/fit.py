"""Closed-form start of a plugin: layer by layer, the least-squares fit of what compression loses.

With mean pooling, the decompression adapter has to predict r_i = FFN(u_i) - FFN(c_g(i)) from y_g(i) = FFN(c_g(i)) and
u_i. In tanh's linear range that is a reduced-rank regression, solved exactly from a few thousand tokens (Izenman,
"Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 1975). Not in the paper.

Where the residual stream has no scale of its own (T5; `bench.plugins.units`), errors are weighed by the stream that
they are added to and taken in units of their channels, and a learned compression starts as the mean with these same
weights: a vector whose FFN output would drown those of its group is left out of the merged one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backbones.model import share_weights
from bench.plugins.bank import CompressedFFN, PluginBank
from bench.plugins.layers import CompressionPair
from bench.plugins.plugin import Plugin
from bench.plugins.units import Stream, Units, scaled, spread, streams, varying, weighted_spread

_RIDGE = 1e-3
_LINEAR_RANGE = 0.3
"""Standard deviation of tanh's argument; small enough that tanh is nearly the identity."""


_Place = tuple[CompressedFFN, CompressionPair, Stream | None]
"""A compressed FFN, its pair, and the stream that it adds to where that has no scale of its own."""


class _Reached(Exception):
    """Ends a forward pass at the layer that is being fitted."""


@torch.no_grad()
def fit_least_squares(
    plugin: Plugin,
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    on_layer: Callable[[], None] = lambda: None,
) -> None:
    """Set ``plugin`` to pooling by a mean and the best linear adapter if it has one, bottom layer first.

    Each layer is fitted on what the layers below it give when they are compressed.

    Parameters
    ----------
    plugin
        Is changed in place.
    model
        The frozen model that the plugin fits; is not changed.
    batches
        Inputs as the model is called with, ``attention_mask`` included; some 10,000 tokens are enough.
    on_layer
        Called after each layer.
    """
    inputs = list(batches)
    for pair in plugin.attention or ():
        cast(CompressionPair, pair).reset_to_mean()
    with _compressed(plugin, model) as (student, places):
        for layer, pair, stream in places:
            _fit_pair(layer, pair, stream, student, inputs)
            on_layer()


@contextlib.contextmanager
def _compressed(plugin: Plugin, model: nn.Module) -> Iterator[tuple[nn.Module, list[_Place]]]:
    """Give ``model`` with the plugin, in evaluation mode, and its FFNs with their pairs and streams, bottom first."""
    student = share_weights(model)
    with streams(student) as watched:
        bank = PluginBank([plugin])
        bank.attach(student)
        bank.select(plugin.config.k)
        student.eval()
        layers = [module for module in student.modules() if isinstance(module, CompressedFFN)]
        pairs = [layer.pair(plugin.config.k) for layer in layers]
        yield student, list(zip(layers, pairs, watched, strict=True))


def _fit_pair(
    layer: CompressedFFN,
    pair: CompressionPair,
    stream: Stream | None,
    student: nn.Module,
    inputs: list[Mapping[str, Tensor]],
) -> None:
    # units beyond the rank keep random weights on their way in and have none on their way out: they can still learn
    pair.reset_to_mean()
    if stream is not None and pair.compression == "attention":
        _fit_scores(layer, pair, stream, student, inputs)
    if pair.decompression == "copy":
        return
    for parameter in pair.w2.parameters():
        nn.init.zeros_(parameter)
    d, rank = pair.d_model, min(pair.w2.in_features, pair.d_model)
    device = pair.w2.weight.device
    gram = torch.zeros(2 * d + 1, 2 * d + 1, dtype=torch.float64, device=device)
    cross = torch.zeros(2 * d + 1, d, dtype=torch.float64, device=device)

    squares = torch.zeros(d, dtype=torch.float64, device=device)

    def gather(u: Tensor) -> None:
        x, r, weights = _regression(layer, pair, stream, u)
        if weights is not None:
            x, r = x * weights.sqrt(), r * weights.sqrt()
            squares.add_(r.square().sum(0))
        gram.add_(x.T @ x)
        cross.add_(x.T @ r)

    visit_inputs(layer, student, inputs, gather)
    if stream is None:
        w1, b1, w2, b2 = linear_bottleneck(gram, cross, rank)
    else:
        w1, b1, w2, b2 = scaled_bottleneck(gram, cross, squares, rank)
    pair.w1_y.weight[:rank] = w1[:, :d]
    pair.w1_u.weight[:rank] = w1[:, d:]
    pair.w1_u.bias[:rank] = b1
    pair.w2.weight[:, :rank] = w2
    pair.w2.bias.copy_(b2)


def _fit_scores(
    layer: CompressedFFN,
    pair: CompressionPair,
    stream: Stream,
    student: nn.Module,
    inputs: list[Mapping[str, Tensor]],
) -> None:
    """Let the softmax weigh each vector as its error counts, by the regression of the logarithm on the vector."""
    seen: list[Tensor] = []
    counts: list[Tensor] = []

    def gather(u: Tensor) -> None:
        mask = _mask(layer, u)
        seen.append(u[mask].double())
        counts.append(stream.weights(layer.inner(u))[mask].double())

    visit_inputs(layer, student, inputs, gather)
    u, logs = torch.cat(seen), torch.cat(counts).log().unsqueeze(1)
    unit = weighted_spread(u, torch.ones_like(logs))
    x = torch.cat((scaled(u, unit), torch.ones_like(logs)), dim=1)
    weight = ridge(x.T @ x, x.T @ logs)[:-1, 0] / unit
    # the same weights in every place of the group, each reading its own vector
    pair.score.weight.copy_(torch.block_diag(*[weight.unsqueeze(0)] * pair.k))


@torch.no_grad()
def measure_units(plugin: Plugin, model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Units] | None:
    """Return the units of every layer of a plugin, as it is now; ``None`` where the stream has a scale of its own.

    Parameters
    ----------
    plugin, model, batches
        As for `fit_least_squares`; none is changed.
    """
    with _compressed(plugin, model) as (student, places):
        if None in (stream for _, _, stream in places):
            return None
        moments = [_Moments(plugin.config.d_model) for _ in places]
        notes = [functools.partial(_note, *both) for both in zip(moments, places, strict=True)]
        for (layer, _, _), note in zip(places[:-1], notes, strict=False):
            layer.register_forward_pre_hook(lambda _, args, note=note: note(*args))
        visit_inputs(places[-1][0], student, batches, notes[-1])
    return [noted.units() for noted in moments]


def _note(noted: _Moments, place: _Place, u: Tensor) -> None:
    x, r, weights = _regression(*place, u)
    assert weights is not None
    noted.add(x, r, weights)


class _Moments:
    """Weighted first and second moments of what goes into an adapter and of what it has to give."""

    def __init__(self, d_model: int) -> None:
        self.d_model, self.sums = d_model, torch.zeros(2, 3 * d_model + 1, dtype=torch.float64)

    def add(self, x: Tensor, r: Tensor, weights: Tensor) -> None:
        values = torch.cat((x, r), dim=1)
        self.sums += torch.stack(((weights * values).sum(0), (weights * values.square()).sum(0))).cpu()

    def units(self) -> Units:
        d = self.d_model
        sums, squares = self.sums
        parts = {"y": slice(d), "u": slice(d, 2 * d), "z": slice(2 * d + 1, None)}
        # in between is the constant 1, whose sum is that of the weights
        return Units(**{name: spread(squares[at], sums[at], sums[2 * d]).float() for name, at in parts.items()})


def visit_inputs(
    layer: nn.Module, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], visit: Callable[..., None]
) -> None:
    """Call ``visit`` with what ``layer`` is given on each batch; what follows it in ``model`` does not run."""

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        visit(*args)
        raise _Reached

    hook = layer.register_forward_pre_hook(stop)
    try:
        for batch in batches:
            with contextlib.suppress(_Reached):
                model(**batch)
    finally:
        hook.remove()


def ridge(gram: Tensor, cross: Tensor) -> Tensor:
    """Return the ridge regression of y on x, (p, q), from x^T x and x^T y; the last regressor is a constant 1."""
    damping = torch.full_like(gram[0], _RIDGE * gram.diagonal()[:-1].mean().item())
    damping[-1] = 0.0
    solution: Tensor = torch.linalg.solve(gram + damping.diag(), cross)
    return solution


def linear_bottleneck(gram: Tensor, cross: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return W_1, b_1, W_2, b_2 of the W_2 tanh(W_1 x + b_1) + b_2 that predicts y best while tanh is linear.

    Parameters
    ----------
    gram, cross
        x^T x, (p + 1, p + 1), and x^T y, (p + 1, q), summed over samples, with a constant 1 as the last regressor.
    rank
        Width of the bottleneck, at most q.
    """
    full = ridge(gram, cross)
    n = gram[-1, -1]
    mean = gram[-1] @ full / n
    explained = full.T @ gram @ full / n - torch.outer(mean, mean)
    basis = torch.linalg.eigh(explained).eigenvectors[:, -rank:]
    scale = _LINEAR_RANGE / (basis.T @ explained @ basis).diagonal().clamp_min(1e-16).sqrt()
    down = (full @ basis) * scale
    # the mean goes to the last bias, so that tanh's argument is centred and no rank is spent on a constant
    return down[:-1].T, down[-1] - (mean @ basis) * scale, basis / scale, mean


def _mask(layer: CompressedFFN, u: Tensor) -> Tensor:
    mask = layer.selection.mask
    return u.new_ones(u.shape[:2], dtype=torch.bool) if mask is None else mask


def scaled_bottleneck(gram: Tensor, cross: Tensor, squares: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `linear_bottleneck` finds in units of the channels, in which all count alike, brought back from them.

    Parameters
    ----------
    gram, cross, rank
        As there; samples may have weights.
    squares
        y * y, (q,), summed over samples like the others.
    """
    total = gram[-1, -1]
    x_unit, y_unit = spread(gram.diagonal()[:-1], gram[-1, :-1], total), spread(squares, cross[-1], total)
    scale = torch.where(varying(gram[-1, :-1], total, x_unit), 1 / x_unit, 0)
    scale = torch.cat((scale, torch.ones_like(scale[:1]))).unsqueeze(1)
    w1, b1, w2, b2 = linear_bottleneck(scale * gram * scale.T, scale * cross / y_unit, rank)
    return w1 / x_unit, b1, w2 * y_unit.unsqueeze(1), b2 * y_unit


def _regression(
    layer: CompressedFFN, pair: CompressionPair, stream: Stream | None, u: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return regressors (tokens, 2d+1), residuals (tokens, d) and weights (tokens, 1) of the real positions."""
    n, k, mask = u.shape[1], pair.k, _mask(layer, u)
    short = -n % k
    u, whole = F.pad(u, (0, 0, 0, short)), F.pad(mask, (0, short))
    y = layer.inner(pair.compress(u, whole)).repeat_interleave(k, dim=1)
    x = torch.cat((y, u, torch.ones_like(u[..., :1])), dim=-1)
    dense = layer.inner(u)
    weights = None if stream is None else stream.weights(dense[:, :n])[mask].double().unsqueeze(1)
    return x[whole].double(), (dense - y)[whole].double(), weights
