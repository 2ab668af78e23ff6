"""What is computed again from per-example predictions."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.predictions import METRICS, Outcomes, Predictions
from analysis.statistics import percentile_bounds

LABELS = np.random.default_rng(0).integers(0, 2, 400)


def binary(seed, accuracy=0.8):
    rng = np.random.default_rng(seed)
    prediction = np.where(rng.random(400) < accuracy, LABELS, 1 - LABELS)
    return pd.DataFrame(
        {"id": [f"e{i:03d}" for i in range(400)], "prediction": prediction, "label": LABELS, "score": 0.7}
    )


def f1(prediction, label):
    hits = np.sum((prediction == 1) & (label == 1))
    precision, recall = hits / np.sum(prediction == 1), hits / np.sum(label == 1)
    return 2 * precision * recall / (precision + recall)


def store(tmp_path, **tables):
    (tmp_path / "predictions").mkdir(exist_ok=True)
    for name, table in tables.items():
        table.to_parquet(tmp_path / "predictions" / f"{name}.parquet")
    return Predictions(tmp_path)


def runs(metric, **scores):
    return pd.DataFrame({"run_id": list(scores), "metric": metric, "score": list(scores.values())})


def outcomes(metric, *tables):
    return Outcomes(np.stack([METRICS[metric].outcomes(table) for table in tables], axis=1), METRICS[metric])


def test_the_bootstrap_of_an_accuracy_has_the_closed_form_spread():
    table = binary(1)
    accuracy = (table["prediction"] == table["label"]).mean()
    draws = outcomes("accuracy", table).draws(np.random.default_rng(0), 20_000)[:, 0]
    assert draws.mean() == pytest.approx(accuracy, abs=1e-3)
    assert draws.std() == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 400), rel=0.03)


@pytest.mark.parametrize("metric", ["f1", "pearson", "token_f1"])
def test_the_bootstrap_agrees_with_resampling_example_by_example(metric):
    table = binary(2)
    rng = np.random.default_rng(3)
    if metric == "pearson":
        table["label"] = rng.normal(size=400)
        table["prediction"] = table["label"] + rng.normal(size=400)
    if metric == "token_f1":
        table["score"] = rng.choice([0.0, 0.5, 2 / 3, 1.0], 400)
    reference = {
        "f1": lambda t: f1(t["prediction"].to_numpy(), t["label"].to_numpy()),
        "pearson": lambda t: stats.pearsonr(t["prediction"], t["label"]).statistic,
        "token_f1": lambda t: t["score"].mean(),
    }[metric]
    found = outcomes(metric, table)
    assert found.scores() == pytest.approx([reference(table)])
    naive = np.array([reference(table.iloc[rng.integers(0, 400, 400)]) for _ in range(1500)])
    draws = found.draws(rng, 4000)[:, 0]
    assert draws.std() == pytest.approx(naive.std(), rel=0.08)
    assert percentile_bounds(draws) == pytest.approx(percentile_bounds(naive), abs=0.012)


def test_every_run_sees_the_same_resamples():
    draws = outcomes("accuracy", binary(1), binary(1), binary(2)).draws(np.random.default_rng(0), 500)
    assert (draws[:, 0] == draws[:, 1]).all()
    assert (draws[:, 0] != draws[:, 2]).any()


def test_outcomes_are_aligned_by_id_and_not_by_position(tmp_path):
    a = binary(1)
    accuracy = float((a["prediction"] == a["label"]).mean())
    predictions = store(tmp_path, a=a, shuffled=a.sample(frac=1, random_state=0))
    found = predictions.outcomes(runs("accuracy", a=accuracy, shuffled=accuracy))
    assert (found.table[:, 0] == found.table[:, 1]).all()
    assert found.table.shape == (400, 2, 1)


def test_nothing_is_paired_that_does_not_belong_together(tmp_path):
    a = binary(1)
    accuracy = float((a["prediction"] == a["label"]).mean())
    predictions = store(
        tmp_path,
        a=a,
        fewer=a.iloc[:300],
        twice=pd.concat([a, a]),
        bare=a[["id", "prediction"]],
    )
    (tmp_path / "predictions" / "torn.parquet").write_bytes(b"PAR1 torn")
    assert predictions.outcomes(runs("accuracy", a=accuracy)) is not None
    for other in ("fewer", "twice", "bare", "torn", "missing"):
        assert predictions.outcomes(runs("accuracy", a=accuracy, **{other: accuracy})) is None, other
    assert predictions.outcomes(runs("matthews", a=accuracy)) is None
    assert predictions.outcomes(runs("accuracy", a=accuracy + 0.01)) is None
