"""Learned thresholds: what they remove, softly and for good, how a budget holds them, and that they come back."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import Seen, Tokens
from bench.backbones.sites import digest
from bench.backbones.write_out import written_encoder
from bench.context import RunContext, Teacher
from bench.costing import check_budget, depends_on_input, measure_cost, parts_of
from bench.errors import Unreachable
from bench.measure.closed_form import remaining
from bench.measure.flops import count_dispatched
from bench.methods.attention_importance import removing
from bench.methods.base import Work
from bench.methods.thresholds import (
    Threshold,
    budget_of,
    calibrate,
    counted,
    share_left,
    share_of,
    softly,
    thresholds_of,
)
from bench.methods.token_dropping import TokenDropping
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.training import stage
from bench.training.loop import Checkpoint
from bench.training.teacher import get_teacher
from tests.bench.methods.masked_encoder import encode_masked
from tests.checkpoints import FAMILIES, Family, context, encode_hidden, quick_config, task_file, tiny_checkpoint

WIDE: dict[Family, dict[str, int]] = {
    "bert": {"intermediate_size": 512, "num_hidden_layers": 4},
    "t5": {"d_ff": 512, "num_layers": 4},
}
START = (0.5, 0.8, 1.0, 1.3)
"""Thresholds that remove some tokens in every layer of the tiny models."""


class World:
    """A task and a checkpoint of four wide layers, on which budgets can be met."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.family = folder, family
        self.task = task_file(folder / "task", examples=200, words=(6, 24))
        self.backbone = tiny_checkpoint(folder / "tiny", family, **WIDE[family])

    def context(self, cache: str = "cache", **values: Any) -> RunContext:
        values = {"method": "token_dropping", "ratio": 4, "dev_examples": 40, **values}
        return context(quick_config(self.task, self.backbone, **values), self.folder / cache)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("dropping"), request.param)


def compress(ctx: RunContext) -> tuple[Any, Teacher]:
    teacher, chosen = get_teacher(ctx), ctx.config.build_method()
    ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
    return chosen.compress(teacher, load_task(ctx.task), ctx), teacher


def thresholded(ctx: RunContext, thresholds: tuple[float, ...] = START) -> Any:
    """Return the teacher with these thresholds, untrained."""
    return removing(get_teacher(ctx).model, [Threshold(math.log(t)) for t in thresholds], ctx).eval()


def values_of(model: Any) -> list[float]:
    return [step.log_threshold.exp().item() for step in thresholds_of(model)]


def padded(ctx: RunContext, rows: range, more: int = 0) -> dict[str, Tensor]:
    ids = [torch.tensor(ctx.features["dev"][i]["input_ids"]) for i in rows]
    longest = max(map(len, ids)) + more
    mask = torch.stack([torch.arange(longest) < len(row) for row in ids]).long()
    return {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in ids]),
        "attention_mask": mask,
    }


def test_what_is_below_the_threshold_goes_but_special_tokens_and_the_best_stay() -> None:
    paid = torch.tensor([[0.05, 0.3, 0.2, 0.45], [0.4, 0.5, 0.1, 0.0], [0.3, 0.7, 0.0, 0.0]])
    seen = Seen(torch.empty(0), paid[:, None, None].expand(-1, 2, 4, 4))
    mask = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 2 + [False] * 2])
    special = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    tokens = Tokens(torch.zeros(3, 4, 2), mask, special)

    def kept(threshold: float) -> list[list[int]]:
        out = Threshold(math.log(threshold))(tokens, seen)
        return [row[real].tolist() for row, real in zip(out.positions, out.mask, strict=True)]

    # in equal shares the rows are 0.2 1.2 0.8 1.8, 1.2 1.5 0.3, and 0.6 1.4
    assert kept(1.0) == [[0, 1, 3], [0, 1], [1]]
    assert kept(0.7) == [[0, 1, 2, 3], [0, 1], [1]]
    assert kept(5.0) == [[0], [1], [1]]
    assert kept(1e-9) == [[0, 1, 2, 3], [0, 1, 2], [0, 1]]
    step = Threshold(math.log(0.8))
    step.temperature = 0.5
    soft = step(tokens, seen)
    assert soft.size is not None and soft.gate is soft.size and soft.bias is None and soft.mask is mask
    assert soft.size[0].tolist() == pytest.approx([1, 1 / (1 + math.exp(-0.8)), 0.5, 1 / (1 + math.exp(-2))])
    # what a layer leaves is a share of what it was given, and weighs as much as a query: equal rows, equal importance
    again = step(soft, seen)
    length = soft.size * mask
    assert again.size is not None
    torch.testing.assert_close(again.size[0, 1:], soft.size[0, 1:].square())
    assert (again.size <= soft.size).all() and length[1, 3] == 0


