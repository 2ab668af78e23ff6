"""What a person sees while a sweep runs: a live display in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.launch.plan import DEFAULT_RATE, SECONDS_PER_CELL, PlannedCell

_LINE_SECONDS = 15.0


class Display:
    """Shows which cell and stage runs, how far it is, and how long the sweep still takes.

    The estimate weighs the cells by their planned training FLOPs and is corrected by the rate that is observed.

    Parameters
    ----------
    cells
        The plan.
    rate
        Training FLOPs a second of earlier runs, if known.
    console
        Where to write.
    """

    def __init__(self, cells: Sequence[PlannedCell], rate: float | None, console: Console) -> None:
        self.console, self.rate = console, rate or DEFAULT_RATE
        self.cells = list(cells)
        self.pending = {i: c for i, c in enumerate(cells) if c.state not in ("done", "skipped", "error")}
        self.total = len(self.pending)
        self.finished = 0
        self.index, self.name = -1, ""
        self.steps = self.done = 0
        self.weight = self.flops_done = self.seconds = self.cell_flops = 0.0
        self.began = self.line_at = time.monotonic()
        self.overall: TaskID | None = None
        self.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[info]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Display:
        self.live.start()
        self.overall = self.live.add_task("sweep", total=max(1, self.total), info="")
        self.current = self.live.add_task("", total=1, info="", visible=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    @property
    def cell(self) -> str:
        """Label of the current cell."""
        return self.cells[self.index].config.label

    def begin(self, index: int) -> None:
        """Start a cell of the plan."""
        self.index, self.cell_flops = index, 0.0

    def finish(self, index: int, status: str) -> None:
        """End a cell of the plan."""
        if self.pending.pop(index, None) is None:
            return
        self.finished += 1
        if self.overall is not None:
            self.live.update(self.overall, completed=self.finished, info=self._left())
        self.message(f"{self.cells[index].config.label}: {status} ({self.finished} of {self.total}, {self._left()})")

    def stage(self, name: str, total: int, weight: float = 0.0) -> None:
        """Begin a stage of the current cell."""
        self._account()
        self.name, self.steps, self.done, self.weight = name, total, 0, weight
        self.stage_began = time.monotonic()
        self.live.reset(self.current, total=total, description=f"{self.cell}: {name}", visible=True, info="")

    def advance(self, steps: int = 1, **numbers: float) -> None:
        """Count steps of the current stage."""
        self.done += steps
        info = "  ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        self.live.update(self.current, completed=self.done, info=info)
        if self.overall is not None:
            self.live.update(self.overall, info=self._left())
        if not self.console.is_terminal and time.monotonic() - self.line_at > _LINE_SECONDS:
            self.line_at = time.monotonic()
            self.console.print(
                f"{self.cell}: {self.name} {self.done}/{self.steps}  {info}  ({self._left()})",
                highlight=False,
                markup=False,
            )

    def message(self, text: str) -> None:
        """Say one line above the bars."""
        self.live.console.print(text, highlight=False, markup=False)

    def _account(self) -> None:
        if self.weight and self.done:
            flops = self.done * self.weight
            self.flops_done, self.cell_flops = self.flops_done + flops, self.cell_flops + flops
            self.seconds += time.monotonic() - self.stage_began
            if self.seconds > 5.0:
                self.rate = self.flops_done / self.seconds
        self.weight = 0.0

    def _left(self) -> str:
        """Say how long the rest takes."""
        rate, running = self.rate, self.done * self.weight
        elapsed = time.monotonic() - self.stage_began if self.weight else 0.0
        if self.seconds + elapsed > 5.0 and self.flops_done + running:
            rate = (self.flops_done + running) / (self.seconds + elapsed)
        flops = sum(c.flops for c in self.pending.values())
        if self.index in self.pending:
            flops -= min(self.pending[self.index].flops, self.cell_flops + running)
        seconds = flops / rate + SECONDS_PER_CELL * len(self.pending)
        return f"about {clock(seconds)} left" if self.pending else "done"


def clock(seconds: float) -> str:
    """Return ``2 h 05 min``, ``4 min`` or ``30 s``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
