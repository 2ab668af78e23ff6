"""Early exit: who leaves where and with which answer, what that costs, and the threshold that meets a budget."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import EncoderLayer
from bench.backbones.model import TaskModel, share_weights
from bench.backbones.sites import digest
from bench.backbones.write_out import written_encoder
from bench.context import RunContext, Teacher
from bench.costing import check_budget, measure_cost, parts_of
from bench.errors import ConfigError, Unreachable
from bench.measure.closed_form import layer_macs, remaining
from bench.measure.flops import count, count_dispatched
from bench.methods.early_exit import EarlyExit, exit_macs, exit_threshold
from bench.methods.early_exit_layers import ExitHead, ExitingEncoder, entropy, let_exit
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.tasks.features import Feature, collate
from bench.training.stage import model_inputs
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint

LAYERS = 4
WIDE: dict[Family, dict[str, int]] = {
    "bert": {"intermediate_size": 512, "num_hidden_layers": LAYERS},
    "t5": {"d_ff": 512, "num_layers": LAYERS},
}


class World:
    """A task and a checkpoint of four wide layers, on which budgets can be met, with its teacher."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.task = folder, task_file(folder / "task", examples=800)
        self.backbone = tiny_checkpoint(folder / "tiny", family, **WIDE[family])
        self.ctx = self.context()
        self.teacher = get_teacher(self.ctx)

    def context(self, cache: str = "cache", **values: Any) -> RunContext:
        values = {"method": "early_exit", "ratio": 4, "steps": 20, "teacher_epochs": 2.0, **values}
        ctx = context(quick_config(self.task, self.backbone, **values), self.folder / cache)
        ctx.features["dev"] = ctx.features["dev"][:40]
        return ctx

    def compress(self, ctx: RunContext) -> TaskModel:
        chosen = EarlyExit(**ctx.config.options)
        ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
        return chosen.compress(self.teacher, load_task(ctx.task), ctx)

    def inputs(self, features: list[Feature], longer: int = 0) -> dict[str, Tensor]:
        batch = model_inputs(collate(features, self.ctx.tokenizer.pad_token_id))
        pad = {"input_ids": self.ctx.tokenizer.pad_token_id}
        return {k: torch.nn.functional.pad(t, (0, longer), value=pad.get(k, 0)) for k, t in batch.items()}

    def random(self, quantile: float | None = None) -> tuple[TaskModel, Tensor, Tensor]:
        """Return a model with random heads, and by the teacher's own hidden states what each head says of dev.

        That is entropies, (examples, heads), and logits, (examples, layers, classes), the last the teacher's own. The
        threshold is the ``quantile`` of all entropies, so that examples exit everywhere; 0 without it.
        """
        torch.manual_seed(1)
        model = let_exit(self.teacher.model, 2, 0.0).eval().requires_grad_(False)
        encoder, answers = exiting(model), []
        alone = [self.inputs([feature]) for feature in self.ctx.features["dev"]]
        outputs = [self.teacher.model(**inputs, hidden=True) for inputs in alone]
        for i, module in enumerate(encoder.heads):
            head = cast(ExitHead, module)
            states = [out.encoder_hidden[i] for out in outputs]
            pooled = torch.cat([x.mean(1) if head.mean else x[:, 0] for x in states])
            # as unlike from example to example in every head
            margin = head.classifier(head.pooler(pooled).tanh()).diff(dim=1)
            head.classifier.weight.mul_(3 / margin.std())
            head.classifier.bias[1] -= head.classifier(head.pooler(pooled).tanh()).diff(dim=1).mean()
            answers.append(head.classifier(head.pooler(pooled).tanh()))
        p = torch.stack(answers, 1).double().softmax(-1)
        entropies = -(p * p.log2()).sum(-1)  # in bits, of two classes
        logits = torch.stack([*answers, torch.cat([out.logits for out in outputs])], 1)
        if quantile is not None:
            encoder.threshold = float(entropies.quantile(quantile))
        return model, entropies, logits


def exiting(model: TaskModel) -> ExitingEncoder:
    return cast(ExitingEncoder, written_encoder(model))


def depths(entropies: Tensor, threshold: float) -> list[int]:
    """Return the layers that each example runs: up to its first head that is sure."""
    return [next((i for i, h in enumerate(row.tolist(), 1) if h < threshold), LAYERS) for row in entropies]


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("early_exit"), request.param)


