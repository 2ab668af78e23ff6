"""What counts as a difference, and what another machine may make of a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.results import RunResult, TrainingStage
from bench.verify.causes import of_surroundings
from bench.verify.comparing import COST_TOLERANCE, MEMORY_TOLERANCE, METRIC_TOLERANCE, differences
from bench.verify.records import contradictions
from tests.analysis.synthetic import make_run

Change = Callable[[RunResult], Any]


@pytest.fixture
def run() -> tuple[RunResult, pd.DataFrame]:
    result, frame = make_run("sst2")
    stage = TrainingStage(
        name="adapt", artifact="plugin-1", cached=False, steps=20, examples=320, flops=10, seconds=1.0,
        history=[{"step": 10.0, "loss": 0.5}, {"step": 20.0, "loss": 0.4}],
    )  # fmt: skip
    assert result.cost
    result.cost.padded = result.cost.padded.model_copy(deep=True)
    return result.model_copy(update={"knob": {"k": 4}, "training": [stage]}), frame


def compared(run: tuple[RunResult, pd.DataFrame], change: Change, frame: pd.DataFrame | None = None) -> list[Any]:
    made = run[0].model_copy(deep=True)
    change(made)
    return differences(run[0], made, run[1], run[1] if frame is None else frame)


def test_timings_places_and_caches_are_no_difference(run: Any) -> None:
    def change(made: RunResult) -> None:
        made.latency.clear()
        made.training[0].seconds, made.training[0].cached = 99.0, True
        made.provenance.started, made.provenance.seconds = "2030-01-01", 5.0
        made.study = "scratch"

    assert compared(run, change) == []


def set_accuracy(half_widths: float) -> Change:
    def change(made: RunResult) -> None:
        dev = made.evaluation("dev")
        assert dev
        interval = dev.metrics["accuracy"]
        assert (interval.high - interval.low) / 2 > METRIC_TOLERANCE
        interval.value += half_widths * (interval.high - interval.low) / 2

    return change


def set_cost(name: str, factor: float) -> Change:
    def change(made: RunResult) -> None:
        assert made.cost
        holder: Any = made.cost
        *path, last = name.split(".")
        for part in path:
            holder = getattr(holder, part)
        setattr(holder, last, type(getattr(holder, last))(getattr(holder, last) * factor))

    return change


def set_memory(factor: float) -> Change:
    def change(made: RunResult) -> None:
        made.memory[0].compressed_bytes = round(made.memory[0].compressed_bytes * factor)

    return change


@pytest.mark.parametrize(
    ("change", "within", "said"),
    [
        (set_accuracy(0.9), True, "dev accuracy: "),
        (set_accuracy(-1.1), False, "dev accuracy: "),
        (set_accuracy(1e-12), True, "dev accuracy: "),
        (set_cost("real.compressed.encoder", 1 + 0.9 * COST_TOLERANCE), True, "cost.real.compressed.encoder: "),
        (set_cost("real.compressed.encoder", 1 + 1.1 * COST_TOLERANCE), False, "cost.real.compressed.encoder: "),
        (set_cost("real.dense.encoder", 1 + 1e-6), False, "cost.real.dense.encoder: "),
        (set_cost("parameters_teacher", 1 + 1e-6), False, "cost.parameters_teacher: "),
        (set_cost("bytes_added", 2), False, "cost.bytes_added: "),
        (lambda made: made.knob.update(k=5), True, "knob.k: 4 recorded, 5 made again"),
        (lambda made: made.examples.update(dev=3), False, "examples.dev: "),
        (lambda made: made.evaluations.clear(), False, "evaluations: "),
        (lambda made: made.teacher_evaluations.clear(), False, "teacher's evaluations: "),
        (lambda made: made.training[0].history[1].update(loss=0.45), True, "they part by step 20, and are up to 0.05"),
        (lambda made: made.training[0].history.pop(), False, "2 records, made again 1"),
        (lambda made: setattr(made.training[0], "steps", 21), False, "training 'adapt'.steps: 20 recorded, 21"),
        (lambda made: made.training.clear(), False, "trainings: adapt; made again none"),
        (set_memory(1 + 0.9 * MEMORY_TOLERANCE), True, "memory.batch 1.compressed_bytes: "),
        (set_memory(1 + 1.2 * MEMORY_TOLERANCE), False, "memory.batch 1.compressed_bytes: "),
        (lambda made: setattr(made, "status", "diverged"), False, "status: recorded done · made again diverged"),
    ],
)
def test_a_difference_is_named_and_judged(run: Any, change: Change, within: bool, said: str) -> None:
    [difference] = compared(run, change)
    assert said in difference.text and difference.within is within


def test_a_narrow_interval_gives_a_metric_a_point(run: Any) -> None:
    for evaluation in run[0].evaluations:
        interval = evaluation.metrics["accuracy"]
        interval.low, interval.high = interval.value - 1e-3, interval.value + 1e-3
    for by, within in ((0.9, True), (1.1, False)):

        def change(made: RunResult, by: float = by) -> None:
            dev = made.evaluation("dev")
            assert dev
            dev.metrics["accuracy"].value += by * METRIC_TOLERANCE

        [difference] = compared(run, change)
        assert difference.within is within


@pytest.mark.parametrize("more", [0, 1])
def test_as_many_answers_may_change_as_were_wrong(run: Any, more: int) -> None:
    frame = run[1].copy()
    wrong = int((frame["prediction"] != frame["label"]).sum())
    assert wrong > 0.05 * len(frame)
    # as many to the wrong as to the right: the metric alone would show nothing
    changed = wrong + more
    frame.loc[: changed - 1, "prediction"] = 1 - frame.loc[: changed - 1, "prediction"]
    [difference] = compared(run, lambda made: None, frame)
    assert difference.text.startswith(f"predictions: {changed} of {len(frame)} changed")
    assert difference.text.endswith(f"and {wrong} were wrong")
    assert difference.within is not bool(more)


def test_answers_that_are_as_good_and_have_nothing_to_do_with_the_recorded_are_too_many(run: Any) -> None:
    generator = np.random.default_rng(0)
    frame = run[1].copy()
    right = float((frame["prediction"] == frame["label"]).mean())
    others = np.where(generator.random(len(frame)) < right, frame["label"], 1 - frame["label"])
    [difference] = compared(run, lambda made: None, frame.assign(prediction=others))
    assert not difference.within


def test_of_answers_that_were_nearly_all_right_a_twentieth_may_change(run: Any) -> None:
    result, frame = run[0], run[1].assign(prediction=run[1]["label"])
    for share, within in ((0.9, True), (1.1, False)):
        now = frame.copy()
        now.loc[: round(share * 0.05 * len(frame)) - 1, "prediction"] += 1
        [difference] = differences(result, result, frame, now)
        assert difference.within is within


def test_other_examples_and_labels_are_no_rounding(run: Any) -> None:
    other = run[1].assign(id=run[1]["id"] + "x")
    assert [(d.text, d.within) for d in compared(run, lambda made: None, other)] == [
        ("predictions: they are of other examples", False)
    ]
    labels = run[1].assign(label=1 - run[1]["label"])
    [difference] = compared(run, lambda made: None, labels)
    assert difference.text == "predictions: the examples have other labels" and not difference.within


@pytest.mark.parametrize(
    ("spread", "by", "within"), [(1.0, 0.9, True), (1.0, 1.1, False), (0.0, 0.2, True), (0.0, 0.3, False)]
)
def test_numbers_may_be_as_far_from_the_recorded_as_those_from_the_labels(
    spread: float, by: float, within: bool
) -> None:
    """Or a twentieth of the labels' range, where the recorded ones are nearer than that."""
    result, _ = make_run("sst2")
    result.task["kind"] = "regression"
    labels, signs = np.linspace(0, 5, 100), np.tile([-1.0, 1.0], 50)
    before = pd.DataFrame({"id": range(100), "prediction": labels + spread * signs, "label": labels, "score": labels})
    [difference] = differences(result, result, before, before.assign(prediction=before["prediction"] + by))
    assert difference.text.startswith(f"predictions: {by:.2g} from the recorded ones")
    assert difference.within is within


