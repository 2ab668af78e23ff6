"""StorageResult, the one JSON that `bench storage` leaves of a study. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.errors import BenchError, DamagedResult
from bench.results import Provenance, write_atomic

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
        fields = json.loads(path.read_bytes())
        version = fields.get("schema_version", SCHEMA_VERSION) if isinstance(fields, dict) else SCHEMA_VERSION
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BenchError(
                f"{path} has schema_version {version}, and this version reads {SCHEMA_VERSION}. Update this library."
            )
        return StorageResult.model_validate(fields)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    except ValueError as error:
        problem = str(error)
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from error
    raise DamagedResult(f"{path} is not a valid measurement ({problem}). Move it away and run `bench storage` again.")
