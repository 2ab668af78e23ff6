"""Early exit: a head after every encoder layer, and no more layers for an example whose head is sure of its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.backbones.spec import BackboneSpec
from bench.errors import Unreachable
from bench.measure.closed_form import layer_macs, remaining
from bench.methods.base import Positive, Setting, Work
from bench.methods.budget import refusal
from bench.methods.trained import TrainedMethod
from bench.tasks.spec import TaskSpec
from bench.training.mix import parse_mix

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.methods.early_exit_layers import ExitingEncoder
    from bench.tasks.data import TaskData
    from bench.training.stage import Batch

_BATCH_SIZE = 32
"""Examples at a time while the threshold is set."""

LOSSES = ("logits", "task")
"""Loss parts that a head has: it changes no hidden state."""


def exit_macs(spec: BackboneSpec, outputs: int, n: int) -> list[int]:
    """Return the encoder's MACs on an example of ``n`` tokens that exits after 1, 2, ... layers, or never (last).

    ``outputs`` is the number of classes. The heads that were asked are part of it; behind the last layer there is none.
    """
    layer, head = layer_macs(spec, n, n, n), spec.d_model * (spec.d_model + outputs)
    depths = range(1, spec.encoder_layers + 1)
    return [depth * layer + min(depth, spec.encoder_layers - 1) * head for depth in depths]


def exit_threshold(entropies: NDArray[Any], macs: NDArray[Any], budget: float) -> tuple[float, int]:
    """Find the threshold that comes nearest to a budget.

    Parameters
    ----------
    entropies
        Of each example, the entropy of each head, (examples, layers - 1); an example exits at its first head whose
        entropy is below the threshold.
    macs
        Of each example, its MACs if it exits after each layer, (examples, layers), increasing.
    budget
        MACs that all examples together may cost.

    Returns
    -------
    tuple
        The threshold, halfway between the two entropies that it separates, and the MACs of all examples with it.

    Notes
    -----
    An example has left by head i just when the threshold is above the least entropy of heads 1 to i; it then does not
    pay for going on from i to i + 1. So the cost is the dense one minus one such step for every least entropy below the
    threshold: a sum over sorted values, by which every threshold there is gets tried.
    """
    import numpy as np

    least = np.minimum.accumulate(entropies, axis=1)
    values, which = np.unique(least, return_inverse=True)
    saved = np.zeros(len(values), dtype=np.int64)
    np.add.at(saved, which.reshape(-1), np.diff(macs, axis=1).reshape(-1))
    cost = macs[:, -1].sum() - np.concatenate(([0], saved.cumsum()))
    best = int(np.abs(cost - budget).argmin())
    # none is below 0, all are below a number beyond the largest
    above = np.append(values, values[-1] + 1)
    return (float((above[best - 1] + above[best]) / 2) if best else 0.0), int(cost[best])


@dataclass(frozen=True)
class EarlyExit(TrainedMethod):
    """A head after every encoder layer but the last, whose answer is the teacher's own.

    An example leaves the batch at the first head whose entropy, as a share of the largest possible, is below one
    threshold for all heads. The threshold is set on the selection split, so that the budget is met there.

    DeeBERT trains its heads on the labels alone; here they also learn what the teacher answers. T5 has no vector that
    stands for the text, so that a head reads the mean of all, behind the norm of the layer above, and an example that
    leaves needs no decoder.

    Attributes
    ----------
    lr
        Peak learning rate on the task.
    losses
        Mix of ``logits`` and ``task``, summed over the heads.
    """

    name = "early_exit"
    paper = "Xin et al., DeeBERT, ACL 2020"
    version = 1
    summary = "answer from a head after an early layer where it is sure, by the entropy of its classes"
    trains = "one head after each encoder layer but the last; the backbone stays frozen"
    saves = "encoder layers, and T5's decoder, of the examples that leave"
    knob = "entropy below which an example leaves"
    frozen = True

    lr: Positive = 1e-3
    losses: str = "logits=1,task=0.5"

    def __post_init__(self) -> None:
        parse_mix(self.losses, LOSSES)

    def in_parts(self) -> bool:
        """Return that the backbone is only run."""
        return True

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Refuse whatever has no classes whose entropy says how sure a head is."""
        if task.kind in ("regression", "qa"):
            return f"an example exits by the entropy of its classes, which a task of kind {task.kind} does not have"
        return refusal(self.name, ratio)

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the budget: which threshold meets it, only heads and data tell."""
        budget = remaining(backbone, int(ratio or 0), lengths)
        _refuse_below_floor(backbone, 2, lengths, budget)  # two classes, the fewest there are
        return Setting({}, budget)

    def work(self, steps: int, batch_size: int) -> list[Work]:
        """Return one training, which needs the forward pass of the teacher alone."""
        return [Work(self.name, steps, batch_size, passes=1)] if steps else []

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Train the heads, set the threshold on the selection split, and let examples leave."""
        import torch

        from bench.backbones.write_out import written_encoder
        from bench.measure.size import count_parameters
        from bench.methods.early_exit_layers import ExitingEncoder, let_exit
        from bench.training.student import get_student

        budget = ctx.budget
        _refuse_below_floor(ctx.spec, ctx.task.n_outputs, ctx.lengths("selection"), budget)

        def encoder_of(model: TaskModel) -> ExitingEncoder:
            encoder = written_encoder(model)
            assert isinstance(encoder, ExitingEncoder)
            return encoder

        def make(checkpoint: Path) -> tuple[TaskModel, dict[str, Any]]:
            torch.manual_seed(ctx.config.seed)
            model = let_exit(teacher.model, ctx.task.n_outputs, 0.0).to(ctx.device)
            encoder = encoder_of(model)
            stages = [self._train(encoder, teacher.model, ctx, checkpoint)] if ctx.config.steps else []
            threshold, share = _calibrate(encoder, teacher.model, ctx, budget)
            return model, {"threshold": threshold, "remaining": share, "stages": stages}

        def build(notes: Mapping[str, Any]) -> TaskModel:
            share = notes["remaining"]
            ctx.setting = dataclasses.replace(
                ctx.setting,
                knob={"threshold": notes["threshold"]},
                remaining=share,
                note=f"the threshold leaves {share:.1%} of the encoder's FLOPs, of {budget:.1%} asked for, on the "
                "selection split that it was set on; other examples exit elsewhere",
            )
            return let_exit(teacher.model, ctx.task.n_outputs, notes["threshold"])

        model = get_student(teacher, ctx, build, make)
        ctx.trained_parameters = count_parameters(encoder_of(model).heads.parameters())
        return model

    def _train(self, encoder: ExitingEncoder, teacher: TaskModel, ctx: RunContext, checkpoint: Path) -> dict[str, Any]:
        """Train all heads at once on the hidden states of the teacher, which no head changes."""
        import torch

        from bench.backbones.model import TaskOutput
        from bench.training.losses import distillation_losses
        from bench.training.stage import label_inputs, model_inputs, run_stage

        weights = parse_mix(self.losses, LOSSES)

        def losses(step: int, batch: Batch) -> tuple[Tensor, dict[str, float]]:
            with torch.no_grad():
                target = teacher(**model_inputs(batch), hidden=True)
            mask, sums = batch["attention_mask"].bool(), dict.fromkeys(weights, target.logits.new_zeros(()))
            for head, states in zip(encoder.heads, target.encoder_hidden[:-1], strict=True):
                output = TaskOutput(head(states, mask))
                parts = distillation_losses(
                    weights, ctx.task.kind, output, target, mask, label_inputs(batch), self.temperature
                )
                sums = {part: sums[part] + loss for part, loss in parts.items()}
            total = torch.stack([weights[part] * loss for part, loss in sums.items()]).sum()
            return total, {part: loss.item() / len(encoder.heads) for part, loss in sums.items()}

        return run_stage(
            self.name,
            losses,
            list(encoder.heads.parameters()),
            self.batches(ctx),
            self.schedule(ctx),
            spec=ctx.spec,
            passes=1,
            seed=ctx.config.seed,
            progress=ctx.progress,
            checkpoint=checkpoint,
        )


