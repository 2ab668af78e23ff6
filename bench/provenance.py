"""Where a number came from: code, versions, machine."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import __version__, processor
from bench.results import Provenance

PACKAGES = ("torch", "transformers", "datasets", "evaluate", "tokenizers", "peft", "fvcore", "numpy", "scikit-learn")
_HERE = Path(__file__).resolve().parent


def collect(command: list[str]) -> Provenance:
    """Return the provenance of a run that starts now and that ``command`` makes again."""
    commit, dirty = _commit()
    return Provenance(
        commit=commit,
        dirty=dirty,
        command=command,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        hardware=processor.describe(),
        device="cpu",
        threads=os.cpu_count() or 1,
        versions={"bench": __version__, **{p: v for p in PACKAGES if (v := _version(p))}},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git(folder: Path, *words: str) -> str | None:
    """Return what git says in a folder; ``None`` where there is no git, no repository or no answer."""
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip()


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of the code that runs and whether it was changed; ``None`` outside a checkout."""
    # an installed package may lie inside somebody else's repository
    if git(_HERE, "ls-files", "--error-unmatch", "provenance.py") is None:
        return None, None
    commit = git(_HERE, "rev-parse", "HEAD")
    # results are what a sweep writes; only a change to code makes the commit an untrue witness
    status = git(_HERE, "status", "--porcelain", "--", ".", "../pyproject.toml")
    return (None, None) if commit is None or status is None else (commit, bool(status))


def changed_since(commit: str) -> list[str] | None:
    """Name the library's files that differ from what they were at ``commit``; ``None`` where git does not know it."""
    changed = git(_HERE, "diff", "--name-only", "--relative", commit, "--", ".")
    return None if changed is None else [f"bench/{name}" for name in changed.split()]
