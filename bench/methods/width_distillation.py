"""Distillation into a narrower encoder: the heads and neurons that matter least are cut, and all weights trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backbones.spec import BackboneSpec
from bench.errors import Unreachable
from bench.measure.closed_form import remaining
from bench.methods.base import Positive, PositiveCount, Setting
from bench.methods.budget import UnitCosts, off_budget, refusal
from bench.methods.trained import TrainedMethod
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bench.backbones.model import TaskModel
    from bench.backbones.surgery import Structure
    from bench.context import RunContext, Teacher
    from bench.methods.gates import GateGradients
    from bench.tasks.data import TaskData

ROUNDING = 0.01
"""Relative distance from the budget that whole neurons explain without a word."""


@dataclass(frozen=True)
class WidthDistillation(TrainedMethod):
    """A student whose layers all have the same fewer heads and neurons, those of the teacher that matter most.

    As in DynaBERT, one width holds for heads and neurons: of the numbers of heads, that is taken with which the shares
    of heads and of neurons are the nearest to each other, the neurons filling the budget.

    Attributes
    ----------
    lr
        Peak learning rate on the task.
    examples
        Training examples that the importances are estimated on, or all where there are fewer.
    """

    name = "width_distillation"
    paper = "Hou et al., DynaBERT: Dynamic BERT with Adaptive Width and Depth, NeurIPS 2020"
    version = 1
    summary = "keep the heads and FFN neurons of most importance and train them to answer as the teacher does"
    trains = "all weights of the student"
    saves = "attention heads and FFN neurons, equally many in every encoder layer"
    knob = "heads and neurons that each encoder layer keeps"

    lr: Positive = 1e-4
    examples: PositiveCount = 2048

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return how many heads and neurons a layer keeps."""
        costs, budget = UnitCosts.of(backbone, lengths), remaining(backbone, int(ratio or 0), lengths)
        macs = round(min(1.0, budget) * costs.layer)
        widths = [(heads, (macs - heads * costs.head) // costs.neuron) for heads in range(1, backbone.n_heads + 1)]
        widths = [(heads, neurons) for heads, neurons in widths if 1 <= neurons <= backbone.d_ff]
        layers = backbone.encoder_layers
        if not widths:
            raise Unreachable(
                f"one head and one neuron a layer, the fewest that {self.name} can keep, leave "
                f"{costs.remaining(layers, layers):.1%} of the encoder's FLOPs, more than the {budget:.1%} asked for"
            )
        heads, neurons = min(widths, key=lambda w: abs(w[0] / backbone.n_heads - w[1] / backbone.d_ff))
        share = costs.remaining(layers * heads, layers * neurons)
        note = off_budget(f"{heads} heads and {neurons} neurons a layer", share, budget)
        exact = abs(share / budget - 1) <= ROUNDING
        return Setting({"heads": heads, "neurons": neurons}, share, added=0, note="" if exact else note)

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Make a copy of the teacher narrower and train it."""
        from bench.backbones.surgery import Structure
        from bench.measure.size import count_parameters
        from bench.methods.gates import calibrate, calibration_batches
        from bench.training.student import get_student, smaller

        def make(checkpoint: Path) -> tuple[TaskModel, dict[str, Any]]:
            gradients, stage = calibrate(teacher.model, calibration_batches(ctx, self.examples), ctx)
            structure, stages = _most_important(gradients, **ctx.setting.knob), [stage]
            student = smaller(teacher.model, structure).train()
            if ctx.config.steps:
                trained, batches = list(student.parameters()), self.batches(ctx)
                stages.append(self.distill(self.name, student, trained, teacher.model, batches, ctx, checkpoint))
            return student, {"structure": structure.to_json(), "stages": stages}

        def build(notes: Mapping[str, Any]) -> TaskModel:
            return smaller(teacher.model, Structure.from_json(notes["structure"]))

        student = get_student(teacher, ctx, build, make)
        ctx.trained_parameters = count_parameters(student.parameters())
        return student


def _most_important(gradients: GateGradients, heads: int, neurons: int) -> Structure:
    """Keep, of each layer, the units without which the loss would change the most, to first order.

    The importance of a unit is the mean over examples of the absolute derivative by its gate.
    """
    import numpy as np

    from bench.backbones.surgery import Structure

    def kept(gradient: Any, count: int) -> tuple[int, ...]:
        order = np.argsort(-np.abs(gradient).mean(0, dtype=np.float64), kind="stable")
        return tuple(sorted(order[:count].tolist()))

    return Structure(
        tuple(range(len(gradients.heads))),
        tuple(kept(gradient, heads) for gradient in gradients.heads),
        tuple(kept(gradient, neurons) for gradient in gradients.neurons),
    )