def test_entropy_is_a_share_of_the_largest() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -1e4], [5.0, -1e4, -1e4]])
    torch.testing.assert_close(entropy(logits), torch.tensor([1, np.log(2) / np.log(3), 0]), atol=1e-9, rtol=0)
    # two sure answers whose float32 entropies are the same
    a, b = entropy(torch.tensor([[17.0, 0.0], [17.1, 0.0]])).tolist()
    assert a == pytest.approx(18 * np.exp(-17) / np.log(2), rel=1e-3) and a > b > 0


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_the_best_there_is(seed: int) -> None:
    """Against all thresholds between two entropies, each tried example by example."""
    rng = np.random.default_rng(seed)
    examples, layers = int(rng.integers(1, 12)), int(rng.integers(2, 6))
    entropies = rng.uniform(0, 1, (examples, layers - 1))
    if seed % 2:  # ties
        entropies = entropies.round(1)
    macs = rng.integers(1, 100, (examples, layers)).cumsum(1)
    budget = rng.uniform(macs[:, 0].sum(), macs[:, -1].sum())

    def cost(threshold: float) -> int:
        sure = np.concatenate((entropies < threshold, np.ones((examples, 1), bool)), 1)
        return int(macs[np.arange(examples), sure.argmax(1)].sum())

    values = [0.0, *np.unique(entropies), 2.0]
    tried = [cost((a + b) / 2) for a, b in itertools.pairwise(values)] + [cost(0.0)]
    threshold, found = exit_threshold(entropies, macs, budget)
    assert found == cost(threshold)
    assert abs(found - budget) == min(abs(c - budget) for c in tried)


def test_the_threshold_at_the_ends() -> None:
    entropies, macs = np.array([[0.2, 0.0], [0.9, 0.4]]), np.array([[10, 20, 30], [1, 2, 3]])
    assert exit_threshold(entropies, macs, 1000) == (0.0, 33)
    threshold, cost = exit_threshold(entropies, macs, 11)
    assert cost == 11 and threshold > 1, "whatever another example's entropy, it exits"
    assert exit_threshold(entropies, macs, 23) == (pytest.approx(0.1), 23)
    assert exit_threshold(entropies, macs, 13) == (pytest.approx(0.3), 13)


def test_a_threshold_of_nothing_is_the_teacher(world: World) -> None:
    model, _, logits = world.random()
    for i, feature in enumerate(world.ctx.features["dev"][:20]):
        torch.testing.assert_close(model(**world.inputs([feature])).logits[0], logits[i, -1], atol=1e-5, rtol=1e-5)


def test_a_threshold_beyond_all_is_the_first_head(world: World) -> None:
    model, _, logits = world.random()
    exiting(model).threshold = float("inf")
    features = world.ctx.features["dev"][:20]
    torch.testing.assert_close(model(**world.inputs(features)).logits, logits[:20, 0], atol=1e-5, rtol=1e-5)


def test_each_example_has_the_answer_of_its_own_exit(world: World) -> None:
    """In a batch, alone, and padded; with hidden states, which leave every example in the batch, and without."""
    model, entropies, logits = world.random(quantile=0.25)
    ran = depths(entropies, exiting(model).threshold)
    assert set(ran) == set(range(1, LAYERS + 1)), "some examples must exit at every head, and some at none"
    expected = torch.stack([rows[depth - 1] for rows, depth in zip(logits, ran, strict=True)])
    features = world.ctx.features["dev"]
    for longer in (0, 9):
        torch.testing.assert_close(model(**world.inputs(features, longer)).logits, expected, atol=1e-5, rtol=1e-5)
    for i in range(20):
        for longer in (0, 5):
            alone = model(**world.inputs([features[i]], longer)).logits
            torch.testing.assert_close(alone[0], expected[i], atol=1e-5, rtol=1e-5)
    out, dense = (m(**world.inputs(features), hidden=True) for m in (model, world.teacher.model))
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    real = world.inputs(features)["attention_mask"].bool()
    for own, target in zip(out.encoder_hidden, dense.encoder_hidden, strict=True):
        torch.testing.assert_close(own[real], target[real], atol=1e-4, rtol=1e-4)
    if dense.decoder_hidden is not None:
        torch.testing.assert_close(out.decoder_hidden, dense.decoder_hidden, atol=1e-4, rtol=1e-4)


def test_those_that_exit_leave_the_batch(world: World) -> None:
    model, entropies, _ = world.random(quantile=0.25)
    ran = depths(entropies, exiting(model).threshold)
    rows: list[int] = []
    for layer in exiting(model).layers:
        layer.register_forward_hook(lambda m, args, out: rows.append(len(out.x)))
    decoded: list[int] = []
    if world.ctx.spec.family == "t5":
        model.model.decoder.decoder.register_forward_hook(lambda m, args, out: decoded.append(len(out[0])))
    model(**world.inputs(world.ctx.features["dev"]))
    assert rows == [sum(depth > i for depth in ran) for i in range(LAYERS)]
    assert decoded == ([sum(depth == LAYERS for depth in ran)] if decoded else [])
    rows.clear()
    exiting(model).threshold = 2.0
    model(**world.inputs(world.ctx.features["dev"]))
    assert rows == [len(ran)] and len(decoded) <= 1, "with nobody left, nothing runs"


