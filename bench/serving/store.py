"""Measure what many tasks take on disk and in memory: files are really written, and really loaded in a new process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.errors import BenchError, MachineError
from bench.execution import rebuild
from bench.measure.size import bytes_on_disk, count_bytes
from bench.plugins.plugin import Plugin
from bench.provenance import collect
from bench.serving.keeping import SHARED_FILE, Adapters, Cells, keeping
from bench.serving.multitask import MultiTaskModel, stacked
from bench.storage import Agreement, StoragePoint, StorageResult, StorageSeries

COUNTS = (1, 3, 10, 100)
SPARE = 1.3
"""Times the weights' own size that must be free before they are written or loaded."""
AGREEMENT_EXAMPLES, AGREEMENT_ROWS = 48, 16
"""Dev examples of each task, and rows of a mixed batch."""


def series_of(configs: Iterable[RunConfig]) -> dict[tuple[str, bool, tuple[float, ...]], list[RunConfig]]:
    """Sort the cells of sweeps into ways to keep tasks.

    Of each method one way keeps a task at all ratios that are listed for it. A method with more ratios than the others
    is also kept at those that all have, where they can be compared at equal cost. Of several seeds the first is taken.

    Returns
    -------
    dict
        (Method, whether its teachers are LoRA, ratios) -> its cells.

    Raises
    ------
    BenchError
        If the cells are of several backbones, two differ in another key alone, or a method lacks a task.
    """
    configs = list(configs)
    if len(backbones := sorted({config.backbone for config in configs})) != 1:
        raise BenchError(f"storage is measured on one backbone at a time; the sweeps have {', '.join(backbones)}")
    seed = min(config.seed for config in configs)
    found: dict[tuple[str, bool], dict[tuple[str, float | None], RunConfig]] = {}
    for config in configs:
        if config.seed != seed:
            continue
        ratio = config.ratio if config.build_method().reads() & {"ratio"} else None
        cells = found.setdefault((config.method, config.teacher_lora), {})
        if cells.setdefault((config.task, ratio), config) != config:
            raise BenchError(
                f"the sweeps have two cells like {config.label} that differ in some other key; one can be measured"
            )
    tasks = list(dict.fromkeys(config.task for config in configs))
    ratios = {way: sorted({r for _, r in cells if r is not None}) for way, cells in found.items()}
    common = set.intersection(*map(set, those)) if (those := [r for r in ratios.values() if r]) else set()
    series: dict[tuple[str, bool, tuple[float, ...]], list[RunConfig]] = {}
    for (method, lora), cells in found.items():
        own = ratios[method, lora]
        shared = [r for r in own if r in common]
        for chosen in [own] if shared in ([], own) else [shared, own]:
            each: list[float | None] = [*chosen] or [None]
            wanted = [(task, r) for task in tasks for r in each]
            if lacking := [key for key in wanted if key not in cells]:
                raise BenchError(f"the sweeps have {method} for some tasks or ratios only, and not for {lacking[0][0]}")
            series[method, lora, tuple(chosen)] = [cells[key] for key in wanted]
    return series


