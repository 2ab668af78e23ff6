"""Three tasks with LoRA teachers on one tiny backbone, and their plugins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.backbones.model import TaskModel
from bench.context import RunContext
from bench.plugins.plugin import Plugin
from bench.serving.multitask import MultiTaskModel, stacked
from bench.tasks.features import Feature
from bench.testing.tiny import t5_tokenizer
from bench.training.distill import attach_for_good
from bench.training.teacher import WEIGHTS_FILE, get_teacher
from tests.checkpoints import Family, context, quick_config, random_plugin, task_file, tiny_checkpoint

KS = (2, 4)


@dataclass(frozen=True)
class OneTask:
    """A task, the model that it was trained as, and its plugins."""

    name: str
    ctx: RunContext
    folder: Path
    model: TaskModel
    plugins: dict[int, Plugin]

    def alone(self, k: int) -> Any:
        """Return its own model at k, with the LoRA merged."""
        return self.model if k == 1 else attach_for_good(self.model, self.plugins[k])

    @property
    def features(self) -> list[Feature]:
        """Its dev examples."""
        return self.ctx.features["dev"]


def lora_tasks(folder: Path, family: Family, classes: tuple[int, ...] = (2, 3, 0), **plugin: Any) -> list[OneTask]:
    """Train a LoRA teacher for each number of classes, 0 being regression; their weights are then made to matter."""
    numbers = t5_tokenizer(("0", "1", "2", "3"))
    changes_of_shape = {"vocab_size": len(numbers)} if family == "t5" else {}
    backbone, found = tiny_checkpoint(folder / family, family, **changes_of_shape), []
    if family == "t5":
        numbers.save_pretrained(backbone)
    for i, n in enumerate(classes):
        words = ("good", "bad", "maybe", "yes", "no")
        changes: dict[str, Any] = (
            {"labels": f"[{', '.join('abcde'[:n])}]", "label_words": f"[{', '.join(words[:n])}]"}
            if n
            else {"kind": "regression", "label": "number", "labels": None, "label_words": '["0", "1", "2", "3"]'}
        )
        task = task_file(folder / f"{family}-{i}", examples=24, **changes)
        config = quick_config(task, backbone, method="dense", teacher_lora=True, seed=i)
        ctx = context(config, folder / "cache")
        teacher = get_teacher(ctx)
        _enlarge(teacher.artifact.folder / WEIGHTS_FILE, i)
        model = get_teacher(ctx).model
        plugins = {k: random_plugin(model, k, seed=10 * i + k, **plugin) for k in KS}
        found.append(OneTask(f"task.{i}", ctx, teacher.artifact.folder, model, plugins))
    return found


def _enlarge(path: Path, seed: int) -> None:
    """Let the LoRA change answers by more than rounding does: B starts at zero, and has hardly left it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.3
    save_file(tensors, path)


def resident(tasks: list[OneTask]) -> MultiTaskModel:
    """Return one backbone with all tasks."""
    model = MultiTaskModel(tasks[0].ctx.config.backbone, tasks[0].ctx.spec)
    for task in tasks:
        model.add(task.name, task.ctx.task, task.folder, task.plugins.values())
    return model


def mixed(tasks: list[OneTask], rows: int) -> list[tuple[OneTask, Feature]]:
    """Return rows of all tasks in turn, of different lengths."""
    return [(tasks[i % len(tasks)], tasks[i % len(tasks)].features[i]) for i in range(rows)]


def inputs(rows: list[tuple[OneTask, Feature]], pad: int = 0) -> dict[str, Tensor]:
    """Stack rows into a batch with ``pad`` more columns of padding."""
    batch = stacked([feature for _, feature in rows], rows[0][0].ctx.tokenizer.pad_token_id)
    if pad:
        fill = {"input_ids": rows[0][0].ctx.tokenizer.pad_token_id}
        batch = {n: torch.nn.functional.pad(t, (0, pad), value=fill.get(n, 0)) for n, t in batch.items()}
    return batch
