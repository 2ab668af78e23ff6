"""What every method that trains against the teacher has in common: one recipe, one budget of steps and examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.methods.base import Method, NonNegative, Positive, Share, Work
from bench.training.mix import parse_mix

if TYPE_CHECKING:
    from torch import Tensor

    from bench.backbones.model import TaskModel
    from bench.context import RunContext
    from bench.training.loop import Schedule, Trained
    from bench.training.stage import Batch, FeatureBatches


@dataclass(frozen=True)
class TrainedMethod(Method):
    """A method that is trained on the task against the teacher, with the run's ``steps`` and ``batch_size``.

    Attributes
    ----------
    lr
        Peak learning rate on the task.
    decay
        Learning rate on the task after the warm-up: ``linear`` or ``cosine`` to zero, or ``constant``.
    warmup
        Share of a stage's steps over which the learning rate rises.
    weight_decay
        AdamW's weight decay.
    clip
        Largest gradient norm.
    losses
        Mix of loss parts on the task; ``bench.training.losses`` says what each is.
    temperature
        Temperature of the ``logits`` part.
    """

    lr: Positive = 1e-4
    decay: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Share = 0.05
    weight_decay: NonNegative = 0.01
    clip: Positive = 1.0
    losses: str = "all_hidden=1,logits=1,task=0.5"
    temperature: Positive = 2.0

    def __post_init__(self) -> None:
        parse_mix(self.losses)

    def work(self, steps: int, batch_size: int) -> list[Work]:
        """Return one training with the run's steps."""
        return [Work(self.name, steps, batch_size)] if steps else []

    def batches(self, ctx: RunContext) -> FeatureBatches:
        """Return the training batches, the same for every method of one seed."""
        from bench.training.stage import FeatureBatches

        size, pad = ctx.config.batch_size, ctx.tokenizer.pad_token_id
        return FeatureBatches(ctx.features["train"], size, pad, ctx.config.seed, ctx.device)

    def schedule(self, ctx: RunContext, steps: int | None = None) -> Schedule:
        """Return the optimisation of a stage of ``steps`` steps; all of the run's by default."""
        from bench.training.loop import Schedule

        steps = ctx.config.steps if steps is None else steps
        return Schedule(
            steps=steps,
            lr=self.lr,
            warmup=round(self.warmup * steps),
            decay=self.decay,
            weight_decay=self.weight_decay,
            clip=self.clip,
            precision=ctx.config.precision,
        )

    def distill(
        self,
        name: str,
        student: TaskModel,
        trained: Trained,
        teacher: TaskModel,
        batches: FeatureBatches,
        ctx: RunContext,
        checkpoint: Path,
        *,
        steps: int | None = None,
        layers: Sequence[int] | None = None,
        penalty: Callable[[int, Batch], tuple[Tensor, dict[str, float]]] | None = None,
    ) -> dict[str, Any]:
        """Train a stage by this recipe; see `bench.training.distill.distill`.

        Parameters
        ----------
        name, student, trained, teacher, batches, ctx, checkpoint, layers, penalty
            As there.
        steps
            Steps of this stage; all of the run's by default.
        """
        from bench.training.distill import distill

        return distill(
            name,
            student,
            trained,
            teacher,
            batches,
            mix=self.losses,
            kind=ctx.task.kind,
            temperature=self.temperature,
            schedule=self.schedule(ctx, steps),
            ctx=ctx,
            checkpoint=checkpoint,
            layers=layers,
            penalty=penalty,
        )
