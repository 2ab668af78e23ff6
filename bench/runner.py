"""RunConfig -> RunResult: the one path that every run takes."""

from __future__ import annotations

import dataclasses
import errno
import functools
import io
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.artifacts import ArtifactCache
from bench.backbones.catalogue import spec_of
from bench.backbones.source import fetch, local_folder, model_revision
from bench.backbones.spec import BackboneSpec
from bench.config import RunConfig, hash_of, run_id
from bench.errors import BenchError, DamagedResult, Diverged, MachineError, Unreachable
from bench.locks import hold
from bench.progress import Progress, Silent
from bench.provenance import collect
from bench.results import ResultStore, RunResult, write_atomic
from bench.tasks.catalogue import resolve_task
from bench.tasks.digests import cache_folder
from bench.tasks.sources import data_revision
from bench.tasks.spec import TaskSpec
from bench.team import Team, TeamCache, current

if TYPE_CHECKING:
    import torch

    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData

Mode = Literal["missing", "retry-failed", "force", "read-only"]
MODES: tuple[Mode, ...] = ("missing", "retry-failed", "force", "read-only")
RETRIED = ("failed", "diverged", "interrupted")


@dataclass(frozen=True)
class Surroundings:
    """What a run needs to know of its machine, none of which changes a number.

    Attributes
    ----------
    data_root
        Local data root; ``None`` for ``BENCH_DATA_ROOT`` or the Hub.
    cache_dir
        Folder of the artifact cache; ``None`` for ``BENCH_CACHE`` or the user's cache folder.
    device
        ``auto``, ``cpu`` or ``cuda``.
    """

    data_root: Path | None = None
    cache_dir: Path | None = None
    device: str = "auto"

    @property
    def artifacts(self) -> Path:
        """Folder of the artifact cache."""
        return (self.cache_dir or cache_folder()) / "artifacts"


@dataclass(frozen=True)
class Cell:
    """A run that is resolved: its task, backbone and identity are known. Imports no torch."""

    config: RunConfig
    task: TaskSpec
    spec: BackboneSpec
    revisions: Mapping[str, str]
    identity: Mapping[str, Any]

    @classmethod
    def resolve(cls, config: RunConfig, where: Surroundings) -> Cell:
        """Look up names and revisions.

        Raises
        ------
        BenchError
            If a name is unknown, or data or weights are not where they should be.
        """
        task = resolve_task(config.task)
        folder = local_folder(config.backbone)
        spec = dataclasses.replace(spec_of(str(folder) if folder else config.backbone), name=_short(config.backbone))
        length = config.max_length or task.max_length
        if spec.max_positions is not None and length > spec.max_positions:
            raise BenchError(
                f"max_length {length} of task '{task.name}' is beyond the {spec.max_positions} positions of "
                f"backbone '{spec.name}'"
            )
        revisions = {
            "data": f"{task.name}@{data_revision(task, where.data_root)}@{hash_of(task.identity())[:16]}",
            "model": f"{spec.name}@{model_revision(config.backbone)}",
        }
        identity = config.identity(revisions["data"], revisions["model"], where.data_root)
        return cls(config, task, spec, revisions, identity)

    @property
    def run_id(self) -> str:
        """The hash of the identity."""
        return run_id(self.identity)

    def skip_reason(self) -> str | None:
        """Why this cell cannot be run, or ``None``."""
        return self.config.build_method().skip(self.spec, self.task, self.config.ratio)


def _short(backbone: str) -> str:
    return Path(backbone).name if "/" in backbone and Path(backbone).is_dir() else backbone


def _named(cell: Cell) -> dict[str, str]:
    """Return names in place of paths, which mean nothing elsewhere; the identity holds the content."""
    return {"task": cell.task.name, "backbone": cell.spec.name}


def is_settled(result: RunResult | None, mode: Mode) -> bool:
    """Return whether a stored result stands under ``mode``."""
    if result is None or mode == "force":
        return False
    if mode == "read-only":
        return True
    if result.status in RETRIED:
        return mode == "missing" and result.status != "interrupted"
    return result.status in ("done", "skipped")


def run(
    config: RunConfig,
    store: ResultStore,
    where: Surroundings | None = None,
    mode: Mode = "missing",
    progress: Progress | None = None,
    begin: Callable[[], None] = lambda: None,
) -> RunResult:
    """Return the result of one cell, running it if the store does not have it.

    Parameters
    ----------
    config
        The cell.
    store
        Where results are.
    where
        Data, cache and device.
    mode
        ``missing`` runs what has no result or was interrupted, ``retry-failed`` also what failed or diverged, ``force``
        everything, ``read-only`` nothing.
    progress
        Who watches.
    begin
        Called where this process is the one that runs the cell, before it does.

    Raises
    ------
    BenchError
        If the cell cannot be resolved, results cannot be written, or ``read-only`` finds nothing. What fails after that
        is a result with status ``failed``.
    KeyboardInterrupt
        After noting the run as interrupted.
    """
    where, progress = where or Surroundings(), progress or Silent()
    cell = Cell.resolve(config, where)
    if (found := _stored(cell, store, mode, progress)) is not None and is_settled(found, mode):
        return found
    if mode == "read-only":
        raise BenchError(f"no result for {config.label} (run {cell.run_id}) in {store.folder}, and nothing may be run")
    waiting = f"{config.label}: another process is on it; waiting"
    with hold(store.lock_path(cell.run_id), lambda: progress.message(waiting)):
        if (found := store.read(cell.run_id)) is not None and is_settled(found, mode):
            return found
        store.clear(cell.run_id)
        begin()
        return _run_locked(cell, store, where, progress)


