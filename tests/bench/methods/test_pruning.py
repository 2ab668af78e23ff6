"""Post-training pruning: gradients, search, rearrangement and scales against independent references; what it leaves."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import EncoderLayer
from bench.backbones.model import share_weights
from bench.backbones.sites import digest
from bench.backbones.surgery import Structure, cut, ffn_in, ffn_out
from bench.backbones.write_out import write_out, written_encoder
from bench.context import RunContext, Teacher
from bench.costing import measure_cost, parts_of
from bench.measure.closed_form import layer_macs, remaining
from bench.measure.flops import count, count_dispatched
from bench.methods import rescaling
from bench.methods.budget import UnitCosts
from bench.methods.gates import GateGradients, calibration_batches, example_losses, gate_gradients
from bench.methods.mask_search import rearranged, search
from bench.methods.pruning import Pruning
from bench.methods.rescaling import LIMIT, entering, fit_scales, rescale, sublayers
from bench.tasks.catalogue import TASKS
from bench.tasks.data import load_task
from bench.training.losses import task_loss
from bench.training.stage import label_inputs, model_inputs
from bench.training.student import WEIGHTS_FILE
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint, tokens

INPUTS = {"input_ids": tokens(3, 9)}
WIDE: dict[str, tuple[Family, dict[str, Any]]] = {
    "bert": ("bert", {"intermediate_size": 512, "num_hidden_layers": 4}),
    "t5": ("t5", {"d_ff": 512, "num_layers": 4}),
    "gated t5": ("t5", {"d_ff": 512, "num_layers": 3, "feed_forward_proj": "gated-gelu"}),
}
KINDS: dict[str, dict[str, Any]] = {
    "single": {},
    "regression": {"kind": "regression", "labels": None, "label": "number", "metrics": "[pearson]"},
    "qa": {"kind": "qa", "labels": None, "label": "answer", "text_pair": "text", "text": "other",
           "prompt": '"{text} {text_pair}"'},
}  # fmt: skip


class World:
    """A task and a checkpoint whose FFN is wide enough for budgets to be met."""

    def __init__(self, folder: Path, name: str, **task: Any) -> None:
        family, changes = WIDE[name]
        self.folder, self.task = folder, task_file(folder / "task", **{"examples": 100, **task})
        self.backbone = tiny_checkpoint(folder / "tiny", family, **changes)

    def context(self, cache: str = "cache", **values: Any) -> RunContext:
        config = quick_config(self.task, self.backbone, **{"method": "pruning", "ratio": 4, "examples": 64, **values})
        ctx = context(config, self.folder / cache)
        ctx.setting = config.build_method().setting(ctx.spec, config.ratio, ctx.lengths("selection"))
        return ctx


@pytest.fixture(scope="module", params=WIDE)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("pruning"), request.param)


def compress(ctx: RunContext, change: Any = None) -> tuple[Any, Teacher]:
    teacher = get_teacher(ctx)
    if change is not None:
        change(teacher.model)
    return ctx.config.build_method().compress(teacher, load_task(ctx.task), ctx), teacher


def layers_of(model: Any) -> list[EncoderLayer]:
    return [cast(EncoderLayer, layer) for layer in written_encoder(model).layers]


def output_matrices(model: Any, family: str) -> list[tuple[Any, Any]]:
    """Output matrices of attention and FFN of each layer, in the transformers model itself."""
    if family == "bert":
        layers = model.model.bert.encoder.layer
        return [(layer.attention.output.dense.weight, layer.output.dense.weight) for layer in layers]
    return [(b.layer[0].SelfAttention.o.weight, b.layer[1].DenseReluDense.wo.weight) for b in model.model.encoder.block]


@pytest.mark.parametrize(
    ("name", "kind"), [*itertools.product(("bert",), KINDS), ("t5", "single"), ("t5", "qa"), ("gated t5", "single")]
)
def test_gate_gradients_are_those_of_each_example_alone(name: str, kind: str, tmp_path: Path) -> None:
    """A gate's derivative is that of a factor on the unit's columns of the output matrix: <W, dL/dW> over them."""
    ctx = World(tmp_path, name, examples=40, **KINDS[kind]).context()
    model = get_teacher(ctx).model
    before, batches = digest(model), calibration_batches(ctx, 12)
    gradients = gate_gradients(model, batches, ctx.task.kind)
    assert digest(model) == before and not any(p.requires_grad for p in model.parameters())
    (batch,), matrices = batches, output_matrices(model, ctx.spec.family)
    weights = [weight.requires_grad_() for pair in matrices for weight in pair]
    for i in range(len(batch["input_ids"])):
        n = int(batch["attention_mask"][i].sum())
        cut_off = {"input_ids": n, "attention_mask": n, "token_type_ids": n}
        one = {name: t[i : i + 1, : cut_off[name]] if name in cut_off else t[i : i + 1] for name, t in batch.items()}
        loss = task_loss(ctx.task.kind, model(**model_inputs(one)).logits, label_inputs(one))
        products = [(w * g).sum(0) for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
        for layer, (heads, neurons) in enumerate(zip(products[::2], products[1::2], strict=True)):
            for found, expected in (
                (gradients.heads[layer][i], heads.detach().reshape(4, 8).sum(1).numpy()),
                (gradients.neurons[layer][i], neurons.detach().numpy()),
            ):
                assert np.abs(expected).max() > 0
                np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_loss_of_an_example_has_its_own_labels_alone() -> None:
    logits, labels = torch.randn(3, 4, 9), torch.tensor([[1, 2, -100, -100], [3, 4, 5, 6], [7, -100, -100, -100]])
    expected = [torch.nn.functional.cross_entropy(logits[i, :n], labels[i, :n]) for i, n in enumerate((2, 4, 1))]
    batch = {"labels": labels, "attention_mask": torch.ones(3, 7)}
    torch.testing.assert_close(example_losses("qa", logits, batch), torch.stack(expected))


def test_calibration_sees_each_example_once(world: World) -> None:
    ctx = world.context()
    batches = calibration_batches(ctx, 64)
    assert sum(len(batch["input_ids"]) for batch in batches) == 64
    everything = calibration_batches(ctx, 10_000)
    seen = [
        ids[mask == 1].tolist()
        for b in everything
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert sorted(seen) == sorted(f["input_ids"] for f in ctx.features["train"])
    again = calibration_batches(world.context(), 64)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_the_best_of_all_subsets_that_use_the_budget(seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads, neurons = rng.exponential(size=(2, 2)) * 4, rng.exponential(size=(2, 4))
    costs = UnitCosts(head=3, neuron=1, layer=10, layers=2)
    for macs in (1, 2, 5, 9, 13, 19, 20):
        best = 0.0
        for chosen in itertools.product((False, True), repeat=12):
            h, f = np.array(chosen[:4]), np.array(chosen[4:])
            if 3 * h.sum() + f.sum() == macs:
                best = max(best, heads.ravel()[h].sum() + neurons.ravel()[f].sum())
        kept_heads, kept_neurons = search(heads, neurons, costs, macs)
        assert kept_heads.shape == heads.shape and kept_neurons.shape == neurons.shape
        assert heads[kept_heads].sum() + neurons[kept_neurons].sum() == pytest.approx(best)
        assert 3 * kept_heads.sum() + kept_neurons.sum() == macs


def test_a_budget_is_filled_to_within_a_neuron() -> None:
    rng = np.random.default_rng(0)
    heads, neurons = rng.exponential(size=(3, 4)), rng.exponential(size=(3, 50))
    costs = UnitCosts(head=37, neuron=5, layer=4 * 37 + 50 * 5, layers=3)
    for macs in range(costs.neuron, costs.dense + 1, 13):
        kept_heads, kept_neurons = search(heads, neurons, costs, macs)
        assert 0 <= macs - 37 * kept_heads.sum() - 5 * kept_neurons.sum() < 5
    assert all(mask.all() for mask in search(heads, neurons, costs, costs.dense))


def fisher_cost(gradients: Any, kept: Any) -> float:
    return float(np.square(gradients[:, ~kept].sum(1)).mean())


def test_each_swap_is_the_best_by_the_loss_of_all_that_is_removed() -> None:
    """Against the definition: the cost of each possible swap, summed up anew from the gradients."""
    before = after = 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        gradients = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 8)) + 0.1 * rng.normal(size=(30, 8))
        kept = np.ones(8, dtype=bool)
        kept[np.argsort(np.square(gradients).mean(0))[:4]] = False
        expected = kept.copy()
        for unit in sorted(np.flatnonzero(~kept), key=lambda i: -np.square(gradients[:, i]).sum()):
            swaps = [expected.copy() for _ in range(8)]
            for other in np.flatnonzero(expected):
                swaps[other][[unit, other]] = True, False
            expected = min(swaps, key=lambda mask: fisher_cost(gradients, mask))
        assert rearranged(gradients, kept).tolist() == expected.tolist()
        before, after = before + fisher_cost(gradients, kept), after + fisher_cost(gradients, expected)
    assert after < 0.7 * before


def test_units_that_err_together_are_not_removed_together() -> None:
    """Two equal units cost 4 when both go, one of them and an unrelated, dearer one only 2.44."""
    e = np.eye(2)
    gradients = np.stack([e[0], e[0], 1.2 * e[1]], 1).astype(np.float32)
    swapped = rearranged(gradients, np.array([False, False, True]))
    assert not swapped[2] and swapped[:2].sum() == 1
    assert fisher_cost(gradients, swapped) == pytest.approx(2.44 / 2, rel=1e-6)


@pytest.mark.parametrize("kept", [[True] * 4, [False] * 4])
def test_nothing_to_rearrange(kept: list[bool]) -> None:
    assert rearranged(np.ones((5, 4), dtype=np.float32), np.array(kept)).tolist() == kept


def pruned_pair(world: World, examples: int = 64) -> tuple[Any, Any, list[Any]]:
    """A teacher's encoder, one with some units cut at random, and what the first layer of both is given."""
    ctx = world.context()
    dense, small = (write_out(get_teacher(ctx).model) for _ in range(2))
    whole, rng = Structure.whole(written_encoder(dense)), np.random.default_rng(0)
    heads = tuple(tuple(sorted(rng.permutation(4)[:3].tolist())) for _ in whole.layers)
    neurons = tuple(tuple(sorted(rng.permutation(512)[:120].tolist())) for _ in whole.layers)
    cut(written_encoder(small), Structure(whole.layers, heads, neurons))
    return dense, small, entering(dense, calibration_batches(ctx, examples), 10_000)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_scales_are_the_damped_least_squares_of_the_outputs(world: World, place: int) -> None:
    """Against numpy's lstsq on the matrix of all outputs of all units, written out."""
    _, small, states = pruned_pair(world, examples=32)
    own = sublayers(written_encoder(small))[place]
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        wanted = [own.stream(t) + 0.3 * torch.randn(t.x.shape, generator=rng) for t in states]
        inputs: list[Tensor] = []
        hook = own.out.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        lacking = torch.cat([(w - own.stream(t))[t.mask] for w, t in zip(wanted, states, strict=True)]).double()
        hook.remove()
        h = torch.cat([x[t.mask] for x, t in zip(inputs, states, strict=True)]).double()
        units = h.shape[1] // own.unit
        outputs = torch.einsum(
            "tuj,duj->tdu", h.unflatten(1, (units, -1)), own.out.weight.double().unflatten(1, (units, -1))
        )
        a, e = outputs.flatten(0, 1).numpy(), lacking.flatten().numpy()
    for damp in (1e-6, 1.0, 30.0):
        tall = np.concatenate((a, damp * np.eye(units)))
        expected = 1 + np.linalg.lstsq(tall, np.concatenate((e, np.zeros(units))))[0]
        np.testing.assert_allclose(fit_scales(own, states, wanted, damp).numpy(), expected, rtol=1e-5, atol=1e-6)
    free = 1 + np.linalg.lstsq(a, e)[0]
    np.testing.assert_allclose(fit_scales(own, states, wanted, 1e-6).numpy(), free, rtol=1e-5, atol=1e-6)


