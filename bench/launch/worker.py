"""A process that runs cells for ``bench.launch.pool``: one JSON message a line in, and one a line out.

In: the setup, then ``{"index": ..., "config": {...}}`` for each cell. Out: ``{"ready": true}`` before each cell, then
what a ``Progress`` receives, then ``{"run_id": ...}`` or ``{"error": ...}``. When the input ends, so does the process,
at once: whoever gave it work has finished, or has died.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

from bench.cell import Surroundings
from bench.config import RunConfig
from bench.errors import BenchError
from bench.results import ResultStore
from bench.tracking import Tracking, run_tracked


class _Said:
    """A ``Progress`` that says everything to the other end."""

    def __init__(self, to: TextIO) -> None:
        self.to = to

    def say(self, **message: Any) -> None:
        self.to.write(json.dumps(message) + "\n")
        self.to.flush()

    def stage(self, name: str, total: int, weight: float = 0.0) -> None:
        self.say(stage=[name, total, weight])

    def advance(self, steps: int = 1, **numbers: float) -> None:
        self.say(advance=steps, numbers=numbers)

    def message(self, text: str) -> None:
        self.say(message=text)


def main() -> None:
    """Run cells until the input ends."""
    out = _Said(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # whatever a library prints is no message
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    busy = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            inbox.put(json.loads(line))
        if busy.is_set():
            os._exit(1)  # nobody would take the result; what a kill leaves is what the next run expects
        inbox.put(None)

    threading.Thread(target=listen, daemon=True).start()
    setup = inbox.get()
    if setup is None:
        return
    store = ResultStore(Path(setup["results"]), setup["study"])
    data_root, cache_dir = (Path(setup[key]) if setup[key] else None for key in ("data_root", "cache_dir"))
    where = Surroundings(data_root, cache_dir, setup["device"])
    tracking = Tracking(**setup["tracking"]) if setup["tracking"] else None
    while True:
        out.say(ready=True)
        cell = inbox.get()
        if cell is None:
            return
        busy.set()
        try:
            config = RunConfig.model_validate(cell["config"])
            result = run_tracked(config, store, where, setup["mode"], out, tracking)
            out.say(run_id=result.run_id)
        except (BenchError, OSError) as error:
            out.say(error=str(error))
        busy.clear()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
