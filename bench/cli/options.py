"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bench.cell import Surroundings

Command = Callable[..., Any]
FOLDER = click.Path(file_okay=False, path_type=Path)
MODES = ("missing", "retry-failed", "force", "read-only")


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return one decorator for several options, which are shown in the order given."""
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


results = click.option("--results", type=FOLDER, default=Path("results"), show_default=True, help="Folder of studies.")
data_root = click.option(
    "--data-root", type=FOLDER, help="Local data, DIR/<task>/<split>.parquet; BENCH_DATA_ROOT, else the Hub."
)
cache_dir = click.option("--cache-dir", type=FOLDER, help="Teachers and plugins; BENCH_CACHE, else ~/.cache/bench.")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
where = _together(
    results,
    data_root,
    cache_dir,
    device,
)
"""The options that say where things are."""

mode = click.option(
    "--mode",
    type=click.Choice(MODES),
    default="missing",
    show_default=True,
    help="Run what is missing, also what failed, everything again, or nothing.",
)

_count = click.IntRange(min=1)
_cluster = {
    "partition": click.option("--partition", help="Slurm: partition."),
    "account": click.option("--account", help="Slurm: account that pays."),
    "time": click.option(
        "--time", type=_count, help="Slurm: minutes, after which a cell is queued again and goes on.  [default: 240]"
    ),
    "cpus": click.option("--cpus", type=_count, help="Slurm: processors of a cell, which are its threads."),
    "gpus": click.option("--gpus", type=_count, help="Slurm: GPUs of a cell, which train it together."),
    "memory": click.option("--memory", help="Slurm: memory of a cell, such as 16G."),
    "more": click.option(
        "--slurm", "more", multiple=True, metavar="KEY=VALUE", help="Slurm: any other parameter of sbatch; repeat it."
    ),
}
_executor = _together(
    click.option(
        "--executor",
        type=click.Choice(["local", "slurm"]),
        default="local",
        show_default=True,
        help="Run on this machine, or submit to Slurm and leave.",
    ),
    click.option(
        "--jobs",
        type=_count,
        help="Cells at once: processes with their share of the cores and a GPU of their own, or tasks of a Slurm "
        "array.  [default: 1, on Slurm no limit]",
    ),
    *_cluster.values(),
)


def executor(command: Command) -> Command:
    """Add the options that say what runs the cells of a sweep; those that were given for Slurm come as ``cluster``."""

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        cluster = {name: given.pop(name) for name in _cluster}
        return command(cluster={name: value for name, value in cluster.items() if value}, **given)

    return _executor(call)


def surroundings(data_root: Path | None, cache_dir: Path | None, device: str) -> Surroundings:
    """Return where things are, as `where` was given it."""
    from bench.cell import Surroundings

    return Surroundings(data_root, cache_dir, device)
