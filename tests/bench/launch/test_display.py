"""What is seen while a sweep runs: bars that fit a terminal, plain lines in a log, and times that add up."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from bench.config import RunConfig
from bench.launch import display
from bench.launch.display import Display, clock, one_line, say
from bench.launch.plan import SECONDS_PER_CELL, PlannedCell


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Clock:
    hands = Clock()
    monkeypatch.setattr(display, "time", SimpleNamespace(monotonic=hands.monotonic))
    return hands


def cells(*flops: float) -> list[PlannedCell]:
    """Return a plan of Variator cells with k = 2, 3, ... that train so many FLOPs each."""
    configs = [RunConfig.build({"task": "sst2", "ratio": k}) for k in range(2, 2 + len(flops))]
    return [PlannedCell(c, "0", "to do", flops=f) for c, f in zip(configs, flops, strict=True)]


def log() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=140), file


def seconds_left(text: str) -> float:
    [(number, unit)] = re.findall(r"about (\d+) (s|min) left", text)
    return float(number) * {"s": 1, "min": 60}[unit]


def test_a_log_gets_a_line_every_quarter_of_a_minute(hands: Clock) -> None:
    console, file = log()
    with Display(cells(1e6), 1e3, console) as shown:
        lane = shown.begin(0)
        lane.stage("teacher", 100, 1e4)
        for step in range(60):
            hands.now += 1.0
            lane.advance(loss=1 / (step + 1), task=0.25)
    lines = file.getvalue().splitlines()
    assert len(lines) == 60 // 16
    for line, step in zip(lines, (16, 32, 48), strict=True):
        assert line.startswith(f"sst2 · minilm-l6 · variator k=2 · seed 0: teacher {step}/100  loss {1 / step:.3g}  ")
        assert line.endswith(" left)")
    assert "\x1b" not in file.getvalue() and "━" not in file.getvalue()


def test_long_lines_are_not_broken_in_a_log() -> None:
    console, file = log()
    say(console, "[bold]x[/bold] " + "word " * 100)
    assert file.getvalue() == "[bold]x[/bold] " + "word " * 100 + "\n"


def test_the_estimate_is_what_is_left_at_the_rate_that_is_seen(hands: Clock) -> None:
    """Two cells of 1e6 FLOPs at 1e4 a second, then 300 s of other work in the first of them."""
    console, file = log()
    with Display(cells(1e6, 1e6), 1e3, console) as shown:
        lane = shown.begin(0)
        lane.stage("adapt", 100, 1e4)
        for _ in range(50):
            hands.now += 1.0
            lane.advance()
        half = seconds_left(file.getvalue().splitlines()[-1])
        assert half == pytest.approx((2e6 - 48e4) / 1e4 + 2 * SECONDS_PER_CELL, abs=30), "before: 2e6 / 1e3"
        for _ in range(50):
            hands.now += 1.0
            lane.advance()
        lane.stage("evaluate dev", 10)
        hands.now += 300.0
        shown.finish(0, "done")
        line = file.getvalue().splitlines()[-1]
        assert line.startswith("sst2 · minilm-l6 · variator k=2 · seed 0: done (1 of 2, about ")
        assert seconds_left(line) == pytest.approx(1e6 / 1e4 + 300.0, abs=30)
        shown.begin(1)
        shown.finish(1, "failed", "it was\n  not to be")
    last = file.getvalue().splitlines()[-1]
    assert last == "sst2 · minilm-l6 · variator k=3 · seed 0: failed: it was not to be (2 of 2, done)"


def test_only_cells_that_are_run_are_counted() -> None:
    console, file = log()
    plan = cells(1.0, 1.0, 1.0)
    plan[0] = PlannedCell(plan[0].config, "0", "done")
    with Display(plan, None, console) as shown:
        for index in range(3):
            shown.begin(index)
            shown.finish(index, "done")
    lines = file.getvalue().splitlines()
    assert [re.findall(r"k=\d|\d of \d", line) for line in lines] == [["k=3", "1 of 2"], ["k=4", "2 of 2"]]


@pytest.mark.parametrize("width", [80, 120])
def test_the_bars_fit_the_terminal(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=24, color_system=None, legacy_windows=False)
    plan = cells(1e12, 1e12)
    with Display(plan, 1e6, console) as shown:
        lane = shown.begin(0)
        lane.stage("evaluate selection", 26_000)
        lane.advance(12_345, loss=0.0123456, all_hidden=0.0234567, logits=1.23e-6)
        shown.live.refresh()
        frame = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\n", file.getvalue()).split("\n")
    rows = [row.rstrip() for row in frame if row.strip()][-3:]
    assert all(len(row) <= width for row in rows)
    cell, stage, sweep = rows
    assert cell == plan[0].config.label
    assert stage.startswith("evaluate selection ━") and "12345/26000" in stage and "loss 0.0123" in stage
    assert sweep.startswith("sweep ") and " 0/2 " in sweep and sweep.endswith("left")
    ended = file.getvalue()
    assert ended.rindex("\x1b[?25h") > ended.rindex("\x1b[?25l"), "the cursor is shown again"


def test_a_terminal_shows_no_bars_where_nothing_is_to_do() -> None:
    file = io.StringIO()
    plan = [PlannedCell(cells(1.0)[0].config, "0", "done")]
    with Display(plan, None, Console(file=file, force_terminal=True)) as shown:
        shown.begin(0)
        shown.finish(0, "done")
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (95, "2 min"),
        (3540, "59 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (71.9 * 3600, "71 h 54 min"),
        (100 * 86_400, "100 days"),
        (1e9, "11,574 days"),
    ],
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_reason_of_several_lines_becomes_one() -> None:
    assert one_line("ValidationError: 1 error\nlr\n  is wrong\n") == "ValidationError: 1 error lr is wrong"


def test_cells_side_by_side_take_half_the_time_and_are_counted(hands: Clock) -> None:
    """Two lanes of 1e4 FLOPs a second each, four cells of 1e6: half of two cells are done after 50 s."""
    console, file = log()
    with Display(cells(1e6, 1e6, 1e6, 1e6), 1e3, console, jobs=2) as shown:
        lanes = [shown.begin(index) for index in (0, 1)]
        for lane in lanes:
            lane.stage("adapt", 100, 1e4)
        for _ in range(50):
            hands.now += 1.0
            for lane in lanes:
                lane.advance()
        left = seconds_left(f"({shown.left()})")
        assert left == pytest.approx(3e6 / 1e4 / 2 + 4 * SECONDS_PER_CELL / 2, abs=30)
        assert "2 running" in shown.live.tasks[0].fields["info"]
        shown.finish(0, "failed", "it was not to be")
        assert "1 running, 1 failed" in shown.live.tasks[0].fields["info"]
        again = shown.begin(1)  # its process died
        assert len(shown.lanes) == 1 and shown.lanes[1] is again
        hands.now += 240.0
        shown.finish(1, "done")
        # two lanes were there for 290 s, of which they trained for 100: 240 s of other work for each cell
        assert seconds_left(f"({shown.left()})") == pytest.approx((2e6 / 1e4 + 2 * 240) / 2, abs=30)
    assert "adapt" in file.getvalue() and "(2 of 4, " in file.getvalue()
