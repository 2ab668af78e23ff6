"""Runs in processes of their own: one that is killed, and two that want the same cell."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench.cell import Cell, Surroundings
from bench.results import ResultStore, RunResult
from tests.checkpoints import quick_config, task_file, tiny_checkpoint
from tests.workers import finish, run_cell, start, wait_for


def results(folder: Path) -> list[RunResult]:
    return [RunResult.model_validate_json(path.read_text()) for path in sorted(folder.glob("notes.*.json"))]


def test_a_killed_run_is_left_running_and_completed_by_the_next(tmp_path: Path) -> None:
    config = quick_config(task_file(tmp_path / "task"), tiny_checkpoint(tmp_path / "tiny", "bert"), ratio=2)
    run_id = Cell.resolve(config, Surroundings(cache_dir=tmp_path / "cache")).run_id
    store, notes = ResultStore(tmp_path / "results", "study"), tmp_path / "notes"
    process = start(run_cell, config, store.root, tmp_path / "cache", notes, tmp_path / "never")
    wait_for(lambda: notes.exists() and " adapt " in notes.read_text(), process)
    process.kill()
    process.join()
    left = store.read(run_id)
    assert left is not None and left.status == "running" and left.evaluations == []
    undisturbed = ResultStore(tmp_path / "undisturbed", "study")
    heirs = [
        start(run_cell, config, store.root, tmp_path / "cache", notes, None),
        start(run_cell, config, undisturbed.root, tmp_path / "fresh cache", notes, None),
    ]
    assert finish(*heirs) == [0, 0]
    done = store.read(run_id)
    assert done is not None and done.status == "done"
    assert [(stage.name, stage.cached) for stage in done.training] == [("teacher", True), ("adapt", False)]

    expected = undisturbed.read(run_id)
    assert expected is not None and done.evaluations == expected.evaluations
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(s.predictions_path(run_id)) for s in (store, undisturbed)), check_exact=True
    )


def test_of_two_processes_one_trains_and_both_have_the_result(tmp_path: Path) -> None:
    config = quick_config(task_file(tmp_path / "task"), tiny_checkpoint(tmp_path / "tiny", "t5"), ratio=2)
    notes, gate = tmp_path / "notes", tmp_path / "gate"
    first = start(run_cell, config, tmp_path / "results", tmp_path / "cache", notes, gate)
    wait_for(lambda: notes.exists() and " adapt " in notes.read_text(), first)
    second = start(run_cell, config, tmp_path / "results", tmp_path / "cache", notes, gate)
    wait_for(lambda: " says " in notes.read_text(), second)
    gate.touch()
    assert finish(first, second) == [0, 0]
    lines = [line.split(" ", 2) for line in notes.read_text().splitlines()]
    assert len({pid for pid, word, _ in lines if word == "adapt"}) == 1
    one, other = results(tmp_path)
    assert one == other and one.status == "done"
    waited = [rest for _, word, rest in lines if word == "says"]
    assert waited == ["mood · tiny · variator k=2 · seed 0: another process is on it; waiting"]


def test_two_cells_in_two_processes_share_one_teacher(tmp_path: Path) -> None:
    task, backbone = task_file(tmp_path / "task"), tiny_checkpoint(tmp_path / "tiny", "bert")
    cells = [quick_config(task, backbone, ratio=k) for k in (2, 4)]
    notes = tmp_path / "notes"
    both = [start(run_cell, cell, tmp_path / "results", tmp_path / "cache", notes, None) for cell in cells]
    assert finish(*both) == [0, 0]
    lines = [line.split() for line in notes.read_text().splitlines()]
    assert len({pid for pid, word, *_ in lines if word == "teacher"}) == 1
    assert len({pid for pid, word, *_ in lines if word == "adapt"}) == 2
    one, other = results(tmp_path)
    assert one.training[0].artifact == other.training[0].artifact
    assert sorted([one.training[0].cached, other.training[0].cached]) == [False, True]
    assert one.teacher_evaluations == other.teacher_evaluations
