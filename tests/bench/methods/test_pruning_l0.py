"""Trained pruning: the budget is met to a neuron, a kill loses no stage, and the smaller model is cheaper for good."""

from __future__ import annotations

import dataclasses
import functools
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import EncoderLayer
from bench.backbones.sites import digest
from bench.backbones.surgery import Structure, ffn_out
from bench.backbones.write_out import write_out, written_encoder
from bench.cell import Surroundings
from bench.config import RunConfig
from bench.context import RunContext, Teacher
from bench.costing import check_budget, measure_cost
from bench.measure.closed_form import layer_macs, remaining
from bench.methods import hard_concrete
from bench.methods.base import Work
from bench.methods.budget import UnitCosts
from bench.methods.hard_concrete import Gates
from bench.methods.pruning_l0 import PruningL0, fitting
from bench.results import ResultStore
from bench.runner import run
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.training import stage
from bench.training.distill import distill
from bench.training.loop import Checkpoint
from bench.training.stage import model_inputs
from bench.training.student import WEIGHTS_FILE
from bench.training.teacher import get_teacher
from tests.checkpoints import Family, context, quick_config, task_file, tiny_checkpoint, tiny_model, tokens

INPUTS = {"input_ids": tokens(3, 9)}
SHAPES: dict[str, tuple[Family, dict[str, Any]]] = {
    "bert": ("bert", {"intermediate_size": 512}),
    "t5": ("t5", {"d_ff": 512}),
    "t5-gated": ("t5", {"d_ff": 512, "feed_forward_proj": "gated-gelu"}),
}


class World:
    """A task and a checkpoint whose FFN is so wide that budgets can be met."""

    def __init__(self, folder: Path, shape: str) -> None:
        family, changes = SHAPES[shape]
        self.folder, self.task = folder, task_file(folder / "task", words=(6, 20))
        self.backbone = tiny_checkpoint(folder / "tiny", family, **changes)
        self.narrow = tiny_checkpoint(folder / "narrow", family)

    def config(self, **values: Any) -> RunConfig:
        return quick_config(
            self.task, values.pop("backbone", self.backbone), method="pruning_l0", **{"ratio": 4, **values}
        )

    def context(self, cache: str = "cache", **values: Any) -> RunContext:
        return context(self.config(**values), self.folder / cache)


@pytest.fixture(scope="module", params=SHAPES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("pruning_l0"), request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("pruning_l0"), "bert")


def compress(ctx: RunContext) -> tuple[Any, Teacher]:
    teacher, chosen = get_teacher(ctx), ctx.config.build_method()
    ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
    return chosen.compress(teacher, load_task(ctx.task), ctx), teacher


def shape_of(model: Any) -> list[tuple[int, int]]:
    layers = [layer for layer in written_encoder(model).layers if isinstance(layer, EncoderLayer)]
    return [(len(layer.attention.heads), ffn_out(layer.ffn).in_features) for layer in layers]


def test_the_target_falls_to_the_budget_and_stays() -> None:
    method = PruningL0(target_warmup=0.5)
    targets = [method.target(step, 20, 0.4) for step in range(20)]
    assert all(a > b for a, b in pairwise(targets[:11])) and 0.9 < targets[0] < 1
    assert targets[10:] == pytest.approx([0.4] * 10) and targets[4] == pytest.approx(1 - 0.6 * 5 / 11)
    assert PruningL0(target_warmup=0).target(0, 20, 0.4) == pytest.approx(0.4)


def test_the_plan() -> None:
    spec, lengths = spec_of("t5-base"), {128: 1}
    method = PruningL0(prune_share=0.25)
    setting = method.setting(spec, 4, lengths)
    assert setting.remaining == setting.knob["target"] == pytest.approx(remaining(spec, 4, lengths))
    assert setting.note == ""
    assert method.work(100, 8) == [Work("prune", 25, 8), Work("tune", 75, 8)]
    assert PruningL0(prune_share=0).work(100, 8) == [Work("tune", 100, 8)] and method.work(0, 8) == []
    assert method.skip(spec, TASKS["sst2"], 4) is None
    for ratio in (None, 1, 2.5):
        assert str(ratio) in str(method.skip(spec, TASKS["sst2"], ratio))


