"""How the runs of one command are tracked, decided once. Imports no wandb."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence

from bench.errors import BenchError
from bench.results import ResultStore
from bench.runner import Mode
from bench.tracking.account import has_key, mode
from bench.tracking.project import fetch
from bench.tracking.run import Tracking, has_agent


def prepare(
    tracking: Tracking, pending: Sequence[str], store: ResultStore, runs: Mode, say: Callable[[str], None]
) -> tuple[Tracking | None, int]:
    """Decide whether runs are sent, kept or not tracked; bring back what the project has of them.

    Parameters
    ----------
    tracking
        As the command has it.
    pending
        Run ids of the cells that are to be run.
    store
        Where results are.
    runs
        What is run.
    say
        Takes the line that says so where runs are kept here and nobody asked for that.

    Returns
    -------
    How they are tracked, and how many results were brought back.
    """
    told = mode()
    pending = [] if runs == "read-only" else pending
    if told == "disabled" or not (pending or has_agent()):
        return None, 0
    folder = os.path.join(os.environ.get("WANDB_DIR") or store.folder, "wandb")
    later = f"`wandb sync {os.path.join(folder, 'offline-run-*')}` sends them"
    if told == "offline":
        return dataclasses.replace(tracking, online=False), 0
    if told is None and not has_key():
        say(
            f"W&B: runs are kept offline in {folder}. `wandb login` turns live tracking on, {later} later, "
            "WANDB_MODE=disabled turns this off."
        )
        return dataclasses.replace(tracking, online=False), 0
    if not pending:  # an agent's run, whose result is here: the agent has asked the server a moment ago
        return tracking, 0
    project = os.environ.get("WANDB_PROJECT") or tracking.project
    try:
        found = fetch(project, pending if runs in ("missing", "retry-failed") else [], store.root, store.study)
    except BenchError as error:
        say(f"W&B: {error}. Runs are kept offline in {folder}; {later} later.")
        return dataclasses.replace(tracking, online=False), 0
    if found:
        say(f"W&B: {found} of {len(pending)} runs were done in {project} already, and were fetched from there")
    return tracking, found
