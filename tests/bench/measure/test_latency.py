"""Timings: order, number, and what surrounds a sample."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.measure.latency import WARM_UP, interleaved, median_ratio
from bench.results import Latency

INPUTS = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}


def sleeper(seconds: float) -> Callable[..., None]:
    return lambda input_ids: time.sleep(seconds)


def test_samples_are_the_time_of_the_call_and_of_nothing_else() -> None:
    latency = interleaved(sleeper(0.02), sleeper(0.01), INPUTS, "cpu", min_samples=5, max_samples=5)
    assert (latency.batch_size, latency.sequence_length) == (2, 7)
    assert min(latency.dense_seconds) >= 0.02
    assert min(latency.compressed_seconds) >= 0.01
    # The quickest sample is the one that the machine disturbed least.
    assert min(latency.dense_seconds) < 0.03
    assert 0.4 < median_ratio(latency) < 0.8


def test_pairs_alternate_in_who_goes_first() -> None:
    order: list[str] = []
    interleaved(
        lambda input_ids: order.append("d"), lambda input_ids: order.append("c"), INPUTS, "cpu", max_samples=4,
        min_samples=4,
    )  # fmt: skip
    assert "".join(order) == "dc" * WARM_UP + "dc" + "cd" + "dc" + "cd"


@pytest.mark.parametrize(
    ("min_samples", "max_samples", "max_seconds", "expected"), [(3, 50, 0.0, 3), (3, 6, 60.0, 6), (6, 6, 0.0, 6)]
)
def test_when_sampling_ends(min_samples: int, max_samples: int, max_seconds: float, expected: int) -> None:
    latency = interleaved(sleeper(0), sleeper(0), INPUTS, "cpu", min_samples, max_samples, max_seconds)
    assert len(latency.dense_seconds) == len(latency.compressed_seconds) == expected


def test_time_budget_ends_sampling_in_between() -> None:
    latency = interleaved(sleeper(0.005), sleeper(0.005), INPUTS, "cpu", 1, 1000, max_seconds=0.1)
    assert 1 <= len(latency.dense_seconds) <= 10


def test_inference_mode_without_garbage_collection_and_back() -> None:
    seen: set[tuple[bool, bool]] = set()

    def model(input_ids: Tensor) -> None:
        seen.add((torch.is_inference_mode_enabled(), gc.isenabled()))

    def broken(input_ids: Tensor) -> None:
        raise RuntimeError("out of order")

    interleaved(model, model, INPUTS, "cpu")
    assert seen == {(True, False)}
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="out of order"):
        interleaved(model, broken, INPUTS, "cpu")
    assert gc.isenabled()
    assert not torch.is_inference_mode_enabled()


def test_ratio_is_taken_pair_by_pair() -> None:
    """A machine that slows down by 100 between pairs does not move it."""
    latency = Latency(
        batch_size=1, sequence_length=1, dense_seconds=[1.0, 100.0, 2.0], compressed_seconds=[0.5, 60.0, 0.8]
    )
    assert median_ratio(latency) == 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose kernels run behind Python's back")
def test_cuda_samples_wait_for_the_kernels() -> None:
    layer = nn.Linear(8192, 8192, device="cuda")
    x = torch.randn(8192, 8192, device="cuda")
    latency = interleaved(
        lambda input_ids: [layer(x) for _ in range(10)],
        lambda input_ids: layer(x),
        {"input_ids": INPUTS["input_ids"].cuda()},
        "cuda",
    )
    assert median_ratio(latency) == pytest.approx(0.1, rel=0.3)
