"""What many tasks take on disk and in memory: a table, and bytes against the number of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis import words
from analysis.frames import DENSE, groups
from analysis.markup import latex_table, markdown_escape, markdown_table
from analysis.style import FAINT, FORMATS, RC, Look, legend, legend_size, looks, save
from bench.results import write_atomic
from bench.storage import StorageResult, StorageSeries, read_storage

TABLES = ("storage.csv", "storage.md", "storage.tex")
FIGURE = "storage"
PANELS = {"disk_bytes": "on disk", "tensor_bytes": "in memory"}
MEGABYTE = 1e6


def write_storage(folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write the tables and the figure of a study's ``storage.json``; without one, what is left of an earlier one goes.

    Parameters
    ----------
    folder
        ``results/<study>``.
    formats
        Of the figure.
    """
    result = read_storage(folder)
    stem = folder / "figures" / FIGURE
    if result is None:
        for path in [*(folder / "tables" / name for name in TABLES), *stem.parent.glob(f"{FIGURE}.*")]:
            path.unlink(missing_ok=True)
        return []
    frame = storage_frame(result)
    texts = (frame.to_csv(index=False, lineterminator="\n"), storage_markdown(result, frame), _latex(result, frame))
    paths = [folder / "tables" / name for name in TABLES]
    for path, text in zip(paths, texts, strict=True):
        write_atomic(path, text.encode())
    with mpl.rc_context(RC):
        return [
            *paths,
            *save(storage_figure(frame, words.short_names([result.backbone])[result.backbone]), stem, formats),
        ]


def storage_frame(result: StorageResult) -> pd.DataFrame:
    """Return one row a series and number of tasks, bytes as bytes.

    ``further_bytes`` is what one more task takes: the mean of what the trained ones did.
    """
    names = series_names(result.series)
    rows = [
        {
            "series": name,
            "method": series.method,
            "ratios": " ".join(f"{ratio:g}" for ratio in series.ratios),
            "shared_bytes": series.shared_bytes,
            "further_bytes": round(np.mean(list(series.task_bytes.values()))),
            **point.model_dump(),
        }
        for name, series in zip(names, result.series, strict=True)
        for point in series.points
    ]
    frame = pd.DataFrame(rows)
    order = frame["series"].map(words.reading_order)
    return frame.assign(order=order).sort_values(["order", "tasks"], ignore_index=True).drop(columns="order")


def series_names(series: Sequence[StorageSeries]) -> list[str]:
    """Name each series by its method and ratios, and by its teachers where the method comes with both kinds."""
    kinds: dict[str, set[bool]] = {}
    for one in series:
        kinds.setdefault(one.method, set()).add(one.lora)
    names = []
    for one in series:
        parts = [f"k = {', '.join(f'{ratio:g}' for ratio in one.ratios)}"] if one.ratios else []
        if len(kinds[one.method]) > 1:
            parts.append("LoRA" if one.lora else "all weights")
        names.append(f"{one.method} ({', '.join(parts)})" if parts else one.method)
    return names


