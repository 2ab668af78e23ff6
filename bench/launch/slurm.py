"""Submit a sweep to Slurm and leave: job arrays of what is still to do.

Imports submitit where something is submitted, and no torch.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.errors import BenchError, ConfigError, MachineError
from bench.launch.display import console, one_line, say
from bench.launch.plan import PlannedCell, plan
from bench.launch.slurm_queue import Job, SlurmQueue, ask
from bench.launch.slurm_task import CellTask
from bench.locks import hold
from bench.results import ResultStore
from bench.runner import Mode, is_settled, run
from bench.tasks.digests import cache_folder
from bench.tracking import Tracking

if TYPE_CHECKING:
    from submitit import SlurmExecutor

DEFAULT_MINUTES = 240
TIME_OUTS = 20
"""Times that a cell which reaches its time limit is queued again before it is a failure."""

_NAMED = {
    "partition": "--partition",
    "account": "--account",
    "time": "--time",
    "cpus-per-task": "--cpus",
    "gpus-per-node": "--gpus",
    "mem": "--memory",
    "array": "--jobs",
}
_OWN = ("job-name", "dependency", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "chdir", "wrap")


@dataclass(frozen=True)
class SlurmOptions:
    """What a cell asks of the cluster, none of which changes a number.

    Attributes
    ----------
    partition, account
        Where it runs, and who pays; the cluster's defaults by default.
    time
        Minutes, after which a cell is queued again and goes on.
    cpus, gpus, memory
        For one cell; memory as Slurm writes it, such as ``16G``.
    jobs
        Most cells of an array at once.
    more
        Any other parameter of ``sbatch``.
    """

    partition: str | None = None
    account: str | None = None
    time: int = DEFAULT_MINUTES
    cpus: int | None = None
    gpus: int | None = None
    memory: str | None = None
    jobs: int | None = None
    more: Mapping[str, str | bool] = field(default_factory=dict)

    @staticmethod
    def read_more(words: Iterable[str]) -> dict[str, str | bool]:
        """Read ``KEY=VALUE`` or ``KEY``, as on the command line of ``sbatch``.

        Raises
        ------
        ConfigError
            If a parameter has an option of its own, or is what the suite sets.
        """
        more: dict[str, str | bool] = {}
        for word in words:
            name, has_value, value = word.strip().lstrip("-").partition("=")
            name = name.replace("_", "-")
            if name in _NAMED:
                raise ConfigError(f"--slurm {word}: use {_NAMED[name]}")
            if name in _OWN or not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                known = "is set by the suite" if name in _OWN else "is no parameter of sbatch"
                raise ConfigError(f"--slurm {word}: '{name}' {known}; give KEY=VALUE, such as constraint=a100")
            more[name] = value if has_value else True
        return more

    def parameters(self, cells: int) -> dict[str, Any]:
        """Return submitit's parameters of an array of ``cells``."""
        return {
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus,
            "mem": self.memory,
            "array_parallelism": self.jobs or cells,
            "stderr_to_stdout": True,
            "wckey": None,
            # a step does not inherit the processors of its job since Slurm 22.05
            "setup": ['export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"'],
            "additional_parameters": {"requeue": True, **self.more},
        }


def submit(
    configs: Sequence[RunConfig],
    store: ResultStore,
    where: Surroundings,
    mode: Mode,
    options: SlurmOptions,
    tracking: Tracking | None = None,
) -> int:
    """Submit what is to do and is not in Slurm already; return the exit code, 1 where a cell cannot be run.

    Parameters
    ----------
    configs, store, where, mode, tracking
        As for ``bench.tracking.run_tracked``.
    options
        What each cell asks of the cluster.

    Raises
    ------
    BenchError
        If nothing can be submitted: no submitit, no Slurm, Slurm refuses, or no cell can be run.
    """
    if mode == "read-only":
        raise ConfigError("--mode read-only runs nothing, so there is nothing to submit")
    queue, out = SlurmQueue(store), console()
    executor = _executor(queue)
    # tasks are told whole paths, so that the environment of their node cannot lead them elsewhere
    where = Surroundings(where.data_root, (where.cache_dir or cache_folder()).absolute(), where.device)
    make_task = functools.partial(
        CellTask,
        store=ResultStore(store.root.absolute(), store.study),
        where=where,
        mode=mode,
        tracking=tracking,
        processes=options.gpus or 1,
    )
    with hold(queue.folder / "submit.lock", lambda: say(out, "another process submits this study; waiting")):
        cells = plan(configs, store, where, mode)
        if all(cell.state == "error" for cell in cells):
            raise BenchError("\n".join(dict.fromkeys(cell.reason for cell in cells)))
        todo = [cell for cell in cells if _is_to_do(cell, store, where, mode)]
        live = queue.jobs()
        submission = _Submission(executor, queue, options, make_task, live)
        try:
            submission.submit(todo)
        finally:
            for line in submission.lines:
                say(out, line)
    _print_rest(cells, todo, live, store, queue, out)
    return 1 if any(cell.state == "error" for cell in cells) else 0


def waves(cells: Iterable[PlannedCell]) -> Iterator[tuple[list[PlannedCell], list[PlannedCell]]]:
    """Divide cells so that no two of a wave need the same thing that nobody has made, such as a teacher.

    Yields
    ------
    tuple
        The cells of a wave that make something, and its others. Each needs only what those of earlier waves make.
    """
    made: set[str] = set()
    rest = list(cells)
    while rest:
        making: set[str] = set()
        makers, others, later = [], [], []
        for cell in rest:
            needs = cell.needs - made
            if needs & making:
                later.append(cell)
            elif needs:
                makers.append(cell)
                making |= needs
            else:
                others.append(cell)
        yield makers, others
        made |= making
        rest = later


