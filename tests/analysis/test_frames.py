"""Results to rows: every number where it belongs, and no run lost unseen."""

import json

import numpy as np
import pytest

from analysis.frames import read_study
from bench.results import TrainingStage
from tests.analysis.synthetic import PARAMETERS, make_run, write_runs


def row_of(study, run_id):
    return study.frame.set_index("run_id").loc[run_id]


def test_a_run_becomes_a_row_of_plain_numbers(tmp_path):
    result, predictions = make_run("sst2", "variator", 4.0, 1)
    dense, teacher = make_run("sst2", "dense", None, 1)
    row = row_of(read_study(write_runs(tmp_path, [(result, predictions), (dense, teacher)])), result.run_id)
    score = float((predictions["prediction"] == predictions["label"]).mean())
    best = float((teacher["prediction"] == teacher["label"]).mean())
    assert (row["task"], row["backbone"], row["method"], row["series"]) == ("sst2", "t5-base", "variator", "variator")
    assert (row["ratio"], row["seed"], row["metric"], row["n_examples"]) == (4.0, 1, "accuracy", 872)
    assert row["score"] == pytest.approx(score)
    assert row["drop"] == pytest.approx(best - score)
    assert row["drop_percent"] == pytest.approx(100 * (best - score) / best)
    assert row["remaining"] == pytest.approx(0.534) and row["saved"] == pytest.approx(0.466)
    assert row["remaining_total"] == pytest.approx((0.534 * 10 + 1) / 11)
    assert row["encoder_flops_per_example"] == pytest.approx(5.34e9)
    assert row["parameters_added_percent"] == pytest.approx(100 * 1_900_000 / PARAMETERS)
    assert (row["training_steps"], row["training_seconds"]) == (100, 60.0)  # without the teacher's own
    assert (row["option.train_examples"], row["option.bottleneck"]) == (5000, 64)
    assert not [name for name in row.index if name.startswith("identity.")]


def test_latency_is_the_median_of_the_paired_ratios(tmp_path):
    result, predictions = make_run()
    shape = result.latency[0]
    shape.dense_seconds, shape.compressed_seconds = [1.0, 2.0, 4.0], [0.5, 2.0, 3.0]
    row = row_of(read_study(write_runs(tmp_path, [(result, predictions)])), result.run_id)
    assert row["latency_ratio.b1"] == 0.75  # and not 2 / 2, the ratio of the medians
    assert row["latency_ratio.b1_low"] == 0.5 and row["latency_ratio.b1_high"] == 1.0
    assert row["memory_ratio.b32"] == pytest.approx(0.8)


def test_dense_rows_and_runs_without_measurements_have_gaps_and_no_zeros(tmp_path):
    runs = [
        make_run(method="dense", ratio=None, latency=False),
        make_run(status="failed", reason="boom"),
        make_run(seed=1, latency=False),
    ]
    frame = read_study(write_runs(tmp_path, runs)).frame.set_index("method", append=True)
    dense = frame.xs("dense", level="method").iloc[0]
    assert np.isnan(dense["ratio"]) and dense["drop"] == 0 and np.isnan(dense["requested_remaining"])
    assert "latency_ratio.b1" not in frame
    failed = frame[frame["status"] == "failed"].iloc[0]
    assert failed["reason"] == "boom" and np.isnan(failed["score"]) and np.isnan(failed["remaining"])


def test_foreign_files_are_named_and_the_rest_is_read(tmp_path):
    folder = write_runs(tmp_path, [make_run(seed=0), make_run(seed=1)])
    good = sorted((folder / "runs").glob("*.json"))
    (folder / "runs" / "torn.json").write_text(good[0].read_text()[:500])
    (folder / "runs" / "foreign.json").write_text(json.dumps({"accuracy": 0.9}))
    (folder / "runs" / "newer.json").write_text(json.dumps(json.loads(good[0].read_text()) | {"unheard_of": 1}))
    (folder / "runs" / "copy of a run.json").write_text(good[0].read_text())
    study = read_study(folder)
    assert len(study.frame) == 2
    assert [problem.split(" is ")[0] for problem in study.problems] == [
        "copy of a run.json",
        "foreign.json",
        "newer.json",
        "torn.json",
    ]
    assert "schema_version" not in study.problems[1] and "run_id" in study.problems[1]


