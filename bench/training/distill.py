"""Train a student, or a plugin in a frozen model, against the teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.backbones.model import TaskModel, share_weights
from bench.context import RunContext
from bench.plugins.bank import PluginBank
from bench.plugins.plugin import Plugin
from bench.plugins.units import Scale, Units, in_units, plugin_scales
from bench.tasks.spec import Kind
from bench.training import parallel
from bench.training.loop import Schedule, Trained
from bench.training.losses import distillation_losses
from bench.training.mix import HIDDEN_PARTS, PARTS, parse_mix
from bench.training.stage import Batch, FeatureBatches, label_inputs, model_inputs, run_stage


def attach_for_good(model: TaskModel, plugin: Plugin) -> TaskModel:
    """Return a model that runs with ``plugin`` and shares the weights of ``model``, which stays dense."""
    student = share_weights(model)
    bank = PluginBank([plugin])
    bank.attach(student)
    bank.select(plugin.config.k)
    return student


@contextmanager
def trained_in(scales: Sequence[Scale]) -> Iterator[None]:
    """Let parameters be in their units for the length of a ``with`` block, in the same ones in every process."""
    scales = [(module, name, unit.to(getattr(module, name))) for module, name, unit in scales]
    if scales and (ranks := parallel.current()):
        ranks.start_alike([unit for _, _, unit in scales])
    with in_units(scales):
        yield


def distill(
    name: str,
    student: TaskModel,
    trained: Trained,
    teacher: TaskModel,
    batches: FeatureBatches,
    *,
    mix: str,
    kind: Kind | None,
    temperature: float,
    schedule: Schedule,
    ctx: RunContext,
    checkpoint: Path,
    layers: Sequence[int] | None = None,
    penalty: Callable[[int, Batch], tuple[Tensor, dict[str, float]]] | None = None,
) -> dict[str, Any]:
    """Train ``trained`` so that ``student`` answers as ``teacher`` does.

    Parameters
    ----------
    name
        Name of the stage.
    student, trained
        The model, in the mode that it is to be trained in, and its parameters (or groups of them) that learn.
    teacher
        Frozen, in evaluation mode.
    batches
        Step -> batch.
    mix, kind, temperature
        As for ``distillation_losses``; ``kind`` is ``None`` in pre-training.
    schedule, ctx, checkpoint
        Optimisation, surroundings, where an unfinished training is kept.
    layers
        For each layer of the student, the layer of the teacher whose output it is to have; by default the same.
    penalty
        (Step, batch) -> what is added to the loss after the student's forward pass, and parts of it to show.

    Returns
    -------
    dict
        The fields of a ``TrainingStage``.
    """
    weights = parse_mix(mix, PARTS if kind else HIDDEN_PARTS)
    hidden = any(part in HIDDEN_PARTS for part in weights)

    def losses(step: int, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        inputs = model_inputs(batch)
        with torch.no_grad():
            target = teacher(**inputs, hidden=hidden)
        if layers is not None and hidden:
            target = dataclasses.replace(target, encoder_hidden=tuple(target.encoder_hidden[i] for i in layers))
        output = student(**inputs, hidden=hidden)
        parts = distillation_losses(
            weights, kind, output, target, batch["attention_mask"].bool(), label_inputs(batch), temperature
        )
        total = torch.stack([weights[part] * loss for part, loss in parts.items()]).sum()
        shown = {part: loss.item() for part, loss in parts.items()}
        if penalty is not None:
            more, of_it = penalty(step, batch)
            total, shown = total + more, shown | of_it
        return total, shown

    return run_stage(
        name,
        losses,
        trained,
        batches,
        schedule,
        spec=ctx.spec,
        passes=4,
        seed=ctx.config.seed,
        progress=ctx.progress,
        checkpoint=checkpoint,
    )


def distill_plugin(
    name: str,
    plugin: Plugin,
    model: TaskModel,
    batches: FeatureBatches,
    *,
    mix: str,
    kind: Kind | None,
    temperature: float,
    schedule: Schedule,
    ctx: RunContext,
    checkpoint: Path,
    units: Sequence[Units] | None = None,
) -> dict[str, Any]:
    """Train ``plugin`` in place so that ``model`` with it equals ``model`` without it; see `distill`.

    ``units`` are those that it is trained in, of `bench.plugins.fit.measure_units`.
    """
    student = attach_for_good(model, plugin)
    plugin.requires_grad_(True)
    with trained_in(plugin_scales(plugin, units) if units else []):
        stage = distill(
            name,
            student,
            plugin.parameters(),
            model,
            batches,
            mix=mix,
            kind=kind,
            temperature=temperature,
            schedule=schedule,
            ctx=ctx,
            checkpoint=checkpoint,
        )
    plugin.requires_grad_(False)
    return stage
