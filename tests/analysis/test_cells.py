"""Runs to cells: means, intervals, averages and tests against independent computations."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.cells import AVERAGE, cells
from analysis.comparisons import comparisons
from analysis.frames import read_study
from analysis.predictions import Predictions
from tests.analysis.synthetic import glue, make_run, write_runs


def table_of(tmp_path, runs, study="glue"):
    folder = write_runs(tmp_path, runs, study)
    return cells(read_study(folder), Predictions(folder))


def cell(table, task="sst2", series="variator", ratio=4.0):
    same = table["ratio"].isna() if ratio is None else table["ratio"] == ratio
    found = table[(table["task"] == task) & (table["series"] == series) & same]
    assert len(found) == 1
    return found.iloc[0]


def right(predictions):
    return (predictions["prediction"] == predictions["label"]).to_numpy(dtype=float)


def test_a_cell_is_the_mean_of_its_seeds_with_both_intervals(tmp_path):
    runs = [make_run(seed=seed) for seed in range(3)]
    row = cell(table_of(tmp_path, runs))
    matrix = np.array([right(predictions) for _, predictions in runs])
    scores = matrix.mean(axis=1)
    assert row["score"] == pytest.approx(scores.mean()) and row["seeds"] == 3
    expected = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    assert (row["seed_low"], row["seed_high"]) == pytest.approx((expected.low, expected.high))
    # an example is drawn together with all its seeds, so that three seeds are not three times the examples
    half = 1.96 * matrix.mean(axis=0).std() / np.sqrt(matrix.shape[1])
    assert (row["example_high"] - row["example_low"]) / 2 == pytest.approx(half, rel=0.08)


def test_one_seed_keeps_the_interval_that_the_run_stored(tmp_path):
    result, predictions = make_run()
    stored = result.evaluations[1].metrics["accuracy"]
    row = cell(table_of(tmp_path, [(result, predictions)]))
    assert (row["example_low"], row["example_high"]) == (stored.low, stored.high)
    assert np.isnan(row["seed_low"]) and np.isnan(row["p"])


def test_perfect_answers_keep_a_width(tmp_path):
    row = cell(table_of(tmp_path, [make_run(accuracy=1.0), make_run(accuracy=1.0, seed=1)]))
    expected = stats.binomtest(872, 872).proportion_ci(0.95, method="wilson")
    assert (row["example_low"], row["example_high"]) == pytest.approx((expected.low, expected.high))


def test_the_teacher_stands_for_a_dense_run_that_was_not_made(tmp_path):
    runs = [make_run(seed=seed) for seed in range(2)]
    teachers = [make_run(method="dense", ratio=None, seed=seed)[1] for seed in range(2)]
    row = cell(table_of(tmp_path, runs), series="dense", ratio=None)
    assert row["score"] == pytest.approx(np.mean([right(teacher).mean() for teacher in teachers]))
    assert (row["remaining"], row["seeds"], row["parameters_added_percent"]) == (1.0, 2, 0.0)


def test_the_test_against_dense_is_mcnemars_for_one_seed(tmp_path):
    ours, dense = make_run(), make_run(method="dense", ratio=None)
    row = cell(table_of(tmp_path, [ours, dense]))
    a, b = right(ours[1]), right(dense[1])
    expected = stats.binomtest(int(((a == 1) & (b == 0)).sum()), int((a != b).sum())).pvalue
    assert row["test"] == "mcnemar" and row["p"] == pytest.approx(expected)


def test_several_seeds_are_tested_on_their_own_teachers(tmp_path):
    runs = [make_run(method=method, ratio=4.0, seed=seed) for method in ("variator", "dense") for seed in range(3)]
    row = cell(table_of(tmp_path, runs))
    gaps = np.mean([right(runs[i][1]) - right(runs[i + 3][1]) for i in range(3)], axis=0)
    normal = 2 * stats.norm.sf(abs(gaps.mean()) / (gaps.std() / np.sqrt(len(gaps))))
    assert row["test"] == "bootstrap" and row["p"] == pytest.approx(normal, abs=0.02)
    assert np.isnan(cell(table_of(tmp_path, runs[:5], "one teacher less"))["p"])


def test_the_teacher_of_another_recipe_is_no_partner(tmp_path):
    other = make_run(method="dense", ratio=None, accuracy=0.7, config={"train_examples": 100})
    table = table_of(tmp_path, [make_run(), other])
    assert np.isnan(cell(table)["p"])
    own = make_run(method="dense", ratio=None)
    both = cell(table_of(tmp_path, [make_run(), own, other], "both"))
    assert both["p"] == cell(table_of(tmp_path, [make_run(), own], "own"))["p"]


def test_the_average_gives_every_task_one_vote(tmp_path):
    table = table_of(tmp_path, glue(seeds=(0, 1, 2), methods=("variator",)))
    row = cell(table, AVERAGE)
    parts = [cell(table, task) for task in ("sst2", "mnli", "rte", "mrpc")]
    for name in ("score", "drop", "remaining", "latency_ratio.b32"):
        assert row[name] == pytest.approx(np.mean([part[name] for part in parts])), name
    widths = np.array([part["example_high"] - part["example_low"] for part in parts])
    expected = np.sqrt((widths**2).sum()) / len(parts)  # the tasks are independent samples
    assert row["example_high"] - row["example_low"] == pytest.approx(expected, rel=0.06)
    by_seed = np.mean([[score for _, score in part["seed_scores"]] for part in parts], axis=0)
    seeds = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    assert (row["seed_low"], row["seed_high"]) == pytest.approx((seeds.low, seeds.high))
    assert row["drop_percent"] == pytest.approx(100 * row["drop"] / row["teacher_score"])


def test_without_predictions_the_stored_intervals_are_combined(tmp_path):
    table = table_of(tmp_path, [(result, pd.DataFrame()) for result, _ in glue(methods=("variator",), seeds=(0,))])
    row = cell(table, AVERAGE)
    widths = [
        cell(table, task)["example_high"] - cell(table, task)["example_low"] for task in ("sst2", "mnli", "rte", "mrpc")
    ]
    assert row["example_high"] - row["example_low"] == pytest.approx(np.linalg.norm(widths) / 4, rel=0.06)
    assert np.isnan(row["p"])


def test_there_is_no_average_over_fewer_tasks_than_the_others_have(tmp_path):
    runs = list(glue(seeds=(0,), methods=("variator", "pruning")))
    lost = [run for run in runs if not (run[0].config["task"] == "rte" and run[0].config["ratio"] == 4.0)]
    table = table_of(tmp_path, lost)
    row = cell(table, AVERAGE)
    assert np.isnan(row["score"]) and row["missing_tasks"] == "rte" and not row["on_front"]
    assert cell(table, AVERAGE, ratio=8.0)["missing_tasks"] == ""


def test_a_single_task_has_no_average(tmp_path):
    assert AVERAGE not in set(table_of(tmp_path, glue(tasks=("sst2",), seeds=(0,)))["task"])


def test_the_best_and_the_front_are_found_within_their_block(tmp_path):
    runs = [
        make_run(method="dense", ratio=None, accuracy=0.92),
        make_run(ratio=4.0, accuracy=0.90),
        make_run(ratio=8.0, accuracy=0.91),
        make_run(method="pruning", ratio=4.0, accuracy=0.80),
        make_run(method="pruning", ratio=4.0, accuracy=0.95, backbone="large"),
    ]
    table = table_of(tmp_path, runs)
    table = table[table["backbone"] == "t5-base"]
    assert cell(table)["best"] and not cell(table, series="pruning")["best"]
    assert not cell(table, ratio=8.0)["best"]  # the best of one is no praise
    front = table[table["on_front"]]
    assert set(zip(front["series"], front["ratio"].fillna(0), strict=True)) == {("variator", 8.0), ("dense", 0)}


def test_the_same_runs_give_the_same_numbers(tmp_path):
    runs = glue(seeds=(0, 1), methods=("variator",))
    first, second = table_of(tmp_path, runs, "a"), table_of(tmp_path, reversed(runs), "b")
    pd.testing.assert_frame_equal(first, second)


def test_methods_are_compared_in_pairs_at_equal_ratio(tmp_path):
    folder = write_runs(tmp_path, glue(tasks=("sst2",), seeds=(0,), methods=("variator", "pruning", "token_merging")))
    found = comparisons(read_study(folder), Predictions(folder))
    assert len(found) == 9 and (found["test"] == "mcnemar").all() and (found["examples"] == 872).all()
    pair = found[(found["ratio"] == 2.0) & (found["a"] == "pruning") & (found["b"] == "variator")].iloc[0]
    scores = {method: right(make_run(method=method, ratio=2.0)[1]) for method in ("pruning", "variator")}
    gaps = scores["pruning"] - scores["variator"]
    assert pair["difference"] == pytest.approx(gaps.mean())
    assert (pair["high"] - pair["low"]) / 2 == pytest.approx(1.96 * gaps.std() / np.sqrt(872), rel=0.1)
    block = found[found["ratio"] == 2.0].sort_values("p")
    assert block["p_holm"].iloc[0] == pytest.approx(3 * block["p"].iloc[0], rel=1e-9, abs=0)


def test_pairs_share_seeds_or_are_not_compared(tmp_path):
    folder = write_runs(tmp_path, [make_run(seed=0), make_run(seed=1), make_run(method="pruning", seed=1)])
    found = comparisons(read_study(folder), Predictions(folder))
    assert found["seeds"].tolist() == [1]
    lonely = write_runs(tmp_path, [make_run(seed=0), make_run(method="pruning", seed=1)], "lonely")
    assert comparisons(read_study(lonely), Predictions(lonely)).empty


def test_the_interval_of_a_drop_is_paired(tmp_path):
    table = table_of(tmp_path, glue(methods=("variator", "pruning"), seeds=(0, 1)), "glue")
    for task in ("sst2", AVERAGE):
        row = cell(table, task, "pruning")
        assert row["drop_low"] < row["drop"] < row["drop_high"]
        gaps = row["drop_low"], row["drop_high"]
        assert (row["p"] < 0.05) == (min(gaps) > 0 or max(gaps) < 0), "interval and test must tell the same"
    assert np.isnan(cell(table, "sst2", "dense", None)["drop_low"])
