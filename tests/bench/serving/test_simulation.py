"""The simulation against queueing theory, cases by hand, and laws that hold for every queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import factorial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bench.errors import ConfigError
from bench.serving.loads import Poisson
from bench.serving.policies import Deadline, Policy, QueueLength, Static, View
from bench.serving.queueing import Batch, Queue, Requests
from bench.serving.records import Served
from bench.serving.simulation import simulate
from bench.serving.times import ServiceTimes
from tests.bench.serving.calibrated import calibration

REPLICATIONS = 16
SIGMAS = 5.0


class Waits(NamedTuple):
    """Waiting times of single runs: their mean, and the share that waited at all, with standard errors."""

    mean: float
    mean_error: float
    delayed: float
    delayed_error: float


def waits(samples: Sequence[float], rate: float, seconds: float, replicas: int = 1) -> Waits:
    """Serve Poisson arrivals one at a time; the first fifth of each run, which starts empty, is left out."""
    times = ServiceTimes(calibration(lambda k, size, n: samples, ks=(1,), sizes=(1,)))
    found = []
    for seed in range(REPLICATIONS):
        arrived = Poisson(1.0).arrivals(rate, seconds, np.random.default_rng([seed, 0]))
        requests = Requests(arrived, np.zeros(len(arrived), np.int32), np.full(len(arrived), 8))
        queue = Queue(requests, Static(), times, max_batch=1, deadline=1.0, replicas=replicas)
        served = simulate(queue, {1: np.ones(1, np.float32)}, np.random.default_rng([seed, 1]))
        wait = (served.started - served.arrived)[arrived > seconds / 5]
        found.append((wait.mean(), (wait > 1e-9).mean()))
    (mean, delayed), errors = np.mean(found, axis=0), np.std(found, axis=0, ddof=1) / np.sqrt(REPLICATIONS)
    return Waits(mean, errors[0], delayed, errors[1])


def exponential(n: int) -> NDArray[np.float64]:
    """Return as many values of a mean of 1, each the middle of an equal share of the exponential law."""
    values = -np.log1p(-(np.arange(n) + 0.5) / n)
    return values / values.mean()


def holds(found: Waits, mean: float, delayed: float) -> None:
    # the run is long enough to tell a formula from its neighbours
    assert found.mean_error < 0.08 * mean and found.delayed_error < 0.04 * delayed
    assert abs(found.mean - mean) < SIGMAS * found.mean_error
    assert abs(found.delayed - delayed) < SIGMAS * found.delayed_error


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_constant_service_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """M/D/1 with service time s: mean wait = load s / (2 (1 - load))."""
    holds(waits([0.5], load / 0.5, 600.0), load * 0.5 / (2 * (1 - load)), load)


def test_exponential_service_waits_twice_as_long() -> None:
    """M/M/1 with rates a, m: mean wait = load / (m - a)."""
    holds(waits(exponential(3000), 0.6, 2000.0), 0.6 / 0.4, 0.6)


def test_replicas_share_a_queue_as_erlang_says() -> None:
    """M/M/c: the share that waits is Erlang's C, the mean wait C / (c m - a)."""
    replicas, offered = 3, 1.8
    full = offered**replicas / factorial(replicas) / (1 - offered / replicas)
    c = full / (sum(offered**n / factorial(n) for n in range(replicas)) + full)
    holds(waits(exponential(3000), offered, 900.0, replicas), c / (replicas - offered), c)


def serve(
    arrived: Sequence[float], policy: Policy, times: ServiceTimes, max_batch: int = 4, replicas: int = 1,
    lengths: Sequence[int] | None = None, example: Sequence[int] | None = None,
    scores: dict[int, NDArray[np.float32]] | None = None, seed: int = 0,
) -> tuple[Served, Seen]:  # fmt: skip
    n = len(arrived)
    requests = Requests(
        np.array(arrived, float),
        np.array([0] * n if example is None else example, np.int32),
        np.array([8] * n if lengths is None else lengths),
    )
    queue = Seen(requests, policy, times, max_batch, 1.0, replicas)
    scores = scores or {k: np.ones(10, np.float32) for k in times.ks}
    return simulate(queue, scores, np.random.default_rng(seed)), queue


