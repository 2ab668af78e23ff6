"""fvcore, torch's dispatcher and the closed form agree to the last FLOP, on the modules that are run."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from bench.backbones.catalogue import resolve_config
from bench.backbones.model import EncoderTaskModel, TaskModel, TextToTextModel
from bench.backbones.sites import EncoderView
from bench.backbones.spec import BackboneSpec
from bench.errors import BenchError
from bench.measure import closed_form as cf
from bench.measure.flops import Parts, count, count_dispatched, count_lengths, counting
from bench.plugins.bank import CompressedFFN
from bench.plugins.plugin import Plugin
from bench.results import Flops

BOTTLENECK = 5
T5_SHAPE = {
    "vocab_size": 61, "d_model": 16, "d_kv": 3, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
BERT_SHAPE = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
}  # fmt: skip
KINDS = ("t5-relu", "t5-gated", "bert-classifier", "bert-span")


def tiny(kind: str, attention: str = "sdpa") -> TaskModel:
    torch.manual_seed(0)
    if kind.startswith("t5"):
        projection = "gated-gelu" if kind == "t5-gated" else "relu"
        config = T5Config(**T5_SHAPE, feed_forward_proj=projection)
        t5 = T5ForConditionalGeneration._from_config(config, attn_implementation=attention)
        return TextToTextModel(t5, sentinel=60, label_ids=[3, 4, 5]).eval()
    if kind == "bert-span":
        config, head = BertConfig(**BERT_SHAPE), BertForQuestionAnswering
    else:
        config, head = BertConfig(**BERT_SHAPE, num_labels=3), BertForSequenceClassification
    return EncoderTaskModel(head._from_config(config, attn_implementation=attention)).eval()


def batch_of(lengths: list[int]) -> dict[str, Tensor]:
    n = max(lengths)
    mask = torch.tensor([[1] * m + [0] * (n - m) for m in lengths])
    return {"input_ids": torch.randint(3, 60, mask.shape) * mask, "attention_mask": mask}


def parts_of(model: nn.Module) -> Parts:
    return Parts(
        encoder=tuple(EncoderView(model).modules),
        decoder=tuple(m for m in model.modules() if type(m).__name__ == "T5Stack" and m.is_decoder),
        overhead=tuple((m, (m.inner,)) for m in model.modules() if isinstance(m, CompressedFFN)),
    )


def closed(model: TaskModel, kind: str, n: int, batch: int, k: int) -> Flops:
    spec = BackboneSpec.from_config("tiny", model.config.to_dict())
    parts = [cf.encoder(spec, n, batch, cf.PluginShape(k, BOTTLENECK) if k > 1 else None)]
    if spec.family == "t5":
        parts += [cf.decoder(spec, 2, n, batch), cf.lm_head(spec, 2, batch)]
    else:
        parts += [cf.span_head(spec, n, batch) if kind == "bert-span" else cf.pooled_head(spec, 3, batch)]
    return cf.accumulate((part, 1) for part in parts)


def plugged(model: nn.Module, k: int) -> Any:
    return Plugin.for_model(model, k, bottleneck=BOTTLENECK).attached(model) if k > 1 else nullcontext()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[7, 7], [7, 3], [8, 8]], ids=["odd", "padded", "even"])
def test_three_counts_agree(kind: str, attention: str, lengths: list[int]) -> None:
    model, inputs = tiny(kind, attention), batch_of(lengths)
    for k in (1, 2, 3, 9):
        with plugged(model, k):
            parts = parts_of(model)
            expected = closed(model, kind, max(lengths), len(lengths), k)
            assert count(model, inputs, parts) == expected
            assert count_dispatched(model, inputs, parts) == expected
            assert (expected.overhead > 0) == (k > 1)


def test_free_decoding_counts_its_own_target_length() -> None:
    model, spec = tiny("t5-relu"), BackboneSpec.from_config("tiny", {"model_type": "t5", **T5_SHAPE})
    inputs = {**batch_of([9]), "decoder_input_ids": torch.zeros(1, 5, dtype=torch.long)}
    counted = count(model, inputs, parts_of(model))
    assert counted == count_dispatched(model, inputs, parts_of(model))
    assert counted.decoder == cf.decoder(spec, 5, 9).decoder
    assert counted.head == cf.lm_head(spec, 5).head


@pytest.mark.parametrize(("k", "percent"), [(2, 69.6), (4, 53.4), (8, 45.4)])
def test_t5_base_runs_at_the_known_share(k: int, percent: float) -> None:
    """The real shape, on the meta device: every op is executed, and none computed."""
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**resolve_config("t5-base")[1])).eval()
        source, target = (torch.zeros(1, n, dtype=torch.long) for n in (128, 2))
        inputs = {"input_ids": source, "decoder_input_ids": target}
        plugin = Plugin.for_model(model, k)
    dense = count_dispatched(model, inputs, parts_of(model)).encoder
    with plugin.attached(model):
        short = count_dispatched(model, inputs, parts_of(model)).encoder
    # The known figures run all of the adapter on every position; the plugin runs its y half on the merged ones.
    saved_by_split = 2 * 12 * (128 - 128 // k) * 768 * 64
    assert round(100 * (short + saved_by_split) / dense, 1) == percent


def test_passes_add_up_example_by_example() -> None:
    model = tiny("bert-classifier")
    with torch.inference_mode(), counting(parts_of(model)) as tally:
        for n in (3, 9, 4):
            model(**batch_of([n]))
    one_by_one = [(closed(model, "bert-classifier", n, 1, 1), 1) for n in (3, 9, 4)]
    assert tally.flops == cf.accumulate(one_by_one)


def test_counting_leaves_no_hook_behind() -> None:
    model = tiny("bert-classifier")
    count(model, batch_of([4]), parts_of(model))
    count_dispatched(model, batch_of([4]), parts_of(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_lengths_are_weighed_and_counted_once() -> None:
    model, asked = tiny("bert-classifier"), []

    def make(n: int) -> dict[str, Tensor]:
        asked.append(n)
        return batch_of([n])

    with plugged(model, 4):
        total = count_lengths(model, parts_of(model), make, Counter([5, 8, 5, 12, 5]))
    expected = [(closed(model, "bert-classifier", n, 1, 4), times) for n, times in ((5, 3), (8, 1), (12, 1))]
    assert total == cf.accumulate(expected)
    assert sorted(asked) == [5, 8, 12, 12]  # the longest once more, for fvcore


class Gate(nn.Module):
    """An encoder that keeps the tokens above zero: its cost depends on what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x[x[:, 0] > 0])).sum(0)


