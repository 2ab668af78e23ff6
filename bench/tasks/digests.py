"""SHA-256 of files, remembered between processes so that naming a run does not read gigabytes. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.results import write_atomic

_SETTLED_SECONDS = 2.0


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``BENCH_CACHE``, else ``~/.cache/bench``."""
    return Path(os.environ.get("BENCH_CACHE") or Path.home() / ".cache" / "bench").expanduser()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, from the cache while its size and time of change are the same.

    The cache is a help and never a need: where it is torn, foreign or cannot be written, the file is read again.
    Processes may share it; of two that write at once one entry may be lost, and is then computed again.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    stat = path.stat()
    key, state = str(path.resolve()), [stat.st_size, stat.st_mtime_ns]
    cache = cache_folder() / "digests.json"
    entry = _read(cache).get(key)
    if isinstance(entry, dict) and entry.get("state") == state and isinstance(entry.get("sha256"), str):
        return str(entry["sha256"])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A file changed within the clock's grain keeps its time: trust only times that have passed.
    if time.time() - stat.st_mtime > _SETTLED_SECONDS:
        content = {**_read(cache), key: {"state": state, "sha256": digest}}
        with contextlib.suppress(BenchError):
            write_atomic(cache, json.dumps(content, indent=1).encode())
    return digest


_held: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}
"""The cache as it was read last, since a plan asks for the same few digests thousands of times."""


def _read(cache: Path) -> dict[str, Any]:
    try:
        stat = cache.stat()
        state = (stat.st_mtime_ns, stat.st_size)
        if cache in _held and _held[cache][0] == state:
            return _held[cache][1]
        content = json.loads(cache.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    _held[cache] = state, content
    return content
