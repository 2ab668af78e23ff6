"""Commands whose options include every key of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bench.describe import Key

LONGEST_TITLE = 72
"""Characters of a section of a help text, which click does not break."""


class KeyOption(click.Option):
    """An option made from a key; W&B passes keys with underscores, people write dashes.

    Parameters
    ----------
    name
        What the key is called.
    meanings
        What it means to whom; methods may differ.
    """

    def __init__(self, name: str, meanings: Sequence[Key]) -> None:
        self.dashed, self.meanings = f"--{name.replace('_', '-')}", meanings
        super().__init__([*dict.fromkeys([self.dashed, f"--{name}"]), name], type=str, default=None)

    def records(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield the section and the line of each meaning."""
        for key in self.meanings:
            section, text = "Run" if "run" in key.defaults else f"Options of {key.readers}", key.text
            if len(section) > LONGEST_TITLE:
                section, text = "Options of several methods", f"{text} Read by {key.readers}."
            shown = f"  [default: {key.default}]" if key.default else ""
            yield section, (f"{self.dashed} VALUE", f"{text}{shown}")


class KeysCommand(click.Command):
    """A command that takes the keys that were given as ``keys``, and shows all of them by who reads them."""

    def __init__(self, name: str | None, *, params: Sequence[click.Parameter] = (), **more: Any) -> None:
        super().__init__(name, params=[*params, *_options()], **more)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function with the keys that were given (called by click)."""
        names = [option.name for option in self.params if isinstance(option, KeyOption)]
        given = {name: ctx.params.pop(name) for name in names if name}
        # "None" is what an agent writes for a sweep's null: the default
        ctx.params["keys"] = {name: value for name, value in given.items() if value is not None and value != "None"}
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each reader (called by click)."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, KeyOption):
                for section, line in parameter.records():
                    sections.setdefault(section, []).append(line)
            elif record := parameter.get_help_record(ctx):
                sections.setdefault("Options", []).append(record)
        for title, records in sorted(sections.items(), key=lambda item: item[0] != "Options"):
            with formatter.section(title):
                formatter.write_dl(records)


def _options() -> Iterator[KeyOption]:
    from bench.describe import keys

    meanings: dict[str, list[Key]] = {}
    for key in keys():
        meanings.setdefault(key.name, []).append(key)
    return (KeyOption(name, those) for name, those in meanings.items())
