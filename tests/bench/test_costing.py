"""A run that costs more or less than its ratio asks for says why, or fails; dynamic models are counted by example."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bench.backbones.encoder import EncoderLayer, Seen, Tokens, TokenStep
from bench.backbones.write_out import write_out, written_encoder
from bench.costing import check_budget, measure_cost
from bench.errors import BenchError
from bench.measure.closed_form import layer_macs, remaining
from bench.methods.base import Setting
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint


class _DropOnes(TokenStep):
    """Drops every vector whose first entry is above the example's mean: how many depends on the text."""

    input_dependent = True
    kept: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def forward(self, state: Tokens, seen: Seen) -> Tokens:
        first = state.x[..., 0]
        keep = state.mask & (first <= (first * state.mask).sum(1, keepdim=True) / state.mask.sum(1, keepdim=True))
        self.kept.append(int(keep.sum(1).max()))
        return state.keep(keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dynamic_model_is_counted_example_by_example(family: Family, tmp_path: Path) -> None:
    config = quick_config(task_file(tmp_path / "task"), tiny_checkpoint(tmp_path / family, family), method="dense")
    ctx = context(config, tmp_path / "cache")
    teacher = get_teacher(ctx)
    model, step = write_out(teacher.model), _DropOnes()
    cast(EncoderLayer, written_encoder(model).layers[0]).step = step
    dev = ctx.features["dev"]
    with torch.no_grad():
        for feature in dev:
            model(torch.tensor([feature["input_ids"]]))
    kept, lengths = list(step.kept), [len(feature["input_ids"]) for feature in dev]
    assert len({(n, m) for n, m in zip(lengths, kept, strict=True)}) > len(set(lengths)), "cost must vary at one length"
    expected = sum(
        2 * (layer_macs(ctx.spec, n, n, m) + layer_macs(ctx.spec, m, m, m)) for n, m in zip(lengths, kept, strict=True)
    )
    cost = measure_cost(model, teacher, ctx)
    assert cost.real.compressed.encoder == expected
    assert cost.real.dense.encoder == sum(4 * layer_macs(ctx.spec, n, n, n) for n in lengths)
    assert cost.padded.compressed.encoder < cost.padded.dense.encoder


@pytest.mark.parametrize(("factor", "note", "outcome"), [
    (1.019, "", []), (0.981, "", []), (1.03, "no such depth", ["no such depth"]), (1.03, "", None), (0.97, "", None),
])  # fmt: skip
def test_off_budget_needs_a_reason(factor: float, note: str, outcome: list[str] | None, tmp_path: Path) -> None:
    backbone = tiny_checkpoint(tmp_path / "bert", "bert")
    config = quick_config(task_file(tmp_path / "task"), backbone, method="variator", ratio=2)
    ctx = context(config, tmp_path / "cache")
    teacher = get_teacher(ctx)
    cost: Any = measure_cost(teacher.model, teacher, ctx)
    asks_nothing = cost.model_copy(update={"requested_remaining": None})
    check_budget(asks_nothing, ctx)
    cost = cost.model_copy(update={"requested_remaining": 0.5, "achieved_remaining": 0.5 * factor})
    ctx.setting = Setting({}, note=note)
    if outcome is None:
        with pytest.raises(BenchError, match=r"remain where the ratio asks for 50\.00%.*gave no reason"):
            check_budget(cost, ctx)
    else:
        check_budget(cost, ctx)
        assert ctx.notes == outcome


@pytest.mark.parametrize(("factor", "stands"), [(1.0, True), (0.985, True), (1.03, False)])
def test_a_budget_that_differs_between_the_splits(factor: float, stands: bool, tmp_path: Path) -> None:
    """Meeting the budget of the selection split, which the setting was solved for, is enough, and is said."""
    backbone = tiny_checkpoint(tmp_path / "bert", "bert")
    config = quick_config(task_file(tmp_path / "task"), backbone, method="variator", ratio=2)
    ctx = context(config, tmp_path / "cache")
    teacher = get_teacher(ctx)
    cost: Any = measure_cost(teacher.model, teacher, ctx)
    budget = remaining(ctx.spec, 2, ctx.lengths("selection"))
    cost = cost.model_copy(update={"requested_remaining": budget / 1.1, "achieved_remaining": budget * factor})
    if stands:
        check_budget(cost, ctx)
        (note,) = ctx.notes
        assert f"on the lengths of the selection split, {budget:.1%}" in note and f"asks for {budget / 1.1:.1%}" in note
    else:
        with pytest.raises(BenchError, match="gave no reason"):
            check_budget(cost, ctx)
