"""How figures look, and how they are written: the same bytes from the same numbers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import words
from bench.results import write_atomic

RC: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that every machine draws alike
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",
    "pdf.fonttype": 42,
    "text.hinting": "none",  # so that a text is as wide in every format as it was when it was placed
    "figure.dpi": 200,
}
Place = Literal["outside upper left", "outside upper center", "outside right upper", "outside lower left"]
INK = "#333333"
FAINT = "#8a8a8a"
FORMATS = ("png", "svg", "pdf")
_UNDATED = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None, "Producer": None}}

# Okabe and Ito's colours in an order whose lightness alternates, so that neighbours differ in print too, then two of
# Tol's; each comes with its own marker and dashes.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#6b6b6b", "#882255", "#999933")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "d")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 1, 2, 1, 2)))


class Look(NamedTuple):
    """Colour, marker and dashes of one series."""

    colour: str
    marker: str
    dashes: Any


def looks(series: Iterable[str]) -> dict[str, Look]:
    """Give each series its look; the same series look alike in every figure of a study.

    Methods as they are by default come first, since they share most figures and should share no colour.
    """
    ordered = sorted(set(series), key=lambda name: (words.options(name) != "default", words.reading_order(name)))
    rivals = [name for name in ordered if words.reading_order(name)[0] > 0]
    found = {name: Look("#000000", "*", "") for name in ordered if name not in rivals}
    for i, name in enumerate(rivals):
        # the first, which is the suite's subject, shares its colour with none
        colour = _COLOURS[1 + (i - 1) % (len(_COLOURS) - 1)] if i else _COLOURS[0]
        found[name] = Look(colour, _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)])
    return found


def legend_size(names: Iterable[str], width: float) -> tuple[int, float, float]:
    """Return how many columns of ``names`` fit into ``width`` inches, and the width and height that they take."""
    names = list(names)
    each = 0.5 + 0.06 * max(map(len, names))
    columns = max(1, int(width / each))
    return columns, columns * each, 0.16 * -(-len(names) // columns)


def legend(figure: Figure, styles: Mapping[str, Look], place: Place, width: float) -> None:
    """Name every series, in as many columns as ``width`` inches hold."""
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, ls=look.dashes, ms=4.5, lw=1.2)
        for look in styles.values()
    ]
    columns, _, _ = legend_size(styles, width)
    figure.legend(handles, list(styles), loc=place, ncols=columns, fontsize=7.5, handlelength=3.2)


def save(figure: Figure, stem: Path, formats: Sequence[str]) -> list[Path]:
    """Write a figure in several formats, without dates or versions in the files.

    Parameters
    ----------
    figure
        What to write.
    stem
        Path without the suffix.
    formats
        Some of ``"png"``, ``"svg"`` and ``"pdf"``.
    """
    # laid out once: each format would start from the layout that the one before it left, a last digit off
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        # the layout's solver goes through its unknowns by their addresses, and sums differ in the last digit with them
        x, y, width, height = (round(float(edge), 6) for edge in axes.get_position().bounds)
        axes.set_position((x, y, width, height))
    paths = []
    for suffix in formats:
        content = io.BytesIO()
        figure.savefig(content, format=suffix, metadata=_UNDATED[suffix])
        paths.append(stem.with_name(f"{stem.name}.{suffix}"))
        write_atomic(paths[-1], content.getvalue())
    return paths