def _refuse_below_floor(spec: BackboneSpec, outputs: int, lengths: Mapping[int, int], budget: float) -> None:
    dense = spec.encoder_layers * sum(times * layer_macs(spec, n, n, n) for n, times in lengths.items())
    floor = sum(times * exit_macs(spec, outputs, n)[0] for n, times in lengths.items()) / dense
    if budget < floor:
        raise Unreachable(
            f"one layer and its head, after which every example exits at the earliest, leave {floor:.1%} of the "
            f"encoder's FLOPs, more than the {budget:.1%} asked for"
        )


def _calibrate(encoder: ExitingEncoder, teacher: TaskModel, ctx: RunContext, budget: float) -> tuple[float, float]:
    """Return the threshold that meets the budget on the selection split, and the share of FLOPs that it leaves."""
    import numpy as np
    import torch

    from bench.methods.early_exit_layers import entropy
    from bench.tasks.evaluation import batches
    from bench.tasks.features import collate
    from bench.training.stage import model_inputs

    features = ctx.features["selection"]
    entropies = np.zeros((len(features), len(encoder.heads)))
    with torch.inference_mode():
        for indices in batches(features, _BATCH_SIZE):
            inputs = model_inputs(collate([features[i] for i in indices], ctx.tokenizer.pad_token_id))
            inputs = {name: tensor.to(ctx.device) for name, tensor in inputs.items()}
            hidden = teacher(**inputs, hidden=True).encoder_hidden
            mask = inputs["attention_mask"].bool()
            for i, (head, states) in enumerate(zip(encoder.heads, hidden[:-1], strict=True)):
                entropies[indices, i] = entropy(head(states, mask)).cpu().numpy()
    macs = np.array([exit_macs(ctx.spec, ctx.task.n_outputs, len(feature["input_ids"])) for feature in features])
    dense = ctx.spec.encoder_layers * sum(layer_macs(ctx.spec, n, n, n) for n in ctx.lengths("selection").elements())
    threshold, cost = exit_threshold(entropies, macs, budget * dense)
    return threshold, cost / dense
