"""A W&B account of a test: a server of its own, an empty home, and an environment that reaches nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.wandb_server.state import load_artifacts, load_runs
from tests.workers import PATIENCE

ROOT = Path(__file__).parents[1]
KEY = "0123456789abcdef" * 2 + "01234567"


@dataclass(frozen=True)
class Account:
    """Where the server is, and what it knows."""

    state: Path
    environ: dict[str, str]

    def runs(self, project: str = "variator-bench") -> list[dict[str, Any]]:
        """Return the runs of a project, oldest first."""
        return [run for run in load_runs(self.state) if run["project"] == project]

    def artifacts(self, project: str = "variator-bench") -> dict[str, dict[str, Any]]:
        """Return the artifacts of a project by name; each must have been sent whole."""
        found = [a for a in load_artifacts(self.state) if a["project"] == project]
        assert [a["name"] for a in found if a["state"] != "COMMITTED"] == []
        return {a["name"]: a for a in found}

    def users(self, name: str, project: str = "variator-bench") -> set[str]:
        """Return the runs that use any version of an artifact."""
        return {
            run
            for a in load_artifacts(self.state)
            if (a["project"], a["name"]) == (project, name)
            for run in a["usedBy"]
        }

    def content(self, artifact: dict[str, Any], name: str) -> bytes:
        """Return a file of an artifact."""
        return (self.state / "artifacts" / artifact["id"] / "files" / name).read_bytes()

    def start(self, words: Sequence[str | Path], at: Path) -> subprocess.Popen[str]:
        """Start a command such as ``wandb agent``; what it prints can be read from it."""
        name, *rest = map(str, words)
        program = Path(sys.executable).with_name(name)
        given = {**os.environ, **self.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environ = {name: value for name, value in given.items() if value}
        return subprocess.Popen(
            [program, *rest], cwd=at, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def command(self, words: Sequence[str | Path], at: Path, patience: float = PATIENCE) -> str:
        """Run a command to its end and return what it printed."""
        process = self.start(words, at)
        try:
            said, _ = process.communicate(timeout=patience)
        finally:
            process.kill()
        assert process.returncode == 0, said
        return said


@contextmanager
def account(folder: Path) -> Iterator[Account]:
    """Serve an account whose state and home lie in ``folder``."""
    port = folder / "port"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.wandb_server.server", folder / "state", port], cwd=ROOT
    )
    try:
        end = time.monotonic() + PATIENCE
        while not port.exists():
            assert server.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.02)
        yield Account(folder / "state", environment(folder / "home", int(port.read_text())))
    finally:
        server.kill()
        server.wait()


def environment(home: Path, port: int) -> dict[str, str]:
    """Return an environment in which W&B is at ``port`` of this machine and has a key; all else is out of reach."""
    home.mkdir(parents=True, exist_ok=True)
    nowhere = "http://127.0.0.1:9"
    return {
        "HOME": str(home),
        "WANDB_MODE": "",
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": KEY,
        "WANDB_CACHE_DIR": str(home / "cache"),
        "WANDB_CONFIG_DIR": str(home / "config"),
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "127.0.0.1,localhost",
    }


@contextmanager
def silent_port() -> Iterator[int]:
    """Listen at a port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = []

        def accept() -> None:
            while True:
                try:
                    taken.append(listener.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
