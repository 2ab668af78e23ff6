"""One holder at a time, who is waited for and whose death frees the lock."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.locks import hold, is_held
from tests.workers import hold_lock, start, wait_for


def test_held_for_the_length_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.lock"
    assert not is_held(path)
    with hold(path):
        assert is_held(path)
    assert not is_held(path)


def test_freed_by_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), hold(tmp_path / "x.lock"):
        raise KeyError
    assert not is_held(tmp_path / "x.lock")


def test_the_second_waits_and_says_so_once(tmp_path: Path) -> None:
    path, order = tmp_path / "x.lock", []
    waits = threading.Event()

    def second() -> None:
        with hold(path, lambda: (order.append("waiting"), waits.set())):
            order.append("second")

    thread = threading.Thread(target=second)
    with hold(path, lambda: order.append("never")):
        thread.start()
        assert waits.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["waiting", "first", "second"]


def test_death_of_the_holder_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    process = start(hold_lock, path, tmp_path / "held")
    wait_for((tmp_path / "held").exists, process)
    assert is_held(path)
    process.kill()
    process.join()
    assert not is_held(path)
    with hold(path, lambda: pytest.fail("waited for the dead")):
        pass


def test_asking_does_not_take_it(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    path.touch()
    assert not is_held(path)
    with hold(path, lambda: pytest.fail("is_held kept the lock")):
        assert is_held(path) and is_held(path)


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BenchError, match=r"cannot write .*file/locks"), hold(tmp_path / "file" / "locks" / "x.lock"):
        pass
