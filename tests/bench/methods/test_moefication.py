"""MoEfication: how neurons are grouped, which experts a token runs, at what cost, and that all of them are the FFN."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import Tokens
from bench.backbones.sites import EncoderView, digest
from bench.backbones.surgery import ffn_in, ffn_out
from bench.backbones.write_out import write_out
from bench.context import RunContext, Teacher
from bench.costing import check_budget, depends_on_input, measure_cost
from bench.errors import Unreachable
from bench.measure.closed_form import remaining
from bench.methods import experts
from bench.methods.experts import ExpertFFN, Experts, RouterLoss, balanced_clusters
from bench.methods.moefication import Moefication, divisor_near, spread
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.training.stage import FeatureBatches, model_inputs
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint, tokens

WIDE: dict[Family, dict[str, Any]] = {
    "bert": {"intermediate_size": 512, "num_hidden_layers": 3, "hidden_act": "relu"},
    "t5": {"d_ff": 512, "num_layers": 3},
}
LAYERS, D, WIDTH, SIZE, COUNT = 3, 32, 512, 32, 16


class World:
    """A task and a checkpoint of three wide layers with ReLU, on which budgets can be met."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.task = folder, task_file(folder / "task", words=(1, 25))
        self.backbone = tiny_checkpoint(folder / "tiny", family, **WIDE[family])

    def context(self, cache: str = "cache", **values: Any) -> RunContext:
        config = quick_config(self.task, self.backbone, **{"method": "moefication", "ratio": 4, **values})
        return context(config, self.folder / cache)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("moefication"), request.param)


@torch.enable_grad()  # also inside a test that needs no gradients itself
def compress(ctx: RunContext, experts: int | None = None) -> tuple[Any, Teacher]:
    teacher, chosen = get_teacher(ctx), Moefication(**ctx.config.options)
    ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
    if experts is not None:
        ctx.setting = dataclasses.replace(ctx.setting, knob=ctx.setting.knob | {"experts": experts})
    return chosen.compress(teacher, load_task(ctx.task), ctx), teacher


def expert_ffns(model: nn.Module) -> list[ExpertFFN]:
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]


def neurons(layer: ExpertFFN) -> Tensor:
    """Return the neurons of each expert, (experts, size)."""
    return layer.inner.order.view(COUNT, SIZE)


@pytest.mark.parametrize(("count", "size"), [(1, 6), (6, 1), (4, 8), (16, 32)])
def test_clusters_are_of_one_size(count: int, size: int) -> None:
    points = np.random.default_rng(0).normal(size=(count * size, 5)) ** 3
    order = balanced_clusters(points, size, seed=0)
    assert sorted(order) == list(range(count * size))
    groups = order.reshape(count, size)
    assert (np.diff(groups, axis=1) > 0).all()
    assert np.array_equal(order, balanced_clusters(points, size, seed=0))


def test_planted_clusters_are_found() -> None:
    rng = np.random.default_rng(1)
    owner = rng.permutation(np.repeat(np.arange(12), 8))
    points = rng.normal(size=(12, 20))[owner] + 0.05 * rng.normal(size=(96, 20))
    groups = balanced_clusters(points, 8, seed=3).reshape(12, 8)
    assert all(len(set(owner[group])) == 1 for group in groups) and len(set(owner[groups[:, 0]])) == 12


def test_no_exchange_of_two_points_would_better_the_clusters() -> None:
    """Ordinary k-means would put 14 points in one of two clusters of ten: who must leave is whom it costs least."""
    points = np.concatenate([np.linspace(0, 1, 14), np.linspace(3, 4, 6)])[:, None]
    groups = balanced_clusters(points, 10, seed=0).reshape(2, 10)
    assert sorted(map(tuple, groups.tolist())) == [tuple(range(10)), tuple(range(10, 20))]
    points = np.random.default_rng(2).normal(size=(48, 3)) ** 3
    groups = balanced_clusters(points, 8, seed=0).reshape(6, 8)
    centres = points[groups].mean(1)
    cost = np.square(points[:, None] - centres).sum(-1)
    owner = {int(p): c for c, group in enumerate(groups) for p in group}
    for a, b in itertools.combinations(range(48), 2):
        here, there = cost[a, owner[a]] + cost[b, owner[b]], cost[a, owner[b]] + cost[b, owner[a]]
        assert here <= there + 1e-9


