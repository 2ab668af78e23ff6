"""The narrow student: its widths by hand, which units it keeps, what it costs, and that training helps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import EncoderLayer
from bench.backbones.sites import digest
from bench.backbones.surgery import Structure, ffn_in, ffn_out
from bench.backbones.write_out import write_out, written_encoder
from bench.context import RunContext, Teacher
from bench.costing import check_budget, measure_cost, parts_of
from bench.errors import Unreachable
from bench.measure.closed_form import layer_macs, remaining
from bench.measure.flops import count_dispatched
from bench.methods import width_distillation
from bench.methods.width_distillation import WidthDistillation
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.training.losses import task_loss
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint, tokens

INPUTS = {"input_ids": tokens(3, 9)}
WIDE: dict[Family, dict[str, int]] = {
    "bert": {"intermediate_size": 512, "num_hidden_layers": 3},
    "t5": {"d_ff": 512, "num_layers": 3, "num_decoder_layers": 1},
}


class World:
    """A task and a checkpoint whose FFN is wide enough for budgets to be met."""

    def __init__(self, folder: Path, family: Family, **task: Any) -> None:
        self.folder, self.task = folder, task_file(folder / "task", **task)
        self.backbone = tiny_checkpoint(folder / "tiny", family, **WIDE[family])

    def context(self, **values: Any) -> RunContext:
        values = {"method": "width_distillation", "ratio": 4, "examples": 16, **values}
        ctx = context(quick_config(self.task, self.backbone, **values), self.folder / "cache")
        ctx.setting = ctx.config.build_method().setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
        return ctx


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("width"), request.param)


def compress(ctx: RunContext, heads: int | None = None, neurons: int | None = None) -> tuple[Any, Teacher]:
    teacher = get_teacher(ctx)
    if heads is not None:
        ctx.setting = dataclasses.replace(ctx.setting, knob={"heads": heads, "neurons": neurons})
    return ctx.config.build_method().compress(teacher, load_task(ctx.task), ctx), teacher


def layers_of(model: Any) -> list[EncoderLayer]:
    return [cast(EncoderLayer, layer) for layer in written_encoder(model).layers]


@pytest.mark.parametrize("name", ["t5-base", "flan-t5-base", "minilm-l6", "bert-base-uncased"])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_widths_meet_the_budget_to_a_neuron_a_layer(name: str, k: int) -> None:
    spec, lengths = spec_of(name), {17: 5, 64: 2, 128: 1}
    setting, budget = WidthDistillation().setting(spec, k, lengths), remaining(spec, k, lengths)
    heads, neurons = setting.knob["heads"], setting.knob["neurons"]

    def share(heads: int, neurons: int) -> float:
        small = sum(c * layer_macs(spec, n, n, n, heads, neurons) for n, c in lengths.items())
        return small / sum(c * layer_macs(spec, n, n, n) for n, c in lengths.items())

    assert setting.remaining == pytest.approx(share(heads, neurons)) and not setting.note
    assert share(heads, neurons) <= budget * (1 + 1e-9) and share(heads, neurons + 1) > budget
    gap = abs(heads / spec.n_heads - neurons / spec.d_ff)
    for other in (heads - 1, heads + 1):
        wide = max(range(spec.d_ff + 1), key=lambda f, h=other: (share(h, f) <= budget) * f)
        assert abs(other / spec.n_heads - wide / spec.d_ff) >= gap


def test_widths_of_one_budget_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token, d = 4, 2 heads of 2, 10 neurons: 36 MACs a head (4·4·2 + 2·2), 8 a neuron, 152 a layer."""
    spec = dataclasses.replace(spec_of("bert-base-uncased"), d_model=4, n_heads=2, d_head=2, d_ff=10, encoder_layers=3)
    for macs, heads, neurons in ((152, 2, 10), (151, 2, 9), (80, 1, 5), (76, 1, 5), (44, 1, 1)):
        monkeypatch.setattr(width_distillation, "remaining", lambda *_, macs=macs: macs / 152)
        setting = WidthDistillation().setting(spec, 2, {1: 7})
        # of 80 MACs one head leaves 44, which hold 5 neurons; two heads leave 8, which hold 1
        assert setting.knob == {"heads": heads, "neurons": neurons}, macs
        assert setting.remaining == pytest.approx((36 * heads + 8 * neurons) / 152)
        assert bool(setting.note) == (1 - (36 * heads + 8 * neurons) / macs > 0.01)
    monkeypatch.setattr(width_distillation, "remaining", lambda *_: 1.5)
    setting = WidthDistillation().setting(spec, 2, {1: 7})
    assert setting.knob == {"heads": 2, "neurons": 10} and "nothing is removed for the 150.0%" in setting.note
    monkeypatch.setattr(width_distillation, "remaining", lambda *_: 43 / 152)
    with pytest.raises(Unreachable, match=r"one head and one neuron a layer.*28\.9%.*28\.3% asked for"):
        WidthDistillation().setting(spec, 2, {1: 7})


