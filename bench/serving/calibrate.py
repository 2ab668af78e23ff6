"""Measure how long an engine takes at every k, batch size and length, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from bench.measure.latency import no_garbage_collection
from bench.serving.engine import Engine
from bench.serving.records import Calibration
from bench.tasks.evaluation import EVALUATION_BATCH_SIZE
from bench.tasks.features import Feature

SAMPLES = 7
WARM_UP = 2
POINTS = 4
"""Lengths that are measured, from short to long."""


def calibrate(engines: Sequence[Engine], max_batch: int) -> list[Calibration]:
    """Time every k of every engine in turn on batches of real tokens, and answer the whole dev split at each.

    Parameters
    ----------
    engines
        What is measured, all of one task.
    max_batch
        Largest batch; sizes are the powers of two up to it, and it.
    """
    features = engines[0].ctx.features["dev"]
    lengths = np.array([len(feature["input_ids"]) for feature in features])
    sizes = sorted({*(2**i for i in range(max_batch.bit_length())), max_batch})
    grid = sorted({int(n) for n in np.quantile(lengths, np.linspace(0.02, 1, POINTS), method="higher")})
    rng = np.random.default_rng(0)
    seconds = [np.empty((len(engine.ks), len(sizes), len(grid), SAMPLES)) for engine in engines]
    with torch.inference_mode(), no_garbage_collection():
        for s, size in enumerate(sizes):
            for g, length in enumerate(grid):
                for sample in range(-WARM_UP, SAMPLES):
                    batch = _batch(features, lengths, size, length, rng)
                    # in turn, so that a machine that grows slower makes all of them slower
                    for engine, mine in zip(engines, seconds, strict=True):
                        for which, k in enumerate(engine.ks):
                            began = perf_counter()
                            engine.answer(k, batch)
                            if sample >= 0:
                                mine[which, s, g, sample] = perf_counter() - began
    return [_calibration(engine, mine, sizes, grid) for engine, mine in zip(engines, seconds, strict=True)]


def _calibration(engine: Engine, seconds: NDArray[np.float64], sizes: list[int], grid: list[int]) -> Calibration:
    answered = [_answers(engine, k) for k in engine.ks]
    models = [
        model.model_copy(update={"accuracy": float(row.mean(dtype=np.float64))})
        for model, row in zip(engine.models, answered, strict=True)
    ]
    return Calibration(
        engine=engine.name,
        models=models,
        resident_bytes=engine.resident_bytes,
        sizes=sizes,
        lengths=grid,
        seconds=seconds.tolist(),
        examples=[len(feature["input_ids"]) for feature in engine.ctx.features["dev"]],
        scores=[row.tolist() for row in answered],
    )


def _answers(engine: Engine, k: int) -> NDArray[np.float32]:
    """Return the score of each dev example, answered in batches of like lengths."""
    features = engine.ctx.features["dev"]
    order = np.argsort([len(feature["input_ids"]) for feature in features], kind="stable")
    found = np.empty(len(features), np.float32)
    for start in range(0, len(order), EVALUATION_BATCH_SIZE):
        rows = order[start : start + EVALUATION_BATCH_SIZE]
        found[rows] = engine.run(k, rows.tolist())
    return found


def _batch(
    features: Sequence[Feature], lengths: NDArray[np.int64], size: int, length: int, rng: np.random.Generator
) -> list[Feature]:
    """Return a batch as a server meets it: one request of ``length`` tokens, the others of any length up to it."""
    long = rng.choice(np.flatnonzero(lengths >= length))
    others = rng.choice(np.flatnonzero(lengths <= length), size - 1)
    return [_cut(features[long], length), *(features[i] for i in others)]


def _cut(feature: Feature, length: int) -> Feature:
    """Return a feature with its first tokens alone; what is answered then is of no interest."""
    short: Feature = {**feature, "input_ids": feature["input_ids"][:length]}
    if "token_type_ids" in feature:
        short["token_type_ids"] = feature["token_type_ids"][:length]
    return short
