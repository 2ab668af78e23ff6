"""Without a key, and with a server that is of no use: the run is the same, and is kept for ``wandb sync``."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bench.tracking.link import Link
from tests.bench_command import bench, launch, results, tiny_sweep
from tests.wandb_account import account, environment, silent_port
from tests.workers import wait_for

NUMBERS = ("identity", "evaluations", "teacher_evaluations", "cost", "status")
DENSE = {"method": "dense", "ratio": 2}


def numbers(at: Path) -> dict[str, dict[str, Any]]:
    """Return what W&B must not change, by cell."""
    return {name: {key: result[key] for key in NUMBERS} for name, result in results(at).items()}


def kept(at: Path, kind: str = "offline-run") -> list[Path]:
    """Return the runs that lie beside the results."""
    return sorted((at / "results" / "tiny" / "wandb").glob(f"{kind}-*/*.wandb"))


def test_runs_without_a_key_are_kept_and_synced_later(tmp_path: Path) -> None:
    at = tmp_path / "work"
    at.mkdir()
    with account(tmp_path / "account") as online:
        code, command = bench(["sweep", tiny_sweep(at, ratio=4)], at, online.environ | {"WANDB_API_KEY": ""})
        assert code == 0
        [line] = [line for line in command.err.splitlines() if "W&B" in line]
        for word in ("results/tiny/wandb", "`wandb login`", "`wandb sync ", "WANDB_MODE=disabled"):
            assert word in line
        assert len(kept(at)) == 2 and online.runs() == []
        online.command(["wandb", "sync", *(path.parent for path in kept(at))], at)
        runs, made, stored = online.runs(), online.artifacts(), results(at)
        assert {run["id"] for run in runs} == {result["run_id"] for result in stored.values()}
        for run in runs:
            assert (run["state"], run["summary"]["status"]) == ("finished", "done")
            path = at / "results" / "tiny" / "runs" / f"{run['id']}.json"
            assert online.content(made[f"result-{run['id']}"], "result.json") == path.read_bytes()
        [plugin] = [a for a in made.values() if a["type"] == "plugin"]
        [teacher] = [a for a in made.values() if a["type"] == "teacher"]
        assert plugin["run"] == stored["variator-4"]["run_id"]
        # the two are sent at once, so that either may be the first to make the teacher, or both a version of it
        assert online.users(teacher["name"]) == {plugin["run"]}


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_mode_is_obeyed(mode: str, tmp_path: Path) -> None:
    environ = environment(tmp_path / "home", 9) | {"WANDB_MODE": mode}
    code, command = bench(["sweep", tiny_sweep(tmp_path, **DENSE)], tmp_path, environ)
    assert code == 0 and "W&B" not in command.err
    assert len(kept(tmp_path)) == (mode == "offline")
    assert (tmp_path / "results" / "tiny" / "wandb").exists() == (mode == "offline")


def test_a_server_that_is_of_no_use_changes_nothing(tmp_path: Path) -> None:
    """A closed port, a server that never answers, and a key that is refused, all at once for the sake of time."""
    for name in ("closed", "silent", "refused", "without"):
        (tmp_path / name).mkdir()
    with account(tmp_path / "account") as online, silent_port() as silent:
        environs = {
            "closed": environment(tmp_path / "home", 9),
            "silent": environment(tmp_path / "home", silent),
            "refused": online.environ | {"WANDB_API_KEY": "f" * 40},
            "without": {"WANDB_MODE": "disabled"},
        }
        commands = {}
        for name, environ in environs.items():
            at = tmp_path / name
            commands[name] = launch(["sweep", tiny_sweep(at, **DENSE)], at, environ=environ)
        assert {name: command.wait() for name, command in commands.items()} == dict.fromkeys(environs, 0)
    for name in ("closed", "silent", "refused"):
        [line] = [line for line in commands[name].err.splitlines() if "W&B" in line]
        assert "kept offline" in line and "`wandb sync " in line
        assert len(kept(tmp_path / name)) == 1
        assert scores(tmp_path / name) == scores(tmp_path / "without")
    assert "not logged in" in commands["refused"].err


def scores(at: Path) -> dict[str, Any]:
    """Return the numbers of a run, without the digest of where its checkpoint lies."""
    return {name: {k: v for k, v in found.items() if k != "identity"} for name, found in numbers(at).items()}


def test_a_client_that_is_killed_costs_the_live_losses_alone(tmp_path: Path) -> None:
    with account(tmp_path / "account") as online:
        path = tiny_sweep(tmp_path, method="variator", ratio=2, steps=150)
        command = launch(["sweep", path], tmp_path, environ=online.environ)
        wait_for(lambda: bool(online.runs()), command.process)
        for pid in cores(tmp_path):
            os.kill(pid, signal.SIGKILL)
        assert command.wait() == 0, command.err
        [line] = [line for line in command.err.splitlines() if "W&B" in line]
        assert "kept in" in line and "`wandb sync`" in line
        assert results(tmp_path)["variator-2"]["status"] == "done"
        online.command(["wandb", "sync", *(found.parent for found in kept(tmp_path))], tmp_path)
        [run] = online.runs()
        assert run["summary"]["status"] == "done" and f"result-{run['id']}" in online.artifacts()


def cores(at: Path) -> list[int]:
    """Return the processes of W&B's client that write below ``at``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            if b"wandb-core" in words and f"WANDB_DIR={at}/".encode() in environ:
                found.append(int(folder.name))
    assert found
    return found


def test_a_client_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    link = Link(tmp_path, {"init": {}, "online": False, "command": []})
    os.kill(link.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    for step in range(20_000):
        link.tell(at=step, numbers={"loss": 0.123456789})
    assert link.end(0.5, end={"status": "done"}) == {}
    assert time.monotonic() - began < 5
    assert link.process.returncode == -signal.SIGKILL
