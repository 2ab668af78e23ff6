"""A sweep whose processes are killed, whose folders are shared, full, read-only or of another time."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bench.artifacts import META_FILE
from bench.locks import is_held
from tests.bench_command import bench, launch, results, tiny_sweep

NUMBERS = ("evaluations", "teacher_evaluations", "cost", "identity")
KILLS = 20


def numbers(at: Path) -> dict[str, dict[str, Any]]:
    """Return what must come out again, by cell."""
    return {name: {key: result[key] for key in NUMBERS} for name, result in results(at).items()}


def made(at: Path) -> list[str]:
    """Return each training that was done, in any cell of the study, whether its result was kept or found."""
    return sorted(s["name"] for result in results(at).values() for s in result["training"] if not s["cached"])


def assert_whole(at: Path) -> None:
    """Every result has its predictions, every artifact its weights, and nothing half done lies about."""
    study, cache = at / "results" / "tiny", at / "cache" / "artifacts"
    assert {r["status"] for r in results(at).values()} == {"done"}
    names = sorted(p.name for p in (study / "predictions").iterdir())
    assert names == sorted(f"{result['run_id']}.parquet" for result in results(at).values())
    assert sorted(p.name for p in (study / "runs").iterdir()) == [n.replace(".parquet", ".json") for n in names]
    artifacts = [p for p in cache.iterdir() if p.name not in ("locks", "partial")]
    assert all((folder / META_FILE).is_file() for folder in artifacts)
    weights = [load_file(path) for folder in artifacts for path in folder.glob("*.safetensors")]
    assert len(weights) == 3 and all(weights), "a teacher and two plugins"
    assert [p.name for p in (cache / "partial").iterdir()] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a sweep of a dense cell and k = 2, 4 ran through undisturbed."""
    at = tmp_path_factory.mktemp("whole")
    code, command = bench(["sweep", tiny_sweep(at)], at)
    assert code == 0, command.err
    return at


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """Return the same sweep in a folder where nothing was run."""
    for name in ("mood", "bert"):
        shutil.copytree(whole / name, tmp_path / name)
    return tiny_sweep(tmp_path)


def test_kills_at_random_moments_cost_nothing_that_was_finished(whole: Path, path: Path, tmp_path: Path) -> None:
    """The numbers are those of a sweep that nobody killed."""
    moments, seen, locks = random.Random(0), set[str](), tmp_path / "results" / "tiny" / ".locks"
    for _ in range(KILLS):
        command = launch(["sweep", path], tmp_path)
        while command.process.is_alive() and not any(map(is_held, locks.glob("*.lock"))):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        command.process.kill()
        assert command.wait() in (-signal.SIGKILL, 0)
        seen |= {result["status"] for result in results(tmp_path).values()}  # each is whole, or this fails
    assert "running" in seen <= {"running", "done"}
    code, command = bench(["sweep", path], tmp_path)
    assert code == 0, command.err
    assert numbers(tmp_path) == numbers(whole)
    assert_whole(tmp_path)


def test_eight_sweeps_at_once_share_the_work(whole: Path, path: Path, tmp_path: Path) -> None:
    all_of_them = [launch(["sweep", path], tmp_path) for _ in range(8)]
    assert [command.wait() for command in all_of_them] == [0] * 8, [command.err for command in all_of_them]
    assert made(tmp_path) == ["adapt", "adapt", "teacher"], "a cell that was run twice would have found its plugin"
    assert numbers(tmp_path) == numbers(whole)
    assert_whole(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here, so that none can be full: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("kind", ["results", "cache"])
def test_a_full_disk_interrupts_and_the_same_command_completes(
    whole: Path, path: Path, tmp_path: Path, small_disk: Path, kind: str
) -> None:
    (tmp_path / kind).symlink_to(small_disk)
    ballast = small_disk / "ballast"
    ballast.touch()
    with contextlib.suppress(OSError):  # which says that it is full
        while True:
            ballast.write_bytes(ballast.read_bytes() + bytes(4096))
    assert os.statvfs(small_disk).f_bavail == 0
    code, command = bench(["sweep", path], tmp_path)
    said = command.out + command.err
    assert code in (1, 2) and "No space left on device" in said and "Traceback" not in said
    ballast.unlink()
    code, command = bench(["sweep", path], tmp_path)
    assert code == 0, command.out + command.err
    assert numbers(tmp_path) == numbers(whole)
    assert_whole(tmp_path)


def test_a_read_only_folder_is_named_and_the_same_command_completes(whole: Path, path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    mounted = subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    elif os.getuid() == 0:
        pytest.skip("root may write everywhere, and nothing can be mounted here")
    else:
        folder.chmod(0o500)
    try:
        code, command = bench(["sweep", path], tmp_path)
    finally:
        subprocess.run(["umount", "-l", folder], check=True) if mounted else folder.chmod(0o700)
    said = command.out + command.err
    assert code in (1, 2) and "cannot write results" in said and "Traceback" not in said
    code, command = bench(["sweep", path], tmp_path)
    assert code == 0, command.err
    assert numbers(tmp_path) == numbers(whole)


def test_a_clock_set_back_changes_nothing(whole: Path, path: Path, tmp_path: Path) -> None:
    """What was made before lies in the future, where the clock was then."""
    code, command = bench(["sweep", path, "--method", "dense"], tmp_path)
    assert code == 0, command.err
    tomorrow = time.time() + 86_400
    for made_before in [*(tmp_path / "results").rglob("*"), *(tmp_path / "cache").rglob("*")]:
        os.utime(made_before, (tomorrow, tomorrow))
    code, command = bench(["sweep", path], tmp_path)
    assert code == 0, command.err
    assert made(tmp_path) == ["adapt", "adapt", "teacher"]
    assert numbers(tmp_path) == numbers(whole)
    table = (tmp_path / "results" / "tiny" / "tables" / "summary.md").read_text()
    assert "variator" in table, "tables of yesterday are not taken for those of today"
    assert_whole(tmp_path)
