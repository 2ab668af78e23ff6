"""What a method is. Imports no torch at run time, so that listing and planning are instant."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter, ValidationError

from bench.backbones.spec import BackboneSpec
from bench.errors import ConfigError
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from bench.backbones.model import TaskModel
    from bench.context import RunContext, Teacher
    from bench.tasks.data import TaskData


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(gt=0)]
"""Ranges of hyper-parameters; pydantic checks them when a method is built from options."""

TOLERANCE = 0.02
"""Largest relative distance of achieved from requested remaining FLOPs for which no reason is needed."""


@functools.cache
def _adapter(cls: type[Method]) -> TypeAdapter[Method]:
    return TypeAdapter(cls)


@dataclass(frozen=True)
class Work:
    """One training that a method will do, as a plan sees it.

    Attributes
    ----------
    name
        Name of the stage.
    steps, batch_size
        Optimiser steps and examples per step.
    tokens
        Tokens per example; ``None`` for the task's own mean length.
    shared
        Whether other tasks find the same artifact.
    passes
        Cost of a step in encoder forward passes (3 for plain training, 4 with a teacher's forward pass).
    """

    name: str
    steps: int
    batch_size: int
    tokens: int | None = None
    shared: bool = False
    passes: int = 4


@dataclass(frozen=True)
class Setting:
    """What a ratio means for one method on one backbone.

    Attributes
    ----------
    knob
        The method's native setting, for plans and results.
    remaining
        Encoder FLOPs that will remain, by arithmetic.
    added
        Parameters that the method adds, where arithmetic tells.
    note
        Why ``remaining`` is not what the ratio asks for; empty where it is.
    """

    knob: dict[str, Any]
    remaining: float = 1.0
    added: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Method(ABC):
    """A way to make a model cheaper. The fields of the subclass are its hyper-parameters.

    Attributes
    ----------
    name, paper, version
        Name in sweeps, source, and a number that is raised whenever a change alters results.
    summary, trains, saves
        One line each for the catalogue.
    knob
        What a ratio turns, in a few words for the catalogue; empty where it turns nothing.
    frozen
        Whether the backbone's weights stay the teacher's own: every parameter of the compressed model is shared with
        the teacher or lies in an ``Overhead`` module.
    batch_invariant
        Whether an answer is, but for float rounding, independent of padding and of the other examples in the batch.
    uses
        Which of the run's budget fields (``ratio``, ``steps``, ``batch_size``) the method reads; the others take
        no part in a run's identity.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    trains: ClassVar[str]
    saves: ClassVar[str]
    knob: ClassVar[str] = ""
    frozen: ClassVar[bool] = False
    batch_invariant: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"ratio", "steps", "batch_size"})

    def reads(self) -> frozenset[str]:
        """Return which of ``uses`` are read with these settings; the others take no part in this run's identity."""
        return self.uses

    def in_parts(self) -> bool:
        """Return whether it may train while the backbone lies in parts on several devices (`bench.training.sharding`).

        It may if it only runs the backbone's matrices, and neither reads nor changes their weights.
        """
        return False

    def skip(self, backbone: BackboneSpec, task: TaskSpec, ratio: float | None) -> str | None:
        """Return the reason why this cell cannot be run, or ``None``."""
        return None

    def setting(self, backbone: BackboneSpec, ratio: float | None, lengths: Mapping[int, int]) -> Setting:
        """Return the native setting that ``ratio`` stands for.

        Parameters
        ----------
        backbone
            Shape of the backbone.
        ratio
            As in a `RunConfig`; ``bench.measure.closed_form.remaining`` turns it into a budget.
        lengths
            Number of tokens -> number of examples, of the selection split; a plan has one length.

        Raises
        ------
        Unreachable
            If the budget lies below what the method can reach.
        """
        return Setting({}, added=0)

    def work(self, steps: int, batch_size: int) -> list[Work]:
        """Return the trainings that ``compress`` will do."""
        return []

    def version_on(self, family: str) -> int:
        """Return the version of what is computed on a family.

        A change that touches one family, or some options, raises it there alone, and all other runs keep their names.
        """
        return self.version

    def identity(self, data_root: Path | None) -> dict[str, Any]:
        """Return what of the method's settings and further inputs can change the number."""
        return dataclasses.asdict(self)

    @abstractmethod
    def compress(self, teacher: Teacher, data: TaskData, ctx: RunContext) -> TaskModel:
        """Train whatever the method trains and return a module that is called like the teacher.

        The saving is executed, not masked: FLOPs and latency are measured on the returned module. The teacher must not
        be changed.
        """

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Return the hyper-parameters with their defaults."""
        return {f.name: f.default for f in dataclasses.fields(cls)}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Method:
        """Build the method, checking types.

        Raises
        ------
        ConfigError
            If a value has the wrong type.
        """
        try:
            return _adapter(cls).validate_python(options)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{cls.name}: {where} = {first['input']!r}: {first['msg'].lower()}") from None
