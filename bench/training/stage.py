"""One training of a run: its batches, its progress, and what it leaves in the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.backbones.spec import BackboneSpec
from bench.measure.closed_form import encoder
from bench.progress import Progress
from bench.tasks.batching import LengthBatches
from bench.tasks.features import Feature, collate
from bench.training import parallel
from bench.training.loop import Checkpoint, Schedule, Trained, train

Batch = dict[str, Tensor]
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
LABELS = ("labels", "start_positions", "end_positions")


class FeatureBatches:
    """Step -> batch on the device, bucketed by length, a pure function of seed and step."""

    def __init__(
        self, features: Sequence[Feature], batch_size: int, pad_token_id: int, seed: int, device: torch.device
    ) -> None:
        self.features, self.pad_token_id, self.device, self.batch_size = features, pad_token_id, device, batch_size
        self.order = LengthBatches([len(f["input_ids"]) for f in features], batch_size, seed)

    def __call__(self, step: int) -> Batch:
        """Return the padded batch of ``step`` (0-based)."""
        chosen = [self.features[i] for i in self.order.batch(step)]
        return {name: t.to(self.device) for name, t in collate(chosen, self.pad_token_id).items()}

    def part(self, step: int, ranks: parallel.Ranks) -> tuple[Batch, float]:
        """Return what one of several processes takes of the batch, as wide as the whole, and its share of the examples.

        A batch is the same however many share it: their number takes no part in a run's identity.
        """
        chosen = [self.features[i] for i in self.order.batch(step)]
        rows, share = ranks.part(len(chosen))
        batch = collate(chosen, self.pad_token_id)
        return {name: t[rows].to(self.device) for name, t in batch.items()}, share

    @property
    def mean_length(self) -> float:
        """Mean tokens of an example."""
        return float(self.order.lengths.mean())


def model_inputs(batch: Batch) -> Batch:
    """Return the part of a batch that the model is called with."""
    return {name: batch[name] for name in INPUTS if name in batch}


def label_inputs(batch: Batch) -> Batch:
    """Return the part of a batch that the losses are computed from."""
    return {name: batch[name] for name in LABELS if name in batch}


def run_stage(
    name: str,
    losses: Callable[[int, Batch], tuple[Tensor, dict[str, float]]],
    parameters: Trained,
    batches: FeatureBatches,
    schedule: Schedule,
    *,
    spec: BackboneSpec,
    passes: int,
    seed: int,
    progress: Progress,
    checkpoint: Path,
) -> dict[str, Any]:
    """Train, showing progress, and return the fields of a ``TrainingStage``.

    Parameters
    ----------
    name
        Name of the stage.
    losses
        (Step, batch) -> (loss to minimise, its named parts).
    parameters
        What is trained.
    batches, schedule, seed, checkpoint
        As for ``train``.
    spec, passes
        For the stage's estimated cost: encoder forward passes a step.
    progress
        Who watches.
    """
    flops = passes * batches.batch_size * encoder(spec, max(1, round(batches.mean_length))).encoder
    progress.stage(name, schedule.steps, float(flops))
    began = time.monotonic()
    started = False

    def on_step(step: int, parts: dict[str, float]) -> None:
        nonlocal started
        progress.advance(1 if started else step, **parts)
        started = True

    ranks = parallel.current()

    def of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        if ranks is None:
            return losses(step, batches(step))
        batch, share = batches.part(step, ranks)
        with parallel.working_on(share):
            loss, parts = losses(step, batch)
        return loss * share, {name: number * share for name, number in parts.items()}

    history = train(
        of_step,
        parameters,
        schedule,
        seed=seed,
        device=batches.device,
        on_step=on_step,
        checkpoint=Checkpoint(checkpoint),
    )
    return {
        "name": name,
        "steps": schedule.steps,
        "examples": schedule.steps * batches.batch_size,
        "flops": flops * schedule.steps,
        "seconds": round(time.monotonic() - began, 3),
        "history": history,
    }
