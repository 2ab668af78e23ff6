"""Commands that run cells, or show what would run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from bench.cli.keys import KeysCommand
from bench.cli.options import executor, mode, surroundings, where


@click.command(cls=KeysCommand)
@click.argument("sweep", required=False)
@click.option("--study", help="Study to compare with; that of the sweep.")
@mode
@where
def plan(keys: dict[str, str], sweep: str | None, study: str | None, results: Path, mode: Any, **where: Any) -> None:
    """Show what a sweep would run, what it costs and what is cached.

    SWEEP is a file or a shipped name. Without one, the keys name the cells, commas separating values:

    \b
    bench plan sweeps/glue.yaml
    bench plan --backbone t5-3b --ratio 2,4,8
    """  # noqa: D301
    from bench.launch.plan import observed_rate, plan
    from bench.launch.plan_view import print_plan
    from bench.launch.sweep import expand, find_sweep, parse_list, read_sweep
    from bench.results import ResultStore

    if sweep:
        read = read_sweep(find_sweep(sweep), keys, where["data_root"])
        name, configs = read.study, read.configs
    else:
        name, configs = "runs", expand({key: parse_list(key, text) for key, text in keys.items()}, where["data_root"])
    store = ResultStore(results, study or name)
    cells = plan(configs, store, surroundings(**where), mode)
    print_plan(cells, observed_rate(store))
    if any(cell.state == "error" for cell in cells):
        sys.exit(1)


@click.command(cls=KeysCommand)
@click.option("--study", default="runs", show_default=True, help="Study that the result goes to.")
@mode
@where
def run(keys: dict[str, str], study: str, results: Path, mode: Any, **where: Any) -> None:
    """Run one cell, or show its stored result.

    This is what sweeps, agents and clusters call; keys may also be written as W&B does, --train_examples=60.

    \b
    bench run --task sst2 --method variator --ratio 4 --backbone t5-base --seed 0
    """  # noqa: D301
    from bench.config import RunConfig
    from bench.launch.listing import run_and_print
    from bench.results import ResultStore
    from bench.tracking import Tracking

    config, store = RunConfig.build(keys), ResultStore(results, study)
    sys.exit(run_and_print([config], store, surroundings(**where), mode, Tracking(group=study)))


@click.command(cls=KeysCommand)
@click.argument("sweep")
@click.option("--study", help="Study that the results go to; that of the sweep.")
@executor
@mode
@where
@click.option("--to-wandb", is_flag=True, help="Make it a sweep at W&B, and print the line that runs an agent.")
def sweep(
    keys: dict[str, str],
    sweep: str,
    study: str | None,
    results: Path,
    mode: Any,
    executor: str,
    jobs: int | None,
    cluster: dict[str, Any],
    to_wandb: bool,
    **where: Any,
) -> None:
    """Run what is missing of a sweep, here or on a Slurm cluster.

    SWEEP is a file or a shipped name. Stop it at any moment and run it again to go on. A key replaces the file's
    values, commas separating several:

    \b
    bench sweep sweeps/glue.yaml
    bench sweep glue --task rte --seed 0,1
    bench sweep glue --jobs 4
    bench sweep glue --executor slurm --partition gpu --gpus 1
    bench sweep glue --to-wandb
    """  # noqa: D301
    from bench.launch.sweep import find_sweep, read_sweep
    from bench.results import ResultStore
    from bench.tracking import Tracking

    if cluster and executor != "slurm":
        name = next(iter(cluster)).replace("more", "slurm")
        raise click.UsageError(f"--{name} is for --executor slurm")
    read = read_sweep(find_sweep(sweep), keys, where["data_root"])
    if to_wandb:
        from bench.launch.remote import hand_over

        if keys or study or executor != "local" or jobs:
            raise click.UsageError("--to-wandb hands the file over as it is; its agents take no other options")
        return hand_over(find_sweep(sweep), read.project)
    store, around = ResultStore(results, study or read.study), surroundings(**where)
    tracking = Tracking(read.project or Tracking.project, read.name)
    if executor == "slurm":
        from bench.launch.slurm import SlurmOptions, submit

        options = SlurmOptions(**cluster | {"jobs": jobs, "more": SlurmOptions.read_more(cluster.get("more", ()))})
        sys.exit(submit(read.configs, store, around, mode, options, tracking))
    from bench.launch.listing import run_and_print

    sys.exit(run_and_print(read.configs, store, around, mode, tracking, jobs=jobs or 1, summary=True))
