"""What a W&B project has: results to bring back, and sweeps to make. Imports wandb where it is used."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.incoming import STANDING, Pulled, take
from bench.tracking.account import first_line, has_key
from bench.tracking.link import environment

if TYPE_CHECKING:
    import wandb

ANSWER_SECONDS = 20.0
"""Longest wait for a project at the start of a command, with what it takes to ask at all."""
REQUEST_SECONDS = 8
"""Longest wait for one answer of the server there."""


def pull(path: str, root: Path, study: str | None = None) -> Pulled:
    """Bring the finished runs of ``ENTITY/PROJECT`` or ``ENTITY/PROJECT/SWEEP`` back as the files that they were.

    Parameters
    ----------
    path
        The project or the sweep.
    root
        The results folder.
    study
        The study to put them in; by default each result's own.

    Raises
    ------
    BenchError
        If there is no such project or sweep, or the server cannot be asked.
    """
    parts = path.strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise BenchError(f"'{path}' is no W&B project: expected ENTITY/PROJECT or ENTITY/PROJECT/SWEEP")
    with _asking(path), tempfile.TemporaryDirectory() as scratch:
        api = _api(60)
        of_sweep = {"sweep": parts[2]} if len(parts) == 3 else {}
        if of_sweep:
            api.sweep(path)  # type: ignore[no-untyped-call]  # it must exist: no run would match it then
        runs = api.runs("/".join(parts[:2]), {"state": "finished", **of_sweep}, per_page=500)
        ids = dict.fromkeys(run.config.get("run_id") for run in runs)
        return _store(api, "/".join(parts[:2]), [i for i in ids if i], root, study, Path(scratch))


def fetch(project: str, ids: Sequence[str], root: Path, study: str) -> int:
    """Bring back those of ``ids`` that the project has; return how many there were.

    W&B's library runs in a process of its own, which is given up after a while.

    Raises
    ------
    BenchError
        If the server does not answer in time, or refuses.
    """
    asked = {"project": project, "ids": list(ids), "root": str(root), "study": study}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.tracking.project"],
            input=json.dumps(asked),
            env=environment(root / study),
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            start_new_session=True,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise BenchError(f"the server gave no answer within {ANSWER_SECONDS:.0f} s") from None
    except ValueError:
        raise BenchError("its library ended without an answer") from None
    if "problem" in answer:
        raise BenchError(answer["problem"])
    return int(answer["fetched"])


def create_sweep(content: dict[str, Any], project: str) -> tuple[str, str | None]:
    """Make a sweep of the content of its file; return its path for an agent, and its page if that is known.

    Raises
    ------
    BenchError
        If the server refuses it or cannot be asked.
    """
    import wandb

    with _asking(f"a sweep in {project}"), contextlib.redirect_stdout(io.StringIO()) as said:
        api = _api(60)
        entity = content.get("entity") or os.environ.get("WANDB_ENTITY") or api.default_entity
        sweep = wandb.sweep(content, entity=entity, project=project)
    page = re.search(r"Sweep URL: (\S+)", said.getvalue())
    return f"{entity}/{project}/{sweep}", page and page[1]


def _api(timeout: int) -> wandb.Api:
    import wandb

    if not has_key():  # wandb would ask for one
        raise BenchError("no key for W&B is configured: `wandb login` asks for one, or set WANDB_API_KEY")
    wandb.setup(wandb.Settings(silent=True))
    return wandb.Api(timeout=timeout)


@contextlib.contextmanager
def _asking(path: str) -> Iterator[None]:
    """Turn what wandb raises into an error that says what was asked for."""
    try:
        yield
    except BenchError:
        raise
    except Exception as error:  # its library raises whatever its parts do
        raise BenchError(f"W&B does not give {path}: {first_line(error)}") from error


def _store(api: wandb.Api, project: str, ids: Sequence[str], root: Path, study: str | None, scratch: Path) -> Pulled:
    """Bring the results of ``ids`` to the store; what is here and stands is not replaced."""
    pulled = Pulled()
    for run_id in ids:
        folder = scratch / "download"
        try:
            if not re.fullmatch(r"[0-9a-f]{16}", run_id):
                raise BenchError("it is no run of this suite")
            artifact = api.artifact(f"{project}/result-{run_id}:latest", type="result")
            artifact.download(str(folder), skip_cache=True)
            take(folder / "result.json", folder / "predictions.parquet", run_id, root, study, pulled)
        except Exception as error:
            pulled.problems.append(f"{run_id}: {first_line(error)}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return pulled


def _fetch(asked: dict[str, Any]) -> int:
    api = _api(REQUEST_SECONDS)
    project = f"{os.environ.get('WANDB_ENTITY') or api.default_entity}/{asked['project']}"
    if not asked["ids"]:
        return 0
    done = {"config.run_id": {"$in": asked["ids"]}, "summary_metrics.status": {"$in": list(STANDING)}}
    try:
        found = {run.config.get("run_id") for run in api.runs(project, done, per_page=500)}
    except ValueError:  # there is no such project yet
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        ids = [i for i in asked["ids"] if i in found]
        return len(_store(api, project, ids, Path(asked["root"]), asked["study"], Path(scratch)).fetched)


def main() -> None:
    """Answer ``fetch``, whose question comes as JSON, with JSON."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever wandb prints is no answer
    try:
        answer: dict[str, Any] = {"fetched": _fetch(json.load(sys.stdin))}
    except Exception as error:
        answer = {"problem": first_line(error)}
    out.write(json.dumps(answer))
    out.flush()
    os._exit(0)  # wandb's own goodbye waits for a dead server


if __name__ == "__main__":
    main()
