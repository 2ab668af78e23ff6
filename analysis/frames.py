"""Results to one tidy frame: a row a run, fractions as fractions, units in the names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from analysis.statistics import LEVEL, median_bounds
from bench.results import Evaluation, RunResult

DENSE = "dense"
NEEDED = ("requested_remaining", "remaining", "saved", "remaining_padded", "remaining_total",
          "parameters_added_percent")  # fmt: skip
LONGEST_VALUE = 40
"""Characters of an option's value beyond which a series is named by its beginning and a checksum."""
AXES = ("task", "backbone", "family", "method", "ratio", "seed")


class _Stage(BaseModel):
    """A training stage without its history, which can be most of a result's bytes and is in no table."""

    model_config = ConfigDict(extra="ignore")

    name: str
    cached: bool
    steps: int
    examples: int
    flops: int
    seconds: float


class LeanResult(RunResult):
    """A result as the analysis reads it: all but the histories of its trainings."""

    training: list[_Stage] = Field(default_factory=list)  # type: ignore[assignment]


@dataclass
class Study:
    """The runs of one study.

    Attributes
    ----------
    folder
        ``results/<study>``.
    frame
        One row a run that could be read; empty where there is none. See `read_study` for the columns.
    problems
        One line for each file that is no result of this suite, naming it.
    results
        Run id -> the result, for each row of the frame.
    """

    folder: Path
    frame: pd.DataFrame
    problems: list[str] = field(default_factory=list)
    results: dict[str, LeanResult] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the study, which is its folder's."""
        return self.folder.name

    @cached_property
    def done(self) -> pd.DataFrame:
        """The rows with a score."""
        frame = self.frame
        return frame[(frame["status"] == "done") & frame["score"].notna()] if len(frame) else frame


def read_study(folder: Path) -> Study:
    """Read every ``runs/*.json`` of a study.

    Returns
    -------
    Study
        Its frame has, among others, ``score`` (the task's first metric on dev, a fraction) with the bootstrap interval
        over examples ``example_low`` and ``example_high``; ``teacher_score``; ``drop`` (teacher - score);
        ``remaining`` (encoder FLOPs over the teacher's, real tokens), ``saved`` = 1 - remaining;
        ``latency_ratio.b<batch>`` (median of compressed/dense over paired samples) with ``_low`` and ``_high``;
        ``training_*`` (what the method trained, without the teacher); and one column ``option.<name>`` for every other
        field of the configuration. ``series`` names the method and those options in which its runs differ.
    """
    rows, problems = [], []
    results: dict[str, LeanResult] = {}
    for path in sorted((folder / "runs").glob("*.json")):
        try:
            result = LeanResult.model_validate_json(path.read_bytes())
        except (ValidationError, OSError) as error:
            reason = "; ".join(str(error).splitlines()[:3])
            problems.append(f"{path.name} is left out: it is no readable result ({reason})")
            continue
        if result.run_id != path.stem:
            problems.append(f"{path.name} is left out: it holds run {result.run_id}, so it is a copy or was renamed")
            continue
        rows.append(_row(result))
        results[result.run_id] = result
    frame = pd.DataFrame(rows)
    if rows:
        if "remaining" not in frame:  # no run came as far as being measured
            frame = frame.assign(**dict.fromkeys(NEEDED, math.nan))
        frame.insert(0, "study", folder.name)
        frame.insert(list(frame.columns).index("ratio"), "series", _series(frame))
        identity = [c for c in frame.columns if c.startswith("identity.") or c == "command"]
        order = ["backbone", "task", "series", "ratio", "seed", "run_id"]
        frame = frame.drop(columns=identity).sort_values(order, ignore_index=True)
    return Study(folder, frame, problems, results)


