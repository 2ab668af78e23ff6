"""Methods that break one promise each; ``fails`` names the tests of the suite that must find it, and no other may."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.measure.closed_form import remaining
from bench.methods.base import Method, Setting
from bench.methods.trained import TrainedMethod

COST = "test_it_costs_what_the_ratio_asks_for"
SEED = "test_a_seed_decides_all"
ELSEWHERE = "test_another_process_reads_the_same"


@dataclass(frozen=True)
class Faultless(Method):
    """Keeps every promise at no saving."""

    name = "faultless"
    paper = "-"
    version = 1
    summary = trains = saves = "nothing"
    uses = frozenset()
    fails: ClassVar[frozenset[str]] = frozenset()

    def compress(self, teacher: Any, data: Any, ctx: Any) -> Any:
        from bench.backbones.write_out import write_out

        return self.change(write_out(teacher.model), teacher, ctx)

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        return model


@dataclass(frozen=True)
class Masks(Faultless):
    """Multiplies by zero what it claims to have removed."""

    name = "masks"
    uses = frozenset({"ratio"})
    knob = "layers without an FFN"
    fails = frozenset({COST})

    def skip(self, backbone: Any, task: Any, ratio: float | None) -> str | None:
        return None if ratio and ratio >= 2 and ratio == int(ratio) else "no budget"

    def setting(self, backbone: Any, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        return Setting({"layers": 3}, remaining(backbone, int(ratio or 0), lengths), added=0)

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        from tests.bench.testing.faulty_layers import Masked, wrap

        return wrap(model, Masked, 3)


@dataclass(frozen=True)
class OffBudget(Masks):
    """Costs something else than it was asked for, says so in numbers and gives no reason."""

    name = "off_budget"

    def setting(self, backbone: Any, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        return Setting({"layers": 3}, 0.75, added=0)

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        from bench.backbones.write_out import written_encoder

        del written_encoder(model).layers[-1]
        return model


@dataclass(frozen=True)
class MovesTheTeacher(Faultless):
    """Leaves the teacher with other weights."""

    name = "moves_the_teacher"
    fails = frozenset({"test_the_teacher_is_untouched"})

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        from bench.training.student import own_copy

        ctx.bytes_added = 1
        model = own_copy(teacher.model).requires_grad_(False)
        next(teacher.model.parameters()).add_(1e-3)
        return model


@dataclass(frozen=True)
class LeavesAHook(Faultless):
    """Forgets a hook in the teacher."""

    name = "leaves_a_hook"
    fails = frozenset({"test_the_teacher_is_untouched"})

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        teacher.model.register_forward_hook(lambda *_: None)
        return model


@dataclass(frozen=True)
class SeesPadding(Faultless):
    """Averages over padding too."""

    name = "sees_padding"
    fails = frozenset({"test_an_answer_does_not_depend_on_its_batch"})

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        from tests.bench.testing.faulty_layers import MeanOfAll, wrap

        return wrap(model, MeanOfAll)


@dataclass(frozen=True)
class Draws(Faultless):
    """Draws a number at evaluation."""

    name = "draws"
    fails = frozenset({"test_it_answers_twice_the_same"})

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        from tests.bench.testing.faulty_layers import Noisy, wrap

        return wrap(model, Noisy)


@dataclass(frozen=True)
class LeavesGradients(Faultless):
    """Returns a model that still asks for gradients."""

    name = "leaves_gradients"
    fails = frozenset({"test_no_gradients_are_left"})

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        from bench.training.student import own_copy

        ctx.bytes_added = 1
        return own_copy(teacher.model)


@dataclass(frozen=True)
class FrozenInName(Faultless):
    """Says that it shares the backbone, and copies it."""

    name = "frozen_in_name"
    frozen = True
    fails = frozenset({"test_a_frozen_backbone_is_the_teachers_own"})

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        from bench.training.student import own_copy

        ctx.bytes_added = 1
        return own_copy(teacher.model).requires_grad_(False)


@dataclass(frozen=True)
class StoresNothing(Faultless):
    """Has weights of its own, which it says take no bytes."""

    name = "stores_nothing"
    fails = frozenset({"test_what_it_adds_is_stored"})

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        from bench.training.student import own_copy

        return own_copy(teacher.model).requires_grad_(False)


@dataclass(frozen=True)
class HidesStates(Faultless):
    """Takes ``hidden=True`` and gives no hidden states."""

    name = "hides_states"
    fails = frozenset({"test_it_is_called_like_the_teacher"})

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        from tests.bench.testing.faulty_layers import Silent

        return Silent(model)


@dataclass(frozen=True)
class NeedsSteps(Faultless):
    """Divides by the number of steps."""

    name = "needs_steps"
    uses = frozenset({"steps"})
    fails = frozenset({"test_it_runs_without_steps"})

    def change(self, model: Any, teacher: Any, ctx: Any) -> Any:
        assert 1 / ctx.config.steps
        return model


@dataclass(frozen=True)
class RefusesSilently(Faultless):
    """Refuses what it does not like without a word."""

    name = "refuses_silently"
    fails = frozenset({"test_it_refuses_a_cell_with_a_reason"})

    def skip(self, backbone: Any, task: Any, ratio: float | None) -> str | None:
        return "" if ratio and ratio > 60 else None


@dataclass(frozen=True)
class RefusesAll(Faultless):
    """Passes whatever is skipped."""

    name = "refuses_all"
    fails = frozenset({"test_it_runs_on_some_backbone"})

    def skip(self, backbone: Any, task: Any, ratio: float | None) -> str | None:
        return "not today"


@dataclass(frozen=True)
class Undescribed(Faultless):
    """Has an option that nobody explains."""

    name = "undescribed"
    fails = frozenset({"test_it_says_what_it_is"})

    width: int = 3


@dataclass(frozen=True)
class Untyped(Faultless):
    """Has an option that takes anything.

    Attributes
    ----------
    width
        How wide.
    """

    name = "untyped"
    fails = frozenset({"test_its_options_build_it"})

    width: Any = 3


@dataclass(frozen=True)
class Trained(TrainedMethod):
    """Trains all weights, keeps them, and keeps every promise."""

    name = "trained"
    paper = "-"
    version = 1
    summary = trains = saves = "nothing"
    uses = frozenset({"steps", "batch_size"})
    fails: ClassVar[frozenset[str]] = frozenset()

    def compress(self, teacher: Any, data: Any, ctx: Any) -> Any:
        from bench.training.student import get_student, own_copy

        model = get_student(teacher, ctx, lambda _: own_copy(teacher.model), lambda path: self.make(teacher, ctx, path))
        ctx.trained_parameters = sum(p.numel() for p in model.parameters())
        return model

    def make(self, teacher: Any, ctx: Any, checkpoint: Path) -> tuple[Any, dict[str, Any]]:
        from bench.training.student import own_copy

        student, stages = own_copy(teacher.model).train(), []
        if ctx.config.steps:
            parameters = list(student.parameters())
            batches = self.batches(ctx)
            stages.append(self.distill("fit", student, parameters, teacher.model, batches, ctx, checkpoint))
        return student, {"stages": stages}


@dataclass(frozen=True)
class Miscounts(Trained):
    """Says that it trained one parameter."""

    name = "miscounts"
    fails = frozenset({"test_it_trains_what_it_says"})

    def compress(self, teacher: Any, data: Any, ctx: Any) -> Any:
        model = super().compress(teacher, data, ctx)
        ctx.trained_parameters = 1
        return model


@dataclass(frozen=True)
class Overtrains(Trained):
    """Trains one step more than the run has."""

    name = "overtrains"
    fails = frozenset({"test_it_trains_as_long_as_it_says"})

    def make(self, teacher: Any, ctx: Any, checkpoint: Path) -> tuple[Any, dict[str, Any]]:
        config, ctx.config = ctx.config, ctx.config.model_copy(update={"steps": ctx.config.steps + 1})
        try:
            return super().make(teacher, ctx, checkpoint)
        finally:
            ctx.config = config


@dataclass(frozen=True)
class Unseeded(Trained):
    """Starts from noise that no seed decides, and keeps what it made."""

    name = "unseeded"
    fails = frozenset({SEED})

    def make(self, teacher: Any, ctx: Any, checkpoint: Path) -> tuple[Any, dict[str, Any]]:
        import torch

        student, notes = super().make(teacher, ctx, checkpoint)
        noise = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.01)
        return student, notes


@dataclass(frozen=True)
class TrainsAgain(Trained):
    """Trains in every run, and keeps nothing."""

    name = "trains_again"
    fails = frozenset({"test_it_comes_back_from_the_cache"})

    def compress(self, teacher: Any, data: Any, ctx: Any) -> Any:
        from bench.results import TrainingStage

        model, notes = self.make(teacher, ctx, ctx.cache.root / "none.pt")
        ctx.stages += [TrainingStage(**stage, artifact="none", cached=False) for stage in notes["stages"]]
        ctx.trained_parameters, ctx.bytes_added = sum(p.numel() for p in model.parameters()), 1
        return model.eval().requires_grad_(False)


_MEMORY: dict[str, Any] = {}


@dataclass(frozen=True)
class Remembers(Trained):
    """Keeps what it made in the memory of the process, from a start that only the process knows."""

    name = "remembers"
    fails = frozenset({ELSEWHERE, SEED})

    def compress(self, teacher: Any, data: Any, ctx: Any) -> Any:
        import torch

        model = super().compress(teacher, data, ctx)
        scale = _MEMORY.setdefault("scale", 1 + random.SystemRandom().random())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        return model


@dataclass(frozen=True)
class SameForAllSeeds(Trained):
    """Ignores the run's seed."""

    name = "same_for_all_seeds"
    fails = frozenset({"test_another_seed_gives_another_model"})

    def make(self, teacher: Any, ctx: Any, checkpoint: Path) -> tuple[Any, dict[str, Any]]:
        config, ctx.config = ctx.config, ctx.config.model_copy(update={"seed": 7})
        try:
            return super().make(teacher, ctx, checkpoint)
        finally:
            ctx.config = config


def every() -> dict[str, type[Any]]:
    """Return the methods here by name."""
    found = [cls for cls in globals().values() if isinstance(cls, type) and "fails" in dir(cls)]
    return {cls.name: cls for cls in found}
