"""What tests run in processes of their own, which can be killed; each function is started by `start`."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.artifacts import ArtifactCache
from bench.cell import Surroundings
from bench.config import RunConfig
from bench.errors import BenchError
from bench.locks import hold
from bench.progress import Silent
from bench.results import ResultStore, RunResult, write_atomic
from bench.runner import run
from bench.training.distill import attach_for_good
from bench.training.loop import Checkpoint, Schedule, train
from tests.checkpoints import encode_hidden, random_plugin, tiny_model, tokens

PATIENCE = 240.0
"""Seconds after which a test gives up on a process."""


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Start a process from a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.workers"])
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):  # Python 3.11 forgets to pass it on
        forkserver.ensure_running()
    process: BaseProcess = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def finish(*processes: BaseProcess) -> list[int | None]:
    """Wait for processes and return their exit codes."""
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Wait until ``condition`` holds while ``process`` lives."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.is_alive(), f"the process ended with {process.exitcode} before it got there"
        assert time.monotonic() < end, "the process did not get there in time"
        time.sleep(0.005)


class TwoLayers(nn.Module):
    """A student with dropout and a plugin, and the dense model that it is to follow."""

    def __init__(self) -> None:
        super().__init__()
        model = tiny_model("bert", hidden_dropout_prob=0.2).requires_grad_(False)
        self.teacher, self.plugin = model, random_plugin(model, 2)
        self.student = attach_for_good(model, self.plugin).train()

    def losses(self, step: int) -> tuple[Tensor, dict[str, float]]:
        ids = tokens(4, 6, seed=step)
        with torch.no_grad():
            target = encode_hidden(self.teacher, input_ids=ids)
        loss = (encode_hidden(self.student, input_ids=ids) - target).square().mean()
        return loss, {"hidden": loss.item()}


def train_tiny(
    checkpoint: Checkpoint | None,
    on_step: Callable[[int], None] = lambda step: None,
    steps: int = 24,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train with dropout, warm-up, weight decay and a part of the steps logged; return weights and history."""
    torch.set_num_threads(1)
    model = TwoLayers()
    history = train(
        model.losses,
        model.plugin.parameters(),
        Schedule(steps=steps, lr=1e-2, warmup=3, decay="cosine", weight_decay=0.1, precision="fp32"),
        seed=7,
        device=torch.device("cpu"),
        on_step=lambda step, parts: on_step(step),
        checkpoint=checkpoint,
        log_every=3,
    )
    return {name: tensor.clone() for name, tensor in model.plugin.state_dict().items()}, history


def train_in_process(checkpoint: Path, steps_file: Path, out: Path, pause_from: int | None) -> None:
    """Train, noting every step in a file, and save what comes out; at step ``pause_from`` it waits to be killed."""

    def on_step(step: int) -> None:
        with steps_file.open("a") as file:
            file.write(f"{step}\n")
        if step == pause_from:
            time.sleep(600)

    torch.save(train_tiny(Checkpoint(checkpoint, every_seconds=0.0), on_step), out)


def make_artifact(root: Path, out: Path, log: Path, dawdle: float) -> None:
    """Get one artifact from the cache; its maker leaves a line in ``log``."""

    def make(folder: Path, checkpoint: Path) -> dict[str, Any]:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        (folder / "weights").write_bytes(b"half")
        time.sleep(dawdle)
        (folder / "weights").write_bytes(b"half and the other half")
        return {"maker": os.getpid()}

    messages: list[str] = []
    found = ArtifactCache(root).get("thing", {"a": 1}, make, messages.append)
    said = {"cached": found.cached, "made": found.meta, "messages": messages}
    out.write_text(json.dumps(said | {"weights": (found.folder / "weights").read_text()}))


def write_results(root: Path, result: RunResult, times: int) -> None:
    """Write one result over and over, with a reason as long as it likes."""
    store = ResultStore(root, result.study)
    for i in range(times):
        store.write(result.model_copy(update={"reason": f"{os.getpid()} " * (1 + i % 7 * 400)}))


class Noting(Silent):
    """Notes in a file whatever is trained, step by step; ``adapt`` waits until the file ``gate`` is there."""

    def __init__(self, path: Path, gate: Path | None) -> None:
        self.path, self.gate, self.current = path, gate, ""

    def stage(self, name: str, total: int, weight: float = 0.0) -> None:
        self.current = name

    def advance(self, steps: int = 1, **numbers: float) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {self.current} {steps}\n")
        while self.current == "adapt" and self.gate and not self.gate.exists():
            time.sleep(0.01)

    def message(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} says {text}\n")


def run_cell(config: RunConfig, results: Path, cache: Path, notes: Path, gate: Path | None) -> None:
    """Run one cell, noting its progress, and its result beside the notes."""
    quick_measuring()
    store, where = ResultStore(results, "study"), Surroundings(cache_dir=cache, device="cpu")
    result = run(config, store, where, progress=Noting(notes, gate))
    notes.with_suffix(f".{os.getpid()}.json").write_text(result.model_dump_json())


def quick_measuring() -> None:
    """Time one small batch instead of two large ones, and fit a plugin on a tenth of the tokens."""
    import bench.costing
    import bench.methods.variator

    bench.costing.TIMED_BATCH_SIZES = (2,)
    bench.costing.TIMED_LENGTH = 16
    bench.methods.variator.FIT_TOKENS = 2000
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported need not be looked through before every timing


def unprivileged(root: Path, out: Path) -> None:
    """Note what the cache and the store say where nobody but root may write."""
    if os.getuid() == 0:
        os.setuid(65534)
    said = []
    for attempt in (
        lambda: ArtifactCache(root).get("thing", {"a": 1}, lambda folder, checkpoint: {}),
        lambda: write_atomic(root / "runs" / "x.json", b"{}"),
        lambda: write_atomic(root / "x.json", b"{}"),
        lambda: hold(root / "locks" / "x.lock").__enter__(),
    ):
        try:
            said.append(repr(attempt()))
        except BenchError as error:
            said.append(f"{type(error).__name__}: {error}")
    out.write_text(json.dumps(said))


def on_a_full_disk(root: Path, result: RunResult, out: Path) -> None:
    """Note what the cache and the store say where no file may grow beyond 64 bytes."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = []
    for attempt in (
        lambda: ResultStore(root, "study").write(result),
        lambda: ArtifactCache(root).get("thing", {"a": 1}, lambda folder, checkpoint: {"long": "x" * 10_000}),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
        try:
            said.append(repr(attempt()))
        except BenchError as error:
            said.append(f"{type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    out.write_text(json.dumps(said))


def hold_lock(path: Path, held: Path) -> None:
    """Hold a lock for as long as the process lives."""
    with hold(path):
        held.touch()
        time.sleep(600)
