"""Metrics, as `evaluate` metrics that need no network, and bootstrap intervals over examples.

Every metric is a function of weighted sums over examples, so that a bootstrap resample is a vector of weights: how
often each example, or each kind of outcome, was drawn.
"""

from __future__ import annotations

import re
import string
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from bench.errors import unknown
from bench.results import Interval

Floats = NDArray[np.float64]

_CHUNK = 4_000_000


class _Metric(evaluate.Metric):  # type: ignore[misc]
    """A metric with what its bootstrap needs.

    ``outcomes`` gives some numbers for each example, (n, m); ``value`` gives the metric of each of several weightings,
    (resamples,) from weights (resamples, u) and the u different outcomes, (u, m).
    """

    name_: ClassVar[str]
    summary: ClassVar[str]
    features_: ClassVar[dict[str, Any]] = {
        "predictions": datasets.Value("int64"),
        "references": datasets.Value("int64"),
    }

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description="predictions and references, one of each an example",
            features=datasets.Features(self.features_),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {self.name_: self.score(predictions, references)}

    @staticmethod
    def score(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        """Return the metric."""
        raise NotImplementedError

    @staticmethod
    def outcomes(predictions: Sequence[Any], references: Sequence[Any]) -> Floats:
        """Return what each example contributes."""
        raise NotImplementedError

    @staticmethod
    def value(weights: Floats, outcomes: Floats) -> Floats:
        """Return the weighted mean of the outcomes."""
        return np.asarray(weights @ outcomes[:, 0] / weights.sum(1))


class Accuracy(_Metric):
    """Share of examples whose class is right."""

    name_, summary = "accuracy", "share of examples whose class is right"

    @staticmethod
    def score(predictions: Sequence[int], references: Sequence[int]) -> float:
        """Return the accuracy."""
        return float(accuracy_score(references, predictions))

    @staticmethod
    def outcomes(predictions: Sequence[int], references: Sequence[int]) -> Floats:
        """Return 1 where the class is right."""
        return np.equal(predictions, references).astype(np.float64)[:, None]


class F1(_Metric):
    """Harmonic mean of precision and recall of class 1; 0 where nothing is positive."""

    name_, summary = "f1", "harmonic mean of precision and recall of class 1"

    @staticmethod
    def score(predictions: Sequence[int], references: Sequence[int]) -> float:
        """Return the F1 of class 1."""
        return float(f1_score(references, predictions, pos_label=1, average="binary", zero_division=0))

    @staticmethod
    def outcomes(predictions: Sequence[int], references: Sequence[int]) -> Floats:
        """Return whether each example is a true positive, and whether it is a false positive or negative."""
        predicted, true = np.asarray(predictions) == 1, np.asarray(references) == 1
        return np.stack([predicted & true, predicted ^ true], axis=1).astype(np.float64)

    @staticmethod
    def value(weights: Floats, outcomes: Floats) -> Floats:
        """Return 2 tp / (2 tp + fp + fn)."""
        hits, errors = (weights @ outcomes).T
        return np.asarray(2 * hits / np.maximum(2 * hits + errors, 1))


class Pearson(_Metric):
    """Linear correlation; 0 where predictions or references are constant."""

    name_, summary = "pearson", "linear correlation"
    features_: ClassVar[dict[str, Any]] = {
        "predictions": datasets.Value("float64"),
        "references": datasets.Value("float64"),
    }

    @staticmethod
    def score(predictions: Sequence[float], references: Sequence[float]) -> float:
        """Return Pearson's r."""
        return _or_zero(stats.pearsonr, predictions, references)

    @staticmethod
    def outcomes(predictions: Sequence[float], references: Sequence[float]) -> Floats:
        """Return the pairs."""
        return np.stack([np.asarray(predictions, np.float64), np.asarray(references, np.float64)], axis=1)

    @staticmethod
    def value(weights: Floats, outcomes: Floats) -> Floats:
        """Return Pearson's r of the weighted pairs."""
        return _correlation(weights, outcomes[None, :, 0], outcomes[None, :, 1])


class Spearman(Pearson):
    """Rank correlation; 0 where predictions or references are constant."""

    name_, summary = "spearman", "rank correlation"

    @staticmethod
    def score(predictions: Sequence[float], references: Sequence[float]) -> float:
        """Return Spearman's rho."""
        return _or_zero(stats.spearmanr, predictions, references)

    @staticmethod
    def value(weights: Floats, outcomes: Floats) -> Floats:
        """Return Pearson's r of the ranks that the weighted pairs have in their resample."""
        return _correlation(weights, _ranks(weights, outcomes[:, 0]), _ranks(weights, outcomes[:, 1]))


class ExactMatch(_Metric):
    """Share of answers equal to an accepted one after SQuAD's normalisation."""

    name_, summary = "exact_match", "share of answers equal to an accepted one, normalised as SQuAD does"
    features_: ClassVar[dict[str, Any]] = {
        "predictions": datasets.Value("string"),
        "references": datasets.Sequence(datasets.Value("string")),
    }

    @classmethod
    def score(cls, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Return the mean over examples."""
        return float(cls.outcomes(predictions, references).mean())

    @staticmethod
    def outcomes(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """Return 1 where the answer is one of those accepted."""
        hits = [normalise(p) in map(normalise, accepted) for p, accepted in zip(predictions, references, strict=True)]
        return np.asarray(hits, np.float64)[:, None]


class TokenF1(ExactMatch):
    """Mean overlap in words with the nearest accepted answer (SQuAD's F1)."""

    name_, summary = "token_f1", "mean overlap in words with the nearest accepted answer, SQuAD's F1"

    @staticmethod
    def outcomes(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
        """Return the best overlap of each example."""
        best = [max(token_f1(p, a) for a in accepted) for p, accepted in zip(predictions, references, strict=True)]
        return np.asarray(best, np.float64)[:, None]


METRICS: dict[str, type[_Metric]] = {
    metric.name_: metric for metric in (Accuracy, F1, Pearson, Spearman, ExactMatch, TokenF1)
}
"""Name -> metric."""


def normalise(answer: str) -> str:
    """Lower-case; drop ASCII punctuation, then the words a, an, the; one space between words (SQuAD's rule)."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(prediction: str, answer: str) -> float:
    """Return the F1 of the bags of normalised words; 0 where they share none."""
    predicted, true = normalise(prediction).split(), normalise(answer).split()
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true)) if common else 0.0


def compute(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Compute a metric.

    Parameters
    ----------
    name
        A key of `METRICS`.
    predictions, references
        One each an example: class ids; numbers; or, for question answering, a text and a list of accepted texts.

    Returns
    -------
    float
        In [0, 1]; a correlation in [-1, 1].

    Raises
    ------
    ConfigError
        If there is no such metric.
    ValueError
        If there are no examples, or not as many predictions as references.
    """
    metric = _metric(name)
    if not len(predictions) or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    # The library makes a folder even where it keeps all in memory; the home folder may be read-only.
    with tempfile.TemporaryDirectory() as scratch:
        result = metric(keep_in_memory=True, cache_dir=scratch).compute(predictions=predictions, references=references)
    return float(result[name])


def bootstrap(
    name: str,
    predictions: Sequence[Any],
    references: Sequence[Any],
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Compute a metric and its percentile bootstrap interval over examples.

    Examples with the same outcome are drawn together: the counts of n draws are multinomial, which is the same
    distribution as drawing one by one and takes milliseconds.

    Parameters
    ----------
    name, predictions, references
        As for `compute`.
    resamples
        Number of resamples.
    seed
        Seed of the resampling.
    level
        Coverage of the central interval.

    Raises
    ------
    ConfigError, ValueError
        As `compute`.
    """
    value = compute(name, predictions, references)
    metric = _metric(name)
    kinds, counts = np.unique(metric.outcomes(predictions, references), axis=0, return_counts=True)
    rng, n = np.random.default_rng(seed), int(counts.sum())
    rows = max(1, _CHUNK // len(kinds))
    values = [
        metric.value(rng.multinomial(n, counts / n, size=min(rows, resamples - done)).astype(np.float64), kinds)
        for done in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low), high=float(high), level=level, resamples=resamples)


def _metric(name: str) -> type[_Metric]:
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]


def _or_zero(correlate: Any, x: Sequence[float], y: Sequence[float]) -> float:
    if len(x) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(np.nan_to_num(correlate(x, y).statistic))


def _correlation(weights: Floats, x: Floats, y: Floats) -> Floats:
    """Return Pearson's r of weighted pairs for each row of weights (resamples, n); x and y are (resamples or 1, n)."""
    total = weights.sum(1, keepdims=True)
    dx = x - (weights * x).sum(1, keepdims=True) / total
    dy = y - (weights * y).sum(1, keepdims=True) / total
    scale = np.sqrt((weights * dx**2).sum(1) * (weights * dy**2).sum(1))
    return np.asarray(np.divide((weights * dx * dy).sum(1), scale, out=np.zeros_like(scale), where=scale > 0))


def _ranks(weights: Floats, values: Floats) -> Floats:
    """Return the mean rank of each value in each resample, (resamples, n), repeated and tied values sharing theirs."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))
    groups = np.add.reduceat(weights[:, order], starts, axis=1)
    middle = groups.cumsum(1) - groups / 2
    group_of = np.empty(len(values), dtype=np.int64)
    group_of[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values)))
    return np.asarray(middle[:, group_of])
