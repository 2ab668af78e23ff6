"""Token merging in whole models: against a slow reference, in FLOPs, in batches, untrained and trained."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import EncoderLayer
from bench.backbones.sites import digest
from bench.backbones.write_out import write_out, written_encoder
from bench.context import RunContext, Teacher
from bench.costing import check_budget, measure_cost, parts_of
from bench.errors import Unreachable
from bench.measure.closed_form import encoder as encoder_flops
from bench.measure.closed_form import remaining
from bench.measure.flops import count_dispatched
from bench.methods.token_merging import TokenMerging
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.training.teacher import get_teacher
from tests.bench.methods.merging_reference import apply, attend, mean, merged_groups, pairs
from tests.checkpoints import FAMILIES, Family, context, encode_hidden, quick_config, task_file, tiny_checkpoint

WIDE: dict[Family, dict[str, float]] = {
    "bert": {
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "t5": {"d_ff": 512, "num_layers": 4, "num_decoder_layers": 1, "dropout_rate": 0.0},
}
"""Without dropout a training of so few steps is sure to come nearer."""


class World:
    """A task and a checkpoint of four wide layers, on which budgets can be met."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.task = folder, task_file(folder / "task", examples=200, words=(2, 36), max_length=64)
        self.backbone = tiny_checkpoint(folder / "tiny", family, **WIDE[family])

    def context(self, **values: Any) -> RunContext:
        config = quick_config(self.task, self.backbone, **{"method": "token_merging", "ratio": 4, **values})
        return context(config, self.folder / "cache")


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("token_merging"), request.param)


def compress(ctx: RunContext) -> tuple[Any, Teacher]:
    teacher, chosen = get_teacher(ctx), TokenMerging(**ctx.config.options)
    ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
    return chosen.compress(teacher, load_task(ctx.task), ctx).eval(), teacher


def counts(ctx: RunContext, n: int) -> list[int]:
    """What each layer leaves of ``n`` tokens in this run."""
    chosen = TokenMerging()
    return chosen.counts(ctx.spec, n, chosen.share(ctx.spec, int(ctx.config.ratio or 0), n))


def macs(ctx: RunContext, n: int) -> int:
    chosen = TokenMerging()
    return chosen.macs(ctx.spec, n, chosen.share(ctx.spec, int(ctx.config.ratio or 0), n))


def special_ids(ctx: RunContext) -> set[int]:
    return set(ctx.tokenizer.all_special_ids) - {ctx.tokenizer.unk_token_id}


def reference(model: Any, ids: list[int], special: set[int], behind: list[int]) -> np.ndarray:
    """The paper's algorithm on one input in float64, vector by vector: final states at full length."""
    model = copy.deepcopy(model).double()
    written = written_encoder(model)
    if hasattr(model, "shared"):
        x = model.shared.weight[torch.tensor(ids)].detach().numpy()
    else:
        x = model.bert.embeddings(torch.tensor([ids]))[0].detach().numpy()
    groups, places = [[i] for i in range(len(ids))], list(range(len(ids)))
    for module, left in zip(written.layers, behind, strict=True):
        layer = cast(EncoderLayer, module)
        bias = None
        if written.position is not None:
            bias = written.position(torch.tensor([places]))[0].detach().numpy()
        sizes = [len(g) for g in groups]
        z, keys = attend(layer.attention, apply(layer.attention_norm, x) if layer.pre_norm else x, sizes, bias)
        x = x + z if layer.pre_norm else apply(layer.attention_norm, x + z)
        chosen = pairs(keys, [not any(ids[p] in special for p in g) for g in groups], len(groups) - left)
        into = {b: [b] for b in range(len(groups))}
        for a, b in chosen:
            into[b].append(a)
        stay = [b for b in into if b not in {a for a, _ in chosen}]
        x = np.stack([mean([x[i] for i in into[b]], [sizes[i] for i in into[b]]) for b in stay])
        places, groups = [places[b] for b in stay], merged_groups(groups, chosen)
        z = apply(layer.ffn, apply(layer.ffn_norm, x) if layer.pre_norm else x)
        x = x + z if layer.pre_norm else apply(layer.ffn_norm, x + z)
    if written.final_norm is not None:
        x = apply(written.final_norm, x)
    row = {p: k for k, g in enumerate(groups) for p in g}
    return np.stack([x[row[p]] for p in range(len(ids))])