def measure_storage(
    configs: Sequence[RunConfig],
    where: Surroundings,
    study: str,
    command: list[str],
    counts: Sequence[int] = COUNTS,
    say: Callable[[str], None] = lambda text: None,
) -> StorageResult:
    """Measure every way to keep tasks that sweeps list; their runs must be done.

    Parameters
    ----------
    configs
        Their cells.
    where
        Data and artifact cache. Everything is loaded on the CPU.
    study, command
        For the result.
    counts
        Numbers of tasks.
    say
        Told what is being done.

    Raises
    ------
    BenchError
        See `series_of`; or the disk is too small.
    """
    began, provenance = time.monotonic(), collect(command)
    where = Surroundings(where.data_root, where.cache_dir, "cpu")
    series = []
    found = series_of(configs)
    for (method, lora, ratios), cells in found.items():
        label = f"{method} k={','.join(f'{r:g}' for r in ratios)}" if ratios else method
        label += ", LoRA teachers" if lora else ", fine-tuned teachers"
        width = max(1, len(ratios))
        resolved = [Cell.resolve(config, where) for config in cells]
        tasks = tuple(tuple(resolved[i : i + width]) for i in range(0, len(resolved), width))
        series.append(_measure(Cells(tasks, where), sorted(set(counts)), functools.partial(_say, say, label)))
    first = Cell.resolve(configs[0], where)
    body = MultiTaskModel(first.config.backbone, first.spec).body
    provenance.threads = torch.get_num_threads()
    provenance.model_digest = first.revisions["model"]
    provenance.seeds = {"run": first.config.seed}
    provenance.seconds = round(time.monotonic() - began, 3)
    return StorageResult(
        study=study,
        backbone=first.spec.name,
        family=first.spec.family,
        backbone_bytes=count_bytes(body.parameters()),
        series=series,
        provenance=provenance,
    )


def _say(say: Callable[[str], None], label: str, text: str) -> None:
    say(f"{label}: {text}")


def _measure(cells: Cells, counts: Sequence[int], say: Callable[[str], None]) -> StorageSeries:
    kept, config = keeping(cells), cells.tasks[0][0].config
    ratios = [cell.config.ratio or 0.0 for cell in cells.tasks[0]] if "ratio" in config.build_method().uses else []
    points, task_bytes, distinct = [], dict[str, int](), len(cells.tasks)
    with tempfile.TemporaryDirectory(prefix="bench-storage-") as name:
        root = Path(name)
        shared = {n: t.detach().contiguous() for n, t in kept.shared().items()}
        if shared:
            save_file(shared, root / SHARED_FILE)
        folders: list[Path] = []
        for count in counts:
            say(f"write {count} tasks")
            while len(folders) < count:
                _check_space(root, folders)
                folder = root / f"task-{len(folders):04d}"
                folder.mkdir()
                kept.write(len(folders), folder)
                if len(folders) < distinct:
                    task_bytes[cells.names[len(folders)]] = bytes_on_disk(folder)
                folders.append(folder)
            files = sum(path.is_file() for path in root.rglob("*"))
            points.append(
                StoragePoint(tasks=count, distinct=min(count, distinct), disk_bytes=bytes_on_disk(root), files=files)
            )
        say(f"load {', '.join(map(str, counts))} tasks in a new process")
        found = _in_new_process(cells, root, folders, points)
        points = [point.model_copy(update=more) for point, more in zip(points, found, strict=True)]
    return StorageSeries(
        method=config.method,
        lora=config.teacher_lora,
        ratios=ratios,
        runs={own[0].task.name: [cell.run_id for cell in own] for own in cells.tasks},
        shared_bytes=count_bytes(shared.values()),
        task_bytes=task_bytes,
        points=points,
        agreement=_agreement(cells, kept, say) if isinstance(kept, Adapters) else [],
    )


def _check_space(root: Path, folders: Sequence[Path]) -> None:
    needed = bytes_on_disk(folders[-1]) if folders else 0
    if shutil.disk_usage(root).free < SPARE * needed:
        raise MachineError(f"no space for task {len(folders) + 1} in {root}; choose another folder with TMPDIR")


def _in_new_process(
    cells: Cells, root: Path, folders: Sequence[Path], points: Sequence[StoragePoint]
) -> list[dict[str, Any]]:
    """Return of each point what loading takes, or why it was not done."""
    configs = [[cell.config for cell in own] for own in cells.tasks]
    sizes = {point.tasks: point.disk_bytes for point in points}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_load, configs, cells.where, root, folders, sizes, torch.get_num_threads()).result()
        except BrokenProcessPool:
            reason = "the process that loaded them was killed, most likely for want of memory"
            return [{"reason": reason} for _ in points]


