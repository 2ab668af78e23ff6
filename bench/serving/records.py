"""What serving leaves: the answers of one load under one policy, their summary, and the files of a study. No torch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from bench.errors import DamagedResult
from bench.results import Provenance, Record, parse_as, write_atomic

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
SERVING_FILE = "serving.json"
SERVING_FOLDERS = ("cells", "tallies", "requests")
Mode = Literal["real", "simulated"]
QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Served:
    """Every request of one load, in the order of arrival.

    Attributes
    ----------
    example
        Which dev example it asked for, (requests,).
    arrived, started, finished
        Seconds since the load began: arrival, start of its batch, answer, (requests,).
    k
        What its batch was run at, (requests,).
    score
        1 where the answer was right, else 0; token F1 of an answer to a question, (requests,).
    """

    example: NDArray[np.int32]
    arrived: NDArray[np.float64]
    started: NDArray[np.float64]
    finished: NDArray[np.float64]
    k: NDArray[np.int16]
    score: NDArray[np.float32]

    @property
    def latency(self) -> NDArray[np.float64]:
        """Seconds from arrival to answer."""
        return self.finished - self.arrived

    def tally(self, examples: int, deadline: float) -> Tally:
        """Count by dev example, of which there are ``examples``, against a deadline in seconds."""
        in_time = self.latency <= deadline

        def count(weights: NDArray[Any] | None = None) -> NDArray[np.float64]:
            return np.bincount(self.example, weights, minlength=examples).astype(np.float64)

        return Tally(count(), count(in_time), count(self.score), count(self.score * in_time))

    def summary(self, deadline: float) -> Summary:
        """Sum up against a deadline in seconds."""
        latency = self.latency
        in_time = latency <= deadline
        ks, counts = np.unique(self.k, return_counts=True)
        p50, p95, p99 = np.quantile(latency, QUANTILES)
        return Summary(
            requests=len(latency),
            accuracy=float(self.score.mean(dtype=np.float64)),
            in_time=float(in_time.mean()),
            right_in_time=float((self.score * in_time).mean(dtype=np.float64)),
            p50_seconds=float(p50),
            p95_seconds=float(p95),
            p99_seconds=float(p99),
            throughput=len(latency) / float(self.finished.max() - self.arrived.min()),
            share_at_k={int(k): int(n) / len(latency) for k, n in zip(ks, counts, strict=True)},
        )


@dataclass(frozen=True)
class Tally:
    """Requests counted by the dev example that they asked for: what any mean over them and its interval are made of.

    Attributes
    ----------
    requests, in_time
        How many there were, and how many were answered within the deadline, (examples,).
    score, score_in_time
        Sum of the scores, and of those within the deadline, (examples,).
    """

    requests: NDArray[np.float64]
    in_time: NDArray[np.float64]
    score: NDArray[np.float64]
    score_in_time: NDArray[np.float64]

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Summary(_Model):
    """What came of one load.

    Attributes
    ----------
    requests
        How many there were; each was answered.
    accuracy
        Mean score of the answers, late ones included.
    in_time
        Share of the requests that were answered within the deadline.
    right_in_time
        Mean score where a late answer counts 0.
    p50_seconds, p95_seconds, p99_seconds
        Quantiles of the time from arrival to answer.
    throughput
        Answers a second, from the first arrival to the last answer.
    share_at_k
        k -> share of the requests that were answered with it.
    """

    requests: int
    accuracy: float
    in_time: float
    right_in_time: float
    p50_seconds: float
    p95_seconds: float
    p99_seconds: float
    throughput: float
    share_at_k: dict[int, float]


class ServedModel(_Model):
    """One k of an engine.

    Attributes
    ----------
    k
        What it is called; 1 is the dense teacher.
    source
        The run whose model it is, or the teacher's key in the artifact cache.
    config
        The configuration of that run, or of one that has this teacher.
    remaining
        Encoder FLOPs that are left, by the method's setting on the selection split.
    accuracy
        Mean score on the whole dev split.
    """

    k: int
    source: str
    config: dict[str, Any]
    remaining: float
    accuracy: float


class Calibration(_Model):
    """How long an engine takes, measured k by k in turn.

    Attributes
    ----------
    engine
        Method.
    models
        What can be chosen, by ascending k.
    resident_bytes
        Bytes of all distinct tensors that the engine holds, for all its ks together.
    sizes, lengths
        Batch sizes and padded lengths that were measured, ascending.
    seconds
        Raw samples, ``seconds[k][size][length][sample]``, from features in memory to answers in memory.
    examples
        Lengths in tokens of the dev examples.
    scores
        Scores of each k's answers on the dev examples, ``scores[k][example]``.
    """

    engine: str
    models: list[ServedModel]
    resident_bytes: int
    sizes: list[int]
    lengths: list[int]
    seconds: list[list[list[list[float]]]]
    examples: list[int]
    scores: list[list[float]]


class ServingCell(_Model):
    """One load under one policy.

    Attributes
    ----------
    cell_id
        Hash of everything that can change it.
    engine, policy, load, load_seed
        What served, what chose k, what arrived, and the seed of the arrivals.
    mode
        ``real`` time on this machine, or ``simulated`` from the calibration.
    replicas, times
        How many models served, and by how much the load was multiplied.
    seconds
        How long requests arrived.
    offered
        Requests a second that arrived, on average.
    summary
        What came of it.
    requests
        File of the single requests; ``None`` where they are not kept, since a simulation gives them again.
    """

    cell_id: str
    engine: str
    policy: str
    load: str
    load_seed: int
    mode: Mode
    replicas: int
    times: float
    seconds: float
    offered: float
    summary: Summary
    requests: str | None


class ServingStudy(_Model):
    """What is common to all cells of a study of serving.

    Attributes
    ----------
    study
        Its name.
    task, backbone, seed
        What was served.
    deadline_seconds
        Seconds from arrival within which an answer is in time.
    max_batch
        Most requests of a batch.
    capacity
        Requests a second that the dense model serves in full batches, by its calibration; loads are shares of it.
    provenance
        Where the numbers came from.
    calibrations
        One for each engine.
    """

    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    study: str
    task: str
    backbone: str
    seed: int
    deadline_seconds: float
    max_batch: int
    capacity: float
    provenance: Provenance
    calibrations: list[Calibration]


class ServingStore:
    """The files of a study of serving.

    ``serving.json``, and for each cell ``cells/<id>.json``, ``tallies/<id>.parquet`` and, where it was served in real
    time, ``requests/<id>.parquet``.

    Parameters
    ----------
    folder
        ``results/<study>``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> ServingStudy | None:
        """Return what is common to all cells, or ``None`` where there is nothing yet.

        Raises
        ------
        DamagedResult
            If the file is torn.
        """
        path = self.folder / SERVING_FILE
        return _parse(path, ServingStudy) if path.exists() else None

    def write(self, study: ServingStudy) -> None:
        """Store what is common to all cells."""
        write_atomic(self.folder / SERVING_FILE, (study.model_dump_json() + "\n").encode())

    def cell(self, cell_id: str) -> ServingCell | None:
        """Return a finished cell, or ``None``."""
        path = self.folder / "cells" / f"{cell_id}.json"
        return _parse(path, ServingCell) if path.exists() else None

    def add(self, cell: ServingCell, served: Served, tally: Tally) -> None:
        """Store a finished cell: what it is made of first, so that a cell that is there is whole."""
        if cell.requests:
            columns: dict[str, NDArray[Any]] = {
                "example": served.example,
                "arrived": served.arrived.astype(np.float32),
                "latency": served.latency.astype(np.float32),
                "k": served.k,
                "score": served.score,
            }
            self._write(cell.requests, columns)
        self._write(self._tally(cell.cell_id), {name: c.astype(np.float32) for name, c in vars(tally).items()})
        write_atomic(self.folder / "cells" / f"{cell.cell_id}.json", (cell.model_dump_json(indent=1) + "\n").encode())

    def tally(self, cell: ServingCell) -> Tally:
        """Return a cell's requests, counted by example.

        Raises
        ------
        DamagedResult
            If the file is torn or missing.
        """
        frame = self._read(self._tally(cell.cell_id), cell)
        return Tally(*(frame[name].to_numpy(np.float64) for name in Tally.__dataclass_fields__))

    def requests(self, cell: ServingCell) -> pd.DataFrame:
        """Return the single requests of a cell that kept them, in the order of arrival.

        Raises
        ------
        DamagedResult
            If the file is torn or missing.
        """
        return self._read(str(cell.requests), cell)

    @staticmethod
    def _tally(cell_id: str) -> str:
        return f"tallies/{cell_id}.parquet"

    def _write(self, name: str, columns: dict[str, NDArray[Any]]) -> None:
        import pandas as pd

        content = io.BytesIO()
        pd.DataFrame(columns).to_parquet(content, index=False, compression="zstd")
        write_atomic(self.folder / name, content.getvalue())

    def _read(self, name: str, cell: ServingCell) -> pd.DataFrame:
        import pandas as pd

        try:
            return pd.read_parquet(self.folder / name)
        except (OSError, ValueError) as error:  # pyarrow's own are of these kinds
            raise DamagedResult(
                f"{self.folder / name} cannot be read ({str(error).splitlines()[0]}). "
                f"Remove cells/{cell.cell_id}.json, and serve again."
            ) from None

    def __iter__(self) -> Iterator[ServingCell]:
        for path in sorted((self.folder / "cells").glob("*.json")):
            yield _parse(path, ServingCell)


def _parse(path: Path, kind: type[Record]) -> Record:
    return parse_as(kind, path.read_bytes(), path, "result of serving", "serve again")
