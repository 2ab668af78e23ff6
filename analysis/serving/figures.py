"""Figures of a study of serving: policies under each load, a load as time goes by, the simulation against real time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from analysis import words
from analysis.frames import groups
from analysis.serving.frames import MILLISECONDS, Group, Serving
from analysis.serving.tables import ENVELOPE, load_name, policy_name
from analysis.style import FAINT, INK, Look, legend, legend_size, looks

WIDTH = 7.2
COLUMNS = 3
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b6b6b")


def policies_figure(frame: pd.DataFrame, title: str) -> Figure:
    """Draw accuracy against the share in time, a panel a load; the static ks of an engine are joined by a line.

    Parameters
    ----------
    frame
        Rows of `analysis.serving.frames.served_frame` under conditions that differ in the load alone.
    title
        What was served, and how.
    """
    engines = list(dict.fromkeys(frame["engine"]))
    adaptive = [policy for policy in dict.fromkeys(frame["policy"]) if not policy.startswith("static:")]
    styles = _styles(engines, adaptive)
    loads = list(dict.fromkeys(frame["load"]))
    rows = -(-len(loads) // COLUMNS)
    _, _, height = legend_size(styles, WIDTH)
    figure = Figure(figsize=(WIDTH, 2.4 * rows + height + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, min(COLUMNS, len(loads)), sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, load in zip(panels, loads, strict=False):
        for engine, mine in groups(frame[frame["load"] == load], "engine", sort=False):
            _policies(axes, mine, styles, str(engine))
        axes.set_title(load_name(load), loc="left")
        axes.set_xlabel("answered in time, %")
        left = min(90.0, 100 * float(frame.loc[frame["load"] == load, "in_time"].min()))
        axes.set_xlim(left - 0.1 * (100 - left), 100 + 0.05 * (100 - left))
    for axes in panels[len(loads) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel("accuracy, %")
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    legend(figure, styles, "outside lower left", WIDTH)
    return figure


def _styles(engines: Sequence[str], adaptive: Sequence[str]) -> dict[str, Look]:
    """Give engines colours, and policies markers."""
    colours = dict(zip(sorted(engines, key=words.reading_order), itertools.cycle(COLOURS), strict=False))
    markers = dict(zip(adaptive, ("D", "^", "s", "P", "X", "v"), strict=False))
    styles = {}
    for engine in engines:
        styles[f"{engine}, static k"] = Look(colours[engine], "o", "-")
        styles |= {
            f"{engine}, {policy_name(policy)}": Look(colours[engine], markers.get(policy, "h"), "")
            for policy in adaptive
        }
    return styles


def _policies(axes: Axes, mine: pd.DataFrame, styles: dict[str, Look], engine: str) -> None:
    static = mine["policy"].str.startswith("static:")
    look = styles[f"{engine}, static k"]
    points = mine[static]
    axes.plot(100 * points["in_time"], 100 * points["accuracy"], ls="-", lw=0.8, marker="o", ms=3.5, mfc="white",
              color=look.colour, zorder=2)  # fmt: skip
    for row in points.itertuples():
        axes.annotate(str(row.policy).rpartition("=")[2], (100 * row.in_time, 100 * row.accuracy), (-5, 3),  # type: ignore[operator]
                      textcoords="offset points", fontsize=6.5, color=look.colour, ha="right")  # fmt: skip
    for row in mine[~static].itertuples():
        look = styles[f"{engine}, {policy_name(str(row.policy))}"]
        _bar(axes, row, look)


def _bar(axes: Axes, row: object, look: Look) -> None:
    x, low, high = (100 * getattr(row, f"in_time{end}") for end in ("", "_low", "_high"))
    y, bottom, top = (100 * getattr(row, f"accuracy{end}") for end in ("", "_low", "_high"))
    across = None if np.isnan(low) else [[max(0.0, x - low)], [max(0.0, min(high, 100) - x)]]
    axes.errorbar([x], [y], xerr=across, yerr=[[y - bottom], [top - y]], fmt=look.marker, ms=5, color=look.colour,
                  mec="white", mew=0.5, elinewidth=0.6, capsize=0, zorder=4)  # fmt: skip


def timeline_figure(serving: Serving, chosen: Sequence[Group], title: str) -> Figure:
    """Draw what arrived, what k was chosen and how late the answers were, second by second, a column a group.

    Parameters
    ----------
    serving
        The study.
    chosen
        Groups that were served in real time, whose single requests are kept.
    title
        What was served.
    """
    study = serving.study
    ks = sorted({model.k for calibration in study.calibrations for model in calibration.models})
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, len(chosen), sharex="col", sharey="row", squeeze=False)
    shades = mpl.colormaps["viridis_r"](np.linspace(0.08, 0.85, len(ks)))
    for column, group in enumerate(chosen):
        cell = group.cells[0]
        frame = serving.store.requests(cell)
        second = frame["arrived"].astype(int)
        seconds = np.arange(int(np.ceil(cell.seconds)))
        arrived = np.bincount(second, minlength=len(seconds))[: len(seconds)]
        top, middle, bottom = (row[column] for row in grid)
        top.step(seconds, arrived, where="post", color=INK, lw=0.9)
        top.axhline(study.capacity, color=FAINT, ls=(0, (4, 2)), lw=0.8)
        top.set_title(f"{load_name(group.condition.load)}\n{group.engine}, {policy_name(group.policy)}", loc="left")
        counts = np.stack([np.bincount(second[frame["k"] == k], minlength=len(seconds))[: len(seconds)] for k in ks])
        shares = counts / np.maximum(counts.sum(axis=0), 1)
        middle.stackplot(seconds, 100 * shares, colors=shades, step="post", lw=0)
        latency = frame.groupby(second)["latency"].quantile(0.95)
        bottom.plot(latency.index, MILLISECONDS * latency, color=INK, lw=0.9)
        bottom.axhline(MILLISECONDS * study.deadline_seconds, color="#D55E00", ls=(0, (4, 2)), lw=0.8)
        _plain_log(bottom)
        bottom.set_xlabel("seconds")
    for axes, name in zip(grid[:, 0], ("requests/s", "share at k, %", "p95 of the second, ms"), strict=True):
        axes.set_ylabel(name)
    handles: list[Artist] = [
        mpl.patches.Patch(color=shade, label=f"k = {k}") for k, shade in zip(ks, shades, strict=True)
    ]
    handles.append(mpl.lines.Line2D([], [], color=FAINT, ls=(0, (4, 2)), lw=0.8, label="limit of the dense model"))
    handles.append(mpl.lines.Line2D([], [], color="#D55E00", ls=(0, (4, 2)), lw=0.8, label="deadline"))
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=7.5)
    return figure


def agreement_figure(frame: pd.DataFrame, title: str) -> Figure:
    """Draw simulated against real p95, with the band in which they agree.

    Parameters
    ----------
    frame
        As `analysis.serving.frames.agreement_frame` gives it.
    title
        What was served.
    """
    styles = _marks(frame["load"])
    _, _, height = legend_size(styles, WIDTH)
    figure = Figure(figsize=(WIDTH, 3.4 + height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    columns = {"p95_ms_simulated": "from the calibration alone", "p95_ms_paced": "at the pace of the real run"}
    both = frame[["p95_ms_real", *columns]]
    ends = np.array([0.8 * both.min().min(), 1.25 * both.max().max()])
    for axes, (column, name) in zip(panels, columns.items(), strict=True):
        axes.fill_between(ends, ends * (1 - ENVELOPE), ends * (1 + ENVELOPE), color="#e6e6e6", lw=0)
        axes.plot(ends, ends, color=FAINT, lw=0.7)
        for load, mine in groups(frame, "load", sort=False):
            look = styles[load_name(str(load))]
            axes.plot(mine["p95_ms_real"], mine[column], ls="", marker=look.marker, ms=4, mec="white", mew=0.4,
                      color=look.colour)  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter("")
        _plain_log(axes)
        axes.set_xlabel("p95 in real time, ms")
        axes.set_title(name, loc="left")
    panels[0].set_ylabel("p95 simulated, ms")
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    legend(figure, styles, "outside lower left", WIDTH)
    return figure


def _plain_log(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with numbers that are read at once."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter("")


def _marks(loads: Iterable[str]) -> dict[str, Look]:
    return looks(load_name(load) for load in loads)


def title_of(serving: Serving, how: str) -> str:
    """Say what was served."""
    study = serving.study
    name = words.short_names([study.backbone])[study.backbone]
    return f"{name} · {study.task} · {how}, deadline {MILLISECONDS * study.deadline_seconds:g} ms"
