"""What ``bench plan`` prints: a line a cell, a line a backbone, and what all of it will take. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from bench.launch.display import clock, console, one_line, say
from bench.launch.plan import PLANNED_LENGTH, PlannedCell, estimate_seconds


def print_plan(cells: Sequence[PlannedCell], rate: float | None) -> None:
    """Print a plan.

    Parameters
    ----------
    cells
        The plan.
    rate
        Training FLOPs a second of earlier runs, if known.
    """
    out = console()
    out.print(_cells(cells))
    if any(cell.parameters for cell in cells):
        out.print()
        out.print(_backbones(cells))
    out.print()
    for (state, reason), count in Counter((c.state, c.reason) for c in cells if c.reason).items():
        say(out, f"{state} ({count} cell{'s' if count > 1 else ''}): {one_line(reason)}")
    say(out, f"FLOPs are at {PLANNED_LENGTH} tokens; remaining is what the method leaves of the dense encoder's.")
    states = Counter(cell.state for cell in cells)
    say(out, f"{len(cells)} cells: {', '.join(f'{count} {state}' for state, count in states.items())}.")
    if seconds := estimate_seconds(cells, rate):
        basis = "from this study's earlier runs" if rate else "a rough guess for two CPU cores: nothing was timed here"
        say(out, f"About {clock(seconds)} to run ({basis}).")


def _cells(cells: Sequence[PlannedCell]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "backbone", "method", "seed", "knob"):
        table.add_column(name, no_wrap=True, overflow="fold")
    for name in ("remaining", "added"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("state")
    for cell in cells:
        config = cell.config
        dense = cell.parameters
        state = f"{cell.state}; cached: {', '.join(cell.cached)}" if cell.cached else cell.state
        table.add_row(
            Path(config.task).stem,
            Path(config.backbone).name,
            config.method,
            str(config.seed),
            cell.knob or _ratio(cell),
            "" if cell.remaining is None else f"{cell.remaining:.1%}",
            f"{_count(cell.added)} ({cell.added / dense:.2%})" if cell.added and dense else "",
            state,
        )
    return table


def _backbones(cells: Sequence[PlannedCell]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("backbone", overflow="fold")
    for name in ("parameters", "fp32 weights", "dense encoder, GFLOPs"):
        table.add_column(name, justify="right")
    seen = set()
    for cell in cells:
        name = cell.config.backbone
        if cell.parameters and cell.weight_bytes and name not in seen:
            seen.add(name)
            memory = cell.weight_bytes / 2**20
            weights = f"{memory / 1024:,.2f} GiB" if memory > 1024 else f"{memory:,.1f} MiB"
            table.add_row(Path(name).name, _count(cell.parameters), weights, f"{cell.encoder_gflops:,.2f}")
    return table


def _ratio(cell: PlannedCell) -> str:
    """Name the ratio where there is no native setting, as for a cell that is skipped."""
    ratio = cell.config.ratio
    return "" if ratio is None or cell.config.method == "dense" else f"ratio {ratio:g}"


def _count(number: int) -> str:
    """Return ``640``, ``454 k``, ``1.82 M`` or ``11.31 B``."""
    if number < 10_000:
        return f"{number:,}"
    if number < 1e6:
        return f"{number / 1e3:.0f} k"
    return f"{number / 1e6:.2f} M" if number < 1e9 else f"{number / 1e9:.2f} B"
