"""An attached model against the formulas of the released algorithm, written out with loops and a concatenation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.plugins.layers import CompressionPair
from bench.plugins.plugin import Plugin, PluginConfig
from tests.checkpoints import encode_hidden, random_plugin, tiny_model, tokens

SHAPES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_act": "gelu"},
    "t5": {"feed_forward_proj": "relu"},
    "t5-gated": {"feed_forward_proj": "gated-gelu"},
}


def family(shape: str) -> Any:
    return shape.split("-")[0]


def plain_compressed_ffn(u: Tensor, pair: CompressionPair, ffn: Callable[[Tensor], Tensor]) -> Tensor:
    """z of one sequence u, (n, d): one group after another, one position after another."""
    n, k = len(u), pair.k
    w1 = torch.cat([pair.w1_y.weight, pair.w1_u.weight], dim=1)
    z = []
    for start in range(0, n, k):
        group = [u[start + j] for j in range(k)]
        s = pair.score.weight @ torch.cat(group) + pair.score.bias
        a = torch.exp(s) / torch.exp(s).sum()
        c = sum(a[j] * group[j] for j in range(k))
        y = ffn(c)
        for member in group:
            inner = w1 @ torch.cat([y, member]) + pair.w1_u.bias
            z.append(y + pair.w2.weight @ torch.tanh(inner) + pair.w2.bias)
    return torch.stack(z)


def plain_bert(model: Any, ids: Tensor, plugin: Plugin) -> Tensor:
    """Post-norm: u is the attention's output, and h' = LayerNorm(u + z)."""
    bert = model.bert
    hidden = bert.embeddings(ids)
    for layer, pair in zip(bert.encoder.layer, plugin.pairs, strict=True):
        u = layer.attention(hidden)[0]

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

    def rms(norm: Any, h: Tensor) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight

    for block, pair in zip(stack.block, plugin.pairs, strict=True):
        hidden, bias, _ = block.layer[0](hidden, position_bias=bias)
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [2, 3, 4])
@torch.no_grad()
def test_attached_model_is_the_released_algorithm(shape: str, k: int) -> None:
    model = tiny_model(family(shape), **SHAPES[shape])
    plugin = random_plugin(model, k, mask_padding=False)
    ids = tokens(3, 12)
    expected = (plain_bert if family(shape) == "bert" else plain_t5)(model, ids, plugin)
    dense = encode_hidden(model, input_ids=ids)
    with plugin.attached(model):
        actual = encode_hidden(model, input_ids=ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (actual - dense).abs().mean() > 0.1  # the plugin is no small change here


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
