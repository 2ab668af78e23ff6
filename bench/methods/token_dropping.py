"""Learned token dropping: a token goes in the first layer that pays it less attention than a learned threshold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backbones.spec import BackboneSpec
from bench.measure.closed_form import remaining
from bench.methods.base import TOLERANCE, Positive, Setting, Share, Work
from bench.methods.budget import off_budget, refusal
from bench.methods.trained import TrainedMethod
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData
    from bench.tasks.features import Feature
    from bench.training.loop import Group

MULTIPLIERS = 2
"""Parameters of the multipliers that hold the soft stage to the budget."""

ROUGH = 256
"""Examples on which thresholds are calibrated while training is to go on; in the end it is the whole split."""


@dataclass(frozen=True)
class TokenDropping(TrainedMethod):
    """A learned threshold in each encoder layer; tokens whose importance is below it are removed behind the attention.

    Importance is the attention that a token is paid, in units of an equal share of the input
    (`bench.methods.attention_importance`). In a soft stage, tokens are removed in part by a sigmoid, and weights and
    thresholds are trained while a multiplier holds the expected FLOPs to the budget. In a hard stage, tokens are
    removed, the weights are tuned, and the thresholds move by one common factor alone, by which the FLOPs of the
    batches are held to the budget. Before, between and after the stages the factor is set so that the examples of the
    selection split cost what the budget allows.

    What differs from the paper, and why. Its weight of a penalty on the kept tokens, swept by hand, is the multiplier
    here, so that there is a budget. It multiplies the output of a layer by the gate; here the gate holds the vector
    where it is, and hides it from the attention, as its removal will: T5's norms would undo a factor, its decoder and a
    span head read the states of removed tokens too, which keep the last one that they had, and the hard stage starts
    from what the soft stage has trained. Its hard stage masks; here the tokens are gone.

    The default losses leave out the parts on hidden states: they would ask a removed token, of which nothing is
    computed any more, for the state that the teacher computes.

    Attributes
    ----------
    lr
        Peak learning rate on the task.
    losses
        Mix of loss parts on the task; ``bench.training.losses`` says what each is.
    soft
        Share of the steps that train thresholds; the others tune the weights for them.
    threshold_lr
        Peak learning rate of the logarithms of the thresholds, and of the multipliers.
    gate_temperature
        Distance of an importance from the threshold, in equal shares of the input, over which a sigmoid removes it.
    """

    name = "token_dropping"
    paper = "Kim et al., Learned Token Pruning for Transformers, KDD 2022"
    version = 1
    summary = "drop in each layer the tokens that are paid less attention than a learned threshold"
    trains = "all weights of the student, and a threshold for each layer"
    saves = "tokens: attention and FFN rows, more from layer to layer, as many as the text allows"
    knob = "share of the encoder's FLOPs that the thresholds are held to"

    lr: Positive = 1e-4
    losses: str = "logits=1,task=0.5"
    soft: Share = 0.5
    threshold_lr: Positive = 1e-2
    gate_temperature: Positive = 0.1

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the target: which thresholds meet it, only weights and data tell.

        No ratio asks for less than one vector behind the first attention, the fewest that thresholds can leave; where
        special tokens are more than a budget allows, `compress` says so.
        """
        budget = remaining(backbone, int(ratio or 0), lengths)
        target = min(1.0, budget)
        return Setting(
            {"target": target}, target, added=backbone.encoder_layers, note=off_budget("all vectors", target, budget)
        )

    def work(self, steps: int, batch_size: int) -> list[Work]:
        """Return the two stages."""
        soft, hard = self._stages(steps)
        return [w for w in (Work("soft", soft, batch_size), Work("hard", hard, batch_size)) if w.steps]

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Learn thresholds with soft gates, tune a copy of the teacher with the tokens removed, and calibrate it."""
        from bench.measure.size import count_parameters
        from bench.methods.thresholds import budget_of, calibrate, share_left, thresholds_of
        from bench.training.student import get_student

        soft, hard = self._stages(ctx.config.steps)
        selection, dev = ctx.features["selection"], ctx.features["dev"]

        def make(checkpoint: Path) -> tuple[TaskModel, dict[str, Any]]:
            student, stages = self._started(teacher, ctx)
            if hard:
                stages.append(self._harden(student, teacher, hard, ctx, checkpoint))
            calibrate(student, selection, ctx)
            shares = {name: share_left(student, split, ctx) for name, split in (("selection", selection), ("dev", dev))}
            return student, {"stages": stages, "remaining": shares}

        def build(notes: Mapping[str, Any]) -> TaskModel:
            left, asked = notes["remaining"], {"selection": ctx.budget, "dev": budget_of(dev, ctx)}
            far = any(abs(left[split] / asked[split] - 1) > TOLERANCE for split in left)
            said = ", ".join(f"{left[split]:.1%} on {split} of {asked[split]:.1%} asked for" for split in left)
            note = f"how many tokens stay depends on the text: of the encoder's FLOPs, the thresholds leave {said}"
            ctx.setting = dataclasses.replace(ctx.setting, remaining=left["selection"], note=note if far else "")
            return _untrained(teacher.model, ctx)

        student = get_student(teacher, ctx, build, make)
        thresholds = [step.log_threshold.exp().item() for step in thresholds_of(student)]
        ctx.setting = dataclasses.replace(ctx.setting, knob={**ctx.setting.knob, "thresholds": thresholds})
        ctx.trained_parameters = count_parameters(student.parameters()) + (MULTIPLIERS if soft else 0)
        return student

    def _stages(self, steps: int) -> tuple[int, int]:
        soft = round(self.soft * steps)
        return soft, steps - soft

    def _started(self, teacher: Teacher, ctx: RunContext) -> tuple[TaskModel, list[dict[str, Any]]]:
        """Return a model whose thresholds meet the budget, from the soft stage if there is one, and what it took."""
        from bench.methods.thresholds import calibrate
        from bench.training.student import load_weights, save_weights

        soft, _ = self._stages(ctx.config.steps)
        student = _untrained(teacher.model, ctx).train()
        rough = _spread(ctx.features["selection"], ROUGH)

        def make(folder: Path, checkpoint: Path) -> dict[str, Any]:
            calibrate(student, rough, ctx)
            stage = self._soften(student, teacher, soft, ctx, checkpoint)
            calibrate(student, rough, ctx)
            save_weights(student, teacher.model, folder)
            return {"stages": [stage | {"artifact": ctx.cache.key("thresholds", ctx.identity)}]}

        if not soft:
            calibrate(student, rough, ctx)
            return student, []
        artifact = ctx.cache.get("thresholds", ctx.identity, make, ctx.progress.message)
        load_weights(student, teacher.model, artifact.folder)
        return student, [stage | {"cached": artifact.cached} for stage in artifact.meta["stages"]]

    def _soften(
        self, student: TaskModel, teacher: Teacher, steps: int, ctx: RunContext, checkpoint: Path
    ) -> dict[str, Any]:
        """Train weights and thresholds with tokens that are removed in part, held to the budget by multipliers."""
        from bench.backbones.write_out import written_encoder
        from bench.methods.hard_concrete import Multipliers
        from bench.methods.thresholds import counted, share_of, softly

        multipliers, target = Multipliers().to(ctx.device), min(1.0, ctx.budget)
        trained = self._groups(student, *multipliers.parameters())
        with softly(student, self.gate_temperature), counted(written_encoder(student)) as counts:

            def penalty(step: int, _: Any) -> tuple[Tensor, dict[str, float]]:
                expected = share_of(counts, ctx)
                return multipliers(expected - target), {"remaining": expected.item()}

            return self.distill(
                "soft",
                student,
                trained,
                teacher.model,
                self.batches(ctx),
                ctx,
                checkpoint,
                steps=steps,
                penalty=penalty,
            )

    def _harden(
        self, student: TaskModel, teacher: Teacher, steps: int, ctx: RunContext, checkpoint: Path
    ) -> dict[str, Any]:
        """Tune the weights with tokens removed; an integral controller on the common factor holds the budget."""
        import torch

        from bench.backbones.write_out import written_encoder
        from bench.methods.thresholds import counted, share_of, thresholds_of

        thresholds, target = [step.log_threshold for step in thresholds_of(student)], min(1.0, ctx.budget)
        with counted(written_encoder(student)) as counts:

            def penalty(step: int, _: Any) -> tuple[Tensor, dict[str, float]]:
                left, logs = share_of(counts, ctx).item(), torch.stack([*thresholds]).sum()
                # 0, but for a gradient: no other reaches a hard threshold, and all move alike, up where it is too dear
                return (target - left) * (logs - logs.detach()), {"remaining": left}

            return self.distill(
                "hard",
                student,
                self._groups(student),
                teacher.model,
                self.batches(ctx),
                ctx,
                checkpoint,
                steps=steps,
                penalty=penalty,
            )

    def _groups(self, student: TaskModel, *more: nn.Parameter) -> list[Group]:
        """Return the weights, and the thresholds and ``more`` with a rate of their own."""
        from bench.methods.thresholds import thresholds_of
        from bench.training.loop import Group

        thresholds = [step.log_threshold for step in thresholds_of(student)]
        own = {id(threshold) for threshold in thresholds}
        weights = [parameter for parameter in student.parameters() if id(parameter) not in own]
        return [Group(weights), Group([*thresholds, *more], self.threshold_lr / self.lr, weight_decay=0.0)]


def _untrained(model: TaskModel, ctx: RunContext) -> TaskModel:
    """Return a copy of ``model`` with thresholds that grow with the layer, as the paper starts them."""
    from bench.methods.attention_importance import removing
    from bench.methods.thresholds import Threshold

    layers = ctx.spec.encoder_layers
    return removing(model, [Threshold(math.log(layer / layers)) for layer in range(1, layers + 1)], ctx)


def _spread(features: Sequence[Feature], most: int) -> Sequence[Feature]:
    """Return about ``most`` of ``features``, evenly spread over them."""
    return features[:: -(-len(features) // most)]
