"""What a person sees while a sweep runs: a live display in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from bench.launch.plan import DEFAULT_RATE, SECONDS_PER_CELL, PlannedCell

_LINE_SECONDS = 15.0


class _Bars(Progress):
    """The bars of the stage and of the sweep, below the name of the cell, which may be as long as the line."""

    cell = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Text(self.cell, no_wrap=True, overflow="ellipsis")
        yield from super().get_renderables()


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
        self.pending = {i: c for i, c in enumerate(cells) if c.pending}
        self.total = len(self.pending)
        self.finished = 0
        self.index, self.name = -1, ""
        self.steps = self.done = 0
        self.weight = self.flops_done = self.seconds = self.cell_flops = 0.0
        self.began = self.line_at = time.monotonic()
        self.live = _Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[info]}", table_column=Column(ratio=1, no_wrap=True)),
            console=console,
            disable=not (console.is_terminal and self.total),
            transient=True,
            expand=True,
        )
        self.current = self.live.add_task("loading", total=None, info="")
        self.overall = self.live.add_task("sweep", total=max(1, self.total), info=self._left())

    def __enter__(self) -> Display:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    @property
    def cell(self) -> str:
        """Label of the current cell."""
        return self.cells[self.index].config.label

    def begin(self, index: int) -> None:
        """Start a cell of the plan."""
        self._account()
        self.index, self.cell_flops, self.done = index, 0.0, 0
        self.live.cell = self.cell
        self.live.reset(self.current, total=None, description="loading", info="")

    def finish(self, index: int, status: str, reason: str = "") -> None:
        """End a cell of the plan; of several, say how it went."""
        if self.pending.pop(index, None) is None:
            return
        self.finished += 1
        self.live.update(self.overall, completed=self.finished, info=self._left())
        if len(self.cells) > 1:
            outcome = f"{status}: {one_line(reason)}" if reason else status
            self.message(f"{self.cell}: {outcome} ({self.finished} of {self.total}, {self._left()})")

    def stage(self, name: str, total: int, weight: float = 0.0) -> None:
        """Begin a stage of the current cell."""
        self._account()
        self.name, self.steps, self.done, self.weight = name, total, 0, weight
        self.stage_began = time.monotonic()
        self.live.reset(self.current, total=total, description=name, info="")

    def advance(self, steps: int = 1, **numbers: float) -> None:
        """Count steps of the current stage."""
        self.done += steps
        info = "  ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        self.live.update(self.current, completed=self.done, info=info)
        self.live.update(self.overall, info=self._left())
        if not self.console.is_terminal and time.monotonic() - self.line_at > _LINE_SECONDS:
            self.line_at = time.monotonic()
            where = f"{self.cell}: {self.name} {self.done}/{self.steps}"
            self.message("  ".join(part for part in (where, info, f"({self._left()})") if part))

    def message(self, text: str) -> None:
        """Say one line above the bars."""
        say(self.live.console, text)

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
        rest = SECONDS_PER_CELL  # of a cell: what is not training
        if self.finished:
            rest = (time.monotonic() - self.began - self.seconds - elapsed) / self.finished
        seconds = flops / rate + rest * len(self.pending)
        return f"about {clock(seconds)} left" if self.pending else "done"


def console(stderr: bool = False) -> Console:
    """Return a console that is wide enough for the tables also where output goes to a file."""
    probe = Console(stderr=stderr)
    return probe if probe.is_terminal else Console(stderr=stderr, width=140)


def say(out: Console, text: str) -> None:
    """Print text as it is: no markup, no colours, and no line broken."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def one_line(text: str) -> str:
    """Return a message of several lines as one."""
    return " ".join(text.split())


def clock(seconds: float) -> str:
    """Return ``30 s``, ``4 min``, ``2 h 05 min`` or ``619 days``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 4320 else f"{round(minutes / 1440):,} days"
