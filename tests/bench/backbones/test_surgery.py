"""An encoder that was cut computes what the whole one does with the same parts silenced, in smaller matrices."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from bench.backbones.encoder import EncoderLayer
from bench.backbones.model import EncoderTaskModel, TaskModel, TextToTextModel
from bench.backbones.sites import digest
from bench.backbones.surgery import Structure, cut, ffn_in, ffn_out
from bench.backbones.write_out import write_out, written_encoder
from tests.checkpoints import FAMILIES, Family, tiny_model, tokens

SHAPES = [("bert", {}), ("t5", {}), ("t5", {"feed_forward_proj": "gated-gelu"})]
LEFT = Structure(layers=(0, 1), heads=((0, 2, 3), (1,)), neurons=(tuple(range(0, 64, 2)), (5, 9, 63)))
INPUTS = {"input_ids": tokens(3, 9), "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8])}


def task_model(family: str, **changes: object) -> TaskModel:
    model = tiny_model(cast(Family, family), **changes)
    return EncoderTaskModel(model) if family == "bert" else TextToTextModel(model, 90, [10, 11]).eval()


def silence(model: TaskModel, structure: Structure) -> None:
    """Let the parts that ``structure`` does not name add nothing to the stream."""
    for module, heads, neurons in zip(written_encoder(model).layers, structure.heads, structure.neurons, strict=True):
        layer = cast(EncoderLayer, module)
        for out, kept, width in ((layer.attention.o, heads, layer.attention.d_head), (ffn_out(layer.ffn), neurons, 1)):
            gone = [i for i in range(out.in_features) if i // width not in kept]
            out.weight.data[:, gone] = 0


NONE = Structure((0, 1), ((), (0, 1, 2, 3)), ((), (7,)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("structure", [LEFT, NONE], ids=["some", "none"])
@pytest.mark.parametrize(("family", "changes"), SHAPES)
@torch.no_grad()
def test_what_is_cut_is_what_is_silenced(family: str, changes: dict[str, object], structure: Structure) -> None:
    model = write_out(task_model(family, **changes))
    small = write_out(task_model(family, **changes))
    cut(written_encoder(small), structure)
    dense = model(**INPUTS).logits
    silence(model, structure)
    torch.testing.assert_close(small(**INPUTS).logits, model(**INPUTS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(small(**INPUTS).logits, dense, atol=1e-3)
    for module, heads, neurons in zip(written_encoder(small).layers, structure.heads, structure.neurons, strict=True):
        layer = cast(EncoderLayer, module)
        assert layer.attention.q.weight.shape == (8 * len(heads), 32)
        assert layer.attention.o.weight.shape == (32, 8 * len(heads))
        assert all(linear.weight.shape == (len(neurons), 32) for linear in ffn_in(layer.ffn))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_layer_that_is_left_out_is_left_out_of_transformers_too(family: Family) -> None:
    model = task_model(family, **({"num_hidden_layers": 3} if family == "bert" else {"num_layers": 3}))
    whole = Structure.whole(written_encoder(write_out(model)))
    small = write_out(model)
    cut(written_encoder(small), Structure((0, 2), whole.heads[::2], whole.neurons[::2]))
    if family == "bert":
        del model.model.bert.encoder.layer[1]
    else:
        del model.model.encoder.block[1]
    torch.testing.assert_close(small(**INPUTS).logits, model(**INPUTS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_is_untouched_and_survives_json(family: Family) -> None:
    model = task_model(family)
    before, written = digest(model), write_out(model)
    whole = Structure.whole(written_encoder(written))
    assert (whole.layers, [len(h) for h in whole.heads], [len(n) for n in whole.neurons]) == ((0, 1), [4, 4], [64, 64])
    cut(written_encoder(written), whole)
    assert {id(p) for p in written.parameters()} == {id(p) for p in model.parameters()}
    cut(written_encoder(written), LEFT)
    assert digest(model) == before
    assert Structure.from_json(LEFT.to_json()) == LEFT
