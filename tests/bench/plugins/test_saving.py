"""A saved plugin comes back to the bit; what cannot be read says what is wrong and where."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.backbones.sites import digest
from bench.errors import PluginError
from bench.plugins.plugin import CONFIG_FILE, WEIGHTS_FILE, Plugin, PluginConfig
from tests.checkpoints import random_plugin, tiny_model

NEWER = {"compression", "decompression", "attention_k"}


@pytest.fixture
def plugin() -> Plugin:
    return random_plugin(tiny_model("bert"), 4, backbone="tiny")


@pytest.fixture
def folder(tmp_path: Path, plugin: Plugin) -> Path:
    plugin.save_pretrained(tmp_path / "plugin")
    return tmp_path / "plugin"


def test_round_trip(folder: Path, plugin: Plugin) -> None:
    again = Plugin.from_pretrained(folder)
    assert again.config == plugin.config
    assert (again.config.k, again.config.backbone, again.config.n_layers) == (4, "tiny", 2)
    assert digest(again) == digest(plugin)
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE])


def test_it_holds_no_weight_of_the_backbone(folder: Path, plugin: Plugin) -> None:
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        assert sorted(file.keys()) == sorted(name for name, _ in plugin.named_parameters())
    numbers = 4 * plugin.num_parameters()
    assert numbers < (folder / WEIGHTS_FILE).stat().st_size < numbers + 4096


@pytest.mark.parametrize(
    "variant",
    [
        {"compression": "conv", "attention_k": 3},
        {"decompression": "copy"},
        {"compression": "mean", "decompression": "copy"},
    ],
    ids=str,
)
def test_round_trip_of_a_variant(tmp_path: Path, variant: dict[str, Any]) -> None:
    plugin = random_plugin(tiny_model("t5"), 2, **variant)
    plugin.save_pretrained(tmp_path)
    again = Plugin.from_pretrained(tmp_path)
    assert again.config == plugin.config and digest(again) == digest(plugin)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size < 4 * plugin.num_parameters() + 4096
    with again.attached(tiny_model("t5")):
        pass


def test_a_plugin_of_before_the_variants_is_read_as_it_was(folder: Path, plugin: Plugin) -> None:
    path = folder / CONFIG_FILE
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in fields.items() if k not in NEWER}))
    again = Plugin.from_pretrained(folder)
    assert again.config == plugin.config and digest(again) == digest(plugin)
    names = ("score.bias", "score.weight", "w1_u.bias", "w1_u.weight", "w1_y.weight", "w2.bias", "w2.weight")
    assert sorted(load_file(folder / WEIGHTS_FILE)) == [f"pairs.{layer}.{name}" for layer in (0, 1) for name in names]


@pytest.mark.parametrize("keep", [0, 5, 200, -4])
def test_torn_weights_are_refused(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PluginError, match=rf"{WEIGHTS_FILE} is torn"):
        Plugin.from_pretrained(folder)


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=rf"nowhere holds no plugin: {CONFIG_FILE} is missing"):
        Plugin.from_pretrained(tmp_path / "nowhere")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(PluginError, match=f"{WEIGHTS_FILE} is missing"):
        Plugin.from_pretrained(folder)
    with pytest.raises(PluginError, match="is a file, and a plugin is a folder of"):
        Plugin.from_pretrained(folder / CONFIG_FILE)


class Marker:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("writer", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path, writer: object) -> None:
    assert callable(writer)
    writer({"x": Marker(tmp_path / "ran")}, folder / WEIGHTS_FILE)
    with pytest.raises(PluginError, match="no safetensors file"):
        Plugin.from_pretrained(folder)
    assert not (tmp_path / "ran").exists()
    (folder / WEIGHTS_FILE).rename(folder / "plugin.bin")
    with pytest.raises(PluginError, match=f"{WEIGHTS_FILE} is missing"):
        Plugin.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"model_type": "bert", "hidden_size": 32}', "k: field required"),
        (b'{"k": 1, "family": "bert", "d_model": 32, "n_layers": 2}', "k: .*greater than or equal to 2"),
        (b'{"k": 4, "family": "bert", "d_model": 0, "n_layers": 2}', "d_model"),
        (b'{"k": 4, "family": "bert", "d_model": 8, "n_layers": 2, "compression": "max"}', "compression"),
        (b'{"k": 4, "family": "bert", "d_model": 8, "n_layers": 2, "attention_k": 1}', "attention_k"),
        (b'{"k": "four", "family": "bert", "d_model": 32, "n_layers": 2}', "k: .*integer"),
        (b"[]", "no plugin's config"),
        (b'{"k": 4, "fam', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_foreign_config_is_refused(folder: Path, content: bytes, said: str) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(PluginError, match=rf"(?s){CONFIG_FILE}.*{said}"):
        Plugin.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"n_layers": 3},
        {"d_model": 16},
        {"k": 2},
        {"bottleneck": 4},
        {"compression": "conv"},
        {"decompression": "copy"},
        {"attention_k": 2},
    ],
)
def test_weights_of_another_plugin_are_refused(folder: Path, change: dict[str, Any]) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PluginError, match=f"{WEIGHTS_FILE} does not belong to its config"):
        Plugin.from_pretrained(folder)


def test_a_weight_too_many_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({**tensors, "backbone.weight": torch.zeros(3)}, folder / WEIGHTS_FILE)
    with pytest.raises(PluginError, match=r"(?s)does not belong to its config.*backbone\.weight"):
        Plugin.from_pretrained(folder)


def test_a_config_of_a_later_version_may_say_more(folder: Path, plugin: Plugin) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"said_later": 1, "bench_version": "99.0"}))
    assert digest(Plugin.from_pretrained(folder)) == digest(plugin)


def test_k_must_merge_something() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        PluginConfig(k=1, family="t5", d_model=8, n_layers=1)
