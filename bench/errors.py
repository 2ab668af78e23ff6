"""Errors that a person reads: what was wrong, where, what was expected, the nearest right thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class BenchError(Exception):
    """A mistake or a missing thing outside the code; shown without a traceback."""


class ConfigError(BenchError):
    """A run, sweep or task file says something that cannot be meant."""


class DataError(BenchError):
    """A data set is missing, torn, or not what its task declares."""


class BackboneError(BenchError):
    """A checkpoint is missing, torn, or of an unsupported family."""


class PluginError(BenchError):
    """A plugin cannot be read, or does not belong to the given backbone."""


class DamagedResult(BenchError):
    """A stored result is torn or was changed by hand, and can be no witness of its run."""


class MachineError(BenchError):
    """A fault of the machine and not of the run, such as a full disk; the run is ``interrupted``."""


class NoData(DataError, MachineError):
    """A data set cannot be fetched: no network."""


class NoWeights(BackboneError, MachineError):
    """A checkpoint cannot be fetched: no network."""


class Unreachable(BenchError):
    """A ratio asks for a cost that the method cannot reach; the run is skipped with this reason."""


class Diverged(BenchError):
    """A loss became NaN or infinite; the run's status is ``diverged``."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"``, or an empty string where nothing known is near."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not registered.

    Parameters
    ----------
    what
        What kind of thing was named, e.g. ``"task"``.
    name
        The name as it was given.
    known
        Every name that would have been right.
    """
    names = sorted(known)
    return ConfigError(f"unknown {what} '{name}'.{suggest(name, names)} Known: {', '.join(names)}.")


def first_fault(error: ValidationError) -> str:
    """Return the first thing that is wrong with some fields: where it is, and what was expected."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg'].lower()}" if where else first["msg"].lower()
