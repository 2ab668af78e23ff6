"""How names and numbers are shown, alike in tables, figures and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import pandas as pd

CONVENTION = (
    "Remaining = encoder FLOPs of the compressed model / of its dense teacher, on real tokens (no padding); "
    "saved = 1 − remaining. FLOPs = 2 × multiply–accumulates."
)
MISSING = "n/a"
OFF_TARGET = 0.01
"""Distance between requested and achieved remaining share from which it is marked."""


def number(value: float, digits: int = 1, scale: float = 1.0, sign: bool = False) -> str:
    """Format with a fixed number of digits, with a true minus sign; NaN is ``n/a``."""
    if pd.isna(value):
        return MISSING
    text = f"{value * scale:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def interval(value: float, low: float, high: float, digits: int = 1, scale: float = 1.0, sign: bool = False) -> str:
    """Format as ``84.3 [82.1, 86.5]``, or the value alone where there are no ends."""
    text = number(value, digits, scale, sign)
    if pd.isna(value) or pd.isna(low):
        return text
    return f"{text} [{number(low, digits, scale, sign)}, {number(high, digits, scale, sign)}]"


def added(percent: float) -> str:
    """Format a share of added parameters, which may be far below one percent."""
    return MISSING if pd.isna(percent) else f"{percent:.3g}"


def p_value(p: float) -> str:
    """Format a p-value."""
    return MISSING if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def ratio(value: float) -> str:
    """Format k; the dense teacher has none."""
    return "" if math.isnan(value) else f"{value:g}"


def metric(name: str | None) -> str:
    """Name a metric with the unit in which it is shown (hundred times the stored fraction)."""
    words = (name or "score").replace("_", " ")
    words = words.upper() if len(words) <= 3 else words[0].upper() + words[1:]
    correlation = any(part in words.lower() for part in ("matthews", "pearson", "spearman", "correlation"))
    return f"{words}, × 100" if correlation else f"{words}, %"


def short_names(backbones: Iterable[str]) -> dict[str, str]:
    """Show a backbone by the last part of its name or path, unless two would then be called alike."""
    full = sorted(set(backbones))
    short = {name: name.rstrip("/").rsplit("/", 1)[-1] for name in full}
    return {name: short[name] if list(short.values()).count(short[name]) == 1 else name for name in full}


def reading_order(series: str) -> tuple[int, str]:
    """Sort key of series: the dense teacher, then the suite's subject, then its rivals by name."""
    return ({"dense": 0, "variator": 1}.get(series.split(" ", 1)[0], 2), series)


def options(series: str) -> str:
    """Return what tells a series from its method as it is by default, which is called by the method's name alone."""
    _, bracket, rest = series.partition(" (")
    return rest.removesuffix(")") if bracket else "default"


def slug(name: str) -> str:
    """Make a file name's part of a name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "unnamed"


def batch_columns(columns: Iterable[str], stem: str = "latency_ratio") -> dict[str, str]:
    """Find the columns that were measured at several batch sizes: column -> ``"batch 32"``, smallest first."""
    shapes = {}
    for column in columns:
        match = re.fullmatch(rf"{stem}\.b(\d+)(?:_n(\d+))?", column)
        if match:
            shapes[column] = (int(match[1]), int(match[2] or 0))
    ordered = sorted(shapes, key=lambda column: shapes[column])
    return {c: f"batch {shapes[c][0]}" + (f", {shapes[c][1]} tokens" if shapes[c][1] else "") for c in ordered}


def plural(n: int, word: str) -> str:
    """Count things: ``1 run``, ``2 runs``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
