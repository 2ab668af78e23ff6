"""What is exported answers, loaded from its folders alone, as the runs that it was made of."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from bench.backbones.model import TaskModel
from bench.cell import Cell, Surroundings
from bench.cli import main
from bench.context import RunContext
from bench.errors import BenchError
from bench.execution import rebuild
from bench.serving.export import export
from bench.serving.resident import ResidentModel
from bench.tasks.catalogue import resolve_task
from bench.tasks.evaluation import MODEL_INPUTS
from bench.tasks.features import collate
from tests.bench_command import tiny_sweep
from tests.checkpoints import FAMILIES, Family, quick_config, task_file, tiny_checkpoint


def exported(folder: Path, family: Family, **settings: Any) -> tuple[list[Cell], Surroundings, ResidentModel]:
    """Train a tiny teacher with plugins for k = 2 and 4, and load what is written of them."""
    backbone, task = tiny_checkpoint(folder / family, family), task_file(folder / "task")
    where = Surroundings(cache_dir=folder / "cache", device="cpu")
    given = {"task": str(task), "backbone": str(backbone), "method": "variator", **settings}
    cells = [Cell.resolve(quick_config(**given, ratio=k), where) for k in (2, 4)]
    folders = export(cells, where, folder / "served")
    assert [path.name for path in folders] == ["model", "k2", "k4"]
    model, *plugins = map(str, folders)
    return cells, where, ResidentModel(model, plugins, resolve_task(str(task)), "cpu")


def logits(ctx: RunContext, model: TaskModel) -> Tensor:
    """Return what a model makes of the dev split."""
    batch = collate(ctx.features["dev"], ctx.tokenizer.pad_token_id)
    with torch.inference_mode():
        return model(**{name: batch[name] for name in MODEL_INPUTS if name in batch}).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_folders_alone_answer_as_the_runs_did(tmp_path: Path, family: Family, lora: bool) -> None:
    cells, where, resident = exported(tmp_path, family, teacher_lora=lora)
    assert resident.ks == (1, 2, 4)
    seen = []
    for k, cell in ((1, cells[0]), (2, cells[0]), (4, cells[1])):
        ctx, teacher, model = rebuild(cell, where)
        expected = logits(ctx, (teacher.model if k == 1 else model).eval())
        replies = resident.answer(k, ctx.features["dev"])
        torch.testing.assert_close(logits(ctx, resident.model), expected, rtol=1e-5, atol=1e-6)
        assert [reply["label"] for reply in replies] == [ctx.task.labels[i] for i in expected.argmax(1).tolist()]
        seen.append(expected)
    assert not any(torch.allclose(one, other, atol=1e-6) for one, other in combinations(seen, 2))


def test_what_is_written_names_the_classes(tmp_path: Path) -> None:
    _, _, resident = exported(tmp_path, "bert")
    assert resident.model.model.config.id2label == dict(enumerate(resident.task.labels))


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cells, where, _ = exported(tmp_path, "bert")
    given = {name: getattr(cells[0].config, name) for name in ("task", "backbone")}
    none = Cell.resolve(quick_config(**given, method="dense"), where)
    with pytest.raises(BenchError, match="made no plugin"):
        export([cells[0], none], where, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".again")]


def command(*words: object, at: Path) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words), "--cache-dir", str(at / "cache"), "--device", "cpu"])


def test_the_command_names_what_it_wrote_and_spares_what_is_there(tmp_path: Path) -> None:
    sweep, out = tiny_sweep(tmp_path, method=["dense", "variator"], ratio=[2, 4]), tmp_path / "served"
    done = command(sweep, out, at=tmp_path)
    assert done.exit_code == 0, done.output
    assert [Path(line) for line in done.stdout.splitlines()] == [out / "model", out / "k2", out / "k4"]
    assert "training: teacher" in done.stderr
    again = command(sweep, out, at=tmp_path)
    assert again.exit_code == 2 and "is not empty" in again.stderr
    assert "training" not in again.stderr


def test_a_sweep_without_plugins_is_refused(tmp_path: Path) -> None:
    done = command(tiny_sweep(tmp_path, method=["dense"]), tmp_path / "served", at=tmp_path)
    assert done.exit_code == 2 and "no cell of variator" in done.stderr
