"""What every example contributes to a metric, read from the predictions of runs on the same examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.statistics import Array


class Metric(NamedTuple):
    """A metric as a function of weighted sums over examples.

    Attributes
    ----------
    outcomes
        Predictions table -> what each example contributes, (examples, m).
    value
        Weights (resamples, u) and u different outcomes (u, m) -> the metric of each resample, (resamples,).
    """

    outcomes: Callable[[pd.DataFrame], Array]
    value: Callable[[Array, Array], Array]


def _right(table: pd.DataFrame) -> Array:
    return np.asarray(table["prediction"] == table["label"], dtype=float)[:, None]


def _hits_and_errors(table: pd.DataFrame) -> Array:
    predicted, true = np.asarray(table["prediction"] == 1), np.asarray(table["label"] == 1)
    return np.column_stack([predicted & true, predicted ^ true]).astype(float)


def _mean(weights: Array, outcomes: Array) -> Array:
    total: Array = weights @ outcomes[:, 0] / weights.sum(axis=1)
    return total


def _f1(weights: Array, outcomes: Array) -> Array:
    hits, errors = (weights @ outcomes).T
    return np.asarray(2 * hits / np.maximum(2 * hits + errors, 1))


def _pearson(weights: Array, outcomes: Array) -> Array:
    share = weights / weights.sum(axis=1, keepdims=True)
    x, y = outcomes.T
    mean_x, mean_y = share @ x, share @ y
    covariance = share @ (x * y) - mean_x * mean_y
    return np.asarray(covariance / np.sqrt((share @ x**2 - mean_x**2) * (share @ y**2 - mean_y**2)))


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_right, _mean),
    "f1": Metric(_hits_and_errors, _f1),
    "token_f1": Metric(lambda table: table[["score"]].to_numpy(dtype=float), _mean),
    "pearson": Metric(lambda table: table[["prediction", "label"]].to_numpy(dtype=float), _pearson),
}
"""Metrics that can be computed again from predictions; for others the stored intervals stand, and nothing is paired."""

_CHUNK = 4_000_000  # weights in memory at a time


class Outcomes(NamedTuple):
    """Several runs on the same examples.

    Attributes
    ----------
    table
        (examples, runs, m)
    metric
        How to make a score of them.
    """

    table: Array
    metric: Metric

    def draws(self, rng: np.random.Generator, resamples: int) -> Array:
        """Bootstrap the score of every run on the same resamples of examples.

        Drawing how often each distinct outcome comes up is the same as drawing examples, and far cheaper.

        Returns
        -------
        ndarray
            (resamples, runs)
        """
        n, runs, m = self.table.shape
        kinds, counts = np.unique(self.table.reshape(n, runs * m), axis=0, return_counts=True)
        draws, step = np.empty((resamples, runs)), max(1, _CHUNK // len(kinds))
        for start in range(0, resamples, step):
            part = draws[start : start + step]
            weights = rng.multinomial(n, counts / n, size=len(part)).astype(float)
            for i in range(runs):
                part[:, i] = self.metric.value(weights, kinds[:, i * m : (i + 1) * m])
        return draws

    def scores(self) -> Array:
        """Return the score of every run, (runs,)."""
        once = np.ones((1, len(self.table)))
        return np.array([self.metric.value(once, self.table[:, i])[0] for i in range(self.table.shape[1])])


class Predictions:
    """Per-example outcomes of a study's runs, read when first asked for.

    Parameters
    ----------
    folder
        ``results/<study>``; a run's file is ``predictions/<run_id>.parquet`` with the columns ``id``, ``prediction``,
        ``label`` and ``score``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "predictions"
        self._read: dict[tuple[str, str], tuple[Array, Array] | None] = {}

    def outcomes(self, runs: pd.DataFrame) -> Outcomes | None:
        """Return what every example contributed in several runs of one task.

        Parameters
        ----------
        runs
            With ``run_id``, ``metric`` and ``score``.

        Returns
        -------
        Outcomes or None
            ``None`` if a file is missing or torn, the examples differ, the metric cannot be computed from them, or
            does not come out as the run's own score.
        """
        metric = METRICS.get(runs["metric"].iloc[0])
        if metric is None:
            return None
        found: list[tuple[Array, Array]] = []
        for run_id in runs["run_id"]:
            one = self._one(run_id, runs["metric"].iloc[0])
            if one is None or not np.array_equal(one[0], (found or [one])[0][0]):
                return None
            found.append(one)
        outcomes = Outcomes(np.stack([one[1] for one in found], axis=1), metric)
        return outcomes if np.allclose(outcomes.scores(), runs["score"].to_numpy(dtype=float), atol=1e-6) else None

    def _one(self, run_id: str, metric: str) -> tuple[Array, Array] | None:
        key = run_id, metric
        if key not in self._read:
            self._read[key] = _load(self.folder / f"{run_id}.parquet", METRICS[metric])
        return self._read[key]


def _load(path: Path, metric: Metric) -> tuple[Array, Array] | None:
    """Ids and outcomes of one run, sorted by id."""
    try:
        table = pd.read_parquet(path)
        outcomes = metric.outcomes(table)
        ids = table["id"].to_numpy()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(ids) == 0 or len(set(ids)) < len(ids) or np.isnan(outcomes).any():
        return None
    order = np.argsort(ids, kind="stable")
    return ids[order], outcomes[order]
