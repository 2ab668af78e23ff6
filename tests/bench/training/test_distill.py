"""A plugin in training: it follows the dense model, the backbone stays as it is, and pre-training knows no task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.backbones.load import load_task_model
from bench.backbones.model import TaskModel
from bench.backbones.sites import digest
from bench.context import RunContext
from bench.errors import ConfigError
from bench.measure.closed_form import encoder
from bench.plugins.plugin import Plugin
from bench.training.distill import attach_for_good, distill_plugin
from bench.training.loop import Schedule
from bench.training.stage import FeatureBatches, model_inputs
from tests.checkpoints import FAMILIES, context, quick_config, random_plugin, task_file, tiny_checkpoint


@pytest.fixture(scope="module", params=FAMILIES)
def ctx(request: Any, tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    folder = tmp_path_factory.mktemp("distill")
    backbone = tiny_checkpoint(folder / "tiny", request.param)
    return context(quick_config(task_file(folder / "task"), backbone), folder / "cache")


def model_of(ctx: RunContext) -> TaskModel:
    return ctx.pretrained()


def distill(ctx: RunContext, plugin: Plugin, model: TaskModel, folder: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "mix": "all_hidden=1,logits=1",
        "kind": "single",
        "temperature": 1.0,
        "schedule": Schedule(steps=40, lr=1e-2, precision="fp32"),
    }
    batches = FeatureBatches(ctx.features["train"], 8, ctx.tokenizer.pad_token_id, 0, ctx.device)
    return distill_plugin(
        "adapt", plugin, model, batches, ctx=ctx, checkpoint=folder / "x.pt", **{**settings, **changes}
    )


def test_the_plugin_learns_and_the_model_does_not(ctx: RunContext, tmp_path: Path) -> None:
    model = model_of(ctx)
    before, plugin = digest(model), random_plugin(model, 2)
    start = digest(plugin)
    stage = distill(ctx, plugin, model, tmp_path)
    assert digest(model) == before and digest(plugin) != start
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in plugin.parameters())
    first, last = stage["history"][0], stage["history"][-1]
    assert last["all_hidden"] < 0.8 * first["all_hidden"]
    assert last["loss"] == pytest.approx(last["all_hidden"] + last["logits"], rel=1e-5)


def test_what_a_stage_leaves(ctx: RunContext, tmp_path: Path) -> None:
    model = model_of(ctx)
    stage = distill(ctx, random_plugin(model, 2), model, tmp_path, schedule=Schedule(7, 1e-3, precision="fp32"))
    lengths = [len(feature["input_ids"]) for feature in ctx.features["train"]]
    forward = encoder(ctx.spec, round(sum(lengths) / len(lengths))).encoder
    assert (stage["name"], stage["steps"], stage["examples"]) == ("adapt", 7, 7 * 8)
    assert stage["flops"] == 7 * 8 * 4 * forward
    assert stage["seconds"] > 0


def test_weights_of_a_mix_weigh(ctx: RunContext, tmp_path: Path) -> None:
    model = model_of(ctx)
    schedule = Schedule(1, 1e-3, precision="fp32")
    (record,) = distill(
        ctx, random_plugin(model, 2), model, tmp_path, mix="last_hidden=0.25,task=3", schedule=schedule
    )["history"]
    assert record["loss"] == pytest.approx(0.25 * record["last_hidden"] + 3 * record["task"], rel=1e-5)


def test_pre_training_refuses_a_part_that_needs_a_task(ctx: RunContext, tmp_path: Path) -> None:
    model = model_of(ctx)
    with pytest.raises(ConfigError, match="unknown loss part 'logits'"):
        distill(ctx, random_plugin(model, 2), model, tmp_path, kind=None)


@torch.no_grad()
def test_attached_for_good_shares_weights_and_leaves_the_teacher_dense(ctx: RunContext) -> None:
    model = model_of(ctx)
    plugin = random_plugin(model, 2)
    batch = FeatureBatches(ctx.features["dev"], 8, ctx.tokenizer.pad_token_id, 0, ctx.device)(0)
    dense = model(**model_inputs(batch)).logits
    student = attach_for_good(model, plugin)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in student.parameters()} == own | {p.data_ptr() for p in plugin.parameters()}
    assert torch.equal(model(**model_inputs(batch)).logits, dense)
    with plugin.attached(model):
        expected = model(**model_inputs(batch)).logits
    assert torch.equal(student(**model_inputs(batch)).logits, expected)
    assert not torch.equal(expected, dense)


@torch.no_grad()
def test_hidden_states_are_those_of_every_layer(ctx: RunContext) -> None:
    """The last one is the encoder's output; the ones before are what the next layer reads, which in T5 is normed."""
    model = load_task_model(ctx.config.backbone, ctx.spec, ctx.task, ctx.tokenizer, 0).eval()
    batch = model_inputs(FeatureBatches(ctx.features["dev"], 4, ctx.tokenizer.pad_token_id, 0, ctx.device)(0))
    stack = model.model.bert.encoder.layer if ctx.spec.family == "bert" else model.model.encoder.block
    given: list[Any] = []
    handles = [layer.register_forward_pre_hook(lambda m, args: given.append(args[0])) for layer in stack]
    output = model(**batch, hidden=True)
    for handle in handles:
        handle.remove()
    assert len(output.encoder_hidden) == ctx.spec.encoder_layers == len(given)
    for index, (hidden, following) in enumerate(zip(output.encoder_hidden, given[1:], strict=False), start=1):
        norm = stack[index].layer[0].layer_norm if ctx.spec.family == "t5" else torch.nn.Identity()
        assert torch.equal(hidden, norm(following))
    last = model.model.bert(**batch) if ctx.spec.family == "bert" else model.model.encoder(**batch)
    assert torch.equal(output.encoder_hidden[-1], last.last_hidden_state)
    assert torch.equal(output.logits, model(**batch).logits)
    if ctx.spec.family == "bert":
        assert output.decoder_hidden is None
    else:
        start = torch.tensor([[0, ctx.tokenizer.convert_tokens_to_ids("<extra_id_0>")]]).expand(4, 2)
        inside = model.model.decoder(
            start, encoder_hidden_states=last.last_hidden_state, encoder_attention_mask=batch["attention_mask"]
        ).last_hidden_state
        assert output.decoder_hidden is not None
        torch.testing.assert_close(output.decoder_hidden, inside)
        words = [ctx.tokenizer.convert_tokens_to_ids(f"\u2581{word}") for word in ("bad", "good")]
        scores = model.model.lm_head(inside[:, 1] * (32**-0.5 if model.config.tie_word_embeddings else 1.0))
        torch.testing.assert_close(output.logits, scores[:, words], rtol=0, atol=1e-5)
