"""What each method loses against its dense teacher, method beside method at one ratio."""

from __future__ import annotations

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
    shown = rows[(rows["method"] != DENSE) & rows["drop"].notna()]
    if len(shown) < 2:
        return None
    blocks = [(ratio, block.sort_values(["drop", "series"])) for ratio, block in groups(shown, "ratio")]
    heights = [LINE * (len(block) + 1) for _, block in blocks]
    figure = Figure(figsize=(6.4, sum(heights) + 0.35 * len(blocks) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(blocks), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (ratio, block) in zip(panels, blocks, strict=True):
        y = np.arange(len(block))
        drop, low, high = (100 * block[name].to_numpy() for name in ("drop", "drop_low", "drop_high"))
        axes.axvline(0, color=FAINT, lw=0.9, zorder=1)
        for at, (_, row), point, left, right in zip(y, block.iterrows(), drop, low, high, strict=True):
            look = styles[row["series"]]
            axes.hlines(at, left, right, color=look.colour, lw=1.1, zorder=2)
            axes.plot(point, at, look.marker, ms=5, color=look.colour, mew=1, mfc="white", zorder=3)
        axes.set_ylim(len(block) - 0.4, -0.6)
        axes.set_yticks(y, list(block["series"]))
        axes.tick_params(left=False)
        axes.grid(axis="y", visible=False)
        right = axes.secondary_yaxis("right")
        right.set_yticks(y, [f"{words.number(share, scale=100)} %" for share in block["remaining"]])
        right.tick_params(right=False, colors=FAINT, labelsize=7)
        right.spines["right"].set_visible(False)
        axes.set_title(f"k = {ratio:g}" if pd.notna(ratio) else "without a ratio", loc="left", fontsize=8, color=INK)
    panels[0].set_title("remaining FLOPs", loc="right", fontsize=7, color=FAINT, fontweight="normal")
    bars = "\nbars: paired 95 % bootstrap over dev examples" if shown["drop_low"].notna().any() else ""
    panels[-1].set_xlabel(f"points lost against dense; left of 0 is better{bars}")
    task, tasks = rows["task"].iloc[0], int(rows["tasks"].max())
    of = f"average over {tasks} tasks" if task == AVERAGE else task
    figure.suptitle(f"{backbone} · {of}", fontsize=9, fontweight="bold", x=0.02, ha="left")
    return figure
