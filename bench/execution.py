"""What a run does: data, teacher, method, evaluation, measurements. Imports torch where it begins."""

from __future__ import annotations

import dataclasses
import functools
import io
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.artifacts import ArtifactCache
from bench.backbones.source import fetch
from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.determinism import deterministic
from bench.errors import MachineError
from bench.progress import Progress, Silent
from bench.results import ResultStore, RunResult, write_atomic
from bench.team import Team, TeamCache, current

if TYPE_CHECKING:
    import torch

    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData


def execute(cell: Cell, store: ResultStore, where: Surroundings, progress: Progress, result: RunResult) -> None:
    """Train, evaluate and measure a cell, filling in its result; of several processes this is the first.

    Parameters
    ----------
    cell, store, where, progress
        As for ``bench.runner.run``.
    result
        Gets all that is found out, as it is, so that a run that fails tells how far it came.

    Raises
    ------
    Exception
        Whatever ends the run.
    """
    import torch

    from bench.costing import check_budget, measure_cost, measure_speed
    from bench.tasks.evaluation import EVALUATION_BATCH_SIZE, evaluate
    from bench.training.teacher import teacher_evaluation

    device = torch.device(device_of(where.device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    team = current()
    result.provenance.device = f"{team.size} processes on {name}" if team else name
    result.provenance.threads = torch.get_num_threads()
    with deterministic(cell.config.seed):
        with _others(team, cell, store, where, result):
            ctx, data = prepare(cell, where, progress, device, result)
            teacher, model = compress(ctx, data)
        # what is evaluated and measured now, this process does alone
        ctx.cache = ArtifactCache(where.artifacts)
        if ctx.place:
            # and on a whole model: what was trained is in the cache, and a measured exchange would be no model's own
            # time
            del teacher, model
            ctx = dataclasses.replace(ctx, place=None, stages=[], notes=[])
            result.notes = ctx.notes
            teacher, model = compress(ctx, data)
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


def prepare(
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


def compress(ctx: RunContext, data: TaskData) -> tuple[Teacher, TaskModel]:
    """Return the teacher and the model that the method makes of it; what is trained, all processes of a team train."""
    from bench.training.teacher import get_teacher

    teacher = get_teacher(ctx)
    chosen = ctx.config.build_method()
    ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
    return teacher, chosen.compress(teacher, data, ctx)


def rebuild(cell: Cell, where: Surroundings, progress: Progress | None = None) -> tuple[RunContext, Teacher, TaskModel]:
    """Return the surroundings, the teacher and the model of a cell again; what is in the artifact cache is not trained.

    Parameters
    ----------
    cell
        A run that is done.
    where
        Data, cache and device, which may differ from those of the run.
    progress
        Who watches; nobody by default.
    """
    import torch

    ctx, data = prepare(cell, where, progress or Silent(), torch.device(device_of(where.device)))
    teacher, model = compress(ctx, data)
    return ctx, teacher, model.eval()


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
        with deterministic(cell.config.seed):
            ctx, data = prepare(cell, where, Silent(), team.ranks.device)
            compress(ctx, data)

    team.follow(run_along)


def device_of(wanted: str) -> str:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises
    ------
    MachineError
        If there is no such device.
    """
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
