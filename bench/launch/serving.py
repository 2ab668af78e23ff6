"""``bench serve-sim``: serve loads with the models of a sweep, and print what came of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.errors import ConfigError
from bench.launch.display import console, say
from bench.launch.served import print_served
from bench.progress import Silent
from bench.serving.experiment import Experiment, Pending, Setup, all_statics
from bench.serving.export import export
from bench.serving.loads import LOADS, Load
from bench.serving.records import ServingStore
from bench.serving.words import read, read_policy

DEFAULT_LOADS = ("poisson:0.5", "poisson:1.1", "bursty", "day")
DEFAULT_POLICIES = ("queue", "deadline")


def read_load(text: str) -> Load:
    """Build the load that ``text`` names."""
    return read(text, "load", LOADS)


def read_scale(text: str) -> tuple[int, float]:
    """Read a number of replicas and, behind ``x``, by how much the load is multiplied.

    Raises
    ------
    ConfigError
        If it is something else.
    """
    count, _, times = text.partition("x")
    try:
        found = int(count), float(times or 1)
    except ValueError:
        found = 0, 0.0
    if found[0] < 1 or not 0 < found[1] < math.inf:
        raise ConfigError(f"--replicas {text}: a whole number, or it and how many times the load, such as 100x100")
    return found


def read_setup(loads: Sequence[str], policies: Sequence[str], replicas: Sequence[str], **more: Any) -> Setup:
    """Read what the command line names; what it leaves out are the defaults.

    Parameters
    ----------
    loads, policies, replicas
        As `read_load`, `read_policy` and `read_scale` take them.
    **more
        The other fields of the setup.
    """
    scales = [read_scale(text) for text in replicas or ("1",)]
    return Setup(
        loads=[read_load(text) for text in loads or DEFAULT_LOADS],
        policies=[read_policy(text) for text in policies or DEFAULT_POLICIES],
        replicas=[count for count, _ in scales],
        times=[times for _, times in scales],
        **more,
    )


def serve_and_print(
    configs: Sequence[RunConfig],
    root: Path,
    study: str,
    where: Surroundings,
    setup: Setup,
    statics: bool,
) -> None:
    """Serve what is not finished of a study and print all of it.

    Parameters
    ----------
    configs
        Cells of one task, backbone and seed; those of one method make an engine.
    root, study
        The results folder, and the study in it.
    where, setup
        The machine; loads and policies.
    statics
        Whether a static policy for every k of the engines is added.

    Raises
    ------
    ConfigError
        If the cells are not of one teacher.
    """
    from bench.serving.engine import load_engine

    errors = console(stderr=True)
    groups = engines_of([Cell.resolve(config, where) for config in configs])
    engines = []
    for method, cells in groups.items():
        say(errors, f"loading {method} at k = {', '.join(f'{cell.config.ratio:g}' for cell in cells)}")
        engines.append(load_engine(cells, where, _Messages()))
    if statics:
        setup = Setup(**{**vars(setup), "policies": all_statics(setup.policies, engines)})
    store = ServingStore(root / study)
    experiment = Experiment(engines, setup, store, _command(), lambda text: say(errors, text))
    pending = list(experiment.cells())
    said = experiment.study
    say(
        errors,
        f"the dense model serves {said.capacity:.1f} requests a second; a request has {said.deadline_seconds:g} s; "
        f"{len(pending)} cells to serve",
    )
    if pending:
        _serve(experiment, pending, errors)
    print_served(store)


def export_and_print(configs: Sequence[RunConfig], where: Surroundings, out: Path) -> None:
    """Write the teacher and the plugins of a sweep's Variator cells as folders, and name them.

    Raises
    ------
    ConfigError
        If the sweep has no such cell, or they have not one teacher.
    BenchError
        If there is something in ``out``.
    """
    cells = [Cell.resolve(config, where) for config in configs if config.method == "variator"]
    if not cells:
        raise ConfigError("the sweep has no cell of variator, so that there is no plugin to export")
    for folder in export(engines_of(cells)["variator"], where, out, _Messages()):
        say(console(), str(folder))
    if length := cells[0].config.max_length:
        say(console(stderr=True), f"trained on inputs of at most {length} tokens: serve it with max_length={length}")


def _command() -> list[str]:
    """Return what was typed, without the folders of this machine."""
    words, found = iter(sys.argv[1:]), ["bench"]
    for word in words:
        if word.partition("=")[0] not in ("--data-root", "--cache-dir", "--results"):
            found.append(word)
        elif "=" not in word:
            next(words, None)
    return found


class _Messages(Silent):
    """Says what a person should know: messages, and which training begins."""

    def stage(self, name: str, total: int, weight: float = 0.0) -> None:
        """Say it of what is trained, which takes minutes."""
        if weight:
            self.message(f"training: {name}, {total} steps")

    def message(self, text: str) -> None:
        """Say it."""
        say(console(stderr=True), text)


def engines_of(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Group cells by method, by ascending ratio; the dense one belongs to every engine and makes none.

    Raises
    ------
    ConfigError
        If they have not one teacher and one dev split, or a method comes twice at one ratio.
    """
    common = [
        {
            "task": cell.config.task,
            "backbone": cell.config.backbone,
            "dev_examples": cell.config.dev_examples,
            **cell.config.teacher_identity("", ""),
        }
        for cell in cells
    ]
    differing = [name for name in common[0] if len({str(values[name]) for values in common}) > 1]
    if differing:
        keys = ", ".join(f"--{name.replace('_', '-')}" for name in differing)
        raise ConfigError(f"what is served has one teacher and answers one dev split; choose by {keys}")
    groups: dict[str, dict[float, Cell]] = {}
    for cell in cells:
        ratio = cell.config.ratio
        if cell.config.method == "dense" or cell.skip_reason():
            continue
        if ratio is None or ratio != int(ratio) or ratio < 2:
            raise ConfigError(f"{cell.config.label}: a server chooses among whole ratios of at least 2")
        if ratio in groups.setdefault(cell.config.method, {}):
            raise ConfigError(
                f"{cell.config.label}: there are two of it with different options; choose one by its keys"
            )
        groups[cell.config.method][ratio] = cell
    if not groups:
        raise ConfigError("there is nothing to choose from: no cell has a method with a ratio")
    return {method: [found[ratio] for ratio in sorted(found)] for method, found in groups.items()}


def _serve(experiment: Experiment, pending: Sequence[Pending], errors: object) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bars:  # type: ignore[arg-type]
        for number, cell in enumerate(pending, 1):
            bar = bars.add_task(f"{number}/{len(pending)}  {cell.label}", total=experiment.count(cell))
            experiment.run(cell, lambda answered, bar=bar: bars.advance(bar, answered))  # type: ignore[misc]
            bars.remove_task(bar)