@pytest.mark.parametrize("budget", [0.0, 0.01, 0.2, 0.53, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_likeliest_units_fill_the_budget(budget: float, seed: int) -> None:
    """The reference sorts probabilities, in double precision, and adds MACs up by `layer_macs`."""
    model = write_out(tiny_model("bert", num_hidden_layers=4))
    encoder, gates = written_encoder(model), Gates(4, 4, 64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 3)
    lengths = {5: 2, 9: 1}
    spec = dataclasses.replace(spec_of("minilm-l6"), d_model=32, d_ff=64, n_heads=4, d_head=8, encoder_layers=4)
    costs = UnitCosts.of(spec, lengths)
    structure = fitting(gates, encoder, costs, budget)
    assert structure.layers == (0, 1, 2, 3)
    spent = sum(
        times * layer_macs(spec, n, n, n, len(heads), len(neurons))
        for n, times in lengths.items()
        for heads, neurons in zip(structure.heads, structure.neurons, strict=True)
    )
    allowed = budget * 4 * sum(times * layer_macs(spec, n, n, n) for n, times in lengths.items())
    assert 0 <= allowed - spent < costs.neuron or spent == allowed
    p = [(gate.log_alpha.detach().double() + 1.5986).sigmoid() for gate in (gates.heads, gates.neurons)]
    whole = (gates.sublayers.log_alpha.detach().double() + 1.5986).sigmoid()
    kept, cut = [], []
    for kind, units in enumerate((structure.heads, structure.neurons)):
        for layer in range(4):
            for unit, q in enumerate(p[kind][layer] * whole[layer, kind]):
                (kept if unit in units[layer] else cut).append((q.item(), kind))
    least = [min([q for q, kind in kept if kind == which], default=2.0) for which in (0, 1)]
    assert all(q <= least[kind] + 1e-4 for q, kind in cut), "a likelier unit of the same kind was cut"
    # a neuron is cut only when nothing more fits
    assert all(q <= min(least) + 1e-4 for q, kind in cut if kind == 1)


def test_without_training_the_largest_weights_stay() -> None:
    model = write_out(tiny_model("t5"))
    encoder = written_encoder(model)
    costs = UnitCosts(head=16, neuron=1, layer=128, layers=2)
    structure = fitting(Gates(2, 4, 64), encoder, costs, 0.6)
    for layer, heads, neurons in zip(encoder.layers, structure.heads, structure.neurons, strict=True):
        assert isinstance(layer, EncoderLayer) and 0 < len(neurons) < 64
        norms = ffn_out(layer.ffn).weight.norm(dim=0)
        assert set(norms.topk(len(neurons)).indices.tolist()) == set(neurons)
        parts = torch.stack([part.norm() for part in layer.attention.o.weight.split(8, dim=1)])
        assert set(parts.topk(len(heads)).indices.tolist()) == set(heads)


@pytest.mark.parametrize("steps", [0, 6])
def test_it_costs_what_its_units_do(world: World, steps: int) -> None:
    ctx = world.context(steps=steps)
    model, teacher = compress(ctx)
    before = digest(teacher.model)
    cost = measure_cost(model, teacher, ctx)
    shape = shape_of(model)
    assert (ctx.setting.knob["heads"], ctx.setting.knob["neurons"]) == tuple(map(sum, zip(*shape, strict=True)))
    for split, left in (("selection", ctx.setting.remaining), ("dev", cost.achieved_remaining)):
        of_split = ctx.lengths(split).items()
        dense = sum(times * layer_macs(ctx.spec, n, n, n) for n, times in of_split) * ctx.spec.encoder_layers
        macs = sum(times * layer_macs(ctx.spec, n, n, n, *units) for n, times in of_split for units in shape)
        assert left == pytest.approx(macs / dense, rel=1e-12)
    costs = UnitCosts.of(ctx.spec, ctx.lengths("selection"))
    assert 0 <= ctx.budget - ctx.setting.remaining < costs.neuron / costs.dense and ctx.setting.note == ""
    check_budget(cost, ctx)
    assert cost.real.compressed.decoder == cost.real.dense.decoder and cost.real.compressed.overhead == 0
    assert digest(teacher.model) == before == digest(get_teacher(ctx).model)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    gates = ctx.spec.encoder_layers * (4 + 512 + 2) + 2
    trained = cost.parameters_teacher + gates if steps else cost.parameters_total
    assert ctx.trained_parameters == trained and cost.parameters_total == cost.parameters_added
    stages = [(s.name, s.steps, s.examples) for s in ctx.stages if s.name != "teacher"]
    assert stages == [("prune", 3, 24), ("tune", 3, 24)][:steps]


def test_a_student_of_the_cache_answers_the_same(world: World) -> None:
    first, _ = compress(world.context())
    ctx = world.context()
    second, _ = compress(ctx)
    assert all(stage.cached for stage in ctx.stages) and [s.name for s in ctx.stages] == ["teacher", "prune", "tune"]
    torch.testing.assert_close(first(**INPUTS).logits, second(**INPUTS).logits, atol=1e-6, rtol=1e-6)


def test_padding_changes_no_answer(world: World) -> None:
    student, _ = compress(world.context())
    ids = tokens(2, 7, seed=3)
    padded = torch.cat((ids, torch.zeros(2, 6, dtype=torch.long)), 1)
    mask = (torch.arange(13) < 7).long().expand(2, 13)
    torch.testing.assert_close(student(padded, attention_mask=mask).logits, student(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_budget_that_leaves_all_leaves_the_teacher(world: World) -> None:
    """On so narrow a backbone the plugin costs more than the FFN that it saves."""
    ctx = world.context(steps=0, backbone=world.narrow)
    student, teacher = compress(ctx)
    assert ctx.budget > 1 == ctx.setting.remaining and "nothing is removed" in ctx.setting.note
    assert shape_of(student) == [(4, 64)] * 2
    torch.testing.assert_close(student(**INPUTS).logits, teacher.model(**INPUTS).logits, atol=1e-5, rtol=1e-5)


def test_training_takes_the_expected_flops_to_the_budget(bert: World) -> None:
    ctx = bert.context(steps=121, prune_share=0.99)
    get_teacher(ctx)
    optimizers: list[Any] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: optimizers.append(optimizer))
    student, _ = compress(ctx)
    hook.remove()
    weights, gates, multipliers = optimizers[0].param_groups
    assert [gates["lr"] / weights["lr"], multipliers["lr"] / weights["lr"]] == pytest.approx([3000, 300])
    assert weights["weight_decay"] and not gates["weight_decay"] and not multipliers["weight_decay"]
    assert [p.shape for p in gates["params"]] == [(2, 4), (2, 512), (2, 2)]
    # whatever the sign of the gap, its square raises the second
    assert multipliers["params"][0][1] > hard_concrete.PENALTY_START + 0.1
    history = next(s.history for s in ctx.stages if s.name == "prune")
    assert history[0]["remaining"] > 0.95 and history[0]["target"] > 0.9
    assert history[-1]["target"] == pytest.approx(ctx.budget)
    assert history[-1]["remaining"] == pytest.approx(ctx.budget, abs=0.03)
    # what was learned is not the ranking at the start
    untrained, _ = compress(bert.context(steps=0))
    assert shape_of(student) != shape_of(untrained)


def test_tuning_brings_it_nearer_to_the_teacher(world: World) -> None:
    distances = []
    for steps in (0, 40):
        ctx = world.context(steps=steps, lr=2e-3, losses="all_hidden=1", prune_share=0)
        student, teacher = compress(ctx)
        inputs = model_inputs(PruningL0().batches(ctx)(0))
        with torch.no_grad():
            own, target = student(**inputs, hidden=True), teacher.model(**inputs, hidden=True)
        real = inputs["attention_mask"].bool()
        pairs = zip(own.encoder_hidden, target.encoder_hidden, strict=True)
        distances.append([((a - b)[real].square().mean() / b[real].var()).item() for a, b in pairs])
    assert all(after < 0.8 * before for before, after in zip(*distances, strict=True)), distances


class Killed(BaseException):
    """Not an error that anything catches."""


def killed(ctx: RunContext, monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Compress until a stage has made so many steps."""

    def stopping(stage_name: str, *args: Any, **options: Any) -> Any:
        own = options["penalty"]

        def penalty(step: int, batch: Any) -> Any:
            if stage_name == name and step >= after:
                raise Killed
            return own(step, batch) if own else (torch.zeros(()), {})

        return distill(stage_name, *args, **{**options, "penalty": penalty})

    with monkeypatch.context() as patch:
        patch.setattr("bench.training.distill.distill", stopping)
        patch.setattr(stage, "Checkpoint", functools.partial(Checkpoint, every_seconds=-1))
        with pytest.raises(Killed):
            compress(ctx)


@pytest.mark.parametrize(("name", "after"), [("prune", 25), ("tune", 0), ("tune", 15)])
def test_a_kill_in_either_stage_changes_nothing(
    bert: World, name: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates, multipliers and torch's generator come back with the weights; tuning starts from the stored structure."""
    values = {"steps": 60, "lr": 1e-3}
    expected, _ = compress(bert.context("uninterrupted", **values))
    cache = f"{name}-{after}"
    killed(bert.context(cache, **values), monkeypatch, name, after)
    finished = list((bert.folder / cache).glob("structure-*"))
    assert len(finished) == (name == "tune")
    steps: list[int] = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    ctx = bert.context(cache, **values)
    student, _ = compress(ctx)
    hook.remove()
    assert [(s.name, s.cached) for s in ctx.stages[1:]] == [("prune", name == "tune"), ("tune", False)]
    assert len(steps) == {"prune": 10 + 30, "tune": 30 - after // 10 * 10}[name]
    assert [s.artifact.split("-")[0] for s in ctx.stages[1:]] == ["structure", "student"]
    assert shape_of(student) == shape_of(expected)
    torch.testing.assert_close(student(**INPUTS).logits, expected(**INPUTS).logits, atol=1e-6, rtol=1e-6)


def test_tuning_starts_from_the_stored_structure(bert: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step of tuning the student is what was stored, which training has moved away from the teacher."""
    monkeypatch.setattr(PruningL0, "_stages", lambda self, steps: (steps, 0))
    ctx = bert.context("only-pruned", steps=20)
    student, teacher = compress(ctx)
    assert [s.name for s in ctx.stages] == ["teacher", "prune"]
    stored = ctx.cache.find("structure", ctx.identity)
    assert stored is not None
    structure = Structure.from_json(stored.meta["structure"])
    pairs = zip(structure.heads, structure.neurons, strict=True)
    assert shape_of(student) == [(len(heads), len(neurons)) for heads, neurons in pairs]
    weights, own = load_file(stored.folder / WEIGHTS_FILE), dict(student.named_parameters())
    assert weights.keys() == own.keys() and all(torch.equal(own[name], weights[name]) for name in own)
    assert not torch.equal(student.model.classifier.weight, teacher.model.model.classifier.weight)


def test_gates_are_multiplied_into_what_is_stored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit and its sublayer, both at sigmoid(1) x 1.2 - 0.1, scale what a kept unit gives and not the bias."""
    for start in ("UNIT_START", "SUBLAYER_START"):
        monkeypatch.setattr(hard_concrete, start, 1.0)
    ctx = world.context("half-open", steps=0)
    student, teacher = compress(ctx)
    stored = ctx.cache.find("structure", ctx.identity)
    assert stored is not None
    structure = Structure.from_json(stored.meta["structure"])
    factor = (1.2 / (1 + math.exp(-1)) - 0.1) ** 2
    pairs = zip(written_encoder(student).layers, written_encoder(write_out(teacher.model)).layers, strict=True)
    for (new, old), heads, neurons in zip(pairs, structure.heads, structure.neurons, strict=True):
        assert isinstance(new, EncoderLayer) and isinstance(old, EncoderLayer)
        columns = [8 * head + i for head in heads for i in range(8)]
        outs = (new.attention.o, old.attention.o, columns), (ffn_out(new.ffn), ffn_out(old.ffn), list(neurons))
        for mine, whole, kept in outs:
            torch.testing.assert_close(mine.weight, factor * whole.weight[:, kept])
            assert mine.bias is None or torch.equal(mine.bias, whole.bias)


SETTINGS: list[dict[str, Any]] = [{"prune_share": 0.8}, {"target_warmup": 0.1}, {"gate_lr": 0.05}, {"lr": 5e-3}]


@pytest.mark.parametrize("change", SETTINGS, ids=str)
def test_every_setting_changes_the_student(bert: World, change: dict[str, Any]) -> None:
    first, other = (compress(bert.context(steps=20, **values))[0] for values in ({}, change))
    assert not torch.allclose(first(**INPUTS).logits, other(**INPUTS).logits, atol=1e-5)


def test_it_runs_on_text_to_text_answers(tmp_path: Path) -> None:
    family, changes = SHAPES["t5"]
    backbone = tiny_checkpoint(tmp_path / family, family, **changes)
    texts = {"label": "answer", "text_pair": "text", "text": "other", "prompt": '"{text} {text_pair}"'}
    task = task_file(tmp_path / "task", examples=24, kind="qa", labels=None, **texts)
    config = quick_config(task, backbone, method="pruning_l0", ratio=2, steps=2)
    result = run(config, ResultStore(tmp_path, "s"), Surroundings(cache_dir=tmp_path / "cache"))
    assert result.status == "done", result.traceback
    assert result.cost is not None and result.knob["neurons"] < 1024
