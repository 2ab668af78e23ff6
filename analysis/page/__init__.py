"""The reader's page: a study as one HTML file that needs no network and no server."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from vl_convert import javascript_bundle

from analysis import words
from analysis.caveats import caveats
from analysis.cells import AVERAGE
from analysis.frames import Study
from analysis.page.content import page_cells, page_runs
from analysis.page.findings import findings
from analysis.page.marks import marks
from analysis.page.readme import read_readme
from analysis.page.table import columns, table_rows
from analysis.tables import BOLD, NOTES, blocks, failures, task_title
from bench.results import write_atomic

PAGE = "report.html"
HERE = Path(__file__).parent
SCRIPTS = ("front.js", "details.js", "page.js")


def write_page(study: Study, table: pd.DataFrame, pairs: pd.DataFrame) -> Path:
    """Write ``report.html`` of a study and return its path; the same bytes from the same results.

    Parameters
    ----------
    study
        Its runs.
    table
        Its cells, as `analysis.cells.cells` gives them.
    pairs
        Comparisons between its methods, as `analysis.comparisons.comparisons` gives them.
    """
    path = study.folder / PAGE
    write_atomic(path, _render(study, table, pairs).encode())
    return path


def _render(study: Study, table: pd.DataFrame, pairs: pd.DataFrame) -> str:
    ordered = pd.concat([rows for _, _, rows in blocks(table)]) if len(table) else table
    names = words.short_names(study.frame["backbone"])
    # as in the figures, which know the series with a score alone
    styles = marks(table["series"] if len(table) else ())
    cells = page_cells(ordered, study, pairs, names, styles)
    shown = columns(ordered)
    data = {
        "cells": cells,
        "runs": page_runs(study),
        "columns": [{"key": column.key, "first": column.first} for column in shown],
        "spec": json.loads((HERE / "front.vg.json").read_text("utf-8")),
    }
    script = "\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    library = javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = environment.get_template("page.css").render(marks=list(styles.values()))
    return environment.get_template("page.html").render(
        study=study.name,
        readme=read_readme(study.folder / "README.md"),
        status=study.frame["status"].value_counts().sort_index().to_dict(),
        filters=_filters(ordered, study, names, cells),
        marks=styles,
        columns=shown,
        rows=table_rows(ordered, cells, shown),
        panels=_panels(ordered, names),
        findings=findings(ordered, pairs, names),
        caveats=caveats(study, table) if len(table) else [],
        notes=[*NOTES, BOLD],
        left=_left(study, names),
        problems=study.problems,
        convention=words.CONVENTION,
        plural=words.plural,
        data=_embedded(data),
        library=library,
        script=script,
        style=style,
        policy=_policy([library, script], style),
    )


def _filters(
    ordered: pd.DataFrame, study: Study, names: dict[str, str], cells: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """List what can be chosen of each dimension, in reading order."""
    frame = study.frame
    every = {*frame["task"], *(ordered["task"] if len(ordered) else ())}
    tasks = sorted(every, key=lambda name: (name != AVERAGE, name))
    ratios = sorted(frame["ratio"].dropna().unique())
    values: dict[str, list[tuple[str, str]]] = {
        "task": [(task, task) for task in tasks],
        "backbone": [(name, names[name]) for name in sorted(names)],
        "method": [(name, name) for name in sorted(frame["series"].unique(), key=words.reading_order)],
        "k": [(words.ratio(ratio), words.ratio(ratio)) for ratio in ratios],
    }
    if frame["ratio"].isna().any():
        values["k"].insert(0, ("", "none"))
    filters: list[dict[str, Any]] = [{"key": key, "values": pairs, "chosen": ()} for key, pairs in values.items()]
    if len({cell["options"] for cell in cells}) > 1:
        # all of them at once would bury each other
        told = [("default", "the defaults"), ("other", "others")]
        filters.append({"key": "options", "values": told, "chosen": ("default",)})
    return filters


def _panels(table: pd.DataFrame, names: dict[str, str]) -> list[dict[str, str]]:
    """List the charts: each backbone and task with a score."""
    return [
        {"backbone": backbone, "name": names[backbone], "task": task, "title": task_title(task, rows)}
        for backbone, task, rows in (blocks(table) if len(table) else ())
        if rows["score"].notna().any()
    ]


def _left(study: Study, names: dict[str, str]) -> list[dict[str, Any]]:
    """Return the runs without a score, with their reasons."""
    left = failures(study.frame)
    left = left.assign(k=left["ratio"].map(words.ratio), backbone_name=left["backbone"].map(names))
    return [{str(name): value for name, value in row.items()} for row in left.to_dict("records")]


def _embedded(data: object) -> str:
    """Write JSON that no HTML parser finds markup in."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _policy(scripts: list[str], style: str) -> str:
    """Allow these scripts and this style alone: nothing is fetched, and what a result smuggles in does not run."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
