"""The written-out encoder against the transformers one, and what its tokens keep when the sequence changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForQuestionAnswering

from bench.backbones.encoder import Overhead, Seen, Tokens, TokenStep
from bench.backbones.load import wrap
from bench.backbones.model import EncoderTaskModel, TaskModel, TextToTextModel, share_weights
from bench.backbones.sites import EncoderView, digest
from bench.backbones.write_out import write_out, written_encoder
from bench.errors import BackboneError
from tests.checkpoints import FAMILIES, Family, encode_hidden, tiny_model, tokens
from tests.tiny import tiny_bert_config


def task_model(family: Family, **changes: Any) -> TaskModel:
    model = tiny_model(family, **changes)
    return EncoderTaskModel(model) if family == "bert" else TextToTextModel(model, 90, [10, 11]).eval()


def batch(n: int = 11) -> dict[str, Tensor]:
    mask = torch.ones(3, n, dtype=torch.long)
    mask[1, 7:], mask[2, 1:] = 0, 0
    return {"input_ids": tokens(3, n), "attention_mask": mask}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unchanged_it_computes_what_transformers_does(family: Family, padded: bool) -> None:
    model = task_model(family)
    before = digest(model)
    inputs = batch() if padded else {"input_ids": tokens(2, 9)}
    dense, written = model(**inputs, hidden=True), write_out(model)(**inputs, hidden=True)
    torch.testing.assert_close(written.logits, dense.logits, atol=1e-5, rtol=1e-5)
    real = batch()["attention_mask"].bool() if padded else torch.ones(2, 9, dtype=torch.bool)
    assert len(written.encoder_hidden) == len(dense.encoder_hidden) == 2
    for mine, theirs in zip(written.encoder_hidden, dense.encoder_hidden, strict=True):
        torch.testing.assert_close(mine[real], theirs[real], atol=1e-5, rtol=1e-5)
    if family == "t5":
        torch.testing.assert_close(written.decoder_hidden, dense.decoder_hidden, atol=1e-5, rtol=1e-5)
    assert digest(model) == before


@torch.no_grad()
def test_t5_bias_reaches_across_the_logarithmic_buckets() -> None:
    model = task_model("t5")
    inputs = {"input_ids": tokens(1, 300)}
    torch.testing.assert_close(write_out(model)(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generation_and_spans_run_through_it() -> None:
    t5 = task_model("t5")
    inputs = batch()
    assert torch.equal(write_out(t5).generate(**inputs, max_new_tokens=5), t5.generate(**inputs, max_new_tokens=5))
    torch.manual_seed(0)
    spans = EncoderTaskModel(BertForQuestionAnswering(tiny_bert_config())).eval()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(write_out(spans)(**inputs).logits[real], spans(**inputs).logits[real])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_shares_every_weight_and_is_found(family: Family) -> None:
    model = task_model(family)
    written = write_out(model)
    assert {id(p) for p in written.parameters()} == {id(p) for p in model.parameters()}
    view = EncoderView(written)
    assert view.family == family and view.d_model == 32 and len(view.sites()) == 2
    u = torch.randn(2, 5, 32)
    for mine, theirs in zip(view.sites(), EncoderView(model).sites(), strict=True):
        torch.testing.assert_close(mine.inner(u), theirs.inner(u))
    with pytest.raises(BackboneError, match="not written out"):
        written_encoder(model)
    with pytest.raises(BackboneError, match="can be written out"):
        write_out(nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_as_through_transformers(family: Family) -> None:
    grads = []
    for model in (task_model(family), write_out(task_model(family))):
        model(**batch()).logits.square().sum().backward()
        by_shape = sorted(
            (tuple(p.shape), p.grad.double().norm().item()) for p in model.parameters() if p.grad is not None
        )
        grads.append(by_shape)
    assert [s for s, _ in grads[0]] == [s for s, _ in grads[1]]
    torch.testing.assert_close([g for _, g in grads[0]], [g for _, g in grads[1]], rtol=1e-4, atol=1e-5)


class _Drop(TokenStep):
    def __init__(self, drop: list[list[int]]) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, state: Tokens, seen: Seen) -> Tokens:
        kept = state.mask.clone()
        for row, places in enumerate(self.drop):
            kept[row, places] = False
        return state.keep(kept)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_removed_vector_takes_no_part_any_more_and_comes_back_at_the_end(family: Family) -> None:
    """Removed behind the last layer's attention: all others end as if it were there, it keeps its own state."""
    model = write_out(task_model(family))
    inputs = batch()
    plain = model(**inputs, hidden=True).encoder_hidden[-1]
    encoder = written_encoder(model)
    encoder.layers[1].step = _Drop([[3, 5], [0], []])
    short = model(**inputs, hidden=True).encoder_hidden[-1]
    real = inputs["attention_mask"].bool()
    touched = torch.zeros_like(real)
    touched[0, [3, 5]] = touched[1, 0] = True
    torch.testing.assert_close(short[real & ~touched], plain[real & ~touched])
    assert (short[touched] - plain[touched]).abs().amax(-1).gt(1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removing_twice_equals_removing_together(family: Family) -> None:
    torch.manual_seed(1)
    state = Tokens(torch.randn(2, 6, 4), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool())
    kept = state.mask.clone()
    kept[0, 1] = kept[1, 2] = False
    once = state.keep(kept)
    assert once.x.shape == (2, 5, 4) and once.positions is not None
    assert once.positions[0].tolist() == [0, 2, 3, 4, 5] and once.positions[1, :3].tolist() == [0, 1, 3]
    again = once.mask.clone()
    again[0, 2] = False  # input position 3
    twice = once.replace(x=once.x + 1).keep(again)
    full = twice.full_length()
    expected = state.x + 1
    expected[0, 1], expected[1, 2] = state.x[0, 1], state.x[1, 2]
    torch.testing.assert_close(full[state.mask], expected[state.mask])
    assert twice.index is not None and twice.index[0].tolist() == [0, -1, 1, -1, 2, 3]


class _Hold(TokenStep):
    """Sets a gate, which holds vectors where they are."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, state: Tokens, seen: Seen) -> Tokens:
        return state.replace(gate=self.gate)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_gate_says_how_much_of_each_change_a_vector_takes_on(family: Family) -> None:
    """Set behind the first attention: at 0 the vector ends as it was there, at 1 nothing is new, else it is between.

    Other vectors still read a held one, so that only the FFN of the same layer is compared where the gate is partial.
    """
    model, inputs = write_out(task_model(family)), {"input_ids": tokens(2, 6)}
    encoder = written_encoder(model)
    seen: dict[str, Tensor] = {}
    encoder.layers[1].register_forward_pre_hook(lambda _, args: seen.update(first=args[0].x))
    encoder.layers[1].register_forward_hook(lambda _, __, out: seen.update(last=out.x))

    def states(gate: Tensor) -> dict[str, Tensor]:
        encoder.layers[0].step = _Hold(gate)
        encode_hidden(model.model, **inputs)
        return dict(seen)

    open_, shut = states(torch.ones(2, 6)), states(torch.zeros(2, 6))
    torch.testing.assert_close(shut["last"], shut["first"])
    encoder.layers[0].step = None
    encode_hidden(model.model, **inputs)
    torch.testing.assert_close(open_["last"], seen["last"])
    share = torch.tensor([0, 0.25, 0.5, 1, 0.1, 0.9]).repeat(2, 1)
    part, scale = states(share), share.unsqueeze(-1)
    torch.testing.assert_close(part["first"], (1 - scale) * shut["first"] + scale * open_["first"])
    torch.testing.assert_close(part["last"][:, 0], shut["first"][:, 0])
    assert not torch.allclose(part["last"][:, 1:], part["first"][:, 1:], atol=1e-3)


def test_the_length_that_went_in_outlives_a_removal() -> None:
    state = Tokens(torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool())
    assert state.real_length().tolist() == [4, 2]
    once = state.keep(torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool())
    twice = once.keep(torch.tensor([[1, 0], [1, 0]]).bool())
    assert once.real_length().tolist() == twice.real_length().tolist() == [4, 2] and twice.mask.sum(1).tolist() == [
        1,
        1,
    ]


def test_the_backbone_owns_nothing_of_a_plain_overhead() -> None:
    assert Overhead().backbone_modules() == ()
    assert wrap(tiny_model("bert"), None, None).written is None  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_seen_by_a_copy_and_follow_the_vectors_that_are_kept(family: Family) -> None:
    model = write_out(tiny_model(family))
    written_encoder(model).protect([7, 9])
    model = share_weights(model)  # the copy's encoder must see the copy's ids
    ids = torch.tensor([[7, 8, 9, 11, 7, 0], [8, 9, 9, 11, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    seen: list[Tokens] = []
    written_encoder(model).layers[0].register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        encode_hidden(model, input_ids=ids, attention_mask=mask)
        with pytest.raises(BackboneError, match="called with input_ids"):
            encode_hidden(model, inputs_embeds=torch.randn(2, 6, 32), attention_mask=mask)
    (tokens,) = seen
    assert tokens.special is not None and torch.equal(tokens.special, (ids == 7) | (ids == 9))
    kept = torch.tensor([[True, False, True, True, False, False], [False, True, False, False, False, True]])
    special = tokens.keep(kept).special
    assert special is not None and special.tolist() == [[True, True, False], [True, False, False]]
