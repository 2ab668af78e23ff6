"""Tasks and backbones of other packages; whatever is wrong with one, the others are there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.backbones import catalogue as backbones
from bench.backbones.source import fetch, local_folder, model_revision
from bench.entry_points import from_entry_points
from bench.errors import BackboneError, ConfigError
from bench.tasks import catalogue as tasks
from tests.checkpoints import task_file, tiny_checkpoint

Install = Callable[[str, str], None]
MODULE = """
from pathlib import Path
from bench.backbones.catalogue import Checkpoint
from bench.tasks.catalogue import TASKS

HERE = Path(__file__).parent
CONFIG = {"model_type": "bert", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
          "num_hidden_layers": 3, "vocab_size": 50}
spec = TASKS["sst2"].model_copy(update={"name": "reviews"})
yaml = HERE / "mood" / "mood.yaml"
lost = HERE / "nowhere.yaml"
folder = Checkpoint(folder=HERE / "bert")
hub = Checkpoint(hub="somebody/theirs", config=CONFIG)
nowhere = Checkpoint(folder=HERE / "nowhere")
neither = Checkpoint(config=CONFIG)
bare = Checkpoint(hub="somebody/theirs")
gpt = Checkpoint(hub="somebody/theirs", config={"model_type": "gpt2"})
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install packages with one entry point each, as pip would, and forget them afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    for module, name in ((tasks, "registered_tasks"), (backbones, "registered_backbones")):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)  # nothing is remembered
    monkeypatch.setattr("bench.backbones.source.registered_backbones", backbones.registered_backbones)
    (tmp_path / "their_things.py").write_text(MODULE)

    def write(group: str, point: str) -> None:
        info = tmp_path / f"package_{len(list(tmp_path.glob('*.dist-info')))}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.name.partition('-')[0]}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{point}\n")

    yield write
    import sys

    sys.modules.pop("their_things", None)


def test_nothing_is_registered_where_nothing_is_installed() -> None:
    assert tasks.registered_tasks() == {} == backbones.registered_backbones()
    assert tasks.tasks() == tasks.TASKS and backbones.backbone_names() == list(backbones.known_backbones())


def test_a_task_is_a_spec_or_a_file(install: Install, tmp_path: Path) -> None:
    task_file(tmp_path / "mood")
    install("bench.tasks", "reviews = their_things:spec")
    install("bench.tasks", "mood = their_things:yaml")
    found = tasks.registered_tasks()
    assert {name: task.origin for name, task in found.items()} == {"reviews": "package_0 1.2", "mood": "package_1 1.2"}
    assert tasks.resolve_task("reviews").source.hub == "nyu-mll/glue"
    assert tasks.resolve_task("mood").labels == ("bad", "good")
    with pytest.raises(ConfigError, match=r"unknown task 'moods'\. Did you mean 'mood'\?"):
        tasks.resolve_task("moods")


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("lost = no_such_module:it", "No module named 'no_such_module'"),
        ("lost = their_things:nothing", "nothing"),
        ("lost = their_things:lost", r"cannot read the task file .*nowhere\.yaml"),
        ("lost = their_things:CONFIG", "neither a bench.tasks.spec.TaskSpec nor the path"),
        ("other = their_things:spec", "calls itself 'reviews'"),
        ("sst2 = their_things:spec", "the name is taken by this library"),
    ],
)
def test_a_task_that_cannot_be_used_is_left_out(install: Install, point: str, said: str) -> None:
    install("bench.tasks", point)
    install("bench.tasks", "reviews = their_things:spec")
    with pytest.warns(UserWarning, match=rf"task '\w+' from package_0 1\.2 .*left out: .*{said}") as caught:
        found = tasks.tasks()
    assert len(caught) == 1 and set(found) == {*tasks.TASKS, "reviews"} and found["sst2"] is tasks.TASKS["sst2"]


def test_of_two_packages_the_first_has_the_name(install: Install) -> None:
    install("bench.tasks", "reviews = their_things:spec")
    install("bench.tasks", "reviews = their_things:spec")
    with pytest.warns(UserWarning, match=r"task 'reviews' from package_\d 1\.2 .*taken by package_\d 1\.2"):
        assert list(tasks.registered_tasks()) == ["reviews"]


def test_a_backbone_in_a_folder_of_a_package(install: Install, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "bert", "bert")
    install("bench.backbones", "theirs = their_things:folder")
    assert local_folder("theirs") == fetch("theirs") == folder
    assert model_revision("theirs") == model_revision(str(folder)).replace(str(folder), "theirs")
    spec = backbones.spec_of("theirs")
    assert (spec.name, spec.family, spec.d_model) == ("theirs", "bert", 32)
    assert "theirs" in backbones.backbone_names() and "theirs" not in backbones.known_backbones()


def test_a_backbone_on_the_hub_is_planned_without_it(install: Install) -> None:
    install("bench.backbones", "theirs = their_things:hub")
    assert local_folder("theirs") is None
    assert model_revision("theirs") == "hub:somebody/theirs@main"
    assert backbones.spec_of("theirs").encoder_layers == 3


def test_a_misspelt_backbone_is_answered_with_theirs(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    install("bench.backbones", "their-own-bert = their_things:hub")
    with pytest.raises(BackboneError, match="Did you mean 'their-own-bert'"):
        backbones.spec_of("their-own-brt")


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("broken = their_things:CONFIG", "is no bench.backbones.catalogue.Checkpoint"),
        ("broken = their_things:nowhere", "without config.json"),
        ("broken = their_things:neither", "either the folder of its checkpoint or its Hub id"),
        ("broken = their_things:bare", "model_type 'None', which is not supported"),
        ("broken = their_things:gpt", "model_type 'gpt2', which is not supported"),
        ("minilm-l6 = their_things:hub", "the name is taken by this library"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_left_out(install: Install, point: str, said: str) -> None:
    install("bench.backbones", point)
    with pytest.warns(UserWarning, match=rf"backbone '[\w-]+' from package_0 1\.2 .*left out: .*{said}"):
        assert backbones.registered_backbones() == {}


def test_any_group_is_read_in_the_same_way(install: Install) -> None:
    install("bench.things", "four = their_things:CONFIG")

    def read(name: str, found: object) -> str:
        return f"{name}: {json.dumps(found)}"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [(name, thing)] = from_entry_points("bench.things", "thing", read, ()).items()
    assert name == "four" and thing.value.startswith('four: {"model_type"') and thing.origin == "package_0 1.2"
