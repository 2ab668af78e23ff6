"""Whole runs on tiny checkpoints of both families: what they leave, when they are done again, and how they fail."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import bench.costing
from bench.backbones.catalogue import spec_of
from bench.cell import Surroundings
from bench.config import RunConfig
from bench.errors import BenchError, DataError
from bench.measure.closed_form import remaining
from bench.methods import variator
from bench.methods.base import Method
from bench.plugins.plugin import WEIGHTS_FILE
from bench.progress import Silent
from bench.registry import methods
from bench.results import ResultStore, RunResult
from bench.runner import Mode, is_settled, run
from bench.tasks.data import load_task
from bench.tasks.own import read_own
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint
from tests.workers import quick_measuring

WIDE: dict[str, dict[str, int]] = {"bert": {"intermediate_size": 256}, "t5": {"d_ff": 256}}


class World:
    """A task, checkpoints of both families, a cache and a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.task = task_file(folder / "task")
        self.backbones = {family: tiny_checkpoint(folder / family, family, **WIDE[family]) for family in FAMILIES}
        self.store = ResultStore(folder / "results", "study")

    def config(self, family: Family = "bert", **values: Any) -> RunConfig:
        return quick_config(self.task, self.backbones[family], **{"bottleneck": 64, **values})

    def run(self, config: RunConfig, mode: Mode = "missing", cache: str = "cache", **kwargs: Any) -> RunResult:
        where = Surroundings(cache_dir=self.folder / cache, device="cpu")
        return run(config, kwargs.pop("store", self.store), where, mode, **kwargs)

    def frame(self, result: RunResult, store: ResultStore | None = None) -> pd.DataFrame:
        assert result.predictions is not None
        return pd.read_parquet((store or self.store).folder / result.predictions)

    def plant(self, result: RunResult) -> None:
        """Change the stored result, so that it can be told from one that is made anew."""
        self.store.write(result.model_copy(update={"notes": ["planted"]}))


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for module, names in ((bench.costing, ("TIMED_BATCH_SIZES", "TIMED_LENGTH")), (variator, ("FIT_TOKENS",))):
            for name in names:
                patch.setattr(module, name, getattr(module, name))  # put back afterwards
        quick_measuring()
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("runner"))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: Any, world: World) -> tuple[World, Family, RunResult, RunResult]:
    dense = world.run(world.config(request.param, method="dense"))
    return world, request.param, dense, world.run(world.config(request.param, ratio=2))


Pair = tuple[World, Family, RunResult, RunResult]


def test_runs_are_done_and_stored_as_they_are_returned(pair: Pair) -> None:
    world, _, *results = pair
    for result in results:
        assert result.status == "done", result.traceback
        assert world.store.read(result.run_id) == result
        assert result.reason is None and result.traceback is None
        assert result.provenance.seconds is not None and result.provenance.seconds > 0


def test_achieved_is_requested_to_the_last_flop(pair: Pair) -> None:
    world, family, dense, compressed = pair
    assert dense.cost is not None and compressed.cost is not None
    assert dense.cost.requested_remaining is None and dense.cost.achieved_remaining == 1.0
    assert compressed.cost.achieved_remaining == compressed.cost.requested_remaining
    ctx = context(world.config(family, ratio=2), world.folder / "cache")
    lengths: dict[int, int] = {}
    for feature in ctx.features["dev"]:
        lengths[len(feature["input_ids"])] = lengths.get(len(feature["input_ids"]), 0) + 1
    expected = remaining(spec_of(str(world.backbones[family])), 2, lengths)
    assert compressed.cost.achieved_remaining == expected < 1
    assert compressed.cost.real.compressed.overhead > 0 == dense.cost.real.compressed.overhead


def test_parameters_and_bytes_add_up(pair: Pair) -> None:
    world, _, dense, compressed = pair
    assert dense.cost is not None and compressed.cost is not None
    cost = compressed.cost
    weights = world.folder / "cache" / "artifacts" / compressed.training[-1].artifact / WEIGHTS_FILE
    assert cost.bytes_added == weights.stat().st_size
    plugin = 2 * ((2 * 32 + 1) * 2 + 3 * 64 * 32 + 64 + 32)
    assert cost.parameters_added == cost.parameters_trained == plugin
    assert cost.parameters_total == cost.parameters_teacher + plugin
    assert dense.cost.parameters_total == dense.cost.parameters_teacher == cost.parameters_teacher
    assert (dense.cost.parameters_added, dense.cost.parameters_trained, dense.cost.bytes_added) == (0, 0, 0)


def test_predictions_are_those_of_the_metrics(pair: Pair) -> None:
    world, _, *results = pair
    dev = load_task(read_own(world.task)).dev
    for result in results:
        frame = world.frame(result)
        assert list(frame["id"]) == [example.id for example in dev]
        assert list(frame["label"]) == [example.label for example in dev]
        evaluation = result.evaluation("dev")
        assert evaluation is not None and evaluation.n_examples == len(dev) == 60
        accuracy = evaluation.metrics["accuracy"]
        assert accuracy.value == pytest.approx((frame["prediction"] == frame["label"]).mean())
        assert accuracy.low <= accuracy.value <= accuracy.high
        assert result.evaluation("selection") is not None


