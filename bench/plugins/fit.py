"""Closed-form start of a plugin: layer by layer, the least-squares fit of what compression loses.

With mean pooling, the decompression adapter has to predict r_i = FFN(u_i) - FFN(c_g(i)) from y_g(i) = FFN(c_g(i)) and
u_i. In tanh's linear range that is a reduced-rank regression, solved exactly from a few thousand tokens (Izenman,
"Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 1975). Not in the paper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.backbones.model import share_weights
from bench.plugins.bank import CompressedFFN, PluginBank
from bench.plugins.layers import CompressionPair
from bench.plugins.plugin import Plugin

_RIDGE = 1e-3
_LINEAR_RANGE = 0.3
"""Standard deviation of tanh's argument; small enough that tanh is nearly the identity."""


class _Reached(Exception):
    """Ends a forward pass at the layer that is being fitted."""


@torch.no_grad()
def fit_least_squares(
    plugin: Plugin,
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    on_layer: Callable[[], None] = lambda: None,
) -> None:
    """Set ``plugin`` to mean pooling and the best linear adapter if it has one, bottom layer first.

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
    student = share_weights(model)
    bank = PluginBank([plugin])
    bank.attach(student)
    bank.select(plugin.config.k)
    student.eval()
    for pair in plugin.attention or ():
        cast(CompressionPair, pair).reset_to_mean()
    for layer in [m for m in student.modules() if isinstance(m, CompressedFFN)]:
        _fit_pair(layer, layer.pair(plugin.config.k), student, inputs)
        on_layer()


def _fit_pair(
    layer: CompressedFFN, pair: CompressionPair, student: nn.Module, inputs: list[Mapping[str, Tensor]]
) -> None:
    # units beyond the rank keep random weights on their way in and have none on their way out: they can still learn
    pair.reset_to_mean()
    if pair.decompression == "copy":
        return
    for parameter in pair.w2.parameters():
        nn.init.zeros_(parameter)
    d, rank = pair.d_model, min(pair.w2.in_features, pair.d_model)
    device = pair.w2.weight.device
    gram = torch.zeros(2 * d + 1, 2 * d + 1, dtype=torch.float64, device=device)
    cross = torch.zeros(2 * d + 1, d, dtype=torch.float64, device=device)

    def gather(u: Tensor) -> None:
        x, r = _regression(layer, pair, u)
        gram.add_(x.T @ x)
        cross.add_(x.T @ r)

    visit_inputs(layer, student, inputs, gather)
    w1, b1, w2, b2 = linear_bottleneck(gram, cross, rank)
    pair.w1_y.weight[:rank] = w1[:, :d]
    pair.w1_u.weight[:rank] = w1[:, d:]
    pair.w1_u.bias[:rank] = b1
    pair.w2.weight[:, :rank] = w2
    pair.w2.bias.copy_(b2)


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


def _regression(layer: CompressedFFN, pair: CompressionPair, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return regressors (tokens, 2d+1) and residuals (tokens, d) of the real positions."""
    n, k = u.shape[1], pair.k
    mask = layer.selection.mask
    mask = u.new_ones(u.shape[:2], dtype=torch.bool) if mask is None else mask
    short = -n % k
    u, mask = F.pad(u, (0, 0, 0, short)), F.pad(mask, (0, short))
    y = layer.inner(pair.compress(u, mask)).repeat_interleave(k, dim=1)
    x = torch.cat((y, u, torch.ones_like(u[..., :1])), dim=-1)
    return x[mask].double(), (layer.inner(u) - y)[mask].double()
