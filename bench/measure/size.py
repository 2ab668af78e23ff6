"""How big a model is: parameters, and bytes on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from bench.errors import BenchError


def count_parameters(tensors: Iterable[Tensor]) -> int:
    """Count the numbers in ``tensors``, those that share memory once.

    Parameters
    ----------
    tensors
        E.g. ``model.parameters()``, or those of them that are trained.
    """
    return sum(tensor.numel() for tensor in _distinct(tensors))


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of ``tensors``, each number in its own type and those that share memory once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _distinct(tensors))


def _distinct(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return {(tensor.data_ptr() or id(tensor), tensor.numel()): tensor for tensor in tensors}.values()


def bytes_on_disk(path: Path | str) -> int:
    """Add up the bytes of a file, or of every file in a folder; links are followed, and a file counts once.

    Raises
    ------
    BenchError
        If there is nothing at ``path``.
    """
    path = Path(path)
    if not path.exists():
        raise BenchError(f"{path} cannot be measured: there is no such file or folder")
    stats = [file.stat() for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum({(s.st_dev, s.st_ino): s.st_size for s in stats}.values())
