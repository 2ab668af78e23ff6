"""A ReLU FFN split into experts: groups of neurons, of which a token runs the few that a router expects to be active.

Source: Zhang et al., "MoEfication", Findings of ACL 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.backbones.encoder import AroundFFN, Seen, Tokens
from bench.backbones.sites import EncoderView
from bench.backbones.surgery import ffn_in, ffn_out
from bench.training.parallel import of_all
from bench.training.stage import Batch, model_inputs

_ROUNDS = 5
"""Rounds of balanced k-means at most; the assignment seldom changes after the third."""


def balanced_clusters(points: NDArray[np.floating], size: int, seed: int) -> NDArray[np.int64]:
    """Cluster points into groups of exactly ``size`` by k-means.

    Balanced k-means (Malinen and Fränti, S+SSPR 2014): the assignment step gives each centre ``size`` points at the
    least total squared distance, which is a linear assignment problem. It starts from ordinary k-means, whose clusters
    a greedy pass evens out first, since an assignment far from the centres takes long to solve.

    Parameters
    ----------
    points
        (p, d), with p a multiple of ``size``.
    size, seed
        Points of a cluster; seed of k-means.

    Returns
    -------
    ndarray
        Order of the points, (p,): those of the first cluster, then those of the second, each cluster ascending.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    x = points.astype(np.float64)
    count = len(x) // size
    centres = KMeans(count, n_init=1, random_state=seed).fit(x).cluster_centers_
    owner = _greedy(_distances(x, centres), size)
    for _ in range(_ROUNDS):
        centres = np.stack([x[owner == c].mean(0) for c in range(count)])
        _, places = linear_sum_assignment(np.repeat(_distances(x, centres), size, axis=1))
        before, owner = owner, places // size
        if np.array_equal(before, owner):
            break
    return np.argsort(owner, kind="stable")


