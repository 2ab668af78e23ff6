"""``bench status`` tells how far a study is, and names every run that is not done, its file where that is torn."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.cli import main
from bench.config import RunConfig
from bench.locks import hold
from bench.provenance import collect
from bench.results import ResultStore, RunResult, Status


def put(store: ResultStore, number: int, status: Status, reason: str | None = None) -> Path:
    config = RunConfig.build({"task": "sst2", "ratio": 4, "seed": number}).model_dump(mode="json")
    return store.write(
        RunResult(
            run_id=f"{number:016x}",
            study=store.study,
            status=status,
            reason=reason,
            config=config,
            identity={},
            provenance=collect([]),
        )
    )


def status(*words: str | Path) -> tuple[int, list[str], str]:
    done = CliRunner().invoke(main, ["status", *map(str, words)])
    return done.exit_code, done.stdout.splitlines(), done.stderr


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "results", "glue")


def test_counts_and_reasons(store: ResultStore) -> None:
    put(store, 1, "done")
    put(store, 2, "done")
    put(store, 3, "failed", "ValidationError: 1 error\n  lr is wrong")
    put(store, 4, "running")
    put(store, 5, "running")
    put(store, 6, "interrupted", "stopped by the user")
    torn = put(store, 7, "done")
    torn.write_bytes(torn.read_bytes()[:99])
    (torn.parent / ".0000000000000008.json.x.tmp").write_text("half of a res")
    with hold(store.lock_path(f"{5:016x}")):
        code, lines, _ = status("glue", "--results", store.root)
    assert code == 0
    study, _, counts = lines[0].partition(": ")
    assert study == "glue"
    assert set(counts.split(", ")) == {"2 done", "1 failed", "2 interrupted", "1 running", "1 unreadable"}
    label = "sst2 · minilm-l6 · variator k=4 · seed"
    assert f"  failed: {label} 3 (0000000000000003): ValidationError: 1 error lr is wrong" in lines
    assert f"  interrupted: {label} 4 (0000000000000004)" in lines
    assert f"  running: {label} 5 (0000000000000005)" in lines
    assert f"  interrupted: {label} 6 (0000000000000006): stopped by the user" in lines
    [unreadable] = [line for line in lines if line.startswith("  unreadable: ")]
    assert str(torn) in unreadable
    assert len(lines) == 6


def test_every_study_is_told_of(store: ResultStore) -> None:
    put(store, 1, "done")
    put(ResultStore(store.root, "pilot"), 1, "done")
    (store.root / "notes").mkdir()
    assert status("--results", store.root) == (0, ["glue: 1 done", "pilot: 1 done"], "")


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_study_that_is_not_there_names_the_nearest(store: ResultStore, command: str) -> None:
    put(store, 1, "done")
    done = CliRunner().invoke(main, [command, "gleu", "--results", str(store.root)])
    assert done.exit_code == 2
    assert "no study 'gleu'" in done.stderr and "Did you mean 'glue'" in done.stderr


def test_where_there_is_nothing_it_says_how_to_begin(tmp_path: Path) -> None:
    code, _, err = status("--results", tmp_path / "nothing")
    assert code == 2 and "`bench sweep quickstart` makes one" in err
