"""What a task of a Slurm array does. Imports torch and submitit only where it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.cell import Surroundings
from bench.config import RunConfig
from bench.errors import BenchError
from bench.results import ResultStore
from bench.runner import Mode
from bench.tracking import Tracking

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


@dataclass(frozen=True)
class CellTask:
    """One cell, just as ``bench run`` does it, or several processes of it.

    When Slurm takes its node away or its time is up, it is queued again, and its training goes on from the checkpoint
    in the artifact cache.

    Attributes
    ----------
    config, store, where, mode, tracking
        As for ``bench.tracking.run_tracked``.
    processes
        Processes that train it together.
    """

    config: RunConfig
    store: ResultStore
    where: Surroundings
    mode: Mode
    tracking: Tracking | None
    processes: int = 1

    def __call__(self) -> None:
        """Run the cell; what fails exits with a code for Slurm's own tools, and its result says why."""
        processors = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or "1"
        threads = str(max(1, int(processors) // self.processes))
        # before torch is imported, which reads it then
        os.environ |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if code := self._run() if self.processes == 1 else self._run_together():
            sys.exit(code)

    def _run(self) -> int:
        from bench.launch.listing import run_and_print

        try:
            return run_and_print([self.config], self.store, self.where, self.mode, self.tracking)
        except BenchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    def _run_together(self) -> int:
        """Run the cell in a process for each GPU."""
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}"]
        words += ["-m", *self.config.command(), "--study", self.store.study, "--results", str(self.store.root)]
        words += ["--cache-dir", str(self.where.cache_dir), "--device", self.where.device, "--mode", self.mode]
        if self.where.data_root:
            words += ["--data-root", str(self.where.data_root)]
        if self.tracking:
            os.environ.setdefault("WANDB_PROJECT", self.tracking.project)
            os.environ.setdefault("WANDB_RUN_GROUP", self.tracking.group or self.store.study)
        with subprocess.Popen(words) as processes:
            try:
                return processes.wait()
            except BaseException:  # this one is to end: its time is up, or its node is taken away
                processes.terminate()
                raise

    def checkpoint(self) -> DelayedSubmission:
        """Return what is to run when the cell is queued again: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
