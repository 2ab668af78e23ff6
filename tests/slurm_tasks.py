"""What the tests' own Slurm runs in place of a cell's task: the same cell, measured quickly, and paused where told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.launch.slurm_task import CellTask


@dataclass(frozen=True)
class QuickTask(CellTask):
    """Notes each step of the training ``adapt`` in ``steps`` beside the results, and keeps a checkpoint at every tenth.

    It waits at the step that the file ``pause`` names, for as long as it names it.
    """

    def __call__(self) -> None:
        from bench.training import loop, stage
        from tests.workers import quick_measuring

        quick_measuring()
        train, folder = loop.train, self.store.root.parent

        def watched(*args: Any, on_step: Callable[..., None], checkpoint: loop.Checkpoint, **kwargs: Any) -> Any:
            checkpoint.every_seconds = 0.0

            def step(number: int, parts: dict[str, float]) -> None:
                on_step(number, parts)
                if checkpoint.path.name.startswith("plugin-"):
                    note(folder, number)

            return train(*args, on_step=step, checkpoint=checkpoint, **kwargs)

        with patch.object(stage, "train", watched):
            super().__call__()


def note(folder: Path, step: int) -> None:
    with (folder / "steps").open("a") as file:
        file.write(f"{step}\n")
    pause = folder / "pause"
    while pause.exists() and pause.read_text() == str(step):
        time.sleep(0.05)
