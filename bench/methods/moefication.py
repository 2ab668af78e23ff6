"""MoEfication: the neurons of each ReLU FFN are grouped into experts, and each token runs the few that it activates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backbones.spec import BackboneSpec
from bench.errors import Unreachable
from bench.measure.closed_form import encoder, layer_macs, remaining
from bench.methods.base import Method, Positive, PositiveCount, Setting, Work
from bench.methods.budget import off_budget, refusal
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from torch import Tensor

    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData
    from bench.training.stage import Batch

WARMUP = 0.05
"""Share of the steps over which the learning rate rises, as in every other method."""

ORDER_BYTES = 2
"""Bytes that the place of one neuron in the order of the experts takes."""


def divisor_near(size: int, whole: int) -> int:
    """Return the divisor of ``whole`` that is nearest to ``size``, the smaller of two.

    >>> divisor_near(32, 3072), divisor_near(32, 1000)
    (32, 25)
    """
    return min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: abs(d - size))


def spread(total: int, layers: int) -> list[int]:
    """Return whole numbers for the layers, as equal and as evenly mixed as can be, that sum to ``total``.

    >>> spread(9, 4)
    [2, 2, 2, 3]
    >>> spread(10, 4)
    [2, 3, 2, 3]
    """
    return [total * (i + 1) // layers - total * i // layers for i in range(layers)]


@dataclass(frozen=True)
class Moefication(Method):
    """Experts by balanced k-means on the neurons' input weights, and a router that predicts which are active.

    Routers are trained on what the teacher's neurons do and not on the model's answers. They do not depend on the
    ratio, which only says how many experts run, so that all ratios share one training. T5's decoder stays dense.

    Attributes
    ----------
    expert_size
        Neurons of an expert; the nearest divisor of the FFN's width is taken.
    lr
        Peak learning rate of the routers, which then falls linearly.
    """

    name = "moefication"
    paper = "Zhang et al., MoEfication, Findings of ACL 2022"
    version = 1
    summary = "group the neurons of each ReLU FFN into experts and run those that a router expects to be active"
    trains = "routers alone, to predict what the teacher's neurons do; the backbone stays frozen"
    saves = "FFN neurons: each token runs a few experts in every encoder layer"
    knob = "experts that a token runs, in all encoder layers together"
    frozen = True

    expert_size: PositiveCount = 32
    lr: Positive = 1e-3

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse an FFN without ReLU, and a ratio that names no budget."""
        if backbone.gated or backbone.activation != "relu":
            return (
                f"{self.name} needs FFNs with ReLU, whose inactive neurons give exactly nothing; those of "
                f"{backbone.name} have {'gated ' if backbone.gated else ''}{backbone.activation}"
            )
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return how many experts fit the budget, in all layers together."""
        budget, layers = remaining(backbone, int(ratio or 0), lengths), backbone.encoder_layers
        d, size = backbone.d_model, divisor_near(self.expert_size, backbone.d_ff)
        count = backbone.d_ff // size
        tokens = sum(times * n for n, times in lengths.items())
        dense = sum(times * encoder(backbone, n).encoder for n, times in lengths.items()) // 2
        attention = sum(times * layer_macs(backbone, n, n, 0) for n, times in lengths.items())
        # to every layer its attention and its router, which runs on every token
        fixed = layers * (attention + tokens * (d * count + count * count))
        expert = tokens * 2 * d * size

        def left(experts: int) -> float:
            return (fixed + experts * expert) / dense

        chosen = min(layers * count, int((budget * dense - fixed) / expert + 1e-9))
        if chosen < layers:
            raise Unreachable(
                f"one expert of {size} neurons a layer, the fewest that {self.name} can run, and the routers leave "
                f"{left(layers):.1%} of the encoder's FLOPs, more than the {budget:.1%} asked for"
            )
        far = left(chosen) < 0.99 * budget
        return Setting(
            {"experts": chosen, "of": layers * count, "expert_size": size},
            left(chosen),
            added=layers * (d * count + count + count * count + count),
            note=off_budget(f"{chosen} of {layers * count} experts", left(chosen), budget) if far else "",
        )

    def work(self, steps: int, batch_size: int) -> list[Work]:
        """Return the training of the routers: forward passes of the teacher."""
        return [Work("routers", steps, batch_size, passes=1)] if steps else []

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Group the neurons, train the routers, and let each token run the experts that the setting allows."""
        import torch

        from bench.backbones.sites import EncoderView
        from bench.backbones.surgery import ffn_in
        from bench.backbones.write_out import write_out
        from bench.measure.size import count_parameters
        from bench.methods.experts import ExpertFFN, balanced_clusters
        from bench.training.student import changed, get_student

        size = ctx.setting.knob["expert_size"]
        chosen = spread(ctx.setting.knob["experts"], ctx.spec.encoder_layers)

        def build(notes: Mapping[str, Any]) -> TaskModel:
            student = write_out(teacher.model)
            for site, order, few in zip(EncoderView(student).sites(), notes["order"], chosen, strict=True):
                site.install(ExpertFFN(site.inner, torch.tensor(order), size, few).to(ctx.device).eval())
            return student

        def make(checkpoint: Path) -> tuple[TaskModel, dict[str, Any]]:
            ctx.progress.stage("experts", ctx.spec.encoder_layers)
            orders = []
            for site in EncoderView(teacher.model).sites():
                weights = ffn_in(site.inner)[0].weight.detach().cpu().numpy()
                orders.append(balanced_clusters(weights, size, ctx.config.seed).tolist())
                ctx.progress.advance()
            student, notes = build({"order": orders}), {"order": orders, "stages": []}
            if ctx.config.steps:
                notes["stages"].append(self._train_routers(student, teacher.model, ctx, checkpoint))
            return student, notes

        shared = dataclasses.replace(ctx, identity={k: v for k, v in ctx.identity.items() if k != "ratio"})
        student = get_student(teacher, shared, build, make)
        ctx.bytes_added = shared.bytes_added + ORDER_BYTES * ctx.spec.d_ff * ctx.spec.encoder_layers
        ctx.trained_parameters = count_parameters(changed(student, teacher.model).values())
        if size != self.expert_size:
            ctx.notes.append(f"experts have {size} neurons: {self.expert_size} do not divide {ctx.spec.d_ff}")
        return student

    def _train_routers(
        self, student: TaskModel, teacher: TaskModel, ctx: RunContext, checkpoint: Path
    ) -> dict[str, Any]:
        """Train the routers of all layers at once; return the fields of a ``TrainingStage``."""
        from bench.backbones.write_out import write_out
        from bench.methods.experts import ExpertFFN, RouterLoss
        from bench.training.loop import Schedule
        from bench.training.stage import FeatureBatches, run_stage

        config = ctx.config
        layers = [module for module in student.modules() if isinstance(module, ExpertFFN)]
        loss_of = RouterLoss(write_out(teacher), layers)

        def losses(_: int, batch: Batch) -> tuple[Tensor, dict[str, float]]:
            return loss_of(batch), {}

        return run_stage(
            "routers",
            losses,
            [parameter for layer in layers for parameter in layer.router.parameters()],
            FeatureBatches(
                ctx.features["train"], config.batch_size, ctx.tokenizer.pad_token_id, config.seed, ctx.device
            ),
            Schedule(config.steps, self.lr, round(WARMUP * config.steps), precision=config.precision),
            spec=ctx.spec,
            passes=1,
            seed=config.seed,
            progress=ctx.progress,
            checkpoint=checkpoint,
        )
