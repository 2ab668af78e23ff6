"""A package of somebody else's, built and installed as pip does it, adds one thing of each kind from outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import tiny_checkpoint

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests" / "tutorial_package"
QUICK = ["--train-examples=40", "--teacher-epochs=1", "--teacher-batch-size=16", "--precision=fp32"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the package is installed in, with a checkpoint, which a repository need not hold."""
    folder = tmp_path_factory.mktemp("package")
    copy = Path(shutil.copytree(PACKAGE, folder / "source"))
    tiny_checkpoint(copy / "bench_tutorial" / "checkpoint", "bert", num_hidden_layers=4, intermediate_size=512)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--disable-pip-version-check"]
    _python("-m", "pip", "install", "--quiet", *offline, "--target", str(folder / "site"), str(copy), at=folder)
    return folder / "site"


def _python(*words: str, at: Path, site: Path | None = None, fails: bool = False) -> str:
    path = os.pathsep.join(map(str, [*([site] if site else []), ROOT]))
    surroundings = {**os.environ, "PYTHONPATH": path, "BENCH_CACHE": str(at / "cache"), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *words], cwd=at, env=surroundings, capture_output=True, text=True)
    assert (done.returncode != 0) is fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def bench(*words: str, at: Path, site: Path | None, fails: bool = False) -> str:
    return _python("-m", "tests.bench_command", *words, at=at, site=site, fails=fails)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("tasks", r"^tickets +single +accuracy +calm / urgent +64 +bench-tutorial 1\.0 *$"),
        ("backbones", r"^tutorial-bert +bert +4 +32 +512 +.* M +bench-tutorial 1\.0 *$"),
        ("policies", r"^patience +share=0\.5 +The dense model while the oldest request .* bench-tutorial 1\.0 *$"),
        ("methods", r"^lower_layers +does +leave out the upper encoder layers *$"),
    ],
)
def test_they_are_listed_with_where_they_are_from(site: Path, tmp_path: Path, what: str, line: str) -> None:
    words = ["-c", f"from bench.cli import main; main(['list', '{what}'])"]
    shown = _python(*words, at=tmp_path, site=site)
    assert re.search(line, shown, re.MULTILINE), shown
    assert re.search(r"from +bench-tutorial 1\.0", shown) if what == "methods" else True
    assert "bench-tutorial" not in _python(*words, at=tmp_path), "nothing is installed where these tests run"


def test_they_are_planned_without_torch(site: Path, tmp_path: Path) -> None:
    words = ["plan", "--task", "tickets", "--backbone", "tutorial-bert", "--method", "lower_layers", "--ratio", "2,4"]
    code = f"import sys; from bench.cli import main\ntry: main({words})\nfinally: print('torch' in sys.modules)"
    shown = _python("-c", code, at=tmp_path, site=site)
    assert "layers=3" in shown and "layers=2" in shown and shown.rstrip().endswith("False"), shown


def test_they_run_and_are_made_again_by_name(site: Path, tmp_path: Path) -> None:
    cell = ["--task=tickets", "--backbone=tutorial-bert", "--method=lower_layers", "--ratio=4", "--last=1"]
    shown = bench("run", *cell, *QUICK, "--device=cpu", at=tmp_path, site=site)
    assert "remaining encoder FLOPs 50.00%" in shown, shown
    [path] = (tmp_path / "results" / "runs" / "runs").glob("*.json")
    result = json.loads(path.read_text())
    assert result["status"] == "done" and result["knob"] == {"layers": 2}
    assert (result["config"]["task"], result["config"]["backbone"]) == ("tickets", "tutorial-bert")
    assert result["identity"]["method"] == "lower_layers@1" and result["identity"]["option.last"] == 1
    assert result["identity"]["data"].startswith("tickets@sha256:")
    assert result["identity"]["model"].startswith("tutorial-bert@sha256:")
    assert str(site) not in path.read_text(), "a path means nothing elsewhere"
    assert "1 identical" in bench("verify", "runs", at=tmp_path, site=site)
    shown = bench("verify", "runs", at=tmp_path, site=None, fails=True)
    assert "cannot be made again: " in shown and "method 'lower_layers'" in shown


@pytest.mark.parametrize(
    ("key", "name", "near"),
    [("task", "tikets", "tickets"), ("backbone", "tutorial_bert", "tutorial-bert"), ("method", "low_layers", "lower_")],
)
def test_a_misspelt_name_is_answered_with_theirs(site: Path, tmp_path: Path, key: str, name: str, near: str) -> None:
    assert f"Did you mean '{near}" in bench("run", f"--{key}={name}", at=tmp_path, site=site, fails=True)


def test_the_policy_is_known_and_chooses(site: Path, tmp_path: Path) -> None:
    code = """
import numpy as np
from bench.serving.policies import View, policies
patience = policies()["patience"]()
def choose(waited):
    return patience.choose(View(waited, np.zeros(3), np.full(3, 8), (1, 2, 4), 1, 8, 0.4, 1, None))
print(choose(0.1), choose(0.3))
"""
    assert _python("-c", code, at=tmp_path, site=site).split() == ["1", "4"]


def test_the_method_keeps_what_every_method_promises(site: Path, tmp_path: Path) -> None:
    """The package's own tests, as its author runs them."""
    tests = Path(shutil.copytree(PACKAGE / "tests", tmp_path / "tests_of_the_package"))
    shown = _python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), at=tmp_path, site=site)
    passed = re.search(r"(\d+) passed", shown)
    assert passed and int(passed[1]) > 30 and "failed" not in shown, shown


BLOCK = re.compile(r"^`([\w/.]+)`:\n\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A file's name on a line of its own, and the file below it."""


def test_the_document_shows_the_very_files() -> None:
    blocks = dict(BLOCK.findall((ROOT / "docs" / "extending.md").read_text()))
    assert {name: text == (PACKAGE / name).read_text() for name, text in blocks.items()} == dict.fromkeys(blocks, True)
    kept = {p.relative_to(PACKAGE).as_posix() for s in ("py", "toml", "yaml") for p in PACKAGE.rglob(f"*.{s}")}
    assert kept - set(blocks) == {"bench_tutorial/__init__.py"}, "a file that the document leaves out"