@pytest.mark.parametrize("kept", [0, 2, 5])
def test_input_dependent_cost_is_that_of_the_input(kept: int) -> None:
    model, x = Gate(), torch.ones(6, 4)
    x[kept:] = -1
    expected = Flops(encoder=2 * kept * 4 * 8, head=2 * kept * 8 * 2)
    assert count(model, {"x": x}, Parts((model.encoder,))) == expected
    assert count_dispatched(model, {"x": x}, Parts((model.encoder,))) == expected


class Wasteful(nn.Module):
    """Computes what it never uses, as a method that only masks does."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 1000)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.used(x)


@pytest.mark.parametrize("counter", [count, count_dispatched])
def test_unused_work_is_counted(counter: Any) -> None:
    model = Wasteful()
    flops = counter(model, {"x": torch.ones(3, 4)}, Parts(encoder=(model.used,)))
    assert flops == Flops(encoder=2 * 3 * 16, head=2 * 3 * 4000)


class Borrower(nn.Module):
    """An encoder that calls a layer which belongs to the model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.borrowed = (layer,)

    def forward(self, x: Tensor) -> Tensor:
        return self.borrowed[0](x)


class Lender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.encoder = Borrower(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.encoder(x))


@pytest.mark.parametrize("counter", [count, count_dispatched])
def test_work_belongs_to_the_part_that_calls_for_it(counter: Any) -> None:
    model = Lender()
    assert counter(model, {"x": torch.ones(3, 4)}, Parts((model.encoder,))) == Flops(encoder=2 * 48, head=2 * 48)


class Moody(Gate):
    """Costs more on every call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.encoder(x.repeat(self.calls, 1)))


def test_counters_that_disagree_are_an_error() -> None:
    model = Moody()
    with pytest.raises(BenchError, match="Moody at length 3 are in doubt"):
        count_lengths(model, Parts((model.encoder,)), lambda n: {"x": torch.ones(n, 4)}, {3: 1})


class Secretive(Gate):
    """Hides a layer from ``parameters()``, which a trace takes amiss."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.hidden[0](x)))


def test_a_model_that_cannot_be_traced_is_named() -> None:
    model = Secretive()
    with pytest.raises(BenchError, match="Secretive cannot be traced, so fvcore cannot count its FLOPs"):
        count(model, {"x": torch.ones(3, 4)}, Parts((model.encoder,)))


@pytest.mark.parametrize("counter", [count, count_dispatched])
def test_parts_must_be_there_and_be_called(counter: Any) -> None:
    model, x = Wasteful(), {"x": torch.ones(3, 4)}
    with pytest.raises(BenchError, match=r"Linear is named as a part of the model, but"):
        counter(model, x, Parts(encoder=(nn.Linear(2, 2),)))
    model.idle = nn.Bilinear(2, 2, 2)
    with pytest.raises(BenchError, match="Bilinear is named as a part of the model, but was never called"):
        counter(model, x, Parts(encoder=(model.used,), decoder=(model.idle,)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA has attention kernels of its own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_on_cuda_count_the_same(kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind).to("cuda", dtype)
    inputs = {name: tensor.cuda() for name, tensor in batch_of([7, 3]).items()}
    expected = closed(model, kind, 7, 2, 1)
    assert count(model, inputs, parts_of(model)) == expected
    assert count_dispatched(model, inputs, parts_of(model)) == expected
