"""What the commands print that go between ``results/`` and W&B."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from bench.incoming import Pulled
from bench.launch.display import console, say
from bench.tracking import Tracking
from bench.tracking.project import create_sweep, pull


def hand_over(path: Path, project: str | None) -> None:
    """Make a sweep at W&B of a file that is known to be one, and print how agents are started.

    Parameters
    ----------
    path
        The sweep file.
    project
        W&B project that it names.
    """
    content = yaml.safe_load(path.read_text("utf-8"))
    project = project or os.environ.get("WANDB_PROJECT") or Tracking.project
    sweep, page = create_sweep(content, project)
    out = console()
    if page:
        say(out, page)
    say(out, f"wandb agent {sweep}")


def pull_and_print(project: str, root: Path, study: str | None) -> int:
    """Bring results back, say what became of each, and return the exit code: 1 where one could not be read."""
    return print_pulled(pull(project, root, study), root, study)


def print_pulled(pulled: Pulled, root: Path, study: str | None) -> int:
    """Say what became of results that came, and return the exit code: 1 where one could not be read."""
    out = console()
    for result in pulled.fetched:
        say(out, f"fetched: {root / (study or result.study) / 'runs' / result.run_id}.json")
    for result in pulled.kept:
        say(out, f"another result is here and stays: {root / (study or result.study) / 'runs' / result.run_id}.json")
    for problem in pulled.problems:
        say(out, f"not fetched: {problem}")
    say(
        out,
        f"{len(pulled.fetched)} fetched, {len(pulled.same)} here already, {len(pulled.kept)} here and different, "
        f"{len(pulled.problems)} not readable",
    )
    return 1 if pulled.problems else 0
