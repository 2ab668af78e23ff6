"""The queue and what happens when a batch starts: one code for real time and for the simulation. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.serving.policies import Policy, View, choose
from bench.serving.records import Served
from bench.serving.times import ServiceTimes


@dataclass(frozen=True)
class Requests:
    """What arrives.

    Attributes
    ----------
    arrived
        Seconds since the load began, ascending, (requests,).
    example
        Which dev example each asks for, (requests,).
    lengths
        Tokens of each, (requests,).
    """

    arrived: NDArray[np.float64]
    example: NDArray[np.int32]
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Requests ``first`` to ``last`` (exclusive) of the load, run together at ``k``."""

    first: int
    last: int
    k: int


class Queue:
    """First come, first served, in batches of whatever waits up to a largest size.

    A batch starts as soon as a model is free and a request waits: waiting for more would make the first late, and under
    load there are more anyway.

    Parameters
    ----------
    requests
        Every request of the load; one has come once its time has.
    policy, times, max_batch, deadline, replicas
        As in `bench.serving.policies.View`.
    """

    def __init__(
        self,
        requests: Requests,
        policy: Policy,
        times: ServiceTimes,
        max_batch: int,
        deadline: float,
        replicas: int = 1,
    ) -> None:
        self.requests, self.policy, self.times = requests, policy, times
        self.max_batch, self.deadline, self.replicas = max_batch, deadline, replicas
        self.first, self.last_k = 0, 1
        n = len(requests.arrived)
        self._started, self._finished, self._k = np.empty(n), np.empty(n), np.empty(n, np.int16)
        self._score = np.empty(n, np.float32)

    def next_arrival(self) -> float | None:
        """Return when the oldest request that is not taken arrives, or ``None`` after the last."""
        arrived = self.requests.arrived
        return float(arrived[self.first]) if self.first < len(arrived) else None

    def take(self, now: float) -> Batch:
        """Take the next batch; at least one request must wait.

        Raises
        ------
        ConfigError
            If the policy chooses what there is not.
        """
        arrived = self.requests.arrived
        waiting = slice(self.first, int(np.searchsorted(arrived, now, side="right")))
        k = choose(
            self.policy,
            View(
                now=now,
                arrived=arrived[waiting],
                lengths=self.requests.lengths[waiting],
                ks=self.times.ks,
                last=self.last_k,
                max_batch=self.max_batch,
                deadline=self.deadline,
                replicas=self.replicas,
                seconds=self.times,
            ),
        )
        batch = Batch(self.first, min(waiting.stop, self.first + self.max_batch), k)
        self.first, self.last_k = batch.last, k
        return batch

    def answer(self, batch: Batch, started: float, finished: float, scores: NDArray[np.float32]) -> None:
        """Note that a batch was answered."""
        rows = slice(batch.first, batch.last)
        self._started[rows], self._finished[rows], self._k[rows] = started, finished, batch.k
        self._score[rows] = scores

    def served(self) -> Served:
        """Return all requests once they are answered."""
        requests = self.requests
        return Served(requests.example, requests.arrived, self._started, self._finished, self._k, self._score)