def test_the_cost_is_that_of_the_layers_that_ran(world: World) -> None:
    """Head by head and layer by layer in plain arithmetic; fvcore and torch agree on every example and on a batch."""
    model, entropies, _ = world.random(quantile=0.25)
    ran = depths(entropies, exiting(model).threshold)
    cost = measure_cost(model, world.teacher, world.ctx)
    lengths = [len(feature["input_ids"]) for feature in world.ctx.features["dev"]]
    head = 32 * 32 + 32 * 2
    layers = [4 * 32 * 32 * n + 2 * n * n * 32 + n * 2 * 32 * 512 for n in lengths]
    heads = sum(min(depth, LAYERS - 1) * head for depth in ran)
    assert cost.real.compressed.overhead == 2 * heads
    assert cost.real.compressed.encoder == 2 * (heads + sum(d * m for d, m in zip(ran, layers, strict=True)))
    stay = sum(depth == LAYERS for depth in ran) / len(ran)
    for part in ("decoder", "head"):
        dense, own = (getattr(flops, part) for flops in (cost.real.dense, cost.real.compressed))
        assert own <= dense and (part == "decoder" or own == pytest.approx(stay * dense))
    if world.ctx.spec.family == "t5":
        assert 0 < cost.real.compressed.decoder < cost.real.dense.decoder
    batch = world.inputs(world.ctx.features["dev"][:16])
    assert count(model, batch, parts_of(model)) == count_dispatched(model, batch, parts_of(model))
    by_formula = [exit_macs(world.ctx.spec, 2, n)[d - 1] for n, d in zip(lengths, ran, strict=True)]
    assert 2 * sum(by_formula) == cost.real.compressed.encoder


def test_nobody_left_is_counted_too(world: World) -> None:
    model, _, _ = world.random()
    exiting(model).threshold = 2.0
    batch = world.inputs(world.ctx.features["dev"][:3])
    flops = count(model, batch, parts_of(model))
    n = batch["input_ids"].shape[1]
    assert flops == count_dispatched(model, batch, parts_of(model))
    assert flops.encoder == 3 * 2 * exit_macs(world.ctx.spec, 2, n)[0] and (flops.decoder, flops.head) == (0, 0)


def test_a_copy_is_a_model_of_its_own(world: World) -> None:
    model, _, _ = world.random(quantile=0.25)
    features = world.ctx.features["dev"]
    expected = model(**world.inputs(features)).logits
    for made in (share_weights(model), copy.deepcopy(model)):
        exiting(model).threshold = 2.0
        assert torch.equal(made(**world.inputs(features)).logits, expected)
        exiting(model).threshold = exiting(made).threshold


def test_generating_runs_all_layers(world: World) -> None:
    if world.ctx.spec.family == "bert":
        pytest.skip("BERT generates nothing")
    model, _, _ = world.random(quantile=0.25)
    inputs = world.inputs(world.ctx.features["dev"][:6])
    expected = cast(Any, world.teacher.model).generate(**inputs, max_new_tokens=4)
    for _ in range(2):
        assert torch.equal(cast(Any, model).generate(**inputs, max_new_tokens=4), expected)
        model(**inputs)  # leaves nothing behind


def test_the_budget_is_met_where_the_threshold_was_set(world: World) -> None:
    ctx = world.context()
    before = digest(world.teacher.model)
    model = world.compress(ctx)
    assert digest(world.teacher.model) == before
    share, threshold = ctx.setting.remaining, ctx.setting.knob["threshold"]
    assert threshold == exiting(model).threshold
    assert share == pytest.approx(ctx.budget, rel=0.02) and f"{ctx.budget:.1%} asked for" in ctx.setting.note
    ctx.features["dev"] = ctx.features["selection"]
    cost = measure_cost(model, world.teacher, ctx)
    assert cost.achieved_remaining == pytest.approx(share, rel=1e-12)
    check_budget(cost, ctx)
    assert ctx.notes == [ctx.setting.note]
    heads = sum(p.numel() for p in exiting(model).heads.parameters())
    assert ctx.trained_parameters == heads == (LAYERS - 1) * (32 * 32 + 32 + 32 * 2 + 2)
    shared = {id(p) for p in world.teacher.model.parameters()}
    assert {n for n, p in model.named_parameters() if id(p) not in shared} == {
        n for n, _ in model.named_parameters() if ".heads." in n
    }
    assert 4 * heads < ctx.bytes_added < 4 * heads + 2000
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert [(s.name, s.steps, s.examples) for s in ctx.stages] == [("early_exit", 20, 160)]


