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
from bench.measure.closed_form import (
    PluginShape,
    backbone_parameters,
    decoder,
    encoder,
    layer_macs,
    plugin_parameters,
    remaining,
)
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


_CLAIMED, _TOKENS = "t5-base", 128
"""The backbone that the paper's "53 %" is about, and the tokens that it is reckoned with here."""


def arithmetic_table() -> str:
    """Return a Markdown table of what one encoder layer of T5-base multiplies, dense and with a plugin at k = 4."""
    spec, n, k = spec_of(_CLAIMED), _TOKENS, 4
    d, m = spec.d_model, n // k
    dense, short = layer_macs(spec, n, n, n), layer_macs(spec, n, n, m)
    attention = layer_macs(spec, n, n, 0)
    own = {form: _own_macs(PluginShape(k, form=form)) for form in ("concat", "split")}
    merging = m * k * k * d + n * d
    rows: dict[str, tuple[int, int, int]] = {
        "attention: 4nd² + 2n²d": (attention, attention, attention),
        "FFN: 2ndf, with a plugin 2mdf": (dense - attention, short - attention, short - attention),
        "merging: nkd + nd": (0, merging, merging),
        "expanding: 3ndr, split (m + 2n)dr": (0, own["concat"] - merging, own["split"] - merging),
        "**sum**": (dense, short + own["concat"], short + own["split"]),
    }
    shares = [1.0, *((short + own[form]) / dense for form in ("concat", "split"))]
    lines = [(name, *(f"{macs:,}" for macs in numbers)) for name, numbers in rows.items()]
    lines += [("**remaining**", *(f"**{share:.1%}**" for share in shares))]
    lines += [("**saved**", *(f"**{1 - share:.1%}**" for share in shares))]
    return _markdown(("", "dense", "k = 4, released form", "k = 4, split form"), lines, numbers=3)


def _own_macs(plugin: PluginShape) -> int:
    """Return what a plugin multiplies in one encoder layer of T5-base."""
    spec = spec_of(_CLAIMED)
    return encoder(spec, _TOKENS, plugin=plugin).overhead // (2 * spec.encoder_layers)


def shares_table() -> str:
    """Return a Markdown table of what remains of T5-base, and is saved, with a plugin at each k."""
    spec, n = spec_of(_CLAIMED), _TOKENS
    rest, whole = decoder(spec, 2, n).decoder, backbone_parameters(spec)
    rows = []
    for k in (2, 4, 8, 16):
        cells = [str(k)]
        for form in ("concat", "split"):
            share = remaining(spec, k, {n: 1}, form=form)
            cells += [f"{share:.1%}", f"{1 - share:.1%}"]
        saved = encoder(spec, n).encoder - encoder(spec, n, plugin=PluginShape(k)).encoder
        cells += [f"{saved / (encoder(spec, n).encoder + rest):.1%}"]
        cells += [f"{plugin_parameters(spec.d_model, spec.encoder_layers, PluginShape(k)) / whole:.2%}"]
        rows.append(cells)
    head = ("k", "released form: remaining", "saved", "split form: remaining", "saved", "whole model: saved", "plugin")
    return _markdown(head, rows, numbers=6)


def fill(text: str) -> str:
    """Return a document with each table between its markers, ``<!-- methods -->`` and the like, made anew."""
    tables = {
        "methods": methods_table,
        "settings": settings_table,
        "arithmetic": arithmetic_table,
        "shares": shares_table,
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, marker, rest = text.partition(begin)
        if marker:
            text = f"{before}{begin}\n\n{table()}\n\n{end}{rest.partition(end)[2]}"
    return text


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Return a Markdown table whose last columns, as many as ``numbers``, are aligned to the right."""
    lines = [head, [*["---"] * (len(head) - numbers), *["---:"] * numbers], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(fill(path.read_text("utf-8")), "utf-8")
