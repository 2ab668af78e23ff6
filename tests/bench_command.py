"""The ``bench`` command in a process of its own, which can be watched and killed, and sweeps of a few seconds."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import struct
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from tests.checkpoints import QUICK, task_file, tiny_checkpoint
from tests.workers import PATIENCE, quick_measuring, start


@dataclass(frozen=True)
class Command:
    """A started command and what it prints."""

    process: BaseProcess
    folder: Path
    at: Path
    copier: threading.Thread | None = None

    def wait(self) -> int:
        """Wait for the end and return the exit code; a signal's is negative."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"still running after {PATIENCE} s: {self.err}"
        if self.copier:
            self.copier.join(PATIENCE)
        return self.process.exitcode

    @property
    def out(self) -> str:
        """Standard output so far."""
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        """Standard error so far."""
        return (self.folder / "err").read_text()


def launch(
    words: Sequence[str | Path],
    at: Path,
    terminal: bool = False,
    environ: Mapping[str, str] | None = None,
    machine: bool = True,
) -> Command:
    """Start ``bench`` with its working folder at ``at``, which then holds ``results`` and ``cache``.

    With ``terminal``, what it prints goes to a terminal of 80 x 24, and comes back as ``out``. ``environ`` is added to
    its environment, where an empty value takes a name away. A command that runs nothing has no options that say on
    which ``machine``.
    """
    folder = at / f"said-{len(list(at.glob('said-*')))}"
    folder.mkdir(parents=True)
    out, err = folder / "out", folder / "err"
    out.touch()
    err.touch()
    arguments = [*map(str, words), *(["--cache-dir", str(at / "cache"), "--device", "cpu"] if machine else [])]
    if not terminal:
        return Command(start(_bench, arguments, at, out, err, dict(environ or {})), folder, at)
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    name = Path(os.ttyname(slave))
    process = start(_bench, arguments, at, name, name, dict(environ or {}))
    copier = threading.Thread(target=_copy, args=(master, out, process), daemon=True)
    copier.start()
    return Command(process, folder, at, copier)


def _copy(terminal: int, to: Path, process: BaseProcess) -> None:
    """Copy what ``process`` prints, to its last word."""
    with to.open("ab", buffering=0) as file:
        while True:
            alive = process.is_alive()  # before the look: what a process that has ended said is there to be read
            if select.select([terminal], [], [], 0.05)[0]:
                file.write(os.read(terminal, 65536))
            elif not alive:
                return


def bench(
    words: Sequence[str | Path], at: Path, environ: Mapping[str, str] | None = None, machine: bool = True
) -> tuple[int, Command]:
    """Run ``bench`` to its end and return the exit code with what it printed."""
    command = launch(words, at, environ=environ, machine=machine)
    return command.wait(), command


def _bench(arguments: list[str], at: Path, out: Path, err: Path, environ: dict[str, str]) -> None:
    os.chdir(at)
    os.environ.update(environ)
    for name in [name for name, value in environ.items() if not value]:
        del os.environ[name]
    # tests that run in the background of a shell inherit that Ctrl-C is ignored, which a user's command does not
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TERM"] = "xterm-256color"
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY), descriptor)
    quick_measuring()
    from bench.cli import main

    main(arguments, prog_name="bench")


def main(arguments: Sequence[str]) -> None:
    """Be ``bench`` with quick measuring, in a process that something else has started."""
    quick_measuring()
    from bench.cli import main

    main(arguments, prog_name="bench")


def tiny_sweep(folder: Path, name: str = "tiny", **parameters: Any) -> Path:
    """Write a sweep over a tiny task and checkpoint, dense and k = 2, 4; a list gives several values."""
    task, backbone = folder / "mood" / "mood.yaml", folder / "bert"
    if not task.exists():
        task_file(task.parent)
        tiny_checkpoint(backbone, "bert")
    given: dict[str, Any] = {
        **QUICK,
        "task": str(task),
        "backbone": str(backbone),
        "method": ["dense", "variator"],
        "ratio": [2, 4],
        **parameters,
    }
    lines = {key: {"values": value} if isinstance(value, list) else {"value": value} for key, value in given.items()}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "method": "grid", "parameters": lines}, sort_keys=False))
    return path


def results(at: Path, study: str = "tiny") -> dict[str, dict[str, Any]]:
    """Return every stored result of a study by method and k, such as ``variator-4``; each must be whole."""
    found = {}
    for path in sorted((at / "results" / study / "runs").glob("*.json")):
        result = json.loads(path.read_text())
        config = result["config"]
        name = config["method"] if config["method"] == "dense" else f"{config['method']}-{config['ratio']:g}"
        assert name not in found, f"two results of {name}"
        found[name] = result
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
