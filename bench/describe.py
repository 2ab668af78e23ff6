"""One-line descriptions of every key, read from the docstrings that define them. Imports no torch."""

from __future__ import annotations

import inspect
import re

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


def keys() -> list[tuple[str, str, object, str]]:
    """Return (key, who reads it, default, description) of everything that a run may set."""
    text = attributes(RunConfig)
    rows: list[tuple[str, str, object, str]] = [
        (name, "run", field.default, text.get(name, ""))
        for name, field in RunConfig.model_fields.items()
        if name != "options"
    ]
    for name, cls in methods().items():
        text = attributes(cls)
        rows += [(option, name, default, text.get(option, "")) for option, default in cls.options().items()]
    return rows
