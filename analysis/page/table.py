"""The page's table: the columns of ``tables/summary.md`` for every backbone and task at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd

from analysis import words
from analysis.frames import groups
from analysis.tables import detail


class Column(NamedTuple):
    """One column.

    Attributes
    ----------
    key
        Name of its values in the embedded cells, by which it is sorted.
    label, unit
        Its heading, and what stands below that in small.
    first
        Direction of the first sorting: the better values on top.
    best
        Whether the best value of each backbone, task and k is marked.
    """

    key: str
    label: str
    unit: str = ""
    first: str = "ascending"
    best: bool = False


WORDS = [Column("backbone", "Backbone"), Column("task", "Task")]


def columns(table: pd.DataFrame) -> list[Column]:
    """List the columns that a study's table has."""
    measured = {c: text for c, text in words.batch_columns(table.columns).items() if table[c].notna().any()}
    return [
        Column("series", "Method"),
        Column("ratio", "k"),
        *WORDS,
        Column("score", "Score, × 100", "[95 % over examples]", "descending", best=True),
        Column("seeds", "Over seeds", "[95 %] (seeds)", "descending"),
        Column("drop", "Drop, points", "[95 %, paired]", best=True),
        Column("remaining", "Remaining, %", "encoder FLOPs", best=True),
        Column("remaining_total", "Remaining, %", "FLOPs of the whole model", best=True),
        Column("saved", "Saved, %", "encoder FLOPs", "descending", best=True),
        Column("parameters_added_percent", "Parameters added", "% of the teacher", best=True),
        *(Column(column, "Latency ratio", shape, best=True) for column, shape in measured.items()),
        Column("p", "p", "against dense", "descending"),
    ]


def table_rows(table: pd.DataFrame, cells: list[dict[str, Any]], shown: list[Column]) -> list[dict[str, Any]]:
    """Lay out the cells: the text and the marks of each.

    Parameters
    ----------
    table
        Cells in reading order.
    cells
        What the page holds of them, in the same order.
    shown
        The columns, as `columns` gives them.
    """
    if table.empty:
        return []
    headers, grid = detail(table)
    latency = [at for at, header in enumerate(headers) if header.startswith("Latency")]
    names = words.short_names(table["backbone"])
    best = {column.key: _best(table, column) for column in shown if column.best}
    rows = []
    for i, ((_, row), texts, cell) in enumerate(zip(table.iterrows(), grid, cells, strict=True)):
        total = words.number(row["remaining_total"], scale=100)
        line = [*texts[:2], names[row["backbone"]], row["task"], *texts[2:5], texts[6], total, *texts[7:9]]
        line += [*(texts[at] for at in latency), texts[-1]]
        marked = [column.key in best and bool(best[column.key].iloc[i]) for column in shown]
        rows.append({"cell": cell, "texts": line, "best": marked})
    return rows


def _best(table: pd.DataFrame, column: Column) -> pd.Series:
    """Mark the best of each backbone, task and k, where several differ."""
    if column.key == "score":
        return table["best"]
    marked = pd.Series(False, index=table.index)
    complete = table[table["ratio"].notna() & (table["missing_tasks"] == "") & table[column.key].notna()]
    for _, rivals in groups(complete, ["backbone", "task", "ratio"]):
        values = rivals[column.key].round(9)
        if values.nunique() > 1:
            marked[rivals.index] = values == (values.max() if column.first == "descending" else values.min())
    return marked
