"""An attached model against the formulas of the released algorithm, written out with loops and a concatenation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.backbones.encoder import Attention
from bench.backbones.sites import bert_attention, t5_attention
from bench.measure.closed_form import PluginShape, plugin_parameters
from bench.plugins.layers import CompressionPair
from bench.plugins.plugin import Plugin, PluginConfig
from tests.checkpoints import encode_hidden, random_plugin, tiny_model, tokens

SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_act": "gelu"},
    "t5": {"feed_forward_proj": "relu"},
    "t5-gated": {"feed_forward_proj": "gated-gelu"},
}
TWINS = [(c, d) for c in ("attention", "mean", "conv") for d in ("adapter", "copy")]


def family(shape: str) -> Any:
    return shape.split("-")[0]


def plain_merged(group: list[Tensor], pair: CompressionPair) -> Tensor:
    """c of one whole group of k vectors, (d,)."""
    k = len(group)
    if pair.compression == "mean":
        return sum(group, torch.zeros(())) / k
    if pair.compression == "conv":
        return torch.stack([sum(pair.weight[j, c] * group[j][c] for j in range(k)) for c in range(len(group[0]))])
    s = pair.score.weight @ torch.cat(group) + pair.score.bias
    a = torch.exp(s) / torch.exp(s).sum()
    return sum((a[j] * group[j] for j in range(k)), torch.zeros(()))


def plain_compressed_ffn(u: Tensor, pair: CompressionPair, ffn: Callable[[Tensor], Tensor]) -> Tensor:
    """z of one sequence u, (n, d): one group after another, one position after another."""
    n, k = len(u), pair.k
    z = []
    for start in range(0, n, k):
        group = [u[start + j] for j in range(k)]
        y = ffn(plain_merged(group, pair))
        for member in group:
            if pair.decompression == "copy":
                z.append(y)
                continue
            w1 = torch.cat([pair.w1_y.weight, pair.w1_u.weight], dim=1)
            inner = w1 @ torch.cat([y, member]) + pair.w1_u.bias
            z.append(y + pair.w2.weight @ torch.tanh(inner) + pair.w2.bias)
    return torch.stack(z)


def plain_attention(x: Tensor, pair: CompressionPair, attention: Attention, bias: Tensor | None) -> Tensor:
    """What attention to merged vectors adds to one sequence x, (n, d); ``bias`` is (heads, n, n): a query at a time."""
    n, k, width = len(x), pair.k, attention.d_head
    groups = [list(range(start, start + k)) for start in range(0, n, k)]
    merged = [plain_merged([x[j] for j in group], pair) for group in groups]
    added = []
    for i in range(n):
        heads = []
        for head in range(attention.n_heads):
            own = slice(head * width, (head + 1) * width)
            q = attention.q(x[i])[own]
            logits = []
            for group, c in zip(groups, merged, strict=True):
                logit = attention.scale * (q @ attention.k(c)[own]) + math.log(k)
                if bias is not None:
                    logit = logit + sum(bias[head, i, j] for j in group) / k
                logits.append(logit)
            weights = torch.exp(torch.stack(logits))
            weights = weights / weights.sum()
            heads.append(sum(a * attention.v(c)[own] for a, c in zip(weights, merged, strict=True)))
        added.append(attention.o(torch.cat(heads)))
    return torch.stack(added)


def plain_bert(model: Any, ids: Tensor, plugin: Plugin) -> Tensor:
    """Post-norm: u is the attention's output, and h' = LayerNorm(u + z)."""
    bert = model.bert
    hidden = bert.embeddings(ids)
    for i, (layer, pair) in enumerate(zip(bert.encoder.layer, plugin.pairs, strict=True)):
        if plugin.attention is None:
            u = layer.attention(hidden)[0]
        else:
            attention, merging = bert_attention(layer.attention), plugin.attention[i]
            added = torch.stack([plain_attention(row, merging, attention, None) for row in hidden])
            u = layer.attention.output.LayerNorm(hidden + added)

        def ffn(c: Tensor, layer: Any = layer) -> Tensor:
            x = layer.intermediate.dense.weight @ c + layer.intermediate.dense.bias
            x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
            return layer.output.dense.weight @ x + layer.output.dense.bias

        h = u + torch.stack([plain_compressed_ffn(row, pair, ffn) for row in u])
        norm = layer.output.LayerNorm
        centred = h - h.mean(-1, keepdim=True)
        hidden = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    return hidden


def plain_t5(model: Any, ids: Tensor, plugin: Plugin) -> Tensor:
    """Pre-norm: u = RMSNorm(h), and h' = h + z; one more norm at the end."""
    stack = model.encoder
    hidden, bias = stack.embed_tokens(ids), None
    of_pairs = stack.block[0].layer[0].SelfAttention.compute_bias(ids.shape[1], ids.shape[1])[0]

    def rms(norm: Any, h: Tensor) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight

    for i, (block, pair) in enumerate(zip(stack.block, plugin.pairs, strict=True)):
        sublayer = block.layer[0]
        if plugin.attention is None:
            hidden, bias, _ = sublayer(hidden, position_bias=bias)
        else:
            attention, merging = t5_attention(sublayer.SelfAttention), plugin.attention[i]
            x = rms(sublayer.layer_norm, hidden)
            hidden = hidden + torch.stack([plain_attention(row, merging, attention, of_pairs) for row in x])
        dense = block.layer[-1].DenseReluDense

        def ffn(c: Tensor, dense: Any = dense) -> Tensor:
            if not hasattr(dense, "wi_0"):
                return dense.wo.weight @ (dense.wi.weight @ c).clamp_min(0)
            x = dense.wi_0.weight @ c
            gate = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
            return dense.wo.weight @ (gate * (dense.wi_1.weight @ c))

        u = rms(block.layer[-1].layer_norm, hidden)
        hidden = hidden + torch.stack([plain_compressed_ffn(row, pair, ffn) for row in u])
    return rms(stack.final_layer_norm, hidden)


