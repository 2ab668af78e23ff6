"""A sweep's teacher and plugins as folders that can be served and sent: a transformers checkpoint and a folder a k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.cell import Cell, Surroundings
from bench.errors import BenchError
from bench.execution import rebuild
from bench.plugins.plugin import Plugin
from bench.progress import Progress

MODEL_FOLDER = "model"


def export(cells: Sequence[Cell], where: Surroundings, out: Path, progress: Progress | None = None) -> list[Path]:
    """Write the teacher with its tokenizer to ``out/model``, and each plugin to ``out/k<k>``.

    Parameters
    ----------
    cells
        Runs of Variator of one teacher that differ in their ratio alone; what of them was never trained is trained.
    where
        Data, cache and device.
    out
        A folder that does not exist yet, or is empty.
    progress
        Who watches what is trained.

    Returns
    -------
    list
        The folders.

    Raises
    ------
    BenchError
        If there is something in ``out``.
    """
    if out.exists() and any(out.iterdir()):
        raise BenchError(f"{out} is not empty; name a folder that does not exist yet")
    folders: list[Path] = []
    for cell in cells:
        ctx, teacher, _ = rebuild(cell, where, progress)
        if not folders:
            folders.append(out / MODEL_FOLDER)
            teacher.model.model.save_pretrained(folders[0])
            ctx.tokenizer.save_pretrained(folders[0])
        artifact = ctx.cache.find("plugin", ctx.identity)
        if artifact is None:
            raise BenchError(f"{cell.config.label} made no plugin")
        folders.append(out / f"k{int(cell.config.ratio or 1)}")
        Plugin.from_pretrained(artifact.folder).save_pretrained(folders[-1])
    return folders
