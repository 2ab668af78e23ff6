"""What serving leaves: numbers against sums by hand, and files that come back or say that they are torn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BenchError, DamagedResult
from bench.results import Provenance
from bench.serving.records import Served, ServingCell, ServingStore, ServingStudy, Tally
from tests.bench.serving.calibrated import calibration

EXAMPLES = 6


def served() -> Served:
    """Five requests, of which the third is just in time for a deadline of one second, and the fourth late."""
    return Served(
        example=np.array([3, 0, 3, 3, 5], np.int32),
        arrived=np.array([2.0, 3.0, 4.0, 5.0, 6.0]),
        started=np.array([2.0, 3.0, 4.0, 5.5, 6.0]),
        finished=np.array([2.5, 3.5, 5.0, 7.0, 6.25]),
        k=np.array([1, 1, 2, 4, 4], np.int16),
        score=np.array([1.0, 0.0, 0.5, 1.0, 1.0], np.float32),
    )


def test_a_summary_is_what_the_requests_say() -> None:
    found = served().summary(1.0)
    assert found.model_dump(exclude={"p95_seconds", "p99_seconds"}) == {
        "requests": 5,
        "accuracy": 0.7,
        "in_time": 0.8,
        "right_in_time": 0.5,
        "p50_seconds": 0.5,
        "throughput": 1.0,
        "share_at_k": {1: 0.4, 2: 0.2, 4: 0.4},
    }
    # of 0.25, 0.5, 0.5, 1, 2: at 3.8 and 3.96 from the first, between the last two
    assert (found.p95_seconds, found.p99_seconds) == pytest.approx((1.8, 1.96))


def test_a_tally_counts_by_example() -> None:
    found = served().tally(EXAMPLES, 1.0)
    assert found.requests.tolist() == [1, 0, 0, 3, 0, 1]
    assert found.in_time.tolist() == [1, 0, 0, 2, 0, 1]
    assert found.score.tolist() == [0, 0, 0, 2.5, 0, 1]
    assert found.score_in_time.tolist() == [0, 0, 0, 1.5, 0, 1]


@st.composite
def loads(draw: st.DrawFn) -> Served:
    n = draw(st.integers(1, 40))

    def numbers(low: int, high: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(low, high), min_size=n, max_size=n)))

    arrived = np.cumsum(numbers(0, 5)) / 4
    started = arrived + numbers(0, 8) / 4
    return Served(numbers(0, EXAMPLES - 1).astype(np.int32), arrived, started, started + numbers(1, 9) / 4,
                  2 ** numbers(0, 3).astype(np.int16), numbers(0, 4).astype(np.float32) / 4)  # fmt: skip


@given(loads(), st.integers(1, 16).map(lambda quarters: quarters / 4))
def test_tallies_and_summaries_tell_the_same(load: Served, deadline: float) -> None:
    tally, summary = load.tally(EXAMPLES, deadline), load.summary(deadline)
    late = load.finished > load.arrived + deadline
    for example in range(EXAMPLES):
        mine = [i for i, wanted in enumerate(load.example) if wanted == example]
        assert tally.requests[example] == len(mine)
        assert tally.in_time[example] == sum(not late[i] for i in mine)
        assert tally.score[example] == sum(float(load.score[i]) for i in mine)
        assert tally.score_in_time[example] == sum(float(load.score[i]) for i in mine if not late[i])
    n = summary.requests
    assert n == tally.requests.sum() == len(load.example)
    assert summary.in_time * n == pytest.approx(tally.in_time.sum())
    assert summary.accuracy * n == pytest.approx(tally.score.sum())
    assert summary.right_in_time * n == pytest.approx(tally.score_in_time.sum())
    assert sum(summary.share_at_k.values()) == pytest.approx(1) and set(summary.share_at_k) == set(load.k.tolist())
    assert summary.p50_seconds <= summary.p95_seconds <= summary.p99_seconds <= load.latency.max()


@given(loads(), loads())
def test_tallies_add_up(a: Served, b: Served) -> None:
    both = Served(*(np.concatenate([getattr(a, name), getattr(b, name)]) for name in vars(a)))
    added, whole = a.tally(EXAMPLES, 1.0) + b.tally(EXAMPLES, 1.0), both.tally(EXAMPLES, 1.0)
    assert all((getattr(added, name) == getattr(whole, name)).all() for name in vars(whole))


def study() -> ServingStudy:
    provenance = Provenance(
        commit=None, dirty=None, command=["bench", "serve-sim"], started="2026-01-01T00:00:00Z", host="box",
        platform="Linux", hardware="Example CPU", device="cpu", threads=2, versions={},
    )  # fmt: skip
    return ServingStudy(
        study="serving", task="sst2", backbone="t5-base", seed=0, deadline_seconds=0.1 + 0.2, max_batch=4,
        capacity=100 / 3, provenance=provenance, calibrations=[calibration(lambda k, size, n: [size / k / 7] * 3)],
    )  # fmt: skip


def cell(cell_id: str = "a" * 16, kept: bool = True, seed: int = 0) -> ServingCell:
    return ServingCell(
        cell_id=cell_id, engine="variator", policy="static:k=1", load="poisson:load=0.7", load_seed=seed,
        mode="real" if kept else "simulated", replicas=1, times=1.0, seconds=60.0, offered=5 / 60,
        summary=served().summary(1.0), requests=f"requests/{cell_id}.parquet" if kept else None,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> ServingStore:
    return ServingStore(tmp_path / "serving")


def test_what_is_written_is_read_again(store: ServingStore) -> None:
    assert store.read() is None and store.cell("a" * 16) is None and list(store) == []
    kept, gone = cell("b" * 16), cell("a" * 16, kept=False, seed=1)
    store.write(study())
    for each in (kept, gone):
        store.add(each, served(), served().tally(EXAMPLES, 1.0))
    again = ServingStore(store.folder)
    assert again.read() == study() and list(again) == [gone, kept] and again.cell("b" * 16) == kept
    for each in (kept, gone):
        found, whole = again.tally(each), served().tally(EXAMPLES, 1.0)
        assert all((getattr(found, name) == getattr(whole, name)).all() for name in vars(whole))
    requests = again.requests(kept)
    assert requests.columns.tolist() == ["example", "arrived", "latency", "k", "score"]
    assert requests["example"].tolist() == [3, 0, 3, 3, 5] and requests["k"].tolist() == [1, 1, 2, 4, 4]
    assert requests["latency"].tolist() == [0.5, 0.5, 1.0, 2.0, 0.25]
    assert requests["arrived"].tolist() == [2, 3, 4, 5, 6] and requests["score"].tolist() == [1, 0, 0.5, 1, 1]
    files = {path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file()}
    assert files == {"serving.json", f"requests/{'b' * 16}.parquet"} | {
        f"{kind}/{name * 16}.{suffix}" for kind, suffix in (("cells", "json"), ("tallies", "parquet")) for name in "ab"
    }


def test_a_cell_that_is_there_is_whole(store: ServingStore) -> None:
    """Whatever stops it, what a cell is made of is written before the cell."""
    store.folder.mkdir()
    (store.folder / "tallies").write_text("a file where a folder should be")
    with pytest.raises(BenchError, match="tallies"):
        store.add(cell(), served(), served().tally(EXAMPLES, 1.0))
    assert (store.folder / "requests").is_dir() and store.cell("a" * 16) is None


TEARS: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "other": lambda content: b'{"these": "are", "other": "things"}',
    "binary": lambda content: b"\xff\xfe" + content[::-1],
}


@pytest.mark.parametrize("tear", TEARS)
@pytest.mark.parametrize("kind", ["serving.json", "cells", "tallies", "requests"])
def test_a_torn_file_is_an_error_that_names_it(store: ServingStore, kind: str, tear: str) -> None:
    store.write(study())
    store.add(cell(), served(), served().tally(EXAMPLES, 1.0))
    path = next(path for path in store.folder.rglob("*.*") if kind in (path.name, path.parent.name))
    path.write_bytes(TEARS[tear](path.read_bytes()))
    read = {
        "serving.json": store.read,
        "cells": lambda: list(store),
        "tallies": lambda: store.tally(cell()),
        "requests": lambda: store.requests(cell()),
    }[kind]
    with pytest.raises(DamagedResult, match=rf"{path.parent.name}.{path.name}.*serve again") as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_lost_file_is_an_error_that_names_it(store: ServingStore) -> None:
    store.add(cell(), served(), served().tally(EXAMPLES, 1.0))
    for path in [*store.folder.glob("tallies/*"), *store.folder.glob("requests/*")]:
        path.unlink()
    with pytest.raises(DamagedResult, match=r"tallies/a+\.parquet cannot be read .*Remove cells/a+\.json"):
        store.tally(cell())
    with pytest.raises(DamagedResult, match=r"requests/a+\.parquet cannot be read"):
        store.requests(cell())


def test_a_file_of_a_later_version_is_not_to_be_lost(store: ServingStore) -> None:
    store.write(study())
    path = store.folder / "serving.json"
    path.write_text(path.read_text().replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(BenchError, match=r"(?i)schema_version is 2.*update this library"):
        store.read()


def test_a_tally_is_kept_to_single_precision(store: ServingStore) -> None:
    many = Tally(*(np.array([1e6 + 1, 1 / 3]) for _ in range(4)))
    store.add(cell(), served(), many)
    assert store.tally(cell()).score.tolist() == pytest.approx([1e6 + 1, 1 / 3], rel=2**-23)