def _stored(cell: Cell, store: ResultStore, mode: Mode, progress: Progress) -> RunResult | None:
    """Return the stored result; one that is damaged is put aside, and is none."""
    try:
        return store.read(cell.run_id)
    except DamagedResult as error:
        if mode == "read-only":
            raise
        kept = store.quarantine(cell.run_id)
        problem = str(error).partition(" Move it away")[0]
        progress.message(f"{cell.config.label}: {problem} It is kept as {kept}, and the cell is run again.")
        return None


def _run_locked(cell: Cell, store: ResultStore, where: Surroundings, progress: Progress) -> RunResult:
    config = cell.config
    result = RunResult(
        run_id=cell.run_id,
        study=store.study,
        status="running",
        config=config.model_dump(mode="json"),
        identity=dict(cell.identity),
        task={
            "name": cell.task.name,
            "kind": cell.task.kind,
            "metrics": list(cell.task.metrics),
            "caveat": cell.task.caveat,
        },
        provenance=collect(config.model_copy(update=_named(cell)).command()),
    )
    result.config |= _named(cell) | {"family": cell.spec.family}
    result.provenance.model_digest = cell.revisions["model"]
    result.provenance.seeds = {"run": config.seed}
    earlier = store.read(cell.run_id)
    kept = earlier is not None and earlier.status == "done"
    if not kept:
        store.write(result)
    began = time.monotonic()
    try:
        if reason := cell.skip_reason():
            result.status, result.reason = "skipped", reason
        else:
            _execute(cell, store, where, progress, result)
            result.status = "done"
    except Unreachable as error:
        result.status, result.reason = "skipped", str(error)
    except Diverged as error:
        result.status, result.reason = "diverged", str(error)
    except KeyboardInterrupt:
        result.status, result.reason = "interrupted", "stopped by the user"
        if not kept:
            store.write(result)
        raise
    except Exception as error:
        result.status = "interrupted" if _is_of_the_machine(error) else "failed"
        result.reason = str(error) if isinstance(error, BenchError) else f"{type(error).__name__}: {error}"
        result.traceback = traceback.format_exc()
    result.provenance.seconds = round(time.monotonic() - began, 3)
    if not (kept and result.status == "interrupted"):
        store.write(result)
    return result


