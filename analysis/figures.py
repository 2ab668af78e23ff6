"""Pareto figures: score against remaining encoder FLOPs, cheaper to the left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from analysis import words
from analysis.cells import AVERAGE
from analysis.drops import drops_figure
from analysis.frames import DENSE, Study, groups
from analysis.labels import Label, place
from analysis.latency import latency_figure
from analysis.statistics import Array
from analysis.style import FAINT, FORMATS, INK, RC, Look, legend, legend_size, looks, save

X_LABEL = "remaining encoder FLOPs (% of dense, real tokens)"
NEAR = 1.5
"""Percentage points within which a point stands on the guide of its ratio, whose label then serves it."""
LONGEST_NAME = 18
"""Characters up to which series are named beside their lines, and not in a legend."""
CROWDED = 8
"""Series from which a legend names them all, in two columns of a wider figure."""
MANY_VARIANTS = 4
"""Series of one method from which they have a figure of their own."""
SIDE_BY_SIDE = 0.9
"""Percentage points between marks of equal cost, which would else hide each other's error bars."""


def write_figures(study: Study, table: pd.DataFrame, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write ``figures/`` of a study and return the paths; figures of earlier runs that no longer exist are removed.

    Parameters
    ----------
    study
        Its runs.
    table
        Its cells, as `analysis.cells.cells` gives them.
    formats
        Some of ``"png"``, ``"svg"`` and ``"pdf"``.
    """
    folder = study.folder / "figures"
    paths: list[Path] = []
    if len(table):
        styles, names = looks(table["series"]), words.short_names(table["backbone"])
        shown = table[table["score"].notna() & table["remaining"].notna()]
        with mpl.rc_context(RC):
            main = without_variants(shown)
            for (backbone, task), rows in groups(main, ["backbone", "task"]):
                stem = folder / f"pareto_{words.slug(names[backbone])}_{words.slug(task)}"
                paths += save(pareto_figure(rows, names[backbone], styles), stem, formats)
            if shown.groupby(["backbone", "task"]).ngroups > 1:
                paths += save(overview_figure(main, names, styles), folder / "pareto_overview", formats)
            for backbone, rows in groups(shown, "backbone"):
                headline = AVERAGE if AVERAGE in set(rows["task"]) else rows["task"].iloc[0]
                rows = rows[rows["task"] == headline]
                for method in rows.loc[_crowded(rows), "method"].unique():
                    own = rows[rows["method"].isin([DENSE, method])]
                    stem = folder / f"variants_{words.slug(names[backbone])}_{words.slug(method)}"
                    paths += save(pareto_figure(own, names[backbone], styles), stem, formats)
                for kind, draw_kind in (("latency", latency_figure), ("drops", drops_figure)):
                    if (figure := draw_kind(rows, names[backbone], styles)) is not None:
                        paths += save(figure, folder / f"{kind}_{words.slug(names[backbone])}", formats)
    for suffix in formats:
        for kind in ("pareto", "variants", "latency", "drops"):
            for stale in set(folder.glob(f"{kind}_*.{suffix}")) - set(paths):
                stale.unlink()
    return sorted(paths)


def without_variants(rows: pd.DataFrame) -> pd.DataFrame:
    """Leave out what only crowds: of a method with many variants beside its plain self, those that are dominated."""
    return rows[~(_crowded(rows) & (rows["series"] != rows["method"]) & ~rows["on_front"])]


def _crowded(rows: pd.DataFrame) -> pd.Series:
    """Mark the rows of methods that come as they are and in many variants."""
    series = rows.groupby(["backbone", "method"])["series"]
    plain = (rows["series"] == rows["method"]).groupby([rows["backbone"], rows["method"]]).transform("any")
    return (series.transform("nunique") > MANY_VARIANTS) & plain


def pareto_figure(rows: pd.DataFrame, backbone: str, styles: dict[str, Look]) -> Figure:
    """Draw one backbone and task.

    Parameters
    ----------
    rows
        Its cells with a score and a cost.
    backbone
        Its name as shown.
    styles
        Look of every series.
    """
    rows = _positions(rows)
    series = rows["series"].unique()
    many = len(series) > CROWDED
    direct = max(map(len, series)) <= LONGEST_NAME and not many
    width = 7.2 if many else 5.6
    height = 4.1 if direct else 4.1 + legend_size(series, width)[2]
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    task = rows["task"].iloc[0]
    tasks = int(rows["tasks"].max())
    axes.set_title(f"{backbone} · {f'average over {tasks} tasks' if task == AVERAGE else task}", loc="left", pad=8)
    axes.set_xlabel(X_LABEL)
    axes.set_ylabel(words.metric(rows["metric"].iloc[0]))
    figure.supxlabel(_key(rows), fontsize=6.2, color=FAINT)
    strokes = draw(axes, rows, styles)
    _frame(axes, rows, room_for_names=0.27 if direct else 0.05)
    if not direct:
        present = {name: look for name, look in styles.items() if name in set(rows["series"])}
        legend(figure, present, "outside upper left", figure.get_figwidth())
    on_guides = _guides(axes, rows)
    top = axes.secondary_xaxis("top", functions=(_saved, _saved))
    top.set_xlabel("saved (%)", color=FAINT, fontsize=7.5)
    top.tick_params(colors=FAINT, labelsize=7)
    top.spines["top"].set_color(FAINT)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    place(figure, axes, _labels(rows, styles, on_guides, direct), rows[["x", "y"]].to_numpy(), strokes)
    return figure


def overview_figure(table: pd.DataFrame, names: dict[str, str], styles: dict[str, Look]) -> Figure:
    """Draw every backbone and task small, a backbone's average first."""
    styles = {name: look for name, look in styles.items() if name in set(table["series"])}
    found = {(str(backbone), str(task)): rows for (backbone, task), rows in groups(table, ["backbone", "task"])}
    panels = sorted(found, key=lambda panel: (panel[0], panel[1] != AVERAGE, panel[1]))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    width = max(5.0, 1.95 * columns + 0.5)
    height = 1.75 * lines + 0.6 + legend_size(styles, width)[2]
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (backbone, task) in zip(grid.flat, panels, strict=False):
        rows = found[backbone, task]
        draw(axes, _positions(rows), styles, small=True)
        axes.set_title(f"{names[backbone]} · {task}" if len(names) > 1 else task, loc="left", fontsize=8)
        axes.set_ylabel("mean score, %" if task == AVERAGE else words.metric(rows["metric"].iloc[0]), fontsize=7)
        axes.margins(y=0.1)
        axes.tick_params(labelbottom=True)
    grid[0, 0].set_xlim(100 * table["remaining"].min() - 6, 100 * max(1.0, table["remaining"].max()) + 5)
    figure.supxlabel(X_LABEL, fontsize=8)
    legend(figure, styles, "outside upper center", figure.get_figwidth())
    return figure


def draw(axes: Axes, rows: pd.DataFrame, styles: dict[str, Look], small: bool = False) -> list[Array]:
    """Draw the points, error bars, lines and front of one panel; return its strokes for the labels to keep clear of.

    Parameters
    ----------
    axes
        Where to draw.
    rows
        Cells with their positions, see `_positions`.
    styles
        Look of every series.
    small
        Whether the panel is one of many: thinner, and without the single seeds.
    """
    strokes = []
    front = rows[rows["on_front"]].sort_values("x")
    if len(front) > 1:
        axes.step(front["x"], front["y"], where="post", color="#c8c8c8", lw=1.4 if small else 2.2, zorder=1)
    for series, points in groups(rows, "series"):
        look, points = styles[series], points.sort_values("x")
        x, y, low, high = (points[name].to_numpy() for name in ("x", "y", "low", "high"))
        axes.vlines(x, low, high, color=look.colour, lw=0.6 if small else 0.9, alpha=0.8, zorder=2)
        if not small:
            axes.plot([x, x], [low, high], "_", color=look.colour, ms=4.5, mew=0.9, alpha=0.8, zorder=2)
            for at, scores in zip(x, points["seed_scores"], strict=True):
                if len(scores) > 1:
                    seeds = [100 * score for _, score in scores]
                    axes.plot([at] * len(seeds), seeds, ".", ms=3.2, color=look.colour, mew=0, zorder=2.5)
        strokes += [np.array([[at, a], [at, b]]) for at, a, b in zip(x, low, high, strict=True)]
        if len(points) > 1 and points["method"].iloc[0] != DENSE:
            axes.plot(x, y, color=look.colour, ls=look.dashes, lw=1.0 if small else 1.3, zorder=3)
            strokes.append(np.column_stack([x, y]))
        size = (9.0 if look.marker == "*" else 5.2) * (0.65 if small else 1)
        for at, height, filled in zip(x, y, points["on_front"], strict=True):
            axes.plot(at, height, look.marker, ms=size, color=look.colour, mew=0.8 if small else 1.1,
                      mfc=look.colour if filled else "white", zorder=5 if filled else 4)  # fmt: skip
    return strokes


def _positions(rows: pd.DataFrame) -> pd.DataFrame:
    """Add ``x``, ``y``, ``low`` and ``high`` in percent, marks of equal cost set side by side."""
    rows = rows.assign(x=100 * rows["remaining"], y=100 * rows["score"])
    rows["low"] = (100 * rows["example_low"]).fillna(rows["y"])
    rows["high"] = (100 * rows["example_high"]).fillna(rows["y"])
    rows = rows.sort_values("x")
    for _, equal in rows.groupby((rows["x"].diff() > SIDE_BY_SIDE / 3).cumsum()):
        ordered = equal.index[np.argsort([str(words.reading_order(name)) for name in equal["series"]], kind="stable")]
        step = min(SIDE_BY_SIDE, 4 / len(equal))
        rows.loc[ordered, "x"] = equal["x"].mean() + step * (np.arange(len(equal)) - (len(equal) - 1) / 2)
    return rows


def _key(rows: pd.DataFrame) -> str:
    """Say what the marks mean."""
    seeds = int(rows["seeds"].max())
    dots = f"  ·  dots: {seeds} seeds" if seeds > 1 else ""
    beside = "  ·  side by side: equal cost" if (rows["x"] - 100 * rows["remaining"]).abs().max() > 0.1 else ""
    front = "filled: on the Pareto front (grey)  ·  hollow: dominated"
    return f"bars: 95 % bootstrap over dev examples{dots}\n{front}{beside}"


def _saved(remaining: ArrayLike) -> Array:
    return 100 - np.asarray(remaining, dtype=float)


def _frame(axes: Axes, rows: pd.DataFrame, room_for_names: float) -> None:
    """Set limits that leave room for the names of series at the cheap end, and for the guides' labels on top."""
    cheapest, dearest = rows["x"].min(), max(100.0, rows["x"].max()) + 4
    axes.set_xlim(cheapest - room_for_names * (dearest - cheapest), dearest)
    low, high = rows["low"].min(), rows["high"].max()
    span = max(high - low, 1.0)
    axes.set_ylim(low - 0.06 * span, high + 0.14 * span)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))


