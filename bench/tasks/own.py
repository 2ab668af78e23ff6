"""Tasks of one's own, from a YAML file of a few lines. Imports no torch.

The keys, all but the data optional::

    name: tickets              # shown in tables; default: the file's own name
    kind: single               # single, pair, regression or qa; default: pair where text_pair is given, else single
    data: tickets              # a folder with train.* and validation.* (or dev.*), or else these two:
    train: tickets/train.csv   #   a file, or a folder that holds train.*
    dev: tickets/dev.jsonl     #   a file, or a folder that holds validation.* or dev.*
    text: body                 # columns; defaults: text and label, and for qa question, context and answers
    text_pair: reply
    label: urgent
    labels: [calm, urgent]     # classes in the order of their ids ...
    labels: {0: calm, 1: urgent}      # ... or value in the file -> word
    label_words: [low, high]   # one word a class for text-to-text backbones; default: the words or names of labels;
                               # for regression the numbers that span the range, e.g. ["0", "1", "2", "3"]
    prompt: "{text} It is <extra_id_0>."
    metrics: [accuracy]        # the primary one first
    max_length: 128
    caveat: "..."              # said with every number

Paths are relative to the YAML file; files are ``.parquet``, ``.jsonl`` or ``.csv``. A label in a file is matched with
the names (or keys) of ``labels`` first; where none of these is a number, an integer is taken as a class id. In ``qa``
an answer is SQuAD's ``{"text": [...], "answer_start": [...]}`` or plain text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from bench.errors import ConfigError, DataError, suggest, unknown
from bench.tasks.prompts import SENTINEL
from bench.tasks.sources import FORMATS, split_file
from bench.tasks.spec import METRIC_NAMES, Kind, Source, TaskSpec

_PROMPTS: dict[Kind, str] = {
    "single": "text: {text} label: <extra_id_0>",
    "pair": "first: {text} second: {text_pair} label: <extra_id_0>",
    "regression": "text: {text} score: <extra_id_0>",
    "qa": "question: {text} context: {text_pair}",
}
_REGRESSION_PAIR_PROMPT = "first: {text} second: {text_pair} score: <extra_id_0>"
_COLUMNS: dict[Kind, tuple[str, str | None, str]] = {
    "single": ("text", None, "label"),
    "pair": ("text", "text_pair", "label"),
    "regression": ("text", None, "label"),
    "qa": ("question", "context", "answers"),
}


class _OwnTask(BaseModel):
    """The keys of the file; see the module's docstring."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str | None = None
    kind: Kind | None = None
    data: str | None = None
    train: str | None = None
    dev: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    labels: list[str | int] | dict[str | int, str] | None = None
    label_words: list[str] | None = None
    prompt: str | None = None
    metrics: list[str] | None = None
    max_length: int | None = None
    caveat: str = ""


def read_own(path: Path) -> TaskSpec:
    """Read a task from a YAML file.

    Parameters
    ----------
    path
        The file; its schema is in this module's docstring.

    Raises
    ------
    ConfigError
        If it cannot be read, or says something that cannot be meant; the message names the file and the key.
    DataError
        If a file of data is missing.
    """
    own = _parse(path)
    kind: Kind = own.kind or ("pair" if own.text_pair else "single")
    text, text_pair, label = _COLUMNS[kind]
    labels, words = _classes(path, own, kind)
    return TaskSpec(
        name=own.name or path.stem,
        kind=kind,
        text=own.text or text,
        text_pair=own.text_pair or text_pair,
        label=own.label or label,
        labels=labels,
        label_words=words,
        prompt=_prompt(path, own, kind),
        metrics=_metrics(path, own, kind, len(labels)),
        max_length=_max_length(path, own, kind),
        source=Source(files=_files(path, own)),
        caveat=own.caveat,
    )


def _parse(path: Path) -> _OwnTask:
    try:
        content: Any = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the task file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must map keys to values; known keys: {', '.join(_OwnTask.model_fields)}.")
    known = list(_OwnTask.model_fields)
    for key in content:
        if key not in known:
            raise ConfigError(f"{path}: unknown key '{key}'.{suggest(str(key), known)} Known: {', '.join(known)}.")
    _refuse_booleans(path, content)
    try:
        return _OwnTask.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{path}: key '{first['loc'][0]}' is {first['input']!r}: {first['msg']}.") from None