def _is_of_the_machine(error: BaseException | None) -> bool:
    """Return whether a run failed for want of space, permission, network or device, and not of its own."""
    while error is not None:
        if isinstance(error, MachineError) or "No space left on device" in str(error):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _execute(cell: Cell, store: ResultStore, where: Surroundings, progress: Progress, result: RunResult) -> None:
    import torch

    from bench.costing import check_budget, measure_cost, measure_speed
    from bench.tasks.evaluation import EVALUATION_BATCH_SIZE, evaluate
    from bench.training.teacher import teacher_evaluation

    device = torch.device(_device(where.device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    team = current()
    result.provenance.device = f"{team.size} processes on {name}" if team else name
    result.provenance.threads = torch.get_num_threads()
    with _others(team, cell, store, where, result):
        ctx, data = _prepared(cell, where, progress, device, result)
        teacher, model = _compressed(ctx, data)
    # what is evaluated and measured now, this process does alone
    ctx.cache = ArtifactCache(where.artifacts)
    if ctx.place:
        # and on a whole model: what was trained is in the cache, and a measured exchange would be no model's own time
        del teacher, model
        ctx = dataclasses.replace(ctx, place=None, stages=[], notes=[])
        result.notes = ctx.notes
        teacher, model = _compressed(ctx, data)
    model.eval()
    splits = {"selection": data.selection, "dev": data.dev}
    for split in ("selection", "dev"):
        progress.stage(f"evaluate {split}", len(ctx.features[split]))
        evaluation, frame = evaluate(
            model,
            splits[split],
            ctx.features[split],
            cell.task,
            cell.spec.family,
            ctx.tokenizer,
            split=split,
            batch_size=EVALUATION_BATCH_SIZE,
            device=device,
            on_batch=progress.advance,
        )
        result.evaluations.append(evaluation)
    result.teacher_evaluations = [teacher_evaluation(teacher, ctx, data)]
    path = store.predictions_path(cell.run_id)
    content = io.BytesIO()
    frame.to_parquet(content, index=False)
    write_atomic(path, content.getvalue())
    result.predictions = str(path.relative_to(store.folder))
    progress.stage("count FLOPs", 1)
    result.cost = measure_cost(model, teacher, ctx)
    result.latency, result.memory = measure_speed(model, teacher, ctx)
    result.knob = ctx.setting.knob
    check_budget(result.cost, ctx)


def _prepared(
    cell: Cell, where: Surroundings, progress: Progress, device: torch.device, result: RunResult | None = None
) -> tuple[RunContext, TaskData]:
    """Load and encode the data, and note in the result what they are."""
    from bench.backbones.load import load_tokenizer
    from bench.context import RunContext
    from bench.tasks.data import load_task, sample
    from bench.tasks.encoding import encode

    config = cell.config
    data = load_task(cell.task, where.data_root, config.train_examples)
    available = {"train_available": data.train_available, "dev_available": len(data.dev)}
    data = dataclasses.replace(data, dev=sample(data.dev, config.dev_examples))
    splits = {"train": data.train, "selection": data.selection, "dev": data.dev}
    if result:
        result.provenance.data_digest = data.digest
    tokenizer = load_tokenizer(config.backbone)
    if result:
        if "@hub:" in cell.revisions["model"]:
            result.provenance.model_digest = f"{cell.revisions['model']}, commit {fetch(config.backbone).name}"
        result.examples = {name: len(examples) for name, examples in splits.items()} | available
    team = current()
    place = None
    if team and team.ranks.sharded:
        from bench.training.sharding import shard

        if not config.build_method().in_parts():
            raise MachineError(
                f"{config.method} changes the weights of the backbone itself, which FSDP keeps in parts; launch it "
                "without --use_fsdp: each process then holds the whole model"
            )
        place = functools.partial(shard, ranks=team.ranks)
    ctx = RunContext(
        config=config,
        task=cell.task,
        spec=cell.spec,
        tokenizer=tokenizer,
        device=device,
        data_root=where.data_root,
        features={n: encode(x, cell.task, tokenizer, cell.spec.family, config.max_length) for n, x in splits.items()},
        identity=dict(cell.identity),
        revisions=dict(cell.revisions),
        cache=TeamCache(where.artifacts, team) if team else ArtifactCache(where.artifacts),
        progress=progress,
        place=place,
    )
    if result:
        # the lists are filled as the run goes on, so that a failed one tells what it had done
        result.training, result.notes = ctx.stages, ctx.notes
    return ctx, data


def _compressed(ctx: RunContext, data: TaskData) -> tuple[Teacher, TaskModel]:
    """Return the teacher and the model that the method makes of it; what is trained, all processes of a team train."""
    from bench.training.teacher import get_teacher

    teacher = get_teacher(ctx)
    chosen = ctx.config.build_method()
    ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
    return teacher, chosen.compress(teacher, data, ctx)


def _others(
    team: Team | None, cell: Cell, store: ResultStore, where: Surroundings, result: RunResult
) -> AbstractContextManager[None]:
    """Let the other processes of a team train along."""
    if team is None:
        return nullcontext()

    def lost(reason: str) -> None:
        result.status, result.reason, result.traceback = "failed", _last_line(reason), reason
        store.write(result)

    folders = {"data_root": where.data_root, "cache_dir": where.cache_dir}
    return team.leading(
        lost,
        config=cell.config.model_dump(mode="json"),
        run_id=cell.run_id,
        **{name: None if folder is None else str(folder) for name, folder in folders.items()},
    )


def _last_line(reason: str) -> str:
    """Return the last line of a traceback of another process."""
    return f"another process of this run failed: {reason.strip().splitlines()[-1]}"


def follow(team: Team) -> None:
    """Train along with every cell that the first process of this command runs, and leave the rest to it."""

    def run_along(said: dict[str, Any]) -> None:
        data_root, cache_dir = (None if said[n] is None else Path(said[n]) for n in ("data_root", "cache_dir"))
        where = Surroundings(data_root, cache_dir)
        cell = Cell.resolve(RunConfig.model_validate(said["config"]), where)
        if cell.run_id != said["run_id"]:
            raise MachineError("the processes of this run see different data, weights or code")
        ctx, data = _prepared(cell, where, Silent(), team.ranks.device)
        _compressed(ctx, data)

    team.follow(run_along)


def _device(wanted: str) -> str:
    import torch

    if team := current():
        if wanted not in ("auto", team.ranks.device.type):
            kind = team.ranks.device.type
            raise MachineError(
                f"the processes were launched for {kind}, and --device is {wanted}; leave --device out, and set "
                "ACCELERATE_USE_CPU=true for the CPU"
            )
        return str(team.ranks.device)
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise MachineError(f"device {wanted} was asked for, but torch sees no GPU; use --device cpu")
    if wanted != "cpu" and not wanted.startswith("cuda"):
        raise MachineError(f"unknown device '{wanted}'; choose auto, cpu or cuda")
    return wanted
