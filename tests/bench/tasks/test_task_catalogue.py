"""The built-in tasks against GLUE's and SQuAD's own definitions, and how tasks are found."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import ConfigError
from bench.tasks.catalogue import TASKS, resolve_task
from bench.tasks.encoding import verbaliser_ids
from bench.tasks.metrics import METRICS
from bench.tasks.prompts import SENTINEL
from bench.tasks.sources import bundled
from bench.tasks.spec import METRIC_NAMES
from tests.tiny import t5_tokenizer

# As the data set cards of nyu-mll/glue and rajpurkar/squad give them.
PUBLISHED = {
    "mnli": ("premise", "hypothesis", ("entailment", "neutral", "contradiction"), "validation_matched"),
    "qnli": ("question", "sentence", ("entailment", "not_entailment"), "validation"),
    "qqp": ("question1", "question2", ("not_duplicate", "duplicate"), "validation"),
    "rte": ("sentence1", "sentence2", ("entailment", "not_entailment"), "validation"),
    "sst2": ("sentence", None, ("negative", "positive"), "validation"),
    "mrpc": ("sentence1", "sentence2", ("not_equivalent", "equivalent"), "validation"),
    "squad": ("question", "context", (), "validation"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_columns_labels_and_dev_split_are_the_published_ones(name: str) -> None:
    spec = TASKS[name]
    assert (spec.text, spec.text_pair, spec.labels, spec.source.dev) == PUBLISHED[name]
    assert spec.max_length == (384 if name == "squad" else 128)
    assert len(spec.source.revision) == 40, "a branch name would let the data change under a run id"


@pytest.mark.parametrize("spec", TASKS.values(), ids=TASKS)
def test_specs_hold_together(spec) -> None:
    assert spec.prompt.count("{text}") == 1
    assert spec.prompt.count("{text_pair}") == (0 if spec.text_pair is None else 1)
    assert spec.prompt.count(SENTINEL) == (0 if spec.kind == "qa" else 1)
    assert set(spec.metrics) <= set(METRIC_NAMES[spec.kind])
    if spec.is_classification:
        assert len(set(verbaliser_ids(spec, t5_tokenizer()))) == len(spec.labels)


def test_paraphrase_tasks_count_paraphrases_as_positive() -> None:
    for name in ("mrpc", "qqp"):
        assert TASKS[name].metrics == ("accuracy", "f1")
        assert "not" not in TASKS[name].labels[1]


def test_every_metric_that_a_task_may_name_exists() -> None:
    assert {name for names in METRIC_NAMES.values() for name in names} == set(METRICS)


def test_a_misspelt_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'sst-2'.*'sst2'"):
        resolve_task("sst-2")


def test_bundled_data_carry_their_notices() -> None:
    assert "cjhutto" in (bundled("movie_snippets") / "LICENSE").read_text()
    assert "MIT" in (bundled("movie_snippets") / "NOTICE.md").read_text()
    notice = (bundled("wikitext2") / "NOTICE.md").read_text()
    assert "CC BY-SA 3.0" in notice and "Merity" in notice and "Modifications" in notice
    assert "SST-2" in TASKS["movie_snippets"].caveat


def test_the_identity_of_a_task_holds_no_path_and_changes_with_the_prompt(tmp_path: Path) -> None:
    spec = TASKS["sst2"]
    moved = spec.model_copy(update={"source": spec.source.model_copy(update={"files": {"train": str(tmp_path)}})})
    assert moved.identity() == spec.identity()
    assert spec.model_copy(update={"prompt": "other {text}"}).identity() != spec.identity()


def test_a_plan_needs_no_heavy_library() -> None:
    code = (
        "import sys; from bench.tasks.catalogue import TASKS; from bench.tasks.sources import data_revision\n"
        "import bench.tasks.own\n"
        "data_revision(TASKS['movie_snippets']); data_revision(TASKS['sst2'])\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pandas', 'evaluate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
