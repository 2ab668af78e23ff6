"""What methods that merge similar vectors have in common: a share that meets the budget, and training only if asked."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backbones.spec import BackboneSpec
from bench.errors import Unreachable
from bench.measure.closed_form import layer_macs, remaining
from bench.methods.base import Setting, Work
from bench.methods.budget import off_budget, refusal
from bench.methods.trained import TrainedMethod
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bench.backbones.encoder import Encoder
    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData

PROTECTED = 3
"""Special tokens of one input that stay apart, the first ones: BERT has two or three, T5 one or two.

Text may spell out more of them. Were those spared too, an input's cost would depend on more than its length.
"""

_STEPS = 100_000
"""Shares that are tried, from 0 to 1; far finer than one vector in one layer."""

_EXACT = 0.01
"""Relative distance from the budget that needs no note."""


OFFSET = (5**0.5 - 1) / 2
"""Added before rounding down: irrational, so that a rising share takes a vector from one layer at a time."""


def merged_by(share: float, n: int, layers: int) -> int:
    """Return how many of ``n`` vectors the first ``layers`` layers are to merge away, if each merges a ``share``."""
    return math.floor(share * (n * layers) + OFFSET)


def matching_macs(spec: BackboneSpec, n: int) -> int:
    """MACs to compare one half of ``n`` vectors with the other half, by their keys averaged over heads."""
    return -(-n // 2) * (n // 2) * spec.d_head


@dataclass(frozen=True)
class Merging(TrainedMethod):
    """A method that merges similar vectors of the unchanged backbone, by how much one share says.

    Attributes
    ----------
    finetune
        Whether all weights are then trained against the teacher; without it nothing is, and the options and budget of
        the training play no part.
    """

    limit: ClassVar[str]
    """Why merging cannot save more than it can, for whoever asks for it."""

    finetune: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.finetune:
            # of this very instance: a run's identity asks the method as it was built
            object.__setattr__(self, "uses", frozenset({"ratio"}))

    @abstractmethod
    def macs(self, spec: BackboneSpec, n: int, share: float) -> int:
        """MACs of the encoder, the matching included, on one unpadded input of ``n`` tokens; falls with ``share``."""

    @abstractmethod
    def attach(self, encoder: Encoder, share: float) -> None:
        """Let every layer of ``encoder`` merge."""

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the least share that meets the budget."""
        budget = remaining(backbone, int(ratio or 0), lengths)
        dense = sum(times * backbone.encoder_layers * layer_macs(backbone, n, n, n) for n, times in lengths.items())

        def left(share: float) -> float:
            return sum(times * self.macs(backbone, n, share) for n, times in lengths.items()) / dense

        if left(1.0) > budget:
            raise Unreachable(
                f"{self.name} leaves at least {left(1.0):.1%} of the encoder's FLOPs, more than the {budget:.1%} asked "
                f"for: {self.limit}"
            )
        share = bisect_left(range(_STEPS), True, key=lambda step: left(step / _STEPS) <= budget) / _STEPS
        met = left(share)
        near = abs(met / budget - 1) <= _EXACT
        return Setting(
            {"share": share},
            met,
            added=0,
            note="" if near else off_budget("whole numbers of merged vectors", met, budget),
        )

    def work(self, steps: int, batch_size: int) -> list[Work]:
        """Return the training if there is one."""
        return super().work(steps, batch_size) if self.finetune else []

    def identity(self, data_root: Path | None) -> dict[str, Any]:
        """Leave out the options of a training that is left out."""
        return super().identity(data_root) if self.finetune else {"finetune": False}

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Let a copy of the teacher merge; it shares the teacher's weights unless they are trained."""
        from bench.backbones.write_out import write_out, written_encoder
        from bench.measure.size import count_parameters
        from bench.training.student import get_student, own_copy

        tokenizer = ctx.tokenizer

        def merging(model: TaskModel) -> TaskModel:
            encoder = written_encoder(model)
            encoder.protect([token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id])
            self.attach(encoder, ctx.setting.knob["share"])
            return model

        def make(checkpoint: Path) -> tuple[TaskModel, dict[str, Any]]:
            student, stages = merging(own_copy(teacher.model)).train(), []
            if ctx.config.steps:
                trained, batches = list(student.parameters()), self.batches(ctx)
                stages.append(self.distill(self.name, student, trained, teacher.model, batches, ctx, checkpoint))
            return student, {"stages": stages}

        if not self.finetune:
            return merging(write_out(teacher.model)).eval()
        student = get_student(teacher, ctx, lambda _: merging(own_copy(teacher.model)), make)
        ctx.trained_parameters = count_parameters(student.parameters())
        return student