@pytest.mark.parametrize("thresholds", [START, (0.3, 0.2, 2.0, 0.1), (9.0, 9.0, 9.0, 9.0)])
def test_untrained_it_is_the_teacher_with_tokens_masked(world: World, thresholds: tuple[float, ...]) -> None:
    """Against the teacher's own layers, one head and one example at a time, with nothing removed but masked."""
    ctx = world.context()
    model = thresholded(ctx, thresholds)
    special = set(ctx.tokenizer.all_special_ids) - {ctx.tokenizer.unk_token_id}
    inputs = padded(ctx, range(5), 3)
    with torch.no_grad(), counted(written_encoder(model)) as counts:
        states = encode_hidden(model.model, **inputs)
    for i in range(5):
        ids = inputs["input_ids"][i][inputs["attention_mask"][i].bool()]
        flags = [int(token) in special for token in ids]

        def rule(layer: int, paid: Tensor, present: list[int], flags: list[bool] = flags) -> list[int]:
            above = [paid[j].item() * len(flags) >= thresholds[layer] for j in range(len(present))]
            return [j for j, p in enumerate(present) if above[j] or flags[p]]

        expected, numbers = encode_masked(get_teacher(ctx).model, ids, rule)
        torch.testing.assert_close(states[i, : len(ids)], expected, atol=2e-5, rtol=1e-5)
        assert [int(count[i]) for count in counts] == numbers and numbers[-1] < len(ids)


def test_a_cold_gate_is_a_removal(world: World) -> None:
    """As the temperature falls, the soft stage computes what the hard one does: states, logits and counts."""
    ctx = world.context()
    model, inputs = thresholded(ctx), padded(ctx, range(8), 2)
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), counted(written_encoder(model)) as counts:
        hard, kept = model(**inputs, hidden=True), list(counts)
        distances = []
        for temperature in (1.0, 0.1, 1e-7):
            with softly(model, temperature):
                soft, left = model(**inputs, hidden=True), list(counts)
            distances.append((soft.encoder_hidden[-1] - hard.encoder_hidden[-1])[real].abs().mean().item())
    assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-5, distances
    torch.testing.assert_close(soft.logits, hard.logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a.round().long(), b) for a, b in zip(left, kept, strict=True))
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(kept))


def test_expected_flops_have_the_gradient_of_finite_differences(world: World) -> None:
    ctx = world.context()
    model, inputs = thresholded(ctx).double(), padded(ctx, range(6))
    with softly(model, 0.3), counted(written_encoder(model)) as counts:

        def expected() -> Tensor:
            encode_hidden(model.model, **inputs)
            return share_of(counts, ctx)

        share = expected()
        logs: list[Any] = [step.log_threshold for step in thresholds_of(model)]
        gradients = torch.autograd.grad(share, logs)
        for log, gradient in zip(logs, gradients, strict=True):
            found = []
            for move in (1e-3, -1e-3):
                with torch.no_grad():
                    log += move
                    found.append(expected().item())
                    log -= move
            assert gradient.item() == pytest.approx((found[0] - found[1]) / 2e-3, rel=2e-2, abs=1e-5)
            assert gradient < 0
    assert 0 < share < 1


def test_flops_by_arithmetic_are_those_that_are_executed(world: World) -> None:
    ctx = world.context()
    model, dense = thresholded(ctx), get_teacher(ctx).model
    executed = total = 0
    some = ctx.features["dev"][:12]
    for i in range(12):
        inputs = padded(ctx, range(i, i + 1))
        executed += count_dispatched(model, inputs, parts_of(model)).encoder
        total += count_dispatched(dense, inputs, parts_of(dense)).encoder
    # in batches and padded, and yet of each example alone
    assert share_left(model, some, ctx) == pytest.approx(executed / total, rel=1e-6)
    assert depends_on_input(model) and executed / total < 0.9


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_calibration_finds_the_factor_from_anywhere(world: World, scale: float) -> None:
    ctx = world.context()
    selection = ctx.features["selection"]
    model = thresholded(ctx, tuple(t * scale for t in START)).train()
    share = calibrate(model, selection, ctx)
    assert share == pytest.approx(budget_of(selection, ctx), rel=5e-3)
    assert share == pytest.approx(share_left(model, selection, ctx), rel=1e-6) and model.training
    factors = [after / before for after, before in zip(values_of(model), START, strict=True)]
    assert factors == pytest.approx([factors[0]] * 4, rel=1e-4)
    assert budget_of(selection, ctx) == pytest.approx(min(1, remaining(ctx.spec, 4, ctx.lengths("selection"))))


def test_a_budget_below_what_special_tokens_cost_is_unreachable(world: World) -> None:
    ctx = world.context()
    model = thresholded(ctx)
    written_encoder(model).protect(range(1000))
    with pytest.raises(Unreachable, match=r"no threshold removes, leave 100\.0%.*more than the \d\d\.\d% asked for"):
        calibrate(model, ctx.features["selection"], ctx)


