"""A stored result that was damaged is put aside with a message, and its cell is run again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.cell import Cell, Surroundings
from bench.errors import BenchError
from bench.launch.plan import plan
from bench.progress import Silent
from bench.results import ResultStore
from bench.runner import run
from tests.checkpoints import quick_config, task_file, tiny_checkpoint


class Heard(Silent):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[ResultStore, Cell, Surroundings]:
    at = tmp_path_factory.mktemp("dense")
    config = quick_config(task_file(at / "task"), tiny_checkpoint(at / "tiny", "bert"), method="dense")
    where, store = Surroundings(cache_dir=at / "cache", device="cpu"), ResultStore(at / "results", "study")
    run(config, store, where)
    return store, Cell.resolve(config, where), where


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content.replace(b'"status": "done"', b'"status": "donne"'),
        lambda content: content.replace(b'"run_id": "', b'"run_id": "f'),
        lambda content: b"\x80\x04\x95 a pickle",
    ],
)
def test_a_damaged_result_is_put_aside_and_run_again(
    dense: tuple[ResultStore, Cell, Surroundings], damage: Callable[[bytes], bytes]
) -> None:
    store, cell, where = dense
    path, before = store.path(cell.run_id), store.read(cell.run_id)
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    aside = len(list((store.folder / "quarantine").glob("*")))

    [planned] = plan([cell.config], store, where)
    assert planned.state == "to do" and "is not a valid result" in planned.reason
    assert path.read_bytes() == damaged, "a plan changes nothing"
    with pytest.raises(BenchError, match="is not a valid result"):
        run(cell.config, store, where, "read-only")
    assert path.read_bytes() == damaged

    heard = Heard()
    again = run(cell.config, store, where, progress=heard)
    assert before and again.status == "done" and again.evaluations == before.evaluations
    kept = store.folder / "quarantine" / f"{cell.run_id}-{aside + 1}.json"
    assert kept.read_bytes() == damaged
    assert len([m for m in heard.messages if str(kept) in m and "is run again" in m]) == 1
    assert store.read(cell.run_id) == again


def test_a_result_of_a_newer_version_is_left_where_it_is(dense: tuple[ResultStore, Cell, Surroundings]) -> None:
    store, cell, where = dense
    path = store.path(cell.run_id)
    content = path.read_bytes()
    newer = content.replace(b'"schema_version": 1', b'"schema_version": 2')
    path.write_bytes(newer)
    with pytest.raises(BenchError, match=r"schema_version is 2.*Update this library"):
        run(cell.config, store, where)
    assert path.read_bytes() == newer
    path.write_bytes(content)
