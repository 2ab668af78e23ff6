"""The wheel holds what the suite needs away from its checkout, and the pins hold what the wheel asks for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bench

ROOT = Path(__file__).parents[1]


def _python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Run python in ``cwd``, with ``path`` before everything else that it imports from; return what it printed."""
    surroundings = {**os.environ, "PYTHONPATH": str(path) if path else "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    _python("-m", "pip", "wheel", "--quiet", *offline, "--wheel-dir", str(folder), str(ROOT), cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the wheel is installed into, with its scripts below ``bin``."""
    target = tmp_path_factory.mktemp("installed")
    offline = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    _python("-m", "pip", "install", "--quiet", *offline, "--target", str(target), str(wheel), cwd=target)
    return target


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_code_and_every_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    kept = [p for folder in ("bench", "analysis") for p in (ROOT / folder).rglob("*") if "__pycache__" not in p.parts]
    expected = {p.relative_to(ROOT).as_posix() for p in kept if p.is_file()}
    expected |= {f"bench/sweeps/{p.name}" for p in (ROOT / "sweeps").iterdir()}
    assert held == expected
    assert {
        "bench/py.typed",
        "bench/sweeps/quickstart.yaml",
        "bench/backbones/configs/backbones.json",
        "bench/tasks/bundled/movie_snippets/LICENSE",
        "bench/tasks/bundled/movie_snippets/NOTICE.md",
        "bench/tasks/bundled/movie_snippets/train.parquet",
        "bench/tasks/bundled/wikitext2/NOTICE.md",
    } <= held


def test_wheel_carries_its_licences(wheel: Path, metadata: Message) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name.partition("/licenses/")[2] for name in archive.namelist()}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"LICENSE", "bench/tasks/bundled/movie_snippets/LICENSE", "bench/tasks/bundled/wikitext2/NOTICE.md"} <= files


def test_wheel_has_the_version_of_the_code(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("variator-bench", bench.__version__)


def test_command_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "bin" / "bench")
    assert bench.__version__ in _python(command, "--version", cwd=tmp_path, path=installed)
    assert "sweep" in _python(command, "--help", cwd=tmp_path, path=installed)
    assert "movie_snippets" in _python(command, "list", "tasks", cwd=tmp_path, path=installed)


def test_shipped_sweep_and_bundle_are_found_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    origin = _python("-c", "import bench; print(bench.__file__)", cwd=tmp_path, path=installed).strip()
    assert Path(origin).is_relative_to(installed), "these tests must not see the checkout"
    code = "from bench.launch.sweep import find_sweep; print(find_sweep('quickstart'))"
    found = Path(_python("-c", code, cwd=tmp_path, path=installed).strip())
    assert found == installed / "bench" / "sweeps" / "quickstart.yaml"
    code = "from bench.tasks.sources import bundled; print(bundled('movie_snippets'))"
    bundle = Path(_python("-c", code, cwd=tmp_path, path=installed).strip())
    assert (bundle / "train.parquet").is_file()
    assert bundle.is_relative_to(installed)


def _pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = [re.fullmatch(r"([a-z0-9.-]+)==([\w.]+)( ; .+)?", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def _requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [Requirement(line) for line in asked]


@pytest.mark.parametrize("requirement", _requirements(), ids=str)
def test_what_is_asked_for_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    pin = _pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin)


def test_what_those_need_in_turn_is_pinned_too() -> None:
    """Walk the requirements of what is installed here; torch pins its own platform packages."""
    from importlib.metadata import PackageNotFoundError, requires

    pins, open_, seen, loose = _pins(), _requirements(), set(), set()
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        if (key := (name, frozenset(requirement.extras))) in seen:
            continue
        seen.add(key)
        if name not in pins:
            loose.add(name)
            continue
        try:
            inner = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed: run make test")
        extras = requirement.extras or {""}
        wanted = [r for r in inner if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
        open_ += [r for r in wanted if not (name == "torch" and re.match(r"(nvidia|cuda|triton)", r.name))]
    assert loose == set()
    assert {"tokenizers", "sympy", "attrs"} <= {name for name, _ in seen}


def test_torch_is_pinned_without_a_build() -> None:
    """``==2.13.0`` lets pip take whichever build the index has; a local part such as ``+cpu`` would not."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", _pins()["torch"])
