"""The real ``wandb sweep`` and ``wandb agent``, against a server of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from bench.launch.sweep import read_sweep
from bench.tracking import Tracking
from tests.bench_command import bench, results, tiny_sweep
from tests.wandb_account import ROOT, Account, account
from tests.workers import PATIENCE

SHIPPED = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with account(tmp_path_factory.mktemp("account")) as found:
        yield found


def for_agents(path: Path, project: str) -> Path:
    """Make a tiny sweep one that agents can run."""
    content = yaml.safe_load(path.read_text())
    options = ["--study", "tiny", "--cache-dir", "cache", "--device", "cpu"]
    command = ["${env}", sys.executable, "-m", "tests.bench_command", "run", *options, "${args}"]
    path.write_text(yaml.safe_dump(content | {"project": project, "program": "bench", "command": command}))
    return path


def agent_line(said: str) -> list[str]:
    found = re.search(r"wandb agent \S+", said)
    assert found, said
    return found[0].split()


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"no {what} in time"
        time.sleep(0.1)


def finish(*agents: subprocess.Popen[str]) -> list[str]:
    try:
        return [agent.communicate(timeout=2 * PATIENCE)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()


@pytest.mark.timeout(600)  # each point is a process that imports torch, and an agent asks for one every five seconds
def test_two_agents_at_once_share_a_grid_with_a_point_that_crashes(online: Account, tmp_path: Path) -> None:
    """Dense comes twice, since it ignores the learning rate, of which one diverges."""
    path = for_agents(tiny_sweep(tmp_path, ratio=4, lr=[1e30, 1e-3]), "agents")
    line = agent_line(online.command(["wandb", "sweep", path], tmp_path))
    told = Account(online.state, online.environ | {"WANDB_AGENT_DISABLE_FLAPPING": "true"})
    said = "".join(finish(*(told.start(line, tmp_path) for _ in range(2))))
    stored = {p.stem: p for p in (tmp_path / "results" / "tiny" / "runs").glob("*.json")}
    runs = online.runs("agents")
    assert len(runs) == 4 and len(stored) == 3, said
    assert {run["config"]["run_id"] for run in runs} == set(stored), "each point is a run of the store"
    assert {run["sweep"] for run in runs} == {line[-1].split("/")[-1]}
    assert len({run["agent"] for run in runs}) == 2
    ends = sorted((run["config"]["method"], run["state"], run["summary"]["status"]) for run in runs)
    well, diverged = ("variator", "finished", "done"), ("variator", "failed", "diverged")
    assert ends == [("dense", "finished", "done")] * 2 + [diverged, well]
    for run in runs:
        assert "selection/primary" in run["summary"] or run["state"] == "failed"
        assert run["group"] == "tiny" and run["displayName"].startswith("mood · bert · ")
    assert len([a for a in online.artifacts("agents").values() if a["type"] == "teacher"]) == 1

    code, command = bench(["sweep", path], tmp_path, online.environ)
    assert "W&B" not in command.err, "nothing is left to do"
    assert code == 1 and len(online.runs("agents")) == 4


@pytest.mark.timeout(600)
def test_an_agent_that_is_stopped_is_followed_by_another(online: Account, tmp_path: Path) -> None:
    path = for_agents(tiny_sweep(tmp_path, method="variator", ratio=[2, 4]), "stopped")
    line = agent_line(online.command(["wandb", "sweep", path], tmp_path))
    first = online.start(line, tmp_path)
    until(lambda: any(run["state"] == "running" for run in online.runs("stopped")), "run")
    first.kill()
    for pid in runs_below(tmp_path):
        os.kill(pid, signal.SIGKILL)
    until(lambda: online.runs("stopped")[0]["state"] == "killed", "end of the run whose process was killed")
    assert online.runs("stopped")[0]["summary"]["status"] == "interrupted"
    finish(online.start(line, tmp_path))
    killed, other = online.runs("stopped")
    assert (killed["state"], other["state"]) == ("killed", "finished")
    assert [result["status"] for result in results(tmp_path).values()].count("done") == 1

    # the point that was killed is not given out again: the sweep's own command completes it
    code, command = bench(["sweep", path], tmp_path, online.environ)
    assert code == 0, command.err
    assert sorted(result["status"] for result in results(tmp_path).values()) == ["done", "done"]
    _, _, again = online.runs("stopped")
    assert (again["id"], again["state"]) == (killed["config"]["run_id"], "finished")


def runs_below(at: Path) -> list[int]:
    """Return the processes of ``bench run`` that work in a folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(folder / "cwd")) == at and b"tests.bench_command" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    assert found
    return found


def test_every_shipped_sweep_is_taken(online: Account, tmp_path: Path) -> None:
    """By W&B's own check of a sweep in its client, and by its command."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

    for path in SHIPPED:
        content = load_sweep_config(str(path))
        assert content and read_sweep(path).project == Tracking.project, path
        assert create_sweep_command(content["command"]) == [
            "${env}",
            "bench",
            "run",
            "--study",
            *content["command"][4:],
        ]
        first = {key: {"value": p.get("value", p.get("values", [None])[0])} for key, p in content["parameters"].items()}
        assert all(word.startswith("--") for word in create_sweep_command_args({"args": first})["args"])
    said = online.command(["wandb", "sweep", ROOT / "sweeps" / "glue.yaml"], tmp_path)
    assert re.search(rf"wandb agent loopback/{Tracking.project}/\w+", said)


def test_a_sweep_is_handed_over(online: Account, tmp_path: Path) -> None:
    path = for_agents(tiny_sweep(tmp_path), "handed")
    code, command = bench(["sweep", path, "--to-wandb"], tmp_path, online.environ)
    page, line = command.out.splitlines()
    assert code == 0 and page.endswith(f"/loopback/handed/sweeps/{line.split('/')[-1]}")
    assert re.fullmatch(r"wandb agent loopback/handed/\w+", line)
    code, command = bench(["sweep", path, "--to-wandb"], tmp_path, online.environ | {"WANDB_API_KEY": ""})
    assert code == 2 and command.err.startswith("error: no key for W&B is configured")