def test_the_teacher_is_the_dense_run(pair: Pair) -> None:
    _, _, dense, compressed = pair
    assert compressed.teacher_evaluations == dense.teacher_evaluations == [dense.evaluation("dev")]
    assert dense.training[0].artifact == compressed.training[0].artifact
    assert (dense.training[0].cached, compressed.training[0].cached) == (False, True)


def test_a_result_says_where_it_came_from(pair: Pair) -> None:
    world, family, _, compressed = pair
    assert compressed.knob == {"k": 2}
    assert [stage.name for stage in compressed.training] == ["teacher", "adapt"]
    assert compressed.config["backbone"] == family == world.backbones[family].name
    assert compressed.task == {"name": "mood", "kind": "single", "metrics": ["accuracy"], "caveat": ""}
    assert compressed.provenance.data_digest == load_task(read_own(world.task)).digest
    assert compressed.provenance.seeds == {"run": 0}
    assert len(compressed.latency) == len(compressed.memory) == 1
    assert str(world.folder) not in json.dumps(compressed.identity)


def test_a_stored_result_is_returned_and_nothing_is_trained(pair: Pair) -> None:
    world, family, _, compressed = pair
    world.plant(compressed)
    try:
        again = world.run(world.config(family, ratio=2), cache="another cache")
        assert again.notes == ["planted"]
        assert world.run(world.config(family, ratio=2), mode="read-only").notes == ["planted"]
        assert not (world.folder / "another cache").exists()
    finally:
        world.store.write(compressed)


def test_force_runs_again_to_the_same_number(pair: Pair) -> None:
    world, family, _, compressed = pair
    world.plant(compressed)
    again = world.run(world.config(family, ratio=2), mode="force")
    assert again.status == "done" and again.notes == []
    assert again.evaluations == compressed.evaluations
    assert world.store.read(again.run_id) == again


def test_read_only_runs_nothing(world: World) -> None:
    with pytest.raises(BenchError, match=r"no result for mood · bert · variator k=3 · seed 0 .*nothing may be run"):
        world.run(world.config(ratio=3), mode="read-only")


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_caches_give_the_same_bits(world: World, family: Family) -> None:
    frames, weights = [], []
    for name in ("one", "two"):
        store = ResultStore(world.folder / f"{name} {family}", "study")
        result = world.run(world.config(family, ratio=2, precision="bf16"), cache=f"{name} {family}", store=store)
        assert result.status == "done", result.traceback
        frames.append(world.frame(result, store))
        folder = world.folder / f"{name} {family}" / "artifacts"
        weights.append([(folder / stage.artifact).glob("*.safetensors") for stage in result.training])
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    for one, two in zip(*weights, strict=True):
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two] != []


KINDS: dict[str, dict[str, Any]] = {
    "pair": {"text_pair": "other", "prompt": '"{text} {text_pair} <extra_id_0>"', "metrics": "[accuracy, f1]"},
    "regression": {"kind": "regression", "labels": None, "label": "number", "metrics": "[pearson]"},
    "qa": {"kind": "qa", "labels": None, "label": "answer", "text_pair": "text", "text": "other",
           "prompt": '"{text} {text_pair}"'},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "family"), [("pair", "bert"), ("pair", "t5"), ("regression", "bert"), ("qa", "bert"), ("qa", "t5")]
)
def test_every_kind_of_task_runs(world: World, tmp_path: Path, kind: str, family: Family) -> None:
    task = task_file(tmp_path, examples=24, **KINDS[kind])
    settings = {"ratio": 2, "steps": 2, "bottleneck": 64, "losses": "all_hidden,logits,task"}
    config = quick_config(task, world.backbones[family], **settings)
    result = world.run(config)
    assert result.status == "done", result.traceback
    evaluation = result.evaluation("dev")
    assert evaluation is not None and evaluation.n_examples == 24 and result.cost is not None
    assert result.cost.achieved_remaining == result.cost.requested_remaining
    assert set(result.training[-1].history[-1]) == {"step", "lr", "loss", "all_hidden", "logits", "task"}


@dataclass(frozen=True)
class Failing(Method):
    """Fails in a way that its option names."""

    name = "failing"
    paper = "-"
    version = 1
    summary = trains = saves = "-"
    uses = frozenset()

    how: str = "bug"

    def compress(self, teacher: Any, data: Any, ctx: Any) -> Any:
        if self.how == "bug":
            return {}["nothing"]
        if self.how == "person":
            raise DataError("the corpus is not there.")
        raise KeyboardInterrupt


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods(), "failing", Failing)


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize(("how", "reason"), [("bug", "KeyError: 'nothing'"), ("person", "the corpus is not there.")])
def test_a_failure_is_a_result_with_reason_and_traceback(world: World, how: str, reason: str) -> None:
    config = world.config(method="failing", how=how)
    result = world.run(config)
    assert (result.status, result.reason) == ("failed", reason)
    assert result.traceback is not None and "in compress" in result.traceback
    assert world.store.read(result.run_id) == result
    world.plant(result)
    assert world.run(config).notes == ["planted"]
    assert world.run(config, mode="read-only").notes == ["planted"]
    again = world.run(config, mode="retry-failed")
    assert (again.status, again.notes) == ("failed", [])


