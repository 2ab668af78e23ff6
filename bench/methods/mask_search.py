"""Which heads and neurons to keep: the search of post-training pruning, in NumPy.

Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022, sections 4.1 and 4.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bench.methods.budget import UnitCosts

Mask = NDArray[np.bool_]
Real = NDArray[np.floating]


def search(heads: Real, neurons: Real, costs: UnitCosts, macs: int) -> tuple[Mask, Mask]:
    """Return the units whose importances add up to the most within a budget.

    For each number of heads, the most important ones are kept and as many of the most important neurons as the budget
    then holds; of those that leave less than a neuron of it unused, nothing else can be best, since all heads cost the
    same and all neurons do.

    Parameters
    ----------
    heads, neurons
        Importances, (layers, heads) and (layers, neurons), none negative.
    costs
        MACs of one unit.
    macs
        The budget, at most the cost of all.

    Returns
    -------
    tuple
        True at what is kept, each in the shape of its importances. A layer may lose all of either.
    """
    counts = np.arange(heads.size + 1)
    affordable = (macs - counts * costs.head) // costs.neuron
    counts, affordable = (x[(affordable >= 0) & (affordable <= neurons.size)] for x in (counts, affordable))
    by_head, by_neuron = (np.argsort(-x.ravel(), kind="stable") for x in (heads, neurons))
    of_heads, of_neurons = (
        np.concatenate(([0.0], np.cumsum(x.ravel()[order], dtype=np.float64)))
        for x, order in ((heads, by_head), (neurons, by_neuron))
    )
    best = int(np.argmax(of_heads[counts] + of_neurons[affordable]))
    return _mask(heads, by_head[: counts[best]]), _mask(neurons, by_neuron[: affordable[best]])


def rearranged(gradients: Real, kept: Mask) -> Mask:
    """Swap units of one layer so that what is removed together matters less.

    The loss grows by half of 1' F 1 over the removed units, F being the layer's block of the Fisher information, the
    mean over examples of g g'. Each removed unit in turn changes places with the kept one that lowers this the most, if
    any does.

    Parameters
    ----------
    gradients
        Of the layer's gates, (examples, units).
    kept
        True at the units to start from, (units,).

    Returns
    -------
    ndarray
        As many units as before.
    """
    g = gradients.astype(np.float64)
    fisher = g.T @ g / len(g)
    own, removed = fisher.diagonal(), ~kept
    with_removed = fisher[:, removed].sum(1)
    out = np.flatnonzero(removed)
    for unit in out[np.argsort(-own[out], kind="stable")]:
        change = own[unit] - 2 * with_removed[unit] + own + 2 * (with_removed - fisher[unit])
        change[removed] = np.inf
        other = int(np.argmin(change))
        if change[other] < 0:
            removed[unit], removed[other] = False, True
            with_removed += fisher[other] - fisher[unit]
    return ~removed


def _mask(like: Real, chosen: NDArray[np.intp]) -> Mask:
    mask = np.zeros(like.size, dtype=bool)
    mask[chosen] = True
    return mask.reshape(like.shape)