@pytest.mark.parametrize("ratio", [None, 1, 2.5])
def test_a_ratio_that_names_no_budget(ratio: float | None) -> None:
    reason = WidthDistillation().skip(spec_of("t5-base"), TASKS["sst2"], ratio)
    assert reason is not None and str(ratio) in reason


def test_it_keeps_the_units_whose_removal_changes_the_loss_most_to_first_order(world: World) -> None:
    """Against a loop over examples: |<W, dL/dW>| over a unit's columns of the output matrix, averaged."""
    ctx = world.context(steps=0, seed=2)
    student, teacher = compress(ctx, heads=2, neurons=100)
    model = write_out(teacher.model)
    outputs = [part for layer in layers_of(model) for part in (layer.attention.o.weight, ffn_out(layer.ffn).weight)]
    for weight in outputs:
        weight.requires_grad_()
    chosen = np.random.default_rng(ctx.config.seed).permutation(len(ctx.features["train"]))[:16]
    totals: list[Any] = [0.0] * len(outputs)
    for feature in (ctx.features["train"][i] for i in chosen):
        loss = task_loss("single", model(torch.tensor([feature["input_ids"]])).logits, {
            "labels": torch.tensor([feature["labels"]])
        })  # fmt: skip
        for i, (weight, gradient) in enumerate(zip(outputs, torch.autograd.grad(loss, outputs), strict=True)):
            by_input = (weight * gradient).sum(0).detach()
            totals[i] = totals[i] + (by_input.reshape(4, 8).sum(1) if i % 2 == 0 else by_input).abs()
    folder = ctx.cache.root / ctx.cache.key("student", ctx.identity)
    kept = Structure.from_json(json.loads((folder / "artifact.json").read_text())["made"]["structure"])
    for layer, (heads, neurons) in enumerate(zip(totals[::2], totals[1::2], strict=True)):
        assert kept.heads[layer] == tuple(sorted(heads.topk(2).indices.tolist()))
        assert len(set(kept.neurons[layer]) & set(neurons.topk(100).indices.tolist())) >= 99  # the last may tie
    for small, whole, heads, neurons in zip(
        layers_of(student), layers_of(model), kept.heads, kept.neurons, strict=True
    ):
        torch.testing.assert_close(ffn_in(small.ffn)[0].weight, ffn_in(whole.ffn)[0].weight[list(neurons)])
        assert small.attention.heads.tolist() == list(heads)


