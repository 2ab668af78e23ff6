"""How the loss depends on each attention head and FFN neuron: gradients of gates on their outputs, by example.

A gate of 1 on a unit's output changes nothing; the loss's derivative by it, summed over the tokens of an example, is
the first-order effect of that unit (Michel et al., "Are sixteen heads really better than one?", NeurIPS 2019).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.backbones.encoder import EncoderLayer
from bench.backbones.model import TaskModel
from bench.backbones.surgery import ffn_out
from bench.backbones.write_out import write_out, written_encoder
from bench.context import RunContext
from bench.measure.closed_form import encoder
from bench.tasks.spec import Kind
from bench.training.losses import task_loss
from bench.training.stage import Batch, FeatureBatches, label_inputs, model_inputs

BATCH_SIZE = 32


@dataclass(frozen=True)
class GateGradients:
    """Derivatives of each example's own loss by the gates.

    Attributes
    ----------
    heads
        Of each layer, (examples, heads).
    neurons
        Of each layer, (examples, neurons).
    """

    heads: tuple[NDArray[np.float32], ...]
    neurons: tuple[NDArray[np.float32], ...]


def calibration_batches(ctx: RunContext, examples: int) -> list[Batch]:
    """Return up to ``examples`` training examples, chosen by the run's seed, in batches of near-equal length."""
    train, seed = ctx.features["train"], ctx.config.seed
    chosen = [train[i] for i in np.random.default_rng(seed).permutation(len(train))[:examples]]
    batches = FeatureBatches(chosen, BATCH_SIZE, ctx.tokenizer.pad_token_id, seed, ctx.device)
    return [batches(step) for step in range(batches.order.batches_per_epoch)]


def calibrate(model: TaskModel, batches: Sequence[Batch], ctx: RunContext) -> tuple[GateGradients, dict[str, Any]]:
    """Return the gradients on these batches, and the fields of a ``TrainingStage`` of no optimiser steps.

    Parameters
    ----------
    model
        In evaluation mode, without gradients; is not changed.
    batches
        Inputs and labels.
    ctx
        The surroundings of the run.
    """
    ctx.progress.stage("calibrate", len(batches))
    began = time.monotonic()
    gradients = gate_gradients(model, batches, ctx.task.kind, ctx.progress.advance)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).tolist()
    return gradients, {
        "name": "calibrate",
        "steps": 0,
        "examples": len(lengths),
        "flops": 3 * sum(encoder(ctx.spec, n).encoder for n in lengths),
        "seconds": round(time.monotonic() - began, 3),
    }


def gate_gradients(
    model: TaskModel, batches: Iterable[Batch], kind: Kind, on_batch: Callable[[], None] = lambda: None
) -> GateGradients:
    """Return the gradients of ``model``, one backward pass a batch.

    Each example has gates of its own, so that the sum of all losses has as derivative by an example's gate just that of
    the example's own loss.

    Parameters
    ----------
    model
        In evaluation mode, without gradients; is not changed.
    batches
        Inputs and labels.
    kind
        Kind of the task, whose own loss is meant.
    on_batch
        Called after each batch.
    """
    written = write_out(model)
    layers = [cast(EncoderLayer, layer) for layer in written_encoder(written).layers]
    widths = [len(layer.attention.heads) for layer in layers] + [ffn_out(layer.ffn).in_features for layer in layers]
    outputs = [layer.attention.o for layer in layers] + [ffn_out(layer.ffn) for layer in layers]
    gates: list[Tensor] = []
    found: list[list[NDArray[np.float32]]] = [[] for _ in widths]
    with ExitStack() as stack:
        for i, linear in enumerate(outputs):

            def gated(_: nn.Module, args: tuple[Any, ...], i: int = i) -> Tensor:
                x = args[0].unflatten(-1, (widths[i], -1))
                return cast(Tensor, (x * gates[i][:, None, :, None]).flatten(2))

            stack.callback(linear.register_forward_pre_hook(gated).remove)
        for batch in batches:
            like = batch["input_ids"]
            gates[:] = [torch.ones(len(like), width, device=like.device, requires_grad=True) for width in widths]
            losses = example_losses(kind, written(**model_inputs(batch)).logits, batch)
            for rows, gradient in zip(found, torch.autograd.grad(losses.sum(), gates), strict=True):
                rows.append(gradient.cpu().numpy())
            on_batch()
    stacked = [np.concatenate(rows) for rows in found]
    return GateGradients(tuple(stacked[: len(layers)]), tuple(stacked[len(layers) :]))


def example_losses(kind: Kind, logits: Tensor, batch: Batch) -> Tensor:
    """Return the task's own loss of each example, (B,), as if it were alone: padding plays no part."""
    labels, losses = label_inputs(batch), []
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        own = logits[i : i + 1, :length] if "start_positions" in labels else logits[i : i + 1]
        losses.append(task_loss(kind, own, {name: tensor[i : i + 1] for name, tensor in labels.items()}))
    return torch.stack(losses)
