"""The suite that methods run on themselves: each broken promise is found by its own test, and by no other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.testing.faulty import every

ROOT = Path(__file__).parents[3]

Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Install a package with entry points, name -> place, as pip would: where python below `tmp_path` looks."""

    def write(points: dict[str, str]) -> None:
        info = tmp_path / "their_package-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.2\n")
        lines = "".join(f"{name} = {place}\n" for name, place in points.items())
        (info / "entry_points.txt").write_text(f"[bench.methods]\n{lines}")

    return write


def _pytest(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, set[str]]]:
    """Run pytest away from the checkout's settings; return what it said and class -> tests that did not pass."""
    path = os.pathsep.join([str(cwd), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=outcome.xml", *arguments]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    failed: dict[str, set[str]] = {}
    if (report := cwd / "outcome.xml").exists():
        for case in ElementTree.parse(report).iter("testcase"):
            tests = failed.setdefault(case.attrib["classname"].split(".")[-1], set())
            if case.find("failure") is not None or case.find("error") is not None:
                tests.add(case.attrib["name"].split("[")[0])
    return done, failed


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", [0, 1])  # two processes share the work
def test_each_broken_promise_fails_its_own_test(install: Install, tmp_path: Path, part: int) -> None:
    methods = dict(list(every().items())[part::2])
    names = {f"Test{cls.__name__}": cls.name for cls in methods.values()}
    expected = {f"Test{cls.__name__}": set(cls.fails) for cls in methods.values()}
    places = {name: f"{cls.__module__}:{cls.__name__}" for name, cls in methods.items()}
    if part == 0:
        (tmp_path / "heavy.py").write_text(
            "import torch\nfrom dataclasses import dataclass\nfrom tests.bench.testing.faulty import Faultless\n\n\n"
            "@dataclass(frozen=True)\nclass Heavy(Faultless):\n    name = 'heavy'\n"
        )
        names["TestHeavy"], places["heavy"] = "heavy", "heavy:Heavy"
        expected["TestHeavy"] = {"test_it_plans_without_torch"}
    install(places)
    (tmp_path / "test_theirs.py").write_text(
        "from bench.testing import MethodConformance\n\n\n"
        + "\n\n".join(
            f"class {test}(MethodConformance):\n    method = '{name}'\n    families = ('bert',)\n"
            for test, name in names.items()
        )
    )
    done, failed = _pytest("test_theirs.py", cwd=tmp_path)
    assert failed == expected, done.stdout[-5000:] + done.stderr


THEIRS = '''
from dataclasses import dataclass

from bench.methods.variator import Variator


@dataclass(frozen=True)
class Theirs(Variator):
    """Merges, and does not pre-train.

    Attributes
    ----------
    pretrain_steps
        Steps of pre-training.
    """

    name = "their_method"
    summary = "merge without pre-training"

    pretrain_steps: int = 0
'''


@pytest.mark.timeout(600)
def test_a_package_of_others_is_found_and_passes_while_a_broken_one_is_named(install: Install, tmp_path: Path) -> None:
    """Their method is tested without a file of theirs; what cannot be loaded beside it is a warning."""
    (tmp_path / "their_module.py").write_text(THEIRS)
    install({"their_method": "their_module:Theirs", "broken": "no_such_module:Thing"})
    done, failed = _pytest("--pyargs", "bench.testing.test_registered::TestTheirMethod", cwd=tmp_path)
    assert done.returncode == 0 and failed == {"TestTheirMethod": set()}, done.stdout[-5000:] + done.stderr
    assert "method 'broken' from their-package 1.2 cannot be loaded and is left out" in done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 45, "hardly any test was skipped"


def test_a_method_that_nobody_registered_says_so(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(
        "from bench.testing import MethodConformance\n\n\nclass TestMine(MethodConformance):\n    method = 'mine'\n"
    )
    done, failed = _pytest("-x", "test_theirs.py", cwd=tmp_path)
    assert failed["TestMine"]
    assert "no method 'mine' is registered in the entry-point group 'bench.methods'" in done.stdout


def test_without_pytest_it_says_what_is_missing(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pytest'] = None; import bench.registry; import bench.testing"
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert "bench.testing needs pytest, which bench itself does without: pip install pytest" in done.stderr
