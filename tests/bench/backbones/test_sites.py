"""Where the FFNs sit, found in whatever holds an encoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertForQuestionAnswering, BertModel, T5EncoderModel

from bench.backbones.model import EncoderTaskModel
from bench.backbones.sites import EncoderView, digest
from bench.errors import BackboneError
from tests.checkpoints import FAMILIES, Family, tiny_model
from tests.tiny import tiny_bert_config, tiny_t5_config


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_site_is_the_function_between_input_and_residual_addition(family: Family) -> None:
    """Recomputed from the tensors that go in and out of the layer's last step."""
    model = tiny_model(family)
    view = EncoderView(model)
    assert view.family == family and view.d_model == 32 and len(view.sites()) == 2
    for layer, site in zip(view.layers, view.sites(), strict=True):
        u = torch.randn(2, 5, 32)
        if family == "bert":
            expected = layer.feed_forward_chunk(u)
            actual = layer.output.LayerNorm(u + site.inner(u))
        else:
            expected = layer.layer[-1](u)
            actual = u + site.inner(layer.layer[-1].layer_norm(u))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_install_and_restore(family: Family) -> None:
    model = tiny_model(family)
    before, keys = digest(model), list(model.state_dict())
    site = EncoderView(model).sites()[0]
    ids = torch.arange(5, 15).reshape(2, 5)
    encoder = model.bert if family == "bert" else model.encoder

    class Zero(nn.Module):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(u)

    with torch.no_grad():
        dense = encoder(ids).last_hidden_state
        site.install(Zero())
        assert not torch.equal(encoder(ids).last_hidden_state, dense)
        site.restore()
        assert torch.equal(encoder(ids).last_hidden_state, dense)
    assert digest(model) == before and list(model.state_dict()) == keys


def test_it_is_found_in_any_model_of_the_family() -> None:
    bert, t5 = tiny_bert_config(), tiny_t5_config()
    for model in (BertModel(bert), BertForQuestionAnswering(bert), EncoderTaskModel(BertForQuestionAnswering(bert))):
        assert EncoderView(model).family == "bert"
    stack = T5EncoderModel(t5)
    assert EncoderView(stack).family == "t5"
    assert not any(layer.is_decoder for layer in EncoderView(tiny_model("t5")).layers)


def test_a_model_without_an_encoder_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"Linear holds no encoder of a supported family \(bert, t5\)"):
        EncoderView(nn.Linear(2, 2))


def test_digest_tells_values_names_and_buffers_apart() -> None:
    torch.manual_seed(0)
    first, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert digest(first) == digest(other)
    other.running_mean[0] += 1e-7
    assert digest(first) != digest(other)
    assert digest(nn.ParameterDict({"a": torch.ones(1)})) != digest(nn.ParameterDict({"b": torch.ones(1)}))
