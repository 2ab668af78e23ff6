"""What a plugin of any shape costs when it runs is its closed form, and a padded batch costs by its shape alone."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from bench.backbones.model import EncoderTaskModel, TaskModel, TextToTextModel
from bench.backbones.sites import EncoderView
from bench.costing import parts_of
from bench.measure.closed_form import Compression, Decompression, PluginShape, encoder, layer_macs
from bench.measure.flops import count, count_dispatched
from bench.plugins.bank import PluginBank
from tests.checkpoints import FAMILIES, Family, random_plugin, tiny_model, tokens


def task_model(family: Family, **changes: Any) -> TaskModel:
    model = tiny_model(family, **changes)
    return EncoderTaskModel(model) if family == "bert" else TextToTextModel(model, 7, [8, 9])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention_k", [None, 2, 5])
@pytest.mark.parametrize("decompression", get_args(Decompression))
@pytest.mark.parametrize("compression", get_args(Compression))
def test_executed_flops_are_the_closed_form(
    family: Family, attention_k: int | None, compression: Any, decompression: Any
) -> None:
    model = task_model(family)
    shape: dict[str, Any] = {"compression": compression, "decompression": decompression, "attention_k": attention_k}
    spec, plugin = EncoderView(model).spec, random_plugin(model, 3, **shape)
    mask = (torch.arange(11) < torch.tensor([[11], [4]])).long()
    padded, alone = {"input_ids": tokens(2, 11), "attention_mask": mask}, {"input_ids": tokens(1, 10)}
    with plugin.attached(model):
        parts = parts_of(model)
        counted = [count_dispatched(model, inputs, parts) for inputs in (padded, alone)]
        assert count(model, padded, parts) == counted[0]
    for flops, batch, n in zip(counted, (2, 1), (11, 10), strict=True):
        expected = encoder(spec, n, batch, PluginShape(3, 8, **shape))
        assert (flops.encoder, flops.overhead) == (expected.encoder, expected.overhead)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_path_beside_merged_keys_costs_what_it_did(family: Family) -> None:
    model = task_model(family)
    inputs = {"input_ids": tokens(2, 9)}
    dense = count_dispatched(model, inputs, parts_of(model))
    bank = PluginBank([random_plugin(model, 2, attention_k=3), random_plugin(model, 4)])
    with bank.attached(model):
        assert count_dispatched(model, inputs, parts_of(model)) == dense
        bank.select(4)
        counted = count_dispatched(model, inputs, parts_of(model))
    expected = encoder(EncoderView(model).spec, 9, 2, PluginShape(4, 8))
    assert (counted.encoder, counted.overhead) == (expected.encoder, expected.overhead)


def test_merged_keys_save_what_arithmetic_says() -> None:
    """By hand, for BERT of width 32 with an FFN of 64 and two layers, on 12 tokens: MACs of one layer."""
    spec = EncoderView(tiny_model("bert")).spec
    assert (spec.d_model, spec.n_heads * spec.d_head, spec.d_ff, spec.encoder_layers) == (32, 32, 64, 2)
    queries, keys, scores, ffn = 2 * 12 * 32 * 32, 2 * 3 * 32 * 32, 2 * 12 * 3 * 32, 2 * 4 * 32 * 64
    assert layer_macs(spec, 12, 3, 4) == queries + keys + scores + ffn
    merging = {"mean": 0, "conv": 2 * 12 * 32, "attention": 12 * 3 * 32 + 12 * 32 + 12 * 4 * 32 + 12 * 32}
    for compression, own in merging.items():
        shape: dict[str, Any] = {"compression": compression, "decompression": "copy", "attention_k": 4}
        flops = encoder(spec, 12, plugin=PluginShape(3, **shape))
        assert flops.overhead == 2 * 2 * own
        assert flops.encoder == 2 * 2 * (queries + keys + scores + ffn + own)


def test_keys_of_one_vector_are_no_shape() -> None:
    with pytest.raises(ValueError, match="attention_k must be at least 2, got 1"):
        PluginShape(4, attention_k=1)
