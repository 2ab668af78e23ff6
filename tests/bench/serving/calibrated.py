"""Engines that were never measured: a calibration with the times that a test wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bench.serving.records import Calibration, ServedModel


def calibration(
    seconds: Callable[[int, int, int], Sequence[float]],
    ks: Sequence[int] = (1, 2, 4),
    sizes: Sequence[int] = (1, 2, 4),
    lengths: Sequence[int] = (8,),
    examples: Sequence[int] = (8,) * 10,
    scores: Sequence[Sequence[float]] | None = None,
    engine: str = "variator",
) -> Calibration:
    """Build a calibration, of which ``seconds(k, size, length)`` are the samples."""
    scores = [[1.0] * len(examples)] * len(ks) if scores is None else scores
    return Calibration(
        engine=engine,
        models=[
            ServedModel(k=k, source=f"{engine}-{k}", config={}, remaining=0.3 + 0.7 / k, accuracy=float(np.mean(row)))
            for k, row in zip(ks, scores, strict=True)
        ],
        resident_bytes=90_000_000,
        sizes=list(sizes),
        lengths=list(lengths),
        seconds=[[[list(seconds(k, size, length)) for length in lengths] for size in sizes] for k in ks],
        examples=list(examples),
        scores=[list(row) for row in scores],
    )
