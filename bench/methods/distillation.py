"""Distillation into a shallower encoder: every so many layers of the teacher are kept, and all weights trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backbones.spec import BackboneSpec
from bench.errors import Unreachable
from bench.measure.closed_form import remaining
from bench.methods.base import Positive, Setting
from bench.methods.budget import off_budget, refusal
from bench.methods.trained import TrainedMethod
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData


def spaced(kept: int, layers: int) -> tuple[int, ...]:
    """Return ``kept`` of ``layers`` layers, evenly spaced from the first to the last; one alone is the first.

    >>> spaced(3, 6), spaced(6, 12)
    ((0, 3, 5), (0, 2, 4, 7, 9, 11))
    """
    if kept == 1:
        return (0,)
    gaps = kept - 1
    return tuple((2 * i * (layers - 1) + gaps) // (2 * gaps) for i in range(kept))


def imitated(kept: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Return, for each kept layer, the layer of the teacher whose output it must give.

    It is the last of those that it stands for: the one below the next kept layer, which then reads what it read in the
    teacher.

    >>> imitated((0, 3, 5), 6)
    (2, 4, 5)
    """
    return (*(upper - 1 for upper in kept[1:]), layers - 1)


@dataclass(frozen=True)
class Distillation(TrainedMethod):
    """A student of fewer encoder layers, copied from the teacher; T5's decoder keeps all of its own.

    Copying evenly spaced layers is how DistilBERT starts; each layer also learns the hidden states that it must give,
    as in TinyBERT (Jiao et al., Findings of EMNLP 2020), here without a projection since the width stays.

    Attributes
    ----------
    lr
        Peak learning rate on the task.
    """

    name = "distillation"
    paper = "Sanh et al., DistilBERT, EMC2 workshop at NeurIPS 2019"
    version = 1
    summary = "keep evenly spaced encoder layers and train them to answer as the teacher does"
    trains = "all weights of the student"
    saves = "encoder layers"
    knob = "encoder layers that are kept"

    lr: Positive = 1e-4

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return how many layers fit the budget; all layers cost the same, so that it is their share."""
        layers, budget = backbone.encoder_layers, remaining(backbone, int(ratio or 0), lengths)
        # the share is a quotient of floats that may lie a last bit below a whole number of layers
        kept = min(layers, int(budget * layers + 1e-9))
        if kept < 1:
            raise Unreachable(
                f"one of {layers} layers, the fewest that {self.name} can keep, leaves {1 / layers:.1%} of the "
                f"encoder's FLOPs, more than the {budget:.1%} asked for"
            )
        share = kept / layers
        note = off_budget(f"{kept} of {layers} layers", share, budget)
        return Setting({"layers": kept}, share, added=0, note=note)

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Take layers out of a copy of the teacher and train it."""
        from bench.backbones.surgery import Structure
        from bench.backbones.write_out import write_out, written_encoder
        from bench.measure.size import count_parameters
        from bench.training.student import get_student, smaller

        whole = Structure.whole(written_encoder(write_out(teacher.model)))
        layers = len(whole.layers)
        kept = spaced(ctx.setting.knob["layers"], layers)
        structure = Structure(kept, tuple(whole.heads[i] for i in kept), tuple(whole.neurons[i] for i in kept))

        def make(checkpoint: Path) -> tuple[TaskModel, dict[str, Any]]:
            student = smaller(teacher.model, structure).train()
            stages = []
            if ctx.config.steps:
                stages.append(
                    self.distill(
                        self.name,
                        student,
                        list(student.parameters()),
                        teacher.model,
                        self.batches(ctx),
                        ctx,
                        checkpoint,
                        layers=imitated(kept, layers),
                    )
                )
            return student, {"stages": stages}

        student = get_student(teacher, ctx, lambda _: smaller(teacher.model, structure), make)
        ctx.trained_parameters = count_parameters(student.parameters())
        return student
