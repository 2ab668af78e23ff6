"""A real clock and a simulated one agree, batch by batch; a server that is late is late for all that come after."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.serving.policies import Policy, QueueLength, Static
from bench.serving.queueing import Queue, Requests
from bench.serving.records import Calibration, Served, ServedModel
from bench.serving.server import serve
from bench.serving.simulation import simulate
from bench.serving.times import ServiceTimes

KS = (1, 2, 4)
EXAMPLES = 10
MAX_BATCH = 4
SLEEPS = {1: (0.035, 0.05), 2: (0.026, 0.035), 4: (0.02, 0.026)}
"""Seconds of a batch, from and to, at each k."""
SCORES = {k: np.arange(EXAMPLES, dtype=np.float32) / (10 * k) for k in KS}
"""A different one for each example and k, so that one in a wrong place shows."""


class Replayed(ServiceTimes):
    """Gives the durations of a list in its order, whatever the batch."""

    def __init__(self, durations: Sequence[float] = ()) -> None:
        models = [ServedModel(k=k, source=str(k), config={}, remaining=1 / k, accuracy=0.5) for k in KS]
        seconds = [[[[sum(SLEEPS[k]) / 2]]] for k in KS]
        super().__init__(
            Calibration(
                engine="sleep",
                models=models,
                resident_bytes=0,
                sizes=[MAX_BATCH],
                lengths=[8],
                seconds=seconds,
                examples=[8] * EXAMPLES,
                scores=[SCORES[k].tolist() for k in KS],
            )
        )
        self.left = iter(durations)

    def draw(self, k: int, size: int, length: int, rng: np.random.Generator) -> float:
        return next(self.left)


def requests(arrived: NDArray[np.float64]) -> Requests:
    example = np.random.default_rng(3).integers(EXAMPLES, size=len(arrived), dtype=np.int32)
    return Requests(arrived, example, np.full(len(arrived), 8))


def queue(asked: Requests, policy: Policy, durations: Sequence[float] = ()) -> Queue:
    return Queue(asked, policy, Replayed(durations), MAX_BATCH, deadline=0.2)


def starts(served: Served) -> NDArray[np.int64]:
    """Return the first request of each batch: those of a batch started at one moment."""
    return np.append(0, np.flatnonzero(np.diff(served.started)) + 1)


@pytest.fixture(scope="module")
def slept() -> Served:
    """Return what came of 150 requests in calm and in haste, by a model that sleeps."""
    rng = np.random.default_rng(0)
    parts = [rng.uniform(start, start + 0.8, n) for start, n in ((0, 20), (0.8, 100), (1.6, 20), (2.4, 10))]
    sleeps = np.random.default_rng(1)

    def run(k: int, examples: Sequence[int]) -> NDArray[np.float32]:
        time.sleep(sleeps.uniform(*SLEEPS[k]))
        return SCORES[k][list(examples)]

    return serve(queue(requests(np.sort(np.concatenate(parts))), QueueLength()), run)


def test_the_load_is_one_that_could_go_wrong(slept: Served) -> None:
    """Every k is chosen, batches of one and full ones are run, and the server both waits and is waited for."""
    first = starts(slept)
    assert set(slept.k.tolist()) == set(KS) and {1, MAX_BATCH} <= set(np.diff(first).tolist())
    idle = slept.arrived[first[1:]] > slept.finished[first[1:] - 1]
    assert idle.any() and not idle.all()


def test_the_simulation_does_what_the_server_did(slept: Served) -> None:
    """Given every delay of this machine, whatever it was, it takes the same batches at the same moments.

    The delays are those from the end of a batch to the start of the next, which count as its service time here, and
    those from an arrival that found the server asleep to its start, which count as not having arrived.
    """
    first, batch = starts(slept), np.searchsorted(starts(slept), np.arange(len(slept.k)), side="right") - 1
    started, finished = slept.started[first], slept.finished[first]
    woken = np.append(True, slept.arrived[first[1:]] > finished[:-1])
    freed = np.where(np.append(woken[1:], True), finished, np.append(started[1:], 0))
    arrived = np.where(woken[batch], started[batch], slept.arrived)
    asked = Requests(arrived, slept.example, np.full(len(arrived), 8))
    again = simulate(queue(asked, QueueLength(), (freed - started).tolist()), SCORES, np.random.default_rng(0))
    np.testing.assert_array_equal(starts(again), first)
    np.testing.assert_array_equal(again.k, slept.k)
    np.testing.assert_array_equal(again.score, slept.score)
    np.testing.assert_allclose(again.started, slept.started, atol=1e-9)
    np.testing.assert_allclose(again.finished, freed[batch], atol=1e-9)


def test_latencies_are_as_simulated(slept: Served) -> None:
    """By the measured durations alone; 15 % are for what a sleep of 20 to 50 ms is late on a busy machine."""
    first = starts(slept)
    free = np.append(0.0, slept.finished[first[1:] - 1])
    assert (slept.started[first] >= np.maximum(slept.arrived[first], free)).all(), "before its time"
    durations = (slept.finished - slept.started)[first]
    assert (durations >= 0.02).all()
    spare = np.resize(durations, 2 * len(durations))  # the simulation may need some more, being never late
    asked = Requests(slept.arrived, slept.example, np.full(len(slept.arrived), 8))
    again = simulate(queue(asked, QueueLength(), spare.tolist()), SCORES, np.random.default_rng(0))
    simulated, real = (np.quantile(served.latency, 0.95) for served in (again, slept))
    assert real == pytest.approx(simulated, rel=0.15)


def test_scores_belong_to_their_requests(slept: Served) -> None:
    wanted = [SCORES[k][example] for k, example in zip(slept.k.tolist(), slept.example.tolist(), strict=True)]
    np.testing.assert_array_equal(slept.score, np.array(wanted, np.float32))


def test_who_comes_during_a_stall_waits_for_its_end() -> None:
    """No coordinated omission: the stall counts for each of them, from its own arrival on."""
    arrived = np.arange(60) * 0.01
    calls: list[int] = []

    def run(k: int, examples: Sequence[int]) -> NDArray[np.float32]:
        calls.append(len(examples))
        if len(calls) == 5:
            time.sleep(0.3)
        return np.ones(len(examples), np.float32)

    told: list[int] = []
    served = serve(queue(requests(arrived), Static()), run, told.append)
    np.testing.assert_array_equal(served.arrived, arrived)
    assert calls == told and sum(calls) == len(arrived)
    stalled = sum(calls[:4])
    began, end = served.started[stalled], served.finished[stalled]
    assert end - began >= 0.3
    during = (served.arrived > began) & (served.arrived < end)
    assert during.sum() >= 29 and (np.diff(served.finished) >= 0).all()
    assert (served.latency[during] >= end - arrived[during]).all()
    assert served.summary(0.15).in_time <= 1 - (0.15 / 0.01 - 2) / len(arrived)


@pytest.mark.parametrize("fails", [False, True])
def test_garbage_is_collected_again_afterwards(fails: bool) -> None:
    within: list[bool] = []

    def run(k: int, examples: Sequence[int]) -> NDArray[np.float32]:
        within.append(gc.isenabled())
        if fails:
            raise RuntimeError("the model is lost")
        return np.ones(len(examples), np.float32)

    assert gc.isenabled()
    new = queue(requests(np.zeros(2)), Static())
    if fails:
        with pytest.raises(RuntimeError, match="lost"):
            serve(new, run)
    else:
        serve(new, run)
    assert within == [False] and gc.isenabled()