def test_accepted_answers_are_compared_as_lists() -> None:
    result, _ = make_run("sst2")
    frame = pd.DataFrame({"id": ["a", "b"], "prediction": ["x", "y"], "score": [1.0, 0.0]})
    before, now, other = (frame.assign(label=[np.array(["x", "z"]), np.array([last])]) for last in ("y", "y", "w"))
    assert differences(result, result, before, now) == []
    assert [d.within for d in differences(result, result, before, other)] == [False]
    [changed, *_] = differences(result, result, before, now.assign(prediction=["X", "other"]))
    assert changed.text.endswith("2 of 2 changed (100.0%), and 0 were wrong")


def test_a_record_that_agrees_with_itself(run: Any) -> None:
    from bench.config import run_id

    result, frame = run
    result = result.model_copy(update={"run_id": run_id(result.identity)})
    from bench.tasks.metrics import bootstrap

    dev = result.evaluation("dev")
    dev.metrics["accuracy"] = bootstrap("accuracy", frame["prediction"].tolist(), frame["label"].tolist())
    assert list(contradictions(result, frame)) == []
    for change, said in (
        (lambda r: setattr(r, "run_id", "0" * 16), "the identity is that of run"),
        (lambda r: setattr(r.evaluation("dev").metrics["accuracy"], "high", 1.0), "accuracy.high is 1, and 0."),
        (lambda r: setattr(r.evaluation("dev"), "n_examples", 9), "9 dev examples, but 872 predictions"),
        (lambda r: setattr(r.cost, "achieved_remaining", 0.1), "achieved_remaining is 0.1, and 0."),
        (lambda r: setattr(r, "cost", None), "it is done, but lacks"),
    ):
        edited = result.model_copy(deep=True)
        change(edited)
        [problem] = contradictions(edited, frame)
        assert said in problem


def test_every_cause_of_the_surroundings_is_named(run: Any) -> None:
    before = run[0].provenance
    now = before.model_copy(update={"commit": None, "dirty": None, "versions": {"torch": "3.0", "numpy": "9"}})
    causes = {(cause.kind, cause.text) for cause in of_surroundings(before, now)}
    assert ("version", "torch 2.13.0, here 3.0") in causes and ("version", "numpy None, here 9") in causes
    assert {kind for kind, _ in causes} == {"code", "version"}
    assert of_surroundings(before, before) == []
    dirty = before.model_copy(update={"dirty": True})
    for then, here in ((dirty, before), (before, dirty)):
        [cause] = of_surroundings(then, here)
        assert cause.kind == "code" and "committed" in cause.text
