"""Tasks of one's own: what a short file means, and what is said of a wrong one."""

from pathlib import Path

import pytest

from bench.errors import BenchError, ConfigError, DataError
from bench.tasks.catalogue import resolve_task
from bench.tasks.data import load_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "tickets"
    data.mkdir()
    (data / "train.csv").write_text("body,urgent\nall is well,calm\nfire in the hall,urgent\nNA,calm\n")
    (data / "dev.jsonl").write_text('{"body": "hello", "urgent": 0}\n{"body": "help", "urgent": 1}\n')
    return tmp_path


def write(folder: Path, text: str) -> str:
    path = folder / "task.yaml"
    path.write_text(text)
    return str(path)


SHORT = "data: tickets\ntext: body\nlabel: urgent\nlabels: [calm, urgent]\n"


def test_four_lines_make_a_task(folder: Path) -> None:
    spec = resolve_task(write(folder, SHORT))
    assert (spec.name, spec.kind, spec.label_words, spec.metrics) == (
        "task",
        "single",
        ("calm", "urgent"),
        ("accuracy",),
    )
    assert spec.prompt.count("<extra_id_0>") == 1 and spec.max_length == 128
    data = load_task(spec)
    assert [e.label for e in data.dev] == [0, 1], "ids in one file and names in the other"
    named = {e.text: e.label for e in data.train + data.selection}
    assert named == {"NA": 0, "all is well": 0, "fire in the hall": 1}


def test_a_mapping_gives_values_and_words(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"t": "x", "y": 5}\n{"t": "z", "y": -1}\n')
    spec = resolve_task(
        write(folder, "train: rows.jsonl\ndev: rows.jsonl\ntext: t\nlabel: y\nlabels: {-1: bad, 5: good}\n")
    )
    assert (spec.labels, spec.label_words) == (("-1", "5"), ("bad", "good"))
    assert [e.label for e in load_task(spec).dev] == [1, 0]
    (folder / "rows.jsonl").write_text('{"t": "x", "y": 0}\n{"t": "z", "y": 5}\n')
    with pytest.raises(DataError, match=r"rows.jsonl, row 1: unknown label 0; expected one of -1, 5"):
        load_task(spec)


def test_a_second_text_makes_a_pair_and_regression_needs_no_labels(folder: Path) -> None:
    (folder / "pairs.csv").write_text("a,b,s\nx,y,0.5\nz,w,2\n")
    both = "train: pairs.csv\ndev: pairs.csv\ntext: a\ntext_pair: b\nlabel: s\n"
    assert resolve_task(write(folder, both + "labels: [low, high]\n")).kind == "pair"
    spec = resolve_task(write(folder, both + 'kind: regression\nlabel_words: ["0", "1", "2"]\n'))
    assert spec.metrics == ("pearson", "spearman") and spec.n_outputs == 1
    assert "{text_pair}" in spec.prompt
    assert [e.label for e in load_task(spec).dev] == [0.5, 2.0]


def test_questions_take_plain_answers(folder: Path) -> None:
    (folder / "qa.csv").write_text("question,context,answers\nwho?,it was Ann,Ann\nwhere?,in the house,house\n")
    spec = resolve_task(write(folder, "kind: qa\ntrain: qa.csv\ndev: qa.csv\n"))
    first = load_task(spec).dev[0]
    assert (first.answers, first.answer_starts, spec.max_length) == (("Ann",), (7,), 384)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHORT + "labls: [a]\n", "unknown key 'labls'. Did you mean 'labels'"),
        (SHORT + "kind: sinlge\n", "key 'kind' is 'sinlge'"),
        (SHORT + "max_length: long\n", "key 'max_length' is 'long'"),
        (SHORT + "max_length: 2\n", "at least 8"),
        (SHORT + "label_words: [yes, no]\n", "quote it"),
        (SHORT + "label_words: [one]\n", "1 label_words for 2 labels"),
        (SHORT + "metrics: [acuracy]\n", "Did you mean 'accuracy'"),
        (SHORT + "prompt: no slots\n", "must hold {text} once"),
        (SHORT + "train: x.csv\n", "not both"),
        (SHORT.replace("tickets", "nowhere"), "no folder, nor a file of a known kind"),
        (SHORT.replace("data: tickets", "train: tickets/trian.csv\ndev: tickets/dev.jsonl"), "mean 'train.csv'"),
        ("text: body\nlabels: [a, b]\n", "give 'data'"),
        ("data: tickets\n", "at least two classes"),
        ("data: tickets\nlabels: [a, a]\n", "names a class twice"),
        ("data: tickets\nlabels: [a, b, c]\nmetrics: [f1]\n", "f1 is for two classes"),
        ("kind: qa\nlabels: [a, b]\ndata: tickets\n", "has no classes"),
        ("kind: regression\nlabel_words: [low]\ndata: tickets\n", "are numbers"),
        ("- a\n- b\n", "must map keys to values"),
        ("a: [1\n", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_mistakes_are_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(BenchError) as caught:
        resolve_task(write(folder, text))
    assert message in str(caught.value)
    assert "task.yaml" in str(caught.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the task file .*gone\.yaml"):
        resolve_task(str(tmp_path / "gone.yaml"))


def test_two_files_for_one_split_are_refused(folder: Path) -> None:
    (folder / "tickets" / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"train\.jsonl and train\.csv: keep one"):
        resolve_task(write(folder, SHORT))
