"""Where a number came from: code, versions, machine."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import __version__
from bench.results import Provenance

PACKAGES = ("torch", "transformers", "datasets", "evaluate", "tokenizers", "peft", "fvcore", "numpy", "scikit-learn")


def collect(command: list[str]) -> Provenance:
    """Return the provenance of a run that starts now and that ``command`` makes again."""
    commit, dirty = _git()
    return Provenance(
        commit=commit,
        dirty=dirty,
        command=command,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        hardware=_processor(),
        device="cpu",
        threads=os.cpu_count() or 1,
        versions={"bench": __version__, **{p: v for p in PACKAGES if (v := _version(p))}},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    """Return the commit of the code that runs and whether it was changed; ``None`` outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        # an installed package may lie inside somebody else's repository
        own = ["git", "-C", str(here), "ls-files", "--error-unmatch", "provenance.py"]
        subprocess.run(own, capture_output=True, check=True, timeout=10)
        commit = subprocess.run(
            ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        # results are what a sweep writes; only a change to code makes the commit an untrue witness
        status = subprocess.run(
            ["git", "-C", here, "status", "--porcelain", "--", ".", "../pyproject.toml"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())


def changed_since(commit: str) -> list[str] | None:
    """Name the library's files that differ from what they were at ``commit``; ``None`` where git does not know it."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "diff", "--name-only", "--relative", commit, "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return [f"bench/{name}" for name in done.stdout.split()]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"
