"""An application for Ray Serve: each replica holds one model with its bank, and a policy chooses k batch by batch.

    serve run bench.serving.ray_serve:app model=DIR plugins=DIR,DIR task=sst2 policy=deadline replicas=2

Ray Serve does all the rest: processes, HTTP, routing, restarts, scaling.
"""

# not `from __future__ import annotations`: Ray Serve looks whether what `app` is annotated with is a class

import logging
import time
from collections import Counter
from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import JSONResponse

from bench.errors import BenchError, ConfigError
from bench.plugins.plugin import Plugin
from bench.serving.batcher import Batcher
from bench.serving.policies import Deadline, Static
from bench.serving.resident import ResidentModel
from bench.serving.words import read_policy
from bench.tasks.catalogue import resolve_task
from bench.tasks.spec import TaskSpec

LOG = logging.getLogger("ray.serve")


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
    max_length
        Longest input in tokens, beyond which it is cut; by default the task's.
    deadline
        Seconds from arrival to answer that policies aim at; by default twice what the dense model takes for a full
        batch of the longest inputs, as each replica measures when it starts.
    max_waiting
        Requests that a replica holds at once; what comes beyond waits at the proxy, where no policy sees it.
    cpus, gpus
        What each replica is given of a machine. ``cpus`` are its threads too; without ``gpus`` it runs on the CPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    plugins: tuple[str, ...] = Field(min_length=1)
    task: str
    policy: str = "deadline"
    replicas: int = Field(default=1, ge=1)
    max_batch: int = Field(default=16, ge=1)
    max_length: int | None = Field(default=None, ge=4)
    deadline: float | None = Field(default=None, gt=0)
    max_waiting: int = Field(default=256, ge=1)
    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)

    @field_validator("plugins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _holds_a_batch(self) -> Self:
        if self.max_waiting < self.max_batch:
            raise ValueError(f"max_waiting {self.max_waiting} is less than max_batch {self.max_batch}")
        return self


class Replica:
    """One model with its bank, and the requests that wait for it.

    Parameters
    ----------
    arguments, task
        As they were checked by `app`.

    Raises
    ------
    BenchError
        If the model or a plugin cannot be loaded, or they do not fit; Ray Serve shows the reason.
    """

    def __init__(self, arguments: Arguments, task: TaskSpec) -> None:
        threads = max(1, int(arguments.cpus))
        torch.set_num_threads(threads)
        device = "cuda" if arguments.gpus else "cpu"
        self.resident = ResidentModel(arguments.model, arguments.plugins, task, device)
        times = self.resident.calibrate(arguments.max_batch)
        dense = float(times(1, np.array([arguments.max_batch]), np.array([task.max_length]))[0])
        # not `serve.batch`, which fills its next batches by the clock while one still runs: when the model is free,
        # they are of the few requests that came first, however many wait by then
        self.batcher = Batcher(
            self.resident.answer,
            read_policy(arguments.policy),
            times,
            arguments.max_batch,
            arguments.deadline or 2 * dense,
            threads,
        )

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer one request: 200 with ``label`` or ``answer``, ``k``, ``seconds`` and ``replica``, else ``error``.

        Parameters
        ----------
        request
            Its body is JSON, as `bench.serving.resident.ResidentModel.read` takes it; 400 where it is not.
        """
        body = await request.body()
        began = time.perf_counter()
        try:
            feature = self.resident.read_json(body)
        except BenchError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        try:
            k, answer = await self.batcher.ask(feature)
        except Exception as error:
            LOG.exception("a batch failed")
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=500)
        seconds = round(time.perf_counter() - began, 6)
        replica = serve.get_replica_context().replica_id.unique_id
        return JSONResponse({**answer, "k": k, "seconds": seconds, "replica": replica})

    def check_health(self) -> None:
        """Raise where Ray Serve should start another in place of this one."""
        self.batcher.check()


def app(arguments: Arguments) -> Application:
    """Build the application.

    Parameters
    ----------
    arguments
        What is served, and how.

    Raises
    ------
    BenchError
        If the task or the policy is unknown, a plugin cannot be read, there are two of one k, or the policy does not
        go with them.
    """
    task, policy = resolve_task(arguments.task), read_policy(arguments.policy)
    if arguments.max_length:
        task = task.model_copy(update={"max_length": arguments.max_length})
    if task.kind == "qa" and isinstance(policy, Deadline):
        raise ConfigError(f"policy deadline needs times that are known; those of {task.name} are the answers' lengths")
    # the replicas' current folder is not this one
    plugins = tuple(map(_absolute, arguments.plugins))
    given = arguments.model_copy(update={"model": _absolute(arguments.model), "plugins": plugins})
    counts = Counter([1, *(Plugin.from_pretrained(plugin).config.k for plugin in plugins)])
    if twice := [k for k, count in counts.items() if count > 1]:
        raise ConfigError(f"there are two plugins of k = {twice[0]}: {', '.join(plugins)}")
    if isinstance(policy, Static) and policy.k not in counts:
        raise ConfigError(f"policy static:{policy.k}: the model serves k = {', '.join(map(str, sorted(counts)))}")
    deployment = serve.deployment(
        name="Variator",
        num_replicas=arguments.replicas,
        max_ongoing_requests=arguments.max_waiting,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        max_constructor_retry_count=2,  # a plugin that does not fit will not fit the twentieth time
    )(Replica)
    return deployment.bind(given, task)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
