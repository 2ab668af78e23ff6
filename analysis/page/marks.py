"""The colours and markers of the figures, as a browser draws them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from matplotlib.colors import to_hex, to_rgb

from analysis.style import looks

NIGHT = "#15181d"
"""Background of the dark scheme, as in the style sheet."""
CONTRAST, INK = 4.5, 12.0
"""Least contrast of a series against the dark background, and of the dense teacher's ink."""

# matplotlib's markers as paths about the origin, of about equal weight, in a box from -1 to 1
PATHS = {
    "o": "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",
    "s": "M-.9,-.9H.9V.9H-.9Z",
    "^": "M0,-1.05L1.05,.85H-1.05Z",
    "v": "M0,1.05L1.05,-.85H-1.05Z",
    "<": "M-1.05,0L.85,1.05V-1.05Z",
    ">": "M1.05,0L-.85,1.05V-1.05Z",
    "D": "M0,-1.2L1.2,0L0,1.2L-1.2,0Z",
    "d": "M0,-1.3L.75,0L0,1.3L-.75,0Z",
    "P": "M-.4,-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
    "X": "M-1.05,-.55L-.55,-1.05L0,-.5L.55,-1.05L1.05,-.55L.5,0L1.05,.55L.55,1.05L0,.5L-.55,1.05L-1.05,.55L-.5,0Z",
    "h": "M0,-1.1L.95,-.55V.55L0,1.1L-.95,.55V-.55Z",
    "*": "M0,-1.4L.33,-.45L1.33,-.43L.53,.17L.82,1.13L0,.56L-.82,1.13L-.53,.17L-1.33,-.43L-.33,-.45Z",
}


class Mark(NamedTuple):
    """How one series is drawn.

    Attributes
    ----------
    name
        Of its colour, as a custom property of the style sheet.
    light, dark
        The colour in each scheme.
    path
        The marker as an SVG path.
    dashes
        Of its line, in pixels.
    """

    name: str
    light: str
    dark: str
    path: str
    dashes: list[float]


def marks(series: Iterable[str]) -> dict[str, Mark]:
    """Give each series the look that it has in the figures."""
    found = {}
    for i, (name, look) in enumerate(looks(series).items()):
        dashes = [2 * length for length in look.dashes[1]] if isinstance(look.dashes, tuple) else []
        light, dark = look.colour.lower(), on_dark(look.colour)
        found[name] = Mark(f"--series-{i}", light, dark, PATHS[look.marker], dashes)
    return found


def contrast(colour: str, background: str) -> float:
    """Return the contrast ratio of two colours, from 1 to 21 (WCAG 2.2)."""

    def luminance(name: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(name)]
        return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])

    dim, bright = sorted((luminance(colour), luminance(background)))
    return (bright + 0.05) / (dim + 0.05)


def on_dark(colour: str) -> str:
    """Mix a colour with white until it can be told from the dark background."""
    red, green, blue = to_rgb(colour)
    steps = (step / 20 for step in range(21))
    shades = (to_hex((red + s * (1 - red), green + s * (1 - green), blue + s * (1 - blue))) for s in steps)
    # black is the ink of the figures, and stays ink
    return next(shade for shade in shades if contrast(shade, NIGHT) >= (INK if colour == "#000000" else CONTRAST))
