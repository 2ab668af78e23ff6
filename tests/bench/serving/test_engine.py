"""An engine answers as each of its models does alone, and its calibration is of what it answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench.methods.variator
from bench.backbones.model import TaskModel
from bench.cell import Cell, Surroundings
from bench.context import RunContext, Teacher
from bench.determinism import deterministic
from bench.errors import ConfigError
from bench.execution import rebuild
from bench.methods.base import Method
from bench.methods.dense import Dense
from bench.plugins.plugin import Plugin
from bench.progress import Silent
from bench.registry import methods
from bench.serving import calibrate as calibration
from bench.serving.calibrate import calibrate
from bench.serving.engine import Engine, load_engine
from bench.tasks.data import TaskData, load_task
from bench.tasks.evaluation import MODEL_INPUTS, evaluate
from bench.tasks.features import collate
from bench.training.teacher import get_teacher
from tests.checkpoints import context, quick_config, random_plugin, task_file, tiny_checkpoint

QUESTIONS = {"kind": "qa", "text": "other", "text_pair": "text", "label": "answer", "labels": None,
             "prompt": '"{text} {text_pair}"'}  # fmt: skip
NUMBERS = {"kind": "regression", "label": "number", "labels": None, "label_words": '["0", "1", "2", "3"]'}
WIDE = {"intermediate_size": 512, "num_hidden_layers": 4}
"""A budget of any k is then within a rival's reach, as it is on real backbones."""


@dataclass(frozen=True)
class Served:
    """An engine and the cells that it was made of."""

    cells: list[Cell]
    where: Surroundings
    engine: Engine

    def alone(self, k: int) -> TaskModel:
        """Return the model of a cell, or the teacher, made by itself from the cache."""
        _, teacher, model = rebuild(next(c for c in self.cells if k in (1, c.config.ratio)), self.where)
        return teacher.model if k == 1 else model

    def logits(self, model: TaskModel) -> torch.Tensor:
        """Return what a model makes of the whole dev split in one batch."""
        ctx = self.engine.ctx
        batch = collate(ctx.features["dev"], ctx.tokenizer.pad_token_id)
        with torch.inference_mode():
            return model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}).logits


def serve(
    folder: Path, family: Any, method: str, ratios: tuple[float, ...] = (2, 4), task: Any = None, **options: Any
) -> Served:
    """Make an engine on a tiny backbone and task, which it learns."""
    shape = WIDE if family == "bert" else {}
    backbone = folder / family
    if not backbone.exists():
        tiny_checkpoint(backbone, family, **shape)
    file = task_file(folder / f"task-{family}-{method}", examples=40, **(task or {}))
    values = {"teacher_epochs": 25.0, "max_length": 64, **options}
    configs = [quick_config(file, backbone, method=method, ratio=ratio, **values) for ratio in ratios]
    where = Surroundings(cache_dir=folder / "cache", device="cpu")
    cells = [Cell.resolve(config, where) for config in configs]
    return Served(cells, where, load_engine(cells, where, Silent()))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Fit plugins on a tenth of the tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.methods.variator, "FIT_TOKENS", 2000)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def bank(folder: Path) -> Served:
    """Return an engine whose plugins, random and large, change some answers."""
    made = serve(folder, "bert", "variator", (4, 2))
    for cell in made.cells:
        artifact, k = made.engine.ctx.cache.find("plugin", cell.identity), int(cell.config.ratio or 0)
        assert artifact
        random_plugin(made.alone(1), k, std=0.5).save_pretrained(artifact.folder)
    return Served(made.cells, made.where, load_engine(made.cells, made.where, Silent()))


@pytest.fixture(scope="module")
def rival(folder: Path) -> Served:
    return serve(folder, "bert", "pruning")


def test_a_bank_is_one_model_that_is_each_of_its_models(bank: Served) -> None:
    engine = bank.engine
    assert engine.ks == (1, 2, 4), "ascending, whatever the order of the cells"
    assert len({id(engine.select(k)) for k in engine.ks}) == 1
    own = {k: bank.logits(bank.alone(k)) for k in engine.ks}
    for k in (4, 1, 2, 1, 4):
        torch.testing.assert_close(bank.logits(engine.select(k)), own[k], atol=1e-6, rtol=1e-5)
    assert torch.equal(bank.logits(engine.select(1)), own[1]), "k = 1 is the dense path to the bit"
    assert not any(torch.allclose(own[a], own[b], atol=1e-4) for a, b in ((1, 2), (1, 4), (2, 4)))