def test_the_encoder_is_that_of_the_reference(world: World) -> None:
    """A padded batch of every length against one input at a time, special tokens and repeated words among them."""
    ctx = world.context()
    model, teacher = compress(ctx)
    features = ctx.features["dev"][:24]
    longest = max(len(f["input_ids"]) for f in features)
    ids = torch.zeros(len(features), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, f in enumerate(features):
        ids[i, : len(f["input_ids"])] = torch.tensor(f["input_ids"])
        mask[i, : len(f["input_ids"])] = 1
    with torch.no_grad():
        hidden = encode_hidden(model.model, input_ids=ids, attention_mask=mask)
        dense = encode_hidden(teacher.model.model, input_ids=ids, attention_mask=mask)
    plain, merged = write_out(teacher.model), 0
    for i, f in enumerate(features):
        n = len(f["input_ids"])
        left = counts(ctx, n)
        expected = reference(plain.model, f["input_ids"], special_ids(ctx), left)
        np.testing.assert_allclose(hidden[i, :n], expected, atol=2e-4, rtol=2e-4)
        merged += n - left[-1]
    assert merged > 100 and not torch.allclose(hidden[mask.bool()], dense[mask.bool()], atol=1e-2)


@pytest.mark.parametrize("ratio", [2, 4])
def test_it_meets_the_budget_to_the_flop(world: World, ratio: int) -> None:
    ctx = world.context(ratio=ratio)
    # shorter ones are out of reach on their own
    ctx.features["selection"] = [f for f in ctx.features["selection"] if len(f["input_ids"]) > 12]
    ctx.features["dev"] = ctx.features["selection"]
    model, teacher = compress(ctx)
    cost = measure_cost(model, teacher, ctx)
    check_budget(cost, ctx)
    lengths = ctx.lengths("selection")
    assert cost.real.compressed.encoder == 2 * sum(times * macs(ctx, n) for n, times in lengths.items())
    assert cost.achieved_remaining == pytest.approx(ctx.setting.remaining, rel=1e-12)
    assert cost.requested_remaining is not None and not ctx.setting.note
    assert cost.achieved_remaining == pytest.approx(cost.requested_remaining, rel=0.01)
    matched = 0
    for n, times in lengths.items():
        for before, after in itertools.pairwise([n, *counts(ctx, n)]):
            a, b = (before + 1) // 2, before // 2
            matched += times * a * b * ctx.spec.d_head * (after < before)
    assert cost.real.compressed.overhead == 2 * matched
    assert cost.real.compressed.decoder == cost.real.dense.decoder
    assert ctx.bytes_added == ctx.trained_parameters == cost.parameters_added == 0
    assert [stage.name for stage in ctx.stages] == ["teacher"]


def test_what_each_layer_runs_on(world: World) -> None:
    """The attention of a layer has what the one below left, the FFN what this one leaves."""
    ctx = world.context()
    model, _ = compress(ctx)
    seen: list[tuple[int, int]] = []
    for layer in written_encoder(model).layers:
        layer.attention.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], 0)))
        layer.ffn.register_forward_pre_hook(lambda _, args: seen.append((0, args[0].shape[1])))
    feature = max(ctx.features["dev"], key=lambda f: len(f["input_ids"]))
    n = len(feature["input_ids"])
    with torch.no_grad():
        model(torch.tensor([feature["input_ids"]]))
    left = [n, *counts(ctx, n)]
    assert seen == [pair for a, b in itertools.pairwise(left) for pair in ((a, 0), (0, b))]
    assert n > left[1] > left[-1]


