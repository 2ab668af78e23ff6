"""Merged keys and values where merging loses nothing: the answer is then that of the dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.backbones.sites import EncoderView
from bench.plugins.bank import merged_bias
from tests.checkpoints import FAMILIES, Family, encode_hidden, random_plugin, tiny_model, tokens

COPIES: dict[str, Any] = {"compression": "mean", "decompression": "copy"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[12, 12], [12, 7], [10, 5]], ids=str)
@torch.no_grad()
def test_a_text_that_repeats_itself_loses_nothing(family: Family, lengths: list[int]) -> None:
    """Every group holds one token again and again, and nothing tells places apart: all layers stay exact.

    The last group of a text is only partly filled, and log m is the number of its tokens and not of its places.
    """
    model = tiny_model(family)
    places = model.bert.embeddings.position_embeddings if family == "bert" else None
    places = places or model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    places.weight.zero_()
    ids = tokens(2, 3, seed=4).repeat_interleave(4, dim=1)[:, : max(lengths)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    dense = encode_hidden(model, input_ids=ids, attention_mask=mask.long())
    with random_plugin(model, 2, attention_k=4, **COPIES).attached(model):
        merged = encode_hidden(model, input_ids=ids, attention_mask=mask.long())
    torch.testing.assert_close(merged[mask], dense[mask], rtol=0, atol=2e-5)
    with random_plugin(model, 2, attention_k=3, **COPIES).attached(model):  # groups that are not the text's
        apart = encode_hidden(model, input_ids=ids, attention_mask=mask.long())
    assert (apart - dense)[mask].abs().max() > 1e-2


@torch.no_grad()
def test_a_bias_that_all_of_a_group_share_loses_nothing() -> None:
    """T5's attention by itself: a bias by head and query that differs between groups, and is one within a group."""
    torch.manual_seed(0)
    attention = EncoderView(tiny_model("t5")).attention_sites()[0].attention
    x, n, k = torch.randn(2, 3, 32).repeat_interleave(4, dim=1)[:, :11], 11, 4
    real = torch.arange(12) < torch.tensor([[11], [6]])
    bias = torch.randn(1, attention.n_heads, n, 3).repeat_interleave(k, dim=3)[..., :n]
    dense, _ = attention(x, bias.masked_fill(~real[:, None, None, :n], torch.finfo().min))
    pooled = merged_bias(bias, real.unflatten(1, (3, k)))
    assert pooled.shape == (2, attention.n_heads, n, 3)
    merged, _ = attention(x, pooled, keys=x[:, ::k])
    torch.testing.assert_close(merged, dense)


@torch.no_grad()
def test_a_merged_bias_is_the_mean_over_tokens_and_the_log_of_their_number() -> None:
    bias = torch.randn(1, 2, 5, 5)
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool).unflatten(1, (2, 3))
    pooled = merged_bias(bias, real)
    for head in range(2):
        for query in range(5):
            row = bias[0, head, query]
            expected = [
                [row[:3].mean() + torch.tensor(3.0).log(), row[3:5].mean() + torch.tensor(2.0).log()],
                [row[:2].mean() + torch.tensor(2.0).log(), torch.tensor(torch.finfo().min)],
            ]
            torch.testing.assert_close(pooled[:, head, query], torch.tensor(expected))
    torch.testing.assert_close(merged_bias(torch.zeros(1, 1, 1, 5), real), merged_bias(None, real))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keys_and_values_are_projected_from_merged_vectors_alone(family: Family) -> None:
    """A saving that is executed: so many rows go through each projection."""
    model, rows = tiny_model(family), dict[str, list[int]]()

    def watch(name: str) -> Any:
        return lambda module, args: rows.setdefault(name, []).append(args[0].shape[1])

    attention = EncoderView(model).attention_sites()[1].attention
    for name in ("q", "k", "v", "o"):
        getattr(attention, name).register_forward_pre_hook(watch(name))
    with random_plugin(model, 2, attention_k=4).attached(model):
        encode_hidden(model, input_ids=tokens(2, 13))
    assert rows == {"q": [13], "k": [4], "v": [4], "o": [13]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compression", ["attention", "conv"])
def test_what_merges_keys_and_values_can_learn(family: Family, compression: Any) -> None:
    """From where the fit leaves it, in every layer."""
    model = tiny_model(family).requires_grad_(False)
    plugin = random_plugin(model, 2, attention_k=4, compression=compression)
    assert plugin.attention is not None
    for pair in plugin.attention:
        pair.reset_to_mean()
    with plugin.attached(model):
        encode_hidden(model, input_ids=tokens(4, 12)).square().sum().backward()
    for pair in plugin.attention:
        assert all(p.grad is not None and p.grad.abs().max() > 1e-4 for p in pair.parameters())
    assert all(p.grad is None for p in model.parameters())
