"""A sweep file -> the runs that it lists. The file is a W&B sweep; grids are expanded here. Imports no torch."""

from __future__ import annotations

import itertools
import math
import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from bench.config import RunConfig, known_keys
from bench.errors import ConfigError, suggest

TOP_KEYS = (
    "name",
    "description",
    "project",
    "entity",
    "program",
    "command",
    "method",
    "metric",
    "parameters",
    "run_cap",
)
MOST_POINTS = 20_000
"""Larger grids are taken for a mistake, since they would be expanded for minutes and run for years."""


@dataclass(frozen=True)
class Sweep:
    """A named list of runs.

    Attributes
    ----------
    name
        Its name.
    study
        Where the results go: the study that the file's command names, so that an agent's runs and those of this machine
        lie together, or else the sweep's name.
    configs
        The runs, each once; those that share a teacher stand together, the dense one first.
    project
        W&B project that the file names, if it does.
    """

    name: str
    study: str
    configs: tuple[RunConfig, ...]
    project: str | None = None


def find_sweep(name: str) -> Path:
    """Return the file of a sweep: a path, or the name of a shipped one such as ``quickstart``.

    Raises
    ------
    ConfigError
        If there is none; the nearest name is given.
    """
    path = Path(name)
    if path.is_file():
        return path
    here = Path(str(resources.files("bench")))
    shipped = {p.stem: p for folder in (here / "sweeps", here.parent / "sweeps") for p in sorted(folder.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    raise ConfigError(
        f"no sweep file '{name}'.{suggest(Path(name).stem, shipped)} Shipped: {', '.join(sorted(shipped)) or 'none'}."
    )


def read_sweep(path: Path, overrides: Mapping[str, str] | None = None, data_root: Path | None = None) -> Sweep:
    """Read a sweep file in W&B's format and expand its grid.

    Parameters
    ----------
    path
        A YAML file with ``method: grid`` and ``parameters``, each with ``value`` or ``values``.
    overrides
        Key -> text that replaces the file's values; commas separate several.
    data_root
        Local data root, where a pre-training corpus may lie.

    Raises
    ------
    ConfigError
        If the file is no grid of known keys; the message names the file, the key, and the nearest right one.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} is no sweep: its lists or mappings are nested too deeply") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no sweep: expected a mapping with `method: grid` and `parameters`")
    for key in content:
        if key not in TOP_KEYS:
            raise ConfigError(
                f"{path}: unknown key '{key}'.{suggest(str(key), TOP_KEYS)} Known: {', '.join(TOP_KEYS)}."
            )
    if (search := content.get("method")) != "grid":
        raise ConfigError(f"{path}: method is {_shown(search)}; only `grid` lists its runs in advance")
    name = path.stem if content.get("name") is None else content["name"]
    study = _study(content.get("command"), name)
    for what, text in (("name", name), ("study", study)):
        if not isinstance(text, str) or not re.fullmatch(r"[^./][^/]*", text):
            raise ConfigError(f"{path}: the {what} {_shown(text)} is to be the name of a folder, such as 'my-sweep'")
    project = content.get("project")
    if project is not None and (not isinstance(project, str) or not re.fullmatch(r"[\w.-]+", project)):
        raise ConfigError(f"{path}: the project {_shown(project)} is to be the name of a W&B project, such as 'mine'")
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise ConfigError(f"{path}: `parameters` must map keys to {{value: ...}} or {{values: [...]}}")
    grid = {str(key): _values(path, str(key), entry) for key, entry in parameters.items()}
    grid |= {key: parse_list(key, text) for key, text in (overrides or {}).items()}
    try:
        return Sweep(str(name), str(study), expand(grid, data_root), project)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _study(command: object, name: object) -> object:
    """Return what follows ``--study`` in a sweep's command, or ``name``."""
    parts = command if isinstance(command, list) else []
    at = parts.index("--study") + 1 if "--study" in parts else len(parts)
    return parts[at] if at < len(parts) else name


def _values(path: Path, key: str, entry: object) -> list[Any]:
    known = known_keys()
    if key not in known:
        raise ConfigError(f"{path}: unknown parameter '{key}'.{suggest(key, known)} `bench list keys` shows all.")
    if not isinstance(entry, dict) or len(entry) != 1 or not {"value", "values"} & set(entry):
        raise ConfigError(
            f"{path}: parameter '{key}' needs either `value: x` or `values: [x, y]`, found {_shown(entry)}"
        )
    values = [entry["value"]] if "value" in entry else entry["values"]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{path}: the values of '{key}' must be a list that is not empty, found {_shown(values)}")
    for value in values:
        if value is not None and not isinstance(value, str | int | float):
            raise ConfigError(f"{path}: a value of '{key}' must be one word or number, found {_shown(value)}")
    return list(values)


def _shown(value: object) -> str:
    """Show what was found, in a line however large it is: aliases make a few lines of YAML billions of items."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def parse_list(key: str, text: str) -> list[Any]:
    """Read ``2,4,8``; a loss mix such as ``all_hidden=1,logits=1`` is one value."""
    return [text] if key.endswith("losses") else [part.strip() for part in text.split(",")]


def expand(grid: Mapping[str, Collection[Any]], data_root: Path | None = None) -> tuple[RunConfig, ...]:
    """Return every combination once: points that differ only in what their method ignores are one run.

    Parameters
    ----------
    grid
        Key -> values.
    data_root
        As for ``read_sweep``.

    Raises
    ------
    ConfigError
        If a combination is no run, or there are more than ``MOST_POINTS``.
    """
    points = math.prod(len(values) for values in grid.values())
    if points > MOST_POINTS:
        raise ConfigError(f"the grid has {points:,} combinations; split it into grids of at most {MOST_POINTS:,}")
    distinct: dict[str, RunConfig] = {}
    for point in itertools.product(*grid.values()):
        config = RunConfig.build(dict(zip(grid, point, strict=True)))
        key = repr(config.identity(config.task, config.backbone, data_root))
        distinct.setdefault(key, config)
    order = {id(config): place for place, config in enumerate(distinct.values())}
    shared: dict[tuple[Any, ...], int] = {}
    for config in distinct.values():
        shared.setdefault((config.task, config.backbone, config.seed), len(shared))
    return tuple(
        sorted(
            distinct.values(),
            key=lambda c: (shared[c.task, c.backbone, c.seed], c.method != "dense", order[id(c)]),
        )
    )
