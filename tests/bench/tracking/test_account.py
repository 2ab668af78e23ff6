"""Whether W&B is used is what its environment and files say, found without its library."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.tracking.account import has_key, mode


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, None),
        ({"WANDB_MODE": ""}, None),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
    ],
)
def test_the_mode(told: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert mode() == expected


def test_the_mode_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert mode() == "offline"


@pytest.mark.parametrize(
    ("server", "machine", "found"),
    [
        ("", "api.wandb.ai", True),
        ("", "elsewhere.org", False),
        ("https://wandb.lab.org", "wandb.lab.org", True),
        ("https://wandb.lab.org", "api.wandb.ai", False),
    ],
)
def test_a_key_in_netrc(
    server: str, machine: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not has_key()
    monkeypatch.setenv("WANDB_BASE_URL", server)
    (tmp_path / ".netrc").write_text(f"machine {machine} login user password {'a' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert has_key() is found


def test_a_key_in_the_environment_and_in_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\napi_key = x\n")
    assert has_key()
    settings.write_text("[default\nwhat is this")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_key()
