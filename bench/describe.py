"""Descriptions of every key and method, read from the code that defines them. Imports no torch."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.backbones.catalogue import spec_of
from bench.config import RunConfig
from bench.methods.base import Method
from bench.registry import methods
from bench.tasks.catalogue import TASKS
from bench.tasks.spec import Kind, TaskSpec


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


EXAMPLES: dict[Kind, TaskSpec] = {
    "single": TASKS["sst2"],
    "regression": TASKS["sst2"].model_copy(update={"kind": "regression"}),
    "qa": TASKS["squad"],
}
"""A task of each kind, to ask a method what it refuses."""

_BACKBONES = ("bert-base-uncased", "t5-base", "flan-t5-base")


@dataclass(frozen=True)
class Entry:
    """What the catalogue says of a method.

    Attributes
    ----------
    name, summary, knob, trains, saves, paper
        As the method has them.
    families
        The families of backbones that it runs on.
    limits
        Where it does not, with its reason: ``not qa: ...``.
    """

    name: str
    summary: str
    families: tuple[str, ...]
    limits: tuple[str, ...]
    knob: str
    trains: str
    saves: str
    paper: str

    @classmethod
    def of(cls, method: type[Method]) -> Entry:
        """Ask a method what it is, and at k = 4 what it refuses."""
        families: dict[str, None] = {}
        refused: dict[str, list[tuple[str, Kind]]] = {}
        for name in _BACKBONES:
            spec = spec_of(name)
            for kind, task in EXAMPLES.items():
                if reason := method().skip(spec, task, 4):
                    refused.setdefault(reason, []).append((name, kind))
                else:
                    families[spec.family] = None
        return cls(
            method.name,
            method.summary,
            tuple(families),
            tuple(f"not {_where(cells)}: {reason}" for reason, cells in refused.items()),
            method.knob,
            method.trains,
            method.saves,
            method.paper,
        )


def _where(cells: list[tuple[str, Kind]]) -> str:
    """Name the kinds of task and the backbones of some cells, either only if it is not every one."""
    names, kinds = dict.fromkeys(name for name, _ in cells), dict.fromkeys(kind for _, kind in cells)
    parts = [", ".join(kinds)] if len(kinds) < len(EXAMPLES) else []
    parts += [", ".join(names)] if len(names) < len(_BACKBONES) else []
    return " on ".join(parts) or "anything"


def catalogue() -> list[Entry]:
    """Return what there is to say of every method."""
    return [Entry.of(cls) for cls in methods().values()]


def methods_table() -> str:
    """Return the catalogue as a Markdown table, and below it what each method refuses."""
    head = ("method", "what it does", "ratio sets", "trains", "saves", "runs on", "paper")
    entries = catalogue()
    rows = [
        (f"`{e.name}`", e.summary, e.knob or "–", e.trains, e.saves, ", ".join(e.families), e.paper.strip("-") or "–")
        for e in entries
    ]
    limits = [f"- `{entry.name}`, {limit}" for entry in entries for limit in entry.limits]
    return "\n".join([_markdown(head, rows), "", *limits]).strip()


def settings_table() -> str:
    """Return a Markdown table of the rates that each method trains at, and of what its model shares and depends on."""
    head = ("method", "learning rates", "shares the teacher's weights, whatever its options", "an answer depends on")
    rows = []
    for name, cls in methods().items():
        rates = [f"`{key}` {value}" for key, value in cls.options().items() if key == "lr" or key.endswith("_lr")]
        depends = "its input" if cls.batch_invariant else "its batch"
        rows.append((f"`{name}`", ", ".join(rates) or "–", "yes" if cls.frozen else "no", depends))
    return _markdown(head, rows)


def fill(text: str) -> str:
    """Return a document with each table between its markers, ``<!-- methods -->`` and the like, made anew."""
    for name, table in (("methods", methods_table()), ("settings", settings_table())):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, marker, rest = text.partition(begin)
        if marker:
            text = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(fill(path.read_text("utf-8")), "utf-8")
