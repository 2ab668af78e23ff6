"""A sweep in several processes: the same numbers as in one, whoever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.cell import Surroundings
from bench.config import RunConfig
from bench.errors import MachineError
from bench.launch import pool
from bench.launch.plan import PlannedCell
from bench.launch.pool import DEATHS, run_pool, shares
from bench.progress import Silent
from bench.results import Provenance, ResultStore, RunResult
from tests.bench_command import Command, bench, launch, results, tiny_sweep
from tests.workers import PATIENCE, wait_for

NUMBERS = ("evaluations", "teacher_evaluations", "cost", "identity")

FAKE = """
import json, os, sys, time
from pathlib import Path
at = Path(sys.argv[1])
setup = json.loads(sys.stdin.readline())
def say(**message):
    print(json.dumps(message), flush=True)
def note(word, index):
    with (at / "log").open("a") as file:
        file.write(f"{word} {index} {os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
while True:
    say(ready=True)
    line = sys.stdin.readline()
    if not line:
        break
    cell = json.loads(line)
    index, seed = cell["index"], cell["config"]["seed"]
    note("begin", index)
    say(stage=["adapt", 10, 1.0])
    say(advance=1, numbers={"loss": 1.0})
    if seed == 100 or (seed == 101 and not (at / "died").exists()):
        (at / "died").touch()
        print("the model did not fit", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9) if seed == 101 else os._exit(3)
    time.sleep(0.2)
    note("end", index)
    say(**({"error": "no such data"} if seed == 102 else {"run_id": f"run{index}"}))
"""


class Seen:
    """A watcher that notes what it is told."""

    def __init__(self) -> None:
        self.finished: dict[int, tuple[str, str]] = {}
        self.messages: list[str] = []

    def begin(self, index: int) -> Silent:
        return Silent()

    def finish(self, index: int, status: str, reason: str = "", point: Any = None) -> None:
        assert index not in self.finished
        self.finished[index] = (status, reason)

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the processes by some that hold a cell for a moment, or die of it; what they do is in a log."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(pool, "COMMAND", [sys.executable, str(script), str(tmp_path)])
    return tmp_path


def run_cells(at: Path, cells: list[PlannedCell], jobs: int) -> tuple[pool.Outcome, Seen, list[list[str]]]:
    store = ResultStore(at / "results", "study")
    for index, cell in enumerate(cells):
        provenance = Provenance(commit=None, dirty=None, command=[], started="", host="", platform="", hardware="",
                                device="cpu", threads=1, versions={})  # fmt: skip
        config = cell.config.model_dump(mode="json")
        store.write(RunResult(run_id=f"run{index}", study="study", status="done", config=config, identity={},
                              provenance=provenance))  # fmt: skip
    seen = Seen()
    where = Surroundings(cache_dir=at / "cache", device="cpu")
    outcome = run_pool(cells, store, where, "missing", seen, None, jobs)
    log = at / "log"
    return outcome, seen, [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def cell(seed: int, *needs: str) -> PlannedCell:
    return PlannedCell(RunConfig.build({"task": "sst2", "seed": seed}), "0", "to do", needs=frozenset(needs))


def test_what_two_cells_need_is_made_by_one_while_others_run(fake: Path) -> None:
    cells = [cell(0, "teacher-a"), cell(1, "teacher-a"), cell(2, "teacher-b"), cell(3, "teacher-a", "teacher-b")]
    outcome, seen, log = run_cells(fake, cells, jobs=3)
    assert len(outcome.results) == 4 and outcome.failures == []
    assert {status for status, _ in seen.finished.values()} == {"done"}
    order = [(word, int(index)) for word, index, *_ in log]
    assert {index for _, index in order[:2]} == {0, 2} and {word for word, _ in order[:2]} == {"begin"}
    assert order.index(("begin", 1)) > order.index(("end", 0))
    assert order.index(("begin", 3)) > max(order.index(("end", 0)), order.index(("end", 2)))


def test_nobody_waits_for_what_the_cache_has(fake: Path) -> None:
    folder = fake / "cache" / "artifacts" / "teacher-a"
    folder.mkdir(parents=True)
    (folder / "artifact.json").write_text("{}")
    _, _, log = run_cells(fake, [cell(seed, "teacher-a") for seed in range(3)], jobs=3)
    assert [word for word, *_ in log][:3] == ["begin"] * 3


def test_a_process_that_is_killed_is_replaced_and_its_cell_is_run_again(fake: Path) -> None:
    outcome, seen, _ = run_cells(fake, [cell(101), cell(0)], jobs=2)
    assert outcome.failures == [] and len(outcome.results) == 2
    [said] = seen.messages
    assert "seed 101: its process ended (SIGKILL, often too little memory); it is run again" in said


def test_a_cell_that_kills_every_process_ends_no_other(fake: Path) -> None:
    outcome, seen, log = run_cells(fake, [cell(100), cell(102), cell(0), cell(1)], jobs=2)
    assert [word for word, index, *_ in log if index == "0"] == ["begin"] * DEATHS
    reasons = {config.seed: reason for config, reason in outcome.failures}
    assert reasons.keys() == {100, 102} and reasons[102] == "no such data"
    assert "exit code 3: the model did not fit" in reasons[100] and "the same command tries again" in reasons[100]
    assert sorted(seen.finished) == [0, 1, 2, 3] and len(outcome.results) == 2


def test_processes_that_cannot_start_are_said_and_not_tried_for_ever(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "COMMAND", [sys.executable, "-c", "import nowhere"])
    with pytest.raises(MachineError, match=r"no process can be started.*No module named 'nowhere'"):
        run_cells(fake, [cell(0), cell(1)], jobs=2)


def test_each_process_has_its_share_of_threads_and_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    given = shares(3, "auto")
    assert [e["OMP_NUM_THREADS"] for e in given] == ["5"] * 3
    assert [e["CUDA_VISIBLE_DEVICES"] for e in given] == ["2", "5", "7"]
    assert [e.get("CUDA_VISIBLE_DEVICES") for e in shares(4, "cuda")] == ["2", "5", "7", "2"]
    assert [e.get("CUDA_VISIBLE_DEVICES") for e in shares(2, "cpu")] == [None, None]
    assert {e["OMP_NUM_THREADS"] for e in shares(99, "cpu")} == {"1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert {e["OMP_NUM_THREADS"] for e in shares(4, "cpu")} == {"2"}


# From here on with the real processes.


def numbers(at: Path) -> dict[str, dict[str, Any]]:
    return {name: {key: result[key] for key in NUMBERS} for name, result in results(at).items()}


def workers_of(command: Command) -> list[int]:
    """Return the processes that a command has started and that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            words = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(parent) == command.process.pid and state != "Z" and "bench.launch.worker" in words:
            found.append(int(stat.parent.name))
    return found


def gone(pids: list[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + PATIENCE
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a sweep ran through, one cell after the other."""
    at = tmp_path_factory.mktemp("alone")
    code, command = bench(["sweep", tiny_sweep(at, steps=120)], at)
    assert code == 0, command.err
    return at


def test_two_jobs_give_the_numbers_of_one_whoever_is_killed(alone: Path, tmp_path: Path) -> None:
    """A process is killed while it trains; then the sweep itself; then the same command completes."""
    path = tiny_sweep(tmp_path, steps=120)
    partial = tmp_path / "cache" / "artifacts" / "partial"

    command = launch(["sweep", path, "--jobs", "2"], tmp_path)
    wait_for(lambda: any(partial.glob("teacher-*.dir")), command.process)
    first = workers_of(command)
    assert len(first) == 2
    for pid in first:  # one of them trains the teacher; the other waits for it, or still starts
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: any(partial.glob("plugin-*.dir")), command.process)
    assert "it is run again" in command.err
    second = workers_of(command)
    command.process.kill()
    command.wait()
    assert second and not set(first) & set(second) and gone(second), "they end with the sweep"

    code, command = bench(["sweep", path, "--jobs", "2"], tmp_path)
    assert code == 0, command.err
    assert numbers(tmp_path) == numbers(alone)
    assert [p.name for p in partial.iterdir()] == []
    stages = sorted(s["name"] for r in results(tmp_path).values() for s in r["training"] if not s["cached"])
    assert stages in (["adapt", "adapt", "teacher"], ["adapt", "adapt"]), (
        "the teacher's run may have been the killed one"
    )


def test_ctrl_c_stops_every_process_and_notes_what_was_interrupted(alone: Path, tmp_path: Path) -> None:
    path = tiny_sweep(tmp_path, steps=100_000)
    command = launch(["sweep", path, "--jobs", "2"], tmp_path, terminal=True)
    partial = tmp_path / "cache" / "artifacts" / "partial"
    wait_for(lambda: len(list(partial.glob("plugin-*.dir"))) == 2, command.process)
    running = workers_of(command)
    assert len(running) == 2 and command.process.pid
    os.kill(command.process.pid, signal.SIGINT)
    assert command.wait() == 130 and gone(running)
    assert {name: r["status"] for name, r in results(tmp_path).items()} == {
        "dense": "done",
        "variator-2": "interrupted",
        "variator-4": "interrupted",
    }
    assert "the same command goes on from there" in command.out and "Traceback" not in command.out
    assert "2 running" in command.out and "dense 5" in command.out, "the bars and the front were there"
    assert json.loads((tmp_path / "results" / "tiny" / "runs").glob("*.json").__next__().read_text())
