"""Artifacts are made once however many want them, and a maker that dies leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.artifacts import META_FILE, ArtifactCache
from bench.errors import BenchError
from tests.workers import finish, make_artifact, start, unprivileged, wait_for

IDENTITY = {"lr": 0.1, "data": "sha256:1"}


def maker(text: str = "weights", **made: Any) -> Any:
    def make(folder: Path, checkpoint: Path) -> dict[str, Any]:
        (folder / "file").write_text(text)
        return {"steps": 3, **made}

    return make


def never(folder: Path, checkpoint: Path) -> dict[str, Any]:
    raise AssertionError("made a second time")


def test_made_once_and_found_again(tmp_path: Path) -> None:
    made = ArtifactCache(tmp_path / "deep" / "cache").get("plugin", IDENTITY, maker())
    found = ArtifactCache(tmp_path / "deep" / "cache").get("plugin", dict(reversed(IDENTITY.items())), never)
    assert (made.cached, found.cached) == (False, True)
    assert made.key == found.key and made.key.startswith("plugin-")
    assert found.meta == made.meta == {"steps": 3}
    assert (found.folder / "file").read_text() == "weights"
    assert json.loads((found.folder / META_FILE).read_text())["identity"] == IDENTITY


@pytest.mark.parametrize("other", [{"lr": 0.2}, {"data": "sha256:2"}, {"more": None}])
def test_another_identity_is_another_artifact(tmp_path: Path, other: dict[str, Any]) -> None:
    cache = ArtifactCache(tmp_path)
    first = cache.get("plugin", IDENTITY, maker("first"))
    second = cache.get("plugin", IDENTITY | other, maker("second"))
    third = cache.get("teacher", IDENTITY, maker("third"))
    assert [(a.folder / "file").read_text() for a in (first, second, third)] == ["first", "second", "third"]
    assert cache.find("plugin", {"lr": 9}) is None


def test_four_processes_make_one_artifact(tmp_path: Path) -> None:
    outs = [tmp_path / f"out{i}" for i in range(4)]
    processes = [start(make_artifact, tmp_path / "cache", out, tmp_path / "log", 0.3) for out in outs]
    assert finish(*processes) == [0, 0, 0, 0]
    (pid,) = (tmp_path / "log").read_text().split()
    said = [json.loads(out.read_text()) for out in outs]
    assert [s["made"] for s in said] == [{"maker": int(pid)}] * 4
    assert [s["weights"] for s in said] == ["half and the other half"] * 4
    assert sorted(s["cached"] for s in said) == [False, True, True, True]
    for s in said:
        assert len(s["messages"]) <= 1
        assert all("waiting for another process to make thing-" in message for message in s["messages"])


def test_a_killed_maker_leaves_nothing_torn_and_the_next_one_completes(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    process = start(make_artifact, root, tmp_path / "out", log, 600.0)
    wait_for(lambda: any(root.glob("partial/*.dir/weights")), process)
    assert not list(root.glob("thing-*"))
    heir = start(make_artifact, root, tmp_path / "heir", log, 0.0)
    process.kill()
    process.join()
    assert finish(heir) == [0]
    said = json.loads((tmp_path / "heir").read_text())
    assert (said["cached"], said["weights"]) == (False, "half and the other half")
    assert not list(root.glob("partial/*")) and len(list(root.glob("thing-*"))) == 1


def test_a_maker_that_fails_leaves_nothing_but_its_checkpoint(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)

    def fail(folder: Path, checkpoint: Path) -> dict[str, Any]:
        (folder / "file").write_text("half")
        checkpoint.write_text("step 7")
        raise FileNotFoundError(2, "No such corpus", "corpus.txt")

    with pytest.raises(FileNotFoundError, match=r"No such corpus: 'corpus\.txt'"):
        cache.get("plugin", IDENTITY, fail)
    assert cache.find("plugin", IDENTITY) is None
    assert [path.name for path in (tmp_path / "partial").iterdir()] == [f"{cache.key('plugin', IDENTITY)}.pt"]

    def resume(folder: Path, checkpoint: Path) -> dict[str, Any]:
        return {"from": checkpoint.read_text()}

    assert cache.get("plugin", IDENTITY, resume).meta == {"from": "step 7"}
    assert not list((tmp_path / "partial").iterdir())


def test_artifacts_may_need_artifacts(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path)

    def outer(folder: Path, checkpoint: Path) -> dict[str, Any]:
        return {"inner": cache.get("pretrained", IDENTITY, maker()).key}

    assert cache.get("plugin", IDENTITY, outer).meta == {"inner": cache.key("pretrained", IDENTITY)}


@pytest.mark.parametrize("content", [b"", b'{"made": {"st', b"[]", b"{}", b"\xff"])
def test_a_torn_artifact_is_named(tmp_path: Path, content: bytes) -> None:
    cache = ArtifactCache(tmp_path)
    artifact = cache.get("plugin", IDENTITY, maker())
    (artifact.folder / META_FILE).write_bytes(content)
    with pytest.raises(BenchError, match=f"{artifact.key} cannot be read .*Remove it"):
        cache.get("plugin", IDENTITY, never)


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match=r"cannot write the artifact cache .*BENCH_CACHE"):
        ArtifactCache(tmp_path / "file" / "cache").get("plugin", IDENTITY, maker())


def test_a_read_only_folder_says_so(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out" / "said"
    for folder, mode in ((root, 0o555), (out.parent, 0o777)):
        folder.mkdir()
        folder.chmod(mode)
    for parent in (tmp_path, *tmp_path.parents):
        if not parent.name.startswith(("pytest-", "popen-", "test_")):
            break
        parent.chmod(0o755)
    assert finish(start(unprivileged, root, out)) == [0]
    cache, deep, flat, lock = json.loads(out.read_text())
    assert cache.startswith(f"MachineError: cannot write the artifact cache {root}: Permission denied")
    assert deep.startswith(f"MachineError: cannot write {root / 'runs' / 'x.json'}: Permission denied")
    assert flat.startswith(f"MachineError: cannot write {root / 'x.json'}: Permission denied")
    assert lock.startswith(f"MachineError: cannot write {root / 'locks'}: Permission denied")
