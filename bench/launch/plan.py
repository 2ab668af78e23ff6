"""What a sweep will do and cost, before it does. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.artifacts import ArtifactCache
from bench.backbones.spec import BackboneSpec
from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.errors import BenchError, DamagedResult, Unreachable
from bench.locks import is_held
from bench.measure.closed_form import backbone_parameters, encoder, weight_bytes
from bench.methods.base import Method
from bench.results import ResultStore
from bench.runner import Mode, is_settled
from bench.tasks.sources import locate
from bench.tasks.spec import TaskSpec

PLANNED_LENGTH = 128
"""Tokens at which a plan states remaining FLOPs; results state them on the task's own examples."""

HUB_TRAIN_ROWS = {
    "mnli": 392_702,
    "qnli": 104_743,
    "qqp": 363_846,
    "rte": 2_490,
    "sst2": 67_349,
    "mrpc": 3_668,
    "squad": 87_599,
}
DEFAULT_RATE = 1.5e11
"""Training FLOPs a second that are assumed while the store knows no finished training of this machine."""
SECONDS_PER_CELL = 25.0
"""Loading, evaluating and measuring; a rough figure of a small model on a CPU."""


@dataclass(frozen=True)
class PlannedCell:
    """One line of a plan.

    Attributes
    ----------
    config
        The cell.
    run_id
        Its hash; ``None`` for an error.
    state
        ``to do``, ``done``, ``skipped``, ``failed``, ``diverged``, ``interrupted``, ``running`` or ``error``.
    reason
        Why it is skipped, or what failed.
    knob
        The method's native setting.
    remaining
        Remaining encoder FLOPs at 128 tokens; 1 for dense.
    encoder_gflops
        Dense encoder at 128 tokens, in 10^9 FLOPs.
    parameters, added
        Of the backbone, and of the plugin.
    weight_bytes
        Memory of the backbone's weights in fp32.
    cached
        Artifacts that need not be made again.
    flops
        Training FLOPs that are still to do.
    needs
        Names of what it shares with other cells and nobody has made yet, such as its teacher.
    """

    config: RunConfig
    run_id: str | None
    state: str
    reason: str = ""
    knob: str = ""
    remaining: float | None = None
    encoder_gflops: float | None = None
    parameters: int | None = None
    added: int | None = None
    weight_bytes: int | None = None
    cached: tuple[str, ...] = ()
    flops: float = 0.0
    needs: frozenset[str] = frozenset()

    @property
    def pending(self) -> bool:
        """Whether this machine will run it, or wait for whoever does."""
        return self.state in ("to do", "interrupted", "running")


def plan(
    configs: Iterable[RunConfig], store: ResultStore, where: Surroundings, mode: Mode = "missing"
) -> list[PlannedCell]:
    """Return what each run would do; a cell that cannot be resolved is a line with its reason."""
    cache = ArtifactCache(where.artifacts)
    shared: set[str] = set()
    cells = []
    for config in configs:
        try:
            cells.append(_plan_cell(config, store, where, mode, cache, shared))
        except BenchError as error:
            cells.append(PlannedCell(config, None, "error", str(error)))
    return cells


def _plan_cell(
    config: RunConfig, store: ResultStore, where: Surroundings, mode: Mode, cache: ArtifactCache, shared: set[str]
) -> PlannedCell:
    cell = Cell.resolve(config, where)
    try:
        stored, damage = store.read(cell.run_id), ""
    except DamagedResult as error:
        if mode == "read-only":
            raise
        stored, damage = None, str(error).replace("Move it away and run the cell again", "A run puts it aside")
    state, reason = "to do", cell.skip_reason() or ""
    if reason:
        state = "skipped"
    elif stored is not None and is_settled(stored, mode):
        state, reason = stored.status, stored.reason or ""
    elif stored is not None and stored.status in ("running", "interrupted"):
        state = "running" if is_held(store.lock_path(cell.run_id)) else "interrupted"
    planned = PlannedCell(
        config, cell.run_id, state, reason or damage, **_backbone_costs(cell.spec, cell.task.kind, cell.task.n_outputs)
    )
    if state != "skipped":
        try:
            costs = _method_costs(config.build_method(), cell.spec, config.ratio)
            planned = dataclasses.replace(planned, **costs)
        except Unreachable as error:
            planned = dataclasses.replace(planned, state="skipped", reason=str(error))
    if planned.pending:
        planned = dataclasses.replace(planned, **_work(cell, cache, where, shared))
    return planned


