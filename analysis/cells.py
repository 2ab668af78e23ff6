"""From runs to cells: one row for each backbone, task, series and ratio, and for the average over tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
from scipy import stats

from analysis.comparisons import paired_test
from analysis.frames import DENSE, Study, groups
from analysis.predictions import Predictions
from analysis.statistics import (
    LEVEL,
    RESAMPLES,
    Array,
    Bounds,
    pareto_front,
    percentile_bounds,
    t_interval,
    two_sided,
    wilson,
)

AVERAGE = "average"
KEYS = ["backbone", "task", "series", "method", "ratio"]


def cells(study: Study, predictions: Predictions | None = None) -> pd.DataFrame:
    """Aggregate runs over seeds, and tasks into their average.

    Parameters
    ----------
    study
        Runs as read.
    predictions
        Per-example scores; without them there are no paired tests, and intervals come from the stored ones.

    Returns
    -------
    DataFrame
        One row a cell, ``task`` being ``"average"`` for the mean of the tasks' first metrics. Numbers are means over
        seeds. ``seed_low`` and ``seed_high`` are Student's interval over seeds (NaN for one seed); ``example_low`` and
        ``example_high`` a bootstrap over dev examples, each resampled with all its seeds. ``p`` compares with the
        dense teachers of the same seeds on the same examples, and so do ``drop_low`` and ``drop_high``, a paired
        bootstrap. ``on_front`` and ``best`` compare within one backbone and
        task, the latter at equal ratio. An average that lacks a task has its names in ``missing_tasks`` and no score.
    """
    runs = _with_teachers(study.done)
    if runs.empty:
        return pd.DataFrame()
    predictions = predictions or Predictions(Path())
    numbers = [c for c in runs.select_dtypes("number").columns if c not in ("ratio", "seed") and "option." not in c]
    rows: list[dict[str, Any]] = []
    score_draws: dict[int, Array] = {}
    gap_draws: dict[int, Array | None] = {}
    for key, group in groups(runs, KEYS):
        row = dict(zip(KEYS, key, strict=True)) | _means(group[numbers])
        rng = np.random.default_rng(crc32(repr(key).encode()))
        sample = _resample(group, _teachers_of(group, runs), predictions, rng)
        score_draws[len(rows)], gap_draws[len(rows)] = sample.scores, sample.gaps
        row |= {"example_low": sample.bounds.low, "example_high": sample.bounds.high}
        row |= {"p": sample.p, "test": sample.test} | _drop_bounds(sample.gaps)
        row |= {"metric": group["metric"].iloc[0], "seeds": len(group), "tasks": 1, "missing_tasks": ""}
        row["seed_low"], row["seed_high"] = t_interval(group["score"].to_numpy())
        row["seed_scores"] = tuple(zip(group["seed"], group["score"], strict=True))
        rows.append(row)
    table = pd.DataFrame(rows)
    table = pd.concat([table, _averages(table, numbers, score_draws, gap_draws)], ignore_index=True)
    table["drop_percent"] = 100 * table["drop"] / table["teacher_score"]
    return marked(table)


def _with_teachers(done: pd.DataFrame) -> pd.DataFrame:
    """Add a dense row for each backbone, task and seed whose teacher was evaluated but is no run of its own."""
    if done.empty:
        return done
    where = ["backbone", "task", "seed"]
    have = set(done.loc[done["method"] == DENSE, where].itertuples(index=False, name=None))
    teachers = done[done["teacher_score"].notna()].drop_duplicates([*where, "teacher_score"])
    teachers = teachers.drop_duplicates(where, keep=False)  # of several teachers, none is the dense point
    lacking = [key not in have for key in teachers[where].itertuples(index=False, name=None)]
    teachers = teachers[np.array(lacking, dtype=bool)]
    kept = teachers[[*where, "metric", "n_examples", "teacher_score", "interval_level"]].assign(
        run_id="", method=DENSE, series=DENSE, ratio=np.nan, score=teachers["teacher_score"], drop=0.0,
        example_low=teachers["teacher_low"], example_high=teachers["teacher_high"],
    )  # fmt: skip
    runs = pd.concat([done, kept], ignore_index=True) if len(kept) else done.copy()
    dense = runs["method"] == DENSE
    runs.loc[dense, ["remaining", "remaining_total"]] = 1.0
    runs.loc[dense, ["saved", "parameters_added_percent"]] = 0.0
    return runs


class _Sample(NamedTuple):
    """What resampling the examples of a cell gives."""

    bounds: Bounds
    scores: Array
    gaps: Array | None = None
    p: float = float("nan")
    test: str = ""


def _teachers_of(group: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame | None:
    """Return the dense runs of the same seeds, in the same order; ``None`` if one is missing."""
    first = group.iloc[0]
    if first["method"] == DENSE:
        return None
    dense = runs[(runs["method"] == DENSE) & (runs["backbone"] == first["backbone"]) & (runs["task"] == first["task"])]
    pairs = group[["seed", "teacher_score"]].merge(dense.drop(columns="teacher_score"), on="seed")
    pairs = pairs[np.isclose(pairs["teacher_score"], pairs["score"])].drop_duplicates("seed")
    return pairs if len(pairs) == len(group) else None


def _resample(
    group: pd.DataFrame, teachers: pd.DataFrame | None, predictions: Predictions, rng: np.random.Generator
) -> _Sample:
    """Resample a cell's examples, each with all its seeds and with the teachers' outcomes, where they are known."""
    n = len(group)
    stored = Bounds(float(group["example_low"].mean()), float(group["example_high"].mean()))
    both = None if teachers is None else predictions.outcomes(pd.concat([group, teachers], ignore_index=True))
    ours = both or predictions.outcomes(group)
    if ours is None:
        # nothing to resample: the stored intervals are taken as those of a normal distribution
        spread = (stored.high - stored.low) / (2 * stats.norm.ppf((1 + LEVEL) / 2))
        return _Sample(stored, group["score"].mean() + spread * rng.standard_normal(RESAMPLES))
    draws = ours.draws(rng, RESAMPLES)
    scores = draws[:, :n].mean(axis=1)
    bounds = stored if n == 1 and not np.isnan(stored.low) else percentile_bounds(scores)
    if group["metric"].iloc[0] == "accuracy" and group["score"].iloc[0] in (0, 1) and np.ptp(scores) == 0:
        # resampling nothing but right answers would claim certainty
        bounds = wilson(round(group["score"].iloc[0] * len(ours.table)), len(ours.table))
    if both is None:
        return _Sample(bounds, scores)
    test = paired_test(both, draws, group["metric"].iloc[0])
    return _Sample(bounds, scores, scores - draws[:, n:].mean(axis=1), test.p, test.test)


def _averages(
    table: pd.DataFrame, numbers: list[str], score_draws: dict[int, Array], gap_draws: dict[int, Array | None]
) -> pd.DataFrame:
    """Mean over tasks of each series and ratio, for backbones with several tasks; tasks are independent samples."""
    rows = []
    for backbone, block in groups(table, "backbone"):
        every = sorted(block["task"].unique())
        if len(every) < 2:
            continue
        for (series, method, ratio), group in groups(block, ["series", "method", "ratio"]):
            row: dict[str, Any] = dict(zip(KEYS, (backbone, AVERAGE, series, method, ratio), strict=True))
            row |= {"metric": "mean of the tasks' first metrics", "tasks": len(group), "test": ""}
            missing = [task for task in every if task not in set(group["task"])]
            row["missing_tasks"] = ", ".join(missing)
            if not missing:
                row |= _means(group[numbers])
                bounds = percentile_bounds(np.mean([score_draws[i] for i in group.index], axis=0))
                row |= {"example_low": bounds.low, "example_high": bounds.high, "seeds": int(group["seeds"].min())}
                by_seed = [dict(pairs) for pairs in group["seed_scores"]]
                shared = sorted(set.intersection(*(set(scores) for scores in by_seed)))
                means = [float(np.mean([scores[seed] for scores in by_seed])) for seed in shared]
                row["seed_scores"] = tuple(zip(shared, means, strict=True))
                row["seed_low"], row["seed_high"] = t_interval(np.array(means))
                gaps = [gap for i in group.index if (gap := gap_draws[i]) is not None]
                if len(gaps) == len(group):
                    mean = np.mean(gaps, axis=0)
                    row |= {"p": two_sided(mean), "test": "bootstrap"} | _drop_bounds(mean)
            rows.append(row)
    return pd.DataFrame(rows)


def _drop_bounds(gaps: Array | None) -> dict[str, float]:
    """Bounds of teacher minus model, from draws of model minus teacher."""
    bounds = Bounds(float("nan"), float("nan")) if gaps is None else percentile_bounds(-gaps)
    return {"drop_low": bounds.low, "drop_high": bounds.high}


def _means(rows: pd.DataFrame) -> dict[str, float]:
    return {str(name): value for name, value in rows.mean().items()}


def defaults(table: pd.DataFrame) -> pd.DataFrame:
    """Keep the cells that a comparison of methods is about: each method as it is by default, and the teachers.

    Of a method that no run of a backbone has by default, all cells stay. Fronts and best scores are of what is kept.
    """
    is_default = table["series"] == table["method"]
    has_default = is_default.groupby([table["backbone"], table["method"]]).transform("any")
    return marked(table[is_default | ~has_default | (table["method"] == DENSE)].copy())


def marked(table: pd.DataFrame) -> pd.DataFrame:
    """Say which cells are on the front of their backbone and task, and which are the best at their ratio."""
    table["on_front"], table["best"] = False, False
    for _, block in groups(table, ["backbone", "task"]):
        table.loc[block.index, "on_front"] = pareto_front(block["remaining"].to_numpy(), block["score"].to_numpy())
        for _, rivals in groups(block[block["score"].notna() & block["ratio"].notna()], "ratio"):
            if len(rivals) > 1:
                table.loc[rivals.index, "best"] = rivals["score"] == rivals["score"].max()
    return table
