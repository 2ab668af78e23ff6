"""An application for Ray Serve: each replica holds one model with its bank, and a policy chooses k batch by batch.

    serve run bench.serving.ray_serve:app model=DIR plugins=DIR,DIR task=sst2 policy=deadline replicas=2

Ray Serve does all the rest: processes, HTTP, routing, restarts, scaling.
"""

# not `from __future__ import annotations`: Ray Serve looks whether what `app` is annotated with is a class

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse

from bench.errors import BenchError, ConfigError
from bench.plugins.plugin import Plugin
from bench.serving.policies import Static, View, choose
from bench.serving.resident import ResidentModel
from bench.serving.words import read_policy
from bench.tasks.catalogue import resolve_task
from bench.tasks.features import Feature


class Arguments(BaseModel):
    """What `app` takes: behind ``serve run``, or as ``args`` of a config file.

    Attributes
    ----------
    model
        Folder or Hub id of the fine-tuned checkpoint, with its head and its tokenizer.
    plugins
        Folders or Hub ids of plugins that were made for it, at most one a k; as text with commas between.
    task
        What it was fine-tuned on: a name, or a YAML file.
    policy
        What chooses k, as ``bench serve-sim`` takes it.
    replicas
        How many models are held, each in a process of its own.
    max_batch
        Most requests of a batch.
    deadline
        Seconds from arrival to answer that policies aim at; by default twice what the dense model takes for a full
        batch of the longest inputs, as each replica measures when it starts.
    max_waiting
        Requests that a replica holds at once; what comes beyond waits at the proxy, where no policy sees it.
    cpus, gpus
        What each replica is given of a machine; ``cpus`` are its threads too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    plugins: tuple[str, ...] = Field(min_length=1)
    task: str
    policy: str = "deadline"
    replicas: int = Field(default=1, ge=1)
    max_batch: int = Field(default=16, ge=1)
    deadline: float | None = Field(default=None, gt=0)
    max_waiting: int = Field(default=256, ge=1)
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)

    @field_validator("plugins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value


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
    answer: "asyncio.Future[tuple[int, dict[str, Any]]]"


class Replica:
    """One model with its bank, and the requests that wait for it.

    Requests are answered first come, first served, in batches of whatever waits, as in `bench.serving.queueing`.

    Parameters
    ----------
    arguments
        As they were checked by `app`.

    Raises
    ------
    BenchError
        If the model or a plugin cannot be loaded, or they do not fit; Ray Serve shows the reason.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments, self.policy = arguments, read_policy(arguments.policy)
        self.resident = ResidentModel(arguments.model, arguments.plugins, resolve_task(arguments.task))
        if isinstance(self.policy, Static) and self.policy.k not in self.resident.ks:
            raise ConfigError(f"policy static:{self.policy.k}: the model serves k = {_ks(self.resident.ks)}")
        self.times = self.resident.calibrate(arguments.max_batch)
        longest = np.array([self.resident.task.max_length])
        dense = float(self.times(1, np.array([arguments.max_batch]), longest)[0])
        self.deadline = arguments.deadline or 2 * dense
        self.last_k = 1
        self.waiting: deque[Waiting] = deque()
        self.arrival = asyncio.Event()
        # the event loop stays free while the model runs, or what arrives meanwhile would be seen too late
        self.model_thread = ThreadPoolExecutor(max_workers=1)
        self.answering: asyncio.Task[None] | None = None

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer one request: 200 with ``label`` or ``answer``, ``k``, ``seconds`` and ``replica``; 400 with ``error``.

        Parameters
        ----------
        request
            Its body is JSON, as `bench.serving.resident.ResidentModel.read` takes it.
        """
        arrived = time.perf_counter()
        try:
            feature = self.resident.read(await _json(request))
        except BenchError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        waiting = Waiting(feature, arrived, asyncio.get_running_loop().create_future())
        self.waiting.append(waiting)
        self.arrival.set()
        if self.answering is None:
            self.answering = asyncio.create_task(self._answer_batches())
        k, answer = await waiting.answer
        seconds = round(time.perf_counter() - arrived, 6)
        replica = serve.get_replica_context().replica_id.unique_id
        return JSONResponse({**answer, "k": k, "seconds": seconds, "replica": replica})

    async def _answer_batches(self) -> None:
        # not `serve.batch`, which fills its next batches by the clock while one still runs: when the model is free,
        # they are of the few requests that came first, however many wait by then
        while True:
            await self.arrival.wait()
            try:
                k, batch = self._take()
            except Exception as error:  # a policy may be another package's; those who wait are told
                _fail(self.waiting, error)
                self.waiting.clear()
                k, batch = self.last_k, []
            if not self.waiting:
                self.arrival.clear()
            if not batch:
                continue
            features = [waiting.feature for waiting in batch]
            try:
                answers = await asyncio.get_running_loop().run_in_executor(
                    self.model_thread, self.resident.answer, k, features
                )
            except Exception as error:  # whatever a batch dies of, the next one may live
                _fail(batch, error)
                continue
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result((k, answer))

    def _take(self) -> tuple[int, list[Waiting]]:
        """Take the next batch and what it is run at; those who went away before their turn are left out."""
        queue = [waiting for waiting in self.waiting if not waiting.answer.done()]
        self.waiting = deque(queue)
        if not queue:
            return self.last_k, []
        k = choose(
            self.policy,
            View(
                now=time.perf_counter(),
                arrived=np.array([waiting.arrived for waiting in queue]),
                lengths=np.array([len(waiting.feature["input_ids"]) for waiting in queue]),
                ks=self.resident.ks,
                last=self.last_k,
                max_batch=self.arguments.max_batch,
                deadline=self.deadline,
                replicas=1,
                seconds=self.times,
            ),
        )
        self.last_k = k
        return k, [self.waiting.popleft() for _ in range(min(len(queue), self.arguments.max_batch))]


def app(arguments: Arguments) -> Application:
    """Build the application.

    Parameters
    ----------
    arguments
        What is served, and how.

    Raises
    ------
    BenchError
        If the task or the policy is unknown, a plugin cannot be read, or a static policy has a k that no plugin has.
    """
    resolve_task(arguments.task)
    policy = read_policy(arguments.policy)
    # the replicas' current folder is not this one
    given = arguments.model_copy(
        update={
            "model": _absolute(arguments.model),
            "plugins": tuple(map(_absolute, arguments.plugins)),
            "task": _absolute(arguments.task),
        }
    )
    ks = (1, *sorted(Plugin.from_pretrained(plugin).config.k for plugin in given.plugins))
    if isinstance(policy, Static) and policy.k not in ks:
        raise ConfigError(f"policy static:{policy.k}: the model serves k = {_ks(ks)}")
    deployment = serve.deployment(
        name="Variator",
        num_replicas=arguments.replicas,
        max_ongoing_requests=max(arguments.max_waiting, arguments.max_batch),
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        max_constructor_retry_count=2,  # a plugin that does not fit will not fit the twentieth time
    )(Replica)
    return deployment.bind(given)


async def _json(request: Request) -> object:
    try:
        return await request.json()
    except ValueError:
        return None


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _fail(batch: Iterable[Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)


def _ks(ks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ks))
