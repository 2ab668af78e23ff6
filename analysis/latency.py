"""Whether saved FLOPs are saved time: latency ratio against FLOPs ratio."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis import words
from analysis.cells import AVERAGE
from analysis.frames import DENSE, groups
from analysis.style import FAINT, Look, legend, legend_size


def latency_figure(rows: pd.DataFrame, backbone: str, styles: dict[str, Look]) -> Figure | None:
    """Draw every series and ratio of one backbone, a panel a batch size; ``None`` if nothing was timed.

    Parameters
    ----------
    rows
        Cells of its average over tasks, or of its only task.
    backbone
        Its name as shown.
    styles
        Look of every series.
    """
    shapes = {c: text for c, text in words.batch_columns(rows.columns).items() if rows[c].notna().any()}
    if not shapes:
        return None
    timed = rows[(rows["method"] != DENSE) & rows[list(shapes)].notna().any(axis=1)]
    if timed.empty:
        return None
    highs = timed[[f"{column}_high" for column in shapes]].max().max()
    lows = timed[[f"{column}_low" for column in shapes]].min().min()
    flops = [_flops(timed, column) for column in shapes]
    ends = min(lows, *(x.min() for x in flops)) - 0.04, max(1.0, highs, *(x.max() for x in flops)) + 0.04
    present = {name: look for name, look in styles.items() if name in set(timed["series"]) or name == DENSE}
    _, width, height = legend_size(present, 0)
    figure = Figure(figsize=(2.75 * len(shapes) + 0.3 + width, max(3.5, height + 0.4)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shapes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (column, shape) in zip(panels, shapes.items(), strict=True):
        axes.plot(ends, ends, color=FAINT, lw=0.9, zorder=1)
        axes.plot(1, 1, "*", color="black", ms=8, zorder=4)
        axes.axhline(1.0, color=FAINT, lw=0.7, ls=(0, (2, 3)), zorder=1)
        for series, points in groups(timed[timed[column].notna()], "series"):
            points = points.assign(x=_flops(points, column)).sort_values("x")
            x, y = points["x"].to_numpy(), points[column].to_numpy()
            bars = np.abs([y - points[f"{column}_low"].to_numpy(), points[f"{column}_high"].to_numpy() - y])
            look = styles[series]
            axes.errorbar(x, y, yerr=bars, fmt=look.marker, ls=look.dashes, lw=0.9, ms=4.2, color=look.colour,
                          mfc="white", mew=0.9, elinewidth=0.8, capsize=1.8, zorder=3)  # fmt: skip
        axes.set_title(shape, loc="left")
        axes.set_xlim(ends)
        axes.set_ylim(ends)
        axes.set_aspect("equal")
        axes.set_xlabel("FLOPs of the whole model\non the timed batch, compressed / dense", fontsize=7.5)
        axes.text(ends[0] + 0.02, 1.008, "as fast as dense", fontsize=6.5, color=FAINT, va="bottom")
        axes.annotate("time = FLOPs", (1, 1), (-14, -22), xycoords="axes fraction", textcoords="offset points",
                      ha="right", va="top", rotation=45, rotation_mode="anchor", fontsize=6.5, color=FAINT)  # fmt: skip
    panels[0].set_ylabel("latency, compressed / dense\n(median, 95 % bootstrap)")
    several = f" · average over {int(rows['tasks'].max())} tasks" if rows["task"].iloc[0] == AVERAGE else ""
    figure.suptitle(f"{backbone}{several}", fontsize=9, fontweight="bold", x=0.02, ha="left")
    legend(figure, present, "outside right upper", 0)
    return figure


def _flops(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return the FLOPs ratio on the timed batch, or on real tokens where a run does not tell."""
    return rows.get(f"{column}_flops", pd.Series(np.nan, index=rows.index)).fillna(rows["remaining_total"])
