"""The fixed schedule: which tokens it keeps and how many, what it costs, and that nothing but the length decides it."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import Seen, Tokens
from bench.backbones.sites import digest
from bench.backbones.write_out import written_encoder
from bench.context import RunContext, Teacher
from bench.costing import check_budget, depends_on_input, measure_cost
from bench.errors import Unreachable
from bench.measure.closed_form import remaining
from bench.methods.attention_importance import KeepMost, importance
from bench.methods.topk_tokens import LEAST, Schedule, TopkTokens, kept
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.training.teacher import get_teacher
from tests.bench.methods.masked_encoder import encode_masked
from tests.checkpoints import FAMILIES, Family, context, encode_hidden, quick_config, task_file, tiny_checkpoint

WIDE: dict[Family, dict[str, int]] = {
    "bert": {"intermediate_size": 512, "num_hidden_layers": 4},
    "t5": {"d_ff": 512, "num_layers": 4},
}


class World:
    """A task and a checkpoint of four wide layers, on which budgets can be met."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.family = folder, family
        self.task = task_file(folder / "task", examples=80, words=(4, 24))
        self.backbone = tiny_checkpoint(folder / "tiny", family, **WIDE[family])

    def context(self, **values: Any) -> RunContext:
        config = quick_config(self.task, self.backbone, **{"method": "topk_tokens", "ratio": 4, **values})
        return context(config, self.folder / "cache")


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("topk"), request.param)


def compress(ctx: RunContext) -> tuple[Any, Teacher]:
    teacher, chosen = get_teacher(ctx), ctx.config.build_method()
    ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
    return chosen.compress(teacher, load_task(ctx.task), ctx), teacher


def ids_of(ctx: RunContext, i: int, split: str = "dev") -> Tensor:
    return torch.tensor(ctx.features[split][i]["input_ids"])


def padded(ids: Tensor, more: int) -> dict[str, Tensor]:
    mask = (torch.arange(len(ids) + more) < len(ids)).long()[None]
    return {"input_ids": torch.nn.functional.pad(ids, (0, more))[None], "attention_mask": mask}


def seen(*rows: list[float]) -> Seen:
    """One head, in which every query pays the same attention."""
    n = len(rows[0])
    return Seen(torch.empty(0), torch.tensor(rows)[:, None, None].expand(-1, 2, n, n))


