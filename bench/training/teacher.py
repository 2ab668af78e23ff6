"""Fine-tune a backbone on a task; the teacher that all methods of the same (backbone, task, seed) share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.backbones.load import load_task_model
from bench.backbones.model import TaskModel
from bench.context import RunContext, Teacher
from bench.errors import BackboneError
from bench.results import Evaluation
from bench.tasks.data import TaskData
from bench.tasks.evaluation import evaluate
from bench.training.loop import Schedule
from bench.training.losses import task_loss
from bench.training.parallel import writes
from bench.training.stage import Batch, FeatureBatches, label_inputs, model_inputs, run_stage

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS_FILE = "teacher.safetensors"
HEADS = ("classifier", "qa_outputs", "pooler")
"""Modules of an encoder that are a task's own."""
LORA_TARGETS = {"bert": ["query", "value"], "t5": ["q", "v"]}


def get_teacher(ctx: RunContext) -> Teacher:
    """Return the teacher of this run, training it if no run has yet."""
    identity = ctx.config.teacher_identity(ctx.revisions["data"], ctx.revisions["model"])

    def make(folder: Path, checkpoint: Path) -> Mapping[str, Any]:
        model = ctx.placed(_fresh(ctx))
        stage = _fine_tune(model, ctx, checkpoint)
        if writes():
            # with LoRA a task is its adapter and head alone; the backbone's own weights are not stored again
            save_file({n: p.detach().cpu().contiguous() for n, p in _trained(model).items()}, folder / WEIGHTS_FILE)
        return {"stages": [stage | {"artifact": ctx.cache.key("teacher", identity)}]}

    artifact = ctx.cache.get("teacher", identity, make, ctx.progress.message)
    ctx.record(artifact)
    model = _fresh(ctx)
    _restore(model, artifact.folder)
    if ctx.config.teacher_lora:
        # merged for the run: the teacher then costs exactly what the backbone costs
        _merge_lora(model)
    return Teacher(ctx.placed(model.eval().requires_grad_(False)), artifact)


def teacher_evaluation(teacher: Teacher, ctx: RunContext, data: TaskData) -> Evaluation:
    """Return the teacher's evaluation on dev, made once for all methods that it teaches."""
    identity = {"teacher": teacher.artifact.key, "dev_examples": ctx.config.dev_examples}

    def make(folder: Path, checkpoint: Path) -> Mapping[str, Any]:
        ctx.progress.stage("evaluate teacher", len(ctx.features["dev"]))
        evaluation, _ = evaluate(
            teacher.model,
            data.dev,
            ctx.features["dev"],
            ctx.task,
            ctx.spec.family,
            ctx.tokenizer,
            device=ctx.device,
            on_batch=ctx.progress.advance,
        )
        return evaluation.model_dump(mode="json")

    return Evaluation.model_validate(ctx.cache.get("evaluation", identity, make, ctx.progress.message).meta)


def _fresh(ctx: RunContext) -> TaskModel:
    config = ctx.config
    model = load_task_model(config.backbone, ctx.spec, ctx.task, ctx.tokenizer, config.seed)
    if config.teacher_lora:
        from peft import get_peft_model

        present = [h for h in HEADS if any(n.split(".")[-1] == h for n, _ in model.model.named_modules())]
        model.model = get_peft_model(model.model, lora_config(ctx.spec.family, present))
    return model if ctx.place else model.to(ctx.device)


def lora_config(family: str, heads: Sequence[str] = ()) -> LoraConfig:
    """Return the LoRA of every teacher of a family.

    Parameters
    ----------
    family
        ``bert`` or ``t5``.
    heads
        Last names of the modules that are trained whole.
    """
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS[family], modules_to_save=list(heads))


def _merge_lora(model: TaskModel) -> None:
    model.model = model.model.merge_and_unload()


def _fine_tune(model: TaskModel, ctx: RunContext, checkpoint: Path) -> dict[str, Any]:
    config = ctx.config
    batches = FeatureBatches(
        ctx.features["train"], config.teacher_batch_size, ctx.tokenizer.pad_token_id, config.seed, ctx.device
    )
    steps = max(1, round(config.teacher_epochs * batches.order.batches_per_epoch))
    schedule = Schedule(
        steps=steps,
        lr=config.teacher_lr,
        warmup=round(config.teacher_warmup * steps),
        decay=config.teacher_decay,
        weight_decay=config.teacher_weight_decay,
        clip=config.teacher_clip,
        precision=config.precision,
    )
    model.train()

    def losses(step: int, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        loss = task_loss(ctx.task.kind, model(**model_inputs(batch)).logits, label_inputs(batch))
        return loss, {}

    return run_stage(
        "teacher",
        losses,
        _trained(model).values(),
        batches,
        schedule,
        spec=ctx.spec,
        passes=3,
        seed=config.seed,
        progress=ctx.progress,
        checkpoint=checkpoint,
    )


def _trained(model: TaskModel) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, tied ones under their first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _restore(model: TaskModel, folder: Path) -> None:
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        if differing := sorted(tensors.keys() ^ _trained(model).keys()):
            raise ValueError(f"it lacks, or has too many, {len(differing)} weights such as {differing[0]}")
    except (OSError, SafetensorError, ValueError) as error:
        raise BackboneError(
            f"the teacher in {folder} cannot be used: {error}. Remove the folder, and the next run trains it again."
        ) from None
    model.load_state_dict(tensors, strict=False)
