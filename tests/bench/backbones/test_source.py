"""Where weights are found and what identifies them: content, not place."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from bench.backbones import source
from bench.backbones.source import Embedded, fetch, local_folder, model_revision
from bench.errors import BackboneError
from tests.checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", "bert")


@pytest.fixture
def package(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that embeds a checkpoint as backbone ``minilm-l6``; returns the checkpoint's folder."""
    root = tmp_path / "site" / "embedding_package"
    folder = Path(shutil.copytree(checkpoint, root / "model"))
    (root / "__init__.py").touch()
    monkeypatch.syspath_prepend(root.parent)
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    embedded = Embedded(module="embedding_package", folder="model", sha256=digest, extra="quickstart")
    monkeypatch.setitem(source.EMBEDDED, "minilm-l6", embedded)
    return folder


def test_a_folder_is_itself(checkpoint: Path) -> None:
    assert local_folder(str(checkpoint)) == fetch(str(checkpoint)) == checkpoint


def test_revision_is_of_the_content_wherever_it_lies(checkpoint: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "other")
    (twin / "README.md").write_text("says nothing of the numbers")
    assert model_revision(str(twin)) == model_revision(str(checkpoint))
    assert model_revision(str(checkpoint)).startswith("sha256:")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_revision_changes_with_every_file_that_is_read(checkpoint: Path, tmp_path: Path, name: str) -> None:
    twin = shutil.copytree(checkpoint, tmp_path / "twin")
    path = twin / name
    path.write_bytes(path.read_bytes() + b" ")
    assert model_revision(str(twin)) != model_revision(str(checkpoint))


def test_a_name_of_the_hub_is_its_id_and_needs_no_network() -> None:
    assert local_folder("t5-base") is None
    assert model_revision("t5-base") == "hub:google-t5/t5-base@main" == model_revision("google-t5/t5-base")


def test_an_embedded_checkpoint_is_found_in_its_package(package: Path) -> None:
    assert local_folder("minilm-l6") == fetch("minilm-l6") == package


def test_an_embedded_checkpoint_that_is_not_the_pinned_one_is_refused(package: Path) -> None:
    path = package / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(BackboneError, match=r"sha256 of 'minilm-l6'.*expected .*variator-bench\[quickstart\]"):
        local_folder("minilm-l6")


def test_an_embedded_checkpoint_without_weights_is_refused(package: Path) -> None:
    (package / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"sha256 of 'minilm-l6'.*is none"):
        local_folder("minilm-l6")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match=f"{tmp_path.name} holds no weights"):
        fetch(str(tmp_path))


def test_weights_out_of_reach_say_what_to_do(tmp_path: Path) -> None:
    """In a process of its own, whose Hub is a port where nobody listens and whose cache is empty."""
    import os
    import subprocess
    import sys

    code = (
        "from bench.backbones.source import fetch\nfrom bench.errors import BackboneError\n"
        "for name in ('t5-bse', 't5-base'):\n"
        "    try: fetch(name)\n    except BackboneError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    first, second = done.stdout.strip().splitlines()
    assert "'t5-bse'" in first and "Did you mean 't5-base'" in first
    assert "the weights of backbone 't5-base' are not on this machine" in second and "--backbone DIR" in second
