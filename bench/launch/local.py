"""Run a sweep on this machine, one cell after the other in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from bench.cell import Surroundings
from bench.config import RunConfig
from bench.errors import BenchError
from bench.launch.front import Point
from bench.progress import Progress
from bench.results import ResultStore, RunResult
from bench.runner import Mode
from bench.tracking import Tracking, run_tracked


class Watcher(Protocol):
    """Receives which cells run."""

    def begin(self, index: int) -> Progress:
        """Start a cell, and return who receives what it does; also where it is started again."""

    def finish(self, index: int, status: str, reason: str = "", point: Point | None = None) -> None:
        """End a cell, with the status of its result, or ``error`` where it has none."""

    def message(self, text: str) -> None:
        """Say one line."""


@dataclass
class Outcome:
    """What became of a list of cells.

    Attributes
    ----------
    results
        Those that there are, in no particular order.
    failures
        Cells without a result that stands, and why.
    """

    results: list[RunResult] = field(default_factory=list)
    failures: list[tuple[RunConfig, str]] = field(default_factory=list)

    def add(self, index: int, config: RunConfig, result: RunResult, watcher: Watcher) -> None:
        """Take in the result of a cell, and tell the watcher."""
        self.results.append(result)
        if result.status in ("failed", "diverged", "interrupted"):
            self.failures.append((config, f"{result.status}: {result.reason}"))
        watcher.finish(index, result.status, result.reason or "", Point.of(result))

    def fail(self, index: int, config: RunConfig, reason: str, watcher: Watcher) -> None:
        """Take in a cell that has no result, and tell the watcher."""
        self.failures.append((config, reason))
        watcher.finish(index, "error", reason)


def run_all(
    configs: Iterable[RunConfig],
    store: ResultStore,
    where: Surroundings,
    mode: Mode,
    watcher: Watcher,
    tracking: Tracking | None = None,
) -> Outcome:
    """Run every cell; one that fails does not end the others.

    Parameters
    ----------
    configs, store, where, mode, tracking
        As for ``bench.tracking.run_tracked``.
    watcher
        Who watches.
    """
    outcome = Outcome()
    for index, config in enumerate(configs):
        lane = watcher.begin(index)
        try:
            result = run_tracked(config, store, where, mode, lane, tracking)
        except (BenchError, OSError) as error:
            outcome.fail(index, config, str(error), watcher)
        else:
            outcome.add(index, config, result, watcher)
    return outcome