def _guides(axes: Axes, rows: pd.DataFrame) -> dict[float, float]:
    """Mark where each ratio asks to be; return ratio -> percent for the guides that were drawn."""
    means = {ratio: 100 * same["requested_remaining"].mean() for ratio, same in groups(rows, "ratio")}
    left, right = axes.get_xlim()
    asked = {ratio: x for ratio, x in means.items() if left < x < right}
    row_ends: list[float] = []
    for ratio, x in sorted(asked.items(), key=lambda item: item[1]):
        axes.axvline(x, color=FAINT, lw=0.6, ls=(0, (2, 3)), zorder=0.5)
        # labels of near guides stand in rows below one another
        line = next((i for i, end in enumerate(row_ends) if x - end > 0.07 * (right - left)), len(row_ends))
        row_ends[line:] = [x, *row_ends[line + 1 :]]
        axes.annotate(
            f"k = {ratio:g}", (x, 1), (0, -3 - 9 * line), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", va="top", fontsize=7, color=INK,
            bbox={"fc": "white", "ec": "none", "pad": 0.8},
        )  # fmt: skip
    return asked


def _labels(rows: pd.DataFrame, styles: dict[str, Look], guides: dict[float, float], direct: bool) -> list[Label]:
    """Name each series at its cheap end, best first, if ``direct``, and the ratio of points off its guide."""
    names, ratios = [], []
    for series, points in groups(rows, "series"):
        end = points.sort_values("x").iloc[0]
        sides = ("left", "below", "above", "right")
        names.append(Label(series, styles[series].colour, end["x"], end["y"], sides=sides))
        for _, point in points.iterrows():
            away = abs(guides.get(point["ratio"], np.inf) - 100 * point["remaining"]) > NEAR
            if away and not np.isnan(point["ratio"]):
                text = f"k={point['ratio']:g}"
                ratios.append(Label(text, styles[series].colour, point["x"], point["y"], 6, sides[::-1]))
    return sorted(names if direct else [], key=lambda label: -label.y) + ratios