# A plan of thousands of cells asks for the prices of a few shapes.
@functools.lru_cache(1024)
def _backbone_costs(spec: BackboneSpec, kind: str, n_outputs: int) -> dict[str, Any]:
    parameters = backbone_parameters(spec, None if kind == "qa" else max(1, n_outputs))
    return {
        "encoder_gflops": _per_example(spec, PLANNED_LENGTH) / 1e9,
        "parameters": parameters,
        "weight_bytes": weight_bytes(parameters),
    }


@functools.lru_cache(1024)
def _method_costs(method: Method, spec: BackboneSpec, ratio: float | None) -> dict[str, Any]:
    setting = method.setting(spec, ratio, {PLANNED_LENGTH: 1})
    return {
        "knob": ", ".join(f"{name}={value}" for name, value in setting.knob.items()),
        "remaining": setting.remaining,
        "added": setting.added,
    }


def _work(cell: Cell, cache: ArtifactCache, where: Surroundings, shared: set[str]) -> dict[str, Any]:
    """Return what is cached, what is needed, and the training FLOPs to do, but for what an earlier cell makes."""
    config, cached, needs, flops = cell.config, [], set(), 0.0
    tokens = typical_length(cell.task, where, config.max_length)
    identity = config.teacher_identity(cell.revisions["data"], cell.revisions["model"])
    if cache.find("teacher", identity):
        cached.append("teacher")
    else:
        needs.add(cache.key("teacher", identity))
        epochs = config.teacher_epochs * _train_rows(cell.task, config, where)
        flops += 0.0 if needs <= shared else 3 * epochs * _per_example(cell.spec, tokens)
    if cache.find("plugin", cell.identity):
        cached.append("plugin")
    else:
        for work in config.build_method().work(config.steps, config.batch_size):
            stage = f"{work.name}:{cell.revisions['model']}:{config.ratio}:{config.seed}:{work}"
            if work.shared:
                needs.add(stage)
            if not (work.shared and stage in shared):
                flops += work.passes * work.steps * work.batch_size * _per_example(cell.spec, work.tokens or tokens)
    shared |= needs
    return {"cached": tuple(cached), "needs": frozenset(needs), "flops": flops}


@functools.lru_cache(1024)
def _per_example(spec: BackboneSpec, tokens: int) -> float:
    return float(encoder(spec, tokens).encoder)


def typical_length(task: TaskSpec, where: Surroundings, max_length: int | None = None) -> int:
    """Guess the mean number of tokens of an example from the size of the local data; half the maximum for the Hub."""
    longest = max_length or task.max_length
    size = _local_size(task, where)
    if size is None:
        return longest // 2
    rows, content = size
    return max(8, min(longest, round(content / max(1, rows) / 4.5) + 2))


def _train_rows(task: TaskSpec, config: RunConfig, where: Surroundings) -> int:
    size = _local_size(task, where)
    rows = size[0] if size else HUB_TRAIN_ROWS.get(task.name, 10_000)
    return min(rows, config.train_examples or rows)


def _local_size(task: TaskSpec, where: Surroundings) -> tuple[int, int] | None:
    """Return (rows, bytes of uncompressed content) of the local training file, or ``None``."""
    train = locate(task, where.data_root).files.get("train")
    return _content_of(train) if train else None


@functools.cache
def _content_of(train: Path) -> tuple[int, int] | None:
    if train.suffix != ".parquet":
        size = train.stat().st_size
        with train.open("rb") as file:
            return sum(1 for _ in file) - (train.suffix == ".csv"), size
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        meta = read_metadata(train)
    except (ArrowException, OSError):
        return None
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    return meta.num_rows, sum(g.column(c).total_uncompressed_size for g in groups for c in range(g.num_columns))


def observed_rate(store: ResultStore) -> float | None:
    """Return the training FLOPs a second of the store's runs, or ``None`` if it has none."""
    flops = seconds = 0.0
    for path in (store.folder / "runs").glob("*.json"):
        with contextlib.suppress(BenchError):  # a torn result is its own cell's trouble
            result = store.read(path.stem)
            for stage in result.training if result else ():
                if not stage.cached:
                    flops, seconds = flops + stage.flops, seconds + stage.seconds
    return flops / seconds if seconds > 1.0 else None


def estimate_seconds(cells: Iterable[PlannedCell], rate: float | None) -> float:
    """Return a rough wall time of what is still to do."""
    return sum(c.flops / (rate or DEFAULT_RATE) + SECONDS_PER_CELL for c in cells if c.pending)
