"""A Hub of a test: a server of its own, an empty home, and an environment that reaches nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hub_server.state import WRITER, State
from tests.workers import PATIENCE

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Hub:
    """Where the server is, and what it knows."""

    state: State
    environ: dict[str, str]

    def python(self, code: str, *words: str | Path, at: Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run Python in a new process, since the library reads its settings when it is imported."""
        given = {**os.environ, **self.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *map(str, words)],
            cwd=at,
            env={name: value for name, value in given.items() if value},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def bench(self, words: Sequence[str | Path], at: Path, **environ: str) -> tuple[int, str]:
        """Run ``bench`` to its end and return the exit code and what it printed."""
        done = self.python("from bench.cli import main; main()", *words, at=at, **environ)
        return done.returncode, done.stdout + done.stderr

    def benches(
        self, calls: Sequence[tuple[Sequence[str | Path], Mapping[str, str]]], at: Path, **environ: str
    ) -> list[tuple[int, str]]:
        """Run several ``bench`` commands, each with more in its environment, in one process: a start takes long.

        ``environ`` is for what the library reads when it is imported, and a call's own for what it reads when it asks.
        """
        said = json.dumps([[list(map(str, words)), dict(more)] for words, more in calls])
        done = self.python(_MANY, said, at=at, **environ)
        assert done.returncode == 0, done.stderr
        return [(code, text) for code, text in json.loads(done.stdout)]


_MANY = """
import json, os, sys
from unittest.mock import patch
from click.testing import CliRunner
from bench.cli import main
answers = []
for words, more in json.loads(sys.argv[1]):
    with patch.dict(os.environ, more):
        result = CliRunner().invoke(main, words)
    answers.append((result.exit_code, result.output))
print(json.dumps(answers))
"""


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve a Hub whose state and home lie in ``folder``."""
    state, port, home = State(folder / "hub"), folder / "port", folder / "home"
    home.mkdir()
    server = subprocess.Popen([sys.executable, "-m", "tests.hub_server.server", state.root, port], cwd=ROOT)
    try:
        end = time.monotonic() + PATIENCE
        while not port.exists():
            assert server.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.02)
        yield Hub(state, environment(home, int(port.read_text())))
    finally:
        server.kill()
        server.wait()


def environment(home: Path, port: int) -> dict[str, str]:
    """Return an environment in which the Hub is at ``port`` of this machine; all else is out of reach."""
    nowhere = "http://127.0.0.1:9"
    return {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_TOKEN": WRITER,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "127.0.0.1,localhost",
    }
