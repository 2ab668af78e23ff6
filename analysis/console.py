"""The summary of a study in the terminal, 100 columns wide."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis import words
from analysis.cells import AVERAGE, cells
from analysis.frames import DENSE, Study, read_study
from analysis.predictions import Predictions
from analysis.tables import blocks, failures

LONG = 60
"""Rows from which only the averages over tasks are printed; everything is in ``tables/summary.md``."""


def print_summary(study_folder: Path, console: Console | None = None) -> None:
    """Print each backbone's scores and costs, and the runs that have none.

    Parameters
    ----------
    study_folder
        ``results/<study>``.
    console
        Where to print; the terminal if none is given.
    """
    console = console or Console()
    study = read_study(study_folder)
    table = cells(study, Predictions(study_folder))
    if len(table):
        names = words.short_names(table["backbone"])
        brief = len(table) > LONG and AVERAGE in set(table["task"])
        for backbone in sorted(names):
            parts = [(task, rows) for name, task, rows in blocks(table) if name == backbone]
            # the averages are the last thing on the screen, where they are read
            ordered = [*parts[1:], parts[0]] if parts[0][0] == AVERAGE else parts
            console.print()
            console.print(_table(names[backbone], [part for part in ordered if not brief or part[0] == AVERAGE]))
        console.print(f"\n[dim]{words.CONVENTION} Brackets: 95 % bootstrap over dev examples.[/dim]", highlight=False)
        if brief:
            console.print(f"[dim]Averages over tasks only; every task is in {study.name}/tables/summary.md.[/dim]")
    _print_failures(study, console)


def _table(title: str, parts: list[tuple[str, pd.DataFrame]]) -> Table:
    shapes = words.batch_columns({column for _, rows in parts for column in rows.columns if rows[column].notna().any()})
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False, box=None)
    table.add_column("task", no_wrap=True)
    table.add_column("method", overflow="fold", ratio=1)
    table.add_column("k", justify="right")
    for heading in ("score, %", "drop", "remaining", "saved", "added"):
        table.add_column(heading if heading in ("score, %", "drop") else f"{heading}\n%", justify="right", no_wrap=True)
    for shape in shapes.values():
        table.add_column(f"latency\n{shape}", justify="right", no_wrap=True)
    for task, rows in parts:
        for i, (_, row) in enumerate(rows.iterrows()):
            compressed = row["method"] != DENSE
            score = words.interval(row["score"], row["example_low"], row["example_high"], scale=100)
            score = f"lacks {row['missing_tasks']}" if row["missing_tasks"] else score
            table.add_row(
                task if i == 0 else "",
                Text(row["series"]),
                words.ratio(row["ratio"]),
                Text(score, style="bold" if row["best"] else ""),
                words.number(row["drop"], scale=100, sign=True) if compressed else "",
                words.number(row["remaining"], scale=100),
                words.number(row["saved"], scale=100),
                words.added(row["parameters_added_percent"]),
                *(words.number(row[column], 2) if compressed else "" for column in shapes),
            )
        if task != parts[-1][0]:
            table.add_row()
    return table


def _print_failures(study: Study, console: Console) -> None:
    left = failures(study.frame) if len(study.frame) else study.frame
    for _, run in left.iterrows():
        where = f"{run['backbone']} {run['task']} {run['series']} {words.ratio(run['ratio'])}".rstrip()
        console.print(f"{run['status']}: {where}, seed {run['seed']}: {run['reason']}", markup=False)
    for problem in study.problems:
        console.print(f"warning: {problem}", markup=False)
