"""What answers: one resident model with its bank of plugins, or the models of a rival one beside another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from bench.backbones.model import TaskModel, share_weights
from bench.cell import Cell, Surroundings
from bench.context import RunContext
from bench.determinism import deterministic
from bench.errors import ConfigError, Unreachable
from bench.execution import device_of, prepare
from bench.measure.size import count_bytes
from bench.plugins.bank import PluginBank
from bench.plugins.plugin import Plugin
from bench.progress import Progress
from bench.serving.records import ServedModel
from bench.tasks.data import Example
from bench.tasks.evaluation import predict
from bench.tasks.features import Feature
from bench.tasks.metrics import token_f1
from bench.tasks.spec import TaskSpec
from bench.training.teacher import get_teacher


@dataclass(frozen=True)
class Engine:
    """A model that can be run at several k.

    Attributes
    ----------
    name
        Method.
    select
        Returns the model at a k; of a bank it is always the same one, switched.
    models
        What can be chosen, by ascending k, their accuracy still 0.
    resident_bytes
        Bytes of all distinct parameters and buffers, for all ks together.
    ctx, examples
        The task's surroundings, and the dev examples in the order of ``ctx.features["dev"]``.
    """

    name: str
    select: Callable[[int], TaskModel]
    models: list[ServedModel]
    resident_bytes: int
    ctx: RunContext
    examples: Sequence[Example]

    @property
    def ks(self) -> tuple[int, ...]:
        """What can be chosen, ascending; 1 is the dense teacher."""
        return tuple(model.k for model in self.models)

    def answer(self, k: int, features: Sequence[Feature]) -> list[int] | list[float] | list[str]:
        """Return the answers to a batch of encoded requests.

        Raises
        ------
        Diverged
            If a logit is not finite.
        """
        ctx, model = self.ctx, self.select(k)
        found = predict(
            model, features, ctx.task, ctx.spec.family, ctx.tokenizer, batch_size=len(features), device=ctx.device
        )
        return found.values

    def run(self, k: int, examples: Sequence[int]) -> NDArray[np.float32]:
        """Answer dev examples, given by their places, and score the answers, (batch,)."""
        features = self.ctx.features["dev"]
        answers = self.answer(k, [features[i] for i in examples])
        return scores(answers, [self.examples[i] for i in examples], self.ctx.task)


def scores(answers: Sequence[object], examples: Sequence[Example], task: TaskSpec) -> NDArray[np.float32]:
    """Return 1 for a right answer and 0 for a wrong one; the token F1 of an answer to a question."""
    pairs = zip(answers, examples, strict=True)
    if task.kind == "qa":
        found = [max(token_f1(str(text), accepted) for accepted in example.answers) for text, example in pairs]
    else:
        found = [float(answer == example.label) for answer, example in pairs]
    return np.array(found, np.float32)


def load_engine(cells: Sequence[Cell], where: Surroundings, progress: Progress) -> Engine:
    """Load a method's models of one teacher, training what the artifact cache lacks.

    Parameters
    ----------
    cells
        Runs of one method that differ in their ratio alone, which becomes k. None of them needs a stored result; what
        cannot be reached is left out, as it is of a sweep.
    where, progress
        As for `bench.runner.run`.

    Raises
    ------
    ConfigError
        If the task's answers cannot be scored one by one.
    Unreachable
        If the method can reach none of the ratios.
    """
    task, family = cells[0].task, cells[0].spec.family
    if task.kind == "regression" or (task.kind == "qa" and family == "bert"):
        raise ConfigError(
            f"serving scores each answer by itself, and {task.name} with a {family} backbone has answers that are "
            + ("numbers" if task.kind == "regression" else "put together from several inputs")
            + "; choose a task of classification, or text-to-text question answering"
        )
    device = torch.device(device_of(where.device))
    ctx, data = prepare(cells[0], where, progress, device)
    with deterministic(cells[0].config.seed):
        teacher = get_teacher(ctx)
    config = ctx.config.model_dump(mode="json")
    models = [ServedModel(k=1, source=teacher.artifact.key, config=config, remaining=1.0, accuracy=0.0)]
    compressed: dict[int, TaskModel] = {}
    plugins, reason = [], ""
    for cell in cells:
        own, data = prepare(cell, where, progress, device)
        method, k = cell.config.build_method(), int(cell.config.ratio or 1)
        try:
            own.setting = method.setting(cell.spec, cell.config.ratio, own.lengths("selection"))
            with deterministic(cell.config.seed):  # as a run trains it, which shares the artifact
                compressed[k] = method.compress(teacher, data, own).eval()
        except Unreachable as error:
            reason = f"{cell.config.label} is left out: {error}"
            progress.message(reason)
            continue
        if artifact := own.cache.find("plugin", own.identity):
            plugins.append(Plugin.from_pretrained(artifact.folder).to(device).eval().requires_grad_(False))
        models.append(
            ServedModel(
                k=k,
                source=cell.run_id,
                config=cell.config.model_dump(mode="json"),
                remaining=own.setting.remaining,
                accuracy=0.0,
            )
        )
    if not compressed:
        raise Unreachable(reason)
    models.sort(key=lambda model: model.k)
    if len(plugins) == len(compressed):
        select, held = _bank(teacher.model, plugins)
    else:
        held = {1: teacher.model, **compressed}
        select = held.__getitem__
    tensors = chain.from_iterable(chain(model.parameters(), model.buffers()) for model in held.values())
    return Engine(cells[0].config.method, select, models, count_bytes(tensors), ctx, data.dev)


def _bank(teacher: TaskModel, plugins: Sequence[Plugin]) -> tuple[Callable[[int], TaskModel], dict[int, TaskModel]]:
    """Hold all plugins on one model that shares the teacher's weights."""
    model = share_weights(teacher)
    bank = PluginBank(plugins)
    bank.attach(model)

    def select(k: int) -> TaskModel:
        bank.select(k)
        return model

    return select, {1: model}
