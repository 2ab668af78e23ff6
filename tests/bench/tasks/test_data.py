"""Loading: the laws of the selection split, and what is said of data that are torn, missing or wrong."""

import hashlib
import os
import random
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import DataError
from bench.tasks import digests
from bench.tasks.catalogue import TASKS
from bench.tasks.data import Example, data_revision, load_task, split_train
from bench.tasks.sources import bundled

SST2 = TASKS["sst2"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BENCH_DATA_ROOT", raising=False)
    return tmp_path / "cache"


def sst2_root(root: Path, rows: int = 40, suffix: str = "parquet", **changes: object) -> Path:
    folder = root / "sst2"
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("train", rows), ("validation", 5)):
        columns = {"sentence": [f"{split} text {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}
        frame = pd.DataFrame({**columns, **(changes if split == "train" else {})})
        path = folder / f"{split}.{suffix}"
        if suffix == "parquet":
            frame.to_parquet(path)
        elif suffix == "csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_json(path, orient="records", lines=True)
    return root


def texts(examples: list[Example]) -> list[str]:
    return [example.text for example in examples]


def example(text: str, pair: str | None = None) -> Example:
    return Example(id="", text=text, text_pair=pair, label=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=8), min_size=2, max_size=80), st.randoms())
def test_selection_is_a_partition_by_text_that_no_order_changes(words: list[str], rng: random.Random) -> None:
    words = [*words, "one more", "and another"]
    train, selection = split_train([example(w) for w in words])
    assert sorted(texts(train) + texts(selection)) == sorted(words)
    assert set(texts(train)).isdisjoint(texts(selection))
    assert train and selection
    rng.shuffle(words)
    again = split_train([example(w) for w in words])
    assert (texts(again[0]), texts(again[1])) == (texts(train), texts(selection))


def test_selection_is_the_hash_of_the_text_below_a_tenth() -> None:
    words = [f"text {i}" for i in range(3000)]
    selection = split_train([example(w, "pair") for w in words])[1]

    def position(word: str) -> float:
        return int(hashlib.sha256(f"{word}\x1fpair".encode()).hexdigest(), 16) / 2**256

    assert set(texts(selection)) == {w for w in words if position(w) < 0.1}


def test_selection_of_a_large_set_is_some_two_thousand() -> None:
    n = len(split_train([example(str(i)) for i in range(50_000)])[1])
    assert abs(n - 2000) < 5 * 2000**0.5


def test_one_text_cannot_be_split() -> None:
    with pytest.raises(DataError, match="two different texts"):
        split_train([example("same")] * 5)


def test_fewer_training_examples_are_nested_and_leave_selection_alone(tmp_path: Path) -> None:
    root = sst2_root(tmp_path, 60)
    full, few, fewer = (load_task(SST2, root, n) for n in (None, 20, 10))
    assert (len(few.train), len(fewer.train)) == (20, 10)
    assert set(texts(fewer.train)) < set(texts(few.train)) < set(texts(full.train))
    assert full.selection == few.selection == fewer.selection
    assert full.digest == few.digest


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_the_same_rows_load_alike_from_every_format(tmp_path: Path, suffix: str) -> None:
    data = load_task(SST2, sst2_root(tmp_path / "it's [a] * odd.place", suffix=suffix))
    reference = load_task(SST2, sst2_root(tmp_path / "plain"))
    assert (data.train, data.selection, data.dev, data.digest) == (
        reference.train,
        reference.selection,
        reference.dev,
        reference.digest,
    )
    assert data.dev[3] == Example("dev-3", "validation text 3", None, 1)


def test_nothing_is_left_in_the_users_cache(tmp_path: Path) -> None:
    import datasets

    before = set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*"))
    load_task(SST2, sst2_root(tmp_path))
    assert set(Path(datasets.config.HF_DATASETS_CACHE).rglob("*")) == before


def test_the_bundled_task_loads_with_no_root() -> None:
    data = load_task(TASKS["movie_snippets"], None, 100)
    assert (len(data.train), len(data.dev)) == (100, 1034)
    assert {e.label for e in data.dev} == {0, 1}
    assert data_revision(TASKS["movie_snippets"]).startswith("bundled:")


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    root = sst2_root(tmp_path)
    path = root / "sst2" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train\.parquet.*half-written"):
        load_task(SST2, root)


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    root = sst2_root(tmp_path, suffix="jsonl")
    path = root / "sst2" / "train.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"train\.jsonl.*half-written"):
        load_task(SST2, root)


