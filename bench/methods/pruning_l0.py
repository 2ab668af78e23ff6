"""Trained structured pruning: gates on heads, neurons and sublayers learn what to cut, and a smaller model is tuned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bench.backbones.spec import BackboneSpec
from bench.measure.closed_form import remaining
from bench.methods.base import Positive, Setting, Share, Work
from bench.methods.budget import UnitCosts, off_budget, refusal
from bench.methods.trained import TrainedMethod
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from torch import Tensor

    from bench.artifacts import Artifact
    from bench.backbones.encoder import Encoder
    from bench.backbones.model import TaskModel
    from bench.backbones.surgery import Structure
    from bench.context import RunContext, Teacher
    from bench.methods.hard_concrete import Gates
    from bench.tasks.data import TaskData

MULTIPLIER_RATE = 0.1
"""Learning rate of the multipliers in units of the gates'; one that is as fast overshoots and takes the gates along."""


@dataclass(frozen=True)
class PruningL0(TrainedMethod):
    """A model of fewer heads and FFN neurons, found by gates that are trained with its weights; T5's decoder keeps all.

    Every head, neuron and sublayer has a hard-concrete gate (`bench.methods.hard_concrete`). While a target falls from
    1 to the budget, two multipliers hold the expected encoder FLOPs to it, and the gated model learns to answer as the
    teacher does. Then the units that are likeliest open are kept, as many as the budget allows, with their gates
    multiplied into the weights (a shut one that the budget still pays for starts from zero output weights), and the
    smaller model is tuned for the rest of the steps. What is left out of CoFi: gates on the residual stream, and the
    learned match of layers, which a student of the teacher's depth does not need.

    Attributes
    ----------
    lr
        Peak learning rate on the task.
    prune_share
        Share of the steps that train gates; the others tune the smaller model. Without such a step, the units whose
        output weights are largest are kept.
    target_warmup
        Share of these steps over which the target falls to the budget.
    gate_lr
        Peak learning rate of the gates.
    """

    name = "pruning_l0"
    paper = "Xia et al., Structured Pruning Learns Compact and Accurate Models, ACL 2022"
    version = 1
    summary = "learn by L0 gates which heads, neurons and sublayers to cut, then tune what is left"
    trains = "all weights, and a gate for each head, neuron and sublayer"
    saves = "attention heads and FFN neurons, down to whole sublayers"
    knob = "share of the encoder's FLOPs that the gates are held to"

    lr: Positive = 1e-4
    prune_share: Share = 0.5
    target_warmup: Share = 0.5
    gate_lr: Positive = 0.3

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse a ratio that names no budget."""
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the target; it is met to a neuron, and nothing is too little, as no unit must stay."""
        budget = remaining(backbone, int(ratio or 0), lengths)
        target = min(1.0, budget)
        return Setting({"target": target}, target, added=0, note=off_budget("all units", target, budget))

    def work(self, steps: int, batch_size: int) -> list[Work]:
        """Return pruning and tuning."""
        prune, tune = self._stages(steps)
        return [w for w in (Work("prune", prune, batch_size), Work("tune", tune, batch_size)) if w.steps]

    def target(self, step: int, steps: int, budget: float) -> float:
        """Return the share of the FLOPs that is aimed at in ``step`` (0-based) of ``steps``."""
        fall = round(self.target_warmup * steps)
        return 1 - (1 - budget) * min(1.0, (step + 1) / (fall + 1))

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Find a structure, cut a copy of the teacher to it, and tune that."""
        from bench.backbones.surgery import Structure
        from bench.backbones.write_out import written_encoder
        from bench.measure.size import count_parameters
        from bench.training.student import get_student, load_weights, smaller

        prune, tune = self._stages(ctx.config.steps)

        def build(notes: Mapping[str, Any]) -> TaskModel:
            return smaller(teacher.model, Structure.from_json(notes["structure"]))

        def make(checkpoint: Path) -> tuple[TaskModel, dict[str, Any]]:
            pruned = self._pruned(teacher, ctx)
            student = build(pruned.meta).train()
            load_weights(student, teacher.model, pruned.folder)
            stages = [stage | {"cached": pruned.cached} for stage in pruned.meta["stages"]]
            if tune:
                trained, batches = list(student.parameters()), self.batches(ctx)
                stages.append(
                    self.distill("tune", student, trained, teacher.model, batches, ctx, checkpoint, steps=tune)
                )
            return student, {**pruned.meta, "stages": stages}

        student = get_student(teacher, ctx, build, make)
        heads, neurons = _units(written_encoder(student))
        costs = UnitCosts.of(ctx.spec, ctx.lengths("selection"))
        left, budget = costs.remaining(heads, neurons), ctx.budget
        off = abs(left - budget) * costs.dense >= costs.neuron
        ctx.setting = dataclasses.replace(
            ctx.setting,
            knob={"target": min(1.0, budget), "heads": heads, "neurons": neurons},
            remaining=left,
            note=off_budget(f"{heads} heads and {neurons} neurons", left, budget) if off else "",
        )
        whole = count_parameters(teacher.model.parameters()) + costs.layers * (ctx.spec.n_heads + ctx.spec.d_ff + 2) + 2
        ctx.trained_parameters = whole if prune else count_parameters(student.parameters())
        return student

    def _stages(self, steps: int) -> tuple[int, int]:
        prune = round(self.prune_share * steps)
        return prune, steps - prune

    def _pruned(self, teacher: Teacher, ctx: RunContext) -> Artifact:
        """Return the smaller model that the gates leave, training them if no run has yet."""
        from bench.backbones.surgery import cut
        from bench.backbones.write_out import written_encoder
        from bench.training.student import own_copy, save_weights

        def make(folder: Path, checkpoint: Path) -> dict[str, Any]:
            costs = UnitCosts.of(ctx.spec, ctx.lengths("selection"))
            budget = min(1.0, ctx.budget)
            student = own_copy(teacher.model).train()
            encoder = written_encoder(student)
            gates, stages = self._gates(student, teacher, costs, budget, ctx, checkpoint)
            structure = fitting(gates, encoder, costs, budget)
            gates.fold(encoder)
            cut(encoder, structure)
            save_weights(student, teacher.model, folder)
            key = ctx.cache.key("structure", ctx.identity)
            return {"structure": structure.to_json(), "stages": [stage | {"artifact": key} for stage in stages]}

        return ctx.cache.get("structure", ctx.identity, make, ctx.progress.message)

    def _gates(
        self, student: TaskModel, teacher: Teacher, costs: UnitCosts, budget: float, ctx: RunContext, checkpoint: Path
    ) -> tuple[Gates, list[dict[str, Any]]]:
        """Train ``student`` together with gates; return these for evaluation, and the stages that it took."""
        from bench.backbones.write_out import written_encoder
        from bench.methods.hard_concrete import Gates, Multipliers
        from bench.training.loop import Group

        gates = Gates(ctx.spec.encoder_layers, ctx.spec.n_heads, ctx.spec.d_ff).to(ctx.device)
        multipliers = Multipliers().to(ctx.device)
        steps, _ = self._stages(ctx.config.steps)

        def penalty(step: int, _: Any) -> tuple[Tensor, dict[str, float]]:
            expected, target = gates.expected_remaining(costs), self.target(step, steps, budget)
            return multipliers(expected - target), {"remaining": expected.item(), "target": target}

        stages = []
        if steps:
            scale = self.gate_lr / self.lr
            trained = [
                Group(list(student.parameters())),
                Group(list(gates.parameters()), scale, weight_decay=0.0),
                Group(list(multipliers.parameters()), scale * MULTIPLIER_RATE, weight_decay=0.0),
            ]
            with gates.on(written_encoder(student)):
                stages.append(
                    self.distill(
                        "prune",
                        student,
                        trained,
                        teacher.model,
                        self.batches(ctx),
                        ctx,
                        checkpoint,
                        steps=steps,
                        penalty=penalty,
                    )
                )
        return gates.eval(), stages


def fitting(gates: Gates, encoder: Encoder, costs: UnitCosts, budget: float) -> Structure:
    """Return what is left of ``encoder`` if the units that are likeliest open are kept, up to ``budget``.

    A unit that does not fit is passed over, so that less than a neuron's cost is left unless all neurons are kept.
    Those of equal probability, as at the start, are ranked by the norm of their output weights, in units of its mean
    over the sublayer.

    Parameters
    ----------
    gates, encoder
        Gates, and the encoder whose units they are of, not folded yet.
    costs
        Of a head and a neuron.
    budget
        Share of the encoder's FLOPs.
    """
    import torch

    from bench.backbones.encoder import EncoderLayer
    from bench.backbones.surgery import Structure, ffn_out

    units = []
    for kind, (cost, log_open) in enumerate(zip((costs.head, costs.neuron), gates.log_open(), strict=True)):
        for i, (layer, logs) in enumerate(zip(cast("list[EncoderLayer]", encoder.layers), log_open, strict=True)):
            out = ffn_out(layer.ffn) if kind else layer.attention.o
            norms = out.weight.detach().reshape(out.out_features, len(logs), -1).norm(dim=(0, 2))
            ranks = torch.stack((logs.detach(), norms / norms.mean()), 1).tolist()
            units += [(rank, cost, kind, i, unit) for unit, rank in enumerate(ranks)]
    units.sort(key=lambda unit: unit[0], reverse=True)
    left = budget * costs.dense
    kept: list[list[list[int]]] = [[[] for _ in encoder.layers] for _ in range(2)]
    for _, cost, kind, i, unit in units:
        if cost <= left:
            left -= cost
            kept[kind][i].append(unit)
    heads, neurons = (tuple(tuple(sorted(layer)) for layer in which) for which in kept)
    return Structure(tuple(range(len(encoder.layers))), heads, neurons)


def _units(encoder: Encoder) -> tuple[int, int]:
    """Return how many heads and neurons ``encoder`` has in all."""
    from bench.backbones.encoder import EncoderLayer
    from bench.backbones.surgery import ffn_out

    layers = cast("list[EncoderLayer]", encoder.layers)
    return sum(len(layer.attention.heads) for layer in layers), sum(ffn_out(layer.ffn).in_features for layer in layers)
