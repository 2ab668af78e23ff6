"""What a person sees while a sweep runs: a live display in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from bench.launch.front import Fronts, Point
from bench.launch.plan import DEFAULT_RATE, SECONDS_PER_CELL, PlannedCell

_LINE_SECONDS = 15.0
_BAD = ("failed", "diverged", "interrupted", "error")


class Lane:
    """One cell that runs: receives its progress, and counts the FLOPs that it trains.

    Parameters
    ----------
    display
        Where it is shown.
    cell
        The cell.
    bar
        Its bar.
    """

    def __init__(self, display: Display, cell: PlannedCell, bar: TaskID) -> None:
        self.display, self.cell, self.bar = display, cell, bar
        self.label = cell.config.label
        self.name, self.steps, self.done = "loading", 0, 0
        self.weight = self.flops = self.seconds = 0.0
        self.stage_began = self.line_at = time.monotonic()

    def stage(self, name: str, total: int, weight: float = 0.0) -> None:
        """Begin a stage of the cell."""
        self.flops, self.seconds = self.trained
        self.name, self.steps, self.done, self.weight = name, total, 0, weight
        self.stage_began = time.monotonic()
        self.display.live.reset(self.bar, total=total, description=name, info="")

    def advance(self, steps: int = 1, **numbers: float) -> None:
        """Count steps of the current stage."""
        self.done += steps
        info = "  ".join(f"{k} {v:.3g}" for k, v in numbers.items())
        self.display.live.update(self.bar, completed=self.done, info=info)
        self.display.refresh()
        if not self.display.console.is_terminal and time.monotonic() - self.line_at > _LINE_SECONDS:
            self.line_at = time.monotonic()
            where = f"{self.label}: {self.name} {self.done}/{self.steps}"
            self.message("  ".join(part for part in (where, info, f"({self.display.left()})") if part))

    def message(self, text: str) -> None:
        """Say one line above the bars."""
        self.display.message(text)

    @property
    def trained(self) -> tuple[float, float]:
        """FLOPs that were trained so far, and the seconds that they took."""
        running = self.done * self.weight
        return self.flops + running, self.seconds + (time.monotonic() - self.stage_began if running else 0.0)


class _Bars(Progress):
    """The fronts so far, each running cell's name over its bar, and the bar of the sweep."""

    display: Display | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.display is None:  # it is being made
            return
        for line in self.display.fronts.lines():
            yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")
        bars = {task.id: task for task in self.tasks}
        for lane in self.display.lanes.values():
            yield Text(lane.label, no_wrap=True, overflow="ellipsis")
            yield self.make_tasks_table([bars[lane.bar]])
        yield self.make_tasks_table([bars[self.display.overall]])


class Display:
    """Shows which cells and stages run, how far they are, how long the sweep still takes, and the best so far.

    The estimate weighs the cells by their planned training FLOPs and is corrected by the rate that is observed.

    Parameters
    ----------
    cells
        The plan.
    rate
        Training FLOPs a second of earlier runs, if known.
    console
        Where to write.
    jobs
        Cells that run at once.
    """

    def __init__(self, cells: Sequence[PlannedCell], rate: float | None, console: Console, jobs: int = 1) -> None:
        self.console, self.rate, self.jobs = console, rate or DEFAULT_RATE, jobs
        self.cells = list(cells)
        self.pending = {i: c for i, c in enumerate(cells) if c.pending}
        self.total = len(self.pending)
        self.finished = self.failed = 0
        self.lanes: dict[int, Lane] = {}
        self.fronts = Fronts()
        self.flops_done = self.seconds = 0.0  # of lanes that have ended
        self.began = time.monotonic()
        self.live = _Bars(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[info]}", table_column=Column(ratio=1, no_wrap=True)),
            console=console,
            disable=not (console.is_terminal and self.total),
            transient=True,
            expand=True,
        )
        self.overall = self.live.add_task("sweep", total=max(1, self.total), info=self.left())
        self.live.display = self

    def __enter__(self) -> Display:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def begin(self, index: int) -> Lane:
        """Start a cell of the plan; return who receives its progress."""
        if index in self.lanes:  # it is begun again: the process that ran it died
            self._end(index)
        bar = self.live.add_task("loading", total=None, info="")
        self.lanes[index] = Lane(self, self.cells[index], bar)
        return self.lanes[index]

    def finish(self, index: int, status: str, reason: str = "", point: Point | None = None) -> None:
        """End a cell of the plan; of several, say how it went."""
        self._end(index)
        if point:
            self.fronts.add(point)
        if self.pending.pop(index, None) is None:
            return
        self.finished += 1
        self.failed += status in _BAD
        self.live.update(self.overall, completed=self.finished)
        self.refresh()
        if len(self.cells) > 1:
            outcome = f"{status}: {one_line(reason)}" if reason else status
            self.message(
                f"{self.cells[index].config.label}: {outcome} ({self.finished} of {self.total}, {self.left()})"
            )

    def _end(self, index: int) -> None:
        if lane := self.lanes.pop(index, None):
            flops, seconds = lane.trained
            self.flops_done, self.seconds = self.flops_done + flops, self.seconds + seconds
            self.live.remove_task(lane.bar)

    def message(self, text: str) -> None:
        """Say one line above the bars."""
        say(self.live.console, text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bars away while something is printed that is no message, and goes to standard output."""
        if self.live.disable:
            yield
            return
        self.live.stop()
        try:
            yield
        finally:
            self.live.start()

    def refresh(self) -> None:
        """Show what is left, and what runs and failed where there is more than one."""
        counts = [f"{len(self.lanes)} running"] * (self.jobs > 1) + [f"{self.failed} failed"] * bool(self.failed)
        self.live.update(self.overall, info=", ".join([*counts, self.left()]))

    def left(self) -> str:
        """Say how long the rest takes."""
        if not self.pending:
            return "done"
        running = [lane.trained for lane in self.lanes.values()]
        flops, seconds = self.flops_done + sum(f for f, _ in running), self.seconds + sum(s for _, s in running)
        rate = flops / seconds if seconds > 5.0 and flops else self.rate
        rest = SECONDS_PER_CELL  # of a cell: what is not training
        if self.finished:
            rest = max(0.0, (time.monotonic() - self.began) * self.jobs - seconds) / self.finished
        todo = sum(c.flops for c in self.pending.values())
        todo -= sum(min(self.pending[i].flops, lane.trained[0]) for i, lane in self.lanes.items() if i in self.pending)
        lanes = min(self.jobs, len(self.pending))
        return f"about {clock((todo / rate + rest * len(self.pending)) / lanes)} left"


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
