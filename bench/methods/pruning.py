"""Post-training pruning: heads and neurons are taken out by the Fisher information, and the others rescaled."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backbones.spec import BackboneSpec
from bench.measure.closed_form import remaining
from bench.methods.base import Method, Positive, PositiveCount, Setting
from bench.methods.budget import UnitCosts, off_budget, refusal
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bench.backbones.model import TaskModel
    from bench.backbones.surgery import Structure
    from bench.context import RunContext, Teacher
    from bench.methods.gates import GateGradients
    from bench.tasks.data import TaskData

RESCALING_TOKENS = 20_000
"""Tokens that the scales are fitted on: several for each of the unknowns, which are fewer than an FFN's neurons."""


@dataclass(frozen=True)
class Pruning(Method):
    """Heads and FFN neurons taken out in one go, by what the loss on training examples says, without training.

    Attributes
    ----------
    examples
        Training examples that the Fisher information is estimated on, or all where there are fewer.
    damp
        How strongly the scales of the rest are held at 1.
    """

    name = "pruning"
    paper = "Kwon et al., A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022"
    version = 1
    summary = "remove heads and FFN neurons by their Fisher information and rescale the others by least squares"
    trains = "nothing: scales of heads and neurons are solved for, and folded into the weights"
    saves = "attention heads and FFN neurons, unequally over the encoder layers"
    knob = "heads and neurons that are kept, in all encoder layers together"
    uses = frozenset({"ratio"})

    examples: PositiveCount = 2048
    damp: Positive = 1.0

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the budget, which is met to within a neuron; how many of which units it is, the data decide."""
        budget = remaining(backbone, int(ratio or 0), lengths)
        share = min(1.0, budget)
        return Setting({"macs": round(share, 4)}, share, added=0, note=off_budget("all units", share, budget))

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Prune a copy that shares with the teacher whatever does not change."""
        from bench.backbones.encoder import EncoderLayer
        from bench.backbones.surgery import Structure, ffn_out
        from bench.backbones.write_out import written_encoder
        from bench.training.student import get_student

        costs = UnitCosts.of(ctx.spec, ctx.lengths("selection"))

        def make(_: Path) -> tuple[TaskModel, dict[str, Any]]:
            return self._prune(teacher.model, costs, ctx)

        def build(notes: Mapping[str, Any]) -> TaskModel:
            return _cut(teacher.model, Structure.from_json(notes["structure"]), notes["rescaled"])

        student = get_student(teacher, ctx, build, make)
        layers = [layer for layer in written_encoder(student).layers if isinstance(layer, EncoderLayer)]
        heads = sum(len(layer.attention.heads) for layer in layers)
        neurons = sum(ffn_out(layer.ffn).in_features for layer in layers)
        ctx.setting = dataclasses.replace(
            ctx.setting, knob={"heads": heads, "neurons": neurons}, remaining=costs.remaining(heads, neurons)
        )
        return student

    def _prune(self, model: TaskModel, costs: UnitCosts, ctx: RunContext) -> tuple[TaskModel, dict[str, Any]]:
        from bench.backbones.write_out import write_out, written_encoder
        from bench.methods.gates import calibrate, calibration_batches
        from bench.methods.rescaling import entering, rescale, sublayers

        batches = calibration_batches(ctx, self.examples)
        gradients, stage = calibrate(model, batches, ctx)
        structure = _structure(gradients, costs, round(ctx.setting.remaining * costs.dense))
        student, dense = _cut(model, structure, ()), write_out(model)
        ctx.progress.stage("rescale", len(sublayers(written_encoder(dense))))
        began = time.monotonic()
        states = entering(dense, batches, RESCALING_TOKENS)
        rescaled = rescale(written_encoder(student), written_encoder(dense), states, self.damp, ctx.progress.advance)
        stage["seconds"] += round(time.monotonic() - began, 3)
        return student, {"structure": structure.to_json(), "rescaled": rescaled, "stages": [stage]}


def _structure(gradients: GateGradients, costs: UnitCosts, macs: int) -> Structure:
    """Choose what is left for ``macs``."""
    import numpy as np

    from bench.backbones.surgery import Structure
    from bench.methods.mask_search import rearranged, search

    def fisher(layers: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        return np.stack([np.square(g, dtype=np.float64).mean(0) for g in layers])

    def kept(layers: Sequence[NDArray[np.float32]], masks: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
        swapped = (rearranged(g, mask) for g, mask in zip(layers, masks, strict=True))
        return tuple(tuple(np.flatnonzero(mask).tolist()) for mask in swapped)

    heads, neurons = search(fisher(gradients.heads), fisher(gradients.neurons), costs, macs)
    return Structure(tuple(range(len(heads))), kept(gradients.heads, heads), kept(gradients.neurons, neurons))


def _cut(model: TaskModel, structure: Structure, rescaled: Sequence[int]) -> TaskModel:
    """Return a smaller model that shares all but what is cut or ``rescaled``, which are places in `sublayers`."""
    from torch import nn

    from bench.backbones.surgery import cut
    from bench.backbones.write_out import write_out, written_encoder
    from bench.methods.rescaling import sublayers

    student = write_out(model)
    encoder = written_encoder(student)
    cut(encoder, structure)
    parts = sublayers(encoder)
    for i in rescaled:
        out = parts[i].out
        out.weight = nn.Parameter(out.weight.clone(), requires_grad=False)
    return student
