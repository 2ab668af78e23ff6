"""Live requests in batches: whatever waits when the model is free, at the k that a policy chooses for it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.errors import BenchError, Diverged
from bench.serving.policies import Policy, View, choose
from bench.serving.times import ServiceTimes
from bench.tasks.features import Feature

Answer = dict[str, Any]
FAILURES = 3
"""Batches that may fail one after another before the model counts as broken."""


@dataclass(frozen=True)
class Waiting:
    """A request that is not answered yet.

    Attributes
    ----------
    feature
        What it asks, encoded.
    arrived
        When it came, by ``time.perf_counter``.
    answer
        Gets k and the answer.
    """

    feature: Feature
    arrived: float
    answer: asyncio.Future[tuple[int, Answer]]


class Batcher:
    """The requests that wait for one model, first come, first served, as in `bench.serving.queueing`.

    Parameters
    ----------
    answer
        Answers a batch at k; runs in a thread of its own, or what arrives meanwhile would be seen too late.
    policy, times, max_batch, deadline
        What chooses k, what it may know of the model, and the most requests of a batch; seconds.
    threads
        Threads that torch may use for a batch.
    """

    def __init__(
        self,
        answer: Callable[[int, Sequence[Feature]], list[Answer]],
        policy: Policy,
        times: ServiceTimes,
        max_batch: int,
        deadline: float,
        threads: int = 1,
    ) -> None:
        self.answer, self.policy, self.times = answer, policy, times
        self.max_batch, self.deadline = max_batch, deadline
        self.last_k, self.failures = 1, 0
        self.waiting: deque[Waiting] = deque()
        self.arrival = asyncio.Event()
        self.model_thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.answering: asyncio.Task[None] | None = None

    async def ask(self, feature: Feature) -> tuple[int, Answer]:
        """Return what a request is answered, and at which k.

        Raises
        ------
        Exception
            What the policy or the batch died of.
        """
        waiting = Waiting(feature, time.perf_counter(), asyncio.get_running_loop().create_future())
        self.waiting.append(waiting)
        self.arrival.set()
        if self.answering is None or self.answering.done():
            self.answering = asyncio.create_task(self._answer_batches())
        return await waiting.answer

    def check(self) -> None:
        """Raise ``BenchError`` where the model is broken, such as a GPU that gives nothing but errors."""
        if self.failures >= FAILURES:
            raise BenchError(f"{self.failures} batches failed one after another")

    async def _answer_batches(self) -> None:
        while True:
            await self.arrival.wait()
            batch: list[Waiting] = []
            try:
                k, batch = self._take()
                if batch:
                    features = [waiting.feature for waiting in batch]
                    answers = await asyncio.get_running_loop().run_in_executor(
                        self.model_thread, _without_stop, self.answer, k, features
                    )
                    for waiting, answer in zip(batch, answers, strict=True):
                        if not waiting.answer.done():
                            waiting.answer.set_result((k, answer))
                    self.failures = 0
            except Exception as error:  # whatever a batch dies of, or a policy of another package: the next may live
                self.failures += not isinstance(error, Diverged)  # which a request can bring about
                _fail(batch or self.waiting, error)
            if not batch:
                self.waiting.clear()
            if not self.waiting:
                self.arrival.clear()

    def _take(self) -> tuple[int, list[Waiting]]:
        """Take the next batch and what it is run at; those who went away before their turn are left out."""
        queue = [waiting for waiting in self.waiting if not waiting.answer.done()]
        self.waiting = deque(queue)
        if not queue:
            return self.last_k, []
        view = View(
            now=time.perf_counter(),
            arrived=np.array([waiting.arrived for waiting in queue]),
            lengths=np.array([len(waiting.feature["input_ids"]) for waiting in queue]),
            ks=self.times.ks,
            last=self.last_k,
            max_batch=self.max_batch,
            deadline=self.deadline,
            replicas=1,
            seconds=self.times,
        )
        self.last_k = _without_stop(choose, self.policy, view)
        return self.last_k, [self.waiting.popleft() for _ in range(min(len(queue), self.max_batch))]


def _without_stop(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call, with another error in place of ``StopIteration``, which no future can carry."""
    try:
        return call(*arguments)
    except StopIteration as error:
        raise RuntimeError("StopIteration, as of `next` on something empty") from error


def _fail(batch: Iterable[Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
