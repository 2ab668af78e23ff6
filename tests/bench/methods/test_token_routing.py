"""Token routing: which tokens run through the FFN, with what weight, at what cost, and what its start is a fit of."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import Tokens
from bench.backbones.sites import digest
from bench.backbones.write_out import write_out, written_encoder
from bench.context import RunContext, Teacher
from bench.costing import check_budget, depends_on_input, measure_cost
from bench.errors import Unreachable
from bench.measure.closed_form import layer_macs, remaining
from bench.methods import token_routing
from bench.methods.routed_ffn import RoutedFFN, fit_routing, soft_top_k
from bench.methods.token_routing import PARTS, TokenRouting
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.training.stage import FeatureBatches, model_inputs
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint, tokens

WIDE: dict[Family, dict[str, int]] = {
    "bert": {"intermediate_size": 512, "num_hidden_layers": 3},
    "t5": {"d_ff": 512, "num_layers": 3},
}
GATED = {"feed_forward_proj": "gated-gelu"}


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_routing, "FIT_TOKENS", 1000)


class World:
    """A task and a checkpoint of three wide layers, on which budgets can be met."""

    def __init__(self, folder: Path, family: Family, **changes: Any) -> None:
        self.folder, self.task = folder, task_file(folder / "task", words=(1, 25))
        self.backbone = tiny_checkpoint(folder / "tiny", family, **WIDE[family], **changes)

    def context(self, **values: Any) -> RunContext:
        config = quick_config(self.task, self.backbone, **{"method": "token_routing", "ratio": 4, **values})
        return context(config, self.folder / "cache")


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    changes = GATED if request.param == "t5" else {}
    return World(tmp_path_factory.mktemp("routing"), request.param, **changes)


@torch.enable_grad()  # also inside a test that needs no gradients itself
def compress(ctx: RunContext, share: float | None = None) -> tuple[Any, Teacher]:
    teacher, chosen = get_teacher(ctx), TokenRouting(**ctx.config.options)
    ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
    if share is not None:
        ctx.setting = dataclasses.replace(ctx.setting, knob={"share": share})
    return chosen.compress(teacher, load_task(ctx.task), ctx), teacher


def routed(model: nn.Module) -> list[RoutedFFN]:
    return [module for module in model.modules() if isinstance(module, RoutedFFN)]


def threshold(scores: np.ndarray[Any, Any], k: int) -> np.ndarray[Any, Any]:
    """Return the weights of soft top-k by a root search for the one unknown of its solution."""
    s = scores.astype(np.float64) / 0.1
    t = brentq(lambda t: np.minimum(1, np.exp(np.minimum(s - t, 0))).sum() - k, s.min() - 1, s.max() + 50)
    return np.minimum(1, np.exp(np.minimum(s - t, 0)))


@pytest.mark.parametrize("spread", [0.01, 0.1, 1.0, 20.0])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_soft_top_k_is_the_solution_of_its_equation(k: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(6, 13, generator=generator) * spread
    mask = torch.arange(13) < torch.tensor([[13], [12], [11], [10], [9], [8]])
    weights, chosen = soft_top_k(scores, mask, torch.full((6,), k))
    for row in range(6):
        real = scores[row, mask[row]].numpy()
        expected = threshold(real, k) if k < len(real) else np.ones(k)
        np.testing.assert_allclose(weights[row, mask[row]].numpy(), expected, atol=2e-4)
        assert set(np.flatnonzero(chosen[row])) == set(np.argsort(-real)[:k])
    assert not weights[~mask].any() and not chosen[~mask].any()


def test_weights_pass_on_the_gradient_of_the_whole_example() -> None:
    """Also a token that was not chosen learns: its score takes weight from the others."""
    scores = torch.tensor([[0.3, 0.21, 0.2, 0.12, 0.05, -0.3]], dtype=torch.float32)
    mask, k, step = torch.ones(1, 6, dtype=torch.bool), torch.tensor([3]), 1e-4
    jacobian = torch.autograd.functional.jacobian(lambda s: soft_top_k(s, mask, k)[0][0], scores)[:, 0]
    for i in range(6):
        moved = [scores.numpy()[0] + sign * step * np.eye(6)[i] for sign in (1, -1)]
        slope = (threshold(moved[0], 3) - threshold(moved[1], 3)) / (2 * step)
        np.testing.assert_allclose(jacobian[:, i], slope, atol=2e-3)
    assert not jacobian[0].any() and jacobian[1:, 3].all()


def test_clear_scores_give_full_weight_and_equal_ones_the_first_place() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    weights, chosen = soft_top_k(torch.tensor([[5.0, -5.0, 4.0, -4.0]]), mask, torch.tensor([2]))
    assert weights[0, [0, 2]].tolist() == [1.0, pytest.approx(1)] and chosen[0].tolist() == [True, False, True, False]
    weights, chosen = soft_top_k(torch.zeros(1, 4), mask, torch.tensor([3]))
    assert weights[0].tolist() == pytest.approx([0.75] * 4) and chosen[0].tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", ["bert-base-uncased", "minilm-l6", "t5-base", "flan-t5-base"])
@pytest.mark.parametrize("k", [2, 3, 4, 8, 16])
def test_the_budget_is_met(name: str, k: int) -> None:
    spec = spec_of(name)
    for lengths in ({128: 1}, {512: 1}, {n: 1 + n % 3 for n in range(8, 70)}):
        setting = TokenRouting().setting(spec, k, lengths)
        own = dense = 0
        for n, times in lengths.items():
            rows = math.ceil(round(setting.knob["share"] * PARTS) * n / PARTS)
            weights = (3 if spec.gated else 2) * spec.d_model * spec.d_ff
            inner = spec.n_heads * spec.d_head
            attention = 4 * n * spec.d_model * inner + 2 * n * n * inner
            own += times * (attention + rows * weights + n * spec.d_model * (64 + 64 + 1))
            dense += times * (attention + n * weights)
        assert setting.remaining == pytest.approx(own / dense, rel=1e-12)
        assert setting.remaining == pytest.approx(remaining(spec, k, lengths), rel=0.01) and setting.note == ""
        assert setting.added == spec.encoder_layers * (129 * spec.d_model + 64 + 1 + spec.d_model)


def test_no_other_share_comes_nearer() -> None:
    spec, lengths = spec_of("minilm-l6"), {n: 1 + n % 3 for n in range(8, 24)}
    setting, budget = TokenRouting().setting(spec, 4, lengths), remaining(spec, 4, lengths)
    distances = []
    for parts in range(1, PARTS + 1, 1000):
        macs = sum(t * token_routing.layer_cost(spec, n, parts, 64) for n, t in lengths.items())
        dense = sum(t * layer_macs(spec, n, n, n) for n, t in lengths.items())
        distances.append(abs(macs / dense - budget))
    assert abs(setting.remaining - budget) <= min(distances) + 1e-12


def test_a_budget_that_no_share_meets() -> None:
    with pytest.raises(Unreachable, match=r"one token of each example.*more than the .* asked for"):
        TokenRouting(bottleneck=2048).setting(spec_of("minilm-l6"), 64, {64: 1})
    setting = TokenRouting().setting(spec_of("minilm-l6"), 2, {3: 1})
    assert setting.knob["share"] == pytest.approx(2 / 3, abs=1e-5) and "nearest to the" in setting.note


@pytest.mark.parametrize("ratio", [None, 1, 2.5])
def test_a_ratio_that_names_no_budget(ratio: float | None) -> None:
    reason = TokenRouting().skip(spec_of("t5-base"), TASKS["sst2"], ratio)
    assert reason is not None and str(ratio) in reason
    assert TokenRouting().skip(spec_of("t5-base"), TASKS["sst2"], 4) is None


def test_it_costs_what_its_setting_says(world: World) -> None:
    ctx = world.context(ratio=2)
    ctx.features["dev"] = ctx.features["selection"]
    student, teacher = compress(ctx)
    before = digest(teacher.model)
    cost = measure_cost(student, teacher, ctx)
    check_budget(cost, ctx)
    assert cost.achieved_remaining == pytest.approx(ctx.setting.remaining, rel=1e-12)
    assert cost.requested_remaining == pytest.approx(ctx.setting.remaining, rel=0.02) and not depends_on_input(student)
    real = sum(n * times for n, times in ctx.lengths("dev").items())
    assert cost.real.compressed.overhead == 2 * 3 * real * 32 * (1 + 2 * 8)
    assert cost.parameters_added == cost.parameters_trained == ctx.setting.added == ctx.trained_parameters
    assert ctx.bytes_added > 4 * cost.parameters_added and digest(teacher.model) == before
    assert cost.real.compressed.decoder == cost.real.dense.decoder
    assert [(s.name, s.steps, s.examples) for s in ctx.stages[1:]] == [("token_routing", 6, 48)]


def test_the_ffn_is_given_the_chosen_tokens_of_each_example_and_nothing_else(world: World) -> None:
    student, _ = compress(world.context(), share=0.3)
    shapes: list[Any] = []
    for layer in routed(student):
        layer.inner.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    ids = tokens(3, 11)
    mask = (torch.arange(11) < torch.tensor([[11], [4], [10]])).long()
    student(input_ids=ids, attention_mask=mask)
    assert shapes == [(1, 4 + 2 + 3, 32)] * 3


def _by_hand(layer: RoutedFFN, u: Tensor, n: int, rows: int) -> Tensor:
    """Return the output of one example of n tokens, a token at a time."""
    scores = [float(layer.router(u[i])) for i in range(n)]
    weights = threshold(np.array(scores), rows) if rows < n else np.ones(n)
    chosen = sorted(range(n), key=lambda i: -scores[i])[:rows]
    out = []
    for i in range(n):
        z = layer.up.weight @ torch.tanh(layer.down.weight @ u[i] + layer.down.bias) + layer.up.bias
        out.append(z + weights[i] * layer.inner(u[i].view(1, 1, -1))[0, 0] if i in chosen else z)
    return torch.stack(out).float()


@torch.no_grad()
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_a_layer_is_its_formula(world: World, share: float) -> None:
    student, _ = compress(world.context())
    u, lengths = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1)), (9, 5, 1)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    for layer in routed(student):
        layer.parts = round(share * PARTS)
        z = layer(u, Tokens(u, mask), None)
        for b, n in enumerate(lengths):
            expected = _by_hand(layer, u[b], n, max(1, math.ceil(share * n)))
            torch.testing.assert_close(z[b, :n], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_all_tokens_and_a_silent_adapter_are_the_teacher(world: World) -> None:
    student, teacher = compress(world.context(), share=1.0)
    inputs = {"input_ids": tokens(3, 9)}
    assert not torch.allclose(student(**inputs).logits, teacher.model(**inputs).logits, atol=1e-4)
    for layer in routed(student):
        nn.init.zeros_(layer.up.weight)
        nn.init.zeros_(layer.up.bias)
    torch.testing.assert_close(student(**inputs).logits, teacher.model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_only_routers_and_adapters_learn(world: World) -> None:
    start, _ = compress(world.context(steps=0))
    ctx = world.context(steps=12)
    student, teacher = compress(ctx)
    own = {id(p) for p in teacher.model.parameters()}
    moved = {name: p for name, p in student.named_parameters() if id(p) not in own}
    assert {name.rsplit(".", 2)[1] for name in moved} == {"router", "down", "up"} and len(moved) == 3 * 6
    before = dict(start.named_parameters())
    still = [name for name, p in moved.items() if torch.equal(p, before[name])]
    # adding the same number to all scores changes no choice and no weight
    assert all(name.endswith("router.bias") for name in still)
    assert not student.training and not any(p.requires_grad for p in student.parameters())


def test_training_brings_it_nearer_to_the_teacher(world: World) -> None:
    distances = []
    for steps in (0, 80):
        ctx = world.context(steps=steps)
        student, teacher = compress(ctx)
        batches = FeatureBatches(ctx.features["dev"], 40, ctx.tokenizer.pad_token_id, 0, ctx.device)
        inputs = model_inputs(batches(0))
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            own, target = (model(**inputs, hidden=True).encoder_hidden for model in (student, teacher.model))
        distances.append(
            [((a - b)[real].square().mean() / b[real].var()).item() for a, b in zip(own, target, strict=True)]
        )
    assert np.mean(distances[1]) < 0.98 * np.mean(distances[0]), distances


def test_a_student_of_the_cache_answers_the_same(world: World) -> None:
    inputs = {"input_ids": tokens(3, 9)}
    first, _ = compress(world.context())
    ctx = world.context()
    second, _ = compress(ctx)
    assert all(stage.cached for stage in ctx.stages)
    torch.testing.assert_close(first(**inputs).logits, second(**inputs).logits, atol=1e-6, rtol=1e-6)


def test_padding_changes_no_answer(world: World) -> None:
    student, _ = compress(world.context())
    for n in (2, 7, 12):
        ids = tokens(2, n, seed=n)
        padded = torch.cat((ids, torch.zeros(2, 9, dtype=torch.long)), 1)
        mask = (torch.arange(n + 9) < n).long().expand(2, n + 9)
        alone = student(ids).logits
        torch.testing.assert_close(student(padded, attention_mask=mask).logits, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_start_is_a_regression_of_what_is_missing(world: World) -> None:
    """With a bottleneck as wide as the stream no rank is cut, so that plain least squares is the reference."""
    ctx = world.context()
    with torch.enable_grad():  # it is trained here where no other test came before
        teacher = get_teacher(ctx).model
    student = write_out(teacher)
    torch.manual_seed(0)
    for layer in written_encoder(student).layers:
        layer.ffn = RoutedFFN(layer.ffn, 32, 32, round(0.4 * PARTS))  # type: ignore[assignment]
    batches = [{"input_ids": tokens(8, 12, seed=i)} for i in range(20)]
    fit_routing(student, batches)
    for outer, layer in zip(written_encoder(student).layers, routed(student), strict=True):
        seen: list[Tensor] = []
        stream: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])),
            outer.ffn_norm.register_forward_pre_hook(lambda _, args, stream=stream: stream.append(args[0])),
        ]
        for batch in batches:
            student(**batch)
        for hook in hooks:
            hook.remove()
        u, rows = torch.cat(seen), math.ceil(0.4 * 12)
        scores = layer.router(u).squeeze(-1)
        assert scores.mean().abs() < 0.05 and scores.std() == pytest.approx(1, abs=0.02)
        y = layer.inner(u)
        given = torch.zeros_like(scores)
        for b, row in enumerate(scores.numpy()):
            best = np.argsort(-row)[:rows]
            given[b, best] = torch.tensor(threshold(row, rows)[best]).float()
        # on T5 an error counts by what the layer leaves in the stream
        counts = 1 / (torch.cat(stream) + y).square().mean(-1) if outer.pre_norm else torch.ones_like(scores)
        root = counts.double().sqrt().flatten().numpy()[:, None]
        x = root * torch.cat((u, torch.ones_like(u[..., :1])), -1).flatten(0, 1).double().numpy()
        target = root * ((1 - given).unsqueeze(-1) * y).flatten(0, 1).double().numpy()
        fitted = x @ np.linalg.lstsq(x, target, rcond=None)[0]
        rest = (root * layer.adapt(u).flatten(0, 1).double().numpy() - fitted) / fitted.std()
        assert np.sqrt(np.square(rest).mean()) < 0.15
        # the router knows better than chance where a linear map would miss the FFN most
        dense = root * y.flatten(0, 1).double().numpy()
        missed = np.linalg.norm(dense - x @ np.linalg.lstsq(x, dense, rcond=None)[0], axis=1).reshape(scores.shape)
        chosen = np.take_along_axis(missed, np.argsort(-scores.numpy(), axis=1)[:, :rows], 1)
        assert chosen.mean() > missed.mean()
        # as far as a linear map of the vector tells
        plain = x / root
        predicted = plain @ np.linalg.lstsq(plain, np.log(missed).reshape(-1), rcond=None)[0]
        assert np.corrcoef(predicted, scores.flatten().numpy())[0, 1] > 0.9


def test_an_adapter_wider_than_the_stream_keeps_units_that_can_learn(world: World) -> None:
    student, _ = compress(world.context(steps=0, bottleneck=40))
    for layer in routed(student):
        assert layer.up.in_features == 40 and not layer.up.weight[:, 32:].any() and layer.down.weight[32:].any()


KINDS: dict[str, dict[str, Any]] = {
    "regression": {"kind": "regression", "labels": None, "label": "number", "metrics": "[pearson]"},
    "qa": {"kind": "qa", "labels": None, "label": "answer", "text_pair": "text", "text": "other",
           "prompt": '"{text} {text_pair}"'},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "family"), [("regression", "bert"), ("qa", "bert"), ("qa", "t5")])
def test_it_runs_on_other_kinds_of_task(kind: str, family: Family, tmp_path: Path) -> None:
    backbone = tiny_checkpoint(tmp_path / family, family, **WIDE[family])
    task = task_file(tmp_path / "task", examples=24, **KINDS[kind])
    ctx = context(quick_config(task, backbone, method="token_routing", ratio=2, steps=2), tmp_path / "cache")
    ctx.features["dev"] = ctx.features["selection"]
    student, teacher = compress(ctx)
    assert set(ctx.stages[-1].history[-1]) == {"step", "lr", "loss", "all_hidden", "logits"}
    cost = measure_cost(student, teacher, ctx)
    assert cost.achieved_remaining == pytest.approx(ctx.setting.remaining, rel=1e-12)
    if kind == "qa" and family == "t5":
        assert student.generate(tokens(2, 6), max_new_tokens=3).shape[0] == 2
    assert copy.deepcopy(student)(tokens(2, 6)).logits.isfinite().all() if family == "bert" else True


def test_a_first_step_on_t5_is_one_unit_of_each_channel(world: World) -> None:
    """The first step of AdamW is the learning rate for every entry; on BERT it is that itself."""
    lr = 1e-3
    values = {"lr": lr, "warmup": 0.0, "precision": "fp32", "weight_decay": 0.0}
    ctx = world.context(steps=0, **values)
    start, teacher = compress(ctx)
    moved, _ = compress(world.context(steps=1, **values))
    again = write_out(teacher.model)
    for layer, built in zip(written_encoder(again).layers, routed(start), strict=True):
        layer.ffn = RoutedFFN(layer.ffn, 32, built.down.out_features, built.parts)  # type: ignore[assignment]
    batches = FeatureBatches(ctx.features["train"], ctx.config.batch_size, ctx.tokenizer.pad_token_id, 0, ctx.device)
    needed = round(token_routing.FIT_TOKENS / (batches.mean_length * batches.batch_size))
    scales = fit_routing(again.eval(), [model_inputs(batches(step)) for step in range(needed)])
    units = [unit for _, name, unit in scales if name == "bias"]
    assert len(units) == (len(routed(start)) if ctx.spec.family == "t5" else 0)
    for index, (before, after) in enumerate(zip(routed(start), routed(moved), strict=True)):
        step = (after.up.bias - before.up.bias).abs() / lr
        expected = units[index].float() if units else torch.ones(32)
        torch.testing.assert_close(step, expected, rtol=0.05, atol=1e-3)
