"""Variator from a teacher to a plugin on the disk, with and without pre-training, on both families."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.backbones.sites import digest
from bench.context import RunContext, Teacher
from bench.errors import ConfigError
from bench.measure.closed_form import PluginShape, encoder
from bench.methods import variator
from bench.plugins.bank import CompressedFFN
from bench.plugins.plugin import WEIGHTS_FILE, Plugin
from bench.tasks.data import load_task
from bench.training.stage import FeatureBatches, model_inputs
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, context, quick_config, task_file, tiny_checkpoint
from tests.tiny import WORDS


class World:
    """A task, a corpus and a checkpoint of one family."""

    def __init__(self, folder: Path, family: Any) -> None:
        self.folder, self.task = folder, task_file(folder / "task")
        self.backbone = tiny_checkpoint(folder / "tiny", family)
        self.corpus = folder / "corpus.txt"
        self.corpus.write_text("\n".join(" ".join(WORDS[i % 30 :]) for i in range(60)))

    def context(self, cache: str = "cache", **values: Any) -> RunContext:
        config = quick_config(self.task, self.backbone, **{"method": "variator", "ratio": 2, **values})
        return context(config, self.folder / cache)

    def pretraining(self, **values: Any) -> dict[str, Any]:
        return {"pretrain_steps": 5, "pretrain_corpus": str(self.corpus), "pretrain_batch_size": 4,
                "pretrain_length": 24, **values}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variator, "FIT_TOKENS", 2000)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("variator"), request.param)


def compress(ctx: RunContext) -> tuple[Any, Teacher]:
    teacher = get_teacher(ctx)
    return ctx.config.build_method().compress(teacher, load_task(ctx.task), ctx), teacher


def plugin_of(model: Any, k: int = 2) -> list[Any]:
    return [p.detach().clone() for m in model.modules() if isinstance(m, CompressedFFN) for p in m.pair(k).parameters()]


def test_what_it_leaves(world: World) -> None:
    ctx = world.context()
    model, teacher = compress(ctx)
    before = digest(teacher.model)
    stored = Plugin.from_pretrained(ctx.cache.root / ctx.cache.key("plugin", ctx.identity))
    assert stored.config.k == 2 and stored.config.bottleneck == 8
    assert ctx.trained_parameters == stored.num_parameters()
    weights = ctx.cache.root / ctx.cache.key("plugin", ctx.identity) / WEIGHTS_FILE
    assert ctx.bytes_added == weights.stat().st_size
    assert [(s.name, s.steps, s.examples, s.cached) for s in ctx.stages[1:]] == [("adapt", 6, 48, False)]
    assert digest(teacher.model) == before == digest(compress(world.context(cache="other"))[1].model)
    batch = model_inputs(FeatureBatches(ctx.features["dev"], 8, ctx.tokenizer.pad_token_id, 0, ctx.device)(0))
    with torch.no_grad():
        compressed, dense = model(**batch).logits, teacher.model(**batch).logits
        with stored.attached(teacher.model):
            again = teacher.model(**batch).logits
    assert torch.equal(compressed, again) and not torch.equal(compressed, dense)
    assert {p.data_ptr() for p in teacher.model.parameters()} < {p.data_ptr() for p in model.parameters()}
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_saving_is_executed(world: World) -> None:
    """The frozen FFN of every layer is given half of the rows."""
    ctx = world.context()
    model, _ = compress(ctx)
    rows: list[int] = []
    for module in model.modules():
        if isinstance(module, CompressedFFN):
            module.inner.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[1]))
    feature = max(ctx.features["dev"], key=lambda f: len(f["input_ids"]))
    n = len(feature["input_ids"])
    batches = FeatureBatches([feature], 1, ctx.tokenizer.pad_token_id, 0, ctx.device)
    with torch.no_grad():
        model(**model_inputs(batches(0)))
    assert rows == [-(-n // 2)] * ctx.spec.encoder_layers
    assert encoder(ctx.spec, n, plugin=PluginShape(2, 8)).encoder != encoder(ctx.spec, n).encoder


def test_a_finished_plugin_is_found_and_not_trained_again(world: World) -> None:
    first, _ = compress(world.context(steps=4))
    ctx = world.context(steps=4)
    second, _ = compress(ctx)
    assert all(torch.equal(a, b) for a, b in zip(plugin_of(first), plugin_of(second), strict=True))
    assert all(stage.cached for stage in ctx.stages) and [s.name for s in ctx.stages] == ["teacher", "adapt"]


@pytest.mark.parametrize("pretrained", [False, True])
def test_two_fresh_caches_give_the_same_bits(world: World, pretrained: bool) -> None:
    values = world.pretraining() if pretrained else {}
    plugins = []
    for name in ("one", "two"):
        shutil.rmtree(world.folder / name, ignore_errors=True)
        torch.manual_seed(len(name) + len(plugins))  # what was drawn before plays no part
        plugins.append(plugin_of(compress(world.context(cache=name, **values))[0]))
    assert all(torch.equal(a, b) for a, b in zip(*plugins, strict=True))


SETTINGS: list[dict[str, Any]] = [
    {"seed": 1},
    {"steps": 7},
    {"batch_size": 4},
    {"mask_padding": False},
    {"init": "released"},
    {"lr": 5e-3},
    {"decay": "constant"},
    {"warmup": 0.5},
    {"weight_decay": 0.5},
    {"clip": 1e-3},
    {"losses": "logits=1"},
    {"temperature": 3.0},
    {"precision": "bf16"},
]


@pytest.mark.parametrize("change", SETTINGS, ids=str)
def test_every_setting_changes_the_plugin(world: World, change: dict[str, Any]) -> None:
    base = {"losses": "all_hidden=1,logits=5", "clip": 0.1}
    first, other = (plugin_of(compress(world.context(**values))[0]) for values in (base, base | change))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_settings_of_the_layers_are_those_of_the_plugin(world: World) -> None:
    model, _ = compress(world.context(ratio=4, bottleneck=5, mask_padding=False))
    for pair in (m.pair(4) for m in model.modules() if isinstance(m, CompressedFFN)):
        assert (pair.k, pair.w2.in_features, pair.mask_padding) == (4, 5, False)


def test_without_steps_it_is_the_start(world: World) -> None:
    ctx = world.context(steps=0)
    model, _ = compress(ctx)
    assert [stage.name for stage in ctx.stages] == ["teacher"]
    assert not any(m.pair(2).score.weight.any() for m in model.modules() if isinstance(m, CompressedFFN))
    released = world.context(steps=0, init="released")
    model, _ = compress(released)
    stds = [m.pair(2).score.weight.std().item() for m in model.modules() if isinstance(m, CompressedFFN)]
    assert stds == pytest.approx([(2 / 64) ** 0.5] * 2, rel=0.25)


def test_pre_training_is_shared_by_tasks_and_adaptations(world: World) -> None:
    first = world.context(cache="pre", **world.pretraining())
    compress(first)
    assert [(s.name, s.cached, s.steps, s.examples) for s in first.stages[1:]] == [
        ("pretrain", False, 5, 20),
        ("adapt", False, 6, 48),
    ]
    second = world.context(cache="pre", **world.pretraining(lr=5e-3, losses="logits=1"))
    compress(second)
    assert [(s.name, s.cached) for s in second.stages[1:]] == [("pretrain", True), ("adapt", False)]
    assert first.stages[1].artifact == second.stages[1].artifact
    third = world.context(cache="pre", **world.pretraining(pretrain_lr=5e-3))
    compress(third)
    assert not third.stages[1].cached and third.stages[1].artifact != first.stages[1].artifact


def test_a_pre_trained_plugin_starts_the_adaptation(world: World) -> None:
    ctx = world.context(cache="pre", steps=0, **world.pretraining())
    model, _ = compress(ctx)
    stored = Plugin.from_pretrained(ctx.cache.root / ctx.stages[1].artifact)
    assert all(torch.equal(a, b) for a, b in zip(plugin_of(model), stored.parameters(), strict=True))


def test_pre_training_refuses_a_loss_that_needs_a_task(world: World) -> None:
    with pytest.raises(ConfigError, match="unknown loss part 'logits'"):
        compress(world.context(**world.pretraining(pretrain_losses="logits=1")))


def test_a_bottleneck_wider_than_the_backbone(world: World) -> None:
    model, _ = compress(world.context(bottleneck=64))
    assert all(p.isfinite().all() for p in plugin_of(model))