def test_a_training_history_that_diverged_does_not_keep_a_run_from_being_read(tmp_path):
    result, predictions = make_run(status="diverged", reason="loss is nan")
    nan = {"step": 3.0, "loss": float("nan")}
    result.training = [
        TrainingStage(
            name="adapt", artifact="a", cached=False, steps=3, examples=9, flops=1, seconds=1.0, history=[nan]
        )
    ]
    study = read_study(write_runs(tmp_path, [(result, predictions)]))
    assert study.problems == [] and study.frame["status"].tolist() == ["diverged"]


def series(tmp_path, *runs):
    study = read_study(write_runs(tmp_path, runs))
    return [row_of(study, result.run_id)["series"] for result, _ in runs]


def test_a_method_is_named_alone_where_its_runs_differ_by_task_seed_and_ratio_only(tmp_path):
    found = series(
        tmp_path,
        make_run("sst2", seed=0),
        make_run("sst2", ratio=8.0, seed=1),
        make_run("rte", config={"train_examples": 100}),
        make_run("sst2", "distillation", config={"steps": 9}),
    )
    assert found == ["variator", "variator", "variator", "distillation"]


def test_options_that_differ_make_series_of_their_own(tmp_path):
    found = series(
        tmp_path, make_run(), make_run(options={"bottleneck": 16}), make_run("rte", options={"bottleneck": 16})
    )
    assert found == ["variator", "variator (bottleneck=16)", "variator (bottleneck=16)"]


def test_long_values_that_begin_alike_are_told_apart(tmp_path):
    mixes = [f"all_hidden=1,logits=0.1,task=0.1,last_hidden={share}" for share in (1, 2)]
    found = series(tmp_path, make_run(), *(make_run(options={"losses": mix}) for mix in mixes))
    assert len(set(found)) == 3 and found[0] == "variator"
    assert all(name.startswith("variator (losses=all_hidden=1,logits=0.1,task=0.") for name in found[1:])


def test_a_setting_that_was_given_is_named_before_one_that_follows_from_it(tmp_path):
    without = make_run(options={"pretrain_steps": 0})
    with_batch = make_run(options={"a_batch": 16})  # part of an identity where there is a training alone
    with_batch[0].provenance.command = ["bench", "run"]
    assert series(tmp_path, with_batch, without) == ["variator", "variator (pretrain_steps=0)"]


def test_a_setting_that_plays_no_part_does_not_name_a_series(tmp_path):
    """A plugin that is not adapted takes no steps: its identity lacks them, its configuration names them still."""
    adapted = make_run(config={"steps": 200})
    still, predictions = make_run(config={"steps": 200}, options={"adapt": False})
    del still.identity["steps"]
    assert series(tmp_path, adapted, (still, predictions)) == ["variator", "variator (adapt=False)"]


def test_a_default_is_named_where_its_name_would_be_anothers(tmp_path):
    runs = [make_run(), make_run(options={"bottleneck": 16})]
    for result, _ in runs:  # as two versions of the library would, each with a default of its own
        result.provenance.command = ["bench", "run"]
    assert series(tmp_path, *runs) == ["variator (bottleneck=64)", "variator (bottleneck=16)"]


def test_series_that_share_no_ratio_or_seed_are_still_kept_apart(tmp_path):
    found = series(tmp_path, make_run(ratio=2.0), make_run(ratio=8.0, seed=1, config={"steps": 10}))
    assert found == ["variator", "variator (steps=10)"]


def test_a_recipe_stands_for_all_that_it_sets(tmp_path):
    released = {"recipe": "released", "steps": 26_000, "train_examples": 9}
    found = series(tmp_path, make_run(), make_run(config=released, options={"mask_padding": False}))
    assert found == ["variator", "variator (recipe=released)"]


def test_what_the_recipe_does_not_tell_is_told_beside_it(tmp_path):
    released = {"recipe": "released", "steps": 26_000}
    found = series(
        tmp_path, make_run(), make_run(config=released), make_run(config=released, options={"bottleneck": 8})
    )
    assert len(set(found)) == 3
    assert found[2] == "variator (recipe=released, bottleneck=8)"


def test_a_later_version_of_a_method_is_no_second_seed_of_it(tmp_path):
    new, predictions = make_run(seed=1)
    new.identity["method"] = "variator@2"
    assert series(tmp_path, make_run(seed=0), (new, predictions)) == [
        "variator (method=variator@1)",
        "variator (method=variator@2)",
    ]
