"""Run a sweep on this machine in several processes, any of which may die."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from typing import IO, Any

from bench.artifacts import ArtifactCache
from bench.cell import Surroundings
from bench.errors import MachineError
from bench.launch.local import Outcome, Watcher, run_all
from bench.launch.plan import PlannedCell
from bench.progress import Progress
from bench.results import ResultStore
from bench.runner import Mode
from bench.tracking import Tracking

COMMAND = [sys.executable, "-m", "bench.launch.worker"]
DEATHS = 3
"""Processes that a cell may take down before it is given up."""
PATIENCE = 30.0
"""Seconds that a process has to end by itself."""


def run_pool(
    cells: Sequence[PlannedCell],
    store: ResultStore,
    where: Surroundings,
    mode: Mode,
    watcher: Watcher,
    tracking: Tracking | None,
    jobs: int,
) -> Outcome:
    """Run every cell, ``jobs`` at a time, each process with its share of the processors and a GPU of its own.

    A cell waits while another makes something that both need, so that no process idles at a lock. A process that dies
    is replaced, and its cell is run again; one that fails does not end the others.

    Parameters
    ----------
    cells
        The plan of the cells.
    store, where, mode, tracking
        As for ``bench.tracking.run_tracked``.
    watcher
        Who watches.
    jobs
        Most cells at once.
    """
    outcome = Outcome()
    waiting: list[int] = []
    for index, cell in enumerate(cells):
        if cell.pending:
            waiting.append(index)
        else:  # it is read from the store, or cannot be run: no work for a process
            alone = run_all([cell.config], store, where, mode, _One(watcher, index), tracking)
            outcome.results += alone.results
            outcome.failures += alone.failures
    if waiting:
        setup = {
            "results": str(store.root),
            "study": store.study,
            "mode": mode,
            "data_root": str(where.data_root) if where.data_root else None,
            "cache_dir": str(where.cache_dir) if where.cache_dir else None,
            "device": where.device,
            "tracking": dataclasses.asdict(tracking) if tracking else None,
        }
        environments = shares(min(jobs, len(waiting)), where.device)
        _Pool(cells, store, watcher, outcome, ArtifactCache(where.artifacts), setup, environments).run(waiting)
    return outcome


def shares(jobs: int, device: str) -> list[dict[str, str]]:
    """Return the environment of each of ``jobs`` processes: its threads, and its GPU if there is one."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, processors // jobs))
    common = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    gpus = [] if device == "cpu" else _gpus()
    return [common | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}) for i in range(jobs)]


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, without torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


class _One:
    """Lets a watcher see the only cell of a list as the cell of a plan."""

    def __init__(self, watcher: Watcher, index: int) -> None:
        self.watcher, self.index, self.message = watcher, index, watcher.message

    def begin(self, index: int) -> Progress:
        return self.watcher.begin(self.index)

    def finish(self, index: int, *what: Any) -> None:
        self.watcher.finish(self.index, *what)


class _Worker:
    """A process, what it said, and the cell that it runs."""

    def __init__(self, setup: dict[str, Any], environment: dict[str, str], events: queue.SimpleQueue[Any]) -> None:
        self.environment = environment
        self.index: int | None = None
        self.lane: Progress | None = None
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        self.process = subprocess.Popen(
            COMMAND,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal comes to the sweep alone, which passes it on
        )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()
        self.tell(setup)

    def _listen(self, events: queue.SimpleQueue[Any]) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            events.put((self, json.loads(line)))
        self.process.wait()
        events.put((self, None))

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message; a process that has died says so itself."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass

    def last_words(self) -> str:
        """Say how the process ended."""
        code = self.process.returncode
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name + (", often too little memory" if code == -signal.SIGKILL else "")
        self.log.seek(0)
        lines = self.log.read()[-4000:].decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return how + (f": {said}" if said and code != -signal.SIGKILL else "")


