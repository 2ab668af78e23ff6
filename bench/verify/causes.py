"""What differs between where a result was made and here: the causes that a different number may have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bench.provenance import changed_since
from bench.results import Provenance, RunResult

Kind = Literal["record", "data", "model", "code", "version", "hardware", "threads"]
ELSEWHERE: frozenset[Kind] = frozenset({"version", "hardware", "threads"})
"""Causes that round numbers otherwise: with one of them a result is held to a tolerance, else to the bit."""


_HASH = re.compile(r"(?<=sha256:[0-9a-f]{12})[0-9a-f]{52}")
"""What of a digest nobody reads."""


@dataclass(frozen=True)
class Cause:
    """One thing that differs.

    Attributes
    ----------
    kind
        ``record`` is the stored result itself, which contradicts itself or was changed.
    text
        What was recorded and what is here.
    """

    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def of_identity(recorded: RunResult, here: Mapping[str, Any]) -> list[Cause]:
    """Name what of a run's identity is not what it was.

    Parameters
    ----------
    recorded
        The stored result.
    here
        The identity that its configuration has here.
    """
    before, absent = recorded.identity, object()
    return [
        _of_field(name, before.get(name, absent), here.get(name, absent), recorded.config, absent)
        for name in sorted({*before, *here})
        if before.get(name, absent) != here.get(name, absent)
    ]


def _of_field(name: str, before: Any, here: Any, config: Mapping[str, Any], absent: object) -> Cause:
    texts = ["nothing" if value is absent else _HASH.sub("…", str(value)) for value in (before, here)]
    text = f"{name} was {texts[0]}, and is {texts[1]} here"
    if name == "data" and str(before).rpartition("@")[0] == str(here).rpartition("@")[0]:
        return Cause("code", "the task is defined otherwise here: its columns, prompt, labels, metrics or length")
    kinds: dict[str, Kind] = {"data": "data", "model": "model", "method": "code", "schema": "code"}
    if name in kinds:
        return Cause(kinds[name], text)
    option = name.removeprefix("option.")
    setting = config.get("options", {}).get(option, absent) if option != name else config.get(name, absent)
    if absent in (before, here):
        return Cause("code", f"{name}, which is part of what names a run, was {texts[0]}, and is {texts[1]} here")
    # an option that names further data, such as a corpus, is in the identity by what that holds
    if option != name and setting not in (before, here):
        return Cause("data", text)
    return Cause("record", f"{name} is {texts[0]} in the identity and {setting} in the configuration")


def of_surroundings(recorded: Provenance, here: Provenance) -> list[Cause]:
    """Name what of code, versions and machine is not what it was."""
    return [*_code(recorded, here), *_versions(recorded, here), *_machine(recorded, here)]


def _code(recorded: Provenance, here: Provenance) -> Iterator[Cause]:
    if recorded.dirty:
        yield Cause("code", f"made with changes that were never committed, on top of {_short(recorded.commit)}")
    if here.dirty:
        yield Cause("code", "the code here has changes that are not committed")
    if recorded.commit == here.commit:
        return
    if recorded.commit is None or here.commit is None:
        versions = [p.versions.get("bench") for p in (recorded, here)]
        where = " and ".join(f"{'commit ' + _short(p.commit) if p.commit else 'no known commit'}, version {version}"
                             for p, version in zip((recorded, here), versions, strict=True))  # fmt: skip
        yield Cause("code", f"recorded and here: {where}")
        return
    changed = changed_since(recorded.commit)
    if changed is None:
        yield Cause("code", f"made at commit {_short(recorded.commit)}, which this checkout does not know")
    elif changed:
        files = f"{changed[0]}" if len(changed) == 1 else f"{len(changed)} files, such as {changed[0]}"
        yield Cause("code", f"since commit {_short(recorded.commit)}, which made it, the code changed in {files}")


def _versions(recorded: Provenance, here: Provenance) -> Iterator[Cause]:
    packages = dict.fromkeys([*recorded.versions, *here.versions])
    before, now = ({**p.versions, "Python": _python(p)} for p in (recorded, here))
    for name in [*(name for name in packages if name != "bench"), "Python"]:
        if before.get(name) != now.get(name):
            yield Cause("version", f"{name} {before.get(name)}, here {now.get(name)}")


def _machine(recorded: Provenance, here: Provenance) -> Iterator[Cause]:
    systems = [p.platform.partition(",")[0] for p in (recorded, here)]
    for before, now in (systems, (recorded.hardware, here.hardware), (recorded.device, here.device)):
        if before != now:
            yield Cause("hardware", f"{before}, here {now}")
    if recorded.threads != here.threads:
        yield Cause("threads", f"{recorded.threads}, here {here.threads}")


def _python(provenance: Provenance) -> str:
    return provenance.platform.partition("Python ")[2]


def _short(commit: str | None) -> str:
    return commit[:8] if commit else "an unknown commit"
