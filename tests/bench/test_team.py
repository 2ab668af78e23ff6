"""Several processes in one run, really launched: the result of one process, written once, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from tests.bench_command import results, tiny_sweep
from tests.checkpoints import Family, task_file, tiny_checkpoint
from tests.workers import PATIENCE

ROOT = Path(__file__).parents[2]
NO_DROPOUT: dict[Family, dict[str, float]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
}
LAUNCH = [
    "-m",
    "accelerate.commands.launch",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


def launched(words: list[Any], at: Path, processes: int, *flags: str) -> subprocess.Popen[str]:
    """Start the command in ``at`` as a user does, of one process or of several, with all that it prints in a pipe."""
    several = [*LAUNCH, "--main_process_port", "0", "--num_processes", str(processes), *flags]
    command = [sys.executable, *(several if processes > 1 else []), "-m", "tests.quick_bench", *map(str, words)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    at.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*command, "--cache-dir", "cache"],
        cwd=at,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end; return the exit code and what was printed."""
    said, _ = process.communicate(timeout=2 * PATIENCE)
    return process.returncode, said


def no_dropout_sweep(at: Path, family: Family, **parameters: Any) -> Path:
    """Write a sweep whose training draws nothing at random, so that each process computes just its part."""
    task_file(at / "mood")
    tiny_checkpoint(at / family, family, **NO_DROPOUT[family])
    given = {"pretrain_steps": 3, "pretrain_length": 16, "pretrain_batch_size": 5, "ratio": 2} | parameters
    return tiny_sweep(at, backbone=str(at / family), **given)


def weights(at: Path) -> dict[str, dict[str, Any]]:
    """Return what the cache holds, by artifact."""
    return {path.parent.name: load_file(path) for path in (at / "cache" / "artifacts").glob("*/*.safetensors")}


def assert_same(one: Path, two: Path) -> None:
    """Compare all results and weights; only the order of sums may differ."""
    alone, together = results(one), results(two)
    assert alone.keys() == together.keys()
    for name, result in together.items():
        assert result["status"] == "done", result["traceback"]
        assert result["provenance"]["device"] == "2 processes on cpu"
        for key in ("evaluations", "teacher_evaluations", "cost", "identity", "notes"):
            assert result[key] == alone[name][key], (name, key)
        stages = zip(result["training"], alone[name]["training"], strict=True)
        for stage, expected in stages:
            assert (stage["name"], stage["cached"], stage["steps"]) == (
                expected["name"], expected["cached"], expected["steps"],
            )  # fmt: skip
            for record, wanted in zip(stage["history"], expected["history"], strict=True):
                assert record == pytest.approx(wanted, rel=1e-4, abs=1e-6), (name, stage["name"])
    made, wanted_weights = weights(two), weights(one)
    assert made.keys() == wanted_weights.keys()
    for key, tensors in made.items():
        for name, tensor in tensors.items():
            # AdamW moves a weight whose gradient is but rounding as far as any other: up to lr a step
            far = (tensor - wanted_weights[key][name]).abs()
            assert far.max() < 1e-3 and far.mean() < 1e-4, (key, name)


def assert_two_are_as_one(at: Path, sweep: Path, flag: str) -> None:
    together = launched(["sweep", sweep], at / "two", 2, flag)
    alone = launched(["sweep", sweep], at / "one", 1)
    for process in (together, alone):
        code, said = ended(process)
        assert code == 0, said
    assert_same(at / "one", at / "two")
    assert len(list((at / "two" / "results" / "tiny" / "runs").glob("*"))) == len(results(at / "one"))
    assert not list((at / "two" / "cache" / "artifacts" / "partial").glob("*"))


@pytest.mark.timeout(600)
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    """Teacher, pre-training and adaptation of a plugin, and a rival that trains all weights; batches are uneven."""
    sweep = no_dropout_sweep(tmp_path, "bert", method=["variator", "distillation"], batch_size=7, teacher_batch_size=9)
    assert_two_are_as_one(tmp_path, sweep, "--multi_gpu")