def test_a_rival_is_its_models_one_beside_another(rival: Served) -> None:
    engine = rival.engine
    assert len({id(engine.select(k)) for k in engine.ks}) == 3
    for k in engine.ks:
        assert torch.equal(rival.logits(engine.select(k)), rival.logits(rival.alone(k)))


def test_models_are_the_runs_that_they_come_from(bank: Served) -> None:
    ctx, teacher, _ = rebuild(bank.cells[0], bank.where)
    sources = {1: teacher.artifact.key} | {int(cell.config.ratio or 0): cell.run_id for cell in bank.cells}
    assert {model.k: model.source for model in bank.engine.models} == sources
    remaining = [model.remaining for model in bank.engine.models]
    assert remaining[0] == 1 and remaining == sorted(remaining, reverse=True)
    assert bank.engine.models[2].remaining == ctx.setting.remaining
    assert [model.config["ratio"] for model in bank.engine.models[1:]] == [2, 4]


def test_a_bank_holds_the_dense_model_and_its_plugins(bank: Served) -> None:
    """As many bytes as their files' tensors have, which nobody counts by address."""
    dense = sum(t.nbytes for t in {t.data_ptr(): t for t in bank.alone(1).state_dict(keep_vars=True).values()}.values())
    buffers = sum(t.nbytes for name, t in bank.alone(1).named_buffers() if name not in bank.alone(1).state_dict())
    plugins = 0
    for cell in bank.cells:
        artifact = bank.engine.ctx.cache.find("plugin", cell.identity)
        assert artifact
        plugins += sum(t.nbytes for t in Plugin.from_pretrained(artifact.folder).state_dict().values())
    assert plugins > 0
    assert bank.engine.resident_bytes == dense + buffers + plugins


