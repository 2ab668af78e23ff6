"""What is lost against the dense teacher: method beside method at one ratio, option beside option of one method."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis import words
from analysis.cells import AVERAGE
from analysis.frames import DENSE, groups
from analysis.style import FAINT, INK, Look

LINE = 0.19
"""Height of a method's line in inches."""
LETTER = 0.062
"""Width of a label's letter in inches."""


class _Panel(NamedTuple):
    """Rows to compare, and how they are called there."""

    title: str
    rows: pd.DataFrame
    labels: list[str]


def drops_figure(rows: pd.DataFrame, backbone: str, styles: dict[str, Look]) -> Figure | None:
    """Draw one backbone and task, a panel a ratio, the smallest drop on top; ``None`` if there is nothing to compare.

    Parameters
    ----------
    rows
        Its cells with a score.
    backbone
        Its name as shown.
    styles
        Look of every series.
    """
    shown = _ranked(rows)
    if len(shown) < 2:
        return None
    panels = [_Panel(_at(ratio), block, list(block["series"])) for ratio, block in groups(shown, "ratio")]
    return _draw(panels, backbone, styles)


def options_figure(rows: pd.DataFrame, backbone: str, styles: dict[str, Look]) -> Figure | None:
    """Draw the same, a panel for each method and ratio at which it ran with several options; ``None`` if none did."""
    blocks = [(*key, block) for key, block in groups(_ranked(rows), ["method", "ratio"]) if len(block) > 1]
    blocks.sort(key=lambda block: words.reading_order(block[0]))
    panels = [
        _Panel(f"{method}, {_at(ratio)}", block, [words.options(series) for series in block["series"]])
        for method, ratio, block in blocks
    ]
    return _draw(panels, backbone, styles) if panels else None


def _ranked(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[(rows["method"] != DENSE) & rows["drop"].notna()].sort_values(["drop", "series"])


def _at(ratio: float) -> str:
    return f"k = {ratio:g}" if pd.notna(ratio) else "without a ratio"


def _draw(panels: list[_Panel], backbone: str, styles: dict[str, Look]) -> Figure:
    heights = [LINE * (len(panel.rows) + 1) for panel in panels]
    longest = max(len(label) for panel in panels for label in panel.labels)
    figure = Figure(figsize=(4.4 + LETTER * longest, sum(heights) + 0.35 * len(panels) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows, labels) in zip(grid, panels, strict=True):
        y = np.arange(len(rows))
        drop, low, high = (100 * rows[name].to_numpy() for name in ("drop", "drop_low", "drop_high"))
        axes.axvline(0, color=FAINT, lw=0.9, zorder=1)
        for at, series, point, left, right in zip(y, rows["series"], drop, low, high, strict=True):
            look = styles[series]
            axes.hlines(at, left, right, color=look.colour, lw=1.1, zorder=2)
            axes.plot(point, at, look.marker, ms=5, color=look.colour, mew=1, mfc="white", zorder=3)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(y, labels)
        axes.tick_params(left=False)
        axes.grid(axis="y", visible=False)
        right = axes.secondary_yaxis("right")
        right.set_yticks(y, [f"{words.number(share, scale=100)} %" for share in rows["remaining"]])
        right.tick_params(right=False, colors=FAINT, labelsize=7)
        right.spines["right"].set_visible(False)
        axes.set_title(title, loc="left", fontsize=8, color=INK)
    grid[0].set_title("remaining FLOPs", loc="right", fontsize=7, color=FAINT, fontweight="normal")
    every = pd.concat([panel.rows for panel in panels])
    bars = "\nbars: paired 95 % bootstrap over dev examples" if every["drop_low"].notna().any() else ""
    grid[-1].set_xlabel(f"points lost against dense; left of 0 is better{bars}")
    task, tasks = every["task"].iloc[0], int(every["tasks"].max())
    of = f"average over {tasks} tasks" if task == AVERAGE else task
    figure.suptitle(f"{backbone} · {of}", fontsize=9, fontweight="bold", x=0.02, ha="left")
    return figure
