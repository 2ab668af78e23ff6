"""Every key, every method's settings and every command, read from the code that defines them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

import click
from pydantic import TypeAdapter

import analysis.__main__
from bench.backbones.spec import FAMILIES
from bench.cli import main
from bench.cli.keys import KeyOption
from bench.config import RECIPES, RunConfig
from bench.describe import Key, attributes, keys
from bench.methods.base import Method
from bench.registry import methods

AS = {
    "task": "as what it says and a digest of its data, not by name",
    "backbone": "as a digest or revision of its weights, not by name",
    "recipe": "as what it sets",
    "options": "each by itself, see below",
}
"""Fields that are in the identity as something else than their value."""


def pages() -> dict[str, str]:
    """Return source path -> Markdown."""
    return {
        "reference/config.md": config_page(),
        "reference/methods.md": methods_page(),
        "reference/cli.md": cli_page(),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; what a cell holds of the syntax, outside of code, is escaped."""
    lines = [head, ["---"] * len(head), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    parts = re.split(r"(`[^`]*`)", text.replace("\n", " "))
    return "".join(part if part.startswith("`") else part.replace("|", "\\|").replace("<", "&lt;") for part in parts)


def kind(annotation: Any) -> str:
    """Say what values a type takes: ``int > 0 or none``."""
    schema = TypeAdapter(annotation).json_schema()
    options = schema.get("anyOf", [schema])
    said = [_kind(option) for option in options if option.get("type") != "null"]
    return " or ".join([*said, *["none"] * (len(said) < len(options))])


def _kind(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    names = {"integer": "int", "number": "float", "string": "text", "boolean": "bool"}
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[name]}" for name, sign in bounds.items() if name in schema]
    return " ".join([names.get(schema["type"], schema["type"]), *limits])


def value(default: object) -> str:
    """Return a default as it is typed on the command line."""
    return "none" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"


def linked(text: str) -> str:
    """Return a docstring's text with its commands and names in code."""
    return re.sub(r"\b(bench\.[a-z_.]+[a-z]|bench list \w+)\b", r"`\1`", text.replace("`", ""))


# --- keys ---


def config_page() -> str:
    """Return the page of every key of a run."""
    text = attributes(RunConfig)
    hints = get_type_hints(RunConfig, include_extras=True)
    rows = [
        (
            f"`{name}`",
            kind(_annotated(hints[name], field)),
            value(field.default),
            linked(text[name]),
            readers(name),
            identified(name),
        )
        for name, field in RunConfig.model_fields.items()
        if name != "options"
    ]
    shared = [key for key in keys() if "run" not in key.defaults]
    own = [(f"`{key.name}`", _defaults(key), linked(key.text), _who(key)) for key in shared]
    recipes = [
        (f"`{name}`", ", ".join(f"`{k}={value(v).strip('`')}`" for k, v in sets.items()) or "the defaults above")
        for name, sets in RECIPES.items()
    ]
    return f"""---
hide: [toc]
---

# Configuration

Every key may stand in a sweep file (`train_examples: 8000`) and on the command line (`--train-examples 8000`).
Precedence: defaults, recipe, sweep file, command line. A key that nothing knows is an error
which names the nearest one.

The last column says whether the value is part of a run's **identity**, the hash that names its result: whatever can
change the number is, and nothing else. Folders, device, jobs and trackers are not.
*Where it is read*: in the runs that use it, and in no other.

## Keys of a run

{table(("key", "values", "default", "meaning", "read by", "in the identity"), rows)}

## Options of methods

A sweep over several methods may set an option for all; those that do not know it ignore it. What values
each takes is under [Settings of each method](methods.md).

{table(("key", "default", "meaning", "read by"), own)}

## Recipes

`--recipe NAME` sets several keys at once; anything that is given besides wins.

{table(("recipe", "sets"), recipes)}

What `released` stands for is in [Variator here](../variator.md).
"""


def _annotated(hint: Any, field: Any) -> Any:
    return functools.reduce(lambda inner, limit: Annotated[inner, limit], field.metadata, hint)


def readers(name: str) -> str:
    """Say who reads a field of `RunConfig`."""
    if not any(name in cls.uses for cls in methods().values()):
        return "the teacher" if name.startswith("teacher_") else "every run"
    never = [f"`{method}`" for method, cls in methods().items() if name not in cls.uses]
    may = [f"`{method}`" for method, cls in methods().items() if name in cls.uses - cls().reads()]
    said = "every method" + (f" but {', '.join(never)}" if never else "")
    return said + (f"; {' and '.join(may)} only with options that train" if may else "")


@functools.cache
def _identities() -> tuple[dict[str, Any], ...]:
    configs = [RunConfig.build({"method": name, "ratio": 4}) for name in methods()]
    return tuple(config.identity("data", "model") for config in configs)


def identified(name: str) -> str:
    """Say whether a field of `RunConfig` is part of a run's identity."""
    if name in AS:
        return AS[name]
    having = [name in identity for identity in _identities()]
    return "yes" if all(having) else "where it is read" if any(having) else "no"


def _defaults(key: Key) -> str:
    groups: dict[str, list[str]] = {}
    for reader, default in key.defaults.items():
        groups.setdefault(value(default), []).append(reader)
    if len(groups) == 1:
        return next(iter(groups))
    (usual, _), *others = sorted(groups.items(), key=lambda item: -len(item[1]))
    return "; ".join(
        [usual, *(f"{default} in {', '.join(f'`{name}`' for name in names)}" for default, names in others)]
    )


def _who(key: Key) -> str:
    return (
        ", ".join(f"[`{name}`](methods.md#{name})" for name in key.defaults) if len(key.defaults) < 4 else key.readers
    )


# --- settings of methods ---


def methods_page() -> str:
    """Return the page of every method's settings."""
    return (
        "\n\n".join(
            [
                "# Settings of each method",
                "What each method does is in the [catalogue](../methods.md); how it does it, in the "
                "[API](api/methods.md). `--ratio` sets its knob, and `--steps` and `--batch-size` its training where "
                "it has one.",
                *(_method(name, cls) for name, cls in methods().items()),
            ]
        )
        + "\n"
    )


def counts(cls: type[Method], field: dataclasses.Field[Any]) -> bool:
    """Say whether another value of an option, with everything else as it is, is another run."""
    plain = cls()
    if field.name in plain.identity(None):
        return True
    schema = TypeAdapter(get_type_hints(cls, include_extras=True)[field.name]).json_schema()
    default = field.default
    others = [value for value in schema.get("enum", []) if value != default]
    if not others and isinstance(default, bool | int | float):
        others = [not default if isinstance(default, bool) else default + 1]
    changed = [dataclasses.replace(plain, **{field.name: other}) for other in others]  # type: ignore[type-var]
    return any(other.identity(None) != plain.identity(None) for other in changed)


def _method(name: str, cls: type[Method]) -> str:
    text, hints = attributes(cls), get_type_hints(cls, include_extras=True)
    rows = [
        (
            f"`{field.name}`",
            kind(hints[field.name]),
            value(field.default),
            linked(text.get(field.name, "")),
            "yes" if counts(cls, field) else "where it is read",
        )
        for field in dataclasses.fields(cls)
    ]
    facts = [f"**{cls.summary[0].upper()}{cls.summary[1:]}.**"]
    facts += [f"The ratio sets: {cls.knob}."] if cls.knob else []
    facts += [f"Trains: {cls.trains}."]
    facts += [f"Source: {cls.paper}."] if cls.paper.strip("-") else []
    reads = ", ".join(f"`{key}`" for key in ("ratio", "steps", "batch_size") if key in cls.uses)
    newer = {
        family: found for family in sorted(set(FAMILIES.values())) if (found := cls().version_on(family)) != cls.version
    }
    on = f" ({', '.join(f'{found} on {family}' for family, found in newer.items())})" if newer else ""
    facts += [f"Version {cls.version}{on}; reads {reads or 'nothing'} of the run's budget."]
    own = table(("option", "values", "default", "meaning", "in the identity"), rows) if rows else "It has no options."
    return f"## {name}\n\n{' '.join(facts)}\n\n{own}"


# --- commands ---


def cli_page() -> str:
    """Return the page of every command with its help."""
    parts = [
        "# Command line",
        "`bench --help` and `bench COMMAND --help` print what follows. So does `python -m bench --help`. "
        "Exit codes: 0 all done, 1 a cell failed, 2 a mistake in what was asked for, 130 stopped.",
        *(_command(f"bench {name}", command) for name, command in main.commands.items()),
        _command("python -m analysis", analysis.__main__.main),
    ]
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: click.Command, level: int = 2) -> str:
    context = click.Context(command, info_name=name)
    head = f"{'#' * level} {name}"
    if isinstance(command, click.Group):
        inner = [_command(f"{name} {sub}", part, level + 1) for sub, part in command.commands.items()]
        return "\n\n".join([head, *_help(command.help or ""), *inner])
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    parts = [head, f"```text\n{usage}\n```", *_help(command.help or "")]
    options = [p for p in command.params if isinstance(p, click.Option)]
    every_key = [p for p in options if isinstance(p, KeyOption)]
    rows = [_option(option, context) for option in options if option not in every_key and not option.hidden]
    if rows:
        parts.append(table(("option", "default", "meaning"), rows))
    if every_key:
        parts.append(f"And each of the {len(every_key)} keys of the [configuration](config.md), as `--key VALUE`.")
    return "\n\n".join(parts)


def _option(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    shown = option.get_help_record(context)
    names = (shown[0] if shown else ", ".join(option.opts)).replace("  ", " ")
    text, _, said = (option.help or "").partition("  [default: ")
    if option.show_default and option.default not in (None, ()):
        said = str(option.default)
    return f"`{names}`", f"`{said.rstrip(']')}`" if said and " " not in said else said.rstrip("]"), text


def _help(text: str) -> Iterator[str]:
    """Yield a help text's paragraphs, those that click keeps the lines of as commands or plain text."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b\n"):
            lines = paragraph.removeprefix("\b\n")
            yield f"```{'sh' if lines.startswith(('bench ', 'wandb ')) else 'text'}\n{lines}\n```"
        else:
            yield re.sub(
                r"\b[A-Z]{3,}\b(?!&)", lambda match: f"`{match[0]}`" if match[0] in _METAVARS else match[0], paragraph
            )


_METAVARS = {"SWEEP", "STUDY", "PROJECT", "FILE", "OUT"}
