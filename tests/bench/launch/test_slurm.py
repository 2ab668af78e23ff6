"""Sweeps on a real Slurm of one node: nothing is lost, nothing is submitted twice, and one failure cancels nothing."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from bench.cli import main
from bench.config import RunConfig
from bench.errors import ConfigError
from bench.launch.plan import PlannedCell
from bench.launch.slurm import SlurmOptions, waves
from bench.launch.slurm_queue import SlurmQueue
from bench.results import ResultStore
from tests.bench_command import bench as local
from tests.bench_command import results, tiny_sweep
from tests.slurm_cluster import Cluster, wait_until
from tests.slurm_tasks import QuickTask

ROOT = Path(__file__).parents[3]


@pytest.fixture
def at(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty folder, made the current one, from which cells are submitted."""
    monkeypatch.chdir(tmp_path)
    for name, value in {**cluster.environment, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    cluster.clear()


@pytest.fixture
def quick(at: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the same folder, from which cells are submitted that run quickly and can be paused."""
    monkeypatch.setattr("bench.launch.slurm.CellTask", QuickTask)
    return at


class Said(NamedTuple):
    code: int
    out: str
    err: str


def bench(*words: str | Path) -> Said:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return Said(done.exit_code, done.stdout, done.stderr)


def submit(sweep: Path, *words: str) -> Said:
    return bench(
        "sweep", sweep, "--executor", "slurm", "--cpus", "1", "--cache-dir", "cache", "--device", "cpu", *words
    )


def submitted(said: Said) -> list[int]:
    """Return the number of cells of each array that was submitted."""
    assert said.code == 0, said.err
    return [int(count) for count in re.findall(r"^submitted job \d+: (\d+) cell", said.out, re.M)]


def status() -> tuple[dict[str, int], list[str]]:
    """Return how many cells are in each state, and the lines about single ones."""
    head, *lines = bench("status", "tiny").out.splitlines()
    counts = (part.split() for part in head.partition(": ")[2].split(", "))
    return {state: int(count) for count, state in counts}, lines


def numbers(at: Path) -> dict[str, dict[str, Any]]:
    keys = ("status", "evaluations", "teacher_evaluations", "cost", "identity")
    return {name: {key: result[key] for key in keys} for name, result in results(at).items()}


@pytest.mark.timeout(600)
def test_a_sweep_gives_what_it_gives_on_one_machine(
    cluster: Cluster, at: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sweep = tiny_sweep(at, ratio=[2, 4, 8])
    first = submit(sweep)
    assert submitted(first) == [1, 2, 1], "who makes the teacher, then arrays as large as Slurm takes"
    maker, *_ = re.findall(r"^submitted job (\d+)", first.out, re.M)
    assert [line.endswith(f", after {maker}") for line in first.out.splitlines()[:3]] == [False, True, True]
    again = submit(sweep)
    assert submitted(again) == [] and "not submitted: 4 in Slurm already" in again.out
    cluster.wait_for_end()

    here = tmp_path_factory.mktemp("here")
    for name in ("mood", "bert"):
        shutil.copytree(at / name, here / name)
    code, command = local(["sweep", tiny_sweep(here, ratio=[2, 4, 8])], here)
    assert code == 0, command.err
    assert numbers(at) == numbers(here)
    found = results(at)
    assert [result["provenance"]["threads"] for result in found.values()] == [1] * 4
    trained = [stage["name"] for result in found.values() for stage in result["training"] if not stage["cached"]]
    assert sorted(trained) == ["adapt"] * 3 + ["teacher"]
    for result in found.values():
        log = (at / "results" / "tiny" / "logs" / f"{result['run_id']}.log").read_text()
        assert f"done: {at}/results/tiny/runs/{result['run_id']}.json" in log
    assert status() == ({"done": 4}, [])
    assert submit(sweep).out == "not submitted: 4 done\n"


@pytest.mark.timeout(600)
def test_one_that_fails_ends_no_other_and_is_kept(cluster: Cluster, quick: Path) -> None:
    sweep = tiny_sweep(quick, method="variator", ratio=2, lr=[1e30, 1e-3], steps=6)
    assert submitted(submit(sweep)) == [1, 1]
    cluster.wait_for_end()
    diverged, done = sorted(ResultStore(quick / "results", "tiny"), key=lambda r: r.status != "diverged")
    assert (diverged.status, done.status) == ("diverged", "done")
    counts, [line] = status()
    assert counts == {"diverged": 1, "done": 1}
    log = f"results/tiny/logs/{diverged.run_id}.log"
    assert line.startswith("  diverged: mood · ") and "the loss became" in line and line.endswith(f"; log {log}")
    assert "not done: " in Path(log).read_text()

    again = submit(sweep)
    assert submitted(again) == [] and "--mode retry-failed" in again.out
    assert submitted(submit(sweep, "--mode", "retry-failed", "--slurm", "hold")) == [1]
    assert submitted(submit(sweep, "--mode", "retry-failed")) == [], "it waits already"
    [job] = cluster.queue()
    assert status() == ({"done": 1, "queued": 1}, [f"  queued: job {job}, 1 cell (JobHeldUser)"])
    cluster.ask("scancel", job)
    cluster.wait_for_end()
    assert status()[1] == [line.partition("; log ")[0]], "its failure stands again"


def test_only_what_has_left_the_queue_is_submitted_again(cluster: Cluster, quick: Path) -> None:
    sweep = tiny_sweep(quick, ratio=[2, 4, 8])
    assert submitted(submit(sweep, "--slurm", "hold", "--slurm", "comment=by hand", "--gpus", "1")) == [1, 2, 1]
    first, second, third, last = sorted(cluster.queue())
    array = second.partition("_")[0]
    queued = [
        f"  queued: job {job}, {cells} (" for job, cells in ((first, "1 cell"), (array, "2 cells"), (last, "1 cell"))
    ]
    counts, lines = status()
    assert counts == {"queued": 4}
    assert [line.partition("(")[0] + "(" for line in lines] == queued
    shown = cluster.ask("scontrol", "show", "job", first)
    assert "Comment=by hand" in shown and "gres:gpu:1" in shown and "NumCPUs=1" in shown

    cluster.ask("scancel", third)
    wait_until(lambda: third not in cluster.queue(), "it is cancelled")
    counts, lines = status()
    assert counts == {"queued": 3, "interrupted": 1}
    [line] = [line for line in lines if "interrupted" in line]
    assert "variator k=4" in line and "left Slurm's queue without a result" in line
    again = submit(sweep, "--slurm", "hold")
    assert submitted(again) == [1] and "3 in Slurm already" in again.out
    assert f": 1 cell, after {first}" in again.out, "the teacher that it needs is still to be made there"
    assert len(cluster.queue()) == 4 and status()[0] == {"queued": 4}

    os.environ["PATH"], path = "", os.environ["PATH"]
    try:
        counts, lines = status()
    finally:
        os.environ["PATH"] = path
    assert counts == {"queued": 4} and len(lines) == 5
    assert "Slurm cannot be asked: there is no `squeue` on PATH" in lines[-1]
    cluster.ask("scancel", *{job.partition("_")[0] for job in cluster.queue()})
    cluster.wait_for_end()
    assert status()[0] == {"interrupted": 4}


@pytest.mark.timeout(600)
def test_a_cell_that_is_preempted_and_then_cancelled_goes_on_where_it_was(cluster: Cluster, quick: Path) -> None:
    sweep = tiny_sweep(quick, method="variator", ratio=2, steps=40)
    pause, steps = quick / "pause", quick / "steps"

    def reached(step: int) -> bool:
        return steps.exists() and steps.read_text().endswith(f"\n{step}\n")

    pause.write_text("15")
    assert submitted(submit(sweep)) == [1]
    [job] = cluster.queue()
    wait_until(lambda: reached(15), "it trains", 200)
    counts, [line] = status()
    assert counts == {"running": 1} and line.startswith("  running: mood · ")

    blocker = cluster.ask("sbatch", "--parsable", "-p", "hi", "-c", "2", "--output", "/dev/null", "--wrap", "sleep 600")
    wait_until(lambda: cluster.queue() == {job: "PENDING", blocker: "RUNNING"}, "its node is taken away")
    counts, [line] = status()
    assert counts == {"queued": 1} and line.startswith(f"  queued: job {job}, 1 cell (")
    assert submitted(submit(sweep)) == []
    pause.write_text("25")
    cluster.ask("scancel", blocker)
    # Slurm revokes what let the job run by whole seconds, so a job that begins within the same second is killed
    time.sleep(2)
    # asked for again and again: Slurm refuses it while it still cleans up after the job
    wait_until(lambda: cluster.begin_at_once() or reached(25), "it goes on", 200, cluster.state)

    cluster.ask("scancel", job)
    cluster.wait_for_end()
    counts, [line] = status()
    assert counts == {"interrupted": 1} and "; log " in line
    pause.unlink()
    assert submitted(submit(sweep)) == [1]
    cluster.wait_for_end()
    [result] = results(quick).values()
    assert result["status"] == "done"
    assert [int(step) for step in steps.read_text().split()] == [*range(1, 16), *range(11, 26), *range(21, 41)]
    log = (quick / "results" / "tiny" / "logs" / f"{result['run_id']}.log").read_text()
    assert log.count("Starting with") == 1, "the log of the last submission"
    earlier = (quick / "results" / "tiny" / ".slurm" / "jobs" / f"{job}_0_log.out").read_text()
    assert earlier.count("Starting with") == 2, "what is queued again goes on with its log"


def test_what_slurm_refuses_is_not_taken_for_submitted(cluster: Cluster, at: Path) -> None:
    sweep = tiny_sweep(at, ratio=2)
    said = submit(sweep, "--partition", "moon")
    assert said.code == 2 and "Slurm refused 1 cell" in said.err and "partition" in said.err
    assert cluster.queue() == {} and SlurmQueue(ResultStore("results", "tiny")).submitted() == {}


@pytest.mark.timeout(600)
def test_several_gpus_train_a_cell_together(cluster: Cluster, at: Path) -> None:
    """Slurm gives two GPUs, which are none: two processes share the work on processors."""
    assert submitted(submit(tiny_sweep(at, method="variator", ratio=2), "--gpus", "2", "--cpus", "2")) == [1]
    cluster.wait_for_end()
    [result] = results(at).values()
    log = (at / "results" / "tiny" / "logs" / f"{result['run_id']}.log").read_text()
    assert result["status"] == "done", log
    assert log.count(f"done: {at}/results/tiny/runs/{result['run_id']}.json") == 1
    assert (result["provenance"]["device"], result["provenance"]["threads"]) == ("2 processes on cpu", 1)


def test_what_needs_no_node_is_not_submitted(cluster: Cluster, at: Path) -> None:
    """A method that cannot run there is a result as on one machine; a task that is nowhere is said, and no result."""
    tasks = [str(at / "mood" / "mood.yaml"), str(at / "nowhere.yaml")]
    said = submit(tiny_sweep(at, method="moefication", ratio=2, task=tasks))
    assert said.code == 1 and cluster.queue() == {}
    assert said.out.splitlines()[0] == "not submitted: 1 skipped, 1 error"
    assert said.out.count("not done: ") == 1 and "nowhere.yaml" in said.out
    [result] = results(at).values()
    assert result["status"] == "skipped" and result["reason"]
    assert submit(tiny_sweep(at, name="again", task=tasks[1])).code == 2
    assert submit(tiny_sweep(at), "--mode", "read-only").code == 2


@pytest.mark.parametrize(
    ("submitit", "path", "says"),
    [
        (None, os.environ["PATH"], "pip install 'variator-bench[slurm]'"),
        (True, "", "there is no `sbatch` on PATH. Run this where jobs are submitted from"),
    ],
)
def test_what_is_missing_is_named(
    submitit: object, path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tiny_sweep(tmp_path)
    monkeypatch.chdir(tmp_path)
    if submitit is None:
        monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    monkeypatch.setenv("PATH", path)
    said = submit(sweep)
    assert said.code == 2 and said.err.startswith("error: --executor slurm needs ") and says in said.err
    assert not (tmp_path / "results").exists()


def test_options_of_slurm_are_for_slurm(tmp_path: Path) -> None:
    for words in (["--partition", "gpu"], ["--slurm", "qos=low"]):
        said = bench("sweep", tiny_sweep(tmp_path), *words)
        assert said.code == 2 and f"{words[0]} is for --executor slurm" in said.err


def test_parameters_of_sbatch() -> None:
    read = SlurmOptions.read_more(["--qos=low", "exclusive", "mail_user=a=b@c"])
    assert read == {"qos": "low", "exclusive": True, "mail-user": "a=b@c"}
    for word, says in (
        ("time=5", "use --time"),
        ("array=0-3", "use --jobs"),
        ("job-name=x", "set by"),
        ("A B", "no para"),
    ):
        with pytest.raises(ConfigError, match=says):
            SlurmOptions.read_more([word])


def test_nobody_waits_on_a_node_for_what_another_makes() -> None:
    def cell(name: str, *needs: str) -> PlannedCell:
        return PlannedCell(RunConfig(), name, "to do", needs=frozenset(needs))

    cells = [cell("a", "t1"), cell("b", "t1", "p2"), cell("c", "t2", "p2"), cell("d", "t1"), cell("e"), cell("f", "t2")]
    found = [[[c.run_id for c in group] for group in wave] for wave in waves(cells)]
    assert found == [[["a", "c"], ["e"]], [[], ["b", "d", "f"]]]