class Seen(Queue):
    """A queue that notes its batches."""

    def answer(self, batch: Batch, started: float, finished: float, scores: NDArray[np.float32]) -> None:
        self.batches = [*getattr(self, "batches", []), (started, finished, batch)]
        super().answer(batch, started, finished, scores)


@dataclass(frozen=True)
class Script(Policy):
    """Chooses as it was told, and notes what it saw."""

    name = "script"
    ks: list[int]
    views: list[View] = field(default_factory=list)

    def choose(self, view: View) -> int:
        self.views.append(view)
        return self.ks[len(self.views) - 1]


ARRIVED = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 2.75, 2.875, 8.0]
BATCHES = ServiceTimes(calibration(lambda k, size, n: [{1: 1.0, 2: 1.5, 4: 2.0}[size] / k]))


def test_a_batch_is_whatever_waits_up_to_the_largest() -> None:
    """A batch takes 1, 1.5, 1.75 or 2 s; what arrives at the very moment at which one starts is in it."""
    served, _ = serve(ARRIVED, Static(), BATCHES)
    assert served.started.tolist() == [0, 1, 1, 1, 1, 3, 3, 3, 3, 5, 8]
    assert served.finished.tolist() == [1, 3, 3, 3, 3, 5, 5, 5, 5, 6, 9]
    assert served.k.tolist() == [1] * 11 and served.arrived.tolist() == ARRIVED


def test_the_next_batch_goes_to_whichever_replica_is_free() -> None:
    served, _ = serve(ARRIVED, Static(), BATCHES, replicas=2)
    assert served.started.tolist() == [0, 0.25, 1, 1, 1, 1.5, 2.5, 2.5, 2.75, 3.75, 8]
    assert served.finished.tolist() == [1, 1.25, 2.75, 2.75, 2.75, 2.5, 4, 4, 3.75, 4.75, 9]


def test_a_policy_sees_what_waits_and_what_it_chose() -> None:
    policy, n = Script([2, 4, 1, 2]), 6
    scores = {k: np.array([k, k + 0.5], np.float32) for k in (1, 2, 4)}
    served, queue = serve(ARRIVED[:n], policy, BATCHES, lengths=[3, 8, 5, 8, 7, 6], example=[0, 1, 1, 0, 0, 1],
                          scores=scores)  # fmt: skip
    # one request at k = 2 in 0.5 s; two at k = 4 in 0.375; one at k = 1 in 1; two at k = 2 in 0.75
    assert [(start, end, b.first, b.last, b.k) for start, end, b in queue.batches] == [
        (0.0, 0.5, 0, 1, 2), (0.5, 0.875, 1, 3, 4), (0.875, 1.875, 3, 4, 1), (1.875, 2.625, 4, 6, 2)
    ]  # fmt: skip
    assert [v.now for v in policy.views] == [0.0, 0.5, 0.875, 1.875]
    assert [v.last for v in policy.views] == [1, 2, 4, 1]
    assert [v.arrived.tolist() for v in policy.views] == [[0.0], [0.25, 0.5], [0.75], [1.0, 1.5]]
    assert [v.lengths.tolist() for v in policy.views] == [[3], [8, 5], [8], [7, 6]]
    assert {(v.ks, v.max_batch, v.deadline, v.replicas) for v in policy.views} == {((1, 2, 4), 4, 1.0, 1)}
    # each answer has the score of its example at the k of its batch
    assert served.k.tolist() == [2, 4, 4, 1, 2, 2] and served.score.tolist() == [2, 4.5, 4.5, 1, 2, 2.5]


def test_an_answer_is_that_of_its_own_batch_while_another_runs() -> None:
    scores = {1: np.array([0.25], np.float32), 4: np.array([0.75], np.float32)}
    served, _ = serve([0.0, 0.5, 2.0], Script([1, 4, 4]), BATCHES, replicas=2, scores=scores)
    assert served.finished.tolist() == [1.0, 0.75, 2.25] and served.score.tolist() == [0.25, 0.75, 0.75]