def _distances(x: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = np.square(x).sum(1)[:, None] - 2 * x @ centres.T + np.square(centres).sum(1)
    return cast(NDArray[np.float64], squares)


def _greedy(distances: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Give each centre ``size`` points, nearest pairs first."""
    points, centres = distances.shape
    owner, room = np.full(points, -1), [size] * centres
    for pair in np.argsort(distances, axis=None, kind="stable").tolist():
        point, centre = divmod(pair, centres)
        if owner[point] < 0 and room[centre]:
            owner[point] = centre
            room[centre] -= 1
    return owner


class Experts(nn.Module):
    """The FFN of the backbone with its neurons in groups; a token's output is the sum over its experts.

    Parameters
    ----------
    ffn
        The backbone's FFN, whose weights stay what they are. The layout by experts is a copy, made from them.
    order
        Neurons in the order of the experts, (d_ff,).
    size
        Neurons of an expert.
    """

    order: Tensor
    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor

    def __init__(self, ffn: nn.Module, order: Tensor, size: int) -> None:
        super().__init__()
        self.ffn = ffn
        (into,), out = ffn_in(ffn), ffn_out(ffn)
        self.size = size
        self.register_buffer("order", order.to(into.weight.device), persistent=False)
        bias = None if into.bias is None else into.bias.detach()[self.order].unflatten(0, (-1, size))
        self.register_buffer("w_in", into.weight.detach()[self.order].unflatten(0, (-1, size)), persistent=False)
        self.register_buffer("b_in", bias, persistent=False)
        self.register_buffer("w_out", out.weight.detach().T[self.order].unflatten(0, (-1, size)), persistent=False)

    def sums(self, activations: Tensor) -> Tensor:
        """Add up the activations of each expert's neurons: (..., d_ff) to (..., experts)."""
        grouped: Tensor = activations.index_select(-1, self.order).unflatten(-1, (-1, self.size))
        return grouped.sum(-1)

    def forward(self, u: Tensor, chosen: Tensor) -> Tensor:
        """Run tokens through their experts.

        Parameters
        ----------
        u
            FFN inputs, (tokens, d).
        chosen
            Experts of each token, (tokens, m), all different.

        Returns
        -------
        Tensor
            FFN outputs, (tokens, d).
        """
        count, m = len(self.w_in), chosen.shape[1]
        flat = chosen.flatten()
        token = flat.argsort(stable=True).div(m, rounding_mode="floor")
        sizes: list[int] = torch.bincount(flat, minlength=count).tolist()
        out = ffn_out(self.ffn)
        y = torch.zeros_like(u) if out.bias is None else out.bias.to(u.dtype).repeat(len(u), 1)
        for expert, rows in enumerate(token.split(sizes)):
            if len(rows):
                bias = None if self.b_in is None else self.b_in[expert]
                active = F.linear(u.index_select(0, rows), self.w_in[expert], bias).relu()
                # a token is among an expert's rows once, so that no order of summation is left open
                y.index_add_(0, rows, active @ self.w_out[expert])
        return y


class Router(nn.Module):
    """Predicts how active each expert will be: W_2 tanh(W_1 u + b_1) + b_2, one score an expert.

    It starts as the paper's router without training, which scores an expert by the mean of its neurons' input weights:
    W_1 and b_1 are those means and W_2 is the identity.

    Parameters
    ----------
    experts
        What it chooses from.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        count, _, d = experts.w_in.shape
        self.down, self.up = nn.Linear(d, count), nn.Linear(count, count)
        with torch.no_grad():
            self.down.weight.copy_(experts.w_in.mean(1))
            self.down.bias.copy_(torch.zeros(count) if experts.b_in is None else experts.b_in.mean(1))
            nn.init.eye_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Map (..., d) to (..., experts)."""
        return cast(Tensor, self.up(torch.tanh(self.down(u))))


class ExpertFFN(AroundFFN):
    """The experts of one FFN behind their router; every real token runs ``chosen`` of them, padding none.

    Parameters
    ----------
    inner
        The backbone's FFN.
    order, size
        As for `Experts`.
    chosen
        Experts that each token runs.
    """

    inner: Experts

    def __init__(self, inner: nn.Module, order: Tensor, size: int, chosen: int) -> None:
        super().__init__(Experts(inner, order, size))
        self.router, self.chosen = Router(self.inner), chosen

    def forward(self, u: Tensor, tokens: Tokens, seen: Seen | None) -> Tensor:
        """Map (B, n, d) to (B, n, d); padding gets zeros."""
        where = tokens.mask.flatten().nonzero().squeeze(1)
        real = u.flatten(0, 1).index_select(0, where)
        y = self.inner(real, self.router(real).topk(self.chosen, dim=1).indices)
        z = torch.zeros_like(u.flatten(0, 1), dtype=y.dtype)
        return z.index_copy(0, where, y).view_as(u)


class RouterLoss:
    """How far routers are from what the neurons of the dense model do, on one batch.

    The loss of a router is the cross-entropy of its scores to the summed activations of each expert. A token's sums are
    divided by their largest, which leaves their order as it is: that order is all that counts.

    Parameters
    ----------
    dense
        The teacher, its encoder written out; hooks are put on it.
    layers
        The routed FFN of each of its encoder layers.
    """

    def __init__(self, dense: nn.Module, layers: Sequence[ExpertFFN]) -> None:
        self.dense, self.layers = dense, layers
        self._inputs: list[Tensor] = []
        self._sums: list[Tensor] = []
        for site, layer in zip(EncoderView(dense).sites(), layers, strict=True):
            self._watch(site.inner, layer.inner)

    def _watch(self, ffn: nn.Module, experts: Experts) -> None:
        ffn.register_forward_pre_hook(lambda _, args: self._inputs.append(args[0]))
        ffn_out(ffn).register_forward_pre_hook(lambda _, args: self._sums.append(experts.sums(args[0])))

    def __call__(self, batch: Batch) -> Tensor:
        """Return the mean over layers, experts and real tokens."""
        self._inputs.clear()
        self._sums.clear()
        with torch.no_grad():
            self.dense(**model_inputs(batch))
        real = batch["attention_mask"].bool()
        losses = []
        for layer, u, sums in zip(self.layers, self._inputs, self._sums, strict=True):
            scores, target = layer.router(u[real]).float(), sums[real].float()
            target = target / target.amax(1, keepdim=True).clamp_min(1e-12)
            losses.append(F.binary_cross_entropy_with_logits(scores, target))
        return of_all(torch.stack(losses).mean(), real)