@pytest.mark.parametrize("name", ["t5-small", "t5-base", "t5-large"])
@pytest.mark.parametrize("k", [2, 3, 4, 8, 16])
def test_the_budget_is_met(name: str, k: int) -> None:
    spec = spec_of(name)
    for lengths in ({128: 1}, {512: 1}, {n: 1 + n % 3 for n in range(8, 70)}):
        setting = Moefication().setting(spec, k, lengths)
        experts, count = setting.knob["experts"], spec.d_ff // 32
        assert setting.knob == {"experts": experts, "of": count * spec.encoder_layers, "expert_size": 32}
        inner, own, dense = spec.n_heads * spec.d_head, 0, 0
        for n, times in lengths.items():
            attention = 4 * n * spec.d_model * inner + 2 * n * n * inner
            router = n * (spec.d_model * count + count * count)
            own += times * (spec.encoder_layers * (attention + router) + n * experts * 64 * spec.d_model)
            dense += times * spec.encoder_layers * (attention + 2 * n * spec.d_model * spec.d_ff)
        assert setting.remaining == pytest.approx(own / dense, rel=1e-12)
        budget = remaining(spec, k, lengths)
        assert 0.99 * budget < setting.remaining <= budget and setting.note == ""
        parameters = spec.d_model * count + count + count * count + count
        assert setting.added == spec.encoder_layers * parameters


def test_budgets_beyond_its_reach() -> None:
    spec = dataclasses.replace(spec_of("t5-small"), d_ff=512)
    with pytest.raises(Unreachable, match=r"one expert of 512 neurons a layer.*more than the .* asked for"):
        Moefication(expert_size=512).setting(spec, 4, {64: 1})
    # the plugin that sets the budget may cost more than a narrow FFN
    narrow = dataclasses.replace(spec, d_model=32, d_ff=64, n_heads=4, d_head=8)
    setting, budget = Moefication(expert_size=64).setting(narrow, 2, {64: 1}), remaining(narrow, 2, {64: 1})
    assert budget > 1.1 and setting.knob["experts"] == setting.knob["of"] and "nothing is removed for" in setting.note


@pytest.mark.parametrize(
    ("name", "activation"), [("bert-base-uncased", "gelu"), ("minilm-l6", "gelu"), ("flan-t5-base", "gated gelu_new")]
)
def test_it_needs_relu(name: str, activation: str) -> None:
    reason = Moefication().skip(spec_of(name), TASKS["sst2"], 4)
    assert reason is not None and name in reason and reason.endswith(f"have {activation}")
    assert Moefication().skip(dataclasses.replace(spec_of(name), activation="relu", gated=True), TASKS["sst2"], 4)
    assert Moefication().skip(spec_of("t5-base"), TASKS["sst2"], 4) is None


@pytest.mark.parametrize("ratio", [None, 1, 2.5])
def test_a_ratio_that_names_no_budget(ratio: float | None) -> None:
    reason = Moefication().skip(spec_of("t5-base"), TASKS["sst2"], ratio)
    assert reason is not None and str(ratio) in reason


def test_sizes_and_shares() -> None:
    assert [divisor_near(32, whole) for whole in (3072, 1000, 31, 97, 72)] == [32, 25, 31, 1, 36]
    for layers, total in itertools.product((1, 3, 12), (0, 1, 5, 11, 12, 40)):
        parts = spread(total, layers)
        assert len(parts) == layers and sum(parts) == total and max(parts) - min(parts) <= 1


