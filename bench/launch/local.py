"""Run a sweep on this machine, one cell after the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from bench.config import RunConfig
from bench.errors import BenchError
from bench.progress import Progress
from bench.results import ResultStore, RunResult
from bench.runner import Mode, Surroundings
from bench.tracking import Tracking, run_tracked

Failure = tuple[RunConfig, str]


class Watcher(Progress, Protocol):
    """Receives which cell is run, besides what it is doing."""

    def begin(self, index: int) -> None:
        """Start a cell."""

    def finish(self, index: int, status: str, reason: str = "") -> None:
        """End a cell, with the status of its result, or ``error`` where it has none."""


def run_all(
    configs: Iterable[RunConfig],
    store: ResultStore,
    where: Surroundings,
    mode: Mode,
    watcher: Watcher,
    tracking: Tracking | None = None,
) -> tuple[list[RunResult], list[Failure]]:
    """Run every cell; one that fails does not end the others.

    Parameters
    ----------
    configs, store, where, mode, tracking
        As for ``bench.tracking.run_tracked``.
    watcher
        Who watches.

    Returns
    -------
    tuple
        The results, and the cells that failed with their reasons.
    """
    results: list[RunResult] = []
    failures: list[Failure] = []
    for index, config in enumerate(configs):
        watcher.begin(index)
        try:
            result = run_tracked(config, store, where, mode, watcher, tracking)
        except (BenchError, OSError) as error:
            failures.append((config, str(error)))
            watcher.finish(index, "error", str(error))
            continue
        results.append(result)
        if result.status in ("failed", "diverged", "interrupted"):
            failures.append((config, f"{result.status}: {result.reason}"))
        watcher.finish(index, result.status, result.reason or "")
    return results, failures