def test_heads_learn_the_labels_and_what_the_teacher_answers(world: World) -> None:
    """Each head, on examples that it was not trained on, by its own loss part."""
    inputs = world.inputs(world.ctx.features["dev"])
    labels = torch.tensor([feature["labels"] for feature in world.ctx.features["dev"]])
    out = world.teacher.model(**inputs, hidden=True)
    target = out.logits.softmax(-1)
    for part in ("task", "logits"):
        found = []
        for steps in (0, 60):
            model = world.compress(world.context(steps=steps, lr=5e-3, losses=f"{part}=1"))
            losses = []
            for head, states in zip(exiting(model).heads, out.encoder_hidden[:-1], strict=True):
                log_p = head(states, inputs["attention_mask"].bool()).log_softmax(-1)
                loss = (
                    -log_p[torch.arange(len(labels)), labels]
                    if part == "task"
                    else (target * (target.log() - log_p)).sum(-1)
                )
                losses.append(loss.mean().item())
            found.append(losses)
        assert all(after < 0.9 * before for before, after in zip(*found, strict=True)), (part, found)


def test_a_second_run_finds_the_heads(world: World) -> None:
    features = world.ctx.features["dev"]
    first, second = world.context(cache="own"), world.context(cache="own")
    answers = [world.compress(ctx)(**world.inputs(features)).logits for ctx in (first, second)]
    assert torch.equal(*answers) and first.setting == second.setting
    assert not first.stages[0].cached and second.stages[0].cached
    assert first.bytes_added == second.bytes_added and first.trained_parameters == second.trained_parameters


@pytest.mark.parametrize(("name", "spec"), [("minilm-l6", {}), ("t5-base", {})])
def test_plans(name: str, spec: dict[str, Any]) -> None:
    backbone = spec_of(name)
    for ratio in (2, 4, 8):
        assert EarlyExit().setting(backbone, ratio, {128: 1}).remaining == remaining(backbone, ratio, {128: 1})
    n, layers = 64, backbone.encoder_layers
    layer = layer_macs(backbone, n, n, n)
    head = backbone.d_model * (backbone.d_model + 3)
    macs = exit_macs(backbone, 3, n)
    assert macs[0] == layer + head and macs[-1] == layers * layer + (layers - 1) * head
    assert macs[-2] == (layers - 1) * (layer + head)


def test_a_budget_below_the_first_exit(tmp_path: Path) -> None:
    """With one layer nobody can exit; with two, half of the encoder is the least."""
    for layers, outcome in ((1, r"leave 100\.0%"), (2, r"one layer and its head.*leave 5\d\.\d%")):
        shallow = tiny_checkpoint(tmp_path / f"{layers}", "bert", num_hidden_layers=layers, intermediate_size=2048)
        config = quick_config(task_file(tmp_path / "task"), shallow, method="early_exit", ratio=16)
        ctx = context(config, tmp_path / "cache")
        with pytest.raises(Unreachable, match=outcome):
            EarlyExit().setting(ctx.spec, 16, ctx.lengths("selection"))
        with pytest.raises(Unreachable, match=outcome):
            EarlyExit().compress(Teacher(cast(Any, None), cast(Any, None)), load_task(ctx.task), ctx)


@pytest.mark.parametrize(("task", "ratio", "reason"), [
    ("squad", 4, "kind qa"), ("sst2", 1, "whole number"), ("sst2", None, "whole number"), ("sst2", 4, None),
])  # fmt: skip
def test_what_it_refuses(task: str, ratio: float | None, reason: str | None) -> None:
    said = EarlyExit().skip(spec_of("t5-base"), TASKS[task], ratio)
    assert said is None if reason is None else reason in cast(str, said)
    regression = TASKS["sst2"].model_copy(update={"kind": "regression"})
    assert "kind regression" in cast(str, EarlyExit().skip(spec_of("t5-base"), regression, 4))


def test_it_has_no_loss_on_hidden_states() -> None:
    with pytest.raises(ConfigError, match="unknown loss part 'all_hidden'"):
        EarlyExit(losses="all_hidden=1")


def test_layers_are_shared_with_the_teacher(world: World) -> None:
    model, _, _ = world.random()
    assert all(isinstance(layer, EncoderLayer) for layer in exiting(model).layers)
    own = {p.data_ptr() for p in world.teacher.model.parameters()}
    assert {p.data_ptr() for p in exiting(model).layers.parameters()} <= own