def test_settings_and_refusals() -> None:
    spec = spec_of("t5-base")
    setting = TokenDropping().setting(spec, 4, {128: 1})
    assert setting.remaining == remaining(spec, 4, {128: 1}) == setting.knob["target"]
    assert setting.added == 12 and not setting.note
    narrow = dataclasses.replace(spec, d_model=32, n_heads=2, d_head=16, d_ff=16)
    assert "nothing is removed" in TokenDropping().setting(narrow, 2, {128: 1}).note
    for ratio in (None, 1, 2.5):
        assert str(ratio) in str(TokenDropping().skip(spec, TASKS["squad"], ratio))
    assert TokenDropping().skip(spec, TASKS["squad"], 4) is None
    assert TokenDropping(soft=0.3).work(100, 8) == [Work("soft", 30, 8), Work("hard", 70, 8)]
    assert TokenDropping(soft=0).work(100, 8) == [Work("hard", 100, 8)] and TokenDropping().work(0, 8) == []


@pytest.mark.parametrize("steps", [0, 6])
def test_it_costs_what_the_ratio_asks_for(world: World, steps: int) -> None:
    ctx = world.context(steps=steps)
    student, teacher = compress(ctx)
    before = digest(teacher.model)
    ctx.features["dev"] = ctx.features["selection"][:12]
    cost = measure_cost(student, teacher, ctx)
    assert cost.achieved_remaining == pytest.approx(share_left(student, ctx.features["dev"], ctx), rel=1e-6)
    assert cost.real.compressed.overhead == 0 and cost.real.compressed.decoder == cost.real.dense.decoder
    assert cost.padded.compressed.encoder < cost.padded.dense.encoder
    assert share_left(student, ctx.features["selection"], ctx) == pytest.approx(ctx.budget, rel=5e-3)
    assert ctx.setting.remaining == pytest.approx(ctx.budget, rel=5e-3)
    assert ctx.setting.knob["thresholds"] == pytest.approx(values_of(student))
    assert digest(teacher.model) == before == digest(get_teacher(ctx).model)
    assert cost.parameters_added == cost.parameters_total == cost.parameters_teacher + 4
    assert [(s.name, s.steps) for s in ctx.stages if s.name != "teacher"] == (
        [("soft", 3), ("hard", 3)] if steps else []
    )
    assert ctx.trained_parameters == cost.parameters_total + (2 if steps else 0)


def test_a_gap_between_dev_and_selection_is_named(world: World) -> None:
    ctx = world.context(steps=0)
    compress(ctx)
    assert ctx.setting.note == ""
    other = world.context("other", steps=0)
    kept = next(token for token in other.tokenizer.all_special_ids if token != other.tokenizer.unk_token_id)
    for feature in other.features["dev"]:
        feature["input_ids"] = [kept] * len(feature["input_ids"])
    del other.features["dev"][10:]
    student, teacher = compress(other)
    assert "100.0% on dev of" in other.setting.note and "on selection of" in other.setting.note
    cost = measure_cost(student, teacher, other)
    assert cost.achieved_remaining == 1
    check_budget(cost, other)
    assert other.notes == [other.setting.note]


def test_multipliers_bring_the_soft_stage_to_its_budget(world: World) -> None:
    """From thresholds that remove too little, and from such that remove too much."""
    for scale in (0.4, 2.0):
        ctx = world.context(steps=50, threshold_lr=0.05, batch_size=4)
        method: Any = ctx.config.build_method()
        student, teacher = thresholded(ctx, tuple(t * scale for t in START)).train(), get_teacher(ctx)
        made = method._soften(student, teacher, 50, ctx, world.folder / f"soft-{scale}.pt")
        gaps = [record["remaining"] - ctx.budget for record in made["history"]]
        assert gaps[0] > 0.1 if scale < 1 else gaps[0] < -0.05, gaps
        assert abs(gaps[-1]) < 0.03, gaps
    assert all(step.temperature is None for step in thresholds_of(student))


@pytest.mark.parametrize("scale", [0.6, 2.5])
def test_the_hard_stage_moves_all_thresholds_alike_towards_the_budget(world: World, scale: float) -> None:
    ctx = world.context(steps=15, threshold_lr=0.05, decay="constant")
    method: Any = ctx.config.build_method()
    student, teacher = thresholded(ctx, tuple(t * scale for t in START)).train(), get_teacher(ctx)
    before = abs(share_left(student, ctx.features["selection"], ctx) - ctx.budget)
    method._harden(student, teacher, 15, ctx, world.folder / "hard.pt")
    factors = [after / (t * scale) for after, t in zip(values_of(student), START, strict=True)]
    assert factors == pytest.approx([factors[0]] * 4, rel=1e-3)
    assert factors[0] > 1.3 if scale < 1 else factors[0] < 0.8
    assert abs(share_left(student, ctx.features["selection"], ctx) - ctx.budget) < before - 0.03


