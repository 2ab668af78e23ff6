"""Regenerate what a study shows, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.cells import cells
from analysis.comparisons import comparisons
from analysis.figures import write_figures
from analysis.frames import read_study
from analysis.page import PAGE, write_page
from analysis.predictions import Predictions
from analysis.serving.report import write_serving
from analysis.storage import write_storage
from analysis.style import FORMATS
from analysis.tables import write_tables
from bench import results
from bench.errors import BenchError, suggest
from bench.serving.records import SERVING_FILE, ServingStore
from bench.storage import STORAGE_FILE

_MADE = {"tables": "*.*", "figures": "*.*", ".": PAGE}


@dataclass(frozen=True)
class Report:
    """What was made of a study.

    Attributes
    ----------
    study
        Its name.
    paths
        Every file that was written: tables, figures, and the page.
    counts
        Status -> number of runs; ``served`` -> number of loads of a study that has no runs.
    problems
        One line for each file that was left out.
    """

    study: str
    paths: list[Path]
    counts: dict[str, int]
    problems: list[str]


def studies(results_root: Path) -> list[str]:
    """Name the studies below a results folder: of runs, or of loads that were served."""
    served = {path.parent.name for path in results_root.glob(f"*/{SERVING_FILE}")}
    return sorted({*results.studies(results_root), *served})


def made_before(folder: Path) -> list[Path]:
    """Return what was made of a study if it is newer than every result and the README, or nothing if any is older.

    Parameters
    ----------
    folder
        ``results/<study>``.
    """
    made = [path for kind, names in _MADE.items() for path in sorted((folder / kind).glob(names))]
    read = ("runs/*.json", "README.md", STORAGE_FILE, SERVING_FILE, "cells/*.json")
    times = [path.stat().st_mtime_ns for kind in read for path in folder.glob(kind)]
    complete = {path.parent for path in made} == {folder / kind for kind in _MADE}
    return made if complete and times and min(path.stat().st_mtime_ns for path in made) > max(times) else []


def regenerate(results_root: Path, study: str, formats: Sequence[str] = FORMATS) -> Report:
    """Write ``tables/``, ``figures/`` and ``report.html`` of a study from its ``runs/`` and ``predictions/``.

    Parameters
    ----------
    results_root
        The results folder.
    study
        Name of the study, a folder in it.
    formats
        Of the figures: some of ``"png"``, ``"svg"`` and ``"pdf"``.

    Raises
    ------
    BenchError
        If there is no such study, or it has no run that can be read.
    """
    known = studies(results_root)
    if study not in known:
        listed = f" Known: {', '.join(known)}." if known else " There are no studies in it."
        raise BenchError(f"no study '{study}' in {results_root}.{suggest(study, known)}{listed}")
    folder = results_root / study
    served = write_serving(folder, formats)
    if served and not (folder / "runs").is_dir():
        return Report(study, served, {"served": len(list(ServingStore(folder)))}, [])
    read = read_study(folder)
    if read.frame.empty:
        why = "".join(f"\n  {problem}" for problem in read.problems)
        raise BenchError(f"study '{study}' has no run that can be read in {read.folder / 'runs'}.{why}")
    predictions = Predictions(read.folder)
    table = cells(read, predictions)
    pairs = comparisons(read, predictions)
    paths = [
        *write_tables(read, table, pairs),
        *write_figures(read, table, formats),
        *write_storage(read.folder, formats),
        *served,
    ]
    paths.append(write_page(read, table, pairs))
    counts = read.frame["status"].value_counts().sort_index()
    return Report(study, paths, {str(status): int(n) for status, n in counts.items()}, read.problems)
