"""Whole sweeps and runs by the command, in processes of their own: what is done stays, whatever happens to the rest."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bench.results import ResultStore
from tests.bench_command import Command, bench, launch, results, tiny_sweep
from tests.workers import wait_for

NUMBERS = ("evaluations", "teacher_evaluations", "cost", "identity")


def numbers(at: Path) -> dict[str, dict[str, Any]]:
    """Return what must come out again, by cell."""
    return {name: {key: result[key] for key in NUMBERS} for name, result in results(at).items()}


def states(at: Path) -> list[str]:
    return [result["status"] for result in results(at).values()]


def made(at: Path) -> list[str]:
    """Return each training that was done, in any cell of the study, whether its result was kept or found."""
    return sorted(s["name"] for result in results(at).values() for s in result["training"] if not s["cached"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    """Return a sweep of a dense cell and k = 2, 4 that ran through, and what it printed."""
    at = tmp_path_factory.mktemp("finished")
    code, command = bench(["sweep", tiny_sweep(at)], at)
    assert code == 0, command.err
    return at, command


def test_a_sweep_runs_its_cells_and_ends_with_the_table(finished: tuple[Path, Command]) -> None:
    at, command = finished
    assert {name: result["status"] for name, result in results(at).items()} == {
        "dense": "done",
        "variator-2": "done",
        "variator-4": "done",
    }
    assert made(at) == ["adapt", "adapt", "teacher"]
    for path in re.findall(r"^results/\S+\.(?:png|md)$", command.out, re.M):
        assert (at / path).stat().st_size > 0
    assert re.search(r"^\s*variator\s+4\s+\d", command.out, re.M)
    lines = [line for line in command.err.splitlines() if ": done (" in line]
    assert [line.split(": done (")[1][:6] for line in lines] == ["1 of 3", "2 of 3", "3 of 3"]
    assert "done (" not in command.out, "progress is no output"


def test_a_second_call_returns_at_once_with_the_same(finished: tuple[Path, Command]) -> None:
    at, first = finished
    before = {path: path.stat().st_mtime_ns for path in at.glob("results/*/*/*.*") if path.parent.name != "figures"}
    code, again = bench(["sweep", at / "tiny.yaml"], at)
    assert (code, again.out, again.err) == (0, first.out, "")
    runs = {path: time for path, time in before.items() if path.parent.name in ("runs", "predictions")}
    assert len(runs) == 6
    assert {path: path.stat().st_mtime_ns for path in runs} == runs


def test_agents_may_write_keys_as_wandb_does(finished: tuple[Path, Command]) -> None:
    at, _ = finished
    first = results(at)["variator-4"]
    given = {**first["config"], **first["config"]["options"]}
    keys = {key: given[key] for key in ("ratio", "seed", "teacher_epochs", "teacher_batch_size", "teacher_lr")}
    keys |= {key: given[key] for key in ("steps", "batch_size", "precision", "pretrain_steps", "bottleneck")}
    keys |= {"task": at / "mood" / "mood.yaml", "backbone": at / "bert", "method": "variator", "mask_padding": True}
    underscores = [f"--{key}={value}" for key, value in keys.items()]
    dashes = [word for key, value in keys.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    for words in (underscores, dashes):
        code, command = bench(["run", "--study", "tiny", *words, "--mode", "read-only"], at)
        assert code == 0 and command.out.splitlines()[-1] == f"done: results/tiny/runs/{first['run_id']}.json"
        [score] = re.findall(r"^accuracy ([\d.]+) \[", command.out, re.M)
        assert float(score) == pytest.approx(first["evaluations"][1]["metrics"]["accuracy"]["value"], abs=5e-5)


def test_one_run_keeps_its_result_and_says_where(finished: tuple[Path, Command], tmp_path: Path) -> None:
    at, _ = finished
    words: list[str | Path] = ["run", "--task", at / "mood" / "mood.yaml", "--backbone", at / "bert"]
    words += ["--train_examples=30", "--mask_padding=False", "--ratio=2", "--steps=2", "--pretrain_steps=0"]
    words += ["--teacher_epochs=1", "--bottleneck=4", "--precision=fp32"]
    code, command = bench(words, tmp_path)
    assert code == 0, command.err
    result = results(tmp_path, "runs")["variator-2"]
    assert (result["config"]["train_examples"], result["config"]["options"]["mask_padding"]) == (30, False)
    lines = command.out.splitlines()
    assert lines[-1] == f"done: results/runs/runs/{result['run_id']}.json"
    [plugin] = [line.removeprefix("plugin: ") for line in lines if line.startswith("plugin: ")]
    assert (Path(plugin) / "plugin.safetensors").is_file()
    remaining = result["cost"]["achieved_remaining"]
    assert f"remaining encoder FLOPs {remaining:.2%}, saved {1 - remaining:.2%};" in command.out


def test_cells_that_fail_are_listed_last_and_end_nothing(tmp_path: Path) -> None:
    """A task that is nowhere, weights that are torn, a learning rate that diverges, and cells that are well."""
    tiny_sweep(tmp_path)
    torn = Path(shutil.copytree(tmp_path / "bert", tmp_path / "torn"))
    os.truncate(torn / "model.safetensors", 2000)
    tasks = [str(tmp_path / "nowhere.yaml"), str(tmp_path / "mood" / "mood.yaml")]
    path = tiny_sweep(
        tmp_path, task=tasks, backbone=[str(torn), str(tmp_path / "bert")], ratio=2, lr=[1e30, 1e-3], steps=6
    )
    code, command = bench(["sweep", path], tmp_path)
    assert code == 1
    stored = list(ResultStore(tmp_path / "results", "tiny"))
    found = sorted((r.config["backbone"], r.config["method"], r.status) for r in stored)
    well = [("bert", "dense", "done"), ("bert", "variator", "diverged"), ("bert", "variator", "done")]
    assert found == [*well, ("torn", "dense", "failed"), ("torn", "variator", "failed"), ("torn", "variator", "failed")]
    [diverged] = [r for r in stored if r.status == "diverged"]
    assert "loss became" in (diverged.reason or "") and "1e+30" in (diverged.reason or "")
    lines = command.out.splitlines()
    failures = [i for i, line in enumerate(lines) if line.startswith("not done: ")]
    assert len(failures) == 6 + 3 + 1
    assert failures == list(range(len(lines) - 11, len(lines) - 1)), "they come last, but for what to do about them"
    assert "--mode retry-failed" in lines[-1]
    assert sum("nowhere.yaml" in line for line in lines[failures[0] :]) >= 6
    assert "Traceback" not in command.out + command.err

    code, again = bench(["sweep", path], tmp_path)
    assert code == 1 and again.err == "", "what failed is kept, and nothing is run"
    assert again.out.splitlines()[-11:] == lines[-11:]


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = tiny_sweep(tmp_path, ratio=2, steps=400)
    command = launch(["sweep", path], tmp_path, terminal=True)
    partial = tmp_path / "cache" / "artifacts" / "partial"
    wait_for(lambda: any(partial.glob("plugin-*.dir")), command.process)
    time.sleep(0.3)
    assert command.process.pid
    os.kill(command.process.pid, signal.SIGINT)
    assert command.wait() == 130
    assert {name: r["status"] for name, r in results(tmp_path).items()} == {
        "dense": "done",
        "variator-2": "interrupted",
    }
    screen = command.out
    assert "stopped; what was finished is stored, and the same command goes on from there" in screen
    assert "Traceback" not in screen
    assert "1/2" in screen, "the bars were there"
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l"), "the cursor is shown again"
    code, again = bench(["sweep", path], tmp_path)
    assert code == 0 and again.err.count(": done (") == 1
    assert made(tmp_path) == ["adapt", "teacher"]
