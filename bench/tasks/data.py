"""The examples of a task: loaded, checked, and the selection split carved from train."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import DataError, suggest
from bench.tasks.reading import Rows, read_file, read_hub
from bench.tasks.sources import data_revision, locate
from bench.tasks.spec import TaskSpec

__all__ = ["Example", "TaskData", "data_revision", "load_task", "selection_share", "split_train"]

SELECTION_FRACTION = 0.1
SELECTION_EXAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task.

    Attributes
    ----------
    id
        ``<split>-<row>``, or the data's own ``id`` for question answering.
    text, text_pair
        The text, and the second one of a pair (for qa: question and context).
    label
        Class id, number, or ``None`` for qa.
    answers, answer_starts
        For qa: every accepted answer and where it starts in the context, in characters.
    """

    id: str
    text: str
    text_pair: str | None
    label: int | float | None
    answers: tuple[str, ...] = ()
    answer_starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskData:
    """The examples of a task.

    Attributes
    ----------
    spec
        The task.
    train
        What is trained on, in an order that depends on the texts alone.
    train_available
        Size of train before any was left out.
    selection
        Carved from train by hash; decides on checkpoints and thresholds. Disjoint from ``train`` in its texts.
    dev
        What is reported.
    digest
        SHA-256 of the content that was loaded: all rows of train and dev, before anything was carved or left out.
    """

    spec: TaskSpec
    train: list[Example]
    train_available: int
    selection: list[Example]
    dev: list[Example]
    digest: str


def load_task(spec: TaskSpec, data_root: Path | None = None, train_examples: int | None = None) -> TaskData:
    """Load a task from its own files, the local data root, the bundle or the Hub, whichever has it first.

    Parameters
    ----------
    spec
        The task.
    data_root
        Folder with one folder a task (``<root>/sst2/train.parquet``); ``None`` for ``BENCH_DATA_ROOT``, if that is set.
    train_examples
        Keep only so many training examples. They are chosen by hash: the first 1,000 are among the first 2,000, and
        neither the selection split nor the seed of a run plays a part.

    Raises
    ------
    DataError
        If the data cannot be found or read, or are not what the task declares; the message names file and row.
    """
    if train_examples is not None and train_examples < 1:
        raise DataError(f"train_examples must be at least 1, got {train_examples}.")
    location = locate(spec, data_root)
    if location.origin == "hub":
        rows = read_hub(spec, _columns(spec))
    else:
        rows = {split: read_file(path, _columns(spec), _optional(spec)) for split, path in location.files.items()}
    train, dev = (_examples(spec, rows[split], split) for split in ("train", "dev"))
    fit, selection = split_train(train, rows["train"].name)
    return TaskData(spec, fit[:train_examples], len(fit), selection, dev, _digest(train, dev))


def selection_share(n_train: int) -> float:
    """Return the share of train that is set aside: a tenth, and no more than some 2,000 examples."""
    return min(SELECTION_FRACTION, SELECTION_EXAMPLES / n_train)


def split_train(examples: Sequence[Example], where: str = "train") -> tuple[list[Example], list[Example]]:
    """Carve the selection split from train.

    An example goes by the hash of its text, so that repeated texts stay on one side, and the order of rows plays no
    part. The lowest hash is always set aside, so that a small set has a selection split too.

    Parameters
    ----------
    examples
        All of train.
    where
        What to name in an error.

    Returns
    -------
    tuple
        (train, selection), each in the order of the hashes.

    Raises
    ------
    DataError
        If fewer than two different texts are there.
    """
    keyed = sorted(((_position(example), example) for example in examples), key=lambda pair: pair[0])
    share, lowest = selection_share(len(keyed)), keyed[0][0]
    selection = [example for position, example in keyed if position < share or position == lowest]
    train = [example for position, example in keyed if not (position < share or position == lowest)]
    if not train:
        raise DataError(f"{where}: needs at least two different texts, one to train on and one to select on.")
    return train, selection


def sample(examples: Sequence[Example], count: int | None) -> list[Example]:
    """Return ``count`` of the examples in their order, chosen by a hash of their texts; all where it is ``None``."""
    if count is None or count >= len(examples):
        return list(examples)
    chosen = {id(example) for example in sorted(examples, key=_position)[:count]}
    return [example for example in examples if id(example) in chosen]


def _position(example: Example) -> float:
    """Return where the example's text falls in [0, 1)."""
    content = f"{example.text}\x1f{example.text_pair or ''}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


def _digest(train: Iterable[Example], dev: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for name, examples in (("train", train), ("dev", dev)):
        digest.update(f"{name}\n".encode())
        for e in examples:
            row = [e.text, e.text_pair, e.label, e.answers, e.answer_starts]
            digest.update((json.dumps(row) + "\n").encode())
    return digest.hexdigest()


def _columns(spec: TaskSpec) -> list[str]:
    return [column for column in (spec.text, spec.text_pair, spec.label) if column is not None]


def _optional(spec: TaskSpec) -> list[str]:
    return ["id"] if spec.kind == "qa" else []


def _examples(spec: TaskSpec, rows: Rows, split: str) -> list[Example]:
    classes = _class_ids(spec)
    examples = []
    for number, row in enumerate(rows):
        where = f"{rows.name}, row {number + 1}"
        text = _text(row, spec.text, where)
        text_pair = _text(row, spec.text_pair, where) if spec.text_pair else None
        name, value = f"{split}-{number}", row[spec.label]
        if spec.kind == "qa":
            answers, starts = _answers(value, text_pair or "", f"{where}, column '{spec.label}'")
            examples.append(Example(str(row.get("id") or name), text, text_pair, None, answers, starts))
        elif spec.kind == "regression":
            examples.append(Example(name, text, text_pair, _number(value, spec, where)))
        else:
            examples.append(Example(name, text, text_pair, _class_id(value, classes, spec, where)))
    if not examples:
        raise DataError(f"{rows.name} has no rows.")
    if len({example.id for example in examples}) < len(examples):
        raise DataError(f"{rows.name}: the column 'id' names several rows alike; make it unique or drop it.")
    return examples


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}, column '{column}': expected text, found {value!r}.")
    return value


def _class_ids(spec: TaskSpec) -> dict[str, int]:
    """Return what a label in a file may be, as text -> class id."""
    names = {name: i for i, name in enumerate(spec.labels)}
    if any(name.lstrip("+-").isdigit() for name in spec.labels):
        return names
    return names | {str(i): i for i in range(len(spec.labels))}


def _class_id(value: Any, classes: Mapping[str, int], spec: TaskSpec, where: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    found = classes.get(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if found is not None:
        return found
    expected = f"expected one of {', '.join(spec.labels)}, or the class id"
    if value is None or value == -1:
        raise DataError(f"{where}: the label is {value!r}, which marks a split without labels; {expected}.")
    raise DataError(f"{where}: unknown label {value!r}; {expected}.{suggest(str(value), spec.labels)}")


def _number(value: Any, spec: TaskSpec, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}, column '{spec.label}': expected a finite number, found {value!r}.")
    return float(value)


def _answers(value: Any, context: str, where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if isinstance(value, str):
        value = {"text": [value], "answer_start": [context.find(value)]}
    try:
        texts, starts = tuple(map(str, value["text"])), tuple(map(int, value["answer_start"]))
    except (TypeError, KeyError, ValueError):
        raise DataError(
            f'{where}: expected {{"text": [...], "answer_start": [...]}} or text, found {value!r}.'
        ) from None
    if not texts or len(texts) != len(starts):
        raise DataError(f"{where}: every question needs an answer, and every answer its start; found {value!r}.")
    return texts, starts
