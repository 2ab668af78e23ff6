"""Methods by name, the library's own and those of other packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import registry
from bench.errors import ConfigError
from bench.methods.base import Method
from bench.methods.dense import Dense

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package whose entry points are given, as pip would, and forget it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("methods", "registered_methods"):  # nothing is remembered
        monkeypatch.setattr(registry, name, getattr(registry, name).__wrapped__)
    (tmp_path / "their_method.py").write_text(
        "from dataclasses import dataclass\nfrom bench.methods.dense import Dense\n\n\n"
        "@dataclass(frozen=True)\nclass Theirs(Dense):\n    name = 'theirs'\n    width: int = 3\n"
    )

    def write(points: str) -> None:
        info = tmp_path / "their_package-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[bench.methods]\n{points}\n")

    return write


def test_built_in_methods_are_there_under_their_own_names() -> None:
    found = registry.methods()
    assert {"dense", "variator"} <= set(found)
    for name, cls in found.items():
        assert issubclass(cls, Method) and cls.name == name and cls.version >= 1
    assert registry.method("dense") is Dense


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'variater'\. Did you mean 'variator'\? Known: .*dense"):
        registry.method("variater")


def test_a_method_of_another_package_is_found(install: Install) -> None:
    install("theirs = their_method:Theirs")
    theirs = registry.method("theirs")
    assert theirs.options() == {"width": 3}
    assert set(registry.methods()) == {"theirs", *registry._BUILT_IN}
    assert registry.registered_methods()["theirs"].origin == "their-package 1.2"


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("broken = no_such_module:Thing", "No module named 'no_such_module'"),
        ("broken = their_method:Nothing", "Nothing"),
        ("broken = pathlib:Path", "no subclass"),
        ("dense = their_method:Theirs", "the name is taken by this library"),
    ],
)
def test_a_method_that_cannot_be_used_is_left_out_with_a_warning(install: Install, point: str, said: str) -> None:
    install(point)
    with pytest.warns(UserWarning, match=rf"from their-package 1\.2 .*left out: .*{said}"):
        found = registry.methods()
    assert set(found) == set(registry._BUILT_IN) and found["dense"] is Dense
