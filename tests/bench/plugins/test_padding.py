"""Padding takes no part: an example alone, the same one in a padded batch, any length, any garbage behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.plugins.layers import CompressionPair
from tests.checkpoints import FAMILIES, Family, encode_hidden, random_plugin, tiny_model, tokens

LENGTHS = list(range(1, 18))


def padded(garbage_seed: int) -> tuple[Tensor, Tensor]:
    """One example of every length in 1..17, each followed by random ids."""
    ids = tokens(len(LENGTHS), max(LENGTHS))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    garbage = tokens(len(LENGTHS), max(LENGTHS), seed=garbage_seed)
    return torch.where(mask, ids, garbage), mask


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: Any) -> Any:
    return tiny_model(request.param)


@pytest.mark.parametrize("k", [2, 3, 4, 8])
@torch.no_grad()
def test_an_example_is_the_same_alone_and_in_a_padded_batch(model: Any, k: int) -> None:
    ids, mask = padded(garbage_seed=1)
    with random_plugin(model, k).attached(model):
        together = encode_hidden(model, input_ids=ids, attention_mask=mask.long())
        for row, n in enumerate(LENGTHS):
            alone = encode_hidden(model, input_ids=ids[row : row + 1, :n])
            torch.testing.assert_close(together[row, :n], alone[0], rtol=0, atol=1e-5)


VARIANTS = [
    {"compression": "mean"},
    {"compression": "conv"},
    {"compression": "mean", "decompression": "copy"},
    {"attention_k": 3},
    {"attention_k": 4, "compression": "mean", "decompression": "copy"},
    {"attention_k": 8, "compression": "conv"},
    {"attention_k": 30},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
@torch.no_grad()
def test_padding_takes_no_part_in_any_variant(model: Any, variant: dict[str, Any]) -> None:
    (ids, mask), (other, _) = padded(garbage_seed=1), padded(garbage_seed=2)
    longer, longer_mask = (torch.nn.functional.pad(t, (0, 9)) for t in (ids, mask))
    with random_plugin(model, 4, **variant).attached(model):
        together = encode_hidden(model, input_ids=ids, attention_mask=mask.long())
        garbled = encode_hidden(model, input_ids=other, attention_mask=mask.long())
        padded_more = encode_hidden(model, input_ids=longer, attention_mask=longer_mask.long())
        assert torch.equal(garbled[mask], together[mask])
        torch.testing.assert_close(padded_more[longer_mask], together[mask], rtol=0, atol=1e-5)
        for row, n in enumerate(LENGTHS):
            alone = encode_hidden(model, input_ids=ids[row : row + 1, :n])
            torch.testing.assert_close(together[row, :n], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [2, 4])
@torch.no_grad()
def test_what_stands_in_padded_positions_changes_nothing(model: Any, k: int) -> None:
    (ids, mask), (other, _) = padded(garbage_seed=1), padded(garbage_seed=2)
    assert not torch.equal(ids, other)
    with random_plugin(model, k).attached(model):
        first = encode_hidden(model, input_ids=ids, attention_mask=mask.long())
        second = encode_hidden(model, input_ids=other, attention_mask=mask.long())
    assert torch.equal(first[mask], second[mask])


@torch.no_grad()
def test_without_masking_padding_takes_part_as_in_the_released_code(model: Any) -> None:
    (ids, mask), (other, _) = padded(garbage_seed=1), padded(garbage_seed=2)
    with random_plugin(model, 17, mask_padding=False).attached(model):
        first = encode_hidden(model, input_ids=ids, attention_mask=mask.long())
        second = encode_hidden(model, input_ids=other, attention_mask=mask.long())
    assert (first - second)[mask].abs().max() > 1e-3


@pytest.mark.parametrize("variant", [{}, {"compression": "conv", "attention_k": 4}], ids=str)
def test_no_gradient_reaches_padded_positions(model: Any, variant: dict[str, Any]) -> None:
    ids, mask = padded(garbage_seed=1)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    plugin = random_plugin(model, 4, **variant)
    with plugin.attached(model):
        hidden = encode_hidden(model, inputs_embeds=embeddings, attention_mask=mask.long())
        (hidden * torch.randn_like(hidden))[mask].sum().backward()
    assert embeddings.grad is not None
    assert not embeddings.grad[~mask].any()
    assert embeddings.grad[mask].abs().sum(-1).min() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in plugin.parameters())
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_mask_may_be_given_by_position(model: Any) -> None:
    ids, mask = padded(garbage_seed=1)
    encoder = model.bert if hasattr(model, "bert") else model.encoder
    with random_plugin(model, 4).attached(model):
        by_name = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        by_position = encoder(ids, mask.long()).last_hidden_state
    assert torch.equal(by_name, by_position)


@torch.no_grad()
def test_a_mask_is_forgotten_after_its_batch(model: Any) -> None:
    ids, mask = padded(garbage_seed=1)
    with random_plugin(model, 4).attached(model):
        before = encode_hidden(model, input_ids=ids)
        encode_hidden(model, input_ids=ids, attention_mask=mask.long())
        assert torch.equal(encode_hidden(model, input_ids=ids), before)


@torch.no_grad()
def test_a_group_is_the_weighted_mean_of_its_tokens() -> None:
    """Softmax over the real members alone, with the vectors of padding replaced by zeros; nothing real gives zero."""
    torch.manual_seed(0)
    pair = CompressionPair(6, 3, bottleneck=4)
    u = torch.randn(1, 9, 6) * 3
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    whole, cut, empty = pair.compress(u, mask)[0]
    scores = pair.score(torch.cat([u[0, 0], u[0, 1], u[0, 2]]))
    torch.testing.assert_close(whole, scores.softmax(0) @ u[0, :3])
    scores = pair.score(torch.cat([u[0, 3], u[0, 4], torch.zeros(6)]))[:2]
    torch.testing.assert_close(cut, scores.softmax(0) @ u[0, 3:5])
    assert torch.equal(empty, torch.zeros(6))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ffn_runs_on_a_kth_of_the_rows(family: Family) -> None:
    model, rows = tiny_model(family), []
    name = "bert.encoder.layer.0.intermediate" if family == "bert" else "encoder.block.0.layer.1.DenseReluDense"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    for k in (2, 4, 8):
        with random_plugin(model, k).attached(model):
            encode_hidden(model, input_ids=tokens(2, 13))
    handle.remove()
    assert rows == [7, 4, 2]
