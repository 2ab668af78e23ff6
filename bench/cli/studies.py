"""Commands that read the results of a study: how far it is, what it shows, whether it can be made again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from bench.cli.options import FOLDER, data_root, results, surroundings


@click.command
@click.argument("study", required=False)
@results
def status(study: str | None, results: Path) -> None:
    """Show how far STUDY is, or every study; what failed and why."""
    from bench.launch.status import print_status

    print_status(results, study)


@click.command
@click.argument("study")
@results
def report(study: str, results: Path) -> None:
    """Make the tables, the figures and the page of STUDY.

    The page, report.html, opens from disk in any browser and loads nothing.
    """
    from bench.launch.listing import print_report

    print_report(results, study)


@click.command
@click.argument("study")
@click.option("--run", "run_ids", multiple=True, metavar="ID", help="This run alone, or its beginning; repeat it.")
@click.option("--sample", type=click.IntRange(min=1), help="So many runs: one of each method in turn.")
@click.option("--tables", is_flag=True, help="Its tables and figures, from the results as they are.")
@click.option("--task", "tasks", multiple=True, metavar="FILE", type=click.Path(path_type=Path),
              help="Where a task of one's own is, which results only name; repeat it.")  # fmt: skip
@click.option("--backbone", "backbones", multiple=True, metavar="NAME=FOLDER",
              help="Where a backbone is that was a local folder; repeat it.")  # fmt: skip
@click.option("--device", default="auto", help="auto, cpu or cuda.  [default: as recorded]")
@click.option("--cache-dir", type=FOLDER, help="Find teachers and plugins here.  [default: all are made again]")
@data_root
@results
def verify(
    study: str,
    run_ids: tuple[str, ...],
    sample: int | None,
    tables: bool,
    tasks: tuple[Path, ...],
    backbones: tuple[str, ...],
    results: Path,
    **where: Any,
) -> None:
    """Make recorded runs again, and judge them.

    STUDY is a name or the path of its folder, which is only read. All its runs are made again, unless some are chosen:

    \b
    bench verify results/pilot --sample 3
    bench verify pilot --run 25b4c6f8 --cache-dir ~/.cache/bench
    bench verify pilot --tables

    Each is identical, within the tolerance that another machine or other versions are given, different, or cannot be
    made again; what differs is named by its cause. The exit code is 1 unless all are identical or within tolerance.
    """  # noqa: D301
    from bench.launch.verification import find_study, read_elsewhere, verify_and_print, verify_tables_and_print

    if tables + bool(run_ids) + (sample is not None) > 1:
        raise click.UsageError("choose one of --run, --sample and --tables")
    store = find_study(results, study)
    if tables:
        sys.exit(verify_tables_and_print(store))
    elsewhere = read_elsewhere(tasks, backbones)
    sys.exit(verify_and_print(store, surroundings(**where), elsewhere, sample, run_ids))
