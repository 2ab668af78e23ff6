"""Train a plugin against the same frozen model without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.backbones.model import TaskModel, share_weights
from bench.context import RunContext
from bench.plugins.bank import PluginBank
from bench.plugins.plugin import Plugin
from bench.tasks.spec import Kind
from bench.training.loop import Schedule
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
) -> dict[str, Any]:
    """Train ``plugin`` in place so that ``model`` with it equals ``model`` without it.

    Parameters
    ----------
    name
        Name of the stage.
    plugin, model
        The plugin, and the frozen model in evaluation mode.
    batches
        Step -> batch.
    mix, kind, temperature
        As for ``distillation_losses``; ``kind`` is ``None`` in pre-training.
    schedule, ctx, checkpoint
        Optimisation, surroundings, where an unfinished training is kept.

    Returns
    -------
    dict
        The fields of a ``TrainingStage``.
    """
    weights = parse_mix(mix, PARTS if kind else HIDDEN_PARTS)
    student = attach_for_good(model, plugin)
    plugin.requires_grad_(True)

    def losses(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        inputs = model_inputs(batch)
        with torch.no_grad():
            target = model(**inputs, hidden=True)
        output = student(**inputs, hidden=True)
        parts = distillation_losses(
            weights, kind, output, target, batch["attention_mask"].bool(), label_inputs(batch), temperature
        )
        total = torch.stack([weights[part] * loss for part, loss in parts.items()]).sum()
        return total, {part: loss.item() for part, loss in parts.items()}

    stage = run_stage(
        name,
        losses,
        plugin.parameters(),
        batches,
        schedule,
        spec=ctx.spec,
        passes=4,
        seed=ctx.config.seed,
        progress=ctx.progress,
        checkpoint=checkpoint,
    )
    plugin.requires_grad_(False)
    return stage