def test_importance_is_the_attention_paid_by_real_queries_in_equal_shares() -> None:
    """Against a loop; padded queries look at whatever they like."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    logits = torch.randn(2, 3, 5, 5, generator=generator).masked_fill(~mask[:, None, None], -1e9)
    p = logits.softmax(-1)
    score = importance(Tokens(torch.zeros(2, 5, 4), mask), Seen(torch.empty(0), p))
    for b, n in enumerate((5, 3)):
        expected = [sum(p[b, h, q, i].item() for h in range(3) for q in range(n)) / (3 * n) * n for i in range(n)]
        assert score[b, :n].tolist() == pytest.approx(expected, rel=1e-5)
        assert score[b, :n].mean().item() == pytest.approx(1, rel=1e-5)


def test_the_most_important_stay_special_ones_first_and_equals_in_order() -> None:
    step = KeepMost([0, 1, 2, 2, 2, 3, 3])
    mask = torch.tensor([[True] * 6, [True] * 5 + [False], [True] * 3 + [False] * 3])
    special = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1], [0] * 6]).bool()
    paid = seen([0.01, 0.3, 0.1, 0.4, 0.18, 0.01], [0.2, 0.2, 0.3, 0.2, 0.1, 0.0], [0.5, 0.2, 0.3, 0, 0, 0])
    x = torch.arange(18.0).reshape(3, 6, 1)
    out = step(Tokens(x, mask, special), paid)
    assert out.positions is not None
    # a special token outranks any other; padding, even where it is special, never stays
    assert [row[real].tolist() for row, real in zip(out.positions, out.mask, strict=True)] == [
        [0, 3, 5],
        [0, 1, 2],
        [0, 2],
    ]
    assert out.mask.tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    assert out.x[0].flatten().tolist() == [0, 3, 5] and out.x[2, :2].flatten().tolist() == [12, 14]
    # behind another removal, it is still the length that went in which says how many stay
    again = step(out.replace(special=None), seen([0.1, 0.5, 0.4], [0.3, 0.3, 0.4], [0.6, 0.4, 0.0]))
    assert again.mask.sum(1).tolist() == [3, 3, 2]


def test_counts_of_a_share() -> None:
    assert [int(c) for c in kept(0.5, 4, 20)] == [20, 10, 5, 3, LEAST]
    assert [int(c) for c in kept(0.9, 3, 1)] == [1, 1, 1, 1]
    assert [int(c) for c in kept(1.0, 3, 7)] == [7, 7, 7, 7] and [int(c) for c in kept(0.0, 2, 7)] == [7, 2, 2]


@pytest.mark.parametrize("backbone", ["minilm-l6", "t5-base"])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_every_length_meets_its_own_budget(backbone: str, k: int) -> None:
    """The MACs are written out here; whatever the mixture of lengths, the sum is then right."""
    spec = spec_of(backbone)
    schedule = Schedule.solve(spec, k, range(1, 301))
    inner, weights = spec.n_heads * spec.d_head, (3 if spec.gated else 2) * spec.d_model * spec.d_ff
    for n in (*range(1, 40), 77, 128, 300):
        counts = [int(c[n - 1]) for c in schedule.counts]
        assert counts[0] == n and all(a >= b >= min(n, LEAST) for a, b in itertools.pairwise(counts))
        macs = [4 * m * spec.d_model * inner + 2 * m * m * inner + s * weights for m, s in itertools.pairwise(counts)]
        dense = spec.encoder_layers * (4 * n * spec.d_model * inner + 2 * n * n * inner + n * weights)
        assert schedule.macs[n - 1] == sum(macs) and schedule.dense[n - 1] == dense
        if n >= 8:
            assert sum(macs) / dense == pytest.approx(remaining(spec, k, {n: 1}), rel=0.15 / n**0.5)
    mixture = Counter(np.random.default_rng(k).integers(5, 300, 500).tolist())
    setting = TopkTokens().setting(spec, k, mixture)
    assert setting.remaining == pytest.approx(remaining(spec, k, mixture), rel=1e-3) and not setting.note
    assert 0 < setting.knob["share"] < 1


def test_what_cannot_be_met() -> None:
    shallow = dataclasses.replace(spec_of("minilm-l6"), encoder_layers=1)
    with pytest.raises(Unreachable, match=r"2 vectors that stay.*leaves 77\.8%.*more than the 64\.0% asked for"):
        TopkTokens().setting(shallow, 8, {3: 1})
    assert "whole vectors leave" in TopkTokens().setting(spec_of("minilm-l6"), 4, {4: 1}).note
    for ratio in (None, 1, 2.5):
        assert str(ratio) in str(TopkTokens().skip(spec_of("t5-base"), TASKS["squad"], ratio))
    assert TopkTokens().skip(spec_of("t5-base"), TASKS["squad"], 4) is None


def test_untrained_it_is_the_teacher_with_tokens_masked(world: World) -> None:
    """Against the teacher's own layers, one head and one example at a time, with nothing removed but masked."""
    ctx = world.context(steps=0)
    student, teacher = compress(ctx)
    special = set(ctx.tokenizer.all_special_ids) - {ctx.tokenizer.unk_token_id}
    for i in range(6):
        ids = ids_of(ctx, i)
        schedule = Schedule.solve(ctx.spec, 4, [len(ids)])
        is_special = [int(token) in special for token in ids]

        def rule(
            layer: int, paid: Tensor, present: list[int], flags: Any = is_special, made: Any = schedule
        ) -> list[int]:
            first = sorted(range(len(present)), key=lambda place: (not flags[present[place]], -paid[place].item()))
            return first[: int(made.counts[layer + 1][0])]

        expected, counts = encode_masked(teacher.model, ids, rule)
        states = encode_hidden(student.model, **padded(ids, 0))[0]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
        assert counts == [int(c[0]) for c in schedule.counts] and counts[-1] < len(ids)
        dense = encode_hidden(teacher.model.model, **padded(ids, 0))[0]
        assert not torch.allclose(states, dense, atol=1e-3)


