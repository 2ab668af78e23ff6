"""The closed-form start against reduced-rank regression in NumPy, and against a random start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.backbones.sites import digest
from bench.plugins.fit import fit_least_squares, measure_units
from bench.plugins.plugin import Plugin
from tests.checkpoints import FAMILIES, Family, encode_hidden, random_plugin, tiny_model, tokens

Array = NDArray[np.float64]


def batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Padded batches of 8, their lengths 3 to 20."""
    made = []
    for i in range(count):
        lengths = torch.randint(3, 21, (8, 1), generator=torch.Generator().manual_seed(seed + i))
        mask = (torch.arange(int(lengths.max())) < lengths).long()
        made.append({"input_ids": tokens(8, mask.shape[1], seed=seed + i), "attention_mask": mask})
    return made


@torch.no_grad()
def hidden_error(model: Any, plugin: Plugin, inputs: list[dict[str, Tensor]]) -> float:
    errors = []
    for batch in inputs:
        target, real = encode_hidden(model, **batch), batch["attention_mask"].bool()
        with plugin.attached(model):
            errors.append((encode_hidden(model, **batch) - target)[real].square().mean().item())
    return float(np.mean(errors))


def norm_and_ffn(model: Any, index: int) -> tuple[Any, Any]:
    """Return what turns the residual stream into the FFN's input, and the FFN, of a dense layer."""
    if hasattr(model, "bert"):
        layer = model.bert.encoder.layer[index]
        first, second = layer.intermediate, layer.output.dense
        return (lambda stream: stream), (lambda u: second(first(u)))
    last = model.encoder.block[index].layer[-1]
    return last.layer_norm, last.DenseReluDense


def adder(model: Any, index: int) -> Any:
    """Return the module that adds the FFN's output to the stream, which is its last argument."""
    return model.bert.encoder.layer[index].output if hasattr(model, "bert") else model.encoder.block[index].layer[-1]


@torch.no_grad()
def regression(model: Any, plugin: Plugin, index: int, inputs: list[dict[str, Tensor]]) -> tuple[Array, Array, Array]:
    """Return regressors (tokens, 2d), what pooling loses (tokens, d) and what it counts, gathered position by position.

    BERT pools by the mean and counts all alike. T5 counts by the stream that the layer leaves, and pools by the scores.
    """
    norm, ffn = norm_and_ffn(model, index)
    caught: list[Tensor] = []
    with plugin.attached(model):
        handle = adder(model, index).register_forward_pre_hook(lambda module, args: caught.append(args[-1]))
        for batch in inputs:
            encode_hidden(model, **batch)
        handle.remove()
    pair, t5 = plugin.pairs[index], not hasattr(model, "bert")
    x, r, counts = [], [], []
    for batch, given in zip(inputs, caught, strict=True):
        for row, n in zip(given, batch["attention_mask"].sum(1).tolist(), strict=True):
            u = norm(row)
            for start in range(0, n, plugin.config.k):
                members = u[start : min(start + plugin.config.k, n)]
                share = torch.full((len(members),), 1 / len(members))
                if t5 and plugin.config.compression == "attention":
                    d = len(members[0])
                    scores = [pair.score.weight[j, j * d : (j + 1) * d] @ u_j for j, u_j in enumerate(members)]
                    share = torch.stack(scores).softmax(0)
                y = ffn(share @ members)
                for place, member in enumerate(members, start):
                    x.append(torch.cat([y, member]))
                    r.append(ffn(member) - y)
                    left = row[place] + ffn(member)
                    counts.append(1 / left.square().mean() if t5 else torch.ones(()))
    return torch.stack(x).double().numpy(), torch.stack(r).double().numpy(), torch.stack(counts).double().numpy()


def weighted_mean(values: Array, counts: Array) -> Array:
    return counts @ values / counts.sum()


def deviation(values: Array, counts: Array) -> Array:
    return np.sqrt(weighted_mean(np.square(values - weighted_mean(values, counts)), counts))


