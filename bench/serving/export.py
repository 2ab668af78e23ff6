"""A sweep's teacher and plugins as folders that can be served and sent: a transformers checkpoint and a folder a k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

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
    out.parent.mkdir(parents=True, exist_ok=True)
    # beside it until all is there: half of it would pass for the whole
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        made = Path(scratch) / out.name
        names = [_write(cell, where, made, progress) for cell in cells]
        made.rename(out)
    return [out / MODEL_FOLDER, *(out / name for name in names)]


def _write(cell: Cell, where: Surroundings, out: Path, progress: Progress | None) -> str:
    """Write the plugin of a cell, and the teacher if it is not there; return the name of the plugin's folder."""
    ctx, teacher, _ = rebuild(cell, where, progress)
    folder = out / MODEL_FOLDER
    if not folder.exists():
        model = teacher.model.model
        if cell.spec.family == "bert" and cell.task.is_classification:
            model.config.id2label = dict(enumerate(cell.task.labels))
            model.config.label2id = {label: number for number, label in enumerate(cell.task.labels)}
        model.save_pretrained(folder)
        ctx.tokenizer.save_pretrained(folder)
    artifact = ctx.cache.find("plugin", ctx.identity)
    if artifact is None:
        raise BenchError(f"{cell.config.label} made no plugin")
    name = f"k{int(cell.config.ratio or 1)}"
    Plugin.from_pretrained(artifact.folder).save_pretrained(out / name)
    return name