def test_the_cost_of_an_input_is_that_of_its_length_alone(world: World) -> None:
    """Whatever it says, many special tokens or none."""
    ctx = world.context()
    model, _ = compress(ctx)
    special = sorted(special_ids(ctx) - {ctx.tokenizer.pad_token_id})[0]
    parts = parts_of(model)
    for n in (1, 2, 3, 4, 5, 9, 20):
        expected = 2 * macs(ctx, n)
        for ids in ([10] * n, list(range(10, 10 + n)), [special] * n, [special, *range(10, 9 + n)]):
            assert count_dispatched(model, {"input_ids": torch.tensor([ids])}, parts).encoder == expected


@pytest.mark.parametrize("spec", ["minilm-l6", "t5-base", "flan-t5-base"])
def test_every_length_costs_what_variator_costs(spec: str) -> None:
    """So that the budget is met on dev whatever the lengths of selection, which a setting is solved for."""
    shape = spec_of(spec)
    for k in (2, 4, 8):
        for n in (20, 33, 64, 128, 384):
            setting, budget = TokenMerging().setting(shape, k, {n: 1}), remaining(shape, k, {n: 1})
            assert setting.remaining == pytest.approx(budget, rel=0.01 if n > 20 else 0.02)
            assert n == 20 or not setting.note
            share = TokenMerging().share(shape, k, n)
            assert setting.knob == {"share": share}
            left = [n, *TokenMerging().counts(shape, n, share)]
            assert all(a >= b >= a - (a - 3) // 2 for a, b in itertools.pairwise(left))


def test_short_inputs_are_out_of_reach_on_their_own() -> None:
    """Of 7 tokens, of which three may be special, two can be merged away: that is noted, and not made up for."""
    spec = spec_of("minilm-l6")
    mixed = TokenMerging().setting(spec, 4, {7: 30, 40: 5})
    alone = {n: TokenMerging().share(spec, 4, n) for n in (7, 40)}
    dense = {n: encoder_flops(spec, n).encoder for n in alone}
    left = {n: 2 * TokenMerging().macs(spec, n, share) / dense[n] for n, share in alone.items()}
    assert left[40] == pytest.approx(remaining(spec, 4, {40: 1}), rel=0.01)
    assert left[7] > 1.05 * remaining(spec, 4, {7: 1})
    assert TokenMerging().counts(spec, 7, alone[7]) == TokenMerging().counts(spec, 7, 1.0)
    assert mixed.remaining == pytest.approx(
        (30 * left[7] * dense[7] + 5 * left[40] * dense[40]) / (30 * dense[7] + 5 * dense[40])
    )
    assert "no more than every other vector" in mixed.note
    with pytest.raises(Unreachable, match=r"leaves at least 61\.9%"):
        TokenMerging().setting(spec, 4, {7: 1})


def test_vectors_by_hand() -> None:
    """A tenth of 20 in each of 6 layers; a fortieth, half a vector a layer; and every other vector but three."""
    spec = spec_of("minilm-l6")
    assert TokenMerging().counts(spec, 20, 0.1) == [18, 16, 14, 12, 10, 8]
    assert TokenMerging().counts(spec, 20, 0.025) == [19, 19, 18, 18, 17, 17]
    assert TokenMerging().counts(spec, 20, 1.0) == [12, 8, 6, 5, 4, 4]
    assert TokenMerging().counts(spec, 4, 1.0) == [4] * 6
    n = encoder_flops(spec, 20).encoder
    assert 2 * TokenMerging().macs(spec, 20, 0.0) == n > 2 * TokenMerging().macs(spec, 20, 0.01)


def test_a_budget_that_is_none_and_one_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, task = spec_of("t5-base"), TASKS["sst2"]
    for ratio in (None, 1, 2.5):
        reason = TokenMerging().skip(spec, task, ratio)
        assert reason is not None and str(ratio) in reason
    assert TokenMerging().skip(spec, task, 4) is None
    monkeypatch.setattr("bench.methods.merging.remaining", lambda *_: 0.05)
    with pytest.raises(
        Unreachable, match=r"leaves at least \d\d\.\d%.*5\.0% asked for: a layer can merge away no more"
    ):
        TokenMerging().setting(spec, 8, {128: 1})
    monkeypatch.setattr("bench.methods.merging.remaining", lambda *_: 1.2)
    setting = TokenMerging().setting(spec, 2, {128: 1})
    assert setting.knob == {"share": 0.0} and setting.remaining == 1 and setting.note.startswith("100.0%")


def test_nothing_merged_is_the_teacher(world: World) -> None:
    ctx = world.context()
    teacher = get_teacher(ctx)
    model = write_out(teacher.model)
    TokenMerging().attach(written_encoder(model), lambda n: [n] * ctx.spec.encoder_layers)
    for feature in ctx.features["dev"][:4]:
        ids = torch.tensor([feature["input_ids"]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, write_out(teacher.model)(ids).logits)
            torch.testing.assert_close(model(ids).logits, teacher.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_teacher_is_shared_and_untouched(world: World) -> None:
    ctx = world.context()
    before = digest(get_teacher(ctx).model)
    model, teacher = compress(ctx)
    assert {p.data_ptr() for p in model.parameters()} == {p.data_ptr() for p in teacher.model.parameters()}
    assert digest(teacher.model) == before and not any(p.requires_grad for p in model.parameters())
    assert not model.training and written_encoder(model).special_ids is not None


def test_padding_and_company_change_no_answer(world: World) -> None:
    ctx = world.context(ratio=8)
    model, _ = compress(ctx)
    features = ctx.features["dev"][:12]
    for extra in (0, 7):
        longest = max(len(f["input_ids"]) for f in features) + extra
        ids = torch.tensor([f["input_ids"] + [0] * (longest - len(f["input_ids"])) for f in features])
        mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features])
        with torch.no_grad():
            together = model(ids, attention_mask=mask).logits
            alone = torch.cat([model(torch.tensor([f["input_ids"]])).logits for f in features])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_untrained_the_training_plays_no_part(world: World) -> None:
    """Neither its options nor its budget: one run for all, and one for each where all weights are trained."""
    plain = world.context().identity
    for change in ({"steps": 9}, {"batch_size": 3}, {"lr": 5e-3}, {"losses": "logits=1"}, {"temperature": 3.0}):
        assert world.context(**change).identity == plain
        assert world.context(finetune=True, **change).identity != world.context(finetune=True).identity
    assert world.context(ratio=8).identity != plain != world.context(finetune=True).identity
    assert TokenMerging().work(100, 8) == [] and TokenMerging(finetune=True).work(0, 8) == []
    assert [(w.name, w.steps) for w in TokenMerging(finetune=True).work(100, 8)] == [("token_merging", 100)]
    assert TokenMerging(finetune=True).reads() == {"ratio", "steps", "batch_size"} > TokenMerging().reads() == {"ratio"}


def test_trained_it_comes_nearer_and_comes_back(world: World) -> None:
    lr = {"bert": 1e-4, "t5": 1e-3}[world.context().spec.family]
    values = {"finetune": True, "lr": lr, "losses": "last_hidden=1", "seed": 1}
    features = world.context().features["train"][:32]
    distances = []
    for steps in (0, 40):
        ctx, again = (world.context(steps=steps, **values) for _ in range(2))
        model, teacher = compress(ctx)
        before = digest(teacher.model)
        second, _ = compress(again)
        with torch.no_grad():
            own, twin, target = (
                torch.cat([m(torch.tensor([f["input_ids"]]), hidden=True).encoder_hidden[-1][0] for f in features])
                for m in (model, second, teacher.model)
            )
        distances.append(((own - target).square().mean() / target.var()).item())
        torch.testing.assert_close(twin, own, atol=1e-6, rtol=1e-6)
        assert digest(teacher.model) == before and again.bytes_added == ctx.bytes_added > 0
        assert ctx.trained_parameters == sum(p.numel() for p in model.parameters())
        assert [(s.name, s.steps, s.cached) for s in again.stages[1:]] == [("token_merging", steps, True)] * bool(steps)
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
        if not steps:
            plain, _ = compress(world.context(seed=1))
            with torch.no_grad():
                untrained = torch.cat(
                    [plain(torch.tensor([f["input_ids"]]), hidden=True).encoder_hidden[-1][0] for f in features]
                )
            torch.testing.assert_close(untrained, own, atol=1e-5, rtol=1e-5)

    assert distances[1] < distances[0], distances