@pytest.mark.usefixtures("failing")
def test_an_interrupted_run_is_noted_and_run_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.config(method="failing", how="interrupt")
    with pytest.raises(KeyboardInterrupt):
        world.run(config)
    (stored,) = [result for result in world.store if result.status == "interrupted"]
    assert stored.reason == "stopped by the user"
    monkeypatch.setattr(Failing, "compress", lambda self, teacher, data, ctx: teacher.model)
    again = world.run(config)
    assert (again.run_id, again.status) == (stored.run_id, "done")


def test_a_divergence_is_a_status(world: World) -> None:
    config = world.config(method="dense", teacher_lr=1e30, teacher_epochs=2.0)
    result = world.run(config)
    assert result.status == "diverged" and result.traceback is None
    assert result.reason is not None and "the loss became nan at step" in result.reason
    world.plant(result)
    assert world.run(config).notes == ["planted"]
    again = world.run(config, mode="retry-failed")
    assert (again.status, again.notes) == ("diverged", [])


def test_a_cell_that_makes_no_sense_is_skipped_with_its_reason(world: World) -> None:
    config = world.config(ratio=2.5)
    result = world.run(config, cache="untouched")
    assert result.status == "skipped" and result.reason is not None and "got 2.5" in result.reason
    assert not (world.folder / "untouched").exists()
    world.plant(result)
    assert world.run(config, mode="retry-failed").notes == ["planted"]


@pytest.mark.parametrize(
    ("status", "settled_in"),
    [
        ("done", {"missing", "retry-failed", "read-only"}),
        ("skipped", {"missing", "retry-failed", "read-only"}),
        ("failed", {"missing", "read-only"}),
        ("diverged", {"missing", "read-only"}),
        ("interrupted", {"read-only"}),
        ("running", {"read-only"}),
    ],
)
def test_when_a_stored_result_stands(pair: Pair, status: str, settled_in: set[str]) -> None:
    result = pair[2].model_copy(update={"status": status})
    modes: tuple[Mode, ...] = ("missing", "retry-failed", "force", "read-only")
    assert {mode for mode in modes if is_settled(result, mode)} == settled_in
    assert not any(is_settled(None, mode) for mode in modes)


def test_results_that_cannot_be_written_end_the_run_before_it_begins(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".locks").touch()
    for root, said in ((tmp_path / "file", "cannot read"), (tmp_path, "cannot write")):
        with pytest.raises(BenchError, match=rf"{said} {root}.*[Cc]hoose another folder"):
            world.run(world.config(method="dense"), store=ResultStore(root, "study"), cache="unused")
    assert not (world.folder / "unused").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_length": 600}, "max_length 600 of task 'mood' is beyond the 512 positions of backbone 'bert'"),
        ({"task": "nowhere.yaml"}, "nowhere.yaml"),
        ({"task": "sst3"}, "unknown task 'sst3'. Did you mean 'sst2'?"),
        ({"backbone": "t5-bsae"}, "Did you mean 't5-base'"),
    ],
)
def test_a_cell_that_cannot_be_resolved_says_why(
    world: World, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("bench.backbones.catalogue._from_hub", _out_of_reach)
    base = {"task": str(world.task), "backbone": str(world.backbones["bert"])}
    with pytest.raises(BenchError) as caught:
        world.run(RunConfig.build({**base, **values, "method": "dense"}))
    assert said in str(caught.value)


def _out_of_reach(name: str) -> Path:
    from bench.backbones.catalogue import known_backbones
    from bench.errors import BackboneError, suggest

    raise BackboneError(f"{name} is out of reach.{suggest(name, known_backbones())}")


def test_no_gpu_is_said_and_not_worked_around(world: World) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    result = run(
        world.config(method="dense", seed=8), world.store, Surroundings(cache_dir=world.folder / "cache", device="cuda")
    )
    assert result.status == "interrupted" and result.reason is not None and "torch sees no GPU" in result.reason


def test_progress_is_told_every_step(world: World) -> None:
    class Watcher(Silent):
        def __init__(self) -> None:
            self.stages: dict[str, list[int]] = {}

        def stage(self, name: str, total: int, weight: float = 0.0) -> None:
            self.stages[name] = [total, 0]
            self.current = name

        def advance(self, steps: int = 1, **numbers: float) -> None:
            self.stages[self.current][1] += steps

    watcher = Watcher()
    world.run(world.config(ratio=4, seed=9), progress=watcher)
    assert {"teacher", "fit", "adapt", "evaluate selection", "evaluate dev", "evaluate teacher"} <= set(watcher.stages)
    for name, (total, done) in watcher.stages.items():
        if name != "count FLOPs":
            assert done == total, name