class _Stop(Exception):
    pass


def _interrupted(after: int) -> Callable[..., Any]:
    """Return a `run_stage` whose hard stage stops in the given step."""

    def run_stage(name: str, losses: Any, *args: Any, **kwargs: Any) -> Any:
        def stopping(step: int, batch: Any) -> Any:
            if name == "hard" and step == after:
                raise _Stop
            return losses(step, batch)

        return stage.run_stage(name, stopping, *args, **kwargs)

    return run_stage


def test_a_killed_training_goes_on_where_it_was(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft stage is kept apart, and the checkpoint of the hard one holds the controller too."""
    values = {"steps": 18, "soft": 0.2, "threshold_lr": 0.05, "batch_size": 4}
    whole, _ = compress(world.context("whole", **values))
    monkeypatch.setattr(stage, "Checkpoint", functools.partial(Checkpoint, every_seconds=-1))
    with monkeypatch.context() as patch:
        patch.setattr("bench.training.distill.run_stage", _interrupted(after=12))
        with pytest.raises(_Stop):
            compress(world.context("killed", **values))
    ctx, steps = world.context("killed", **values), []
    with monkeypatch.context() as patch:
        patch.setattr(ctx.progress, "advance", lambda n=1, **_: steps.append(n))
        resumed, _ = compress(ctx)
    assert steps[0] == 11 and len(steps) == 14 - 10, "ten steps of the hard stage were in the checkpoint"
    assert [(s.name, s.cached) for s in ctx.stages if s.name != "teacher"] == [("soft", True), ("hard", False)]
    assert values_of(resumed) == values_of(whole)
    assert torch.equal(resumed(**padded(ctx, range(4))).logits, whole(**padded(ctx, range(4))).logits)


def test_padding_changes_neither_answer_nor_count(world: World) -> None:
    ctx = world.context()
    student, _ = compress(ctx)
    with torch.no_grad(), counted(written_encoder(student)) as counts:
        together, kept = student(**padded(ctx, range(8), 11)).logits, [count.tolist() for count in counts]
        for i in range(8):
            alone = student(**padded(ctx, range(i, i + 1))).logits[0]
            torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-5)
            assert [count.item() for count in counts] == [layer[i] for layer in kept]
    assert len(set(kept[-1])) > 1


def test_with_thresholds_of_nothing_it_is_the_teacher(world: World) -> None:
    ctx = world.context()
    model, inputs = thresholded(ctx, (1e-20,) * 4), padded(ctx, range(5), 2)
    dense = get_teacher(ctx).model(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, dense, atol=1e-5, rtol=1e-5)
    assert share_left(model, ctx.features["dev"], ctx) == 1
    with softly(model, 1e-3):
        assert not torch.allclose(thresholded(ctx)(**inputs).logits, dense, atol=1e-5)


def test_a_student_of_the_cache_answers_the_same(world: World) -> None:
    ctx, again = world.context(steps=4), world.context(steps=4)
    first, _ = compress(ctx)
    second, _ = compress(again)
    assert all(s.cached for s in again.stages) and again.setting == ctx.setting
    assert again.bytes_added == ctx.bytes_added > 0 and again.trained_parameters == ctx.trained_parameters
    assert torch.equal(first(**padded(ctx, range(4))).logits, second(**padded(ctx, range(4))).logits)


KINDS: dict[str, dict[str, Any]] = {
    "regression": {"kind": "regression", "labels": None, "label": "number", "metrics": "[pearson]"},
    "qa": {"kind": "qa", "labels": None, "label": "answer", "text_pair": "text", "text": "other",
           "prompt": '"{text} {text_pair}"'},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "family"), [("regression", "bert"), ("qa", "bert"), ("qa", "t5")])
def test_it_runs_on_other_kinds_of_task(kind: str, family: Family, tmp_path: Path) -> None:
    backbone = tiny_checkpoint(tmp_path / family, family, **WIDE[family])
    task = task_file(tmp_path / "task", examples=60, words=(6, 24), **KINDS[kind])
    values = {"ratio": 2, "steps": 2, "dev_examples": 10}
    ctx = context(quick_config(task, backbone, method="token_dropping", **values), tmp_path / "cache")
    student, teacher = compress(ctx)
    assert set(ctx.stages[-1].history[-1]) == {"step", "lr", "loss", "logits", "task", "remaining"}
    some = ctx.features["dev"] = ctx.features["dev"][:6]
    cost = measure_cost(student, teacher, ctx)
    assert (
        cost.achieved_remaining == pytest.approx(share_left(student, some, ctx), rel=1e-6)
        and cost.achieved_remaining < 1
    )
