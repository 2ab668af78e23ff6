"""A plan says what would happen and what it costs, and changes nothing."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from bench.artifacts import ArtifactCache
from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.launch.plan import DEFAULT_RATE, SECONDS_PER_CELL, PlannedCell, estimate_seconds, observed_rate, plan
from bench.launch.sweep import expand
from bench.locks import hold
from bench.provenance import collect
from bench.results import ResultStore, RunResult, Status, TrainingStage
from bench.runner import Mode
from tests.checkpoints import QUICK, task_file, tiny_checkpoint

ROWS = 60


class World:
    """A tiny task and checkpoint, an empty store and an empty cache."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, ResultStore(folder / "results", "study")
        self.where = Surroundings(cache_dir=folder / "cache")
        self.task = task_file(folder / "mood", examples=ROWS)
        self.backbone = tiny_checkpoint(folder / "bert", "bert")

    def config(self, **values: Any) -> RunConfig:
        given = {**QUICK, "task": str(self.task), "backbone": str(self.backbone), "ratio": 2, **values}
        return RunConfig.build(given)

    def plan(self, *configs: RunConfig, mode: Mode = "missing") -> list[PlannedCell]:
        return plan(configs, self.store, self.where, mode)

    def run_id(self, config: RunConfig) -> str:
        return Cell.resolve(config, self.where).run_id

    def put(self, config: RunConfig, status: Status, **fields: Any) -> Path:
        """Store a result of ``config``."""
        cell = Cell.resolve(config, self.where)
        return self.store.write(
            RunResult(
                run_id=cell.run_id,
                study="study",
                status=status,
                config=config.model_dump(mode="json"),
                identity=dict(cell.identity),
                provenance=collect([]),
                **fields,
            )
        )

    def keep(self, kind: str, config: RunConfig) -> None:
        """Put an artifact of ``config`` into the cache."""
        cell = Cell.resolve(config, self.where)
        teacher = config.teacher_identity(cell.revisions["data"], cell.revisions["model"])
        identity = teacher if kind == "teacher" else cell.identity
        ArtifactCache(self.where.artifacts).get(kind, identity, lambda folder, checkpoint: {})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any use of the network fail."""

    def refuse(*_: object) -> None:
        raise AssertionError("a plan used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_states(world: World) -> None:
    settings: dict[str, dict[str, Any]] = {
        "to do": {"seed": 0},
        "done": {"seed": 1},
        "failed": {"seed": 2},
        "diverged": {"seed": 3},
        "interrupted": {"seed": 4},
        "killed": {"seed": 5},
        "running": {"seed": 6},
        "skipped": {"seed": 7, "ratio": 2.5},
        "no such task": {"seed": 8, "task": "ss2"},
        "torn": {"seed": 9},
    }
    configs = {name: world.config(**values) for name, values in settings.items()}
    world.put(configs["done"], "done")
    world.put(configs["failed"], "failed", reason="out of luck")
    world.put(configs["diverged"], "diverged", reason="the loss became nan")
    world.put(configs["interrupted"], "interrupted")
    world.put(configs["killed"], "running")
    world.put(configs["running"], "running")
    torn = world.put(configs["torn"], "done")
    torn.write_text(torn.read_text()[:200])
    with hold(world.store.lock_path(world.run_id(configs["running"]))):
        cells = dict(zip(configs, world.plan(*configs.values()), strict=True))
    assert {name: cell.state for name, cell in cells.items()} == {
        **{name: name for name in ("to do", "done", "failed", "diverged", "interrupted", "running", "skipped")},
        "killed": "interrupted",
        "no such task": "error",
        "torn": "to do",
    }
    assert [name for name, cell in cells.items() if cell.pending] == [
        "to do",
        "interrupted",
        "killed",
        "running",
        "torn",
    ]
    assert (cells["failed"].reason, cells["diverged"].reason) == ("out of luck", "the loss became nan")
    assert "2.5" in cells["skipped"].reason and cells["skipped"].remaining is None and cells["skipped"].knob == ""
    assert "Did you mean 'sst2'" in cells["no such task"].reason
    assert str(torn) in cells["torn"].reason


@pytest.mark.parametrize(
    ("mode", "to_do"),
    [("missing", ["new"]), ("retry-failed", ["new", "failed"]), ("force", ["new", "failed", "done"])],
)
def test_modes(world: World, mode: Mode, to_do: list[str]) -> None:
    configs = {name: world.config(seed=i) for i, name in enumerate(["new", "failed", "done"])}
    world.put(configs["failed"], "failed")
    world.put(configs["done"], "done")
    cells = world.plan(*configs.values(), mode=mode)
    assert [name for name, cell in zip(configs, cells, strict=True) if cell.state == "to do"] == to_do


def test_a_plan_writes_no_result_and_trains_nothing(world: World) -> None:
    world.plan(world.config(), world.config(method="dense"))
    assert not world.store.folder.exists()
    assert not world.where.artifacts.exists()


def test_remaining_and_added_are_those_of_the_formulas(world: World) -> None:
    """The sums of docs/measuring.md, written out once more, for BERT of width 384 with 6 layers, k = 2, 4, 8."""
    n, d, f, layers, r = 128, 384, 1536, 6, 48
    attention, ffn = 4 * n * d * d + 2 * n * n * d, 2 * n * d * f
    ratios = (2, 4, 8)
    cells = world.plan(*(world.config(backbone="minilm-l6", ratio=k, bottleneck=r) for k in ratios))
    for k, cell in zip(ratios, cells, strict=True):
        m = n // k
        compressed = attention + 2 * m * d * f
        compressed += m * k * k * d + m * k * d  # scores, weighted mean
        compressed += m * d * r + m * k * d * r + m * k * r * d  # adapter, split form
        assert cell.remaining == pytest.approx(compressed / (attention + ffn), rel=1e-12)
        scores, adapter = k * d * k + k, 2 * d * r + r + r * d + d
        assert cell.added == layers * (scores + adapter)
        assert cell.knob == f"k={k}"
        assert cell.encoder_gflops == pytest.approx(2 * layers * (attention + ffn) / 1e9, rel=1e-12)


def test_the_papers_backbone_costs_what_its_architecture_says(world: World) -> None:
    cells = world.plan(*(world.config(backbone="t5-base", ratio=k, bottleneck=64) for k in (2, 4, 8)))
    assert [round(100 * (c.remaining or 0), 1) for c in cells] == [69.3, 52.9, 44.8]
    assert [round(100 * (c.added or 0) / (c.parameters or 1), 2) for c in cells] == [0.81, 0.86, 1.06]


@pytest.mark.usefixtures("offline")
def test_the_largest_backbones_are_priced_without_network_or_weights(world: World) -> None:
    cells = plan(
        expand({"backbone": ["t5-3b", "t5-11b"], "ratio": [2, 4, 8], "task": ["squad"]}), world.store, world.where
    )
    assert [cell.state for cell in cells] == ["to do"] * 6
    assert [cell.weight_bytes for cell in cells] == [4 * (cell.parameters or 0) for cell in cells]
    assert [round((cells[i].parameters or 0) / 1e9, 1) for i in (0, 3)] == [2.9, 11.3]
    assert cells[3].encoder_gflops == pytest.approx(1262.72, abs=0.01)


def test_the_teacher_of_several_cells_is_counted_once(world: World) -> None:
    dense, two, four = world.plan(world.config(method="dense"), world.config(ratio=2), world.config(ratio=4))
    alone = {k: world.plan(world.config(ratio=k))[0].flops for k in (2, 4)}
    assert dense.flops > 0 and two.flops == four.flops > 0
    assert alone == {2: dense.flops + two.flops, 4: dense.flops + four.flops}
    other = world.plan(world.config(method="dense"), world.config(method="dense", seed=1))
    assert [cell.flops for cell in other] == [dense.flops, dense.flops]


def test_training_flops_are_steps_times_examples_times_passes(world: World) -> None:
    """Dense: epochs x examples x 3 passes. Adaptation: steps x batch x 4 passes, at the same mean length."""
    dense, two = world.plan(world.config(method="dense", teacher_epochs=2), world.config(steps=7, batch_size=5))
    assert dense.flops / (2 * ROWS * 3) == pytest.approx((two.flops - dense.flops / 2) / (7 * 5 * 4), rel=1e-12)
    [more] = world.plan(world.config(method="dense", train_examples=15))
    assert more.flops == pytest.approx(dense.flops / 2 * 15 / ROWS)


def test_pre_training_is_counted_once_for_all_tasks(world: World, tmp_path: Path) -> None:
    other = task_file(tmp_path / "other", examples=ROWS + 1)
    settings = {"pretrain_steps": 50, "pretrain_batch_size": 4, "pretrain_length": 32}
    first, second = world.plan(world.config(**settings), world.config(task=str(other), **settings))
    without = world.plan(world.config(), world.config(task=str(other)))
    assert first.flops > without[0].flops
    assert second.flops == without[1].flops
    [eight] = world.plan(world.config(ratio=8, **settings))
    assert eight.flops == first.flops, "another k has a plugin of its own to pre-train"


def test_what_is_cached_is_shown_and_not_counted(world: World) -> None:
    config = world.config()
    [fresh] = world.plan(config)
    world.keep("teacher", config)
    [taught] = world.plan(config)
    world.keep("plugin", config)
    [both] = world.plan(config)
    assert (fresh.cached, taught.cached, both.cached) == ((), ("teacher",), ("teacher", "plugin"))
    assert fresh.flops > taught.flops > both.flops == 0


def test_the_estimate_uses_the_stores_own_rate(world: World) -> None:
    cells = world.plan(world.config(), world.config(seed=1), world.config(ratio=1))
    flops = sum(cell.flops for cell in cells)
    assert observed_rate(world.store) is None
    assert estimate_seconds(cells, None) == pytest.approx(flops / DEFAULT_RATE + 2 * SECONDS_PER_CELL)
    stage = {"name": "adapt", "artifact": "plugin-1", "steps": 1, "examples": 1}
    made = TrainingStage(**stage, cached=False, flops=6_000, seconds=3.0)
    found = TrainingStage(**stage, cached=True, flops=10**9, seconds=0.001)
    world.put(world.config(seed=8), "done", training=[made, found])
    torn = world.put(world.config(seed=9), "done", training=[found])
    torn.write_text("{")
    assert observed_rate(world.store) == 2_000
    assert estimate_seconds(cells, 2_000.0) == pytest.approx(flops / 2_000 + 2 * SECONDS_PER_CELL)


def test_a_lock_that_nobody_holds_is_no_running_cell(world: World) -> None:
    config = world.config()
    world.put(config, "running")
    lock = world.store.lock_path(world.run_id(config))
    with hold(lock):
        assert world.plan(config)[0].state == "running"
    assert world.plan(config)[0].state == "interrupted"