@torch.no_grad()
def check(shape: str, k: int, implementation: str = "sdpa", **settings: Any) -> None:
    model = tiny_model(family(shape), **SHAPES[shape])
    model.set_attn_implementation(implementation)
    plugin = random_plugin(model, k, **settings)
    ids = tokens(3, 12)
    expected = (plain_bert if family(shape) == "bert" else plain_t5)(model, ids, plugin)
    dense = encode_hidden(model, input_ids=ids)
    with plugin.attached(model):
        actual = encode_hidden(model, input_ids=ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (actual - dense).abs().mean() > 0.1  # the plugin is no small change here


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_attached_model_is_the_released_algorithm(shape: str, k: int) -> None:
    check(shape, k, mask_padding=False)


@pytest.mark.parametrize("shape", ["bert", "t5"])
@pytest.mark.parametrize("attention_k", [None, 2, 4])
@pytest.mark.parametrize("twin", TWINS, ids="-".join)
def test_a_twin_is_its_formula(shape: str, attention_k: int | None, twin: tuple[str, str]) -> None:
    compression, decompression = twin
    check(shape, 3, compression=compression, decompression=decompression, attention_k=attention_k)


@pytest.mark.parametrize("shape", ["bert", "t5"])
def test_merged_keys_are_the_same_whatever_attention_the_model_runs(shape: str) -> None:
    check(shape, 2, implementation="eager", attention_k=4)


@pytest.mark.parametrize("compression", ["attention", "conv"])
@torch.no_grad()
def test_a_compression_that_has_learned_nothing_is_the_mean(compression: Any) -> None:
    """Of whole groups, of one with padding, and of one that is all padding."""
    u, mask = torch.randn(2, 12, 6), torch.arange(12) < torch.tensor([[12], [6]])
    pair = CompressionPair(6, 4, compression=compression)
    pair.reset_to_mean()
    for seen in (mask, None):
        expected = CompressionPair(6, 4, compression="mean").compress(u, seen)
        torch.testing.assert_close(pair.compress(u, seen), expected)
    torch.testing.assert_close(expected, u.unflatten(1, (3, 4)).mean(2))


@torch.no_grad()
def test_a_group_with_padding_weighs_its_tokens_alone() -> None:
    """By hand: two tokens of four, whatever stands behind them."""
    u = torch.tensor([[[1.0, 2.0], [3.0, -4.0], [70.0, 70.0], [80.0, 80.0]]])
    mask = torch.tensor([[True, True, False, False]])
    mean, conv = (CompressionPair(2, 4, compression=kind) for kind in ("mean", "conv"))
    conv.weight.copy_(torch.tensor([[1.0, 0.0], [0.5, 2.0], [9.0, 9.0], [9.0, 9.0]]))
    assert mean.compress(u, mask).tolist() == [[[2.0, -1.0]]]
    assert conv.compress(u, mask).tolist() == [[[2 * 2.5, 2 * -8.0]]]


@pytest.mark.parametrize("k", [2, 4, 8])
def test_init_is_that_of_the_released_code(k: int) -> None:
    torch.manual_seed(0)
    pair = CompressionPair(384, k)
    assert pair.score.weight.std().item() == pytest.approx((2 / (384 * k)) ** 0.5, rel=0.05)
    for linear in (pair.w1_y, pair.w1_u, pair.w2):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert abs(linear.weight.mean().item()) < 5e-4
    for bias in (pair.score.bias, pair.w1_u.bias, pair.w2.bias):
        assert not bias.any()


def test_split_form_is_the_concatenated_form() -> None:
    torch.manual_seed(0)
    pair = CompressionPair(16, 4, bottleneck=8)
    for parameter in pair.parameters():
        torch.nn.init.normal_(parameter)
    y, u = torch.randn(2, 3, 16), torch.randn(2, 12, 16)
    repeated = y.repeat_interleave(4, dim=1)
    w1 = torch.cat((pair.w1_y.weight, pair.w1_u.weight), dim=1)
    inner = torch.tanh(torch.cat((repeated, u), dim=-1) @ w1.T + pair.w1_u.bias)
    expected = repeated + inner @ pair.w2.weight.T + pair.w2.bias
    torch.testing.assert_close(pair.decompress(y, u), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("k", "parameters"), [(2, 1_816_344), (4, 1_926_960), (8, 2_369_376)])
def test_parameters_of_a_plugin_for_t5_base(k: int, parameters: int) -> None:
    plugin = Plugin(PluginConfig(k=k, family="t5", d_model=768, n_layers=12))
    assert plugin.num_parameters() == parameters
    assert sum(p.numel() for p in plugin.parameters()) == parameters


@pytest.mark.parametrize("attention_k", [None, 3])
@pytest.mark.parametrize("twin", TWINS, ids="-".join)
def test_parameters_of_a_twin_are_the_closed_form(attention_k: int | None, twin: tuple[Any, Any]) -> None:
    shape: dict[str, Any] = {"compression": twin[0], "decompression": twin[1], "attention_k": attention_k}
    plugin = Plugin(PluginConfig(k=4, family="t5", d_model=24, n_layers=3, bottleneck=5, **shape))
    assert plugin.num_parameters() == plugin_parameters(24, 3, PluginShape(4, 5, **shape))
    assert (plugin.num_parameters() == 0) == (twin == ("mean", "copy"))
