"""Wall time of the teacher and the compressed model in turn, so that their ratio stands on a noisy machine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from bench.results import Latency

WARM_UP = 3


def interleaved(
    dense: Callable[..., object],
    compressed: Callable[..., object],
    inputs: Mapping[str, Tensor],
    device: torch.device | str,
    min_samples: int = 8,
    max_samples: int = 50,
    max_seconds: float = 10.0,
) -> Latency:
    """Time both models on the same inputs, back to back, each going first in every other pair.

    Sampling ends at ``max_samples`` pairs, or once ``max_seconds`` have passed and ``min_samples`` pairs are in.

    Parameters
    ----------
    dense, compressed
        Called as ``model(**inputs)``, in inference mode and without garbage collection.
    inputs
        Tensors on ``device``; ``input_ids``, (batch, n), gives the shape that is recorded.
    device
        On CUDA every sample starts and ends with a synchronisation.
    min_samples, max_samples
        Bounds on the number of pairs.
    max_seconds
        Time for all samples together, warm-up not included.

    Returns
    -------
    Latency
        Raw seconds, one a sample.
    """
    batch, n = inputs["input_ids"].shape
    models = (dense, compressed)
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode(), no_garbage_collection():
        for _ in range(WARM_UP):
            for model in models:
                _sample(model, inputs, device)
        end = perf_counter() + max_seconds
        for pair in range(max_samples):
            if pair >= min_samples and perf_counter() >= end:
                break
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                seconds[which].append(_sample(models[which], inputs, device))
    return Latency(batch_size=batch, sequence_length=n, dense_seconds=seconds[0], compressed_seconds=seconds[1])


def median_ratio(latency: Latency) -> float:
    """Median over the pairs of compressed / dense seconds; below 1 the compressed model is faster."""
    return median(c / d for c, d in zip(latency.compressed_seconds, latency.dense_seconds, strict=True))


def _sample(model: Callable[..., object], inputs: Mapping[str, Tensor], device: torch.device | str) -> float:
    _synchronise(device)
    start = perf_counter()
    model(**inputs)
    _synchronise(device)
    return perf_counter() - start


def _synchronise(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and none inside the ``with`` block."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
