"""Peak memory on modules whose peak can be told by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bench.measure.memory import peak_bytes
from bench.plugins.plugin import Plugin


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def chain(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


@pytest.mark.parametrize(
    ("widths", "peak"),
    [((8, 16), 16), ((8, 16, 32, 4), 16 + 32), ((8, 4, 2), 4 + 2), ((8, 64, 8, 8, 8), 64 + 8)],
)
def test_chain_holds_the_widest_pair(widths: tuple[int, ...], peak: int) -> None:
    """A layer's input and output are alive together; weights and the model's own input do not count."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = chain(*widths)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    assert peak_bytes(Model(), {"x": torch.randn(5, 8)}) == 5 * 4 * peak


def keep_all(x: Tensor) -> list[Tensor]:
    return [x + i for i in range(6)]


def drop_all(x: Tensor) -> None:
    for i in range(6):
        x + i


def views(x: Tensor) -> Tensor:
    y = x + 1
    return y.view(-1)[None].expand(7, -1)[:, 2:].t()


def in_place(x: Tensor) -> Tensor:
    y = x + 1
    for _ in range(5):
        y.mul_(2).relu_()
    return y


def cycle(x: Tensor) -> None:
    for i in range(6):
        knot: list[object] = [x + i]
        knot.append(knot)


@pytest.mark.parametrize(
    ("function", "tensors"),
    [(keep_all, 6), (drop_all, 1), (views, 1), (in_place, 1), (cycle, 6), (lambda x: x.view(-1), 0)],
)
def test_only_what_is_alive_counts_and_a_storage_once(function: Callable[[Tensor], object], tensors: int) -> None:
    assert peak_bytes(Call(function), {"x": torch.randn(10)}) == 40 * tensors
    gc.collect()


def test_dtype_is_what_it_takes() -> None:
    assert peak_bytes(Call(lambda x: x + 1), {"x": torch.ones(10, dtype=torch.bfloat16)}) == 20


def test_eager_attention_shows_its_scores() -> None:
    """At great length nothing but the scores matters: they are alive before and after the softmax."""
    config = BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4,
        max_position_embeddings=512,
    )  # fmt: skip
    scores = 2 * 512 * 512 * 4
    peaks = {}
    for attention in ("eager", "sdpa"):
        model = BertModel._from_config(config, attn_implementation=attention).eval()
        peaks[attention] = peak_bytes(model, {"input_ids": torch.ones(1, 512, dtype=torch.long)})
    assert 2 * scores <= peaks["eager"] < 2.5 * scores
    assert peaks["sdpa"] < 0.1 * scores


def test_the_same_every_time_and_less_with_a_plugin() -> None:
    config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
    model = BertModel(config).eval()
    inputs = {"input_ids": torch.ones(2, 64, dtype=torch.long)}
    dense = {peak_bytes(model, inputs) for _ in range(3)}
    with Plugin.for_model(model, 4, bottleneck=8).attached(model):
        short = {peak_bytes(model, inputs) for _ in range(3)}
    assert len(dense) == len(short) == 1
    # The dense peak is the FFN's inner layer before and after its activation, and what it came from.
    inner = 2 * 64 * 256 * 4
    assert 2 * inner < min(dense) < 2.3 * inner
    assert min(short) < 0.5 * min(dense)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose allocator keeps the books")
def test_cuda_allocator_agrees_with_the_books() -> None:
    model = chain(1024, 4096, 1024).cuda()
    x = torch.randn(1024, 1024, device="cuda")
    assert peak_bytes(model, {"input": x}) == pytest.approx(4 * 1024 * (4096 + 1024), rel=0.05)
