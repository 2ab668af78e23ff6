"""Numbers of a study of serving: every policy under every load, policies against each other, real against simulated."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.statistics import RESAMPLES, Array, Bounds, percentile_bounds, t_interval
from bench.serving.agreement import simulate_again
from bench.serving.records import ServingCell, ServingStore, ServingStudy, Tally

MILLISECONDS = 1e3


class Condition(NamedTuple):
    """What arrived, and who answered; the same for every engine and policy.

    ``times`` is the factor of the load that ``replicas`` share, ``seconds`` how long requests arrived.
    """

    mode: str
    replicas: int
    times: float
    seconds: float
    load: str


@dataclass(frozen=True)
class Group:
    """One policy of one engine under one condition: its cells, which differ in the seed of the arrivals alone.

    Attributes
    ----------
    condition, engine, policy
        What it is.
    cells
        By ascending seed.
    tally
        Requests of all cells, counted by example.
    """

    condition: Condition
    engine: str
    policy: str
    cells: list[ServingCell]
    tally: Tally

    @property
    def static(self) -> bool:
        """Whether it is one k whatever the load."""
        return self.policy.startswith("static:")

    def over_seeds(self, name: str) -> Array:
        """Return a number of the summary, for each seed."""
        return np.array([getattr(cell.summary, name) for cell in self.cells], float)


@dataclass(frozen=True)
class Serving:
    """A study of serving as it was read."""

    study: ServingStudy
    store: ServingStore
    groups: list[Group]


def read_serving(folder: Path) -> Serving | None:
    """Read ``results/<study>``, or return ``None`` where nothing was served.

    Raises
    ------
    DamagedResult
        If a file is torn.
    """
    store = ServingStore(folder)
    study = store.read()
    if study is None:
        return None
    cells = sorted(store, key=lambda cell: (_key(cell), cell.load_seed, cell.cell_id))
    groups = []
    for (condition, engine, policy), found in groupby(cells, _key):
        mine = list(found)
        tally = functools.reduce(operator.add, map(store.tally, mine))
        groups.append(Group(condition, engine, policy, mine, tally))
    return Serving(study, store, sorted(groups, key=lambda group: _order(group, study)))


def _key(cell: ServingCell) -> tuple[Condition, str, str]:
    return Condition(cell.mode, cell.replicas, cell.times, cell.seconds, cell.load), cell.engine, cell.policy


def _order(group: Group, study: ServingStudy) -> tuple[object, ...]:
    engines = [calibration.engine for calibration in study.calibrations]
    k = int(group.policy.rpartition("=")[2]) if group.static else 0  # as a text, 16 would come before 2
    return group.condition, engines.index(group.engine), not group.static, k, group.policy


def served_frame(serving: Serving) -> pd.DataFrame:
    """Return one row a condition, engine and policy; shares as shares, times in milliseconds.

    Intervals are 95 %: of means of scores, by drawing dev examples again, all requests for one together; of everything
    else, Student's over the seeds of the arrivals, if there are several.
    """
    draws = _draws(serving)
    return pd.DataFrame([_row(group, draws, serving.study) for group in serving.groups])


def _row(group: Group, draws: Array, study: ServingStudy) -> dict[str, object]:
    tally, row = group.tally, {**group.condition._asdict(), "engine": group.engine, "policy": group.policy}
    row |= {"seeds": len(group.cells), "requests": int(tally.requests.sum())}
    row["offered_per_second"] = float(np.mean([cell.offered for cell in group.cells]))
    for name, sums in (("accuracy", tally.score), ("right_in_time", tally.score_in_time)):
        row |= _with_bounds(name, _mean(sums, tally), percentile_bounds(_resampled(sums, tally, draws)))
    for name, column, scale in (
        ("in_time", "in_time", 1.0),
        ("p50_seconds", "p50_ms", MILLISECONDS),
        ("p95_seconds", "p95_ms", MILLISECONDS),
        ("p99_seconds", "p99_ms", MILLISECONDS),
        ("throughput", "answers_per_second", 1.0),
    ):
        values = scale * group.over_seeds(name)
        bounds = t_interval(values)
        if column == "in_time":
            bounds = Bounds(*np.clip(bounds, 0, 1))
        row |= _with_bounds(column, float(values.mean()), bounds)
    weights = np.array([cell.summary.requests for cell in group.cells], float)
    for k in _ks(study):
        shares = [cell.summary.share_at_k.get(k, 0.0) for cell in group.cells]
        row[f"share_at_k{k}"] = float(np.average(shares, weights=weights))
    return row


def _with_bounds(name: str, value: float, bounds: Bounds) -> dict[str, object]:
    return {name: value, f"{name}_low": bounds.low, f"{name}_high": bounds.high}


def _ks(study: ServingStudy) -> list[int]:
    return sorted({model.k for calibration in study.calibrations for model in calibration.models})


def differences_frame(serving: Serving) -> pd.DataFrame:
    """Return each adaptive policy minus each static one of its engine, and minus itself on each rival engine.

    All have the same requests. Differences of scores are paired by example, those of shares in time by seed.
    """
    draws, rows = _draws(serving), []
    for a, b in _pairs(serving):
        row: dict[str, object] = {**a.condition._asdict(), "engine": a.engine, "policy": a.policy}
        row |= {"against_engine": b.engine, "against_policy": b.policy}
        for name in ("accuracy", "right_in_time"):
            sums = [tally.score if name == "accuracy" else tally.score_in_time for tally in (a.tally, b.tally)]
            value = _mean(sums[0], a.tally) - _mean(sums[1], b.tally)
            drawn = _resampled(sums[0], a.tally, draws) - _resampled(sums[1], b.tally, draws)
            row |= _with_bounds(name, value, percentile_bounds(drawn))
        paired = a.over_seeds("in_time") - b.over_seeds("in_time")
        row |= _with_bounds("in_time", float(paired.mean()), t_interval(paired))
        rows.append(row)
    return pd.DataFrame(rows)


def _pairs(serving: Serving) -> Iterator[tuple[Group, Group]]:
    first = serving.study.calibrations[0].engine
    for a in serving.groups:
        if a.static:
            continue
        for b in serving.groups:
            alike = [c.load_seed for c in a.cells] == [c.load_seed for c in b.cells]
            if a.condition != b.condition or not alike:
                continue
            rival = a.engine == first != b.engine and b.policy == a.policy
            if rival or (a.engine == b.engine and b.static):
                yield a, b


def agreement_frame(serving: Serving) -> pd.DataFrame:
    """Return a row for each load that was served in real time and simulated with the same arrivals.

    ``p95_ms_paced`` is of the simulation at the ``pace`` that the machine had while it served; see
    `bench.serving.agreement.simulate_again`.
    """
    simulated = {
        (group.engine, group.policy, cell.load, cell.load_seed, cell.seconds): cell
        for group in serving.groups
        for cell in group.cells
        if group.condition[:3] == ("simulated", 1, 1.0)
    }
    deadline, rows = serving.study.deadline_seconds, []
    for group in serving.groups:
        for cell in group.cells:
            found = simulated.get((group.engine, group.policy, cell.load, cell.load_seed, cell.seconds))
            if cell.mode != "real" or not found:
                continue
            again = simulate_again(serving.store, serving.study, cell)
            pace, paced = (again[0], again[1].summary(deadline)) if again else (math.nan, None)
            real, other, third = (
                MILLISECONDS * summary.p95_seconds if summary else math.nan
                for summary in (cell.summary, found.summary, paced)
            )
            rows.append(
                {
                    "engine": cell.engine,
                    "policy": cell.policy,
                    "load": cell.load,
                    "seed": cell.load_seed,
                    "p95_ms_real": real,
                    "p95_ms_simulated": other,
                    "ratio": other / real,
                    "pace": pace,
                    "p95_ms_paced": third,
                    "ratio_paced": third / real,
                }
            )
    return pd.DataFrame(rows)


def _mean(sums: Array, tally: Tally) -> float:
    return float(sums.sum() / tally.requests.sum())


def _draws(serving: Serving) -> Array:
    """Return how often each dev example is drawn, (resamples, examples); the same for all that is compared."""
    n = len(serving.study.calibrations[0].examples)
    rng = np.random.default_rng(0)
    return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


def _resampled(sums: Array, tally: Tally, draws: Array) -> Array:
    found: Array = (draws @ sums) / (draws @ tally.requests)
    return found
