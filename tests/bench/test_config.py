"""What a run is: names that are misspelt, what takes precedence, and which settings are its identity."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cell import Cell, Surroundings
from bench.config import RECIPES, RunConfig, hash_of, known_keys, run_id
from bench.errors import ConfigError
from bench.methods.variator import Variator
from bench.registry import methods
from tests.checkpoints import task_file, tiny_checkpoint

# a value other than the default for every key, in the order of the fields
OTHER: dict[str, Any] = {
    "task": "sst2",
    "backbone": "t5-base",
    "method": "dense",
    "ratio": 4.0,
    "seed": 3,
    "recipe": "released",
    "train_examples": 100,
    "dev_examples": 50,
    "max_length": 64,
    "teacher_epochs": 1.5,
    "teacher_batch_size": 16,
    "teacher_lr": 2e-5,
    "teacher_decay": "cosine",
    "teacher_warmup": 0.2,
    "teacher_weight_decay": 0.5,
    "teacher_clip": 2.0,
    "teacher_lora": True,
    "steps": 10,
    "batch_size": 8,
    "precision": "fp32",
}
OTHER_OPTIONS: dict[str, Any] = {
    "compression": "conv",
    "decompression": "copy",
    "attention_k": 4,
    "bottleneck": 32,
    "mask_padding": False,
    "init": "released",
    "pretrain_steps": 7,
    "pretrain_corpus": "wikitext2",
    "pretrain_batch_size": 4,
    "pretrain_length": 64,
    "pretrain_lr": 5e-4,
    "pretrain_losses": "last_hidden=1",
    "adapt": False,
    "lr": 2e-3,
    "decay": "cosine",
    "warmup": 0.3,
    "weight_decay": 0.1,
    "clip": 5.0,
    "losses": "logits=1",
    "temperature": 2.0,
}
BUDGET = {"ratio", "steps", "batch_size"}
PRETRAINED = {"pretrain_corpus", "pretrain_batch_size", "pretrain_length", "pretrain_lr", "pretrain_losses"}
NAMES = {"task", "backbone", "method", "recipe"}


def identity(**values: Any) -> dict[str, Any]:
    return RunConfig.build(values).identity("data", "model")


def test_every_key_is_tried_here() -> None:
    """A key that is added to the library must be added to this file."""
    assert list(OTHER) == [name for name in RunConfig.model_fields if name != "options"]
    assert set(OTHER_OPTIONS) == set(Variator.options())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stesp": 3}, "unknown key 'stesp'. Did you mean 'steps'?"),
        ({"pretrain_step": 3}, "unknown key 'pretrain_step'. Did you mean 'pretrain_steps'?"),
        ({"options": {}}, "unknown key 'options'"),
        ({"method": "variatr"}, "unknown method 'variatr'. Did you mean 'variator'?"),
        ({"recipe": "relaesed"}, "unknown recipe 'relaesed'. Did you mean 'released'? Known: default, released."),
        ({"method": "zzz"}, "Known: dense"),
        ({"steps": -1}, "steps = -1: input should be greater than or equal to 0"),
        ({"steps": "many"}, "steps = 'many'"),
        ({"seed": 1.5}, "seed = 1.5"),
        ({"ratio": 0}, "ratio = 0"),
        ({"teacher_decay": "stairs"}, "teacher_decay = 'stairs'"),
        ({"bottleneck": "wide"}, "variator: bottleneck = 'wide'"),
        ({"init": "fitt"}, "variator: init = 'fitt': input should be 'fit' or 'released'"),
    ],
)
def test_what_cannot_be_meant_is_said(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.build(values)
    assert said in str(caught.value)


def test_known_keys_name_their_readers() -> None:
    keys = known_keys()
    assert keys["steps"] == "run" and "options" not in keys
    assert "variator" in keys["bottleneck"]
    assert set(keys) >= set(OTHER) | set(OTHER_OPTIONS)


@pytest.mark.parametrize(("key", "default"), [("teacher_epochs", 3.0), ("steps", 1200)])
def test_precedence_of_a_run_field(key: str, default: float) -> None:
    assert getattr(RunConfig.build({}), key) == default
    assert getattr(RunConfig.build({"recipe": "released"}), key) == RECIPES["released"][key] != default
    assert getattr(RunConfig.build({"recipe": "released", key: 7}), key) == 7


def test_precedence_of_an_option() -> None:
    assert RunConfig.build({}).options["clip"] == 1.0
    assert RunConfig.build({"recipe": "released"}).options["clip"] == 10.0
    assert RunConfig.build({"recipe": "released", "clip": 3}).options["clip"] == 3.0
    assert RunConfig.build({"recipe": "released", "clip": None}).options["clip"] == 10.0


def test_a_recipe_sets_known_keys_alone() -> None:
    for recipe in RECIPES.values():
        assert set(recipe) <= set(known_keys())


def test_a_recipe_is_its_settings() -> None:
    spelt_out = {"method": "variator", "ratio": 4, **RECIPES["released"]}
    assert identity(ratio=4, recipe="released") == identity(**spelt_out)
    assert identity(ratio=4, recipe="released") != identity(ratio=4)


def test_text_as_a_command_line_gives_it_is_the_same_run() -> None:
    as_text = {"ratio": "4", "steps": "10", "teacher_lora": "false", "lr": "2e-3", "mask_padding": "False"}
    typed = {"ratio": 4.0, "steps": 10, "teacher_lora": False, "lr": 0.002, "mask_padding": False}
    assert RunConfig.build(as_text) == RunConfig.build(typed)
    assert run_id(identity(ratio=4)) == run_id(identity(ratio=4.0))


@pytest.mark.parametrize("key", sorted(set(OTHER) - NAMES))
def test_every_field_that_variator_uses_is_its_identity(key: str) -> None:
    base = {"method": "variator", "ratio": 2}
    assert run_id(identity(**base)) != run_id(identity(**base | {key: OTHER[key]}))


@pytest.mark.parametrize("key", sorted(OTHER_OPTIONS))
def test_every_option_that_variator_uses_is_its_identity(key: str) -> None:
    base = {"method": "variator", "ratio": 2, "pretrain_steps": 5}
    changed = run_id(identity(**base | {key: OTHER_OPTIONS[key]}))
    # the corpus that is named here is the default one
    assert (changed == run_id(identity(**base))) == (key == "pretrain_corpus")


@pytest.mark.parametrize("key", sorted(PRETRAINED))
def test_settings_of_a_step_that_is_left_out_are_no_identity(key: str) -> None:
    base = {"method": "variator", "ratio": 2, "pretrain_steps": 0}
    assert run_id(identity(**base)) == run_id(identity(**base | {key: OTHER_OPTIONS[key]}))


@pytest.mark.parametrize("key", sorted(set(OTHER) - NAMES) + sorted(OTHER_OPTIONS))
def test_dense_is_one_run_whatever_it_does_not_use(key: str) -> None:
    base = {"method": "dense"}
    same = run_id(identity(**base)) == run_id(identity(**base | {key: {**OTHER, **OTHER_OPTIONS}[key]}))
    assert same == (key in BUDGET or key in OTHER_OPTIONS)


@pytest.mark.parametrize("name", sorted(set(methods()) - {"dense"}))
def test_every_method_is_a_run_of_its_own(name: str) -> None:
    assert run_id(identity(method=name, ratio=2)) != run_id(identity(method="dense", ratio=2))


def test_data_and_weights_are_identity_and_names_of_them_are_not() -> None:
    config = RunConfig.build({"ratio": 2})
    one = config.identity("data@1", "model@1")
    assert one != config.identity("data@2", "model@1") != config.identity("data@2", "model@2")
    other = RunConfig.build({"ratio": 2, "task": "sst2", "backbone": "t5-base"})
    assert one == other.identity("data@1", "model@1")


@pytest.mark.parametrize("key", sorted(k for k in OTHER if k.startswith("teacher_")))
def test_settings_of_the_teacher_are_the_teachers(key: str) -> None:
    config, changed = RunConfig.build({}), RunConfig.build({key: OTHER[key]})
    assert config.teacher_identity("d", "m") != changed.teacher_identity("d", "m")


@pytest.mark.parametrize("key", ["method", "ratio", "steps", "batch_size", "dev_examples", "recipe", "bottleneck"])
def test_methods_share_a_teacher_whatever_they_do(key: str) -> None:
    value = {**OTHER, **OTHER_OPTIONS, "recipe": "default"}[key]
    one, other = RunConfig.build({}), RunConfig.build({key: value})
    assert one.teacher_identity("d", "m") == other.teacher_identity("d", "m")


def test_run_id_is_pinned() -> None:
    """The name of a stored result; if this fails, every result of every user is orphaned."""
    explicit = {"schema": 1, "data": "sst2@sha256:0", "model": "t5-base@sha256:1", "method": "variator@1", "ratio": 4.0,
                "seed": 0, "option.lr": 0.001, "option.mask_padding": True, "max_length": None}  # fmt: skip
    assert run_id(explicit) == "bc09a559c2d9ec29"
    assert run_id(dict(reversed(explicit.items()))) == run_id(explicit)


@given(st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False) | st.integers() | st.text() | st.booleans()))
def test_hash_depends_on_content_and_not_on_order(content: dict[str, Any]) -> None:
    assert hash_of(content) == hash_of(dict(sorted(content.items(), reverse=True)))
    assert hash_of(content) != hash_of({**content, "another key": 1})


def test_identity_is_independent_of_where_data_and_weights_lie(tmp_path: Path) -> None:
    task, backbone = task_file(tmp_path / "here" / "task"), tiny_checkpoint(tmp_path / "here" / "tiny", "bert")
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "deep")
    where = Surroundings(cache_dir=tmp_path / "cache")

    def cell(root: Path) -> Cell:
        values = {"task": str(root / "task" / "mood.yaml"), "backbone": str(root / "tiny"), "ratio": 2}
        return Cell.resolve(RunConfig.build(values), where)

    here, there = cell(tmp_path / "here"), cell(tmp_path / "there" / "deep")
    assert here.run_id == there.run_id
    assert not any(str(tmp_path) in str(value) for value in here.identity.values())
    (tmp_path / "there" / "deep" / "task" / "dev.csv").write_text("text,label\nit was good,1\n")
    assert cell(tmp_path / "there" / "deep").run_id != here.run_id
    task.write_text(task.read_text().replace('"{text} <extra_id_0>"', '"{text} so <extra_id_0>"'))
    assert cell(tmp_path / "here").run_id != here.run_id  # another prompt is another task
    weights = backbone / "model.safetensors"
    before = cell(tmp_path / "here").run_id
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert cell(tmp_path / "here").run_id != before


@pytest.mark.parametrize(
    "values",
    [
        {"ratio": 4},
        {"method": "dense", "teacher_lora": True, "max_length": 64},
        {"recipe": "released", "ratio": 2, "task": "sst2", "backbone": "t5-base"},
        {**OTHER, **OTHER_OPTIONS, "method": "variator", "recipe": "default"},
    ],
)
def test_the_noted_command_is_the_same_run(values: dict[str, Any]) -> None:
    config = RunConfig.build(values)
    program, verb, *rest = config.command()
    assert (program, verb) == ("bench", "run")
    keys = [flag.removeprefix("--").replace("-", "_") for flag in rest[::2]]
    flags = dict(zip(keys, rest[1::2], strict=True))
    again = RunConfig.build(flags)
    assert again.model_dump(exclude={"recipe"}) == config.model_dump(exclude={"recipe"})
    assert again.identity("d", "m") == config.identity("d", "m")
