"""Teachers and plugins, made once and found again by the hash of what made them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.config import hash_of
from bench.errors import MachineError
from bench.locks import hold

META_FILE = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """A finished folder of the cache.

    Attributes
    ----------
    key
        ``<kind>-<hash>``.
    folder
        Where its files are.
    meta
        What its maker noted (JSON).
    cached
        Whether it was found instead of made.
    """

    key: str
    folder: Path
    meta: dict[str, Any]
    cached: bool


class ArtifactCache:
    """A folder of artifacts that any number of processes share.

    An artifact is made under a lock by whoever needs it first, in a temporary folder that is moved into place whole: a
    reader never sees a part, and a kill leaves at most a partial folder that the next maker sweeps away.

    Parameters
    ----------
    root
        The cache's folder; a folder shared between machines works where its file locks do.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser()

    def key(self, kind: str, identity: Mapping[str, Any]) -> str:
        """Return the name of the artifact that ``identity`` makes."""
        return f"{kind}-{hash_of(identity)[:20]}"

    def has(self, key: str) -> bool:
        """Return whether the artifact of that name is finished."""
        return (self.root / key / META_FILE).exists()

    def find(self, kind: str, identity: Mapping[str, Any]) -> Artifact | None:
        """Return the artifact if it is finished.

        Raises
        ------
        MachineError
            If it is there but cannot be read.
        """
        key = self.key(kind, identity)
        try:
            made = json.loads((self.root / key / META_FILE).read_bytes())["made"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MachineError(
                f"{self.root / key} cannot be read ({error}). Remove it, and it is made again."
            ) from None
        return Artifact(key, self.root / key, made, cached=True)

    def partial(self, key: str) -> Path:
        """Where the checkpoint of an unfinished artifact is kept."""
        return self.root / "partial" / f"{key}.pt"

    def get(
        self,
        kind: str,
        identity: Mapping[str, Any],
        make: Callable[[Path, Path], Mapping[str, Any]],
        waiting: Callable[[str], None] = lambda message: None,
    ) -> Artifact:
        """Return the artifact, making it if nobody has.

        Parameters
        ----------
        kind
            A word for people, the first part of the folder's name.
        identity
            Everything that can change the content.
        make
            Called with an empty folder to fill and the path of a checkpoint that survives a kill; returns what to note.
        waiting
            Called once with a message if another process is making it.

        Raises
        ------
        MachineError
            If the cache's folder cannot be written.
        """
        found = self.find(kind, identity)
        if found:
            return found
        key = self.key(kind, identity)
        with self._writing():
            (self.root / "partial").mkdir(parents=True, exist_ok=True)
        with hold(self.root / "locks" / f"{key}.lock", lambda: waiting(f"waiting for another process to make {key}")):
            found = self.find(kind, identity)
            return found or self._make(key, identity, make)

    def _make(self, key: str, identity: Mapping[str, Any], make: Callable[[Path, Path], Mapping[str, Any]]) -> Artifact:
        for stale in (self.root / "partial").glob(f"{key}-*.dir"):
            shutil.rmtree(stale, ignore_errors=True)
        with self._writing():
            folder = Path(tempfile.mkdtemp(dir=self.root / "partial", prefix=f"{key}-", suffix=".dir"))
        try:
            made = dict(make(folder, self.partial(key)))
            with self._writing():
                (folder / META_FILE).write_text(json.dumps({"identity": identity, "made": made}, default=str, indent=1))
                os.chmod(folder, 0o755)
                folder.replace(self.root / key)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.partial(key).unlink(missing_ok=True)
        return Artifact(key, self.root / key, made, cached=False)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MachineError(
                f"cannot write the artifact cache {self.root}: {error.strerror or error}. "
                "Choose another with --cache-dir or BENCH_CACHE."
            ) from error
