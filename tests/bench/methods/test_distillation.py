"""The layer-drop student: which layers it keeps, what each must give, what it costs, and that it comes back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.backbones.catalogue import spec_of
from bench.backbones.sites import digest
from bench.backbones.write_out import written_encoder
from bench.context import RunContext, Teacher
from bench.costing import check_budget, measure_cost
from bench.errors import Unreachable
from bench.measure.closed_form import remaining
from bench.methods import distillation
from bench.methods.distillation import Distillation, imitated, spaced
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint, tokens

INPUTS = {"input_ids": tokens(3, 9)}
WIDE: dict[Family, dict[str, int]] = {
    "bert": {"intermediate_size": 512, "num_hidden_layers": 6},
    "t5": {"d_ff": 512, "num_layers": 6},
}


class World:
    """A task and a checkpoint of six wide layers, on which budgets can be met."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.task = folder, task_file(folder / "task")
        self.backbone = tiny_checkpoint(folder / "tiny", family, **WIDE[family])

    def context(self, **values: Any) -> RunContext:
        config = quick_config(self.task, self.backbone, **{"method": "distillation", "ratio": 4, **values})
        return context(config, self.folder / "cache")


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("distillation"), request.param)


def compress(ctx: RunContext, layers: int | None = None) -> tuple[Any, Teacher]:
    teacher, chosen = get_teacher(ctx), Distillation(**ctx.config.options)
    ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
    if layers is not None:
        ctx.setting = dataclasses.replace(ctx.setting, knob={"layers": layers})
    return chosen.compress(teacher, load_task(ctx.task), ctx), teacher


@pytest.mark.parametrize("layers", range(1, 25))
def test_kept_layers_are_as_even_as_whole_numbers_allow(layers: int) -> None:
    for kept in range(1, layers + 1):
        chosen = spaced(kept, layers)
        assert len(set(chosen)) == kept and list(chosen) == sorted(chosen) and chosen[0] == 0
        if kept > 1:
            assert chosen[-1] == layers - 1
            assert np.abs(np.array(chosen) - np.linspace(0, layers - 1, kept)).max() <= 0.5
    assert spaced(layers, layers) == imitated(spaced(layers, layers), layers) == tuple(range(layers))


def test_what_a_layer_must_give_is_what_the_next_one_read() -> None:
    assert imitated((0, 2, 4, 7, 9, 11), 12) == (1, 3, 6, 8, 10, 11)
    assert imitated((0,), 12) == (11,)


def test_the_budget_in_layers() -> None:
    spec, lengths = spec_of("t5-base"), {128: 1}
    for k, layers in ((2, 8), (4, 6), (8, 5)):
        setting = Distillation().setting(spec, k, lengths)
        assert setting.knob == {"layers": layers} and setting.remaining == pytest.approx(layers / 12)
        assert setting.remaining <= remaining(spec, k, lengths) < (layers + 1) / 12
    assert (
        setting.note == "5 of 12 layers leave 41.7% of the encoder's FLOPs: the nearest not above the 44.8% asked for"
    )


@pytest.mark.parametrize(("budget", "layers"), [(0.5, 3), (0.5 - 1e-13, 3), (0.499, 2), (0.51, 3), (1.0, 6), (1.3, 6)])
def test_a_budget_between_two_layers(budget: float, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "remaining", lambda *_: budget)
    setting = Distillation().setting(dataclasses.replace(spec_of("t5-base"), encoder_layers=6), 2, {8: 1})
    assert setting.knob == {"layers": layers}
    assert bool(setting.note) == (abs(budget - layers / 6) > 1e-9)


def test_less_than_a_layer_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "remaining", lambda *_: 0.3)
    shallow = dataclasses.replace(spec_of("t5-base"), encoder_layers=3)
    with pytest.raises(Unreachable, match=r"one of 3 layers.*33\.3%.*30\.0% asked for"):
        Distillation().setting(shallow, 2, {8: 1})


@pytest.mark.parametrize("ratio", [None, 1, 2.5])
def test_a_ratio_that_names_no_budget(ratio: float | None) -> None:
    reason = Distillation().skip(spec_of("t5-base"), TASKS["sst2"], ratio)
    assert reason is not None and str(ratio) in reason
    assert Distillation().skip(spec_of("t5-base"), TASKS["sst2"], 4) is None