def test_scales_bring_the_streams_back(world: World) -> None:
    dense, small, states = pruned_pair(world)
    before = small(**INPUTS).logits
    plain = share_weights(small)
    teacher_before = digest(dense)
    changed = rescale(written_encoder(small), written_encoder(dense), states, damp=30.0)
    assert changed == list(range(len(sublayers(written_encoder(small))))) and digest(dense) == teacher_before
    assert torch.equal(plain(**INPUTS).logits, before)

    def error(model: Any) -> float:
        total = 0.0
        for state in states:
            ends = [written_encoder(m)(state.x, state.mask)[state.mask] for m in (model, dense)]
            total += float((ends[0] - ends[1]).square().sum())
        return total

    with torch.no_grad():
        assert error(small) < error(plain)


def test_a_unit_whose_twin_is_removed_counts_double(world: World) -> None:
    """And the smaller encoder then gives just what the whole one does."""
    ctx = world.context()
    dense = copy.deepcopy(write_out(get_teacher(ctx).model))
    encoder = written_encoder(dense)
    with torch.no_grad():
        for layer in layers_of(dense):
            attention = layer.attention
            for part in (attention.q, attention.k, attention.v):
                part.weight[8:16] = part.weight[:8]
                if part.bias is not None:
                    part.bias[8:16] = part.bias[:8]
            attention.o.weight[:, 8:16] = attention.o.weight[:, :8]
            for part in ffn_in(layer.ffn):
                part.weight[1::2] = part.weight[::2]
                if part.bias is not None:
                    part.bias[1::2] = part.bias[::2]
            ffn_out(layer.ffn).weight[:, 1::2] = ffn_out(layer.ffn).weight[:, ::2]
            ffn_out(layer.ffn).weight[:, 40:] = 0
        if encoder.position is not None:
            encoder.position.embedding.weight[:, 1] = encoder.position.embedding.weight[:, 0]
    small = share_weights(dense)
    layers = tuple(range(len(encoder.layers)))
    cut(written_encoder(small), Structure(layers, ((0, 2, 3),) * len(layers), (tuple(range(0, 40, 2)),) * len(layers)))
    assert not torch.allclose(small(**INPUTS).logits, dense(**INPUTS).logits, atol=1e-3)
    whole = [part.out.weight for part in sublayers(encoder)]
    rescale(written_encoder(small), encoder, entering(dense, calibration_batches(ctx, 64), 10_000), damp=1e-4)
    for i, part in enumerate(sublayers(written_encoder(small))):
        kept, scaled = (
            (whole[i][:, :8], part.out.weight[:, :8]) if i % 2 == 0 else (whole[i][:, :40:2], part.out.weight)
        )
        torch.testing.assert_close(scaled, 2 * kept, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(small(**INPUTS).logits, dense(**INPUTS).logits, atol=1e-3, rtol=1e-3)


def test_a_scale_that_cannot_be_believed_ends_the_scaling(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small, states = pruned_pair(world)
    largest = iter((1.5, -0.99 * LIMIT, -1.01 * LIMIT))

    def fitted(sublayer: Any, *_: Any) -> Tensor:
        scales = torch.ones(sublayer.out.in_features // sublayer.unit, dtype=torch.float64)
        scales[0] = next(largest)
        return scales

    monkeypatch.setattr(rescaling, "fit_scales", fitted)
    plain = [part.out.weight for part in sublayers(written_encoder(small))]
    assert rescale(written_encoder(small), written_encoder(dense), states, damp=1.0) == [0, 1]
    scaled = [part.out.weight for part in sublayers(written_encoder(small))]
    assert [a is b for a, b in zip(plain, scaled, strict=True)] == [False, False] + [True] * (len(plain) - 2)
    for i, (unit, scale) in enumerate(((8, 1.5), (1, -0.99 * LIMIT))):
        torch.testing.assert_close(scaled[i][:, :unit], plain[i][:, :unit] * scale)
        assert torch.equal(scaled[i][:, unit:], plain[i][:, unit:])


def silence(model: Any) -> None:
    """Give half of the heads and most of the neurons an output of zero."""
    with torch.no_grad():
        for layer in layers_of(write_out(model)):
            layer.attention.o.weight[:, 8:24] = 0
            ffn_out(layer.ffn).weight[:, 5:-100] = 0


def test_silent_units_go_first(world: World) -> None:
    ctx = world.context(cache="silent", ratio=8)
    student, teacher = compress(ctx, silence)
    full = len(layers_of(student))
    assert ctx.setting.remaining > UnitCosts.of(ctx.spec, ctx.lengths("selection")).remaining(2 * full, 105 * full)
    torch.testing.assert_close(student(**INPUTS).logits, teacher.model(**INPUTS).logits, atol=2e-5, rtol=2e-5)
    loud = torch.zeros(512, dtype=torch.bool)
    loud[:5] = loud[-100:] = True
    for layer, whole in zip(layers_of(student), layers_of(write_out(teacher.model)), strict=True):
        heads = layer.attention.heads.tolist()
        assert {0, 3} <= set(heads)
        first = ffn_in(layer.ffn)[0].weight
        for row in ffn_in(whole.ffn)[0].weight[loud]:
            assert (first == row).all(1).any()


def encoder_flops(model: Any, n: int) -> int:
    return count_dispatched(model, {"input_ids": tokens(1, n)}, parts_of(model)).encoder


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_it_costs_what_the_ratio_asks_for(world: World, ratio: int) -> None:
    ctx = world.context(ratio=ratio)
    lengths = ctx.lengths("selection")
    budget = remaining(ctx.spec, ratio, lengths)
    assert ctx.setting.remaining == budget < 1 and not ctx.setting.note
    student, teacher = compress(ctx)
    shape = [(len(layer.attention.heads), ffn_out(layer.ffn).in_features) for layer in layers_of(student)]
    assert len(set(shape)) > 1, "layers differ"
    for n in (1, 7, 20):
        assert encoder_flops(student, n) == 2 * sum(layer_macs(ctx.spec, n, n, n, h, f) for h, f in shape)
    small, dense = (sum(c * encoder_flops(m, n) for n, c in lengths.items()) for m in (student, teacher.model))
    neuron = 2 * ctx.spec.d_model * (3 if ctx.spec.gated else 2) * sum(n * c for n, c in lengths.items())
    assert 0 <= budget - small / dense < neuron / dense
    assert ctx.setting.remaining == pytest.approx(small / dense, rel=1e-12)
    assert ctx.setting.knob == {"heads": sum(h for h, _ in shape), "neurons": sum(f for _, f in shape)}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_run_is_told(family: Family, tmp_path: Path) -> None:
    ctx = World(tmp_path, family, examples=60).context()
    student, teacher = compress(ctx)
    before = digest(teacher.model)
    cost = measure_cost(student, teacher, ctx)
    assert cost.real.compressed.overhead == 0 and cost.real.compressed.decoder == cost.real.dense.decoder
    assert cost.achieved_remaining == pytest.approx(ctx.setting.remaining, rel=0.02)
    assert digest(teacher.model) == before
    assert ctx.trained_parameters == 0 and [(s.name, s.steps) for s in ctx.stages[1:]] == [("calibrate", 0)]
    assert ctx.stages[1].examples == min(64, len(ctx.features["train"])) and ctx.stages[1].flops > 0
    assert not student.training and not any(p.requires_grad for p in student.parameters())


def test_only_what_changed_is_stored(world: World) -> None:
    ctx = world.context()
    student, teacher = compress(ctx)
    folder = ctx.cache.root / ctx.cache.key("student", ctx.identity)
    stored = load_file(folder / WEIGHTS_FILE)
    theirs = {id(p) for p in teacher.model.parameters()}
    assert set(stored) == {name for name, p in student.named_parameters() if id(p) not in theirs}
    assert not any("norm" in n.lower() or "embed" in n or "classifier" in n or "decoder" in n for n in stored)
    assert ctx.bytes_added == (folder / WEIGHTS_FILE).stat().st_size
    kept = Structure.from_json(json.loads((folder / "artifact.json").read_text())["made"]["structure"])
    assert [len(layer.attention.heads) for layer in layers_of(student)] == list(map(len, kept.heads))


def test_what_comes_back_answers_the_same(world: World) -> None:
    first, _ = compress(world.context(cache="again"))
    ctx = world.context(cache="again")
    second, _ = compress(ctx)
    assert all(stage.cached for stage in ctx.stages) and "heads" in ctx.setting.knob
    torch.testing.assert_close(first(**INPUTS).logits, second(**INPUTS).logits, atol=1e-6, rtol=1e-6)
    other, _ = compress(world.context(cache="third"))
    torch.testing.assert_close(first(**INPUTS).logits, other(**INPUTS).logits, atol=1e-6, rtol=1e-6)


def test_padding_changes_no_answer(world: World) -> None:
    student, _ = compress(world.context())
    ids = tokens(2, 7, seed=3)
    padded = torch.cat((ids, torch.zeros(2, 6, dtype=torch.long)), 1)
    mask = (torch.arange(13) < 7).long().expand(2, 13)
    torch.testing.assert_close(student(padded, attention_mask=mask).logits, student(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_above_the_encoder_takes_nothing(family: Family, tmp_path: Path) -> None:
    """At width 32 a plugin costs more than it saves, so that its budget is no less than the whole encoder."""
    config = quick_config(
        task_file(tmp_path / "task"), tiny_checkpoint(tmp_path / family, family), method="pruning", ratio=2
    )
    ctx = context(config, tmp_path / "cache")
    ctx.setting = Pruning().setting(ctx.spec, 2, ctx.lengths("selection"))
    assert ctx.setting.remaining == 1 and "nothing is removed for the" in ctx.setting.note
    student, teacher = compress(ctx)
    assert torch.equal(student(**INPUTS).logits, write_out(teacher.model)(**INPUTS).logits)
    assert ctx.setting.remaining == 1 and not load_file(
        ctx.cache.root / ctx.cache.key("student", ctx.identity) / WEIGHTS_FILE
    )


def test_a_layer_may_lose_everything(world: World) -> None:
    """Its biases and the residual stream are left, and the count still holds."""
    ctx = world.context()
    teacher = get_teacher(ctx)
    student = write_out(teacher.model)
    whole = Structure.whole(written_encoder(student))
    cut(written_encoder(student), Structure(whole.layers, ((), *whole.heads[1:]), ((), *whole.neurons[1:])))
    states = entering(write_out(teacher.model), calibration_batches(ctx, 32), 100)
    changed = rescale(written_encoder(student), written_encoder(write_out(teacher.model)), states, damp=1.0)
    assert changed[:1] == [2]
    n = len(whole.layers)
    assert encoder_flops(student, 9) * n == encoder_flops(teacher.model, 9) * (n - 1)
    inputs = {"input_ids": tokens(1, 9)}
    assert count(student, inputs, parts_of(student)) == count_dispatched(student, inputs, parts_of(student))


@pytest.mark.parametrize("ratio", [None, 1, 2.5])
def test_a_ratio_that_names_no_budget(ratio: float | None) -> None:
    reason = Pruning().skip(spec_of("t5-base"), TASKS["sst2"], ratio)
    assert reason is not None and str(ratio) in reason


@pytest.mark.parametrize(("name", "kind"), [("bert", "regression"), ("bert", "qa"), ("t5", "qa")])
def test_it_runs_on_other_kinds_of_task(name: str, kind: str, tmp_path: Path) -> None:
    ctx = World(tmp_path, name, examples=40, **KINDS[kind]).context()
    student, _ = compress(ctx)
    n = max(ctx.lengths("selection"))
    kept = [(len(layer.attention.heads), ffn_out(layer.ffn).in_features) for layer in layers_of(student)]
    assert encoder_flops(student, n) == 2 * sum(layer_macs(ctx.spec, n, n, n, h, f) for h, f in kept)


def test_more_examples_or_damping_are_another_model(world: World) -> None:
    first, _ = compress(world.context())
    for values in ({"examples": 32}, {"damp": 50.0}, {"seed": 1}):
        other, _ = compress(world.context(**values))
        assert not torch.allclose(first(**INPUTS).logits, other(**INPUTS).logits, atol=1e-4), values


def test_gradients_hold_every_unit(world: World) -> None:
    ctx = world.context()
    gradients: GateGradients = gate_gradients(get_teacher(ctx).model, calibration_batches(ctx, 40), ctx.task.kind)
    assert {g.shape for g in gradients.heads} == {(40, 4)} and {g.shape for g in gradients.neurons} == {(40, 512)}
