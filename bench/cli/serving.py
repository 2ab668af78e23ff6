"""Commands about serving: time under load, bytes of many tasks, and what a server is given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from bench.cli.keys import KeysCommand
from bench.cli.options import FOLDER, cache_dir, data_root, device, surroundings, where

_above_zero = click.FloatRange(min=0, min_open=True)


@click.command(cls=KeysCommand)
@click.argument("sweep")
@where
@click.option("--study", default="serving", show_default=True, help="Study that the results go to.")
@click.option(
    "--load",
    multiple=True,
    metavar="NAME[:FIELD=VALUE,...]",
    help="poisson, bursty, day, rates being shares of what the dense model can serve, or replay:FILE; repeat it.  "
    "[default: poisson:0.5, poisson:1.1, bursty, day]",
)
@click.option(
    "--policy",
    multiple=True,
    metavar="NAME[:FIELD=VALUE,...]",
    help="static:K, queue, deadline or another package's; repeat it.  [default: every static one, queue, deadline]",
)
@click.option(
    "--replicas",
    multiple=True,
    metavar="N[xTIMES]",
    help="Simulate N models that share the queue, with TIMES the load; repeat it.  [default: 1x1]",
)
@click.option(
    "--load-seeds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Draws of the arrivals; the first is served in real time too.",
)
@click.option("--seconds", type=_above_zero, default=60.0, show_default=True, help="How long requests arrive.")
@click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Requests of a batch.")
@click.option(
    "--deadline",
    type=_above_zero,
    help="Seconds from arrival to answer.  [default: twice the dense model's longest full batch]",
)
@click.option("--simulated", "real", flag_value=False, default=True, type=bool, help="Leave real time out.")
def serve_sim(
    keys: dict[str, str],
    sweep: str,
    study: str,
    results: Path,
    load: tuple[str, ...],
    policy: tuple[str, ...],
    replicas: tuple[str, ...],
    load_seeds: int,
    seconds: float,
    max_batch: int,
    deadline: float | None,
    real: bool,
    **where: Any,
) -> None:
    """Serve loads, while policies choose k batch by batch.

    They are served in real time and simulated. SWEEP is a file or a shipped name; its cells of one task, backbone and
    seed make an engine for each method, whose ratios are the k to choose from. A key replaces the file's values. What
    is finished is kept.

    \b
    bench serve-sim sweeps/pilot.yaml --task sst2 --method variator,pruning
    bench serve-sim quickstart --load poisson:0.9 --load replay:arrivals.txt --policy deadline:margin=0.1
    bench serve-sim quickstart --simulated --replicas 4 --replicas 100x100
    """  # noqa: D301
    from bench.launch.serving import read_setup, serve_and_print
    from bench.launch.sweep import find_sweep, read_sweep

    setup = read_setup(
        load,
        policy,
        replicas,
        load_seeds=range(load_seeds),
        seconds=seconds,
        max_batch=max_batch,
        deadline=deadline,
        real=real,
    )
    configs = read_sweep(find_sweep(sweep), keys, where["data_root"]).configs
    serve_and_print(configs, results, study, surroundings(**where), setup, statics=not policy)


@click.command(cls=KeysCommand)
@click.argument("sweep")
@click.argument("out", type=FOLDER)
@data_root
@cache_dir
@device
def export(keys: dict[str, str], sweep: str, out: Path, **where: Any) -> None:
    """Write a teacher and its plugins as folders that can be served.

    SWEEP is a file or a shipped name, whose cells of one task, backbone and seed are taken; what was never trained is
    trained. OUT gets model/, a checkpoint with its tokenizer that transformers reads, and a folder k<k>/ a plugin.

    \b
    bench export quickstart served
    bench export sweeps/pilot.yaml served --task sst2
    """  # noqa: D301
    from bench.launch.serving import export_and_print
    from bench.launch.sweep import find_sweep, read_sweep

    configs = read_sweep(find_sweep(sweep), keys, where["data_root"]).configs
    export_and_print(configs, surroundings(**where), out)


@click.command
@click.argument("sweeps", nargs=-1, required=True, metavar="SWEEP...")
@click.option("--tasks", default="1,3,10,100", show_default=True, help="Numbers of tasks.")
@click.option("--study", help="Study that the results go to; that of the sweeps.")
@where
def storage(sweeps: tuple[str, ...], tasks: str, study: str | None, results: Path, **where: Any) -> None:
    """Measure what many tasks take on disk and in memory.

    Each way to keep them that the sweeps list is measured; what is missing of the sweeps is run first. Files are really
    written, to TMPDIR, and really loaded, each time in a new process; where more tasks are asked for than were trained,
    the rest are copies with other numbers in them.

    \b
    bench storage storage storage-rivals storage-full --data-root DATA
    """  # noqa: D301
    from bench.launch.storing import read_counts, store_and_print

    sys.exit(store_and_print(sweeps, results, study, surroundings(**where), read_counts(tasks)))
