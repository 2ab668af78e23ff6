"""Run a cell as ``bench.runner`` does, and let W&B watch. Imports no wandb."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.progress import Progress, Silent
from bench.results import ResultStore, RunResult
from bench.runner import Mode, run
from bench.tracking.account import wanted
from bench.tracking.link import Link
from bench.tracking.record import notes_of, settings_of, tags_of

PATIENCE = 30.0
"""Seconds after a run in which what W&B lacks may still be sent."""
SHORT_PATIENCE = 10.0
"""The same where the user has stopped the run, or where nothing is to be sent."""

_given_up: list[str] = []
"""Why this process does not try W&B's server again."""


@dataclass(frozen=True)
class Tracking:
    """Where runs are tracked.

    Attributes
    ----------
    project
        W&B project; ``WANDB_PROJECT`` wins.
    group
        What a person reads beside the runs of one sweep; ``WANDB_RUN_GROUP`` wins.
    online
        Whether runs are sent as they go, or kept for ``wandb sync``.
    """

    project: str = "variator-bench"
    group: str | None = None
    online: bool = True


def has_agent() -> bool:
    """Return whether an agent of a W&B sweep started this process, and has made a run for it."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def run_tracked(
    config: RunConfig,
    store: ResultStore,
    where: Surroundings,
    mode: Mode = "missing",
    progress: Progress | None = None,
    tracking: Tracking | None = None,
) -> RunResult:
    """Return the result of one cell as ``bench.runner.run`` does, tracked where ``tracking`` is given.

    A cell that is not run is not tracked, but for an agent's: its run is there already, and gets the stored result.
    """
    progress = progress or Silent()
    if tracking is None or wanted() == "disabled":
        return run(config, store, where, mode, progress)
    watched = _Watched(Cell.resolve(config, where), store, where, progress, tracking)
    if has_agent():
        watched.begin()
    try:
        result = run(config, store, where, mode, watched, watched.begin)
    except BaseException as error:
        # a task of Slurm that is to give its node back exits
        status = "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        watched.end(status, SHORT_PATIENCE, reason=str(error)[:500] or type(error).__name__)
        raise
    watched.end(result.status, PATIENCE, result=result)
    return result


class _Watched:
    """A ``Progress`` that tells W&B too."""

    def __init__(
        self, cell: Cell, store: ResultStore, where: Surroundings, progress: Progress, tracking: Tracking
    ) -> None:
        self.cell, self.store, self.where = cell, store, where
        self.progress, self.tracking = progress, tracking
        self.link: Link | None = None
        self.step = 0

    def begin(self) -> None:
        if self.link is None:
            self.link = self._link(self.tracking.online and wanted() == "online" and not _given_up)

    def stage(self, name: str, total: int, weight: float = 0.0) -> None:
        self.step = 0
        if self.link:
            self.link.tell(stage=name)
        self.progress.stage(name, total, weight)

    def advance(self, steps: int = 1, **numbers: float) -> None:
        self.step += steps
        if self.link and numbers:
            self.link.tell(at=self.step, numbers=numbers)
        self.progress.advance(steps, **numbers)

    def message(self, text: str) -> None:
        self.progress.message(text)

    def end(self, status: str, seconds: float, result: RunResult | None = None, reason: str = "") -> None:
        """Let W&B have the outcome; what it does not take in time stays on this machine."""
        if self.link is None:
            return
        end = {"status": status, "reason": reason}
        if result is not None:
            end |= {
                "result": str(self.store.path(result.run_id).absolute()),
                "predictions": str(self.store.predictions_path(result.run_id).absolute()),
                "artifacts": str(self.where.artifacts.absolute()),
            }
        answer = self.link.end(seconds, end=end)
        problem = answer.get("problem") or answer.get("lost") or (None if answer else "it did not end in time")
        if "folder" not in answer and result is not None:
            # its process is dead or stuck: the result at least is put where `wandb sync` finds it
            answer = self._link(online=False).end(SHORT_PATIENCE, end=end)
        if problem and not _given_up:
            kept = f"kept in {answer['folder']} for `wandb sync`" if "folder" in answer else "not tracked"
            self.message(f"W&B: {problem}. This run is {kept}, as are those that follow.")
            _given_up.append(problem)

    def _link(self, online: bool) -> Link:
        cell, config = self.cell, self.cell.config
        command = [*config.command(), "--study", self.store.study]
        init: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT") or self.tracking.project,
            "name": config.label,
            "group": os.environ.get("WANDB_RUN_GROUP") or self.tracking.group or self.store.study,
            "tags": tags_of(cell, self.store.study),
            "notes": notes_of(command, self.store.path(cell.run_id)),
            "config": settings_of(config)
            | {"task": cell.task.name, "backbone": cell.spec.name, "family": cell.spec.family}
            | {"run_id": cell.run_id, "study": self.store.study},
        }
        if not has_agent():  # an agent has chosen the run's id, and no run of a sweep can go on
            init |= {"id": cell.run_id, "resume": "allow"}
        self.store.folder.mkdir(parents=True, exist_ok=True)
        return Link(self.store.folder, {"init": init, "online": online, "command": command})