def groups(frame: pd.DataFrame, by: str | list[str], sort: bool = True) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Yield (key, rows), a missing value being a key like any other: dense has no ratio."""
    yield from frame.groupby(by, dropna=False, sort=sort)


def _row(result: RunResult) -> dict[str, Any]:
    config = result.config
    row: dict[str, Any] = {"run_id": result.run_id, "status": result.status, "reason": result.reason}
    task = str(config.get("task", ""))
    row["task"] = result.task.get("name") or (Path(task).stem if "/" in task else task)
    row |= {name: config.get(name) for name in ("backbone", "family", "method")}
    # a method that has no ratio, such as dense, has none in its identity
    ratio, seed = (result.identity or config).get("ratio"), config.get("seed")
    row["ratio"] = math.nan if ratio is None or row["method"] == DENSE else float(ratio)
    row["seed"] = -1 if seed is None else int(seed)
    row |= _scores(result) | _costs(result) | _timings(result)
    own = [stage for stage in result.training if stage.name != "teacher"]
    row |= {f"training_{what}": sum(getattr(stage, what) for stage in own) for what in ("seconds", "steps", "flops")}
    row |= {f"examples.{name}": count for name, count in result.examples.items()}
    made = result.provenance
    row |= {name: getattr(made, name) for name in ("commit", "dirty", "device", "hardware", "threads", "started")}
    row["command"] = frozenset(part.removeprefix("--").replace("-", "_") for part in made.command[2:])
    row |= {"caveat": result.task.get("caveat") or "", "notes": "; ".join(result.notes)}
    row |= {f"knob.{name}": value for name, value in _flat(result.knob)}
    row |= {f"option.{name.removeprefix('options.')}": value for name, value in _flat(config) if name not in AXES}
    row |= {f"identity.{name}": value for name, value in _flat(result.identity) if name not in ("ratio", "seed")}
    return row


def _scores(result: RunResult) -> dict[str, Any]:
    def primary(evaluations: list[Evaluation], split: str) -> tuple[float, float, float, int, float]:
        found = next((e for e in evaluations if e.split == split), None)
        interval = found.metrics.get(metric) if found and metric else None
        if found is None or interval is None:
            return math.nan, math.nan, math.nan, 0, LEVEL
        return interval.value, interval.low, interval.high, found.n_examples, interval.level

    dev = result.evaluation("dev")
    declared = result.task.get("metrics") or (list(dev.metrics) if dev else [])
    metric = declared[0] if declared else None
    score, low, high, n_examples, level = primary(result.evaluations, "dev")
    teacher, teacher_low, teacher_high, _, _ = primary(result.teacher_evaluations, "dev")
    if result.config.get("method") == DENSE and math.isnan(teacher):
        teacher, teacher_low, teacher_high = score, low, high
    return {
        "metric": metric,
        "score": score,
        "example_low": low,
        "example_high": high,
        "interval_level": level,
        "n_examples": n_examples,
        "selection_score": primary(result.evaluations, "selection")[0],
        "teacher_score": teacher,
        "teacher_low": teacher_low,
        "teacher_high": teacher_high,
        "drop": teacher - score,
        "drop_percent": 100 * (teacher - score) / teacher if teacher else math.nan,
    }


def _costs(result: RunResult) -> dict[str, Any]:
    cost = result.cost
    if cost is None:
        return {}
    dev = result.evaluation("dev")
    n = dev.n_examples if dev and dev.n_examples else math.nan
    return {
        "requested_remaining": math.nan if cost.requested_remaining is None else cost.requested_remaining,
        "remaining": cost.achieved_remaining,
        "saved": 1 - cost.achieved_remaining,
        "remaining_padded": cost.padded.remaining_encoder,
        "remaining_total": cost.real.remaining_total,
        "encoder_flops_per_example": cost.real.compressed.encoder / n,
        "total_flops_per_example": cost.real.compressed.total / n,
        "overhead_flops_per_example": cost.real.compressed.overhead / n,
        "teacher_encoder_flops_per_example": cost.real.dense.encoder / n,
        "parameters_teacher": cost.parameters_teacher,
        "parameters_total": cost.parameters_total,
        "parameters_added": cost.parameters_added,
        "parameters_added_percent": 100 * cost.parameters_added / cost.parameters_teacher,
        "parameters_trained": cost.parameters_trained,
        "bytes_added": cost.bytes_added,
        "bytes_teacher": cost.bytes_teacher,
    }


def _timings(result: RunResult) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for shape in result.latency:
        pairs = zip(shape.compressed_seconds, shape.dense_seconds, strict=False)
        ratios = np.array([compressed / dense for compressed, dense in pairs])
        name = _shape_column("latency_ratio", shape.batch_size, shape.sequence_length, row)
        row[name] = float(np.median(ratios)) if len(ratios) else math.nan
        row[f"{name}_low"], row[f"{name}_high"] = median_bounds(ratios)
        row[f"{name}_flops"] = shape.compressed_flops / shape.dense_flops if shape.dense_flops else math.nan
    for peak in result.memory:
        name = _shape_column("memory_ratio", peak.batch_size, peak.sequence_length, row)
        row[name] = peak.compressed_bytes / peak.dense_bytes
    return row


def _shape_column(stem: str, batch: int, length: int, taken: Mapping[str, Any]) -> str:
    name = f"{stem}.b{batch}"
    return name if name not in taken else f"{name}_n{length}"


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested mapping under dotted names; lists become JSON, so that they compare and print."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, str | int | float | bool) or value is None:
            yield name, value
        else:
            yield name, json.dumps(value, sort_keys=True)


def _series(frame: pd.DataFrame) -> pd.Series:
    """Name each row's method, with whatever tells its runs apart on one backbone and task, other than ratio and seed.

    What can tell them apart is their identity; the recipe is named instead where that says as much. A default, which
    the run's command does not give, is named only where its name would else be another's.
    """
    names = frame["method"].astype(object).copy()
    where = ["backbone", "task"]
    columns = list(map(str, frame.columns))
    identity = [c for c in columns if c.startswith("identity.")] or [c for c in columns if c.startswith("option.")]
    for method, rows in groups(frame, "method"):
        varied = rows.groupby(where, dropna=False)[identity].nunique(dropna=False).max() > 1
        told = frozenset().union(*rows["command"])
        # what a command gives says more than what follows from it, such as the batch of a training that is left out
        differing = sorted((key for key in identity if varied[key]), key=lambda key: key.rsplit(".", 1)[-1] not in told)
        # an identity leaves out what plays no part, which the configuration still names: what is shown must differ
        named = (f"option.{key.rsplit('.', 1)[-1]}" for key in differing)
        differing = [name if name in rows else key for name, key in zip(named, differing, strict=True)]
        wanted, chosen = _groups(rows, [*where, *differing]), list[str]()
        for key in ("option.recipe", *differing):
            if key in rows and _groups(rows, [*where, *chosen]) < min(wanted, _groups(rows, [*where, *chosen, key])):
                chosen.append(key)
        for key in list(chosen):
            others = [other for other in chosen if other != key]
            if _groups(rows, [*where, *others]) >= wanted:
                chosen = others
        shown = [key.rsplit(".", 1)[-1] for key in chosen]
        values = chosen
        settings = list(rows[values].itertuples(index=False, name=None))
        given = [tuple(name in command for name in shown) for command in rows["command"]]
        brief = [_named(str(method), shown, *pair) for pair in zip(settings, given, strict=True)]
        alike = len(set(brief)) < len(set(settings))
        for index, name, setting in zip(rows.index, brief, settings, strict=True):
            names[index] = _named(str(method), shown, setting, (True,) * len(shown)) if alike else name
    return names


def _named(method: str, names: list[str], values: tuple[object, ...], given: tuple[bool, ...]) -> str:
    pairs = [(name, _text(value)) for name, value, told in zip(names, values, given, strict=True) if told]
    told = ", ".join(f"{name}={value}" for name, value in pairs if (name, value) != ("recipe", "default"))
    return f"{method} ({told})" if told else method


def _groups(rows: pd.DataFrame, keys: list[str]) -> int:
    return rows.groupby(keys, dropna=False).ngroups


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "default"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 9]}…{crc32(text.encode()):08x}"
