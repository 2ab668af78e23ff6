"""Made-up studies, written through the real result classes, with numbers that look like a real sweep's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd

from analysis.cells import cells
from analysis.comparisons import comparisons
from analysis.frames import read_study
from analysis.page import write_page
from analysis.predictions import Predictions
from analysis.tables import write_tables
from bench.results import (
    Cost,
    CostPair,
    Evaluation,
    Flops,
    Interval,
    Latency,
    Memory,
    Provenance,
    ResultStore,
    RunResult,
    Status,
    TrainingStage,
)

REMAINING = {2.0: 0.696, 4.0: 0.534, 8.0: 0.454}
TEACHER = {"sst2": 0.921, "mnli": 0.842, "rte": 0.705, "mrpc": 0.883}
LOSS = {"variator": 0.010, "distillation": 0.022, "token_dropping": 0.015, "token_merging": 0.035, "pruning": 0.060}
METRIC = {"mrpc": "f1"}
EXAMPLES = {"sst2": 872, "mnli": 2000, "rte": 277, "mrpc": 408}
PARAMETERS = 222_900_000


def make_run(
    task: str = "sst2",
    method: str = "variator",
    ratio: float | None = 4.0,
    seed: int = 0,
    *,
    backbone: str = "t5-base",
    accuracy: float | None = None,
    remaining: float | None = None,
    status: Status = "done",
    reason: str | None = None,
    options: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    latency: bool = True,
    history: int = 2,
    study: str = "glue",
) -> tuple[RunResult, pd.DataFrame]:
    """Build one run and its predictions; every score is computed from the predictions.

    ``options`` are the method's, ``config`` further fields of the run; both are in the run's identity, but the recipe.
    """
    dense = method == "dense"
    core = {"train_examples": 5000, "steps": 1200} | dict(config or {})
    recipe = core.pop("recipe", "default")
    own = {"bottleneck": 64} | dict(options or {}) if method == "variator" else dict(options or {})
    fields = {"task": task, "backbone": backbone, "method": method, "seed": seed, "recipe": recipe, "ratio": ratio}
    identity = {"schema": 1, "data": f"data-of-{task}", "model": f"weights-of-{backbone}", "method": f"{method}@1"}
    identity |= core | {"seed": seed} | ({} if dense else {"ratio": ratio}) | {f"option.{k}": v for k, v in own.items()}
    run_id = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]
    result = RunResult(
        run_id=run_id, study=study, status=status, reason=reason, identity=identity,
        provenance=_provenance(fields | core | own),
        config=fields | core | {"options": own},
    )  # fmt: skip
    if status != "done":
        return result, pd.DataFrame()
    target = REMAINING.get(ratio or 1.0, 1 / (ratio or 1.0))
    achieved = 1.0 if dense else remaining or target + 0.004 * len(method) * (method in ("pruning", "distillation"))
    if accuracy is None:
        accuracy = TEACHER.get(task, 0.8) - (0 if dense else LOSS.get(method, 0.03) * (1.4 - achieved) * 2.5)
        accuracy += np.random.default_rng(crc32(run_id.encode())).normal(0, 0.005)
    predictions = answers(task, accuracy, noise=crc32(run_id.encode()))
    teacher = predictions if dense else make_run(task, "dense", None, seed, backbone=backbone, config=config)[1]
    metric = METRIC.get(task, "accuracy")
    result.task = {"name": task, "metrics": [metric], "caveat": "A balanced sub-sample." if task == "rte" else ""}
    n = len(predictions)
    result.examples = {"train": core["train_examples"] or 9000, "train_available": 9000, "dev": n, "dev_available": n}
    result.evaluations = [
        Evaluation(split="selection", n_examples=200, metrics={metric: _interval(accuracy, 200)}),
        Evaluation(split="dev", n_examples=n, metrics={metric: _interval(score_of(metric, predictions), n)}),
    ]
    best = _interval(score_of(metric, teacher), n)
    result.teacher_evaluations = [Evaluation(split="dev", n_examples=n, metrics={metric: best})]
    result.cost = _cost(n, achieved, None if dense else target, plugged=method == "variator", dense=dense)
    if latency:
        _time(result, achieved)
    records = [{"step": float(i), "loss": 1 / (1 + i), "kl": 0.1, "lr": 1e-4} for i in range(history)]
    for name in ("teacher", "adapt")[: 1 if dense else 2]:
        stage = TrainingStage(
            name=name, artifact=f"{name}-{seed}", cached=False, steps=100, examples=3200, flops=10**13, seconds=60.0,
            history=records,
        )  # fmt: skip
        result.training.append(stage)
    result.predictions = f"predictions/{run_id}.parquet"
    return result, predictions


def answers(task: str, accuracy: float, noise: int) -> pd.DataFrame:
    """Predict two classes; the same examples are hard for every model, as they are in life."""
    n = EXAMPLES.get(task, 500)
    hardness = np.random.default_rng(len(task)).normal(size=n) + np.random.default_rng(noise).normal(0, 0.3, size=n)
    right = np.zeros(n, dtype=bool)
    right[np.argsort(hardness, kind="stable")[: round(accuracy * n)]] = True
    label = np.random.default_rng(1).integers(0, 2, n)
    prediction = np.where(right, label, 1 - label)
    ids = [f"{task}-{i}" for i in range(n)]
    return pd.DataFrame({"id": ids, "prediction": prediction, "label": label, "score": 0.9})


def score_of(metric: str, table: pd.DataFrame) -> float:
    """Compute accuracy, or F1 of class 1 from its textbook precision and recall."""
    if metric == "accuracy":
        return float((table["prediction"] == table["label"]).mean())
    hits = int(((table["prediction"] == 1) & (table["label"] == 1)).sum())
    precision, recall = hits / int((table["prediction"] == 1).sum()), hits / int((table["label"] == 1).sum())
    return 2 * precision * recall / (precision + recall)


def write_runs(root: Path, runs: Iterable[tuple[RunResult, pd.DataFrame]], study: str = "glue") -> Path:
    """Write runs into ``<root>/<study>`` and return that folder."""
    store = ResultStore(root, study)
    for result, predictions in runs:
        store.write(result)
        if len(predictions):
            path = store.predictions_path(result.run_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            predictions.to_parquet(path, index=False)
    return store.folder


def glue(
    tasks: Iterable[str] = ("sst2", "mnli", "rte", "mrpc"),
    backbones: Iterable[str] = ("t5-base",),
    seeds: Iterable[int] = (0, 1, 2),
    methods: Iterable[str] = tuple(LOSS),
) -> list[tuple[RunResult, pd.DataFrame]]:
    """Build a whole sweep with the dense runs, and two cells of each backbone that have no score."""
    runs = []
    for backbone in backbones:
        for task in tasks:
            for seed in seeds:
                runs.append(make_run(task, "dense", None, seed, backbone=backbone))
                for method in methods:
                    runs += [make_run(task, method, ratio, seed, backbone=backbone) for ratio in REMAINING]
        too_far, broken = "ratio 16 asks for 41 % | at least 45 % can be had", "RuntimeError: out of memory"
        runs.append(make_run("sst2", "pruning", 16.0, 0, backbone=backbone, status="skipped", reason=too_far))
        runs.append(make_run("sst2", "pruning", 16.0, 1, backbone=backbone, status="failed", reason=broken))
    return runs


def report(folder: Path) -> None:
    """Write the tables and the page of a study, without its figures, which take the most time."""
    study, predictions = read_study(folder), Predictions(folder)
    table, pairs = cells(study, predictions), comparisons(study, predictions)
    write_tables(study, table, pairs)
    write_page(study, table, pairs)


def _interval(value: float, n: int) -> Interval:
    half = 1.96 * float(np.sqrt(max(value * (1 - value), 0) / n))
    return Interval(value=value, low=value - half, high=min(1.0, value + half))


def _cost(n: int, achieved: float, requested: float | None, plugged: bool, dense: bool) -> Cost:
    pair = CostPair(
        dense=Flops(encoder=10**10 * n, decoder=10**9 * n),
        compressed=Flops(encoder=round(achieved * 10**10 * n), decoder=10**9 * n, overhead=0 if dense else 10**7 * n),
    )
    extra = 1_900_000 if plugged else 0
    return Cost(
        real=pair, padded=pair, batch_size=32, requested_remaining=requested, achieved_remaining=pair.remaining_encoder,
        parameters_teacher=PARAMETERS, parameters_total=PARAMETERS + extra, parameters_added=extra,
        parameters_trained=0 if dense else 1_900_000, bytes_added=4 * extra, bytes_teacher=4 * PARAMETERS,
    )  # fmt: skip


def _time(result: RunResult, achieved: float) -> None:
    rng = np.random.default_rng(crc32(result.run_id.encode()))
    for batch, slower in ((1, 0.12), (32, 0.04)):
        dense = 0.05 * batch**0.8 * rng.lognormal(0, 0.08, 20)
        ours = dense * (achieved + slower) * rng.lognormal(0, 0.05, 20)
        shape: dict[str, Any] = {"batch_size": batch, "sequence_length": 128}
        result.latency.append(Latency(**shape, dense_seconds=list(dense), compressed_seconds=list(ours)))
        result.memory.append(Memory(**shape, dense_bytes=10**7, compressed_bytes=8 * 10**6))


DEFAULTS = {"train_examples": 5000, "steps": 1200, "bottleneck": 64, "recipe": "default"}


def _provenance(values: Mapping[str, Any]) -> Provenance:
    """As a run notes it: its command gives what differs from the defaults; what a recipe sets is given by itself."""
    given = [f"--{name.replace('_', '-')}" for name, value in values.items() if DEFAULTS.get(name) != value]
    command = ["bench", "run", *(part for name in given for part in (name, "x"))]
    return Provenance(
        commit="0123456789abcdef", dirty=False, command=command, started="2026-01-01T00:00:00Z", host="box",
        platform="Linux", hardware="Example CPU", device="cpu", threads=2, versions={"torch": "2.13.0"},
    )  # fmt: skip
