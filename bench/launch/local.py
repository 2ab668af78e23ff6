"""Run a sweep on this machine, one cell after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bench.config import RunConfig
from bench.errors import BenchError
from bench.progress import Progress
from bench.results import ResultStore, RunResult
from bench.runner import Mode, Surroundings, run

Failure = tuple[RunConfig, str]


def run_all(
    configs: Iterable[RunConfig],
    store: ResultStore,
    where: Surroundings,
    mode: Mode,
    progress: Progress,
    on_cell: Callable[[int, RunResult | None], None] = lambda index, result: None,
) -> tuple[list[RunResult], list[Failure]]:
    """Run every cell; one that fails does not end the others.

    Parameters
    ----------
    configs, store, where, mode, progress
        As for ``bench.runner.run``.
    on_cell
        Called with a cell's index before it without a result, and after it with one.

    Returns
    -------
    tuple
        The results, and the cells that failed with their reasons.
    """
    results: list[RunResult] = []
    failures: list[Failure] = []
    for index, config in enumerate(configs):
        on_cell(index, None)
        try:
            result = run(config, store, where, mode, progress)
        except BenchError as error:
            failures.append((config, str(error)))
            progress.message(f"{config.label}: {error}")
            continue
        results.append(result)
        if result.status in ("failed", "diverged", "interrupted"):
            failures.append((config, f"{result.status}: {result.reason}"))
            progress.message(f"{config.label}: {result.status}: {result.reason}")
        on_cell(index, result)
    return results, failures
