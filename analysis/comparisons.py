"""Paired comparisons of two models on the same examples and seeds."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd

from analysis.frames import Study, groups
from analysis.predictions import Outcomes, Predictions
from analysis.statistics import RESAMPLES, Array, holm, mcnemar, percentile_bounds, two_sided


class PairedTest(NamedTuple):
    """Comparison of a with b.

    Attributes
    ----------
    difference
        Score of a minus score of b, the mean over seeds, a fraction.
    low, high
        Central bootstrap interval of the difference over examples.
    p
        Two-sided p-value of "no difference".
    test
        ``"mcnemar"`` (exact) or ``"bootstrap"`` (paired).
    """

    difference: float
    low: float
    high: float
    p: float
    test: str


def paired_test(outcomes: Outcomes, draws: Array, metric: str) -> PairedTest:
    """Compare the first half of some runs with the second half.

    Parameters
    ----------
    outcomes
        Of the runs of a, one a seed, and then of those of b.
    draws
        Their scores on bootstrap resamples, (resamples, runs).
    metric
        Name of the metric.

    Returns
    -------
    PairedTest
        McNemar's exact test for the accuracy of one seed, the paired bootstrap otherwise.
    """
    n = outcomes.table.shape[1] // 2
    scores = outcomes.scores()
    gaps = draws[:, :n].mean(axis=1) - draws[:, n:].mean(axis=1)
    exact = metric == "accuracy" and n == 1
    p = mcnemar(outcomes.table[:, 0, 0], outcomes.table[:, 1, 0]) if exact else two_sided(gaps)
    return PairedTest(
        float(scores[:n].mean() - scores[n:].mean()), *percentile_bounds(gaps), p, "mcnemar" if exact else "bootstrap"
    )


def comparisons(study: Study, predictions: Predictions) -> pd.DataFrame:
    """Compare every two series of one backbone, task and ratio on the seeds that both have.

    Returns
    -------
    DataFrame
        ``a``, ``b``, ``seeds``, ``examples``, the fields of `PairedTest`, and ``p_holm``, adjusted for all
        pairs of the same backbone, task and ratio. A pair without common predictions has no row.
    """
    columns = ["backbone", "task", "ratio", "a", "b", "metric", "seeds", "examples", *PairedTest._fields]
    blocks = []
    runs = study.done
    for key, group in groups(runs[runs["ratio"].notna()], ["backbone", "task", "ratio"]) if len(runs) else ():
        rows = []
        for a, b in combinations(sorted(group["series"].unique()), 2):
            pair = [group[group["series"] == series].set_index("seed") for series in (a, b)]
            seeds = sorted(set(pair[0].index) & set(pair[1].index))
            both = predictions.outcomes(pd.concat([side.loc[seeds] for side in pair])) if seeds else None
            if both is None:
                continue
            draws = both.draws(np.random.default_rng(crc32(repr((key, a, b)).encode())), RESAMPLES)
            metric = group["metric"].iloc[0]
            rows.append([*key, a, b, metric, len(seeds), len(both.table), *paired_test(both, draws, metric)])
        block = pd.DataFrame(rows, columns=columns)
        blocks.append(block.assign(p_holm=holm(block["p"].to_numpy(dtype=float))))
    return pd.concat(blocks, ignore_index=True) if blocks else pd.DataFrame(columns=[*columns, "p_holm"])


def both_ways(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return every comparison from either side: of ``series`` with ``other``, in place of a and b."""
    seen_from_b = pairs.rename(columns={"a": "other", "b": "series"})
    seen_from_b = seen_from_b.assign(difference=-pairs["difference"], low=-pairs["high"], high=-pairs["low"])
    return pd.concat([pairs.rename(columns={"a": "series", "b": "other"}), seen_from_b], ignore_index=True)