class _Pool:
    def __init__(
        self,
        cells: Sequence[PlannedCell],
        store: ResultStore,
        watcher: Watcher,
        outcome: Outcome,
        cache: ArtifactCache,
        setup: dict[str, Any],
        environments: Sequence[dict[str, str]],
    ) -> None:
        self.cells, self.store, self.watcher, self.outcome = cells, store, watcher, outcome
        self.cache, self.setup, self.environments = cache, setup, environments
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.waiting: list[int] = []
        self.workers: list[_Worker] = []
        self.made: set[str] = set()
        self.stillborn = 0
        self.deaths: Counter[int] = Counter()
        self.idle: list[_Worker] = []

    def run(self, waiting: list[int]) -> None:
        """Run the cells of these indices."""
        self.waiting = waiting
        self.workers = [_Worker(self.setup, environment, self.events) for environment in self.environments]
        try:
            while self.waiting or any(worker.index is not None for worker in self.workers):
                self._take(*self.events.get())
                self._give()
            for worker in self.workers:
                assert worker.process.stdin
                worker.process.stdin.close()
            self._wait(PATIENCE)
        except BaseException:
            for worker in self.workers:
                if worker.process.poll() is None:
                    worker.process.send_signal(signal.SIGINT)
            self._wait(PATIENCE)
            raise
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.log.close()

    def _wait(self, seconds: float) -> None:
        for worker in self.workers:
            try:
                worker.process.wait(seconds)
            except subprocess.TimeoutExpired:
                worker.process.kill()

    def _give(self) -> None:
        """Give idle processes the first cells of which nobody else is making a part."""
        while self.idle and (index := self._next()) is not None:
            worker = self.idle.pop(0)
            self.waiting.remove(index)
            worker.index, worker.lane = index, self.watcher.begin(index)
            worker.tell({"index": index, "config": self.cells[index].config.model_dump(mode="json")})

    def _next(self) -> int | None:
        running = [self.cells[worker.index].needs for worker in self.workers if worker.index is not None]
        making = {name for name in frozenset().union(*running) - self.made if not self.cache.has(name)}
        return next((i for i in self.waiting if not self.cells[i].needs & making), None)

    def _take(self, worker: _Worker, message: dict[str, Any] | None) -> None:
        """Take in what a process says, or its death."""
        if message is None:
            return self._bury(worker)
        if "ready" in message:
            self.stillborn = 0
            return self.idle.append(worker)
        index, lane = worker.index, worker.lane
        assert index is not None and lane is not None
        if "stage" in message:
            lane.stage(*message["stage"])
        elif "advance" in message:
            lane.advance(message["advance"], **message["numbers"])
        elif "message" in message:
            lane.message(message["message"])
        else:
            worker.index = None
            cell = self.cells[index]
            result = self.store.read(message["run_id"]) if "run_id" in message else None
            if result is None:
                self.outcome.fail(index, cell.config, message.get("error", "its result has vanished"), self.watcher)
            else:
                self.made |= cell.needs if result.status == "done" else set()
                self.outcome.add(index, cell.config, result, self.watcher)
        return None

    def _bury(self, worker: _Worker) -> None:
        """Replace a process that died, and run its cell again if that is worth it."""
        self.workers.remove(worker)
        if worker in self.idle:
            self.idle.remove(worker)
        index, how = worker.index, worker.last_words()
        worker.log.close()
        if index is not None:
            self.deaths[index] += 1
            label = self.cells[index].config.label
            if self.deaths[index] < DEATHS:
                self.watcher.message(f"{label}: its process ended ({how}); it is run again")
                self.waiting.insert(0, index)
            else:
                reason = f"{DEATHS} processes ended while they ran it ({how}); the same command tries again"
                self.outcome.fail(index, self.cells[index].config, reason, self.watcher)
        else:
            self.stillborn += 1
            if self.stillborn == DEATHS:
                raise MachineError(f"no process can be started to run cells ({how})")
        if self.waiting:
            self.workers.append(_Worker(self.setup, worker.environment, self.events))