def reduced_rank(x: Array, r: Array, counts: Array, rank: int) -> Array:
    """Best affine map of ``rank`` from x to r; returns its predictions (Izenman 1975, identity weights)."""
    root = np.sqrt(counts)[:, None]
    centred, target = root * (x - weighted_mean(x, counts)), root * (r - weighted_mean(r, counts))
    fitted = centred @ np.linalg.lstsq(centred, target, rcond=None)[0]
    _, _, directions = np.linalg.svd(fitted, full_matrices=False)
    return fitted @ directions[:rank].T @ directions[:rank] / root + weighted_mean(r, counts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("index", "rank"), [(0, 2), (0, 6), (1, 6)])
@pytest.mark.parametrize("variant", [{}, {"compression": "conv", "attention_k": 2}], ids=["paper", "conv-keys"])
def test_a_layer_is_the_reduced_rank_regression(family: Family, index: int, rank: int, variant: dict[str, Any]) -> None:
    """On what the compressed layers below it give, merged keys and values included."""
    model, inputs = tiny_model(family), batches(30, seed=0)
    plugin = Plugin.for_model(model, 3, bottleneck=rank, **variant)
    fit_least_squares(plugin, model, inputs)
    pair = plugin.pairs[index]
    x, r, counts = regression(model, plugin, index, inputs)
    # where the stream has no scale of its own, each channel is measured by its own
    unit = deviation(r, counts) if family == "t5" else np.ones(r.shape[1])
    w1 = torch.cat((pair.w1_y.weight, pair.w1_u.weight), dim=1).detach().double().numpy()
    b1, w2, b2 = (t.detach().double().numpy() for t in (pair.w1_u.bias, pair.w2.weight, pair.w2.bias))
    inner = x @ w1.T + b1

    def error(predicted: Array) -> Any:
        return counts @ np.square((r - predicted) / unit).sum(1)

    def best(rank: int) -> Any:
        return error(reduced_rank(x, r / unit, counts, rank) * unit)

    lost, linear = error(weighted_mean(r, counts)), error(inner @ w2.T + b2)
    assert best(rank) * (1 - 1e-6) < linear < best(rank) + 0.01 * lost
    assert error(np.tanh(inner) @ w2.T + b2) < best(rank) + 0.05 * lost
    assert best(rank - 1) > linear + 0.01 * lost  # one rank less shows


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_starts_and_the_model_is_unchanged(family: Family) -> None:
    model, inputs = tiny_model(family), batches(5, seed=0)
    before, modes = digest(model), [m.training for m in model.modules()]
    plugin = random_plugin(model, 2)
    fit_least_squares(plugin, model, inputs)
    assert digest(model) == before and [m.training for m in model.modules()] == modes
    for pair in plugin.pairs:
        assert pair.score.weight.any() == (family == "t5") and not pair.score.bias.any()
        assert pair.w2.weight.any()
    with plugin.attached(model):  # what the fit attached to was a copy
        pass


@pytest.mark.parametrize("compression", ["attention", "mean", "conv"])
@pytest.mark.parametrize("decompression", ["adapter", "copy"])
@torch.no_grad()
def test_every_compression_starts_as_the_mean(compression: Any, decompression: Any) -> None:
    """So that the fit of one is that of all."""
    model, inputs, settings = tiny_model("bert"), batches(5, seed=0), {"decompression": decompression, "attention_k": 2}
    outputs = []
    for kind in ("mean", compression):
        plugin = random_plugin(model, 4, compression=kind, **settings)
        fit_least_squares(plugin, model, inputs)
        with plugin.attached(model):
            outputs.append(encode_hidden(model, **inputs[0])[inputs[0]["attention_mask"].bool()])
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bottleneck", [8, 64])
def test_hidden_error_is_far_below_that_of_a_random_start(family: Family, bottleneck: int) -> None:
    """On batches that the fit has not seen; 64 units are more than the width of 32."""
    model, unseen = tiny_model(family), batches(4, seed=1000)
    torch.manual_seed(0)
    fitted = Plugin.for_model(model, 2, bottleneck=bottleneck)
    start = hidden_error(model, fitted, unseen)
    fit_least_squares(fitted, model, batches(60, seed=0))
    assert hidden_error(model, fitted, unseen) < 0.75 * start


