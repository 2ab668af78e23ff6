"""Results: whole or not at all, read again as they were written, and clear about a file that is not one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.errors import BenchError
from bench.results import (
    Cost,
    CostPair,
    Evaluation,
    Flops,
    Interval,
    Latency,
    Memory,
    Provenance,
    ResultStore,
    RunResult,
    TrainingStage,
    parse,
    write_atomic,
)
from tests.workers import finish, on_a_full_disk, start, write_results

NUMBERS = [0.1, 1 / 3, 1e-300, 5e-324, 1.7976931348623157e308, -0.0, 2**53 + 1.0, math.inf, -math.inf]


def provenance() -> Provenance:
    return Provenance(
        commit="abc",
        dirty=False,
        command=["bench", "run"],
        started="2026-01-01T00:00:00+00:00",
        seconds=1 / 3,
        host="h",
        platform="p",
        hardware="c",
        device="cpu",
        threads=2,
        versions={"torch": "2"},
        seeds={"run": 0},
    )


def whole(run_id: str = "r1", **changes: Any) -> RunResult:
    flops = CostPair(
        dense=Flops(encoder=10**15 + 1, head=4), compressed=Flops(encoder=3, decoder=2, head=4, overhead=1)
    )
    values: dict[str, Any] = {
        "run_id": run_id,
        "study": "study",
        "status": "done",
        "config": {"ratio": 4.0, "options": {"lr": 1e-3}},
        "identity": {"schema": 1, "max_length": None},
        "evaluations": [
            Evaluation(split=split, n_examples=9, metrics={"accuracy": Interval(value=1 / 3, low=0.1, high=0.7)})
            for split in ("selection", "dev")
        ],
        "cost": Cost(
            real=flops,
            padded=flops,
            batch_size=32,
            requested_remaining=0.7,
            achieved_remaining=1 / 3,
            parameters_teacher=5,
            parameters_total=6,
            parameters_added=1,
            parameters_trained=1,
            bytes_added=4,
            bytes_teacher=20,
        ),
        "latency": [Latency(batch_size=1, sequence_length=8, dense_seconds=NUMBERS[:4], compressed_seconds=[0.1])],
        "memory": [Memory(batch_size=1, sequence_length=8, dense_bytes=2, compressed_bytes=1)],
        "training": [
            TrainingStage(
                name="adapt",
                artifact="a",
                cached=False,
                steps=1,
                examples=2,
                flops=3,
                seconds=0.1,
                history=[{"step": 1.0, "loss": number} for number in NUMBERS],
            )
        ],
        "predictions": "predictions/r1.parquet",
        "provenance": provenance(),
    }
    return RunResult(**values | changes)


def test_round_trip_to_the_last_bit(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, "study")
    result = whole()
    assert store.write(result) == tmp_path / "study" / "runs" / "r1.json" == store.path("r1")
    again = store.read("r1")
    assert again == result
    assert again is not None and [r["loss"] for r in again.training[0].history] == NUMBERS
    assert math.copysign(1, again.training[0].history[NUMBERS.index(-0.0)]["loss"]) == -1


@given(st.floats(allow_nan=False))
def test_any_float_comes_back(number: float) -> None:
    result = whole(training=[], knob={"number": number}, config={"ratio": number})
    again = parse(result.model_dump_json().encode(), Path("x.json"))
    assert again.config["ratio"] == number == again.knob["number"]


def test_a_metric_that_is_not_a_number_comes_back(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, "study")
    nan = Evaluation(split="dev", n_examples=1, metrics={"pearson": Interval(value=math.nan, low=0, high=math.inf)})
    store.write(whole(evaluations=[nan]))
    again = store.read("r1")
    assert again is not None
    interval = again.evaluations[0].metrics["pearson"]
    assert math.isnan(interval.value) and (interval.low, interval.high) == (0, math.inf)


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, "study")
    assert store.read("r1") is None and list(store) == []


def test_a_study_is_its_runs_in_order(tmp_path: Path) -> None:
    store, other = ResultStore(tmp_path, "study"), ResultStore(tmp_path, "other")
    for name in ("c", "a", "b"):
        store.write(whole(name))
    other.write(whole("d", study="other"))
    (tmp_path / "study" / "runs" / ".a.json.123.tmp").write_text("half")
    assert [result.run_id for result in store] == ["a", "b", "c"]
    assert store.predictions_path("a") == tmp_path / "study" / "predictions" / "a.parquet"
    assert store.lock_path("a").parent.name == ".locks"


def test_shares_are_of_the_parts_that_they_name() -> None:
    cost = whole().cost
    assert cost is not None
    assert cost.real.dense.total == 10**15 + 5 and cost.real.compressed.total == 9
    assert cost.real.remaining_encoder == 3 / (10**15 + 1)
    assert cost.real.remaining_total == 9 / (10**15 + 5)


def test_an_evaluation_is_found_by_its_split() -> None:
    result = whole()
    dev = result.evaluation("dev")
    assert dev is result.evaluations[1]
    assert whole(evaluations=[]).evaluation("dev") is None


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="acuracy"):
        whole(acuracy=0.9)
    with pytest.raises(ValidationError):
        whole(status="finished")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "line 5|delimiter|Unterminated|Expecting"),
        (lambda text: b"", "Expecting value"),
        (lambda text: b'{"a": "\xff"}', "can't decode byte 0xff"),
        (lambda text: b"[1]", "valid dictionary"),
        (lambda text: text.replace(b'"study"', b'"studdy"', 1), "study: field required"),
        (lambda text: text.replace(b'"status"', b'"extra": 1, "status"', 1), "extra: extra inputs"),
        (lambda text: text.replace(b'"encoder": 3', b'"encoder": "much"', 1), r"cost\.real\.compressed\.encoder"),
        (lambda text: text.replace(b'"schema_version": 1', b'"schema_version": 2'), "schema_version is 2.*reads 1"),
    ],
)
def test_a_file_that_is_no_result_is_named_with_what_is_wrong(tmp_path: Path, change: Any, said: str) -> None:
    store = ResultStore(tmp_path, "study")
    path = store.write(whole())
    changed = change(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    for read in (lambda: store.read("r1"), lambda: list(store)):
        with pytest.raises(BenchError, match=rf"runs/r1\.json is not a valid result .*({said}).* run the cell again"):
            read()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"old")

    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_is_said_and_the_old_result_stays(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results", "study")
    store.write(whole(reason="old"))
    assert finish(start(on_a_full_disk, tmp_path / "results", whole(reason="new"), tmp_path / "said")) == [0]
    write, artifact = json.loads((tmp_path / "said").read_text())
    assert write.startswith(f"MachineError: cannot write {store.path('r1')}: ") and "Free space" in write
    assert artifact.startswith("MachineError: cannot write the artifact cache")
    stored = store.read("r1")
    assert stored is not None and stored.reason == "old"
    assert [path.name for path in store.path("r1").parent.iterdir()] == ["r1.json"]


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "study").touch()
    with pytest.raises(BenchError, match=r"cannot write .*r1\.json: .*choose another folder"):
        ResultStore(tmp_path, "study").write(whole())


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"1")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_a_reader_among_writers_never_sees_a_part(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, "study")
    store.write(whole())
    writers = [start(write_results, tmp_path, whole(), 60) for _ in range(3)]
    reads = 0
    while any(writer.is_alive() for writer in writers):
        result = store.read("r1")
        assert result is not None and len(set((result.reason or "").split())) <= 1
        reads += 1
    assert finish(*writers) == [0, 0, 0] and reads > 10
    assert [path.name for path in store.path("r1").parent.iterdir()] == ["r1.json"]
