"""Results that come back from elsewhere: each is checked, and none takes the place of one that is here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from bench.config import run_id as identified_by
from bench.errors import BenchError
from bench.results import ResultStore, RunResult, parse, write_atomic

STANDING = ("done", "skipped")
"""Results that are worth bringing back; others would be run again."""


@dataclass
class Pulled:
    """What became of results that came.

    Attributes
    ----------
    fetched, same
        Results that were written, and those that were here already.
    kept
        Results that are here with another content, which stay.
    problems
        What could not be read, and why.
    """

    fetched: list[RunResult] = field(default_factory=list)
    same: list[RunResult] = field(default_factory=list)
    kept: list[RunResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def take(path: Path, predictions: Path, run_id: str, root: Path, study: str | None, pulled: Pulled) -> None:
    """Put a result that came into the store, if it is whole and none is there.

    Parameters
    ----------
    path, predictions
        Its JSON, and its per-example predictions.
    run_id
        The name that it came under.
    root, study
        The results folder, and the study to put it in; by default its own.
    pulled
        Told what became of it.

    Raises
    ------
    BenchError
        If it is torn, of another schema, or not what its name says.
    OSError
        If a file is missing.
    """
    content = path.read_bytes()
    result = parse(content, path)
    if not re.fullmatch(r"[0-9a-f]{16}", run_id):
        raise BenchError("it is no run of this suite")
    store = ResultStore(root, study or result.study)
    # whoever may write there may put anything there: the name must be that of what the result says it is
    own = {result.run_id, identified_by(result.identity)} == {run_id}
    if not own or result.predictions not in (None, f"predictions/{run_id}.parquet"):
        raise BenchError("its result is of another run")
    if result.status not in STANDING:
        return
    here = store.path(run_id)
    stored = here.read_bytes() if here.exists() else b""
    if stored == content:
        pulled.same.append(result)
    elif stored and parse(stored, here).status in STANDING:
        pulled.kept.append(result)
    else:
        if result.predictions:  # first, so that a result that is there has its predictions
            write_atomic(store.predictions_path(run_id), predictions.read_bytes())
        write_atomic(here, content)
        pulled.fetched.append(result)