def test_it_costs_what_its_setting_says(world: World) -> None:
    ctx, size, count = world.context(expert_size=16), 16, 32
    ctx.features["dev"] = ctx.features["selection"]
    student, teacher = compress(ctx)
    before = digest(teacher.model)
    cost = measure_cost(student, teacher, ctx)
    check_budget(cost, ctx)
    assert cost.achieved_remaining == pytest.approx(ctx.setting.remaining, rel=1e-12)
    assert cost.requested_remaining == pytest.approx(ctx.setting.remaining, rel=0.02)
    assert not depends_on_input(student)
    real = sum(n * times for n, times in ctx.lengths("dev").items())
    assert cost.real.compressed.overhead == 2 * LAYERS * real * (D * count + count * count)
    experts = ctx.setting.knob["experts"]
    saved = (LAYERS * count - experts) * size * 2 * D * real * 2 - cost.real.compressed.overhead
    assert cost.real.dense.encoder - cost.real.compressed.encoder == saved
    # padding runs the router and the experts of no layer
    assert cost.padded.compressed.overhead == cost.real.compressed.overhead
    assert cost.parameters_added == cost.parameters_trained == ctx.setting.added == ctx.trained_parameters
    assert cost.parameters_total == cost.parameters_teacher + cost.parameters_added
    assert ctx.bytes_added > 4 * cost.parameters_added + 2 * LAYERS * WIDTH
    assert digest(teacher.model) == before
    assert [(s.name, s.steps, s.examples) for s in ctx.stages[1:]] == [("routers", 6, 48)]
    assert [layer.chosen for layer in expert_ffns(student)] == spread(experts, LAYERS)


@torch.no_grad()
def test_the_cost_does_not_depend_on_which_experts_are_chosen(world: World) -> None:
    """However unequal their load: the neurons that run are tokens times experts a token times neurons an expert."""
    student, _ = compress(world.context(), experts=15)
    layer, u = expert_ffns(student)[0], torch.randn(1, 40, D, generator=torch.Generator().manual_seed(0))
    loads = []
    for scale in (1.0, 0.0):
        layer.router.up.weight.mul_(scale)
        where = Tokens(u, torch.ones(1, 40, dtype=torch.bool))
        rows = []
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            layer(u, where, None)
        loads.append(layer.router(u).topk(5).indices.flatten().bincount(minlength=COUNT))
        rows.append(counter.get_total_flops())
        assert rows == [2 * 40 * (5 * SIZE * 2 * D + D * COUNT + COUNT * COUNT)]
    assert loads[1].max() == 40 > loads[0].max() and loads[1].min() == 0


@torch.no_grad()
def test_all_experts_are_the_teacher(world: World) -> None:
    student, teacher = compress(world.context(), experts=LAYERS * COUNT)
    inputs = {"input_ids": tokens(3, 9)}
    torch.testing.assert_close(student(**inputs).logits, teacher.model(**inputs).logits, atol=1e-5, rtol=1e-5)
    fewer, _ = compress(world.context(), experts=LAYERS)
    assert not torch.allclose(fewer(**inputs).logits, teacher.model(**inputs).logits, atol=1e-4)


@torch.no_grad()
def test_a_layer_is_the_ffn_with_the_other_neurons_silent(world: World) -> None:
    student, teacher = compress(world.context(), experts=3 * 4)
    u, mask = torch.randn(2, 7, D), torch.arange(7) < torch.tensor([[7], [3]])
    for site, layer in zip(EncoderView(write_out(teacher.model)).sites(), expert_ffns(student), strict=True):
        (into,), out = ffn_in(site.inner), ffn_out(site.inner)
        z = layer(u, Tokens(u, mask), None)
        for b, i in np.argwhere(mask.numpy()):
            active = into(u[b, i]).relu()
            best = layer.router(u[b, i]).argsort(descending=True)[:4]
            audible = torch.zeros(WIDTH)
            audible[neurons(layer)[best].flatten()] = 1
            torch.testing.assert_close(z[b, i], out(active * audible), atol=1e-5, rtol=1e-5)
        assert not z[~mask].any()


