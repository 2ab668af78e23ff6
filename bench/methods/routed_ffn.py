"""A frozen FFN on the tokens that a learned router scores highest, and a narrow adapter on all tokens.

Source: Lei et al., "Conditional Adapters", NeurIPS 2023, sections 3.1 and 3.2, here around the FFN alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from bench.backbones.encoder import AroundFFN, Seen, Tokens
from bench.methods.token_routing import PARTS
from bench.plugins.fit import linear_bottleneck, ridge, scaled_bottleneck, visit_inputs
from bench.plugins.units import Scale, Stream, scaled, streams, weighted_spread

_SOFTNESS = 0.1
"""Weight of the entropy in `soft_top_k`, in units of the scores."""

_Seen = tuple[Tensor, Tensor, Tensor | None]
"""An FFN's input, (B, n, d), where its real tokens are, (B, n), and what an error counts there, if not all alike."""


def soft_top_k(scores: Tensor, mask: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the k highest scores of each example, with weights that pass on a gradient.

    The weights w maximise ``w . s + softness * entropy(w)`` over 0 <= w <= 1 and sum(w) = k (equation 3 of the paper),
    whose solution is w_i = min(1, exp((s_i - t) / softness)) at the one t that makes the sum k. The paper iterates
    towards t; sorted scores give it exactly.

    Parameters
    ----------
    scores
        One number a token, (B, n).
    mask
        True at real tokens, (B, n); the others get weight 0.
    k
        How many to choose, (B,), at least 1 and at most the real tokens.

    Returns
    -------
    tuple
        Weights, (B, n), and where the chosen are, (B, n). Of equal scores the first is chosen.
    """
    s = (scores.float() / _SOFTNESS).masked_fill(~mask, torch.finfo(torch.float32).min / 2)
    k = k.unsqueeze(1)
    with torch.no_grad():
        ordered, order = s.sort(dim=1, descending=True, stable=True)
        rank = order.argsort(1)
        # with the j highest at weight 1, the others share k - j by softmax, none of which may exceed 1
        rest = ordered.flip(1).logcumsumexp(1).flip(1)
        left = k - torch.arange(s.shape[1], device=s.device)
        fits = (ordered - rest + left.clamp_min(1).log() <= 0) | (left == 1)
        full = rank < fits.to(torch.uint8).argmax(1, keepdim=True)
    share = s.masked_fill(full, torch.finfo(torch.float32).min / 2).softmax(1) * (k - full.sum(1, keepdim=True))
    return torch.where(full, 1.0, share), rank < k


class RoutedFFN(AroundFFN):
    """The FFN on the chosen tokens, the adapter on all: ``z_i = W_2 tanh(W_1 u_i + b_1) + b_2 + w_i FFN(u_i)``.

    Parameters
    ----------
    inner
        The frozen FFN.
    d_model
        Width d of the hidden vectors.
    bottleneck
        Width of the adapter.
    parts
        Share of an example's real tokens that runs through the FFN, rounded up to whole tokens, in `PARTS`.
    """

    def __init__(self, inner: nn.Module, d_model: int, bottleneck: int, parts: int) -> None:
        super().__init__(inner)
        self.parts = parts
        self.router = nn.Linear(d_model, 1)
        self.down, self.up = nn.Linear(d_model, bottleneck), nn.Linear(bottleneck, d_model)

    def adapt(self, u: Tensor) -> Tensor:
        """Return what the adapter gives, (..., d)."""
        return cast(Tensor, self.up(torch.tanh(self.down(u))))

    def route(self, u: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and choice of the tokens, each (B, n), for the FFN's input, (B, n, d)."""
        rows = -(-self.parts * mask.sum(1) // PARTS)
        return soft_top_k(self.router(u).squeeze(-1), mask, rows)

    def forward(self, u: Tensor, tokens: Tokens, seen: Seen | None) -> Tensor:
        """Map (B, n, d) to (B, n, d); the chosen tokens of all examples are packed into one sequence, without gaps."""
        weights, chosen = self.route(u, tokens.mask)
        z = self.adapt(u)
        where = chosen.flatten().nonzero().squeeze(1)
        y = self.inner(u.flatten(0, 1).index_select(0, where).unsqueeze(0)).squeeze(0)
        y = y * weights.flatten().index_select(0, where).unsqueeze(1)
        return z.flatten(0, 1).index_add(0, where, y.to(z.dtype)).view_as(z)


@torch.no_grad()
def fit_routing(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], on_layer: Callable[[], None] = lambda: None
) -> list[Scale]:
    """Start routers and adapters of ``model`` by least squares, bottom layer first. Not in the paper.

    It is the counterpart of `bench.plugins.fit`: each layer is fitted on what the routed layers below it give. The
    router starts at the regression of what the best linear adapter misses; the adapter then at the regression of what
    is missing once the chosen tokens have had their FFN. Where the stream has no scale of its own, errors count as they
    do for plugins (`bench.plugins.units`).

    Parameters
    ----------
    model
        In evaluation mode; is changed in place.
    batches
        Inputs as the model is called with; some 10,000 tokens are enough.
    on_layer
        Called after each layer.

    Returns
    -------
    list
        The units to train the routers and adapters in; none where the stream has a scale of its own.
    """
    inputs, scales = list(batches), []
    layers = [module for module in model.modules() if isinstance(module, RoutedFFN)]
    with streams(model) as watched:
        for layer, stream in zip(layers, watched, strict=True):
            seen: list[_Seen] = []

            def note(
                u: Tensor, tokens: Tokens, _: Seen | None, layer: RoutedFFN = layer, stream: Stream | None = stream,
                seen: list[_Seen] = seen,
            ) -> None:  # fmt: skip
                seen.append((u, tokens.mask, None if stream is None else stream.weights(layer.inner(u))))

            visit_inputs(layer, model, inputs, note)
            scales += _fit_layer(layer, seen)
            on_layer()
    return scales


def _fit_layer(layer: RoutedFFN, seen: list[_Seen]) -> list[Scale]:
    u = torch.cat([u[mask] for u, mask, _ in seen])
    counts = [weights[mask] for _, mask, weights in seen if weights is not None]
    weights = torch.cat(counts).double().unsqueeze(1) if counts else None
    y = layer.inner(u.unsqueeze(0)).squeeze(0)
    x = torch.cat((u, torch.ones_like(u[:, :1])), dim=1).double()
    _set_adapter(layer, x, y.double(), weights)
    missed = (y - layer.adapt(u)).double().norm(dim=1, keepdim=True)
    unit = None
    if weights is not None:
        missed, unit = missed * weights.sqrt(), weighted_spread(u.double(), weights)
        x = torch.cat((scaled(u.double(), unit), x[:, -1:]), dim=1)
    missed = missed.clamp_min(1e-12).log()
    solution = ridge(x.T @ x, x.T @ missed)
    spread = (x @ solution).std().clamp_min(1e-12)
    slope = solution[:-1].T / spread
    layer.router.weight.copy_(slope if unit is None else slope / unit)
    layer.router.bias.copy_((solution[-1] - missed.mean()) / spread)
    given = torch.cat([torch.where(chosen, w, 0.0)[mask] for (w, chosen), mask in _routes(layer, seen)])
    target = (y * (1 - given).unsqueeze(1)).double()
    _set_adapter(layer, torch.cat((u, torch.ones_like(u[:, :1])), dim=1).double(), target, weights)
    if unit is None or weights is None:
        return []
    left = weighted_spread(target, weights)
    return [
        (layer.router, "weight", 1 / unit),
        (layer.down, "weight", 1 / unit),
        (layer.up, "weight", left.unsqueeze(1)),
        (layer.up, "bias", left),
    ]


def _routes(layer: RoutedFFN, seen: list[_Seen]) -> Iterable[tuple[tuple[Tensor, Tensor], Tensor]]:
    return ((layer.route(u, mask), mask) for u, mask, _ in seen)


def _set_adapter(layer: RoutedFFN, x: Tensor, target: Tensor, weights: Tensor | None) -> None:
    # units beyond the rank keep random weights on their way in and have none on their way out: they can still learn
    rank = min(layer.up.in_features, layer.up.out_features)
    if weights is None:
        w1, b1, w2, b2 = linear_bottleneck(x.T @ x, x.T @ target, rank)
    else:
        x, target = x * weights.sqrt(), target * weights.sqrt()
        w1, b1, w2, b2 = scaled_bottleneck(x.T @ x, x.T @ target, target.square().sum(0), rank)
    nn.init.zeros_(layer.up.weight)
    layer.down.weight[:rank], layer.down.bias[:rank] = w1, b1
    layer.up.weight[:, :rank] = w2
    layer.up.bias.copy_(b2)
