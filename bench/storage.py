"""StorageResult, the one JSON that `bench storage` leaves of a study. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from bench.errors import BenchError
from bench.results import Provenance, parse_as, write_atomic

SCHEMA_VERSION = 1
STORAGE_FILE = "storage.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StoragePoint(_Model):
    """What so many tasks take.

    Attributes
    ----------
    tasks
        Number of tasks.
    distinct
        How many of them were trained; the others are copies of these with other numbers in them.
    disk_bytes
        Size of the files that were written, the shared one included.
    files
        Their number.
    tensor_bytes
        Bytes of the tensors in memory, those that share memory once; ``None`` where it was not measured.
    resident_bytes
        How much the process grew (resident set) by loading them; ``None`` where it was not measured.
    load_seconds
        From the files to the last task in memory.
    ran
        Tasks that then answered a batch in that process.
    reason
        Why memory was not measured.
    """

    tasks: int
    distinct: int
    disk_bytes: int
    files: int
    tensor_bytes: int | None = None
    resident_bytes: int | None = None
    load_seconds: float | None = None
    ran: int = 0
    reason: str | None = None


class Agreement(_Model):
    """Rows of several tasks in one batch on one backbone, against each task's own model.

    Attributes
    ----------
    k
        Of every row; 1 is dense.
    examples, batches
        How many were compared, in how many mixed batches.
    same
        How many of the predictions are equal.
    largest_difference
        Largest absolute difference of a logit.
    """

    k: int
    examples: int
    batches: int
    same: int
    largest_difference: float


class StorageSeries(_Model):
    """One way to keep many tasks.

    Attributes
    ----------
    method, lora, ratios
        The method; whether its teachers are LoRA; the ratios that each task is kept at, empty for dense.
    runs
        Task -> the runs whose artifacts were stored, a ratio each.
    shared_bytes
        Weights of the backbone that the tasks refer to in place of keeping them, which are stored once.
    task_bytes
        Task -> bytes of its own files.
    points
        Measurements, fewest tasks first.
    agreement
        Where the tasks share one resident backbone.
    """

    method: str
    lora: bool
    ratios: list[float]
    runs: dict[str, list[str]]
    shared_bytes: int
    task_bytes: dict[str, int]
    points: list[StoragePoint]
    agreement: list[Agreement] = Field(default_factory=list)


class StorageResult(_Model):
    """Bytes of many tasks on disk and in memory, measured in one go on one machine.

    Attributes
    ----------
    backbone, family
        The one backbone.
    backbone_bytes
        All of its weights.
    series
        The ways that were compared.
    """

    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    study: str
    backbone: str
    family: str
    backbone_bytes: int
    series: list[StorageSeries]
    provenance: Provenance


def write_storage(result: StorageResult, folder: Path) -> Path:
    """Store a result in the folder of its study, in the place of an earlier one."""
    path = folder / STORAGE_FILE
    write_atomic(path, (result.model_dump_json(indent=1) + "\n").encode())
    return path


def read_storage(folder: Path) -> StorageResult | None:
    """Return the measurement of a study, or ``None`` where none was made.

    Raises
    ------
    DamagedResult
        If the file is torn, or not what `write_storage` writes.
    BenchError
        If it is of a later version, or cannot be read.
    """
    path = folder / STORAGE_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    return parse_as(StorageResult, content, path, "measurement", "run `bench storage` again")
