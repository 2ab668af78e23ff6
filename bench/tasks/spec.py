"""What a task is: columns, prompt, verbaliser, metric, length, and where its data comes from. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal["single", "pair", "regression", "qa"]

METRIC_NAMES: dict[Kind, tuple[str, ...]] = {
    "single": ("accuracy", "f1"),
    "pair": ("accuracy", "f1"),
    "regression": ("pearson", "spearman"),
    "qa": ("token_f1", "exact_match"),
}
"""Kind of task -> names of the metrics that can be computed for it (``f1`` is for two classes, the second positive)."""


class Source(BaseModel):
    """Where the data of a task is.

    Attributes
    ----------
    hub, config, revision
        Data set id, configuration and revision on the Hub; ``hub`` is ``None`` for own files.
    folder
        Name of the task's folder below a local data root (``<root>/<folder>/<split file>.parquet``).
    train, dev
        Names of the splits, which are also the stems of the local files.
    files
        For own data: split (``"train"``, ``"dev"``) -> absolute path of a parquet, JSONL or CSV file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hub: str | None = None
    config: str | None = None
    revision: str = "main"
    folder: str | None = None
    train: str = "train"
    dev: str = "validation"
    files: dict[str, str] | None = None


class TaskSpec(BaseModel):
    """A task, wherever it comes from.

    Attributes
    ----------
    name
        The name shown in tables.
    kind
        ``"single"`` and ``"pair"`` classify one text or two; ``"regression"`` gives a number; ``"qa"`` finds an
        answer in a context.
    text, text_pair, label
        Column names. For ``qa``: question, context, answers (SQuAD's ``{"text": [...], "answer_start": [...]}``).
    labels
        Names of the classes in the order of their ids; empty for regression and qa.
    label_words
        One word per class for text-to-text backbones, each of which must be one distinct token; for regression, the
        numbers that span the range, in order; empty for qa.
    prompt
        Template for text-to-text backbones with ``{text}``, ``{text_pair}`` and, but for qa, ``<extra_id_0>``.
    metrics
        Names of the metrics, the primary one (reported, selected on) first.
    max_length
        Longest input in tokens.
    source
        Where the data comes from.
    caveat
        What must be said with any number on this task, or an empty string.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    text: str
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] = ()
    label_words: tuple[str, ...] = ()
    prompt: str
    metrics: tuple[str, ...]
    max_length: int = 128
    source: Source
    caveat: str = ""

    @property
    def is_classification(self) -> bool:
        """Whether the task chooses among classes."""
        return self.kind in ("single", "pair")

    @property
    def n_outputs(self) -> int:
        """Width of an encoder head: classes, 1 for regression, 2 (start and end) for qa."""
        return {"regression": 1, "qa": 2}.get(self.kind, len(self.labels))

    def identity(self) -> dict[str, Any]:
        """Return everything here that can change a number, and no path: the content of files is their revision's."""
        return self.model_dump(mode="json", exclude={"source": {"files", "folder"}, "caveat": True})
