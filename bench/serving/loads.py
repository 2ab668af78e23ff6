"""When requests arrive. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bench.errors import ConfigError

Times = NDArray[np.float64]
Share = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Load(ABC):
    """A process of arrivals. Its rates are shares of what the dense model can serve: they mean the same anywhere.

    Attributes
    ----------
    name
        What it is called on the command line.
    """

    name: ClassVar[str]

    @abstractmethod
    def arrivals(self, capacity: float, seconds: float, rng: np.random.Generator) -> Times:
        """Return arrival times in seconds, ascending, all below ``seconds``.

        Parameters
        ----------
        capacity
            Requests a second that the dense model can serve.
        seconds
            How long requests arrive.
        rng
            Where chance comes from.
        """


@dataclass(frozen=True)
class Poisson(Load):
    """Independent arrivals at one rate.

    Attributes
    ----------
    load
        Rate.
    """

    name = "poisson"
    load: Share = 0.7

    def arrivals(self, capacity: float, seconds: float, rng: np.random.Generator) -> Times:
        """Return a Poisson process."""
        return _poisson(self.load * capacity, 0, seconds, rng)


@dataclass(frozen=True)
class Bursty(Load):
    """Two states with exponential stays, a Poisson process in each (a Markov-modulated Poisson process).

    Attributes
    ----------
    low, high
        Rate in the quiet and in the busy state.
    stay
        Mean seconds of a stay in either.
    """

    name = "bursty"
    low: Share = 0.4
    high: Share = 1.4
    stay: Seconds = 3.0

    def __post_init__(self) -> None:
        _ascending(self)

    def arrivals(self, capacity: float, seconds: float, rng: np.random.Generator) -> Times:
        """Return the process from a state that is chosen at random."""
        busy, at, parts = bool(rng.integers(2)), 0.0, []
        while at < seconds:
            end = min(seconds, at + rng.exponential(self.stay))
            parts.append(_poisson((self.high if busy else self.low) * capacity, at, end, rng))
            busy, at = not busy, end
        return np.concatenate(parts)


@dataclass(frozen=True)
class Day(Load):
    """A day's curve, as long as the run: from night over noon to night, a raised cosine.

    Attributes
    ----------
    low, high
        Rate at night and at noon.
    """

    name = "day"
    low: Share = 0.2
    high: Share = 1.4

    def __post_init__(self) -> None:
        _ascending(self)

    def arrivals(self, capacity: float, seconds: float, rng: np.random.Generator) -> Times:
        """Return an inhomogeneous Poisson process, by thinning."""
        times = _poisson(self.high * capacity, 0, seconds, rng)
        rate = self.low + (self.high - self.low) * (1 - np.cos(2 * np.pi * times / seconds)) / 2
        return times[rng.random(len(times)) * self.high < rate]


@dataclass(frozen=True)
class Replay(Load):
    """Arrivals of a file: a number of seconds a line, ascending, from any origin.

    Attributes
    ----------
    file
        Text file; what follows ``#`` is a remark.
    """

    name = "replay"
    file: Path

    def arrivals(self, capacity: float, seconds: float, rng: np.random.Generator) -> Times:
        """Return the times of the file from its first on, neither scaled to the machine nor changed by chance.

        Raises
        ------
        ConfigError
            If the file is missing or holds anything else.
        """
        try:
            times = np.array(
                [
                    float(line)
                    for raw in self.file.read_text("utf-8").splitlines()
                    if (line := raw.partition("#")[0].strip())
                ]
            )
        except OSError as error:
            raise ConfigError(f"cannot read arrivals of {self.file}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{self.file}: arrivals are one number of seconds a line; {error}") from None
        if not len(times) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise ConfigError(f"{self.file}: arrivals are finite seconds in ascending order, at least one")
        times -= times[0]
        return times[times < seconds]


LOADS: dict[str, type[Load]] = {cls.name: cls for cls in (Poisson, Bursty, Day, Replay)}


def _poisson(rate: float, start: float, end: float, rng: np.random.Generator) -> Times:
    return np.sort(rng.uniform(start, end, rng.poisson(rate * (end - start))))


def _ascending(load: Bursty | Day) -> None:
    if load.low > load.high:
        raise ValueError(f"low is {load.low:g} and above high, {load.high:g}")