def test_layers_are_reported_from_the_bottom() -> None:
    model, seen = tiny_model("t5", num_layers=3), []
    plugin = random_plugin(model, 2)
    before = [p.w2.bias.detach().clone() for p in plugin.pairs]

    def note() -> None:
        seen.append([not torch.equal(p.w2.bias, b) for p, b in zip(plugin.pairs, before, strict=True)])

    fit_least_squares(plugin, model, batches(3, seed=0), note)
    assert seen == [[True, False, False], [True, True, False], [True, True, True]]


def test_units_beyond_the_rank_can_still_learn() -> None:
    model = tiny_model("bert")
    plugin = Plugin.for_model(model, 2, bottleneck=40)
    fit_least_squares(plugin, model, batches(10, seed=0))
    batch = batches(1, seed=5)[0]
    with plugin.attached(model):
        encode_hidden(model, **batch).square().sum().backward()
    gradient = plugin.pairs[0].w2.weight.grad
    assert gradient is not None and gradient.abs().sum(0).min() > 0


LOUD = 7
"""A token whose FFN output drowns everything, as T5's spaces do."""


@torch.no_grad()
def loud_model() -> Any:
    """Return a T5 whose first FFN adds to one channel of one token a thousand times what it adds to the others."""
    model = tiny_model("t5")
    table, ffn = model.get_input_embeddings().weight, model.encoder.block[0].layer[-1].DenseReluDense
    table[:, 0] *= 0.01
    table[LOUD] = 0
    table[LOUD, 0] = 10
    for name, weight in ffn.named_parameters():
        if name.startswith("wi"):
            weight[0] = 0
            weight[0, 0] = 1
        else:
            weight[1, 0] = 1000
    return model


@torch.no_grad()
def after_first(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the stream that the first layer leaves, as the next one reads it."""
    stream = model.encoder(**batch, output_hidden_states=True).hidden_states[1]
    read: Tensor = model.encoder.block[1].layer[0].layer_norm(stream)
    return read


def test_a_vector_that_would_drown_its_group_is_left_out_of_it() -> None:
    model, inputs, k = loud_model(), batches(30, seed=0), 4
    unseen = batches(6, seed=500)
    assert all((batch["input_ids"] == LOUD).any() for batch in unseen)
    errors = {}
    for compression in ("attention", "mean"):
        torch.manual_seed(0)
        plugin = Plugin.for_model(model, k, compression=compression)  # type: ignore[arg-type]
        fit_least_squares(plugin, model, inputs)
        lost = []
        for batch in unseen:
            quiet = batch["attention_mask"].bool() & (batch["input_ids"] != LOUD)
            target = after_first(model, batch)[quiet]
            with plugin.attached(model):
                lost.append((after_first(model, batch)[quiet] - target).square().mean() / target.var())
        errors[compression] = float(torch.stack(lost).mean())
    assert errors["attention"] < 0.5 * errors["mean"]


@pytest.mark.parametrize("compression", ["attention", "conv"])
def test_units_are_the_deviations_of_the_regression(compression: Any) -> None:
    model, inputs = loud_model(), batches(20, seed=0)
    plugin = random_plugin(model, 3, compression=compression)
    fit_least_squares(plugin, model, inputs)
    measured = measure_units(plugin, model, inputs)
    assert measured is not None and len(measured) == 2
    for index, units in enumerate(measured):
        x, r, counts = regression(model, plugin, index, inputs)
        expected = np.concatenate((deviation(x, counts), deviation(r, counts)))
        torch.testing.assert_close(torch.cat((units.y, units.u, units.z)).double(), torch.from_numpy(expected),
                                   rtol=1e-3, atol=1e-6)  # fmt: skip


def test_a_stream_that_is_normalised_needs_none() -> None:
    model = tiny_model("bert")
    assert measure_units(random_plugin(model, 2), model, batches(2, seed=0)) is None
