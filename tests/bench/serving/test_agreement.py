"""A real run simulated again: its batches are found, and what the machine was slower by is all that was in the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.errors import DamagedResult
from bench.serving import words
from bench.serving.agreement import batches, simulate_again
from bench.serving.policies import policies
from bench.serving.queueing import Batch, Queue, Requests
from bench.serving.records import Served, ServingCell, ServingStore, ServingStudy
from bench.serving.simulation import simulate
from bench.serving.times import ServiceTimes
from tests.analysis.synthetic import make_run
from tests.bench.serving.calibrated import calibration

DEADLINE, MAX_BATCH, EXAMPLES = 0.2, 4, 30
LENGTHS = tuple(4 + i % 9 for i in range(EXAMPLES))
CALIBRATION = calibration(
    lambda k, size, length: [(0.004 + 0.0005 * size * length) / k**0.5] * 3, lengths=(4, 12), examples=LENGTHS,
    scores=[[float(i % (k + 1) > 0) for i in range(EXAMPLES)] for k in (1, 2, 4)],
)  # fmt: skip


class Noted(Queue):
    """A queue that notes its batches."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.batches: list[tuple[Batch, float]] = []

    def answer(self, batch: Batch, started: float, finished: float, scores: NDArray[np.float32]) -> None:
        self.batches.append((batch, finished - started))
        super().answer(batch, started, finished, scores)


def served_really(root: Path, policy: str, pace: float) -> tuple[ServingStore, ServingStudy, ServingCell, Noted]:
    """Store what a machine that is ``pace`` times slower than its calibration would serve."""
    rng = np.random.default_rng(5)
    arrived = 40 + np.cumsum(rng.exponential(1 / 90, 1500))
    example = rng.integers(EXAMPLES, size=1500, dtype=np.int32)
    requests = Requests(arrived, example, np.array(LENGTHS)[example])
    chosen = words.read(policy, "policy", policies())
    queue = Noted(requests, chosen, ServiceTimes(CALIBRATION), MAX_BATCH, DEADLINE)
    scores = {m.k: np.array(row, np.float32) for m, row in zip(CALIBRATION.models, CALIBRATION.scores, strict=True)}
    served: Served = simulate(queue, scores, np.random.default_rng(0), pace)
    study = ServingStudy(
        study="serving", task="sst2", backbone="t5-base", seed=0, deadline_seconds=DEADLINE, max_batch=MAX_BATCH,
        capacity=90.0, provenance=make_run()[0].provenance, calibrations=[CALIBRATION],
    )  # fmt: skip
    cell = ServingCell(
        cell_id="0" * 16, engine="variator", policy=policy, load="poisson:load=1", load_seed=0, mode="real",
        replicas=1, times=1.0, seconds=20.0, offered=90.0, summary=served.summary(DEADLINE),
        requests="requests/0.parquet",
    )  # fmt: skip
    store = ServingStore(root / "serving")
    store.write(study)
    store.add(cell, served, served.tally(EXAMPLES, DEADLINE))
    return store, study, cell, queue


@pytest.mark.parametrize("policy", ["static:k=1", "static:k=4", "queue:up=1,down=0.25", "deadline:margin=0.5"])
@pytest.mark.parametrize("pace", [0.7, 1.0, 1.6])
def test_a_machine_that_was_slower_throughout_is_simulated_as_it_was(tmp_path: Path, policy: str, pace: float) -> None:
    store, study, cell, queue = served_really(tmp_path, policy, pace)
    found = list(batches(store.requests(cell)))
    assert [batch for batch, _ in found] == [batch for batch, _ in queue.batches]
    assert [seconds for _, seconds in found] == pytest.approx([seconds for _, seconds in queue.batches], abs=3e-5)
    again = simulate_again(store, study, cell)
    assert again is not None and again[0] == pytest.approx(pace, rel=1e-4)
    ours, theirs = again[1].summary(DEADLINE), cell.summary
    assert ours.p95_seconds == pytest.approx(theirs.p95_seconds, rel=0.01)
    assert ours.accuracy == pytest.approx(theirs.accuracy, abs=0.005)
    assert ours.share_at_k == pytest.approx(theirs.share_at_k, abs=0.01)


def test_a_policy_that_is_not_installed_is_left_out(tmp_path: Path) -> None:
    store, study, cell, _ = served_really(tmp_path, "static:k=1", 1.0)
    assert simulate_again(store, study, cell.model_copy(update={"policy": "patience:share=0.5"})) is None


def test_requests_that_are_torn_are_named(tmp_path: Path) -> None:
    store, study, cell, _ = served_really(tmp_path, "static:k=1", 1.0)
    path = store.folder / "requests" / "0.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedResult, match=path.name):
        simulate_again(store, study, cell)
