"""RunResult -> what W&B shows of it. Imports no wandb."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.cell import Cell
from bench.config import RunConfig
from bench.results import Evaluation, RunResult

LONGEST_TAG = 64
"""Characters that W&B takes in a tag."""
MOST_SHOWN = 2000
"""Characters of a reason that are shown; the whole is in the result."""


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return every field and option of a run under its own name, as a sweep sets them."""
    fields = config.model_dump(mode="json")
    return {**fields.pop("options"), **fields}


def tags_of(cell: Cell, study: str) -> list[str]:
    """Return what runs are found by."""
    config = cell.config
    ratio = [f"k={config.ratio:g}"] if config.ratio is not None and "ratio" in config.build_method().uses else []
    tags = [cell.task.name, cell.spec.name, config.method, *ratio, study]
    return list(dict.fromkeys(tag[:LONGEST_TAG] for tag in tags))


def notes_of(command: list[str], path: Path, result: RunResult | None = None) -> str:
    """Return what a person reads beside a run: how it is made again, where it lies, what to beware of."""
    lines = [f"Again: `{shlex.join(command)}`", f"Result: `{path}`"]
    if result is not None:
        caveats = [str(result.task["caveat"])] if result.task.get("caveat") else []
        lines += [f"Note: {note}" for note in [*caveats, *result.notes]]
    return "\n\n".join(lines)


def summary_of(result: RunResult) -> dict[str, Any]:
    """Return the numbers of a run by name, a flat mapping of what there is."""
    found: dict[str, Any] = {"status": result.status}
    if result.reason:
        found["reason"] = result.reason[:MOST_SHOWN]
    if result.provenance.seconds is not None:
        found["seconds"] = result.provenance.seconds
    for evaluation in result.evaluations:
        found.update(_scores(evaluation.split, evaluation))
    for evaluation in result.teacher_evaluations:
        found.update(_scores(f"teacher/{evaluation.split}", evaluation))
    found.update(_costs(result))
    dev = result.evaluation("dev")
    if result.status == "done" and result.cost and dev:
        # the pair that a scatter panel draws: the figure of the study
        found["pareto/remaining_encoder_flops"] = result.cost.achieved_remaining
        found["pareto/dev_primary"] = next(iter(dev.metrics.values())).value
    return found


def _scores(prefix: str, evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    first = next(iter(evaluation.metrics), None)
    for name, interval in evaluation.metrics.items():
        for shown in [name, "primary"] if name == first else [name]:
            yield f"{prefix}/{shown}", interval.value
            yield f"{prefix}/{shown}_low", interval.low
            yield f"{prefix}/{shown}_high", interval.high


def _costs(result: RunResult) -> Iterator[tuple[str, Any]]:
    if cost := result.cost:
        yield "flops/remaining_encoder", cost.achieved_remaining
        yield "flops/requested_encoder", cost.requested_remaining
        yield "flops/saved_encoder", 1 - cost.achieved_remaining
        yield "flops/remaining_model", cost.real.remaining_total
        for which in ("dense", "compressed"):
            flops = getattr(cost.real, which)
            for part in ("encoder", "decoder", "head", "overhead", "total"):
                yield f"flops/{which}_{part}", getattr(flops, part)
        for size in ("parameters_teacher", "parameters_total", "parameters_added", "parameters_trained"):
            yield f"size/{size}", getattr(cost, size)
        for size in ("bytes_teacher", "bytes_total", "bytes_added"):
            yield f"size/{size}", getattr(cost, size)
    for timed in result.latency:
        pairs = list(zip(timed.compressed_seconds, timed.dense_seconds, strict=False))
        if pairs:
            name = f"latency/batch_{timed.batch_size}"
            yield f"{name}_dense_ms", 1e3 * statistics.median(timed.dense_seconds)
            yield f"{name}_compressed_ms", 1e3 * statistics.median(timed.compressed_seconds)
            yield f"{name}_ratio", statistics.median(compressed / dense for compressed, dense in pairs)
    for memory in result.memory:
        yield f"memory/batch_{memory.batch_size}_dense_bytes", memory.dense_bytes
        yield f"memory/batch_{memory.batch_size}_compressed_bytes", memory.compressed_bytes


def exit_code(status: str) -> int:
    """Return how W&B is to see the end of a run: 255 is its word for one that was stopped."""
    return {"failed": 1, "diverged": 1, "interrupted": 255}.get(status, 0)
