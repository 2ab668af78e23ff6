"""Which k the next batch is run at. Imports no torch; a policy decides in microseconds."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bench.entry_points import Registered, from_entry_points
from bench.errors import ConfigError

POLICY_GROUP = "bench.policies"


@dataclass(frozen=True)
class View:
    """What a policy sees when a batch is about to start.

    Attributes
    ----------
    now
        Seconds since the load began.
    arrived
        When each waiting request arrived, oldest first; the batch is made of the first of them, (waiting,).
    lengths
        Their lengths in tokens, (waiting,).
    ks
        What can be chosen, ascending; 1, the dense model, is the first.
    last
        What the batch before was run at; at first 1.
    max_batch
        Most requests of a batch.
    deadline
        Seconds that a request may take from its arrival to its answer.
    replicas
        How many models serve this queue.
    seconds
        ``seconds(k, sizes, lengths)`` are the measured times of batches of those sizes, padded to those lengths.
    """

    now: float
    arrived: NDArray[np.float64]
    lengths: NDArray[np.int64]
    ks: tuple[int, ...]
    last: int
    max_batch: int
    deadline: float
    replicas: int
    seconds: Callable[[int, NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Policy(ABC):
    """A way to choose k for each batch. The fields of the subclass are its settings.

    Attributes
    ----------
    name
        What it is called on the command line.
    """

    name: ClassVar[str]

    @abstractmethod
    def choose(self, view: View) -> int:
        """Return one of ``view.ks``."""


@dataclass(frozen=True)
class Static(Policy):
    """The same k whatever the load.

    Attributes
    ----------
    k
        That k.
    """

    name = "static"
    k: Annotated[int, Field(ge=1)] = 1

    def choose(self, view: View) -> int:
        """Return the k.

        Raises
        ------
        ConfigError
            If the model has no such k.
        """
        if self.k not in view.ks:
            raise ConfigError(f"policy static:{self.k}: the model serves k = {', '.join(map(str, view.ks))}")
        return self.k


@dataclass(frozen=True)
class QueueLength(Policy):
    """One step faster when many requests wait, one step slower when few do; between the two nothing changes.

    Attributes
    ----------
    up
        Full batches that wait, at which the next larger k is taken.
    down
        Full batches that wait, up to which the next smaller k is taken; the gap to ``up`` is the hysteresis.
    """

    name = "queue"
    up: Annotated[float, Field(gt=0)] = 1.0
    down: Annotated[float, Field(ge=0)] = 0.25

    def __post_init__(self) -> None:
        if self.down >= self.up:
            raise ValueError(f"down is {self.down:g} and must be below up, {self.up:g}")

    def choose(self, view: View) -> int:
        """Return a neighbour of the last k, or the last k."""
        waiting = len(view.arrived) / (view.max_batch * view.replicas)
        step = (waiting >= self.up) - (waiting <= self.down)
        at = view.ks.index(view.last) + step
        return view.ks[min(max(at, 0), len(view.ks) - 1)]


@dataclass(frozen=True)
class Deadline(Policy):
    """The smallest k at which everything that waits would be answered in time, by the measured service times.

    Attributes
    ----------
    margin
        Share of the deadline that is kept free: measured times are medians, and what arrives while a batch runs waits
        for all of it.
    """

    name = "deadline"
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def choose(self, view: View) -> int:
        """Return the smallest k that is quick enough, or the largest where none is."""
        starts = np.arange(0, len(view.arrived), view.max_batch)
        sizes = np.diff(starts, append=len(view.arrived))
        lengths = np.maximum.reduceat(view.lengths, starts)
        # the batches of the queue, each as late as its first request allows
        allowed = view.arrived[starts] + view.deadline * (1 - self.margin) - view.now
        for k in view.ks[:-1]:
            own = view.seconds(k, sizes, lengths)
            # a batch waits for its share of those before it, and then takes its whole time
            if ((np.cumsum(own) - own) / view.replicas + own <= allowed).all():
                return k
        return view.ks[-1]


def choose(policy: Policy, view: View) -> int:
    """Return what ``policy`` chooses.

    Raises
    ------
    ConfigError
        If it chooses what there is not.
    """
    k = policy.choose(view)
    if k not in view.ks:
        raise ConfigError(f"policy {policy.name} chose k = {k}; it can choose {', '.join(map(str, view.ks))}")
    return view.ks[view.ks.index(k)]  # as an int, whatever number it was


_BUILT_IN: dict[str, type[Policy]] = {cls.name: cls for cls in (Static, QueueLength, Deadline)}


@functools.cache
def registered_policies() -> dict[str, Registered[type[Policy]]]:
    """Return the policies of other packages by name, each with its origin."""
    return from_entry_points(POLICY_GROUP, "policy", _read, _BUILT_IN)


def policies() -> dict[str, type[Policy]]:
    """Return every policy by name."""
    return _BUILT_IN | {name: found.value for name, found in registered_policies().items()}


def _read(name: str, found: object) -> type[Policy]:
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise TypeError(f"{found!r} is no subclass of bench.serving.policies.Policy")
    if inspect.isabstract(found):
        raise TypeError(f"{found!r} has no method choose")
    if getattr(found, "name", None) != name:  # results name the policy, and a command made of one must find it
        raise ValueError(f"its name is {getattr(found, 'name', None)!r}; give the entry point the same name")
    return found
