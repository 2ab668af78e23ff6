"""What of a study is in Slurm: the arrays that were submitted, noted on disk, and what ``squeue`` says of them now.

Accounting (``sacct``) is not asked, since many clusters have none. Imports neither torch nor submitit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.errors import MachineError
from bench.launch.plan import PlannedCell
from bench.results import ResultStore, write_atomic

_QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_PATIENCE = 60.0


@dataclass(frozen=True)
class Job:
    """A cell that Slurm holds.

    Attributes
    ----------
    job
        Its id, such as ``1234_5``.
    state
        Whether it waits or runs. One that is just ending runs.
    reason
        Why it waits, in Slurm's words.
    """

    job: str
    state: Literal["queued", "running"]
    reason: str = ""

    @property
    def array(self) -> str:
        """Id of its array."""
        return self.job.partition("_")[0]


class SlurmQueue:
    """The cells of a study that were submitted to Slurm.

    Each array is a file that is written before Slurm hears of it, under a name that the array then has in Slurm: a
    submission that is killed at any moment leaves no job that is not known here.

    Parameters
    ----------
    store
        The study.
    """

    def __init__(self, store: ResultStore) -> None:
        self.store = store
        self.folder = store.folder / ".slurm"

    def note(self, cells: Sequence[PlannedCell]) -> str:
        """Note an array before it is submitted, and return the name that it must be given."""
        name = f"bench-{re.sub(r'[^a-zA-Z0-9.-]', '-', self.store.study)}-{uuid.uuid4().hex[:12]}"
        listed = [[cell.run_id, cell.config.label] for cell in cells]
        write_atomic(self._path(name), json.dumps(listed, indent=0).encode())
        return name

    def forget(self, name: str) -> None:
        """Take back the note of an array that Slurm refused."""
        self._path(name).unlink(missing_ok=True)

    def submitted(self) -> dict[str, str]:
        """Return the label of every cell that was ever submitted, by run id."""
        return {run_id: label for cells in self._arrays().values() for run_id, label in cells}

    def jobs(self) -> dict[str, Job]:
        """Return the cells that Slurm holds now, by run id.

        Raises
        ------
        MachineError
            If Slurm cannot be asked.
        """
        arrays = self._arrays()
        if not arrays:
            return {}
        # one line for each element of an array, also of those that wait
        lines = ask("squeue", "--noheader", "--array", "--name", ",".join(arrays), "--format", "%j|%F|%K|%T|%r")
        found = {}
        for line in lines.splitlines():
            name, array, element, state, reason = line.split("|", 4)
            single = not element.isdigit()  # a job of one cell is no array
            if name in arrays and (place := 0 if single else int(element)) < len(arrays[name]):
                run_id, _ = arrays[name][place]
                queued = state in _QUEUED
                job = array if single else f"{array}_{element}"
                found[run_id] = Job(job, "queued" if queued else "running", reason if queued else "")
        return found

    def log(self, run_id: str) -> Path:
        """Where the log of a cell is found."""
        return self.store.folder / "logs" / f"{run_id}.log"

    def link_log(self, run_id: str, target: Path) -> None:
        """Let a cell's log be found by its run id; an earlier one stays where it is.

        Raises
        ------
        MachineError
            If the folder cannot be written.
        """
        link = self.log(run_id)
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(target, link.parent.resolve()))
        except OSError as error:
            raise MachineError(f"cannot write {link.parent}: {error.strerror or error}") from error

    def _path(self, name: str) -> Path:
        return self.folder / "arrays" / f"{name}.json"

    def _arrays(self) -> dict[str, list[tuple[str, str]]]:
        """Return run id and label of the elements of each array, the oldest array first."""
        paths = sorted(self.folder.glob("arrays/*.json"), key=lambda path: path.stat().st_mtime)
        try:
            return {path.stem: [(run_id, label) for run_id, label in json.loads(path.read_bytes())] for path in paths}
        except (OSError, ValueError, TypeError) as error:
            raise MachineError(f"{self.folder} cannot be read ({error}). Remove what is torn in it.") from None


def ask(*words: str) -> str:
    """Return what one of Slurm's commands prints.

    Raises
    ------
    MachineError
        If it is not there, fails or does not answer.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except FileNotFoundError:
        raise MachineError(f"there is no `{words[0]}` on PATH") from None
    except subprocess.TimeoutExpired:
        raise MachineError(f"`{words[0]}` does not answer") from None
    except (OSError, subprocess.CalledProcessError) as error:
        said = " ".join(str(getattr(error, "stderr", "") or error).split())
        raise MachineError(f"`{words[0]}` fails: {said}") from None
    return done.stdout