def test_a_rival_holds_every_storage_that_its_models_have(rival: Served) -> None:
    models = [rival.engine.select(k) for k in rival.engine.ks]
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert rival.engine.resident_bytes == sum(storages.values())
    dense = sum(t.nbytes for t in (*models[0].parameters(), *models[0].buffers()))
    assert rival.engine.resident_bytes > 1.3 * dense


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("which", ["bank", "rival"])
def test_scores_are_the_metric(which: str, k: int, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(which)
    engine = served.engine
    metric, frame = reference(served, k)
    places = np.random.default_rng(k).permutation(len(frame))
    found = engine.run(k, places.tolist())
    assert found.dtype == np.float32 and found.shape == (len(frame),)
    np.testing.assert_array_equal(found, (frame.prediction == frame.label).to_numpy(np.float32)[places])
    assert float(found.mean()) == pytest.approx(metric["accuracy"].value)


def reference(served: Served, k: int) -> tuple[dict[str, Any], Any]:
    """Return the metrics of the model at k and a row for each dev example, as a run evaluates it."""
    ctx = served.engine.ctx
    found, frame = evaluate(
        served.alone(k), served.engine.examples, ctx.features["dev"], ctx.task, ctx.spec.family, ctx.tokenizer,
        resamples=2,
    )  # fmt: skip
    return found.metrics, frame


@pytest.mark.parametrize("task", [{}, QUESTIONS], ids=["classes", "questions"])
def test_text_to_text_models_serve(tmp_path: Path, task: dict[str, Any]) -> None:
    served = serve(tmp_path, "t5", "variator", (2,), task, teacher_epochs=15.0, teacher_lr=5e-3)
    engine = served.engine
    for k in (1, 2):
        metric, frame = reference(served, k)
        scores = engine.run(k, range(len(frame)))
        name = "token_f1" if task else "accuracy"
        assert float(scores.mean()) == pytest.approx(metric[name].value)
        answers = engine.answer(k, engine.ctx.features["dev"])
        assert answers == frame.prediction.tolist()


def test_an_answer_to_a_question_earns_what_it_shares(tmp_path: Path) -> None:
    """Half of the words right is worth two thirds: precision 1, recall 1/2."""
    from bench.serving.engine import scores

    backbone = tiny_checkpoint(tmp_path / "t5", "t5")
    ctx = context(quick_config(task_file(tmp_path / "t", **QUESTIONS), backbone, method="dense"), tmp_path / "cache")
    example = load_task(ctx.task, None, None).dev[0]
    said = replace(example, answers=("very good", "bad"))
    assert scores(["good", "bad", "none"], [said] * 3, ctx.task).tolist() == pytest.approx([2 / 3, 1, 0])


@pytest.mark.parametrize(
    ("family", "task", "words"),
    [
        ("bert", NUMBERS, "has answers that are numbers"),
        ("t5", NUMBERS, "has answers that are numbers"),
        ("bert", QUESTIONS, "with a bert backbone has answers that are put together from several inputs"),
    ],
)
def test_what_cannot_be_scored_alone_is_refused(family: str, task: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"mood .*{words}; choose a task of classification") as raised:
        serve(tmp_path, family, "variator", (2,), task)
    assert not (tmp_path / "cache").exists(), "before anything is trained"
    assert "text-to-text question answering" in str(raised.value)


class Drawn(Dense):
    """A method of another package that draws from the global generator."""

    seen: list[float] = []  # noqa: RUF012
    skip = Method.skip

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        self.seen.append(float(torch.rand(())))
        return teacher.model


def test_what_is_trained_here_is_what_a_run_trains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chance is that of the cell, whatever was drawn before, and kernels are deterministic."""
    monkeypatch.setitem(methods(), "drawn", Drawn)
    Drawn.seen.clear()
    torch.manual_seed(5)
    served = serve(folder, "bert", "drawn", (2, 4), teacher_epochs=1.0)
    with deterministic(0):
        rebuild(served.cells[0], served.where)
    assert len(set(Drawn.seen)) == 1 and len(Drawn.seen) == 3
    assert not torch.are_deterministic_algorithms_enabled()


def test_calibration(bank: Served, rival: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each engine; of every k the stated shapes, timed as often as stated, and the answers of the dev split."""
    monkeypatch.setattr(calibration, "SAMPLES", 2)
    seen: dict[str, Counter[tuple[int, int]]] = {"variator": Counter(), "pruning": Counter()}
    hooks = []
    for name, model in [("variator", bank.engine.select(1))] + [("pruning", rival.engine.select(k)) for k in (1, 2, 4)]:

        def note(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
            seen[name][tuple(kwargs["input_ids"].shape)] += 1

        hooks.append(model.register_forward_pre_hook(note, with_kwargs=True))
    made = calibrate([bank.engine, rival.engine], max_batch=3)
    for hook in hooks:
        hook.remove()
    assert [c.engine for c in made] == ["variator", "pruning"]
    features = bank.engine.ctx.features["dev"]
    lengths = [len(feature["input_ids"]) for feature in features]
    for served, found in zip((bank, rival), made, strict=True):
        assert found.sizes == [1, 2, 3]
        assert found.lengths == sorted(set(found.lengths)) and len(found.lengths) == 4
        assert found.lengths[-1] == max(lengths) and found.lengths[0] < np.median(lengths)
        assert set(found.lengths) <= set(lengths)
        assert np.array(found.seconds).shape == (3, 3, 4, 2) and np.array(found.seconds).min() > 0
        assert found.examples == lengths and found.resident_bytes == served.engine.resident_bytes
        for size in found.sizes:
            for length in found.lengths:
                assert seen[found.engine][size, length] >= 3 * (2 + calibration.WARM_UP)
        assert [model.k for model in found.models] == [1, 2, 4]
        for model, scores in zip(found.models, found.scores, strict=True):
            metric, frame = reference(served, model.k)
            assert scores == (frame.prediction == frame.label).astype(float).tolist()
            assert model.accuracy == pytest.approx(metric["accuracy"].value)
    assert made[0].scores[0] == made[1].scores[0], "the dense model is one"
    assert made[0].scores[0] != made[0].scores[1] != made[0].scores[2], "or a row of another k would not show"


def test_a_teacher_is_one_for_all_engines(bank: Served, rival: Served) -> None:
    assert bank.engine.models[0].source == rival.engine.models[0].source == get_teacher(bank.engine.ctx).artifact.key
