"""The tasks by name, built in or of other packages, and how one is found by name or by file. Imports no torch."""

from __future__ import annotations

import functools
from pathlib import Path

from bench.entry_points import Registered, from_entry_points
from bench.errors import unknown
from bench.tasks.own import read_own
from bench.tasks.spec import Source, TaskSpec

TASK_GROUP = "bench.tasks"
GLUE_REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
SQUAD_REVISION = "7b6d24c440a36b6815f21b70d25016731768db1f"


def _glue(config: str, dev: str = "validation") -> Source:
    return Source(hub="nyu-mll/glue", config=config, revision=GLUE_REVISION, folder=config, dev=dev)


_SPECS = (
    TaskSpec(
        name="mnli",
        kind="pair",
        text="premise",
        text_pair="hypothesis",
        labels=("entailment", "neutral", "contradiction"),
        label_words=("yes", "maybe", "no"),
        prompt="premise: {text} hypothesis: {text_pair} Does it follow? <extra_id_0>.",
        metrics=("accuracy",),
        source=_glue("mnli", dev="validation_matched"),
    ),
    TaskSpec(
        name="qnli",
        kind="pair",
        text="question",
        text_pair="sentence",
        labels=("entailment", "not_entailment"),
        label_words=("yes", "no"),
        prompt="question: {text} sentence: {text_pair} Does the sentence hold the answer? <extra_id_0>.",
        metrics=("accuracy",),
        source=_glue("qnli"),
    ),
    TaskSpec(
        name="qqp",
        kind="pair",
        text="question1",
        text_pair="question2",
        labels=("not_duplicate", "duplicate"),
        label_words=("no", "yes"),
        prompt="question 1: {text} question 2: {text_pair} Do they ask the same? <extra_id_0>.",
        metrics=("accuracy", "f1"),
        source=_glue("qqp"),
    ),
    TaskSpec(
        name="rte",
        kind="pair",
        text="sentence1",
        text_pair="sentence2",
        labels=("entailment", "not_entailment"),
        label_words=("yes", "no"),
        prompt="text: {text} claim: {text_pair} Does the claim follow from the text? <extra_id_0>.",
        metrics=("accuracy",),
        source=_glue("rte"),
    ),
    TaskSpec(
        name="sst2",
        kind="single",
        text="sentence",
        labels=("negative", "positive"),
        label_words=("bad", "good"),
        prompt="sentence: {text} It was <extra_id_0>.",
        metrics=("accuracy",),
        source=_glue("sst2"),
    ),
    TaskSpec(
        name="mrpc",
        kind="pair",
        text="sentence1",
        text_pair="sentence2",
        labels=("not_equivalent", "equivalent"),
        label_words=("no", "yes"),
        prompt="sentence 1: {text} sentence 2: {text_pair} Do they say the same? <extra_id_0>.",
        metrics=("accuracy", "f1"),
        source=_glue("mrpc"),
    ),
    TaskSpec(
        name="squad",
        kind="qa",
        text="question",
        text_pair="context",
        label="answers",
        prompt="question: {text} context: {text_pair}",
        metrics=("token_f1", "exact_match"),
        max_length=384,
        source=Source(hub="rajpurkar/squad", revision=SQUAD_REVISION, folder="squad"),
    ),
    TaskSpec(
        name="movie_snippets",
        kind="single",
        text="sentence",
        labels=("negative", "positive"),
        label_words=("bad", "good"),
        prompt="review: {text} The film is <extra_id_0>.",
        metrics=("accuracy",),
        source=Source(folder="movie_snippets"),
        caveat="A bundled demonstration set, not a published benchmark; its snippets have the same source as SST-2 "
        "(Rotten Tomatoes), so never train on one and report the other.",
    ),
)

TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in _SPECS}
"""Name -> built-in task."""


@functools.cache
def registered_tasks() -> dict[str, Registered[TaskSpec]]:
    """Return the tasks of other packages by name, each with its origin."""
    return from_entry_points(TASK_GROUP, "task", _read, TASKS)


def tasks() -> dict[str, TaskSpec]:
    """Return every task that has a name."""
    return TASKS | {name: found.value for name, found in registered_tasks().items()}


def resolve_task(name_or_path: str) -> TaskSpec:
    """Find a task by its name, or read it from a YAML file of one's own.

    Parameters
    ----------
    name_or_path
        A key of `tasks`, or the path of a ``.yaml`` or ``.yml`` file (see `bench.tasks.own`).

    Raises
    ------
    ConfigError
        If it is neither, or the file says something that cannot be meant.
    DataError
        If the file names data that are not there.
    """
    known = tasks()
    if name_or_path in known:
        return known[name_or_path]
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        return read_own(Path(name_or_path))
    raise unknown("task", name_or_path, [*known, "<your own>.yaml"])


def _read(name: str, found: object) -> TaskSpec:
    """Take what an entry point holds: a task, or the path of its YAML file."""
    spec = read_own(Path(found)) if isinstance(found, str | Path) else found
    if not isinstance(spec, TaskSpec):
        raise TypeError(f"{found!r} is neither a bench.tasks.spec.TaskSpec nor the path of a task's YAML file")
    if spec.name != name:  # results name the task, and a command made of one must find it
        raise ValueError(f"the task calls itself '{spec.name}'; give the entry point the same name")
    return spec
