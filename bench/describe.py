"""Descriptions of every key and method, read from the code that defines them. Imports no torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bench.config import RunConfig
from bench.registry import methods


def attributes(cls: type) -> dict[str, str]:
    """Return attribute -> description from the ``Attributes`` sections of a class and its bases, in NumPy style."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _attributes(base)
    return found


def _attributes(cls: type) -> dict[str, str]:
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    try:
        start = lines.index("Attributes") + 2
    except ValueError:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[start:]:
        if line and not line.startswith(" "):
            if not re.fullmatch(r"[\w, ]+", line):
                break
            names = [name.strip() for name in line.split(",")]
        elif names and line.strip():
            for name in names:
                found[name] = f"{found.get(name, '')} {line.strip()}".strip().replace("``", "")
    return found


@dataclass(frozen=True)
class Key:
    """One thing that a run may set.

    Attributes
    ----------
    name
        What it is called in sweeps and on the command line.
    defaults
        Who reads it -> the default there: ``run``, or the methods that have an option of this name and meaning.
    text
        What it means.
    """

    name: str
    defaults: Mapping[str, object]
    text: str

    @property
    def readers(self) -> str:
        """Who reads it, in words."""
        training = {name for name, cls in methods().items() if "steps" in cls.uses}
        others = sorted(training - set(self.defaults))
        if len(self.defaults) < 2 or not set(self.defaults) <= training or len(others) > 2:
            return ", ".join(self.defaults)
        return "every method that trains" + (f" but {' and '.join(others)}" if others else "")

    @property
    def default(self) -> str:
        """The default that most readers share, then each that differs: ``0.0001; variator 0.001``."""
        readers: dict[str, list[str]] = {}
        for reader, default in self.defaults.items():
            readers.setdefault("" if default is None else str(default), []).append(reader)
        (usual, _), *others = sorted(readers.items(), key=lambda item: -len(item[1]))
        return "; ".join([usual, *(f"{', '.join(names)} {default}" for default, names in others)])


def keys() -> list[Key]:
    """Return everything that a run may set: its own fields, what several methods read, what one reads.

    A key that means the same in several methods is one; one that means something else in another method is two.
    """
    found: dict[tuple[str, str], dict[str, object]] = {}
    text = attributes(RunConfig)
    for name, field in RunConfig.model_fields.items():
        if name != "options":
            found[name, text.get(name, "")] = {"run": field.default}
    for method, cls in methods().items():
        text = attributes(cls)
        for option, default in cls.options().items():
            found.setdefault((option, text.get(option, "")), {})[method] = default
    known = [Key(name, defaults, text) for (name, text), defaults in found.items()]
    # a stable sort, which keeps the order of the fields within each part
    return sorted(known, key=lambda key: ("run" not in key.defaults, len(key.defaults) == 1))