def test_it_costs_its_share_of_the_layers(world: World) -> None:
    ctx = world.context()
    student, teacher = compress(ctx)
    before = digest(teacher.model)
    cost = measure_cost(student, teacher, ctx)
    kept = ctx.setting.knob["layers"]
    assert len(written_encoder(student).layers) == kept < 6
    assert cost.achieved_remaining == pytest.approx(kept / 6, abs=1e-12) == ctx.setting.remaining
    assert cost.padded.compressed.encoder * 6 == cost.padded.dense.encoder * kept
    assert cost.real.compressed.decoder == cost.real.dense.decoder and cost.real.compressed.overhead == 0
    assert cost.requested_remaining is not None and kept / 6 <= cost.requested_remaining < (kept + 1) / 6
    check_budget(cost, ctx)
    assert ctx.notes and ctx.notes[0].startswith(f"{kept} of 6 layers leave")
    assert digest(teacher.model) == before == digest(get_teacher(ctx).model)
    assert ctx.trained_parameters == cost.parameters_total == cost.parameters_added < cost.parameters_teacher
    assert [(s.name, s.steps, s.examples) for s in ctx.stages[1:2]] == [("distillation", 6, 48)]


def test_all_layers_untrained_are_the_teacher(world: World) -> None:
    ctx = world.context(steps=0)
    student, teacher = compress(ctx, layers=6)
    assert [stage.name for stage in ctx.stages] == ["teacher"]
    torch.testing.assert_close(student(**INPUTS).logits, teacher.model(**INPUTS).logits, atol=1e-5, rtol=1e-5)


def test_untrained_it_is_the_teacher_without_the_other_layers(world: World) -> None:
    """The reference runs the teacher with every other layer made to pass on what it reads."""
    ctx = world.context(steps=0, seed=1)
    student, teacher = compress(ctx, layers=3)
    inner = teacher.model.model.base_model.encoder
    blocks = inner.layer if ctx.spec.family == "bert" else inner.block
    assert len(blocks) == 6
    hooks = []
    for i in (1, 2, 4):

        def passed(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        hooks.append(blocks[i].register_forward_hook(passed, with_kwargs=True))
    expected = teacher.model(**INPUTS).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(student(**INPUTS).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(teacher.model(**INPUTS).logits, expected, atol=1e-3)


def test_training_brings_it_nearer_to_the_teacher(world: World) -> None:
    """Both to the teacher's answers and, layer by layer, to the hidden states that each layer must give."""
    distances = []
    for steps in (0, 60):
        ctx = world.context(steps=steps, lr=2e-3, losses="all_hidden=1,logits=1")
        student, teacher = compress(ctx, layers=3)
        with torch.no_grad():
            own, target = student(**INPUTS, hidden=True), teacher.model(**INPUTS, hidden=True)
        wanted = [target.encoder_hidden[i] for i in (2, 4, 5)]
        distances.append(
            [
                ((a - b).square().mean() / b.var()).item()
                for a, b in zip((*own.encoder_hidden, own.logits), (*wanted, target.logits), strict=True)
            ]
        )
    assert all(after < 0.7 * before for before, after in zip(*distances, strict=True)), distances


def test_a_student_of_the_cache_answers_the_same(world: World) -> None:
    first, _ = compress(world.context())
    ctx = world.context()
    second, _ = compress(ctx)
    assert all(stage.cached for stage in ctx.stages)
    torch.testing.assert_close(first(**INPUTS).logits, second(**INPUTS).logits, atol=1e-6, rtol=1e-6)


def test_padding_changes_no_answer(world: World) -> None:
    student, _ = compress(world.context())
    ids = tokens(2, 7, seed=3)
    padded = torch.cat((ids, torch.zeros(2, 6, dtype=torch.long)), 1)
    mask = (torch.arange(13) < 7).long().expand(2, 13)
    torch.testing.assert_close(student(padded, attention_mask=mask).logits, student(ids).logits, atol=1e-5, rtol=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "regression": {"kind": "regression", "labels": None, "label": "number", "metrics": "[pearson]"},
    "qa": {"kind": "qa", "labels": None, "label": "answer", "text_pair": "text", "text": "other",
           "prompt": '"{text} {text_pair}"'},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "family"), [("regression", "bert"), ("qa", "bert"), ("qa", "t5")])
def test_it_runs_on_other_kinds_of_task(kind: str, family: Family, tmp_path: Path) -> None:
    backbone = tiny_checkpoint(tmp_path / family, family, **WIDE[family])
    task = task_file(tmp_path / "task", examples=24, **KINDS[kind])
    config = quick_config(task, backbone, method="distillation", ratio=2, steps=2)
    ctx = context(config, tmp_path / "cache")
    student, teacher = compress(ctx)
    assert set(ctx.stages[-1].history[-1]) == {"step", "lr", "loss", "all_hidden", "logits", "task"}
    assert measure_cost(student, teacher, ctx).achieved_remaining == pytest.approx(ctx.setting.knob["layers"] / 6)
