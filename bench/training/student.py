"""Students: models made from a teacher's weights, kept as whatever they do not share with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from bench.backbones.model import TaskModel
from bench.backbones.surgery import Structure, cut
from bench.backbones.write_out import write_out, written_encoder
from bench.context import RunContext, Teacher
from bench.errors import BackboneError
from bench.measure.size import bytes_on_disk
from bench.training.parallel import writes

WEIGHTS_FILE = "student.safetensors"


def own_copy(model: TaskModel) -> TaskModel:
    """Return a written-out copy of ``model`` with weights of its own, all of which can be trained."""
    return copy.deepcopy(write_out(model)).requires_grad_(True)


def smaller(model: TaskModel, structure: Structure) -> TaskModel:
    """Return a written-out copy with weights of its own and what ``structure`` leaves of the encoder."""
    student = own_copy(model)
    cut(written_encoder(student), structure)
    return student


def get_student(
    teacher: Teacher,
    ctx: RunContext,
    build: Callable[[Mapping[str, Any]], TaskModel],
    make: Callable[[Path], tuple[TaskModel, dict[str, Any]]],
) -> TaskModel:
    """Return the student of this run, frozen, making it if no run has yet.

    Parameters
    ----------
    teacher, ctx
        The teacher and the surroundings.
    build
        Notes of ``make`` -> a model of the student's shape, whose weights are then filled in. Those that it shares with
        the teacher stay shared and are not stored.
    make
        Called with the path of a checkpoint that survives a kill; returns the student and JSON notes: ``stages``, a
        list of what `bench.training.stage.run_stage` returns, with ``artifact`` where another than the student holds
        the outcome, and whatever ``build`` needs.
    """

    def store(folder: Path, checkpoint: Path) -> dict[str, Any]:
        model, notes = make(checkpoint)
        save_weights(model, teacher.model, folder)
        key = ctx.cache.key("student", ctx.identity)
        return notes | {"stages": [{"artifact": key} | stage for stage in notes["stages"]]}

    artifact = ctx.cache.get("student", ctx.identity, store, ctx.progress.message)
    ctx.record(artifact)
    model = build(artifact.meta).to(ctx.device)
    load_weights(model, teacher.model, artifact.folder)
    ctx.bytes_added = bytes_on_disk(artifact.folder / WEIGHTS_FILE)
    return model.eval().requires_grad_(False)


def changed(model: nn.Module, teacher: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that ``model`` does not share with ``teacher``, tied ones under their first name."""
    shared = {id(p) for p in teacher.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in shared}


def save_weights(model: nn.Module, teacher: nn.Module, folder: Path) -> None:
    """Write what ``model`` does not share with ``teacher``."""
    if writes():
        tensors = {name: p.detach().cpu().contiguous() for name, p in changed(model, teacher).items()}
        save_file(tensors, folder / WEIGHTS_FILE)


@torch.no_grad()
def load_weights(model: nn.Module, teacher: nn.Module, folder: Path) -> None:
    """Read into ``model``, which has the shape of what was saved, what `save_weights` wrote.

    Raises
    ------
    BackboneError
        If the file is missing, torn, or of another shape.
    """
    wanted = changed(model, teacher)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        if differing := sorted(tensors.keys() ^ wanted.keys()):
            raise ValueError(f"it lacks, or has too many, {len(differing)} weights such as {differing[0]}")
        for name, parameter in wanted.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(tensors[name])
    except (OSError, SafetensorError, ValueError) as error:
        raise BackboneError(
            f"the student in {folder} cannot be used: {error}. Remove the folder, and the next run makes it again."
        ) from None