def test_it_costs_what_was_solved_for(world: World) -> None:
    ctx = world.context()
    student, teacher = compress(ctx)
    before = digest(teacher.model)
    ctx.features["dev"] = ctx.features["dev"][:30]
    cost = measure_cost(student, teacher, ctx)
    assert not depends_on_input(student)
    lengths = ctx.lengths("dev")
    schedule = Schedule.solve(ctx.spec, 4, lengths)
    assert cost.real.compressed.encoder == 2 * sum(schedule.macs * list(lengths.values()))
    assert cost.real.compressed.overhead == 0 and cost.real.compressed.decoder == cost.real.dense.decoder
    # dev has other lengths than those that the setting was solved for
    assert cost.achieved_remaining == pytest.approx(cost.requested_remaining, rel=0.01)
    check_budget(cost, ctx)
    assert not ctx.notes
    assert cost.padded.compressed.encoder < 0.7 * cost.padded.dense.encoder
    assert digest(teacher.model) == before == digest(get_teacher(ctx).model)
    assert ctx.trained_parameters == cost.parameters_added == cost.parameters_total == cost.parameters_teacher
    assert [(s.name, s.steps) for s in ctx.stages[1:2]] == [("topk_tokens", 6)]


def test_with_nothing_removed_it_is_the_teacher(world: World) -> None:
    ctx = world.context(steps=0)
    student, teacher = compress(ctx)
    for layer in written_encoder(student).layers:
        layer.step.counts = torch.arange(100)  # type: ignore[union-attr]
    inputs = padded(ids_of(ctx, 0), 3)
    torch.testing.assert_close(student(**inputs).logits, teacher.model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_padding_changes_neither_answer_nor_count(world: World) -> None:
    ctx = world.context()
    student, _ = compress(ctx)
    longest: list[int] = []
    written_encoder(student).layers[-1].register_forward_hook(lambda _, __, out: longest.append(out.x.shape[1]))
    for i in range(5):
        alone, wide = (student(**padded(ids_of(ctx, i), more)).logits for more in (0, 23))
        torch.testing.assert_close(alone, wide, atol=1e-5, rtol=1e-5)
    assert longest[::2] == longest[1::2] and len(set(longest)) > 1


def test_training_brings_it_nearer_to_the_teacher(world: World) -> None:
    distances = []
    for steps in (0, 40):
        ctx = world.context(steps=steps, lr=2e-3, losses="last_hidden=1")
        student, teacher = compress(ctx)
        states = []
        for i in range(20):
            inputs = padded(ids_of(ctx, i), 0)
            states.append([encode_hidden(model.model, **inputs)[0].detach() for model in (student, teacher.model)])
        own, target = (torch.cat(side) for side in zip(*states, strict=True))
        distances.append(((own - target).square().mean() / target.var(0).mean()).item())
    assert distances[1] < 0.7 * distances[0], distances


def test_a_student_of_the_cache_answers_the_same(world: World) -> None:
    ctx = world.context()
    first, _ = compress(ctx)
    again = world.context()
    second, _ = compress(again)
    assert all(stage.cached for stage in again.stages) and again.setting == ctx.setting
    inputs = padded(ids_of(ctx, 1), 2)
    assert torch.equal(first(**inputs).logits, second(**inputs).logits)


KINDS: dict[str, dict[str, Any]] = {
    "regression": {"kind": "regression", "labels": None, "label": "number", "metrics": "[pearson]"},
    "qa": {"kind": "qa", "labels": None, "label": "answer", "text_pair": "text", "text": "other",
           "prompt": '"{text} {text_pair}"'},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "family"), [("regression", "bert"), ("qa", "bert"), ("qa", "t5")])
def test_it_runs_on_other_kinds_of_task(kind: str, family: Family, tmp_path: Path) -> None:
    backbone = tiny_checkpoint(tmp_path / family, family, **WIDE[family])
    task = task_file(tmp_path / "task", examples=24, words=(4, 20), **KINDS[kind])
    ctx = context(quick_config(task, backbone, method="topk_tokens", ratio=2, steps=2), tmp_path / "cache")
    student, teacher = compress(ctx)
    assert set(ctx.stages[-1].history[-1]) == {"step", "lr", "loss", "logits", "task"}
    check_budget(measure_cost(student, teacher, ctx), ctx)
