"""The near end of the process that talks to W&B: it may hang or die, and nobody waits for it. Imports no wandb."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.tracking.account import setting

MOST_BYTES = select.PIPE_BUF
"""A message up to this size goes into a pipe whole or not at all."""


class Link:
    """A started process and the pipe to it, whose size bounds what waits there: what finds no room is dropped.

    Parameters
    ----------
    folder
        Where W&B keeps what it writes, unless the environment says otherwise.
    setup
        The first message.
    """

    def __init__(self, folder: Path, setup: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.tracking.client"],
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal comes to the run alone, which passes on what it means
        )
        assert self.process.stdin and self.process.stdout
        self.to, self.back = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.to, False)
        self._write(setup)

    def tell(self, **message: Any) -> None:
        """Send a message if there is room for it."""
        self._write(message, MOST_BYTES)

    def end(self, seconds: float, **message: Any) -> dict[str, Any]:
        """Send the last message and return the answer, or ``{}`` if none comes in time."""
        until = time.monotonic() + seconds
        try:
            if select.select([], [self.to], [], seconds)[1]:
                self._write(message)
            return self._hear(until)
        finally:
            self.process.kill()
            self.process.wait()
            for end in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    end.close()  # type: ignore[union-attr]

    def _write(self, message: dict[str, Any], most: int | None = None) -> None:
        line = json.dumps(message).encode() + b"\n"
        if most is None or len(line) <= most:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self.to, line)

    def _hear(self, until: float) -> dict[str, Any]:
        heard = b""
        while not heard.endswith(b"\n"):
            if not select.select([self.back], [], [], max(0.0, until - time.monotonic()))[0]:
                return {}
            part = os.read(self.back, 65536)
            if not part:  # it has died
                return {}
            heard += part
        answer: dict[str, Any] = json.loads(heard)
        return answer


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a process that uses W&B: what it writes stays beside the results.

    Files that wait to be sent lie there too, since ``wandb sync`` needs them, perhaps after they were moved.
    """
    at = Path(os.environ.get("WANDB_DIR") or folder).absolute()
    chosen = {"WANDB_DIR": str(at), "WANDB_DATA_DIR": str(at / "wandb" / "data")}
    # an empty variable says nothing, which W&B's library takes for a mistake
    chosen |= {name: value for name, value in os.environ.items() if value or not name.startswith("WANDB_")}
    for name in ("base_url", "entity"):  # which `wandb init` may have set for this folder, where W&B no longer looks
        if said := setting(name):
            chosen[f"WANDB_{name.upper()}"] = said
    chosen.pop("WANDB_SERVICE", None)  # another process's connection, which this one does not share
    return chosen
