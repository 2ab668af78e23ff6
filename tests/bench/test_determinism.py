"""Every source of chance is seeded, kernels are deterministic while numbers are made, and timings are left alone."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench.costing
from bench import registry
from bench.cell import Surroundings
from bench.determinism import deterministic
from bench.methods.dense import Dense
from bench.results import ResultStore
from bench.runner import run
from tests.checkpoints import quick_config, task_file, tiny_checkpoint


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def test_every_source_of_chance_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(3):
        first = drawn()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "or matrix products on a GPU vary"
    with deterministic(3):
        assert drawn() == first
    with deterministic(4):
        assert all(a != b for a, b in zip(drawn(), first, strict=True))
    with deterministic(2**40):
        drawn()  # numpy's seeds have 32 bits


def test_what_was_chosen_before_is_chosen_again() -> None:
    torch.use_deterministic_algorithms(False)
    with deterministic(0):
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        with pytest.raises(ZeroDivisionError), deterministic(0):
            raise ZeroDivisionError
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@dataclass(frozen=True)
class Careless(Dense):
    """Draws from the global generators, as code of other people does."""

    name = "careless"

    def compress(self, teacher: Any, data: Any, ctx: Any) -> Any:
        """Note what is drawn."""
        ctx.notes.append(f"{drawn()} {torch.are_deterministic_algorithms_enabled()}")
        return teacher.model


def test_a_run_is_seeded_whatever_ran_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**registry.methods(), "careless": Careless}
    for module in ("bench.registry", "bench.config"):
        monkeypatch.setattr(f"{module}.methods", lambda: known)
    timed = []
    measure = bench.costing.measure_speed

    def watched(*given: Any) -> Any:
        timed.append(torch.are_deterministic_algorithms_enabled())
        return measure(*given)

    monkeypatch.setattr(bench.costing, "measure_speed", watched)
    monkeypatch.setattr(bench.costing, "TIMED_BATCH_SIZES", (2,))
    task, backbone = task_file(tmp_path / "mood"), tiny_checkpoint(tmp_path / "bert", "bert")
    store, where = ResultStore(tmp_path / "results", "study"), Surroundings(cache_dir=tmp_path, device="cpu")
    config = quick_config(task, backbone, method="careless")
    notes = []
    for _ in range(2):
        drawn()
        result = run(config, store, where, "force")
        assert result.status == "done", result.traceback
        notes.append(result.notes)
    assert notes[0] == notes[1] and notes[0][0].endswith("True")
    assert timed == [False, False], "a timing under deterministic kernels is not what a user would have"
