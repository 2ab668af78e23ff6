"""File locks that say when they wait. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from bench.errors import MachineError


@contextmanager
def hold(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock at ``path`` for a ``with`` block; ``waiting`` is called once if somebody else has it.

    The operating system frees the lock when its holder dies, however it dies.

    Raises
    ------
    MachineError
        If the lock's folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
    except OSError as error:
        raise MachineError(f"cannot write {path.parent}: {error.strerror or error}. Choose another folder.") from error
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Return whether a living process holds the lock at ``path``."""
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False
