"""Metrics against hand-computed values and other libraries; bootstrap intervals against drawing one by one."""

import socket
import time
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from bench.errors import ConfigError
from bench.tasks.metrics import METRICS, bootstrap, compute, normalise, token_f1

RNG = np.random.default_rng(0)
BINARY = (RNG.integers(0, 2, 300).tolist(), RNG.integers(0, 2, 300).tolist())
# Ties on purpose: half-integers.
NUMBERS = (np.round(RNG.normal(size=200) * 2) / 2, np.round(RNG.normal(size=200) * 2) / 2)
CORRELATED = (NUMBERS[0].tolist(), (NUMBERS[0] + NUMBERS[1]).tolist())
ANSWERS = (
    ["the Red house", "green", "blue!", "", "a cat saw"],
    [["red house"], ["blue"], ["Blue", "red"], ["x"], ["the cat", "dog saw me"]],
)


def test_hand_computed_values() -> None:
    assert compute("accuracy", [0, 1, 2, 2], [0, 1, 1, 2]) == 0.75
    # 2 true positives, 1 false positive, 1 false negative.
    assert compute("f1", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(4 / 6)
    assert compute("f1", [0, 0], [0, 0]) == 0.0
    assert compute("exact_match", *ANSWERS) == pytest.approx(2 / 5)
    # 1, 0, 1, 0 and "cat saw" against "cat": 2 * 1 / 3.
    assert compute("token_f1", *ANSWERS) == pytest.approx((1 + 0 + 1 + 0 + 2 / 3) / 5)
    assert compute("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert compute("spearman", [1.0, 2.0, 3.0], [9.0, 4.0, 1.0]) == pytest.approx(-1)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_correlates_with_nothing(name: str) -> None:
    assert compute(name, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == 0
    assert bootstrap(name, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0], resamples=20).high == 0


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The U.S. Army", "us army"),
        ("an  Apple, a day", "apple day"),
        ("theatre", "theatre"),
        ("well-known", "wellknown"),
        ("A", ""),
    ],
)
def test_squad_normalisation(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_token_f1_counts_repeated_words() -> None:
    # Bags {x, x, y} and {x, y, y}: two in common.
    assert token_f1("x x y", "x y y") == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_an_evaluate_metric(name: str) -> None:
    assert issubclass(METRICS[name], evaluate.Metric)


def test_metrics_need_neither_network_nor_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a metric reached for the network")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name, predictions, references in CASES:
        compute(name, predictions, references)


CASES = [
    ("accuracy", *BINARY),
    ("f1", *BINARY),
    ("pearson", *CORRELATED),
    ("spearman", *CORRELATED),
    ("exact_match", *(part * 40 for part in ANSWERS)),
    ("token_f1", *(part * 40 for part in ANSWERS)),
]
REFERENCE = {
    "accuracy": lambda p, r: sk.accuracy_score(r, p),
    "f1": lambda p, r: sk.f1_score(r, p),
    "pearson": lambda p, r: stats.pearsonr(p, r).statistic,
    "spearman": lambda p, r: stats.spearmanr(p, r).statistic,
    "exact_match": lambda p, r: compute("exact_match", p, r),
    "token_f1": lambda p, r: compute("token_f1", p, r),
}


@pytest.mark.parametrize(("name", "predictions", "references"), CASES, ids=[case[0] for case in CASES])
def test_the_weighted_form_equals_the_metric_on_the_drawn_examples(
    name: str, predictions: list, references: list
) -> None:
    metric = METRICS[name]
    outcomes = metric.outcomes(predictions, references)
    draws = np.random.default_rng(5).integers(len(predictions), size=(5, len(predictions)))
    weights = np.stack([np.bincount(draw, minlength=len(predictions)) for draw in draws]).astype(float)
    expected = [REFERENCE[name]([predictions[i] for i in d], [references[i] for i in d]) for d in draws]
    np.testing.assert_allclose(metric.value(weights, outcomes), expected, atol=1e-12)


@pytest.mark.parametrize(("name", "predictions", "references"), CASES, ids=[case[0] for case in CASES])
def test_intervals_agree_with_drawing_one_by_one(name: str, predictions: list, references: list) -> None:
    interval = bootstrap(name, predictions, references, resamples=4000, seed=1)
    rng, n, metric = np.random.default_rng(2), len(predictions), METRICS[name]
    outcomes = metric.outcomes(predictions, references)
    values = [
        metric.value(np.bincount(rng.integers(n, size=n), minlength=n)[None].astype(float), outcomes)[0]
        for _ in range(4000)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    width = high - low
    assert interval.low < interval.value < interval.high
    assert abs(interval.low - low) < 0.1 * width and abs(interval.high - high) < 0.1 * width


def test_intervals_follow_the_seed_and_the_level() -> None:
    first, again, other = (bootstrap("f1", *BINARY, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    wide, narrow = (bootstrap("f1", *BINARY, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_forty_thousand_examples_take_less_than_two_seconds() -> None:
    predictions, references = RNG.integers(0, 2, 40_000), RNG.integers(0, 2, 40_000)
    start = time.perf_counter()
    bootstrap("f1", predictions, references)
    assert time.perf_counter() - start < 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=50))
def test_f1_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predictions, references = zip(*pairs, strict=True)
    expected = sk.f1_score(references, predictions, zero_division=0)
    assert compute("f1", predictions, references) == pytest.approx(expected)
    weights = np.ones((1, len(pairs)))
    assert METRICS["f1"].value(weights, METRICS["f1"].outcomes(predictions, references))[0] == pytest.approx(expected)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'accuracy'"):
        compute("acuracy", [1], [1])
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        compute("accuracy", [1], [1, 0])
    with pytest.raises(ValueError, match="0 predictions"):
        compute("accuracy", [], [])
