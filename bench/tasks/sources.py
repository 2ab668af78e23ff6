"""Where the data of a task lies, and what identifies it. Imports no torch and reads no rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from bench.errors import DataError
from bench.tasks.digests import file_digest
from bench.tasks.spec import TaskSpec

FORMATS = (".parquet", ".jsonl", ".csv")
DATA_ROOT_VARIABLE = "BENCH_DATA_ROOT"


@dataclass(frozen=True)
class Location:
    """Where the two splits of a task were found.

    Attributes
    ----------
    origin
        ``"files"`` (own files or the local data root), ``"bundled"`` (shipped in the package) or ``"hub"``.
    files
        Split (``"train"``, ``"dev"``) -> file; empty for the Hub.
    """

    origin: Literal["files", "bundled", "hub"]
    files: dict[str, Path] = field(default_factory=dict)


def effective_root(data_root: Path | None) -> Path | None:
    """Return the local data root: the one given, else that of ``BENCH_DATA_ROOT``, else ``None``.

    Raises
    ------
    DataError
        If it is not a folder.
    """
    named = data_root or os.environ.get(DATA_ROOT_VARIABLE)
    if not named:
        return None
    root = Path(named).expanduser()
    if not root.is_dir():
        raise DataError(f"the data root {root} is not a folder. Correct --data-root or {DATA_ROOT_VARIABLE}.")
    return root


_BUNDLE = Path(str(resources.files("bench.tasks") / "bundled"))


def bundled(name: str) -> Path:
    """Return the folder of a data set that ships in the package (it need not exist)."""
    return _BUNDLE / name


def split_file(folder: Path, stems: Sequence[str]) -> Path:
    """Find the one data file of a split in a folder.

    Parameters
    ----------
    folder
        Where to look.
    stems
        File names that would do, without their suffix.

    Raises
    ------
    DataError
        If there is none, or more than one.
    """
    found = [path for stem in stems for suffix in FORMATS if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{folder} holds {' and '.join(p.name for p in found)}: keep one of them.")
    expected = " or ".join(f"{stem}{{{','.join(FORMATS)}}}" for stem in stems)
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
    raise DataError(f"{folder} lacks {expected}; found: {there or 'nothing'}.")


def locate(spec: TaskSpec, data_root: Path | None) -> Location:
    """Find a task's data: own files, else the local root, else the bundle, else the Hub (not contacted here).

    Raises
    ------
    DataError
        If the data root is no folder, or has a folder for this task that lacks a split.
    """
    source = spec.source
    if source.files is not None:
        return Location("files", {split: Path(path) for split, path in source.files.items()})
    stems = {"train": source.train, "dev": source.dev}
    root = effective_root(data_root)
    if source.folder and root and (folder := root / source.folder).is_dir():
        return Location("files", {split: split_file(folder, [stem]) for split, stem in stems.items()})
    if source.folder and (folder := bundled(source.folder)).is_dir():
        return Location("bundled", {split: split_file(folder, [stem]) for split, stem in stems.items()})
    if source.hub:
        return Location("hub")
    raise DataError(f"task '{spec.name}' names no data: neither files nor a bundled folder nor a data set on the Hub.")


def revision_of(files: dict[str, Path], origin: str) -> str:
    """Identify files by their content alone: ``"sha256:<64 hex>"`` or ``"bundled:<16 hex>"``."""
    try:
        listing = "\n".join(f"{split} {file_digest(path)}" for split, path in sorted(files.items()))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}.") from error
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return f"bundled:{digest[:16]}" if origin == "bundled" else f"sha256:{digest}"


def data_revision(spec: TaskSpec, data_root: Path | None = None) -> str:
    """Identify the data that `bench.tasks.data.load_task` would load, without loading it.

    Returns
    -------
    str
        ``"sha256:<hex>"`` of the bytes of local files, wherever they lie; ``"bundled:<hex prefix>"``; or
        ``"hub:<id>@<revision>"``.

    Raises
    ------
    DataError
        If a local file is missing or cannot be read.
    """
    location = locate(spec, data_root)
    if location.origin == "hub":
        return f"hub:{spec.source.hub}@{spec.source.revision}"
    return revision_of(location.files, location.origin)
