"""The same sweep by two W&B agents, by two jobs of one machine, and by Slurm: the same results to the last metric."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.slurm_cluster import Cluster
from tests.wandb_account import ROOT, Account, account

SMALL = {"train_examples": 64, "dev_examples": 64, "max_length": 32, "pretrain_steps": 4, "steps": 6}
"""What makes the shipped sweep a matter of a minute; all else is as it is shipped."""
PATIENCE = 600
SAME = ("status", "identity", "evaluations", "teacher_evaluations", "cost", "knob", "notes", "examples")


def quickstart(folder: Path) -> Path:
    """Write ``sweeps/quickstart.yaml`` with fewer examples and steps, and return it."""
    content = yaml.safe_load((ROOT / "sweeps" / "quickstart.yaml").read_text())
    content["parameters"] |= {key: {"value": value} for key, value in SMALL.items()}
    path = folder / "quickstart.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def result_set(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what must be the same of each result of a study, its predictions too."""
    from bench.results import ResultStore

    store, found = ResultStore(folder / "results", "quickstart"), {}
    for result in store:
        content = result.model_dump(mode="json")
        predictions = pd.read_parquet(store.predictions_path(result.run_id))
        found[result.run_id] = {key: content[key] for key in SAME} | {"predictions": predictions.to_dict("list")}
    return found


@pytest.mark.timeout(4 * PATIENCE)  # real weights, and a dozen processes that import torch
def test_agents_jobs_and_slurm_give_the_same(cluster: Cluster, tmp_path: Path) -> None:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with account(tmp_path / "account") as found:
        alone = {"WANDB_MODE": "disabled"}  # or it would take from the project what the agents have done
        for way, more in (("agents", {}), ("jobs", alone), ("slurm", alone | cluster.environment)):
            at = tmp_path / way
            at.mkdir()
            path = quickstart(at)
            environ = {**found.environ, "PATH": programs, "BENCH_CACHE": str(at / "cache"), **more}
            user = Account(found.state, environ)
            if way == "agents":
                line = re.search(r"wandb agent \S+", user.command(["wandb", "sweep", path], at))
                assert line
                agents = [user.start(line[0].split(), at) for _ in range(2)]
                for agent in agents:
                    agent.wait(PATIENCE)
            elif way == "jobs":
                user.command(["bench", "sweep", path, "--jobs", "2", "--device", "cpu"], at, PATIENCE)
            else:
                user.command(
                    ["bench", "sweep", path, "--executor", "slurm", "--cpus", "1", "--device", "cpu"], at, PATIENCE
                )
                cluster.wait_for_end(PATIENCE)
        agents, jobs, slurm = (result_set(tmp_path / way) for way in ("agents", "jobs", "slurm"))
        runs = found.runs("variator-bench")
    assert len(agents) == 4 and {result["status"] for result in agents.values()} == {"done"}
    assert agents == jobs == slurm
    tracked = [run["config"]["run_id"] for run in runs]
    assert len(tracked) == 6 and set(tracked) == set(agents), "each point of the grid is a run, dense thrice the same"
