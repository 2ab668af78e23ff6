"""Intervals, paired tests and Pareto fronts on plain arrays; what they are applied to is decided elsewhere."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000

Array = NDArray[np.float64]


class Bounds(NamedTuple):
    """Ends of an interval; NaN where there is none."""

    low: float
    high: float


NO_BOUNDS = Bounds(float("nan"), float("nan"))


def t_interval(values: Array, level: float = LEVEL) -> Bounds:
    """Student's interval of the mean of independent values, e.g. one score a seed; NaN below two values."""
    n = len(values)
    if n < 2:
        return NO_BOUNDS
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    mean = float(np.mean(values))
    return Bounds(mean - half, mean + half)


def wilson(successes: int, n: int, level: float = LEVEL) -> Bounds:
    """Wilson's score interval of a proportion, which keeps a width at 0 and 1 (Wilson, 1927)."""
    z = float(stats.norm.ppf((1 + level) / 2))
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return Bounds(centre - half, centre + half)


def percentile_bounds(draws: Array, level: float = LEVEL) -> Bounds:
    """Central interval of bootstrap draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Bounds(float(low), float(high))


@lru_cache(maxsize=256)
def _median_ranks(n: int, level: float) -> tuple[int, int]:
    """Return the indices of the sorted values that bound the bootstrapped median of ``n`` values."""
    share = np.arange(1, n + 1) / n

    def rank(order: int, quantile: float) -> int:
        at_most = stats.binom.sf(order - 1, n, share)  # P(order-th smallest of a resample <= j-th smallest of all)
        return int(np.argmax(at_most >= quantile - 1e-12))

    return rank((n + 1) // 2, (1 - level) / 2), rank(n // 2 + 1, (1 + level) / 2)


def median_bounds(values: Array, level: float = LEVEL) -> Bounds:
    """Percentile bootstrap interval of the median, without resampling.

    The median of an odd number of values resampled with replacement is one of the values, with a binomial
    probability; the interval below is therefore the limit of infinitely many resamples. For an even number the ends
    are those of the lower and the upper middle value, which is never too narrow.
    """
    if len(values) == 0:
        return NO_BOUNDS
    low, high = _median_ranks(len(values), level)
    ordered = np.sort(values)
    return Bounds(float(ordered[low]), float(ordered[high]))


def mcnemar(a: Array, b: Array) -> float:
    """Exact two-sided p-value of McNemar's test on paired 0/1 scores (McNemar, 1947)."""
    only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
    if only_a + only_b == 0:
        return 1.0
    return float(min(1.0, 2 * stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))


def two_sided(draws: Array) -> float:
    """Two-sided p-value that bootstrap draws of a difference lie around zero; never exactly 0."""
    n = len(draws)
    tail = min(int(np.sum(draws <= 0)), int(np.sum(draws >= 0)))
    return min(1.0, 2 * (tail + 1) / (n + 1))


def holm(p: Array) -> Array:
    """p-values adjusted for being one of several tests (Holm, 1979); NaN stays NaN and does not count."""
    adjusted = np.full(len(p), np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted


def pareto_front(cost: Array, score: Array) -> NDArray[np.bool_]:
    """Mark the points that no other point beats: none is as cheap and as good, and better in one of the two.

    Parameters
    ----------
    cost
        Lower is better, (points,).
    score
        Higher is better, (points,).

    Returns
    -------
    ndarray
        True on the front, (points,). Equal points are all on it; a point with a NaN never is, and beats none.
    """
    c, s = np.asarray(cost, dtype=float), np.asarray(score, dtype=float)
    no_worse = (c[None, :] <= c[:, None]) & (s[None, :] >= s[:, None])
    better = (c[None, :] < c[:, None]) | (s[None, :] > s[:, None])
    beaten = np.any(no_worse & better, axis=1)
    return np.asarray(~(beaten | np.isnan(c) | np.isnan(s)))