@pytest.mark.timeout(600)
def test_so_they_do_where_the_backbone_lies_in_parts(tmp_path: Path) -> None:
    """FSDP under a LoRA teacher and both trainings of a plugin; what is measured is the whole model."""
    sweep = no_dropout_sweep(tmp_path, "t5", method="variator", batch_size=7, teacher_batch_size=9, teacher_lora=True)
    assert_two_are_as_one(tmp_path, sweep, "--use_fsdp")


def _ranks(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children()


def in_training(command: subprocess.Popen[str], at: Path) -> None:
    """Wait until the plugin is in training, in a folder that no killed process has left."""

    def folders() -> set[Path]:
        return set((at / "cache" / "artifacts" / "partial").glob("plugin-*.dir"))

    before, end = folders(), time.monotonic() + PATIENCE
    while not folders() - before:
        assert command.poll() is None and time.monotonic() < end, command.communicate()[0]
        time.sleep(0.02)
    time.sleep(0.2)


def stored(at: Path) -> list[str]:
    return sorted(json.loads(p.read_text())["status"] for p in (at / "results" / "tiny" / "runs").glob("*.json"))


@pytest.mark.timeout(600)
def test_a_process_that_is_killed_ends_the_command_and_the_same_one_completes(tmp_path: Path) -> None:
    sweep, at = no_dropout_sweep(tmp_path, "bert", method="variator", steps=400, pretrain_steps=0), tmp_path / "two"
    for victim in (1, 0):
        command = launched(["sweep", sweep], at, 2, "--multi_gpu")
        in_training(command, at)
        began = time.monotonic()
        _ranks(command)[victim].kill()
        code, said = ended(command)
        assert code != 0 and time.monotonic() - began < 60, said
        assert stored(at) in (["running"], ["interrupted"])
    code, said = ended(launched(["sweep", sweep], at, 2, "--multi_gpu"))
    assert (code, stored(at)) == (0, ["done"]), said
    made = [path.name.split("-")[0] for path in sorted((at / "cache" / "artifacts").glob("*-*"))]
    assert made == ["evaluation", "plugin", "teacher"]


@pytest.mark.timeout(600)
def test_what_all_processes_fail_in_is_one_cell_and_the_next_one_runs(tmp_path: Path) -> None:
    at = tmp_path / "two"
    sweep = no_dropout_sweep(tmp_path, "bert", method="variator", lr=[1e30, 1e-3], pretrain_steps=0)
    code, said = ended(launched(["sweep", sweep], at, 2, "--multi_gpu"))
    assert (code, stored(at)) == (1, ["diverged", "done"]), said


@pytest.mark.timeout(600)
def test_what_one_process_fails_in_alone_ends_the_command_and_is_put_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other waits for it in a sum, and cannot be woken."""
    sweep, at = no_dropout_sweep(tmp_path, "bert", method="variator", pretrain_steps=0), tmp_path / "two"
    monkeypatch.setenv("FAILING_RANK", "1")
    code, said = ended(launched(["sweep", sweep], at, 2, "--multi_gpu"))
    (path,) = (at / "results" / "tiny" / "runs").glob("*.json")
    result = json.loads(path.read_text())
    assert (code != 0, result["status"]) == (True, "failed"), said
    assert result["reason"] == "another process of this run failed: RuntimeError: no memory left on this one"
    assert "process 1: Traceback" in result["traceback"]


def test_ctrl_c_interrupts_once(tmp_path: Path) -> None:
    sweep, at = no_dropout_sweep(tmp_path, "bert", method="variator", steps=4000, pretrain_steps=0), tmp_path / "two"
    command = launched(["sweep", sweep], at, 2, "--multi_gpu")
    in_training(command, at)
    began = time.monotonic()
    os.killpg(command.pid, signal.SIGINT)  # as a terminal does: to the launcher and all that it started
    code, said = ended(command)
    assert code != 0 and time.monotonic() - began < 60, said
    assert stored(at) == ["interrupted"]