def _load(
    configs: list[list[RunConfig]],
    where: Surroundings,
    root: Path,
    folders: Sequence[Path],
    sizes: dict[int, int],
    threads: int,
) -> list[dict[str, Any]]:
    """Load tasks in this process, which does nothing else, and say what so many take."""
    torch.set_num_threads(threads)
    cells = Cells(tuple(tuple(Cell.resolve(config, where) for config in own) for own in configs), where)
    kept = keeping(cells)
    # the libraries and the modules' own code are in memory by now, and no weight
    kept.empty()
    before, seconds, loaded, found = _resident(), 0.0, 0, list[dict[str, Any]]()
    shared = root / SHARED_FILE
    for count, size in sizes.items():
        free = psutil.virtual_memory().available + (_resident() - before)
        if free < SPARE * size:
            found.append({"reason": f"{size / 1e9:.1f} GB do not fit into the {free / 1e9:.1f} GB that were free"})
            continue
        began = time.monotonic()
        if not loaded:
            kept.load_shared(shared if shared.exists() else None)
        for index in range(loaded, count):
            kept.load(index, folders[index])
        loaded, seconds = count, seconds + time.monotonic() - began
        tensors = [*kept.held.parameters(), *kept.held.buffers()]
        found.append(
            {
                "tensor_bytes": count_bytes(tensors),
                "resident_bytes": _resident() - before,
                "load_seconds": round(seconds, 3),
            }
        )
    ran = kept.run() if loaded else 0
    return [one if "reason" in one else one | {"ran": min(ran, count)} for count, one in zip(sizes, found, strict=True)]


def _resident() -> int:
    """Return the resident set of this process, after everything that can be given back was."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library has its own way
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def _agreement(cells: Cells, kept: Adapters, say: Callable[[str], None]) -> list[Agreement]:
    """Compare mixed batches on one backbone with each task's own model."""
    first = cells.tasks[0][0]
    model = MultiTaskModel(first.config.backbone, first.spec)
    names = cells.names
    for name, own, (teacher, plugins) in zip(names, cells.tasks, kept.folders, strict=True):
        model.add(name, own[0].task, teacher, [Plugin.from_pretrained(folder) for folder in plugins.values()])
    free = first.spec.family == "t5" and any(own[0].task.kind == "qa" for own in cells.tasks)
    found = []
    for k in kept.ks:
        say(f"mixed batches at k = {k}")
        rows: list[tuple[str, Any, Tensor]] = []
        for name, own in zip(names, cells.tasks, strict=True):
            cell = next((c for c in own if k > 1 and c.config.ratio == k), own[0])
            ctx, teacher_, compressed = rebuild(cell, cells.where)
            alone: Any = teacher_.model if k == 1 else compressed
            for feature in ctx.features["dev"][:AGREEMENT_EXAMPLES]:
                inputs = stacked([feature], ctx.tokenizer.pad_token_id)
                with torch.inference_mode():
                    answer = (
                        alone.generate(inputs["input_ids"], inputs["attention_mask"])
                        if free
                        else alone(**inputs).logits
                    )
                rows.append((name, feature, answer[0]))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        batches = [order[i : i + AGREEMENT_ROWS] for i in range(0, len(order), AGREEMENT_ROWS)]
        same, largest = 0, 0.0
        for places in batches:
            chosen = [rows[i] for i in places]
            model.select(k, [name for name, _, _ in chosen])
            inputs = stacked([feature for _, feature, _ in chosen], model.tokenizer.pad_token_id)
            answers = list(model.generate(inputs["input_ids"], inputs["attention_mask"])) if free else model(**inputs)
            for (_, _, alone_), mixed in zip(chosen, answers, strict=True):
                mixed = mixed[: len(alone_)]  # spans of a row that is padded here
                if free:
                    same += bool((mixed == alone_).all())
                    continue
                largest = max(largest, float((mixed - alone_).abs().max()))
                same += bool(
                    (mixed.argmax(0) == alone_.argmax(0)).all() if alone_.numel() > 1 else (mixed - alone_).abs() < 1e-3
                )
        found.append(Agreement(k=k, examples=len(rows), batches=len(batches), same=same, largest_difference=largest))
    return found
