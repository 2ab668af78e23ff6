"""Rows of a local file or of the Hub, through the datasets library; what is torn or missing is said at once."""

from __future__ import annotations

import contextlib
import glob
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import DataError, NoData, suggest
from bench.tasks.sources import DATA_ROOT_VARIABLE, FORMATS
from bench.tasks.spec import TaskSpec

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_A_BATCH = 10_000
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    # The library's own choice of size fails on a file without rows.
    ".parquet": ("parquet", {"batch_size": _ROWS_A_BATCH}),
    ".jsonl": ("json", {}),
    # Pandas would else read the words "NA", "null" and "None" as missing.
    ".csv": ("csv", {"keep_default_na": False}),
}
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Rows:
    """Rows of one split, and what to call it in an error."""

    name: str
    tables: list[pa.Table]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for table in self.tables:
            yield from table.to_pylist()


def read_file(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Rows:
    """Read some columns of a parquet, JSONL or CSV file.

    Parameters
    ----------
    path
        The file; its suffix says what it is.
    columns
        Columns that must be there.
    optional
        Columns that are read where they are there.

    Raises
    ------
    DataError
        If the file is missing, torn, or lacks a column.
    """
    from datasets import load_dataset

    if path.suffix not in _BUILDERS:
        raise DataError(f"{path} is of an unknown kind; expected {', '.join(FORMATS)}.")
    builder, options = _BUILDERS[path.suffix]
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{path} has no rows: the file is empty.")
    # Streaming keeps no second copy of the file; the folder only holds the library's locks. Offline, the library does
    # not report the use of its builder, which would wait for a network that a local file does not need.
    with tempfile.TemporaryDirectory() as scratch, _offline():
        try:
            stream = load_dataset(
                builder,
                data_files=glob.escape(str(path.absolute())),
                split="train",
                streaming=True,
                cache_dir=scratch,
                **options,
            )
            tables = list(stream.with_format("arrow").iter(batch_size=_ROWS_A_BATCH))
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"cannot read {path} as {builder}, it may be half-written: {reason}") from error
    return Rows(str(path), [_select(table, columns, optional, str(path)) for table in tables])


def _select(table: pa.Table, columns: Sequence[str], optional: Sequence[str], where: str) -> pa.Table:
    there = table.column_names
    for column in columns:
        if column not in there:
            raise DataError(f"{where} has no column '{column}'.{suggest(column, there)} Columns: {', '.join(there)}.")
    return table.select([*columns, *(column for column in optional if column in there and column not in columns)])


def read_hub(spec: TaskSpec, columns: Sequence[str]) -> dict[str, Rows]:
    """Read train and dev of a task from the Hub, or from the local cache of it where there is no network.

    Raises
    ------
    DataError
        If neither has the data; without a network this takes seconds.
    """
    from datasets import load_dataset

    source = spec.source
    named = f"{source.hub}{f' ({source.config})' if source.config else ''}"
    reachable = _hub_answers()
    with contextlib.nullcontext() if reachable else _offline():
        try:
            splits = load_dataset(source.hub, source.config, revision=source.revision)
        except Exception as error:
            kind = DataError if reachable else NoData
            raise kind(_unavailable(spec, named, columns, reachable, error)) from error
    found = {"train": source.train, "dev": source.dev}
    for name in found.values():
        if name not in splits:
            raise DataError(f"{named} on the Hub has no split '{name}'; splits: {', '.join(splits)}.")
        # Where the Hub fails, the library takes whatever revision it kept last; its folder is named after the commit.
        pinned = re.fullmatch("[0-9a-f]{40}", source.revision)
        if pinned and not any(source.revision in file["filename"] for file in splits[name].cache_files):
            raise DataError(f"the local cache of {named} is not of revision {source.revision}; fetch that one first.")
    optional = ["id"] if spec.kind == "qa" else []
    rows = {}
    for split, name in found.items():
        tables = splits[name].with_format("arrow").iter(batch_size=_ROWS_A_BATCH)
        where = f"{named} on the Hub, split {name}"
        rows[split] = Rows(where, [_select(table, columns, optional, where) for table in tables])
    return rows


def _hub_answers() -> bool:
    """Ask the Hub once, briefly: the libraries' own retries take half a minute to give up."""
    import datasets
    from huggingface_hub import get_session

    if datasets.config.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            if get_session().head(datasets.config.HF_ENDPOINT, timeout=_PROBE_SECONDS).status_code < 500:
                answered.set()

    # In a thread, since looking up a name obeys no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the datasets library off the network."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _unavailable(spec: TaskSpec, named: str, columns: Sequence[str], reachable: bool, error: Exception) -> str:
    source = spec.source
    folder = source.folder or spec.name
    reason = f"the Hub says: {' '.join(str(error).split())}" if reachable else "there is no network to fetch it"
    suffixes = ", ".join(FORMATS[1:])
    return (
        f"data set {named} of task '{spec.name}' is not on this machine, and {reason}. "
        f"Pass --data-root DIR or set {DATA_ROOT_VARIABLE}, with DIR/{folder}/{source.train}.parquet and "
        f"DIR/{folder}/{source.dev}.parquet (or {suffixes}) holding the columns {', '.join(columns)}."
    )
