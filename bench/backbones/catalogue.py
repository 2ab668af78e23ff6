"""Checkpoints by name: the common ones, bundled so that a plan needs no network, and those of other packages.

Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bench.backbones.spec import BackboneSpec
from bench.entry_points import Registered, from_entry_points
from bench.errors import BackboneError, suggest

BACKBONE_GROUP = "bench.backbones"
BUNDLE = Path(__file__).parent / "configs" / "backbones.json"
TIMEOUT_SECONDS = 5.0
"""How long the Hub may take to answer at all before it counts as out of reach."""


@cache
def _bundle() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads(BUNDLE.read_text("utf-8"))
    return entries


def known_backbones() -> dict[str, str]:
    """Return every bundled name with the Hub id that it stands for."""
    return {alias: entry["hub"] for alias, entry in _bundle().items()}


@dataclass(frozen=True)
class Checkpoint:
    """What another package registers under a name: a checkpoint of a supported family, in one of two places.

    Attributes
    ----------
    folder
        Folder with ``config.json``, weights and tokenizer, inside the package as a rule.
    hub
        Hub id, where there is no folder.
    config
        The fields of its ``config.json`` that give the architecture, where it is on the Hub, so that a plan needs no
        network.
    """

    folder: Path | None = None
    hub: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@cache
def registered_backbones() -> dict[str, Registered[Checkpoint]]:
    """Return the checkpoints of other packages by name, each with its origin."""
    return from_entry_points(BACKBONE_GROUP, "backbone", _checked, known_backbones())


def backbone_names() -> list[str]:
    """Return every name that stands for a checkpoint: those of the bundle, then those of other packages."""
    return [*known_backbones(), *registered_backbones()]


def _checked(name: str, found: object) -> Checkpoint:
    if not isinstance(found, Checkpoint):
        raise TypeError(f"{found!r} is no bench.backbones.catalogue.Checkpoint")
    if (found.folder is None) == (found.hub is None):
        raise ValueError("it must name either the folder of its checkpoint or its Hub id")
    BackboneSpec.from_config(name, _config(name, found))
    return found


def _config(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    return _read(checkpoint.folder / "config.json", name) if checkpoint.folder else dict(checkpoint.config)


def resolve_config(name: str) -> tuple[str, dict[str, Any]]:
    """Find where a backbone's weights are and what its ``config.json`` says.

    Looked for in this order: a local folder, the bundle (by alias or Hub id), other packages, the local Hugging Face
    cache, the Hub.

    Parameters
    ----------
    name
        A folder, an alias such as ``"t5-base"``, or a Hub id such as ``"google-t5/t5-base"``.

    Returns
    -------
    tuple
        What ``from_pretrained`` takes (a folder or a Hub id), and the config. A bundled config holds only the fields
        that give the architecture.

    Raises
    ------
    BackboneError
        If there is no such checkpoint, its config cannot be read, or the Hub is out of reach; within seconds.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder), _read(folder / "config.json", name)
    for alias, entry in _bundle().items():
        if name in (alias, entry["hub"]):
            return str(entry["hub"]), dict(entry["config"])
    if found := registered_backbones().get(name):
        return str(found.value.folder or found.value.hub), _config(name, found.value)
    return name, _read(_from_hub(name), name)


def spec_of(name: str) -> BackboneSpec:
    """Return the shape of a backbone; see ``resolve_config`` for what ``name`` may be and what may go wrong."""
    return BackboneSpec.from_config(name, resolve_config(name)[1])


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BackboneError(f"backbone '{name}' is a folder without config.json; give a checkpoint's folder") from None
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}, the config of backbone '{name}', cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise BackboneError(f"{path}, the config of backbone '{name}', is no JSON object")
    return config


def _from_hub(name: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    hint = suggest(name, [*backbone_names(), *known_backbones().values()])
    advice = "Give a bundled name (see `bench list backbones`) or a local folder with its config.json and weights."
    try:
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        # hf_hub_download alone retries for minutes when the Hub does not answer; asking for the header fails at once.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=TIMEOUT_SECONDS)
        return Path(hf_hub_download(name, "config.json"))
    except HFValidationError:
        raise BackboneError(f"'{name}' is neither a folder nor a possible Hub id.{hint} {advice}") from None
    except GatedRepoError:
        raise BackboneError(f"backbone '{name}' is gated on the Hub: ask for access there and log in.") from None
    except RepositoryNotFoundError:
        raise BackboneError(f"there is no backbone '{name}' on the Hub, or it is private.{hint} {advice}") from None
    except EntryNotFoundError:
        raise BackboneError(f"'{name}' on the Hub has no config.json, so it is no checkpoint.{hint} {advice}") from None
    except Exception as error:  # the HTTP library behind huggingface_hub, and its error classes, differ by version
        raise BackboneError(
            f"backbone '{name}' is neither bundled, nor a local folder, nor in the Hugging Face cache, and the Hub "
            f"cannot be reached ({type(error).__name__}: {error}).{hint} {advice}"
        ) from None