def test_a_misspelt_column_is_answered_with_the_nearest(tmp_path: Path) -> None:
    root = sst2_root(tmp_path)
    spec = SST2.model_copy(update={"text": "sentense"})
    with pytest.raises(DataError, match=r"no column 'sentense'. Did you mean 'sentence'\? Columns: sentence, label"):
        load_task(spec, root)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0, 1, -1], r"train\.parquet, row 3: the label is -1, which marks a split without labels"),
        ([0, None, 1], r"row 2: the label is nan|row 2: the label is None|row 2: unknown label nan"),
        ([0, 1, 2], r"row 3: unknown label 2; expected one of negative, positive"),
        (["negative", "positive", "positve"], r"row 3: unknown label 'positve'.*Did you mean 'positive'"),
        ([True, False, True], r"row 1: unknown label True"),
    ],
)
def test_a_wrong_label_is_named_with_its_row(tmp_path: Path, label: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_task(SST2, sst2_root(tmp_path, 3, label=label))


def test_a_missing_text_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2, column 'sentence': expected text, found None"):
        load_task(SST2, sst2_root(tmp_path, 3, sentence=["a", None, "c"]))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_an_empty_split_is_named(tmp_path: Path, suffix: str) -> None:
    root = sst2_root(tmp_path, suffix=suffix)
    path = root / "sst2" / f"validation.{suffix}"
    if suffix == "parquet":
        pd.DataFrame({"sentence": [], "label": []}).to_parquet(path)
    else:
        path.write_text("sentence,label\n" if suffix == "csv" else "")
    with pytest.raises(DataError, match=rf"validation\.{suffix} has no rows"):
        load_task(SST2, root)


def test_a_root_without_one_split_does_not_fall_back_to_other_data(tmp_path: Path) -> None:
    root = sst2_root(tmp_path)
    (root / "sst2" / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"sst2 lacks train.*found: validation\.parquet"):
        load_task(SST2, root)


def test_a_root_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        load_task(SST2, tmp_path / "nowhere")


def test_the_root_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_DATA_ROOT", str(sst2_root(tmp_path)))
    assert len(load_task(SST2).dev) == 5


def squad_root(root: Path, answers: object, ids: tuple[str, str] = ("q1", "q2")) -> Path:
    (root / "squad").mkdir()
    frame = pd.DataFrame(
        {"id": ids, "question": ["who?", "where?"], "context": ["it was Ann", "in a house"], "answers": answers}
    )
    for split in ("train", "validation"):
        frame.to_parquet(root / "squad" / f"{split}.parquet")
    return root


GOOD = [{"text": ["Ann", "it was Ann"], "answer_start": [7, 0]}, {"text": ["house"], "answer_start": [5]}]


def test_questions_keep_their_ids_and_all_answers(tmp_path: Path) -> None:
    first = load_task(TASKS["squad"], squad_root(tmp_path, GOOD)).dev[0]
    assert first == Example("q1", "who?", "it was Ann", None, ("Ann", "it was Ann"), (7, 0))


def test_a_question_without_an_answer_is_named(tmp_path: Path) -> None:
    answers = [GOOD[0], {"text": [], "answer_start": []}]
    with pytest.raises(DataError, match=r"row 2.*every question needs an answer"):
        load_task(TASKS["squad"], squad_root(tmp_path, answers))


def test_repeated_question_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="several rows alike"):
        load_task(TASKS["squad"], squad_root(tmp_path, GOOD, ("q1", "q1")))


def test_the_revision_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    here, there = sst2_root(tmp_path / "here"), sst2_root(tmp_path / "there")
    revision = data_revision(SST2, here)
    assert revision == data_revision(SST2, there)
    path = there / "sst2" / "train.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    assert data_revision(SST2, there) != revision
    assert str(tmp_path) not in revision
    assert data_revision(SST2) == "hub:nyu-mll/glue@" + SST2.source.revision


def test_the_digest_is_remembered_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    os.utime(path, (1_000_000, 1_000_000))
    expected = hashlib.sha256(b"one").hexdigest()
    for _ in range(2):  # the cache is held in memory from the second on
        assert digests.file_digest(path) == expected
    stored = (cache / "digests.json").read_text()
    (cache / "digests.json").write_text(stored.replace(expected, "0" * 64))
    os.utime(cache / "digests.json", (2_000_000, 2_000_000))  # it may have been written twice within the clock's grain
    assert digests.file_digest(path) == "0" * 64, "the second call must come from the cache"
    path.write_bytes(b"two")
    os.utime(path, (1_000_001, 1_000_001))
    assert digests.file_digest(path) == hashlib.sha256(b"two").hexdigest()


def test_a_file_just_written_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    digests.file_digest(path)
    assert not (cache / "digests.json").exists()


@pytest.mark.parametrize("content", ["{torn", "[1, 2]", '{"x": 3}', "\x00"])
def test_a_torn_digest_cache_is_no_obstacle(tmp_path: Path, cache: Path, content: str) -> None:
    cache.mkdir()
    (cache / "digests.json").write_text(content)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert digests.file_digest(path) == hashlib.sha256(b"one").hexdigest()


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "blocked" / "cache"))
    path = tmp_path / "file"
    path.write_bytes(b"one")
    os.utime(path, (1_000_000, 1_000_000))
    assert digests.file_digest(path) == hashlib.sha256(b"one").hexdigest()


def test_bundled_sets_match_their_description() -> None:
    train = pd.read_parquet(bundled("movie_snippets") / "train.parquet")
    dev = pd.read_parquet(bundled("movie_snippets") / "validation.parquet")
    assert len(train) + len(dev) == 10_316
    assert set(train.sentence).isdisjoint(dev.sentence)
    text = pd.read_parquet(bundled("wikitext2") / "train.parquet").text
    assert text.str.len().min() >= 200 and not text.str.startswith("=").any()