def test_untrained_at_full_width_it_is_the_teacher(world: World) -> None:
    ctx = world.context(steps=0, seed=1)
    student, teacher = compress(ctx, heads=4, neurons=512)
    torch.testing.assert_close(student(**INPUTS).logits, teacher.model(**INPUTS).logits, atol=1e-5, rtol=1e-5)
    assert [(stage.name, stage.steps) for stage in ctx.stages] == [("teacher", ctx.stages[0].steps), ("calibrate", 0)]


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_it_costs_what_the_ratio_asks_for(world: World, ratio: int) -> None:
    ctx = world.context(ratio=ratio, steps=0)
    student, teacher = compress(ctx)
    heads, neurons = ctx.setting.knob["heads"], ctx.setting.knob["neurons"]
    for n in (1, 7, 20):
        flops = [count_dispatched(m, {"input_ids": tokens(1, n)}, parts_of(m)) for m in (student, teacher.model)]
        assert flops[0].encoder == 2 * 3 * layer_macs(ctx.spec, n, n, n, heads, neurons) < flops[1].encoder
        assert (flops[0].decoder, flops[0].head, flops[0].overhead) == (flops[1].decoder, flops[1].head, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_run_is_told(family: Family, tmp_path: Path) -> None:
    ctx = World(tmp_path, family).context()
    student, teacher = compress(ctx)
    before = digest(teacher.model)
    cost = measure_cost(student, teacher, ctx)
    check_budget(cost, ctx)
    assert cost.achieved_remaining == pytest.approx(ctx.setting.remaining, rel=0.02)
    assert ctx.trained_parameters == cost.parameters_total == cost.parameters_added < cost.parameters_teacher
    stages = [(s.name, s.steps, s.examples) for s in ctx.stages[1:]]
    assert stages == [("calibrate", 0, 16), ("width_distillation", 6, 48)]
    assert digest(teacher.model) == before
    again = world_copy(ctx)
    other, _ = compress(again)
    assert all(stage.cached for stage in again.stages)
    torch.testing.assert_close(other(**INPUTS).logits, student(**INPUTS).logits, atol=1e-6, rtol=1e-6)
    ids = torch.cat((INPUTS["input_ids"], torch.zeros(3, 5, dtype=torch.long)), 1)
    mask = (torch.arange(14) < 9).long().expand(3, 14)
    padded = student(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded, student(**INPUTS).logits, atol=1e-5, rtol=1e-5)


def world_copy(ctx: RunContext) -> RunContext:
    again = context(ctx.config, ctx.cache.root)
    return dataclasses.replace(again, setting=ctx.setting)


def test_training_brings_it_nearer_to_the_teacher(world: World) -> None:
    distances = []
    for steps in (0, 60):
        ctx = world.context(steps=steps, lr=2e-3, losses="all_hidden=1,logits=1")
        student, teacher = compress(ctx, heads=2, neurons=100)
        with torch.no_grad():
            own, target = student(**INPUTS, hidden=True), teacher.model(**INPUTS, hidden=True)
        pairs = zip((*own.encoder_hidden, own.logits), (*target.encoder_hidden, target.logits), strict=True)
        distances.append([((a - b).square().mean() / b.var()).item() for a, b in pairs])
    assert sum(distances[1]) < 0.7 * sum(distances[0]), distances


@pytest.mark.parametrize(("kind", "family"), [("regression", "bert"), ("qa", "bert"), ("qa", "t5")])
def test_it_runs_on_other_kinds_of_task(kind: str, family: Family, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"kind": kind, "labels": None}
    changes |= (
        {"label": "number", "metrics": "[pearson]"}
        if kind == "regression"
        else {"label": "answer", "text_pair": "text", "text": "other", "prompt": '"{text} {text_pair}"'}
    )
    ctx = World(tmp_path, family, examples=24, **changes).context(steps=2)
    student, _ = compress(ctx)
    assert set(ctx.stages[-1].history[-1]) == {"step", "lr", "loss", "all_hidden", "logits", "task"}
    shapes = {(len(layer.attention.heads), ffn_out(layer.ffn).in_features) for layer in layers_of(student)}
    assert shapes == {(ctx.setting.knob["heads"], ctx.setting.knob["neurons"])}
