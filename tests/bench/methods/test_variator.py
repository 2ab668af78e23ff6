"""Variator from a teacher to a plugin on the disk, with and without pre-training, on both families."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import costing
from bench.artifacts import META_FILE
from bench.backbones.catalogue import spec_of
from bench.backbones.sites import digest
from bench.cell import Surroundings
from bench.context import RunContext, Teacher
from bench.errors import ConfigError
from bench.measure.closed_form import PluginShape, encoder, layer_macs, remaining
from bench.methods import variator
from bench.methods.variator import Variator
from bench.plugins.bank import CompressedFFN
from bench.plugins.fit import measure_units
from bench.plugins.plugin import WEIGHTS_FILE, Plugin
from bench.results import ResultStore
from bench.runner import run
from bench.tasks.data import load_task
from bench.training import distill, stage
from bench.training.loop import Checkpoint
from bench.training.stage import FeatureBatches, model_inputs
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, context, quick_config, task_file, tiny_checkpoint
from tests.tiny import WORDS

ROOT = Path(__file__).parents[3]


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
    scored = [bool(m.pair(2).score.weight.any()) for m in model.modules() if isinstance(m, CompressedFFN)]
    assert scored == [ctx.spec.family == "t5"] * 2
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
    made = json.loads((first.cache.root / first.stages[1].artifact / META_FILE).read_text("utf-8"))["identity"]
    assert made["method"] == f"variator@{2 if first.spec.family == 't5' else 1}"  # the start's version is the plugin's
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


PARAMETER_FREE: dict[str, Any] = {"compression": "mean", "decompression": "copy"}
VARIANTS: list[dict[str, Any]] = [
    {"compression": "mean"},
    {"compression": "conv"},
    {"decompression": "copy"},
    {"compression": "conv", "decompression": "copy"},
    {"attention_k": 3},
    {"attention_k": 3, "compression": "mean"},
]


@pytest.mark.parametrize("init", ["fit", "released"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_is_pre_trained_adapted_and_found_again(world: World, variant: dict[str, Any], init: str) -> None:
    ctx = world.context(cache="variants", ratio=4, init=init, **world.pretraining(**variant))
    model, teacher = compress(ctx)
    assert [(s.name, s.steps) for s in ctx.stages[1:]] == [("pretrain", 5), ("adapt", 6)]
    stored = Plugin.from_pretrained(ctx.cache.root / ctx.cache.key("plugin", ctx.identity))
    start = Plugin.from_pretrained(ctx.cache.root / ctx.stages[1].artifact)
    assert stored.config == start.config and digest(stored) != digest(start)
    assert all(getattr(stored.config, name) == value for name, value in variant.items())
    assert ctx.trained_parameters == stored.num_parameters() > 0
    inputs = batch_of(ctx)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(compress(ctx)[0](**inputs).logits, logits)
        with stored.attached(teacher.model):
            assert torch.equal(teacher.model(**inputs).logits, logits)


def batch_of(ctx: RunContext) -> dict[str, torch.Tensor]:
    return model_inputs(FeatureBatches(ctx.features["dev"], 8, ctx.tokenizer.pad_token_id, 0, ctx.device)(0))


@pytest.mark.parametrize("attention_k", [1, 2])
def test_without_a_parameter_a_run_trains_nothing_and_has_a_result(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention_k: int
) -> None:
    """From the config to the stored result, whatever is said of trainings."""
    monkeypatch.setattr(costing, "TIMED_BATCH_SIZES", (1,))
    monkeypatch.setattr(costing, "TIMED_LENGTH", 8)
    store = ResultStore(tmp_path, "study")
    shape = {"ratio": 2, "attention_k": attention_k, **PARAMETER_FREE}
    ids = set()
    for training in ({}, {"pretrain_steps": 500, "lr": 1.0, "batch_size": 2, "steps": 10_000, "bottleneck": 3}):
        config = world.context(**shape, **training).config
        result = run(config, store, Surroundings(cache_dir=world.folder / "free"))
        assert result.status == "done", result.traceback
        ids.add(result.run_id)
        assert config.build_method().work(config.steps, config.batch_size) == []
    assert len(ids) == 1
    assert [stage.name for stage in result.training] == ["teacher"]
    assert result.cost is not None and result.cost.parameters_added == result.cost.parameters_trained == 0
    assert result.cost.real.compressed.overhead == 0 < result.cost.bytes_added < 100
    assert result.cost.achieved_remaining != pytest.approx(result.cost.requested_remaining, rel=0.02)
    spec, cell = world.context(**shape).spec, world.context(**shape)
    setting = config.build_method().setting(spec, 2, cell.lengths("dev"))
    assert result.cost.achieved_remaining == pytest.approx(setting.remaining, rel=1e-12)
    assert [note for note in result.notes if "compression by mean, decompression by copy" in note]


def test_without_a_parameter_a_group_answers_as_one(world: World) -> None:
    """The stored plugin is its config; every position of a group is given the FFN's output at the mean."""
    ctx = world.context(ratio=2, **PARAMETER_FREE)
    model, _ = compress(ctx)
    stored = Plugin.from_pretrained(ctx.cache.root / ctx.cache.key("plugin", ctx.identity))
    assert stored.num_parameters() == 0 and stored.config.k == 2
    layer = next(m for m in model.modules() if isinstance(m, CompressedFFN))
    u = torch.randn(1, 5, 32)
    with torch.no_grad():
        z, means = layer(u), torch.stack([u[0, :2].mean(0), u[0, 2:4].mean(0), u[0, 4]])
        torch.testing.assert_close(z[0], layer.inner(means[None])[0].repeat_interleave(2, dim=0)[:5])