def test_a_batch_waits_for_its_longest_request() -> None:
    times = ServiceTimes(calibration(lambda k, size, n: [n / 8], lengths=(8, 16), examples=(8, 16)))
    served, _ = serve([0, 0, 0, 5, 5], Static(), times, max_batch=3, lengths=[8, 16, 8, 8, 8])
    assert served.finished.tolist() == [2, 2, 2, 6, 6]


def test_a_policy_that_chooses_what_there_is_not_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"policy script chose k = 3; it can choose 1, 2, 4"):
        serve([0.0], Script([3]), BATCHES)


def test_the_same_chance_serves_the_same() -> None:
    times = ServiceTimes(calibration(lambda k, size, n: [size, 1.5 * size, 0.5 * size]))
    first, again, other = (serve(ARRIVED, QueueLength(), times, seed=seed)[0] for seed in (1, 1, 2))
    assert (first.finished == again.finished).all() and (first.finished != other.finished).any()


def test_nobody_is_served_before_coming() -> None:
    """The clock adds differences up, and 0.26 + (2.47 - 0.26) is a little less than 2.47."""
    times = ServiceTimes(calibration(lambda k, size, n: [0.26], ks=(1,)))
    assert serve([0.0, 2.47], Static(), times)[0].started.tolist() == [0.0, 2.47]


@st.composite
def situations(draw: st.DrawFn) -> tuple[Served, Seen, ServiceTimes, bool]:
    """Any load, with requests at one moment too; all times are binary fractions, so that sums are exact."""
    cells = {(k, s): draw(st.integers(1, 64)) / 16 for k in (1, 2, 4) for s in (1, 3, 5)}
    constant = draw(st.booleans())
    times = ServiceTimes(
        calibration(lambda k, s, n: [cells[k, s] * f for f in ((1,) if constant else (1, 0.5, 2))], sizes=(1, 3, 5))
    )
    arrived = np.cumsum(draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 40]), min_size=1, max_size=30))) / 16
    policy = draw(st.sampled_from([Static(2), QueueLength(), Deadline()]))
    served, queue = serve(arrived.tolist(), policy, times, draw(st.integers(1, 5)), draw(st.integers(1, 4)),
                          seed=draw(st.integers(0, 9)))  # fmt: skip
    return served, queue, times, constant


@given(situations())
@settings(max_examples=100)
def test_laws_of_every_queue(situation: tuple[Served, Seen, ServiceTimes, bool]) -> None:
    served, queue, times, constant = situation
    batches, n = queue.batches, len(served.arrived)
    # every request is answered once, in a batch that is not too large, and by its time
    rows = [row for _, _, b in batches for row in range(b.first, b.last)]
    assert sorted(rows) == list(range(n)) and max(b.last - b.first for _, _, b in batches) <= queue.max_batch
    for start, end, b in batches:
        mine = slice(b.first, b.last)
        assert (served.started[mine] == start).all() and (served.finished[mine] == end).all() and end > start
        assert (served.k[mine] == b.k).all()
    # first come, first started, and nobody before coming
    assert (np.diff(served.started) >= 0).all() and (served.started >= served.arrived).all()

    def busy(moment: float) -> int:
        return sum(start <= moment < end for start, end, _ in batches)

    moments = sorted({float(t) for t in (*served.arrived, *served.started, *served.finished)})
    # no replica serves two batches at once
    assert max(map(busy, moments)) <= queue.replicas
    # nobody waits while a replica is idle, or while a batch that has room starts
    for arrival, started in zip(served.arrived, served.started, strict=True):
        assert all(busy(moment) == queue.replicas for moment in moments if arrival <= moment < started)
    for start, _, b in batches:
        came = int((served.arrived <= start).sum())
        assert b.last == min(came, b.first + queue.max_batch)
    # nothing is quicker than all replicas with the best batches at every moment
    if constant:
        sizes = np.arange(1, queue.max_batch + 1)
        best = max(float((sizes / times(k, sizes, np.full(len(sizes), 8))).max()) for k in times.ks)
        assert served.summary(1.0).throughput <= queue.replicas * best * (1 + 1e-12)
