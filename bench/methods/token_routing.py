"""Token routing: the frozen FFN runs on the tokens that a learned router chooses, a narrow adapter on all tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backbones.spec import BackboneSpec
from bench.errors import Unreachable
from bench.measure.closed_form import encoder, layer_macs, remaining
from bench.methods.base import NonNegative, Positive, PositiveCount, Setting
from bench.methods.budget import refusal
from bench.methods.trained import TrainedMethod
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData

FIT_TOKENS = 20_000
"""Tokens of the closed-form start, as many as Variator's."""

PARTS = 1_000_000
"""A share of tokens is a whole number of these parts, so that every rounding of it to rows is one of whole numbers."""

_NEAR = 0.01


def layer_cost(spec: BackboneSpec, n: int, parts: int, bottleneck: int) -> int:
    """MACs of one layer on n tokens, of which ``parts`` of `PARTS`, rounded up, run through the FFN."""
    rows = -(-parts * n // PARTS)
    return layer_macs(spec, n, n, rows) + n * spec.d_model * (1 + 2 * bottleneck)


@dataclass(frozen=True)
class TokenRouting(TrainedMethod):
    """A router and an adapter around every encoder FFN of the frozen teacher.

    The paper routes attention and FFN together, and pre-trains on text before it adapts; here, as in Variator, only the
    FFN is routed, so that choosing tokens is set against merging them. There is no pre-training: training starts from a
    closed-form fit and takes place on the task alone.

    Attributes
    ----------
    bottleneck
        Width of the adapter.
    lr
        Peak learning rate on the task.
    weight_decay
        AdamW's weight decay.
    losses
        Mix of loss parts on the task; ``bench.training.losses`` says what each is.
    temperature
        Temperature of the ``logits`` part.
    """

    name = "token_routing"
    paper = "Lei et al., Conditional Adapters, NeurIPS 2023"
    version = 1
    summary = "run each encoder FFN on the tokens that a learned router chooses, and a narrow adapter on all"
    trains = "routers and adapters alone; the backbone stays frozen"
    saves = "FFN rows: a share of each example's tokens in every encoder layer"
    knob = "share of the tokens that run through the FFN"
    frozen = True

    bottleneck: PositiveCount = 64
    lr: Positive = 3e-4
    weight_decay: NonNegative = 0.0
    losses: str = "all_hidden=1,logits=0.1"
    temperature: Positive = 1.0

    def version_on(self, family: str) -> int:
        """Return 2 on T5, where start and training have followed the scale of the stream since, as Variator's do."""
        return 2 if family == "t5" else self.version

    def in_parts(self) -> bool:
        """Return that the backbone is only run."""
        return True

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the share of tokens that comes nearest to the budget."""
        budget, layers = remaining(backbone, int(ratio or 0), lengths), backbone.encoder_layers
        dense = sum(times * encoder(backbone, n).encoder for n, times in lengths.items()) / 2

        def left(parts: int) -> float:
            macs = sum(times * layer_cost(backbone, n, parts, self.bottleneck) for n, times in lengths.items())
            return layers * macs / dense

        below = bisect_right(range(1, PARTS + 1), budget * (1 + 1e-12), key=left)
        if not below:
            raise Unreachable(
                f"one token of each example in the FFN, the fewest for {self.name}, and the adapter leave "
                f"{left(1):.1%} of the encoder's FLOPs, more than the {budget:.1%} asked for"
            )
        # just above 1/4, say, all examples of 4, 8, 12 ... tokens gain a row at once: the step above may be the nearer
        parts = min(below, min(below + 1, PARTS), key=lambda parts: abs(left(parts) - budget))
        share, d = parts / PARTS, backbone.d_model
        added = layers * (d + 1 + 2 * d * self.bottleneck + self.bottleneck + d)
        note = (
            f"{share:.1%} of the tokens in the FFN, and the adapter, leave {left(parts):.1%} of the encoder's FLOPs: "
            f"the nearest to the {budget:.1%} asked for"
        )
        near = abs(left(parts) / budget - 1) <= _NEAR
        return Setting({"share": share}, left(parts), added=added, note="" if near else note)

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Put routers and adapters around the teacher's FFNs and train them."""
        import torch

        from bench.backbones.sites import EncoderView
        from bench.backbones.write_out import write_out
        from bench.measure.size import count_parameters
        from bench.methods.routed_ffn import RoutedFFN, fit_routing
        from bench.training.distill import trained_in
        from bench.training.stage import model_inputs
        from bench.training.student import changed, get_student

        parts = round(ctx.setting.knob["share"] * PARTS)

        def build(_: Mapping[str, Any]) -> TaskModel:
            torch.manual_seed(ctx.config.seed)
            student = write_out(teacher.model)
            for site in EncoderView(student).sites():
                site.install(RoutedFFN(site.inner, ctx.spec.d_model, self.bottleneck, parts).to(ctx.device).eval())
            return student

        def make(checkpoint: Path) -> tuple[TaskModel, dict[str, Any]]:
            student, batches, stages = build({}), self.batches(ctx), []
            needed = max(1, round(FIT_TOKENS / (batches.mean_length * batches.batch_size)))
            ctx.progress.stage("fit", ctx.spec.encoder_layers)
            inputs = (model_inputs(batches(step)) for step in range(needed))
            scales = fit_routing(student, inputs, ctx.progress.advance)
            if ctx.config.steps:
                with trained_in(scales):
                    own = list(changed(student, teacher.model).values())
                    stages.append(self.distill(self.name, student, own, teacher.model, batches, ctx, checkpoint))
            return student, {"stages": stages}

        student = get_student(teacher, ctx, build, make)
        ctx.trained_parameters = count_parameters(changed(student, teacher.model).values())
        return student