@torch.no_grad()
def test_untrained_routers_follow_the_mean_of_the_weights(world: World) -> None:
    student, teacher = compress(world.context(steps=0))
    u = 0.01 * torch.randn(20, D)
    for site, layer in zip(EncoderView(write_out(teacher.model)).sites(), expert_ffns(student), strict=True):
        weights = ffn_in(site.inner)[0](u)[:, neurons(layer)].mean(-1)
        torch.testing.assert_close(layer.router(u), torch.tanh(weights), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def captured(ctx: RunContext, student: nn.Module, teacher: nn.Module, scores: Any) -> float:
    """Return the share of all positive activations on dev that lies in the four experts with the highest scores."""
    batch = FeatureBatches(ctx.features["dev"], 20, ctx.tokenizer.pad_token_id, 0, ctx.device)(0)
    dense, seen = write_out(teacher), []
    sites = EncoderView(dense).sites()
    for site in sites:
        site.inner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense(**model_inputs(batch))
    inside = total = 0.0
    for site, layer, u in zip(sites, expert_ffns(student), seen, strict=True):
        real = u[batch["attention_mask"].bool()]
        sums = ffn_in(site.inner)[0](real).relu()[:, neurons(layer)].sum(-1)
        best = scores(layer, real, sums).topk(4, dim=1).indices
        inside, total = inside + sums.gather(1, best).sum().item(), total + sums.sum().item()
    return inside / total


def test_trained_routers_find_what_is_active(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From random weights, since on random FFNs the start is as good as a router can be."""

    class Blank(experts.Router):
        def __init__(self, of: Experts) -> None:
            super().__init__(of)
            self.down.reset_parameters()
            self.up.reset_parameters()

    def share(scores: Any) -> float:
        return captured(ctx, student, teacher.model, scores)

    informed = {}
    for router in (experts.Router, Blank):
        monkeypatch.setattr(experts, "Router", router)
        for steps in (0, 100):
            ctx = world.context(cache=router.__name__, steps=steps, lr=3e-3)
            student, teacher = compress(ctx)
            informed[router, steps] = share(lambda layer, u, sums: layer.router(u))
    generator = torch.Generator().manual_seed(0)
    chance = share(lambda layer, u, sums: torch.rand(sums.shape, generator=generator))
    best = share(lambda layer, u, sums: sums)
    assert chance == pytest.approx(4 / COUNT, abs=0.03) == pytest.approx(informed[Blank, 0], abs=0.06)
    for case in (case for case in informed if case != (Blank, 0)):
        assert 0.8 < (informed[case] - chance) / (best - chance) < 1, (chance, informed, best)


def test_routers_find_planted_experts() -> None:
    """Neurons of a group share a direction, so that the group with the largest product is the one that is active."""
    generator = torch.Generator().manual_seed(4)
    directions = torch.linalg.qr(torch.randn(D, COUNT, generator=generator)).Q.T
    owner = torch.arange(WIDTH)[torch.randperm(WIDTH, generator=generator)] % COUNT
    ffn: Any = nn.Module()
    ffn.wi, ffn.wo = nn.Linear(D, WIDTH, bias=False), nn.Linear(WIDTH, D, bias=False)
    with torch.no_grad():
        ffn.wi.weight.copy_(directions[owner] + 0.02 * torch.randn(WIDTH, D, generator=generator))
    order = torch.from_numpy(balanced_clusters(ffn.wi.weight.detach().numpy(), SIZE, seed=0))
    layer = ExpertFFN(ffn, order, SIZE, 3)
    groups = owner[neurons(layer)]
    assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique()) == COUNT
    u = torch.randn(1, 300, D, generator=generator)
    truth = (u[0] @ directions.T).relu().topk(3, dim=1).indices.sort(1).values
    chosen = groups[:, 0][layer.router(u[0]).topk(3, dim=1).indices].sort(1).values
    assert (truth == chosen).float().mean() > 0.95


def test_the_loss_is_a_cross_entropy_to_normalised_sums(world: World) -> None:
    ctx = world.context()
    student, teacher = compress(ctx)
    batch = FeatureBatches(ctx.features["dev"], 5, ctx.tokenizer.pad_token_id, 0, ctx.device)(0)
    loss = RouterLoss(write_out(teacher.model), expert_ffns(student))(batch)
    dense, expected = write_out(teacher.model), []
    seen: list[Tensor] = []
    for site in EncoderView(dense).sites():
        site.inner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense(**model_inputs(batch))
    for site, layer, u in zip(EncoderView(dense).sites(), expert_ffns(student), seen, strict=True):
        for b, i in np.argwhere(batch["attention_mask"].bool().numpy()):
            sums = ffn_in(site.inner)[0](u[b, i]).relu()[neurons(layer)].sum(-1)
            p = layer.router(u[b, i]).sigmoid()
            y = sums / sums.max()
            expected.append(-(y * p.log() + (1 - y) * (1 - p).log()).mean().item())
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_only_routers_learn(world: World) -> None:
    start, _ = compress(world.context(steps=0))
    student, teacher = compress(world.context())
    own = {id(p) for p in teacher.model.parameters()}
    moved = {name: p for name, p in student.named_parameters() if id(p) not in own}
    assert len(moved) == 4 * LAYERS and all(".router." in name for name in moved)
    before = dict(start.named_parameters())
    assert not any(torch.equal(p, before[name]) for name, p in moved.items())
    assert not student.training and not any(p.requires_grad for p in student.parameters())


def test_all_ratios_share_one_training(world: World) -> None:
    first, _ = compress(world.context(seed=5))
    ctx = world.context(seed=5, ratio=2)
    second, _ = compress(ctx)
    assert all(stage.cached for stage in ctx.stages) and ctx.stages[-1].name == "routers"
    inputs = {"input_ids": tokens(3, 9)}
    assert not torch.allclose(first(**inputs).logits, second(**inputs).logits)
    for a, b in zip(expert_ffns(first), expert_ffns(second), strict=True):
        assert a.chosen < b.chosen and torch.equal(a.inner.order, b.inner.order)
        assert torch.equal(a.router.up.weight, b.router.up.weight)
    ctx = world.context(seed=6, ratio=2)
    compress(ctx)
    assert not ctx.stages[-1].cached


def test_a_student_of_the_cache_answers_the_same(world: World) -> None:
    inputs = {"input_ids": tokens(3, 9)}
    first, _ = compress(world.context())
    ctx = world.context()
    second, _ = compress(ctx)
    assert all(stage.cached for stage in ctx.stages)
    torch.testing.assert_close(first(**inputs).logits, second(**inputs).logits, atol=1e-6, rtol=1e-6)


def test_two_fresh_caches_give_the_same_bits(world: World) -> None:
    one, two = (compress(world.context(cache=cache, expert_size=16))[0] for cache in ("one", "two"))
    for a, b in zip(expert_ffns(one), expert_ffns(two), strict=True):
        assert torch.equal(a.inner.order, b.inner.order) and torch.equal(a.router.down.weight, b.router.down.weight)
    assert len(expert_ffns(one)[0].inner.w_in) == 32


def test_padding_changes_no_answer(world: World) -> None:
    student, _ = compress(world.context())
    for n in (2, 7, 12):
        ids = tokens(2, n, seed=n)
        padded = torch.cat((ids, torch.zeros(2, 9, dtype=torch.long)), 1)
        mask = (torch.arange(n + 9) < n).long().expand(2, n + 9)
        alone = student(ids).logits
        torch.testing.assert_close(student(padded, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-5)


def test_a_width_without_that_divisor_is_noted(world: World) -> None:
    ctx = world.context(expert_size=40, steps=1)
    student, _ = compress(ctx)
    assert len(expert_ffns(student)[0].inner.w_in) == 16
    assert ctx.notes == ["experts have 32 neurons: 40 do not divide 512"]


def test_experts_of_no_token_are_no_trouble() -> None:
    ffn: Any = nn.Module()
    ffn.wi, ffn.wo = nn.Linear(4, 6), nn.Linear(6, 4)
    experts = Experts(ffn, torch.tensor([5, 0, 1, 2, 4, 3]), 2)
    u, chosen = torch.randn(3, 4), torch.tensor([[2], [0], [2]])
    keep = torch.tensor([[0, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0]])
    torch.testing.assert_close(experts(u, chosen), ffn.wo(ffn.wi(u).relu() * keep))


KINDS: dict[str, dict[str, Any]] = {
    "regression": {"kind": "regression", "labels": None, "label": "number", "metrics": "[pearson]"},
    "qa": {"kind": "qa", "labels": None, "label": "answer", "text_pair": "text", "text": "other",
           "prompt": '"{text} {text_pair}"'},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "family"), [("regression", "bert"), ("qa", "bert"), ("qa", "t5")])
def test_it_runs_on_other_kinds_of_task(kind: str, family: Family, tmp_path: Path) -> None:
    backbone = tiny_checkpoint(tmp_path / family, family, **WIDE[family])
    task = task_file(tmp_path / "task", examples=24, **KINDS[kind])
    ctx = context(quick_config(task, backbone, method="moefication", ratio=2, steps=2), tmp_path / "cache")
    ctx.features["dev"] = ctx.features["selection"]
    student, teacher = compress(ctx)
    cost = measure_cost(student, teacher, ctx)
    assert cost.achieved_remaining == pytest.approx(ctx.setting.remaining, rel=1e-12)
    if kind == "qa" and family == "t5":
        assert student.generate(tokens(2, 6), max_new_tokens=3).shape[0] == 2
