"""One method on one tiny task and checkpoint: what a run does up to the compressed model, a step at a time."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.backbones.model import TaskModel
from bench.cell import Cell, Surroundings
from bench.config import RunConfig, hash_of
from bench.context import RunContext, Teacher
from bench.locks import hold
from bench.tasks.data import TaskData, load_task
from bench.tasks.features import Feature, collate
from bench.tasks.spec import Kind
from bench.testing.checkpoints import Family, context, task_file, tiny_checkpoint
from bench.testing.tiny import t5_tokenizer
from bench.training.stage import model_inputs
from bench.training.teacher import get_teacher

Items = tuple[tuple[str, Any], ...]
"""A mapping that can be hashed."""

_NUMBERS = ("1", "2", "3")
KINDS: tuple[Kind, ...] = ("single", "regression", "qa")
_TASKS: dict[Kind, dict[str, Any]] = {
    "single": {},
    "regression": {
        "kind": "regression",
        "labels": None,
        "label": "number",
        "label_words": str(list(_NUMBERS)),
        "metrics": "[pearson]",
    },
    "qa": {
        "kind": "qa",
        "labels": None,
        "label": "answer",
        "text": "other",
        "text_pair": "text",
        "prompt": '"{text} {text_pair}"',
    },
}
# A wide FFN on a narrow stream: the budget of any k is then within reach, as it is on real backbones.
_SHAPES: dict[Family, dict[str, Any]] = {
    "bert": {"intermediate_size": 512, "num_hidden_layers": 4},
    "t5": {"d_ff": 512, "num_layers": 4, "num_decoder_layers": 1, "vocab_size": len(t5_tokenizer(_NUMBERS))},
}
_RUN = {
    "teacher_epochs": 1.0,
    "teacher_batch_size": 16,
    "teacher_lr": 1e-3,
    "batch_size": 8,
    "precision": "fp32",
    "max_length": 64,
}


@dataclass(frozen=True)
class Case:
    """One cell of a tiny grid.

    Attributes
    ----------
    folder
        Where checkpoints, tasks and teachers are, shared by all cases and processes of a session.
    method
        Registered name.
    family, kind, ratio, seed, steps
        The cell.
    options, shape
        Options of the method, and changes to the checkpoint's config.
    """

    folder: Path
    method: str
    family: Family
    kind: Kind = "single"
    ratio: float = 4
    seed: int = 0
    steps: int = 4
    options: Items = ()
    shape: Items = ()

    def replace(self, **changes: Any) -> Case:
        """Return another case."""
        return dataclasses.replace(self, **changes)

    def config(self) -> RunConfig:
        """Write task and checkpoint if nobody has, and return the run."""
        shape = _SHAPES[self.family] | dict(self.shape)
        backbone = self.folder / f"{self.family}-{hash_of(shape)[:8]}"
        task = self.folder / f"task-{self.kind}"
        with hold(self.folder / "writing.lock"):
            if not backbone.is_dir():
                tiny_checkpoint(backbone, self.family, **shape)
                if self.family == "t5":
                    t5_tokenizer(_NUMBERS).save_pretrained(backbone)
            if not task.is_dir():
                task_file(task, examples=120, words=(6, 36), **_TASKS[self.kind])
        cell = {"task": task / "mood.yaml", "backbone": backbone, "method": self.method}
        values = {"ratio": self.ratio, "seed": self.seed, "steps": self.steps}
        return RunConfig.build(_RUN | {k: str(v) for k, v in cell.items()} | values | dict(self.options))

    def prepare(self, cache: Path | None = None, teacher: Teacher | None = None) -> Prepared:
        """Return all that the method is given.

        Parameters
        ----------
        cache
            Folder of artifacts; the session's own by default.
        teacher
            The teacher, if it is not to be this case's.
        """
        config = self.config()
        ctx = context(config, cache or self.folder / "cache")
        # what the budget is solved for and what is counted are then the same examples
        ctx.features["dev"], dev = ctx.features["selection"], ctx.features["dev"]
        return Prepared(ctx, teacher or get_teacher(ctx), load_task(ctx.task, None), dev)


@dataclass
class Prepared:
    """A case whose teacher is there.

    Attributes
    ----------
    ctx, teacher, data
        What ``compress`` is given.
    examples
        Encoded examples of dev, which nothing was fitted to.
    """

    ctx: RunContext
    teacher: Teacher
    data: TaskData
    examples: list[Feature]

    def compress(self) -> TaskModel:
        """Return the compressed model, as a run does."""
        ctx = self.ctx
        chosen = ctx.config.build_method()
        ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
        return chosen.compress(self.teacher, self.data, ctx).eval()

    def inputs(self, features: Sequence[Feature], longer: int = 0) -> dict[str, Tensor]:
        """Return a batch, padded to the longest of its features and ``longer`` tokens more."""
        batch = model_inputs(collate(features, self.ctx.tokenizer.pad_token_id))
        fill = {"input_ids": self.ctx.tokenizer.pad_token_id}
        return {
            name: torch.nn.functional.pad(tensor, (0, longer), value=fill.get(name, 0))
            if name in ("input_ids", "attention_mask", "token_type_ids")
            else tensor
            for name, tensor in batch.items()
        }

    def answers(self, model: TaskModel, seed: int = 0) -> Tensor:
        """Return the logits of a batch of 32 examples, with torch's generator seeded as told."""
        torch.manual_seed(seed)
        with torch.inference_mode():
            logits: Tensor = model(**self.inputs(self.examples[:32])).logits
        return logits.clone()


def skip_reason(case: Case) -> str | None:
    """Return why the method refuses a case, or ``None``."""
    return Cell.resolve(case.config(), Surroundings(cache_dir=case.folder)).skip_reason()


def answers(case: Case, cache: Path) -> Any:
    """Return the answers of a case as an array, making what is not in ``cache``."""
    prepared = case.prepare(cache)
    return prepared.answers(prepared.compress()).numpy()


@functools.cache
def _other_process() -> ProcessPoolExecutor:
    """One for all cases: what takes long is to import torch."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def elsewhere(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns when another process calls it."""
    return _other_process().submit(function, *arguments).result()
