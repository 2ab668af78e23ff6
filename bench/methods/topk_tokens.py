"""Token dropping by a fixed schedule: every layer keeps a share of the tokens, those that are paid most attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bench.backbones.spec import BackboneSpec
from bench.errors import Unreachable
from bench.measure.closed_form import layer_macs, remaining
from bench.methods.base import Positive, Setting
from bench.methods.budget import refusal
from bench.methods.trained import TrainedMethod
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData

LEAST = 2
"""Vectors that stay in every layer: BERT's first and last token, T5's sentinel and end."""

LONGEST = 4096
"""Tokens up to which a schedule is made for a backbone that has no longest input of its own."""

CLOSE = 0.01
"""Relative distance from the budget for which whole vectors give no reason."""


def kept(share: Any, layers: int, n: Any) -> list[Any]:
    """Return how many of ``n`` vectors there are at the start and behind each layer; numbers, or arrays of them.

    Examples
    --------
    >>> [int(count) for count in kept(0.8, 6, 20)]
    [20, 16, 13, 11, 9, 7, 6]
    """
    import numpy as np

    shares = [share**layer for layer in range(1, layers + 1)]
    return [n, *(np.minimum(n, np.maximum(LEAST, np.ceil(s * n).astype(np.int64))) for s in shares)]


def cost(spec: BackboneSpec, counts: Sequence[Any]) -> Any:
    """Return the encoder's MACs with the ``counts`` of `kept`: attention on what comes in, the FFN on what stays."""
    return sum(layer_macs(spec, n, n, stay) for n, stay in itertools.pairwise(counts))


@dataclass(frozen=True)
class Schedule:
    """How many vectors an example has, by its length, so that each costs what a ratio asks of it.

    Attributes
    ----------
    lengths
        Real tokens, (lengths,).
    shares
        Of those that come in, the share that each layer keeps, (lengths,).
    counts
        Vectors at the start and behind each layer, each (lengths,).
    macs, dense
        What the encoder costs with and without the schedule, (lengths,).
    """

    lengths: NDArray[Any]
    shares: NDArray[Any]
    counts: list[NDArray[Any]]
    macs: NDArray[Any]
    dense: NDArray[Any]

    @classmethod
    def solve(cls, spec: BackboneSpec, ratio: int, lengths: Iterable[int]) -> Schedule:
        """Bisect for the share of each length whose cost is nearest to the budget of that length.

        The cost rises with the share, in steps of one vector; where the budget is below what the least number of
        vectors costs, or above all of them, it is that.
        """
        import numpy as np

        n, layers = np.array(list(lengths)), spec.encoder_layers
        dense = layers * layer_macs(spec, *[cast(int, n)] * 3)
        budget = np.array([remaining(spec, ratio, {int(length): 1}) for length in n]) * dense
        low, high = np.zeros(len(n)), np.ones(len(n))
        for _ in range(40):
            middle = (low + high) / 2
            fits = cost(spec, kept(middle, layers, n)) <= budget
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        below, above = (cost(spec, kept(share, layers, n)) for share in (low, high))
        shares = np.where(budget - below <= above - budget, low, high)
        counts = kept(shares, layers, n)
        return cls(n, shares, counts, cost(spec, counts), cast("NDArray[Any]", dense))


@dataclass(frozen=True)
class TopkTokens(TrainedMethod):
    """A fixed share of the tokens that are still there goes in every encoder layer, whatever the text says.

    Between the attention and the FFN of layer l, the ceil(share^l n) of the n input tokens that are paid most attention
    stay (`bench.methods.attention_importance`), special tokens first. How many stay depends on n alone, and so does the
    share: it is the one with which an example of n tokens costs what the budget allows it, so that the budget is met on
    any mixture of lengths. PoWER-BERT learns how many stay in each layer, for one padded length; SpAtten (Wang et al.,
    HPCA 2021) lets the number fall by a schedule, as here.

    A token that is removed keeps the state that it had, and the final states hold it at its place: T5's decoder and a
    span head see every position, as in Transkimmer (Guan et al., ACL 2022).

    The default losses leave out the parts on hidden states: they would ask a removed token, of which nothing is
    computed any more, for the state that the teacher computes.

    Attributes
    ----------
    lr
        Peak learning rate on the task.
    losses
        Mix of loss parts on the task; ``bench.training.losses`` says what each is.
    """

    name = "topk_tokens"
    paper = "Goyal et al., PoWER-BERT, ICML 2020"
    version = 1
    summary = "keep in every layer a fixed share of the tokens, those that are paid most attention"
    trains = "all weights of the student"
    saves = "tokens: attention and FFN rows, more from layer to layer"
    knob = "share of its tokens that a layer keeps"

    lr: Positive = 3e-4
    losses: str = "logits=1,task=0.5"

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the mean share; what remains is the sum of what each length costs by its own."""
        import numpy as np

        budget = remaining(backbone, int(ratio or 0), lengths)
        schedule, times = Schedule.solve(backbone, int(ratio or 0), lengths), np.array(list(lengths.values()))
        dense = int(schedule.dense @ times)
        floor = int(cost(backbone, kept(0.0, backbone.encoder_layers, schedule.lengths)) @ times) / dense
        if floor > budget:
            raise Unreachable(
                f"with the {LEAST} vectors that stay behind the first attention, {self.name} leaves {floor:.1%} of the "
                f"encoder's FLOPs, more than the {budget:.1%} asked for"
            )
        left = int(schedule.macs @ times) / dense
        mean = float(schedule.shares @ times / times.sum())
        note = f"whole vectors leave {left:.1%} of the encoder's FLOPs, the nearest to the {budget:.1%} asked for"
        return Setting({"share": mean}, left, added=0, note=note if abs(left / budget - 1) > CLOSE else "")

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Put the schedule into a copy of the teacher, and train it with the tokens removed."""
        from bench.measure.size import count_parameters
        from bench.methods.attention_importance import KeepMost, removing
        from bench.training.student import get_student

        longest = ctx.spec.max_positions or max(LONGEST, ctx.config.max_length or ctx.task.max_length)
        schedule = Schedule.solve(ctx.spec, int(ctx.config.ratio or 0), range(1, longest + 1))

        def build(_: Mapping[str, Any]) -> TaskModel:
            return removing(teacher.model, [KeepMost([0, *counts.tolist()]) for counts in schedule.counts[1:]], ctx)

        def make(checkpoint: Path) -> tuple[TaskModel, dict[str, Any]]:
            student = build({}).train()
            stages = []
            if ctx.config.steps:
                trained, batches = list(student.parameters()), self.batches(ctx)
                stages.append(self.distill(self.name, student, trained, teacher.model, batches, ctx, checkpoint))
            return student, {"stages": stages}

        student = get_student(teacher, ctx, build, make)
        ctx.trained_parameters = count_parameters(student.parameters())
        return student
