"""Question answering with an encoder: windows keep the answer findable, and logits become the best valid span."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tasks.catalogue import TASKS
from bench.tasks.data import Example
from bench.tasks.encoding import encode
from bench.tasks.features import Feature
from bench.tasks.windows import MAX_ANSWER_TOKENS, best_answers
from tests.tiny import WORDS, bert_tokenizer


def features_of(examples: list[Example], length: int) -> list[Feature]:
    return encode(examples, TASKS["squad"], bert_tokenizer(), "bert", length)


def question(words: list[str], first: int, last: int, asked: str = "who saw the cat") -> Example:
    context = " ".join(words)
    start = len(" ".join(words[:first])) + (first > 0)
    return Example("q", asked, context, None, (" ".join(words[first : last + 1]),), (start,))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(0, 10**6))
def test_some_window_holds_the_answer_and_its_labels_spell_it(n: int, seed: int) -> None:
    rng = random.Random(seed)
    words = rng.choices([w for w in WORDS if len(w) > 1], k=n)
    first = rng.randrange(n)
    asked = question(words, first, min(first + rng.randrange(6), n - 1))
    found = 0
    for window in features_of([asked], 40):
        assert len(window["input_ids"]) <= 40
        start, end = window["start_positions"], window["end_positions"]
        if (start, end) != (0, 0):
            found += 1
            first = window["context_start"]
            begin, stop = window["offsets"][start - first][0], window["offsets"][end - first][1]
            assert asked.text_pair is not None
            assert asked.text_pair[begin:stop] == asked.answers[0]
            assert begin == asked.answer_starts[0]
    assert found >= 1


def test_windows_cover_the_whole_context() -> None:
    context = " ".join(str(i) for i in range(10, 90))
    asked = Example("q", "who", context, None, ("10",), (0,))
    windows = features_of([asked], 32)
    covered = {c for w in windows for span in w["offsets"] for c in range(*span)}
    assert len(windows) > 2
    assert covered == {i for i, c in enumerate(context) if c != " "}


def test_a_question_that_leaves_no_room_is_cut() -> None:
    windows = features_of([Example("q", "who " * 200, "the cat saw", None, ("cat",), (4,))], 30)
    assert all(len(w["input_ids"]) <= 30 for w in windows)
    assert windows[0]["start_positions"] > 0


def test_a_start_that_is_off_is_mended_and_a_foreign_answer_is_not_in_any_window() -> None:
    near = Example("q", "who", "cat saw cat", None, ("cat",), (7,))
    (window,) = features_of([near], 40)
    assert window["offsets"][window["start_positions"] - window["context_start"]].tolist() == [8, 11]
    (window,) = features_of([Example("q", "who", "cat saw cat", None, ("dog",), (0,))], 40)
    assert (window["start_positions"], window["end_positions"]) == (0, 0)


def brute_force(windows: list[Feature], logits: list[np.ndarray], example: int) -> tuple[str, float]:
    best = ("", -np.inf)
    for window, values in zip(windows, logits, strict=True):
        first, spans = window["context_start"], window["offsets"]
        for i in range(len(spans)) if window["example"] == example else []:
            for j in range(i, min(i + MAX_ANSWER_TOKENS, len(spans))):
                score = float(values[first + i, 0] + values[first + j, 1])
                if score > best[1]:
                    best = (window["context"][spans[i][0] : spans[j][1]], score)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_the_best_span_is_that_of_trying_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = [list(rng.choice(WORDS, size=n)) for n in (5, 60, 90)]
    windows = features_of([question(words, 0, 0) for words in texts], 48)
    logits = [rng.normal(size=(60, 2)).astype(np.float32) * 5 for _ in windows]
    answers = best_answers(windows, logits)
    assert len(answers) == 3
    for example, (text, score) in enumerate(answers):
        expected = brute_force(windows, logits, example)
        assert text == expected[0] and score == pytest.approx(expected[1], abs=1e-5)


def test_an_empty_context_has_no_answer() -> None:
    windows = features_of([Example("q", "who", "", None, ("x",), (0,))], 40)
    assert best_answers(windows, [np.zeros((40, 2), np.float32)])[0][0] == ""
