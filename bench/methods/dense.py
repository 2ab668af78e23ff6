"""The teacher itself: the reference of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.methods.base import Method

if TYPE_CHECKING:
    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData


@dataclass(frozen=True)
class Dense(Method):
    """The fine-tuned backbone without any compression."""

    name = "dense"
    paper = "-"
    version = 1
    summary = "the teacher: the backbone fine-tuned on the task"
    trains = "nothing beyond the teacher"
    saves = "nothing"
    frozen = True
    uses = frozenset()

    def in_parts(self) -> bool:
        """Return that the backbone is only run."""
        return True

    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Return the teacher's model."""
        return teacher.model
