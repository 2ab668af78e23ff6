"""Live requests, with a model that does what a test tells it: order, batches, failures, and who gives up waiting."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError, Diverged
from bench.serving.batcher import FAILURES, Batcher
from bench.serving.policies import Policy, QueueLength, Static, View
from bench.serving.times import ServiceTimes
from tests.bench.serving.calibrated import calibration


@dataclass
class Model:
    """Answers a feature with its number; holds each batch until it may go on."""

    batches: list[tuple[int, list[int]]] = field(default_factory=list)
    errors: list[Exception | None] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __call__(self, k: int, features: Sequence[Any]) -> list[dict[str, Any]]:
        assert self.gate.wait(20)
        numbers = [feature["input_ids"][0] for feature in features]
        self.batches.append((k, numbers))
        if self.errors and (error := self.errors.pop(0)):
            raise error
        return [{"label": number} for number in numbers]


@dataclass(frozen=True)
class Broken(Policy):
    """A policy that finds nothing, where one of its kind would be asked."""

    name = "broken"

    def choose(self, view: View) -> int:
        return next(k for k in view.ks if k > 100)


@dataclass(frozen=True)
class Numpy(Policy):
    """A policy that answers with a number of numpy."""

    name = "numpy"

    def choose(self, view: View) -> int:
        return np.int64(view.ks[-1])  # type: ignore[return-value]


def run(
    story: Callable[[Batcher, Model], Awaitable[None]], policy: Policy | None = None, max_batch: int = 3
) -> Batcher:
    """Tell a story of requests; nothing of it may take long."""

    async def told() -> Batcher:
        model = Model()
        batcher = Batcher(
            model,
            policy or Static(k=2),
            ServiceTimes(calibration(lambda k, size, length: [0.1 / k])),
            max_batch,
            deadline=1.0,
        )
        await asyncio.wait_for(story(batcher, model), 30)
        return batcher

    # in a thread of its own: a browser that an earlier test opened leaves its loop running in this one
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(asyncio.run, told()).result()


def feature(number: int) -> Any:
    return {"input_ids": [number, 0, 0]}


async def begin(batcher: Batcher, numbers: Sequence[int]) -> list[asyncio.Task[Any]]:
    """Ask, and return when all of it waits."""
    tasks = [asyncio.create_task(batcher.ask(feature(number))) for number in numbers]
    await asyncio.sleep(0.05)
    return tasks


def test_whatever_waits_makes_the_next_batch_in_its_order() -> None:
    async def story(batcher: Batcher, model: Model) -> None:
        first = await begin(batcher, [0])  # is running, and held
        rest = await begin(batcher, range(1, 8))
        model.gate.set()
        answers = await asyncio.gather(*first, *rest)
        assert answers == [(2, {"label": number}) for number in range(8)]
        assert model.batches == [(2, [0]), (2, [1, 2, 3]), (2, [4, 5, 6]), (2, [7])]

    run(story)


def test_k_goes_up_while_requests_pile_up_and_down_again() -> None:
    async def story(batcher: Batcher, model: Model) -> None:
        first = await begin(batcher, [0])
        rest = await begin(batcher, range(1, 13))
        model.gate.set()
        await asyncio.gather(*first, *rest)
        assert [k for k, _ in model.batches] == [1, 2, 4, 4, 2]
        assert (await batcher.ask(feature(13)))[0] == 1

    run(story, QueueLength(up=1.5, down=1.0))


def test_who_goes_away_is_not_answered() -> None:
    async def story(batcher: Batcher, model: Model) -> None:
        first = await begin(batcher, [0])
        rest = await begin(batcher, [1, 2, 3, 4])
        rest[1].cancel()
        first[0].cancel()  # which runs already
        await asyncio.sleep(0.05)
        model.gate.set()
        answers = await asyncio.gather(*rest, return_exceptions=True)
        assert [number for _, numbers in model.batches for number in numbers] == [0, 1, 3, 4]
        assert isinstance(answers.pop(1), asyncio.CancelledError)
        assert answers == [(2, {"label": number}) for number in (1, 3, 4)]

    run(story)


@pytest.mark.parametrize(
    "error", [ValueError("torn"), StopIteration(), Diverged("nan")], ids=lambda e: type(e).__name__
)
def test_a_batch_that_fails_tells_its_own_and_no_other(error: Exception) -> None:
    async def story(batcher: Batcher, model: Model) -> None:
        model.errors = [None, error]
        first = await begin(batcher, [0])
        rest = await begin(batcher, [1, 2, 3, 4])
        model.gate.set()
        answers = await asyncio.gather(*first, *rest, return_exceptions=True)
        assert [isinstance(answer, Exception) for answer in answers] == [False, True, True, True, False]
        batcher.check()

    run(story)


def test_a_policy_that_fails_tells_all_who_wait_and_the_next_are_asked_again() -> None:
    async def story(batcher: Batcher, model: Model) -> None:
        model.gate.set()
        for _ in range(2):
            answers = await asyncio.gather(*(await begin(batcher, [0, 1])), return_exceptions=True)
            assert all(isinstance(answer, RuntimeError) for answer in answers)
        batcher.policy = Static(k=4)
        assert await batcher.ask(feature(5)) == (4, {"label": 5})

    run(story, Broken())


def test_a_number_of_numpy_is_a_k() -> None:
    async def story(batcher: Batcher, model: Model) -> None:
        model.gate.set()
        k, _ = await batcher.ask(feature(0))
        assert type(k) is int

    run(story, Numpy())


def test_a_model_that_only_fails_is_broken_until_it_answers() -> None:
    async def story(batcher: Batcher, model: Model) -> None:
        model.gate.set()
        for failures in range(1, FAILURES + 1):
            model.errors = [ValueError("torn")]
            with pytest.raises(ValueError, match="torn"):
                await batcher.ask(feature(0))
            if failures < FAILURES:
                batcher.check()
        with pytest.raises(BenchError, match=f"{FAILURES} batches failed"):
            batcher.check()
        await batcher.ask(feature(0))
        batcher.check()

    run(story)


def test_answers_that_a_request_makes_diverge_are_not_the_model() -> None:
    async def story(batcher: Batcher, model: Model) -> None:
        model.gate.set()
        for _ in range(2 * FAILURES):
            model.errors = [Diverged("nan")]
            with pytest.raises(Diverged):
                await batcher.ask(feature(0))
        batcher.check()

    run(story)


def test_the_loop_is_free_while_the_model_runs() -> None:
    async def story(batcher: Batcher, model: Model) -> None:
        [held] = await begin(batcher, [0])
        began = time.perf_counter()
        await asyncio.sleep(0.01)
        assert time.perf_counter() - began < 5 and not held.done()
        model.gate.set()
        await held

    run(story)
