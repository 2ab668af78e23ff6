"""Pre-training text: where it comes from, its spans, and their corruption."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import ConfigError, DataError
from bench.tasks.corpus import corpus_revision, load_corpus, resolve_corpus, spans
from bench.tasks.corruption import bert_features, segments, t5_features
from tests.tiny import SENTINELS, bert_tokenizer, t5_tokenizer


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BENCH_DATA_ROOT", raising=False)


def test_the_bundled_slice_is_there_in_two_splits() -> None:
    train, validation = load_corpus(), load_corpus(split="validation")
    assert sum(map(len, train)) > 1_000_000 and len(validation) > 100
    assert not set(train) & set(validation)
    assert corpus_revision().startswith("bundled:")


def test_a_folder_below_the_root_comes_before_the_bundle_and_blank_lines_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "wikitext2").mkdir()
    pd.DataFrame({"text": [" ", "one", "", "two\n"]}).to_parquet(tmp_path / "wikitext2" / "train.parquet")
    assert load_corpus("wikitext2", tmp_path) == ["one", "two\n"]
    assert corpus_revision("wikitext2", tmp_path).startswith("sha256:")
    with pytest.raises(DataError, match="has no validation split; splits: train"):
        load_corpus("wikitext2", tmp_path, "validation")


def test_paths_to_text_and_jsonl_are_corpora_and_their_place_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first line\n\nsecond \u2028 line\n", "utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "first line"}\n')
    (tmp_path / "c.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    assert load_corpus(str(tmp_path / "a.txt")) == ["first line", "second \u2028 line"]
    assert load_corpus(str(tmp_path / "b.jsonl")) == ["first line"]
    assert corpus_revision(str(tmp_path / "a.txt")) == corpus_revision(str(tmp_path / "c.txt"))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown corpus 'wikitext'\. Did you mean 'wikitext2'"):
        resolve_corpus("wikitext", tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bad\.txt as UTF-8"):
        load_corpus(str(tmp_path / "bad.txt"))
    (tmp_path / "none.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="holds no text"):
        load_corpus(str(tmp_path / "none.jsonl"))
    (tmp_path / "other.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="no column 'text'"):
        load_corpus(str(tmp_path / "other.jsonl"))


def test_spans_are_consecutive_and_lose_only_the_tail() -> None:
    tokenizer = t5_tokenizer()
    texts = ["the cat saw the dog", "a bird", "she went home and he ate"] * 500
    stream = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    cut = spans(texts, tokenizer, 7)
    assert [i for span in cut for i in span] == stream[: len(stream) // 7 * 7]
    assert {len(span) for span in cut} == {7}
    assert spans(texts, tokenizer, 7, limit=5) == cut[:5]
    with pytest.raises(DataError, match="fewer than one span of 100"):
        spans(["the cat"], tokenizer, 100)


def rebuild(inputs: list[int], targets: list[int], sentinels: list[int]) -> list[int]:
    """Put what the target says back where the input has its sentinels."""
    runs: dict[int, list[int]] = {}
    for token in targets:
        if token in sentinels:
            run = runs.setdefault(token, [])
        else:
            run.append(token)
    return [t for token in inputs for t in runs.get(token, [token])]


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 300), st.integers(0, 99))
def test_the_target_holds_all_that_was_taken_out(length: int, seed: int) -> None:
    tokenizer = t5_tokenizer()
    span = np.random.default_rng(seed).integers(3, 100, length).tolist()
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(SENTINELS)])
    (feature,) = t5_features([span], tokenizer, seed)
    inputs, targets = feature["input_ids"], feature["labels"]
    assert isinstance(targets, list)
    assert inputs[-1] == targets[-1] == tokenizer.eos_token_id
    assert rebuild(inputs[:-1], targets[:-1], sentinels) == span
    used = [t for t in inputs if t in sentinels]
    assert used == sentinels[: len(used)], "sentinels count up in the order of the text"
    assert [t for t in targets if t in sentinels] == sentinels[: len(used) + 1]
    assert feature["decoder_input_ids"] == [0, *targets[:-1]]
    taken = len(targets) - len(used) - 2
    assert taken == min(max(round(0.15 * len(span)), 1), len(span) - 1)


def test_runs_have_the_mean_length_and_every_place_is_taken_out_alike() -> None:
    rng = np.random.default_rng(0)
    taken_at = np.zeros(100)
    for _ in range(2000):
        kept, taken = segments(100, rng, 0.15, 3.0)
        assert sum(kept) == 85 and sum(taken) == 15 and len(kept) == len(taken) == 5
        position = 0
        for keep, take in zip(kept, taken, strict=True):
            taken_at[position + keep : position + keep + take] += 1
            position += keep + take
    assert taken_at[0] == 0, "a span begins with what is kept"
    middle = taken_at[20:80] / 2000
    assert abs(middle.mean() - 0.15) < 0.02 and middle.std() < 0.03


def test_corruption_depends_on_seed_and_index_alone() -> None:
    tokenizer, some = t5_tokenizer(), [list(range(3, 60))] * 3
    features = t5_features(some, tokenizer, seed=1)
    assert features == t5_features(some, tokenizer, seed=1)
    assert features[:2] == t5_features(some[:2], tokenizer, seed=1)
    assert features[0] != features[1] and features != t5_features(some, tokenizer, seed=2)


def test_a_span_with_more_runs_than_sentinels_is_refused() -> None:
    with pytest.raises(ConfigError, match="no <extra_id_100>"):
        t5_features([[5] * 2000], t5_tokenizer())


def test_bert_spans_are_whole_or_masked_at_the_rate() -> None:
    tokenizer, span = bert_tokenizer(), list(range(5, 105))
    (whole,) = bert_features([span], tokenizer)
    assert whole["input_ids"] == [tokenizer.cls_token_id, *span, tokenizer.sep_token_id]
    masked = bert_features([span] * 50, tokenizer, mask_probability=0.15, seed=3)
    hidden = [f["input_ids"].count(tokenizer.mask_token_id) for f in masked]
    assert 600 < sum(hidden) < 900 and len(set(hidden)) > 1
    for feature in masked:
        pairs = zip(feature["input_ids"], whole["input_ids"], strict=True)
        assert all(a in (b, tokenizer.mask_token_id) for a, b in pairs)
    assert masked == bert_features([span] * 50, tokenizer, mask_probability=0.15, seed=3)
