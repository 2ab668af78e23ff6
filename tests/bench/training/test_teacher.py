"""Teachers of both families, full and LoRA: trained once, stored small, and the same again from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from bench.backbones.load import load_task_model
from bench.backbones.sites import digest
from bench.config import RunConfig
from bench.context import RunContext, Teacher
from bench.errors import BackboneError
from bench.tasks.data import load_task
from bench.tasks.features import collate
from bench.training.stage import model_inputs
from bench.training.teacher import WEIGHTS_FILE, get_teacher, teacher_evaluation
from tests.checkpoints import FAMILIES, context, quick_config, random_plugin, task_file, tiny_checkpoint


class World:
    """A task, a checkpoint of one family, and teachers of it."""

    def __init__(self, folder: Path, family: str, lora: bool) -> None:
        self.cache, self.family, self.lora = folder / "cache", family, lora
        self.task = task_file(folder / "task")
        self.backbone = tiny_checkpoint(folder / "tiny", family)  # type: ignore[arg-type]

    def config(self, **values: Any) -> RunConfig:
        return quick_config(self.task, self.backbone, **{"method": "dense", "teacher_lora": self.lora, **values})

    def context(self, **values: Any) -> RunContext:
        return context(self.config(**values), self.cache)


@pytest.fixture(scope="module", params=[(f, lora) for f in FAMILIES for lora in (False, True)], ids=str)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("teacher"), *request.param)


@torch.no_grad()
def logits(teacher: Teacher, ctx: RunContext) -> Tensor:
    batch = collate(ctx.features["dev"], ctx.tokenizer.pad_token_id)
    found: Tensor = teacher.model(**model_inputs(batch)).logits
    return found


def test_a_teacher_is_trained_once_and_comes_back_the_same(world: World) -> None:
    ctx, later = world.context(), world.context()
    made, found = get_teacher(ctx), get_teacher(later)
    assert (made.artifact.cached, found.artifact.cached) == (False, True)
    assert torch.equal(logits(made, ctx), logits(found, ctx))
    (stage,), (stage_later,) = ctx.stages, later.stages
    assert (stage.name, stage.cached, stage_later.cached) == ("teacher", False, True)
    assert stage.artifact == made.artifact.key == found.artifact.key
    assert stage.steps == -(-len(ctx.features["train"]) // 16) == len(stage.history) * stage.steps
    assert stage_later.history == stage.history
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())


def test_training_changed_the_model_and_learned(world: World) -> None:
    ctx = world.context(teacher_epochs=4.0, teacher_lr=3e-3)
    teacher = get_teacher(ctx)
    fresh = load_task_model(ctx.config.backbone, ctx.spec, ctx.task, ctx.tokenizer, ctx.config.seed).eval()
    assert digest(teacher.model) != digest(fresh)
    losses = [record["loss"] for record in ctx.stages[0].history]
    assert losses[-1] < losses[0]


def test_what_is_stored(world: World) -> None:
    """All weights of a full teacher, tied ones once; of a LoRA teacher, adapter and head alone."""
    ctx = world.context()
    teacher = get_teacher(ctx)
    with safe_open(teacher.artifact.folder / WEIGHTS_FILE, "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118 - not a mapping
    whole = sum(p.numel() for p in teacher.model.parameters())
    if not world.lora:
        assert sum(sizes.values()) == whole
        return
    adapter = {name for name in sizes if "lora_" in name}
    layers, width, rank = ctx.spec.encoder_layers, ctx.spec.d_model, 16
    attentions = layers if world.family == "bert" else layers + 2 * ctx.spec.decoder_layers
    assert sum(sizes[name] for name in adapter) == attentions * 2 * 2 * width * rank
    head = {name for name in sizes if name not in adapter}
    assert all(any(part in name for part in ("classifier", "pooler")) for name in head)
    assert bool(head) == (world.family == "bert")


def test_a_merged_lora_teacher_is_a_plain_backbone(world: World) -> None:
    ctx = world.context()
    teacher = get_teacher(ctx)
    fresh = load_task_model(ctx.config.backbone, ctx.spec, ctx.task, ctx.tokenizer, ctx.config.seed)
    assert list(teacher.model.state_dict()) == list(fresh.state_dict())
    changed = {
        name
        for (name, tuned), plain in zip(teacher.model.state_dict().items(), fresh.state_dict().values(), strict=True)
        if not torch.equal(tuned, plain)
    }
    assert changed
    if world.lora:
        touched = ("query.weight", "value.weight", ".q.weight", ".v.weight", "classifier.", "pooler.")
        assert all(any(part in name for part in touched) for name in changed)


def test_a_plugin_works_on_a_teacher(world: World) -> None:
    ctx = world.context()
    teacher = get_teacher(ctx)
    before, dense = digest(teacher.model), logits(teacher, ctx)
    with random_plugin(teacher.model, 2).attached(teacher.model):
        assert not torch.equal(logits(teacher, ctx), dense)
    assert digest(teacher.model) == before and torch.equal(logits(teacher, ctx), dense)


@pytest.mark.parametrize("world", [(f, True) for f in FAMILIES], indirect=True, ids=str)
def test_lora_scale_is_alpha_by_rank(world: World) -> None:
    """The merged weight is W + (32/16) B A, worked out from the stored adapter."""
    ctx = world.context()
    teacher = get_teacher(ctx)
    fresh = load_task_model(ctx.config.backbone, ctx.spec, ctx.task, ctx.tokenizer, ctx.config.seed).state_dict()
    merged = teacher.model.state_dict()
    with safe_open(teacher.artifact.folder / WEIGHTS_FILE, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if "lora_A" not in name:
                continue
            a, b = file.get_tensor(name), file.get_tensor(name.replace("lora_A", "lora_B"))
            plain = name.replace("base_model.model.", "").replace("lora_A.default.", "")
            torch.testing.assert_close(merged[plain], fresh[plain] + 2 * b @ a, rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", [{"seed": 1}, {"teacher_lr": 2e-3}, {"train_examples": 20}])
def test_another_training_is_another_teacher(world: World, change: dict[str, Any]) -> None:
    first, second = world.context(), world.context(**change)
    one, other = get_teacher(first), get_teacher(second)
    assert one.artifact.key != other.artifact.key
    assert not torch.equal(logits(one, first), logits(other, first))


def test_methods_share_a_teacher(world: World) -> None:
    variator = world.context(method="variator", ratio=2, steps=3)
    assert get_teacher(variator).artifact.key == get_teacher(world.context()).artifact.key


def test_a_torn_teacher_names_its_folder(world: World) -> None:
    teacher = get_teacher(world.context(seed=5))
    path = teacher.artifact.folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BackboneError, match=f"{teacher.artifact.key}.*Remove"):
        get_teacher(world.context(seed=5))


def test_a_teacher_that_lacks_a_weight_is_refused(world: World) -> None:
    from safetensors.torch import load_file, save_file

    teacher = get_teacher(world.context(seed=6))
    path = teacher.artifact.folder / WEIGHTS_FILE
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(BackboneError, match=name):
        get_teacher(world.context(seed=6))


def test_its_evaluation_is_made_once(world: World) -> None:
    ctx = world.context()
    teacher, data = get_teacher(ctx), load_task(ctx.task)
    evaluation = teacher_evaluation(teacher, ctx, data)
    right = logits(teacher, ctx).argmax(-1) == torch.tensor([example.label for example in data.dev])
    assert evaluation.split == "dev" and evaluation.n_examples == len(data.dev)
    assert evaluation.metrics["accuracy"].value == pytest.approx(right.float().mean().item())
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.zero_()
    assert teacher_evaluation(teacher, ctx, data) == evaluation
