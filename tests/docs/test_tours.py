"""Every command of a tour is one of the README's, is run here, or names the test that runs it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml

from bench.plugins.plugin import Plugin
from bench.testing.checkpoints import tiny_model
from tests.documents import ROOT, python_blocks
from tests.readme_commands import commands, served_arguments

TOURS = sorted((ROOT / "docs" / "tours").glob("*.md"))
RUN_ELSEWHERE = {
    "bench convert FILE.pkl OUT": "tests/bench/plugins/test_convert.py",
    "bench export quickstart served": "tests/bench/serving/test_export.py",
    "bench report pilot": "tests/analysis/test_analysis_command.py",
    "bench serve-sim sweeps/pilot.yaml --task sst2 --method variator --data-root DATA": (
        "tests/bench/serving/test_serve_sim.py"
    ),
    "bench storage storage --data-root DATA": "tests/bench/serving/test_storage.py",
    "serve run bench.serving.ray_serve:app model=served/model plugins=served/k2,served/k4,served/k8 "
    "task=movie_snippets replicas=2": "tests/bench/serving/test_ray_serve.py",
    "pip install -c constraints.txt -e '.[quickstart,ray]'": "tests/test_packaging.py",
    "bench verify results/pilot --run 25b4c6f8 --data-root DATA": "tests/bench/verify/test_again.py",
    "bench verify results/pilot --sample 3 --data-root DATA": "tests/bench/verify/test_again.py",
}


def _plain(command: str) -> str:
    return command.replace(".venv/bin/", "")


def _of(page: Path) -> list[str]:
    """Return the commands of a page which are not the README's, in their order."""
    readme = {_plain(command) for command in commands((ROOT / "README.md").read_text())}
    found = [_plain(command) for command in commands(page.read_text())]
    return [command for command in dict.fromkeys(found) if command not in readme]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with what the tours' commands find in a checkout."""
    (tmp_path / "sweeps").symlink_to(ROOT / "sweeps")
    shutil.copytree(ROOT / "results" / "pilot", tmp_path / "results" / "pilot")
    return tmp_path


@pytest.mark.parametrize("page", TOURS, ids=lambda page: page.stem)
def test_every_command_of_a_tour_works(page: Path, checkout: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BENCH_CACHE": str(checkout / "cache"), "BENCH_DATA_ROOT": ""}
    for command in _of(page):
        if command in RUN_ELSEWHERE:
            assert (ROOT / RUN_ELSEWHERE[command]).is_file()
            continue
        program, *arguments = shlex.split(command)
        assert program == "bench", f"{command} is not the README's, and this test runs `bench` alone"
        done = subprocess.run(
            [sys.executable, "-m", "tests.quick_bench", *arguments],
            cwd=checkout, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), f"{command} printed nothing"


@pytest.mark.parametrize("page", [*TOURS, ROOT / "docs" / "saved.md"], ids=lambda page: page.stem)
def test_the_code_of_a_tour_runs(page: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a reader would run it, with a model, a batch and plugins where the text takes them as given."""
    model = tiny_model("bert").eval()
    for k in (2, 4, 8):
        Plugin.for_model(model, k).save_pretrained(checkout / "plugins" / f"sst2-k{k}")
    given = {"model": model, "batch": {"input_ids": torch.full((2, 9), 7)}}
    with chdir(checkout):
        for block in python_blocks(page):
            if "push_to_hub" not in block:  # which tests/bench/hub/test_hub.py runs
                exec(compile(block, page.name, "exec"), given)
    printed = capsys.readouterr().out
    if page.stem == "serving":
        assert not torch.equal(given["calm"], given["busy"]) and given["calm"].shape == (2, 2)
        assert torch.equal(model(**given["batch"]).logits, given["calm"])
    for comment in re.findall(r"print\(.*\) {2,}# (\d.*)$", page.read_text(), re.M):
        assert comment in printed


def test_the_file_that_is_deployed_can_be() -> None:
    [text] = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "deploying.md").read_text(), re.M | re.S)
    [application] = yaml.safe_load(text)["applications"]
    assert application["import_path"] == "bench.serving.ray_serve:app"
    assert served_arguments(application["args"]) is None


def test_tours_are_short_and_complete() -> None:
    assert {page.stem for page in TOURS} == {"analyst", "researcher", "reviewer", "serving"}
    for page in TOURS:
        text = page.read_text()
        assert len(text.split()) < 620, f"{page.name} takes longer than five minutes"
        assert list(commands(text)), f"{page.name} has nothing to type"
    assert len({command for page in TOURS for command in _of(page)}) >= 5