def storage_markdown(result: StorageResult, frame: pd.DataFrame) -> str:
    """Write the tables that a stranger reads."""
    distinct = int(frame["distinct"].max())
    notes = [
        "1 MB = 10^6 bytes. On disk: sizes of files that were written. In memory: bytes of the tensors that were "
        "loaded, each once; resident: growth of the process by loading them.",
        f"Up to {words.plural(distinct, 'task')} were trained; the others are copies of these with other numbers in "
        "every tensor, as large and as slow to load.",
        "Backbone: weights that all tasks refer to, stored once. A distilled or pruned model keeps what differs from "
        "the backbone, the least that it can keep; what it has in common with it to the last bit is the backbone's.",
        "A further task: mean size of the trained tasks' files, at every ratio that is named.",
    ]
    notes += [f"Not in memory: {reason}." for reason in frame["reason"].dropna().unique()]
    text = [f"# {markdown_escape(result.study)}: storage\n", *(f"- {markdown_escape(note)}" for note in notes), ""]
    text.append(
        f"{result.backbone}, {_mb(result.backbone_bytes)} MB; tasks {', '.join(result.series[0].task_bytes)}.\n"
    )
    for title, column in (
        ("On disk, MB", "disk_bytes"),
        ("In memory, MB", "tensor_bytes"),
        ("Resident, MB", "resident_bytes"),
    ):
        text.append(f"## {title}\n\n{markdown_table(*_grid(frame, column))}")
    rows = [
        [name, f"{a.k}", f"{a.examples}", f"{a.batches}", f"{a.same}", f"{a.largest_difference:.1e}"]
        for name, series in zip(series_names(result.series), result.series, strict=True)
        for a in series.agreement
    ]
    if rows:
        head = ["kept as", "k", "examples", "mixed batches", "same answer", "largest difference of a logit"]
        text.append(
            "## Mixed batches against each task's own model\n\n"
            "Rows of all tasks in one batch on one resident backbone, and each row alone through the model that its "
            f"task was trained as.\n\n{markdown_table(head, rows)}"
        )
    return "\n".join(text)


def _grid(frame: pd.DataFrame, column: str) -> tuple[list[str], list[list[str]]]:
    counts = sorted(frame["tasks"].unique())
    head = ["kept as", "backbone", "a further task", *(words.plural(int(n), "task") for n in counts)]
    rows = []
    for name, mine in groups(frame, "series", sort=False):
        found = dict(zip(mine["tasks"], mine[column], strict=True))
        first = mine.iloc[0]
        sizes = [found.get(n, math.nan) for n in counts]
        rows.append([str(name), _mb(first["shared_bytes"]), _mb(first["further_bytes"]), *map(_mb, sizes)])
    return head, rows


def _latex(result: StorageResult, frame: pd.DataFrame) -> str:
    head, rows = _grid(frame, "disk_bytes")
    caption = f"Megabytes on disk that so many tasks take on {result.backbone}."
    return latex_table(head, [rows], caption, f"tab:{words.slug(result.study)}-storage")


def _mb(size: float) -> str:
    if pd.isna(size):
        return words.MISSING
    megabytes = size / MEGABYTE
    return f"{megabytes:,.0f}" if megabytes >= 100 else words.number(megabytes, 1 if megabytes >= 10 else 2)


def storage_figure(frame: pd.DataFrame, title: str) -> Figure:
    """Draw bytes against the number of tasks, a line a way to keep them, on disk and in memory.

    Parameters
    ----------
    frame
        As `storage_frame` gives it.
    title
        The backbone.
    """
    styles = _looks(list(frame["series"].unique()))
    _, _, height = legend_size(styles, 7.2)
    figure = Figure(figsize=(7.2, 3.6 + height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS), sharex=True, sharey=True)
    counts = sorted(frame["tasks"].unique())
    for axes, (column, name) in zip(panels, PANELS.items(), strict=True):
        for series, points in groups(frame[frame[column].notna()], "series", sort=False):
            look = styles[str(series)]
            axes.plot(points["tasks"], points[column] / MEGABYTE, marker=look.marker, ls=look.dashes, lw=1.1, ms=4.5,
                      color=look.colour, mfc="white", mew=1, zorder=3)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_title(f"{title} · {name}", loc="left")
        axes.set_xlabel("tasks")
    if len(panels) > 1 and frame["tensor_bytes"].isna().any():
        panels[1].set_title(
            "what did not fit was not loaded", loc="right", fontsize=7, color=FAINT, fontweight="normal"
        )
    panels[0].set_ylabel("MB (log scale)")
    legend(figure, styles, "outside upper left", 7.2)
    return figure


def _looks(names: Sequence[str]) -> dict[str, Look]:
    """Give each series its look; models that nothing was taken from are black here too, but have a line."""
    found = looks(names)
    dashes = iter(("-", (0, (2, 2)), (0, (6, 2))))
    return {
        name: look._replace(dashes=next(dashes, "-")) if name.split(" ")[0] == DENSE else look
        for name, look in sorted(found.items(), key=lambda item: words.reading_order(item[0]))
    }
