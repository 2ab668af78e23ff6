"""RunResult, the one JSON that a run leaves, and the store that keeps them. Imports no torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.errors import BenchError, ConfigError, DamagedResult, MachineError, first_fault

SCHEMA_VERSION = 1

Status = Literal["running", "done", "failed", "diverged", "skipped", "interrupted"]
Record = TypeVar("Record", bound=BaseModel)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Interval(_Model):
    """A bootstrap interval over examples.

    Attributes
    ----------
    value
        The metric on all examples.
    low, high
        Ends of the central ``level`` interval.
    level
        Coverage, e.g. 0.95.
    resamples
        Number of bootstrap resamples.
    """

    value: float
    low: float
    high: float
    level: float = 0.95
    resamples: int = 1000


class Evaluation(_Model):
    """Metrics on one split.

    Attributes
    ----------
    split
        ``"selection"`` (carved from train) or ``"dev"`` (reported).
    n_examples
        Number of examples that were evaluated.
    metrics
        Metric name -> value in [0, 1] (or [-1, 1] for correlations) with its interval over examples.
    """

    split: Literal["selection", "dev"]
    n_examples: int
    metrics: dict[str, Interval]


class Flops(_Model):
    """FLOPs (2 x multiply-accumulates) of one forward pass, by part.

    ``overhead`` is the method's own work (plugins, routers, predictors). It happens inside the encoder and is included
    in ``encoder``; ``total`` is encoder + decoder + head.
    """

    encoder: int
    decoder: int = 0
    head: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        """FLOPs of the whole model."""
        return self.encoder + self.decoder + self.head


class CostPair(_Model):
    """FLOPs of the teacher and of the compressed model on the same inputs."""

    dense: Flops
    compressed: Flops

    @property
    def remaining_encoder(self) -> float:
        """FLOPs(compressed) / FLOPs(teacher) in the encoder."""
        return self.compressed.encoder / self.dense.encoder

    @property
    def remaining_total(self) -> float:
        """FLOPs(compressed) / FLOPs(teacher) in the whole model."""
        return self.compressed.total / self.dense.total


class Cost(_Model):
    """What a model costs to run and to keep.

    Attributes
    ----------
    real
        FLOPs summed over the dev set, each example alone and unpadded.
    padded
        FLOPs summed over the dev set in the padded batches that were evaluated.
    batch_size
        Size of those batches.
    requested_remaining
        Remaining encoder FLOPs that the ratio asks for, on the same real tokens; ``None`` for dense.
    achieved_remaining
        Remaining encoder FLOPs that were measured, on real tokens.
    parameters_teacher, parameters_total
        Parameters of the teacher, and of the model that was run (teacher's plus added minus removed).
    parameters_added, parameters_trained
        Parameters that the method added, and that it trained (without the teacher's own training).
    bytes_added
        Size on disk of what the method must store beyond the teacher.
    bytes_teacher
        Size on disk of the teacher: all weights, or with LoRA the adapter and the head alone.
    bytes_total
        Size of all weights of the model that was run, each in its own type; ``None`` where a result lacks it.
    """

    real: CostPair
    padded: CostPair
    batch_size: int
    requested_remaining: float | None = None
    achieved_remaining: float
    parameters_teacher: int
    parameters_total: int
    parameters_added: int
    parameters_trained: int
    bytes_added: int
    bytes_teacher: int
    bytes_total: int | None = None


class Latency(_Model):
    """Interleaved timings of the teacher and the compressed model at one input shape.

    Sample i of both lists was taken back to back, so that the ratio stands on a noisy machine. The FLOPs are those of
    the whole model on the batch that was timed.
    """

    batch_size: int
    sequence_length: int
    dense_seconds: list[float]
    compressed_seconds: list[float]
    dense_flops: int = 0
    compressed_flops: int = 0


class Memory(_Model):
    """Peak bytes of tensors alive at once during one forward pass, weights not included."""

    batch_size: int
    sequence_length: int
    dense_bytes: int
    compressed_bytes: int


class TrainingStage(_Model):
    """One training that a run needed.

    Attributes
    ----------
    name
        ``"teacher"``, ``"pretrain"``, ``"adapt"`` or a method's own word.
    artifact
        Key of the artifact that the stage made or found.
    cached
        Whether the artifact was found instead of made.
    steps, examples
        Optimiser steps, and examples seen.
    flops
        Estimated training FLOPs of the stage, in the encoder.
    seconds
        Wall time when it was made.
    history
        One record per logged step: ``{"step": ..., "<loss part>": ...}``.
    """

    name: str
    artifact: str
    cached: bool
    steps: int
    examples: int
    flops: int
    seconds: float
    history: list[dict[str, float]] = Field(default_factory=list)


class Provenance(_Model):
    """Where a number came from."""

    commit: str | None
    dirty: bool | None
    command: list[str]
    started: str
    seconds: float | None = None
    host: str
    platform: str
    hardware: str
    device: str
    threads: int
    versions: dict[str, str]
    data_digest: str | None = None
    model_digest: str | None = None
    seeds: dict[str, int] = Field(default_factory=dict)


class RunResult(_Model):
    """Everything that one run leaves, but the per-example predictions (a parquet file beside it).

    ``examples`` counts what was used and what there was: ``train``, ``train_available``, ``selection``, ``dev`` and
    ``dev_available``.
    """

    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    run_id: str
    study: str
    status: Status
    reason: str | None = None
    traceback: str | None = None
    config: dict[str, Any]
    identity: dict[str, Any]
    task: dict[str, Any] = Field(default_factory=dict)
    knob: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    examples: dict[str, int] = Field(default_factory=dict)
    evaluations: list[Evaluation] = Field(default_factory=list)
    teacher_evaluations: list[Evaluation] = Field(default_factory=list)
    cost: Cost | None = None
    latency: list[Latency] = Field(default_factory=list)
    memory: list[Memory] = Field(default_factory=list)
    training: list[TrainingStage] = Field(default_factory=list)
    predictions: str | None = None
    provenance: Provenance

    @property
    def label(self) -> str:
        """A short name for people, such as ``sst2 · minilm-l6 · variator k=4 · seed 0``."""
        config = self.config
        # a method that has no ratio, such as dense, has none in its identity
        ratio = (self.identity or config).get("ratio")
        method = f"{config.get('method')} k={ratio:g}" if ratio else config.get("method")
        return f"{config.get('task')} · {config.get('backbone')} · {method} · seed {config.get('seed')}"

    def evaluation(self, split: str) -> Evaluation | None:
        """Return the evaluation on ``split``, or ``None``."""
        return next((e for e in self.evaluations if e.split == split), None)


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` so that a reader sees the old file or the new one, never a part.

    Raises
    ------
    BenchError
        If the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another folder."
        ) from error


class ResultStore:
    """The runs of one study: ``<root>/<study>/runs/<run_id>.json`` and ``predictions/<run_id>.parquet``.

    Two processes may use one store at a time: files appear whole, and a run is owned by whoever holds its lock.

    Parameters
    ----------
    root
        The ``results`` folder.
    study
        Name of the study, a folder under it.

    Raises
    ------
    ConfigError
        If the name is none of a folder below ``root``.
    """

    def __init__(self, root: Path | str, study: str) -> None:
        if not re.fullmatch(r"[^./\\\s][^/\\\n]*", study):
            raise ConfigError(f"'{study}' cannot name a study: it must be the name of one folder")
        self.root, self.study = Path(root), study
        self.folder = self.root / study

    def path(self, run_id: str) -> Path:
        """Where the JSON of ``run_id`` is or will be."""
        return self.folder / "runs" / f"{run_id}.json"

    def predictions_path(self, run_id: str) -> Path:
        """Where the per-example predictions of ``run_id`` are or will be."""
        return self.folder / "predictions" / f"{run_id}.parquet"

    def lock_path(self, run_id: str) -> Path:
        """Return the lock that the process working on ``run_id`` holds."""
        return self.folder / ".locks" / f"{run_id}.lock"

    def read(self, run_id: str) -> RunResult | None:
        """Return the stored result, or ``None`` if there is none.

        Raises
        ------
        DamagedResult
            If the file is no valid result.
        BenchError
            If it cannot be read.
        """
        path = self.path(run_id)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BenchError(f"cannot read {path}: {error.strerror}. Correct it, or choose another folder.") from error
        result = parse(content, path)
        if result.run_id != run_id:
            raise DamagedResult(
                f"{path} is not a valid result (it is that of run {result.run_id}). "
                "Move it away and run the cell again."
            )
        return result

    def quarantine(self, run_id: str) -> Path:
        """Move what is stored under ``run_id`` out of the way, and return where it is kept.

        Raises
        ------
        MachineError
            If the folder cannot be written.
        """
        folder = self.folder / "quarantine"
        try:
            folder.mkdir(exist_ok=True)
            number = next(n for n in itertools.count(1) if not (folder / f"{run_id}-{n}.json").exists())
            kept = folder / f"{run_id}-{number}.json"
            with contextlib.suppress(FileNotFoundError):  # another process did it
                os.replace(self.path(run_id), kept)
        except OSError as error:
            raise MachineError(f"cannot write {folder}: {error.strerror or error}. Choose another folder.") from error
        return kept

    def clear(self, run_id: str) -> None:
        """Remove what a kill left of unfinished writes; only for who holds the lock of ``run_id``."""
        for path in (self.path(run_id), self.predictions_path(run_id)):
            for partial in path.parent.glob(f".{path.name}.*.tmp"):
                partial.unlink(missing_ok=True)

    def write(self, result: RunResult) -> Path:
        """Store ``result`` under its run id, replacing what was there."""
        path = self.path(result.run_id)
        write_atomic(path, (result.model_dump_json(indent=1) + "\n").encode())
        return path

    def __iter__(self) -> Iterator[RunResult]:
        for path in sorted((self.folder / "runs").glob("*.json")):
            yield parse(path.read_bytes(), path)


def studies(root: Path) -> list[str]:
    """Name the studies below a results folder."""
    return sorted(folder.parent.name for folder in root.glob("*/runs") if folder.is_dir())


def parse(content: bytes, path: Path) -> RunResult:
    """Read a result's JSON; see `parse_as` for what it raises."""
    return parse_as(RunResult, content, path, "result", "run the cell again")


def parse_as(kind: type[Record], content: bytes, path: Path, what: str, again: str) -> Record:
    """Read a JSON file of one of the kinds that this suite writes.

    Parameters
    ----------
    kind
        What it is.
    content, path
        The file's bytes, and where it is, for errors.
    what, again
        What people call it, and how they get another one.

    Raises
    ------
    DamagedResult
        If it is torn or has unknown fields; the message names the file.
    BenchError
        If it is of another schema.
    """
    try:
        fields = json.loads(content)
        version = fields.get("schema_version") if isinstance(fields, dict) else None
        known = kind.model_fields.get("schema_version")
        if known and isinstance(version, int) and version > known.default:
            raise BenchError(
                f"{path} is not a valid {what} (schema_version is {version}, and this version reads {known.default}). "
                f"Update this library, or move the file away and {again}."
            )
        return kind.model_validate(fields)
    except ValidationError as error:
        problem = first_fault(error)
    except ValueError as error:
        problem = str(error)
    raise DamagedResult(f"{path} is not a valid {what} ({problem}). Move it away and {again}.")
