"""Batches of several tasks on one resident backbone give the answers that each task's own model gives."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from bench.backbones.sites import digest
from bench.errors import BackboneError, BenchError, PluginError
from bench.plugins.plugin import Plugin
from bench.serving.multitask import MultiTaskModel
from bench.training.teacher import get_teacher
from tests.bench.serving.lora_tasks import KS, OneTask, inputs, lora_tasks, mixed, resident
from tests.checkpoints import FAMILIES, Family, context, quick_config, random_plugin, task_file

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=FAMILIES)
def tasks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[OneTask]:
    return lora_tasks(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("k", [1, *KS])
def test_a_mixed_batch_answers_as_each_task_alone(tasks: list[OneTask], k: int) -> None:
    model, rows = resident(tasks), mixed(tasks, 11)
    model.select(k, [task.name for task, _ in rows])
    together = model(**inputs(rows, pad=5))
    wrong = 0
    for (task, feature), answer in zip(rows, together, strict=True):
        with torch.inference_mode():
            alone = task.alone(k)(**inputs([(task, feature)])).logits[0]
        torch.testing.assert_close(answer, alone, **TOLERANCE)
        for other in tasks:  # what another task would say is something else, or the above would prove nothing
            if other is not task and other.ctx.task.n_outputs == task.ctx.task.n_outputs:
                wrong += bool(torch.allclose(other.alone(k)(**inputs([(other, feature)])).logits[0], alone, atol=1e-3))
    assert wrong == 0


def test_an_answer_does_not_depend_on_who_is_in_the_batch(tasks: list[OneTask]) -> None:
    model, rows = resident(tasks), mixed(tasks, 9)
    model.select(4, [task.name for task, _ in rows])
    together = model(**inputs(rows))
    order = random.Random(0).sample(range(9), 9)
    model.select(4, [rows[i][0].name for i in order])
    shuffled = model(**inputs([rows[i] for i in order], pad=7))
    for place, i in enumerate(order):
        torch.testing.assert_close(shuffled[place], together[i], **TOLERANCE)
    for task in tasks:
        own = [i for i, (t, _) in enumerate(rows) if t is task]
        model.select(4, [task.name] * len(own))
        for i, answer in zip(own, model(**inputs([rows[i] for i in own])), strict=True):
            torch.testing.assert_close(answer, together[i], **TOLERANCE)


def test_plugins_may_differ_in_how_they_compress(tmp_path: Path) -> None:
    tasks = lora_tasks(tmp_path, "bert", (2, 2))
    shapes = ({"compression": "conv", "bottleneck": 4}, {"decompression": "copy", "mask_padding": False})
    for task, shape in zip(tasks, shapes, strict=True):
        task.plugins[4] = random_plugin(task.model, 4, **shape)  # type: ignore[arg-type]
    model, rows = resident(tasks), mixed(tasks, 6)
    rows = [(task, task.features[0] | {}) for task, _ in rows]
    model.select(4, [task.name for task, _ in rows])
    for (task, feature), answer in zip(rows, model(**inputs(rows)), strict=True):
        width = inputs(rows)["input_ids"].shape[1] - len(feature["input_ids"])
        with torch.inference_mode():
            alone = task.alone(4)(**inputs([(task, feature)], pad=width)).logits[0]
        torch.testing.assert_close(answer, alone, **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_keys_and_values_are_each_tasks_own(tmp_path: Path, family: Family) -> None:
    tasks = lora_tasks(tmp_path, family, (2, 2), attention_k=2)
    model, rows = resident(tasks), mixed(tasks, 7)
    model.select(4, [task.name for task, _ in rows])
    for (task, feature), answer in zip(rows, model(**inputs(rows, pad=3)), strict=True):
        with torch.inference_mode():
            alone = task.alone(4)(**inputs([(task, feature)])).logits[0]
        torch.testing.assert_close(answer, alone, **TOLERANCE)


def test_text_is_generated_for_each_row_by_its_task(tmp_path: Path) -> None:
    tasks = lora_tasks(tmp_path, "t5", (2, 3, 2))
    model, rows = resident(tasks), mixed(tasks, 8)
    said = set()
    for k in (1, *KS):
        model.select(k, [task.name for task, _ in rows])
        batch = inputs(rows, pad=3)
        together = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=8)
        for (task, feature), tokens in zip(rows, together, strict=True):
            own = inputs([(task, feature)])
            alone = task.alone(k).generate(own["input_ids"], own["attention_mask"], max_new_tokens=8)[0]
            assert tokens[: len(alone)].tolist() == alone.tolist()
            assert set(tokens[len(alone) :].tolist()) <= {task.ctx.tokenizer.pad_token_id}
            said.add(tuple(alone.tolist()))
    assert len(said) > 3  # the decoder does say different things


def test_spans_are_read_by_each_tasks_own_head(tmp_path: Path) -> None:
    tasks = lora_tasks(tmp_path, "bert", (2,))
    spans = task_file(
        tmp_path / "spans", examples=24, kind="qa", text="other", text_pair="text", label="answer", labels=None,
        prompt='"{text} {text_pair}"',
    )  # fmt: skip
    ctx = context(
        quick_config(spans, Path(tasks[0].ctx.config.backbone), method="dense", teacher_lora=True), tmp_path / "cache"
    )
    teacher = get_teacher(ctx)
    plugins = {4: random_plugin(teacher.model, 4, seed=3)}
    tasks.append(OneTask("spans", ctx, teacher.artifact.folder, teacher.model, plugins))
    model, rows = resident(tasks), mixed(tasks, 6)
    model.select(4, [task.name for task, _ in rows])
    for (task, feature), answer in zip(rows, model(**inputs(rows)), strict=True):
        with torch.inference_mode():
            alone = task.alone(4)(**inputs([(task, feature)])).logits[0]
        torch.testing.assert_close(answer[: len(alone)], alone, **TOLERANCE)


def test_a_task_is_added_beside_those_that_run_and_the_backbone_stays_one(tasks: list[OneTask]) -> None:
    model = resident(tasks[:2])
    rows = mixed(tasks[:2], 4)
    model.select(2, [task.name for task, _ in rows])
    before = model(**inputs(rows))
    backbone = {id(p) for n, p in model.body.named_parameters() if "lora" not in n and ".pairs." not in n}
    size = sum(p.numel() for p in model.parameters())
    model.add(tasks[2].name, tasks[2].ctx.task, tasks[2].folder, tasks[2].plugins.values())
    model.select(2, [task.name for task, _ in rows])
    for a, b in zip(model(**inputs(rows)), before, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert backbone <= {id(p) for p in model.body.parameters()}
    added = sum(p.numel() for p in model.parameters()) - size
    plugins = sum(p.num_parameters() for p in tasks[2].plugins.values())
    own = sum(t.numel() for t in _weights(tasks[2].folder).values())
    assert added == plugins + own
    assert not any(p.requires_grad for p in model.parameters())
    new = tasks[2]
    model.select(2, [new.name, tasks[0].name])
    answer, _ = model(**inputs([(new, new.features[0]), (tasks[0], tasks[0].features[1])]))
    with torch.inference_mode():
        torch.testing.assert_close(answer, new.alone(2)(**inputs([(new, new.features[0])])).logits[0], **TOLERANCE)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "teacher.safetensors")


def test_what_does_not_fit_is_refused_and_changes_nothing(tasks: list[OneTask], tmp_path: Path) -> None:
    first, second, third = tasks
    model, rows = resident(tasks[:2]), mixed(tasks[:2], 4)
    model.select(2, [task.name for task, _ in rows])
    before, weights = model(**inputs(rows)), digest(model)

    full = context(first.ctx.config.model_copy(update={"teacher_lora": False}), tmp_path / "cache")
    whole = get_teacher(full).artifact.folder
    torn, foreign, other_head = tmp_path / "torn", tmp_path / "foreign", tmp_path / "head"
    for folder in (torn, foreign, other_head):
        shutil.copytree(third.folder, folder)
    file = torn / "teacher.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    record = json.loads((foreign / "artifact.json").read_text())
    record["identity"]["model"] = "bert-large@0"
    (foreign / "artifact.json").write_text(json.dumps(record))
    small = Plugin(third.plugins[2].config.model_copy(update={"d_model": 8}))

    def add(name: str = "new", teacher: Path = third.folder, plugins: tuple[Plugin, ...] = ()) -> None:
        model.add(name, third.ctx.task, teacher, plugins)

    for call, kind, message in (
        (lambda: add(first.name), BenchError, "is there already"),
        (lambda: add(teacher=whole), BackboneError, "whole model of its own"),
        (lambda: add(teacher=torn), BackboneError, "cannot be read"),
        (lambda: add(teacher=tmp_path), BackboneError, "cannot be read"),
        (lambda: add(teacher=foreign), BackboneError, "is of backbone bert-large@0"),
        (lambda: add(plugins=(small,)), PluginError, "does not fit"),
        (lambda: add(plugins=(third.plugins[2], random_plugin(third.model, 2))), PluginError, "two plugins"),
        (lambda: model.select(2, ["task.9"]), BenchError, "Did you mean 'task."),
        (lambda: model.select(8, [first.name]), PluginError, "it has k = 1, 2, 4"),
    ):
        with pytest.raises(kind, match=message):
            call()
    model.select(2, [task.name for task, _ in rows])
    with pytest.raises(BenchError, match="has 3 rows, and tasks were selected for 4"):
        model(**inputs(rows[:3]))
    assert model.tasks == (first.name, second.name) and digest(model) == weights
    for a, b in zip(model(**inputs(rows)), before, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    if model.spec.family == "bert":
        with pytest.raises(BenchError, match="generates nothing"):
            model.generate(inputs(rows)["input_ids"])


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    two, three = lora_tasks(tmp_path, "bert", (2, 3))
    model = MultiTaskModel(two.ctx.config.backbone, two.ctx.spec)
    with pytest.raises(BackboneError, match=f"is not that of task '{two.ctx.task.name}'"):
        model.add("two", two.ctx.task, three.folder)
    assert model.tasks == ()


def test_tasks_that_merge_by_different_k_cannot_share_a_batch(tmp_path: Path) -> None:
    one, other = lora_tasks(tmp_path, "bert", (2, 2))
    other.plugins[4] = random_plugin(other.model, 4, attention_k=2)
    model = resident([one, other])
    with pytest.raises(PluginError, match="differ in attention_k"):
        model.select(4, [one.name, other.name])
