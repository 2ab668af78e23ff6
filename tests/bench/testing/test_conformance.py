"""The suite that methods run on themselves: each broken promise is found by its own test, and by no other."""

from __future__ import annotations

import os
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
def test_each_broken_promise_fails_its_own_test(install: Install, tmp_path: Path) -> None:
    methods = every()
    (tmp_path / "heavy.py").write_text(
        "import torch\nfrom dataclasses import dataclass\nfrom bench.methods.dense import Dense\n\n\n"
        "@dataclass(frozen=True)\nclass Heavy(Dense):\n    name = 'heavy'\n"
    )
    places = {name: f"{cls.__module__}:{cls.__name__}" for name, cls in methods.items()}
    install(places | {"heavy": "heavy:Heavy"})
    (tmp_path / "test_theirs.py").write_text(
        "from bench.testing import MethodConformance\nfrom tests.bench.testing.faulty import every\n\n"
        "class Base(MethodConformance):\n    families = ('bert',)\n\n"
        "class TestHeavy(Base):\n    method = 'heavy'\n\n"
        "for cls in every().values():\n"
        "    name = f'Test{cls.__name__}'\n    globals()[name] = type(name, (Base,), {'method': cls.name})\n"
    )
    done, failed = _pytest("test_theirs.py", cwd=tmp_path)
    expected = {f"Test{cls.__name__}": set(cls.fails) for cls in methods.values()}
    assert failed == expected | {"TestHeavy": {"test_it_plans_without_torch"}}, done.stdout[-5000:] + done.stderr