def _refuse_booleans(path: Path, content: dict[str, Any]) -> None:
    for key in ("labels", "label_words"):
        value = content.get(key)
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if isinstance(items, list) and any(isinstance(item, bool) for item in items):
            raise ConfigError(f"{path}: {key} holds true or false, which is how YAML reads a bare yes or no: quote it.")


def _files(path: Path, own: _OwnTask) -> dict[str, str]:
    if own.data and (own.train or own.dev):
        raise ConfigError(f"{path}: give either 'data' or 'train' and 'dev', not both.")
    if not own.data and not (own.train and own.dev):
        raise ConfigError(f"{path}: give 'data' (a folder) or both 'train' and 'dev' (files).")
    stems = {"train": ["train"], "dev": ["validation", "dev"]}
    named = {"train": own.data or own.train or "", "dev": own.data or own.dev or ""}
    return {split: str(_file(path, named[split], stems[split])) for split in stems}


def _file(path: Path, named: str, stems: list[str]) -> Path:
    place = (path.parent / Path(named).expanduser()).absolute()
    if place.is_dir():
        return split_file(place, stems)
    if place.suffix not in FORMATS:
        raise ConfigError(f"{path}: '{named}' is no folder, nor a file of a known kind ({', '.join(FORMATS)}).")
    if not place.is_file():
        beside = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise DataError(f"{path}: there is no file {place}.{suggest(place.name, beside)}")
    return place


def _classes(path: Path, own: _OwnTask, kind: Kind) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the classes (as they are in the files) and one word for each."""
    words = tuple(own.label_words or ())
    if kind in ("regression", "qa"):
        if own.labels:
            raise ConfigError(f"{path}: a task of kind '{kind}' has no classes; remove 'labels'.")
        if kind == "regression" and not all(_is_number(word) for word in words):
            raise ConfigError(f"{path}: label_words of a regression are numbers in rising order, got {list(words)}.")
        return (), words
    if not own.labels or len(own.labels) < 2:
        raise ConfigError(f"{path}: 'labels' must name at least two classes, in the order of their ids.")
    names = tuple(str(name) for name in own.labels)
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: 'labels' names a class twice: {', '.join(names)}.")
    if not words:
        words = tuple(own.labels.values()) if isinstance(own.labels, dict) else names
    if len(words) != len(names):
        raise ConfigError(f"{path}: {len(words)} label_words for {len(names)} labels; give one word a class.")
    return names, words


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _prompt(path: Path, own: _OwnTask, kind: Kind) -> str:
    pair = kind in ("pair", "qa") or own.text_pair is not None
    default = _REGRESSION_PAIR_PROMPT if kind == "regression" and pair else _PROMPTS[kind]
    prompt = own.prompt or default
    needed = ["{text}", *(["{text_pair}"] if pair else []), *([SENTINEL] if kind != "qa" else [])]
    for part in needed:
        if prompt.count(part) != 1:
            raise ConfigError(f"{path}: the prompt must hold {part} once, got {prompt!r}.")
    return prompt


def _metrics(path: Path, own: _OwnTask, kind: Kind, n_classes: int) -> tuple[str, ...]:
    known = METRIC_NAMES[kind]
    metrics = tuple(own.metrics or (known if kind in ("regression", "qa") else known[:1]))
    for name in metrics:
        if name not in known:
            raise ConfigError(f"{path}: {unknown(f'metric of kind {kind}', name, known)}")
    if "f1" in metrics and n_classes != 2:
        raise ConfigError(f"{path}: the metric f1 is for two classes, and this task has {n_classes}; use accuracy.")
    return metrics


def _max_length(path: Path, own: _OwnTask, kind: Kind) -> int:
    if own.max_length is None:
        return 384 if kind == "qa" else 128
    if own.max_length < 8:
        raise ConfigError(f"{path}: max_length is {own.max_length}; give at least 8 tokens.")
    return own.max_length