class _Submission:
    """Submits waves of cells, each after the cells that make what it needs."""

    def __init__(
        self,
        executor: SlurmExecutor,
        queue: SlurmQueue,
        options: SlurmOptions,
        make_task: Callable[[RunConfig], CellTask],
        live: Mapping[str, Job],
    ) -> None:
        self.executor, self.queue, self.options, self.make_task, self.live = executor, queue, options, make_task, live
        self.lines: list[str] = []

    def submit(self, cells: Iterable[PlannedCell]) -> None:
        """Submit the cells that Slurm does not hold."""
        before: list[str] = []
        for makers, others in waves(cells):
            made = self._arrays(makers, before, ", making what others need")
            self._arrays(others, before)
            before += made

    def _arrays(self, cells: Sequence[PlannedCell], before: Sequence[str], what: str = "") -> list[str]:
        """Submit cells as arrays of the size that Slurm takes, and return the jobs that run these cells."""
        fresh = [cell for cell in cells if cell.run_id not in self.live and cell.state != "running"]
        jobs = [self.live[run_id].job for cell in cells if (run_id := str(cell.run_id)) in self.live]
        size = largest_array() if fresh else 1
        for start in range(0, len(fresh), size):
            array = fresh[start : start + size]
            job = self._array(array, before)
            after = f", after {', '.join(before)}" if before else ""
            self.lines.append(f"submitted job {job}: {_cells(len(array))}{what}{after}")
            jobs.append(job)
        return jobs

    def _array(self, cells: Sequence[PlannedCell], before: Sequence[str]) -> str:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        name = self.queue.note(cells)
        # one that fails cancels nothing: whoever comes after it makes what it did not
        dependency = f"afterany:{':'.join(before)}" if before else None
        parameters = self.options.parameters(len(cells))
        try:
            with _outside_of_jobs():
                self.executor.update_parameters(job_name=name, dependency=dependency, **parameters)
                jobs = self.executor.submit_array([self.make_task(cell.config) for cell in cells])
        except (FailedJobError, FailedSubmissionError) as error:
            self.queue.forget(name)
            raise MachineError(f"Slurm refused {_cells(len(cells))}: {one_line(str(error))}") from None
        for cell, job in zip(cells, jobs, strict=True):
            self.queue.link_log(str(cell.run_id), job.paths.stdout)
        return str(jobs[0].job_id).partition("_")[0]


def _executor(queue: SlurmQueue) -> SlurmExecutor:
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise MachineError("--executor slurm needs submitit: pip install 'variator-bench[slurm]'") from None
    if missing := next((name for name in ("sbatch", "srun", "squeue", "scontrol") if not shutil.which(name)), None):
        raise MachineError(
            f"--executor slurm needs Slurm, and there is no `{missing}` on PATH. Run this where jobs are submitted "
            "from, such as a login node."
        )
    return SlurmExecutor(queue.folder / "jobs", max_num_timeout=TIME_OUTS)


def largest_array() -> int:
    """Return how many cells an array may have on this cluster."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.M)
    return max(1, int(found[1])) if found else 1001


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the job that this process is part of: ``srun`` would take over its memory and processors."""
    inside = "SLURM_JOB_ID" in os.environ
    names = [name for name in os.environ if inside and name.startswith("SLURM_") and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ |= hidden


def _is_to_do(cell: PlannedCell, store: ResultStore, where: Surroundings, mode: Mode) -> bool:
    """Return whether a cell needs a node; one that is skipped for what it is gets its result here and now."""
    if cell.state != "skipped" or cell.run_id is None:
        return cell.pending
    if is_settled(store.read(cell.run_id), mode):
        return False
    if Cell.resolve(cell.config, where).skip_reason() is None:
        return True  # only a run finds out, by the lengths of its examples
    run(cell.config, store, where, mode)
    return False


def _print_rest(
    cells: Sequence[PlannedCell],
    todo: Sequence[PlannedCell],
    live: Mapping[str, Job],
    store: ResultStore,
    queue: SlurmQueue,
    out: Console,
) -> None:
    """Say what was not submitted and why, and what to do next."""
    held = sum(cell.run_id in live for cell in todo)
    elsewhere = sum(cell.state == "running" and cell.run_id not in live for cell in todo)
    ours = {cell.run_id for cell in todo}
    states = Counter(cell.state for cell in cells if cell.run_id not in ours)
    kept = [f"{held} in Slurm already"] * bool(held) + [f"{elsewhere} running elsewhere"] * bool(elsewhere)
    kept += [f"{count} {state}" for state, count in states.items()]
    if kept:
        say(out, f"not submitted: {', '.join(kept)}")
    for cell in cells:
        if cell.state == "error":
            say(out, f"not done: {cell.config.label}: {one_line(cell.reason)}")
    if states["failed"] + states["diverged"]:
        say(out, "Failures are kept. Once the cause is mended, --mode retry-failed submits these cells again.")
    if todo:
        at = "" if store.root == Path("results") else f" --results {store.root}"
        say(out, f"progress: bench status {store.study}{at}")
        say(out, f"logs: {queue.log('RUN_ID')}")
        say(out, "The same command again submits what then has no result and is not in Slurm.")


def _cells(count: int) -> str:
    return f"{count:,} cell{'s' if count > 1 else ''}"
