"""Labels beside points, placed so that they cover neither each other nor the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.statistics import Array

LEADER = 11.0
"""Distance in points from which a label is tied to its point by a thin line."""

_MARK, _LINE, _EDGE = 30.0, 6.0, 100.0
"""Price, in points of distance, of covering a marker or a label, a piece of line, and of a point off the axes."""


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point.

    Attributes
    ----------
    text, colour
        What to write, and in which colour.
    x, y
        The point, in data coordinates.
    size
        Font size in points.
    sides
        Where the text may stand, the preferred side first: of ``"left"``, ``"right"``, ``"above"``, ``"below"``.
    """

    text: str
    colour: str
    x: float
    y: float
    size: float = 7.5
    sides: tuple[str, ...] = ("left", "right", "above", "below")


def place(figure: Figure, axes: Axes, labels: Sequence[Label], points: Array, strokes: Sequence[Array]) -> None:
    """Draw labels, each at the free spot nearest to its point.

    Parameters
    ----------
    figure, axes
        With final limits and layout.
    labels
        What to write; earlier ones choose first.
    points
        Centres of markers to keep clear of, (points, 2) in data coordinates.
    strokes
        Lines to keep clear of, each (vertices, 2) in data coordinates.
    """
    renderer = FigureCanvasAgg(figure).get_renderer()
    pixels, to_pixels = figure.dpi / 72, axes.transData.transform
    marks = _squares(to_pixels(points), 3.5 * pixels)
    pieces = [_sampled(to_pixels(stroke), 3 * pixels) for stroke in strokes]
    lines = _squares(np.concatenate([np.empty((0, 2)), *pieces]), pixels)
    frame = np.array(axes.get_window_extent(renderer).extents)
    for label in labels:
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset points", va="bottom", fontsize=label.size,
            color=label.colour, annotation_clip=False, zorder=1.5, bbox={"fc": "white", "ec": "none", "pad": 0.2},
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        size = np.array([extent.width, extent.height]) / pixels
        spots, dislike = _spots(label.sides, *size)
        distance = _distance(spots, size)
        corners = to_pixels((label.x, label.y)) + spots * pixels
        boxes = np.hstack([corners, corners + size * pixels])
        price = distance + dislike + _MARK * _covered(boxes, marks) + _LINE * _covered(boxes, lines)
        outside = np.hstack([frame[:2] - boxes[:, :2], boxes[:, 2:] - frame[2:]])
        price += _EDGE / pixels * np.clip(outside, 0, None).sum(axis=1)
        best = int(np.argmin(price.round(6)))
        text.xyann = tuple(spots[best])
        marks = np.vstack([marks, boxes[best] + np.array([-1, -1, 1, 1]) * pixels])
        if distance[best] > LEADER:
            near = np.clip(0, spots[best], spots[best] + size)
            arrow = {"arrowstyle": "-", "lw": 0.5, "color": label.colour, "shrinkA": 0, "shrinkB": 3, "alpha": 0.7}
            axes.annotate(
                "", (label.x, label.y), near, textcoords="offset points", annotation_clip=False, arrowprops=arrow
            )


def _spots(sides: Sequence[str], width: float, height: float) -> tuple[Array, Array]:
    """Candidate offsets in points of a text's lower left corner, (spots, 2), and what speaks against each, (spots,)."""
    gaps, shifts = np.meshgrid((5.5, 8.0, 12.0, 18.0, 26.0, 36.0, 48.0, 62.0), np.arange(-54.0, 54.1, 3.0))
    gap, shift = gaps.ravel(), shifts.ravel()
    of_side = {
        "left": (-gap - width, shift - height / 2),
        "right": (gap, shift - height / 2),
        "above": (shift - width / 2, gap),
        "below": (shift - width / 2, -gap - height),
    }
    spots = np.concatenate([np.column_stack(of_side[side]) for side in sides])
    return spots, 1.5 * np.repeat(np.arange(len(sides)), len(gap)) + 0.1 * np.tile(np.abs(shift), len(sides))


def _distance(spots: Array, size: Array) -> Array:
    """Distance from the point to the nearest edge of the text's box at each spot."""
    gaps: Array = np.maximum(0, np.maximum(spots, -(spots + size)))
    return np.hypot(gaps[:, 0], gaps[:, 1])


def _squares(centres: Array, radius: float) -> Array:
    return np.hstack([centres - radius, centres + radius])


def _sampled(vertices: Array, step: float) -> Array:
    """Points at most ``step`` apart along a line."""
    pieces = [vertices[:1]]
    for start, end in pairwise(vertices):
        n = max(1, int(np.ceil(np.hypot(*(end - start)) / step)))
        pieces.append(start + (end - start) * (np.arange(1, n + 1) / n)[:, None])
    return np.concatenate(pieces)


def _covered(boxes: Array, obstacles: Array) -> Array:
    """For each box, how many obstacles it covers, each weighed by the covered share of the smaller of the two."""
    low = np.maximum(boxes[:, None, :2], obstacles[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], obstacles[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(edges[:, 2:] - edges[:, :2]).prod(axis=1) for edges in (boxes, obstacles)]
    smaller = np.minimum(areas[0][:, None], areas[1][None, :])
    total: Array = (shared / smaller).sum(axis=1)
    return total
