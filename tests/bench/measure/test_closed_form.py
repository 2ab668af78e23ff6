"""Closed forms against published numbers; test_flops.py holds them against what is executed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from bench.backbones.catalogue import spec_of
from bench.backbones.spec import BackboneSpec
from bench.measure import closed_form as cf
from bench.measure.size import count_parameters
from bench.results import Flops

# The share of the T5-base encoder's cost that remains, by the released code's arithmetic (adapter on every position).
T5_BASE_REMAINING = {
    64: (0.692, 0.528, 0.446, 0.406),
    128: (0.696, 0.534, 0.454, 0.414),
    256: (0.704, 0.547, 0.468, 0.429),
    384: (0.712, 0.558, 0.482, 0.444),
    512: (0.719, 0.569, 0.495, 0.458),
}


@pytest.mark.parametrize("n", T5_BASE_REMAINING)
def test_remaining_is_the_published_arithmetic(n: int) -> None:
    spec = spec_of("t5-base")
    shares = [cf.remaining(spec, k, {n: 1}, form="concat") for k in (2, 4, 8, 16)]
    assert shares == pytest.approx(T5_BASE_REMAINING[n], abs=5.1e-4)


def test_the_known_percentages_of_the_claim() -> None:
    spec = spec_of("t5-base")
    shares = [round(100 * cf.remaining(spec, k, {128: 1}, form="concat"), 1) for k in (2, 4, 8)]
    assert shares == [69.6, 53.4, 45.4]
    assert round(100 * cf.remaining(spec_of("t5-large"), 4, {128: 1}, form="concat"), 1) == 52.6


def test_split_form_saves_the_y_half_of_the_adapter_on_merged_rows() -> None:
    spec, n, k = spec_of("t5-base"), 128, 4
    concat, split = (cf.encoder(spec, n, plugin=cf.PluginShape(k, form=form)) for form in ("concat", "split"))
    saved = 2 * 12 * (n - n // k) * 768 * 64
    assert (concat.encoder - split.encoder, concat.overhead - split.overhead) == (saved, saved)


def test_whole_model_saving_with_a_short_decoder() -> None:
    spec, n = spec_of("t5-base"), 256
    dense, short = cf.encoder(spec, n), cf.encoder(spec, n, plugin=cf.PluginShape(4, form="concat"))
    whole = dense.encoder + cf.decoder(spec, 2, n).decoder
    assert whole / 2e9 == pytest.approx(26.8, abs=0.05)
    assert (dense.encoder - short.encoder) / 2e9 == pytest.approx(10.4, abs=0.05)


def test_plugin_parameters_are_the_published_ones() -> None:
    assert [cf.plugin_parameters(768, 12, cf.PluginShape(k)) for k in (2, 4, 8)] == [1_816_344, 1_926_960, 2_369_376]
    whole = cf.backbone_parameters(spec_of("t5-base"))
    shares = [round(100 * cf.plugin_parameters(768, 12, cf.PluginShape(k)) / whole, 3) for k in (2, 4, 8)]
    assert shares == [0.815, 0.864, 1.063]


@given(n=st.integers(1, 300), k=st.integers(2, 9), batch=st.integers(1, 4))
def test_padding_costs_as_much_as_tokens(n: int, k: int, batch: int) -> None:
    spec, plugin = spec_of("minilm-l6"), cf.PluginShape(k)
    up = -(-n // k) * k
    extra = cf.encoder(spec, up).encoder - cf.encoder(spec, n).encoder
    ffn = 2 * 6 * 2 * 384 * 1536 * (up - n)  # the FFN runs on the same rows either way
    flops, padded = cf.encoder(spec, n, batch, plugin), cf.encoder(spec, up, batch, plugin)
    assert flops.overhead == padded.overhead
    assert padded.encoder - flops.encoder == batch * (extra - ffn)


def test_remaining_weighs_lengths_by_their_number_and_cost() -> None:
    spec = spec_of("minilm-l6")
    dense = {n: cf.encoder(spec, n).encoder for n in (5, 100)}
    short = {n: cf.encoder(spec, n, plugin=cf.PluginShape(4)).encoder for n in (5, 100)}
    expected = (3 * short[5] + 2 * short[100]) / (3 * dense[5] + 2 * dense[100])
    assert cf.remaining(spec, 4, {5: 3, 100: 2}) == pytest.approx(expected, rel=1e-12)


def test_accumulate_sums_part_by_part() -> None:
    a, b = Flops(encoder=1, decoder=2, head=3, overhead=4), Flops(encoder=10, head=5)
    assert cf.accumulate([(a, 2), (b, 3)]) == Flops(encoder=32, decoder=4, head=21, overhead=8)


def test_k_below_two_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        cf.PluginShape(1)


def test_weight_bytes() -> None:
    assert [cf.weight_bytes(1_926_960, dtype) for dtype in ("float32", "bfloat16")] == [7_707_840, 3_853_920]


@pytest.mark.parametrize("gated", [False, True])
def test_t5_parameters_are_those_of_transformers(gated: bool) -> None:
    config = T5Config(
        vocab_size=101, d_model=24, d_kv=5, d_ff=40, num_layers=3, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=10, feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    spec = BackboneSpec.from_config("tiny", config.to_dict())
    assert cf.backbone_parameters(spec) == count_parameters(model.parameters())


def test_bert_parameters_are_those_of_transformers() -> None:
    shape = {
        "vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
        "max_position_embeddings": 33, "type_vocab_size": 3,
    }  # fmt: skip
    spec = BackboneSpec.from_config("tiny", {"model_type": "bert", **shape})
    with torch.device("meta"):
        classifier = BertForSequenceClassification(BertConfig(**shape, num_labels=5))
        span = BertForQuestionAnswering(BertConfig(**shape))
    assert cf.backbone_parameters(spec, labels=5) == count_parameters(classifier.parameters())
    assert cf.backbone_parameters(spec) == count_parameters(span.parameters())


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from bench.measure.closed_form import remaining\n"
        "from bench.backbones.catalogue import known_backbones, spec_of\n"
        "for name in known_backbones(): remaining(spec_of(name), 4, {128: 1})\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas', 'huggingface_hub'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
