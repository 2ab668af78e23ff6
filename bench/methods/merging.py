"""What methods that merge similar vectors have in common: a schedule that meets the budget, and training if asked."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.backbones.spec import BackboneSpec
from bench.errors import Unreachable
from bench.measure.closed_form import layer_macs, remaining
from bench.methods.base import Setting, Work
from bench.methods.budget import refusal
from bench.methods.trained import TrainedMethod
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bench.backbones.encoder import Encoder
    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData

Counts = Callable[[int], list[int]]
"""Real tokens of an input -> how many of its vectors, or FFN rows, each layer leaves."""

PROTECTED = 3
"""Special tokens of one input that stay apart, the first ones: BERT has two or three, T5 one or two.

Text may spell out more of them. Were those spared too, an input's cost would depend on more than its length.
"""

_OFFSET = (5**0.5 - 1) / 2
"""Added before rounding down: irrational, so that a rising share takes a vector from one layer at a time."""

_STEPS = 100_000
"""Shares that are tried, from 0 to 1; far finer than one vector in one layer."""

_CLOSE = 0.01
"""Relative distance from the budget for which whole vectors give no reason."""


def merged_by(share: float, n: int, layers: int) -> int:
    """Return how many of ``n`` vectors the first ``layers`` layers are to merge away, if each merges a ``share``."""
    return math.floor(share * (n * layers) + _OFFSET)


def matching_macs(spec: BackboneSpec, n: int) -> int:
    """MACs to compare one half of ``n`` vectors with the other half, by their keys averaged over heads."""
    return -(-n // 2) * (n // 2) * spec.d_head


@dataclass(frozen=True)
class Merging(TrainedMethod):
    """A method that merges similar vectors of the backbone as it is.

    How much is merged depends on an input's length alone: as much as lets it cost what the budget allows an input of
    that length, so that the budget is met on any mixture of lengths.

    Attributes
    ----------
    finetune
        Whether all weights are then trained against the teacher; without it nothing is, and the options and budget of
        the training play no part.
    """

    limit: ClassVar[str]
    """Why merging cannot save more than it can, for whoever asks for it."""

    finetune: bool = False

    @abstractmethod
    def counts(self, spec: BackboneSpec, n: int, share: float) -> list[int]:
        """Return what each layer leaves of ``n`` vectors if it is to merge a ``share`` of them."""

    @abstractmethod
    def macs(self, spec: BackboneSpec, n: int, share: float) -> int:
        """MACs of the encoder, the matching included, on one unpadded input of ``n`` tokens; falls with ``share``."""

    @abstractmethod
    def attach(self, encoder: Encoder, counts: Counts) -> None:
        """Let every layer of ``encoder`` merge."""

    def share(self, spec: BackboneSpec, ratio: int, n: int) -> float:
        """Return the share with which an input of ``n`` tokens costs what is nearest to the budget."""
        dense = spec.encoder_layers * layer_macs(spec, n, n, n)
        wanted = max(remaining(spec, ratio, {n: 1}) * dense, self.macs(spec, n, 1.0))
        step = bisect_left(range(_STEPS), True, key=lambda step: self.macs(spec, n, step / _STEPS) <= wanted)
        near = [step / _STEPS, max(0, step - 1) / _STEPS]
        return min(near, key=lambda share: abs(self.macs(spec, n, share) - wanted))

    def reads(self) -> frozenset[str]:
        """Leave out the budget of a training that is left out."""
        return self.uses if self.finetune else frozenset({"ratio"})

    def in_parts(self) -> bool:
        """Return whether the backbone is only run."""
        return not self.finetune

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the mean share; what remains is the sum of what each length costs by its own."""
        k = int(ratio or 0)
        budget = remaining(backbone, k, lengths)
        dense = sum(times * backbone.encoder_layers * layer_macs(backbone, n, n, n) for n, times in lengths.items())
        floor = sum(times * self.macs(backbone, n, 1.0) for n, times in lengths.items()) / dense
        if floor > budget:
            raise Unreachable(
                f"{self.name} leaves at least {floor:.1%} of the encoder's FLOPs, more than the {budget:.1%} asked "
                f"for: {self.limit}"
            )
        shares = {n: self.share(backbone, k, n) for n in lengths}
        left = sum(times * self.macs(backbone, n, shares[n]) for n, times in lengths.items()) / dense
        mean = sum(times * shares[n] for n, times in lengths.items()) / sum(lengths.values())
        note = (
            f"{left:.1%} of the encoder's FLOPs remain, the nearest to the {budget:.1%} asked for that whole vectors "
            f"give at each length{f'; {self.limit}' if left > budget else ''}"
        )
        return Setting({"share": mean}, left, added=0, note=note if abs(left / budget - 1) > _CLOSE else "")

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

        spec, tokenizer, k = ctx.spec, ctx.tokenizer, int(ctx.config.ratio or 0)

        def merging(model: TaskModel) -> TaskModel:
            encoder = written_encoder(model)
            encoder.protect([token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id])
            self.attach(encoder, functools.cache(lambda n: self.counts(spec, n, self.share(spec, k, n))))
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
