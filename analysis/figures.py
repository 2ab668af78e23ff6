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
from scipy.optimize import isotonic_regression

from analysis import words
from analysis.cells import AVERAGE, defaults
from analysis.drops import drops_figure, options_figure
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
SIDE_BY_SIDE, SPREAD = 0.9, 4.0
"""Percentage points between marks of equal cost, which would hide each other's bars, and at most from end to end."""


def write_figures(study: Study, table: pd.DataFrame, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write ``figures/`` of a study and return the paths; figures of earlier runs that no longer exist are removed.

    Methods are compared as they are by default; ``options_*`` shows what their options do.

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
        scored = table[table["score"].notna() & table["remaining"].notna()]
        shown = defaults(scored)
        with mpl.rc_context(RC):
            for (backbone, task), rows in groups(shown, ["backbone", "task"]):
                stem = folder / f"pareto_{words.slug(names[backbone])}_{words.slug(task)}"
                paths += save(pareto_figure(rows, names[backbone], styles), stem, formats)
            if shown.groupby(["backbone", "task"]).ngroups > 1:
                paths += save(overview_figure(shown, names, styles), folder / "pareto_overview", formats)
            for backbone, rows in groups(shown, "backbone"):
                headline = AVERAGE if AVERAGE in set(rows["task"]) else rows["task"].iloc[0]
                every = scored[(scored["backbone"] == backbone) & (scored["task"] == headline)]
                rows = rows[rows["task"] == headline]
                drawn = {
                    "latency": latency_figure(rows, names[backbone], styles),
                    "drops": drops_figure(rows, names[backbone], styles),
                    "options": options_figure(every, names[backbone], styles),
                }
                for kind, figure in drawn.items():
                    if figure is not None:
                        paths += save(figure, folder / f"{kind}_{words.slug(names[backbone])}", formats)
    for suffix in formats:
        for kind in ("pareto", "latency", "drops", "options"):
            for stale in set(folder.glob(f"{kind}_*.{suffix}")) - set(paths):
                stale.unlink()
    return sorted(paths)


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
    """Draw every backbone and task small, the average first: a row a backbone if they share all tasks, else wrapped."""
    by_backbone = {backbone: set(rows["task"]) for backbone, rows in groups(table, "backbone")}
    panels = [
        (backbone, task)
        for backbone, tasks in by_backbone.items()
        for task in sorted(tasks, key=lambda name: (name != AVERAGE, name))
    ]
    several = len(by_backbone) > 1
    alike = several and len(set(map(frozenset, by_backbone.values()))) == 1
    columns = len(panels) // len(by_backbone) if alike else -(-len(panels) // -(-len(panels) // 4))
    lines = -(-len(panels) // columns)
    width = max(5.0, 1.95 * columns + 0.5)
    present = {name: look for name, look in styles.items() if name in set(table["series"])}
    height = 1.75 * lines + 0.6 + legend_size(present, width)[2]
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (backbone, task) in zip(grid.flat, panels, strict=False):
        rows = table[(table["backbone"] == backbone) & (table["task"] == task)]
        draw(axes, _positions(rows), styles, small=True)
        axes.set_title(f"{names[backbone]} · {task}" if several else task, loc="left", fontsize=8)
        axes.set_ylabel("mean score, %" if task == AVERAGE else words.metric(rows["metric"].iloc[0]), fontsize=7)
        axes.margins(y=0.1)
        axes.tick_params(labelbottom=True)
    grid[0, 0].set_xlim(100 * table["remaining"].min() - 6, 100 * max(1.0, table["remaining"].max()) + 5)
    figure.supxlabel(X_LABEL, fontsize=8)
    legend(figure, present, "outside upper center", figure.get_figwidth())
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
    """Add ``x``, ``y``, ``low`` and ``high`` in percent, marks of equal cost side by side in the order of cost."""
    rows = rows.assign(x=100 * rows["remaining"], y=100 * rows["score"])
    rows["low"] = (100 * rows["example_low"]).fillna(rows["y"])
    rows["high"] = (100 * rows["example_high"]).fillna(rows["y"])
    rows = rows.sort_values("series", key=lambda names: names.map(words.reading_order)).sort_values("x", kind="stable")
    crowd = max(rows["x"].searchsorted(rows["x"] + SPREAD, side="right") - np.arange(len(rows)))
    steps = min(SIDE_BY_SIDE, SPREAD / crowd) * np.arange(len(rows))
    # the least squares of all moves that leave a step between neighbours
    return rows.assign(x=isotonic_regression(rows["x"] - steps).x + steps)


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