def test_without_adaptation_it_is_what_pre_training_left(world: World) -> None:
    """And shares the pre-trained plugin with runs that go on from there."""
    adapted = world.context(cache="pre", **world.pretraining())
    compress(adapted)
    ctx = world.context(cache="pre", **world.pretraining(adapt=False))
    model, _ = compress(ctx)
    assert [(s.name, s.cached) for s in ctx.stages] == [("teacher", True), ("pretrain", True)]
    assert ctx.stages[1].artifact == adapted.stages[1].artifact
    stored = Plugin.from_pretrained(ctx.cache.root / ctx.stages[1].artifact)
    assert all(torch.equal(a, b) for a, b in zip(plugin_of(model), stored.parameters(), strict=True))


def test_without_adaptation_and_pre_training_it_is_the_start(world: World) -> None:
    closed, released = world.context(adapt=False), world.context(adapt=False, init="released")
    start, _ = compress(world.context(steps=0))
    model, _ = compress(closed)
    assert [stage.name for stage in closed.stages] == ["teacher"]
    assert all(torch.equal(a, b) for a, b in zip(plugin_of(model), plugin_of(start), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plugin_of(compress(released)[0]), plugin_of(start), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_that_is_cut_off_goes_on_to_the_same_bits(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fit and units are made again, and what was trained is in units."""
    world = World(tmp_path, family)
    values = {"steps": 30, **world.pretraining(pretrain_steps=20)}
    whole, _ = compress(world.context("uninterrupted", **values))
    run_stage = distill.run_stage

    def cut(name: str, losses: Any, *args: Any, **kwargs: Any) -> Any:
        def until(step: int, batch: Any) -> Any:
            if step == 14 and name not in seen:
                seen.add(name)
                raise KeyboardInterrupt
            return losses(step, batch)

        return run_stage(name, until, *args, **kwargs)

    seen: set[str] = set()
    monkeypatch.setattr(stage, "Checkpoint", functools.partial(Checkpoint, every_seconds=-1))
    monkeypatch.setattr(distill, "run_stage", cut)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress(world.context("cut", **values))
    resumed, _ = compress(world.context("cut", **values))
    assert seen == {"pretrain", "adapt"}
    assert all(torch.equal(a, b) for a, b in zip(plugin_of(resumed), plugin_of(whole), strict=True))


@pytest.mark.parametrize("k", [2, 4, 8])
def test_a_twin_says_what_it_costs_and_why(k: int) -> None:
    spec, lengths = spec_of("minilm-l6"), {30: 3, 128: 1}
    budget = remaining(spec, k, lengths)
    standard = Variator().setting(spec, k, lengths)
    assert (standard.remaining, standard.note, standard.knob) == (budget, "", {"k": k})
    free = Variator(**PARAMETER_FREE).setting(spec, k, lengths)
    rows = {n: -(-n // k) for n in lengths}
    macs = {n: (layer_macs(spec, n, n, rows[n]), layer_macs(spec, n, n, n)) for n in lengths}
    short, dense = (sum(times * macs[n][i] for n, times in lengths.items()) for i in (0, 1))
    assert free.remaining == pytest.approx(short / dense, rel=1e-12) and free.added == 0
    assert free.note == (
        f"{free.remaining:.1%} remain with compression by mean, decompression by copy, where the standard plugin at "
        f"k = {k} leaves {budget:.1%}"
    )
    keys = Variator(attention_k=4).setting(spec, k, lengths)
    assert keys.remaining < budget and keys.knob == {"k": k, "attention_k": 4}
    assert "keys and values of 4 vectors each" in keys.note and standard.added is not None
    assert keys.added == standard.added + 6 * (4 * 4 * 384 + 4)


def test_keys_merged_too_reach_what_a_plugin_around_the_ffn_cannot() -> None:
    spec = spec_of("minilm-l6")
    floor = min(remaining(spec, k, {128: 1}) for k in range(2, 65))
    assert Variator(attention_k=4).setting(spec, 4, {128: 1}).remaining < floor


@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_step_on_t5_is_one_unit_of_each_channel(family: Any, tmp_path: Path) -> None:
    """The first step of AdamW is the learning rate for every entry; on BERT it is that itself."""
    world, lr = World(tmp_path, family), 1e-3
    values = {"lr": lr, "warmup": 0.0, "precision": "fp32", "weight_decay": 0.0}
    start, _ = compress(world.context(steps=0, **values))
    ctx = world.context(steps=1, **values)
    moved, teacher = compress(ctx)
    batches = FeatureBatches(ctx.features["train"], ctx.config.batch_size, ctx.tokenizer.pad_token_id, 0, ctx.device)
    plugin = Plugin.from_pretrained(ctx.cache.root / ctx.cache.key("plugin", world.context(steps=0, **values).identity))
    units = measure_units(plugin, teacher.model, variator._fit_inputs(batches))
    assert (units is None) == (family == "bert")
    layers = [[m.pair(2) for m in model.modules() if isinstance(m, CompressedFFN)] for model in (start, moved)]
    for index, (before, after) in enumerate(zip(*layers, strict=True)):
        step = (after.w2.bias - before.w2.bias).abs() / lr
        torch.testing.assert_close(step, torch.ones(32) if units is None else units[index].z, rtol=0.05, atol=1e-3)
