"""What other packages register through entry points, whatever the kind of thing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Registered(Generic[T]):
    """One thing of another package.

    Attributes
    ----------
    value
        The thing itself.
    origin
        The package that it comes from, with its version.
    """

    value: T
    origin: str


def from_entry_points(
    group: str, kind: str, read: Callable[[str, object], T], taken: Collection[str]
) -> dict[str, Registered[T]]:
    """Return what installed packages register in ``group``, by name.

    What cannot be used is left out with a warning that names the package: somebody else's mistake must not keep anybody
    from working.

    Parameters
    ----------
    group
        Name of the group, such as ``bench.methods``.
    kind
        What the warnings call a thing, such as ``method``.
    read
        Takes the name and the loaded object, and returns the thing; raises where it is none.
    taken
        Names of the built-in things, which nobody replaces.
    """
    found: dict[str, Registered[T]] = {}
    for point in entry_points(group=group):
        origin = _origin(point)
        if point.name in taken or point.name in found:
            whose = found[point.name].origin if point.name in found else "this library"
            problem = f"is left out: the name is taken by {whose}"
        else:
            try:
                found[point.name] = Registered(read(point.name, point.load()), origin)
                continue
            except Exception as error:  # whatever another package's code raises
                problem = f"cannot be loaded and is left out: {error}"
        warnings.warn(f"{kind} '{point.name}' from {origin} {problem}", stacklevel=3)
    return found


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
