"""Students are kept as what they do not share with their teacher, and come back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.backbones.sites import digest
from bench.backbones.surgery import Structure
from bench.backbones.write_out import write_out, written_encoder
from bench.errors import BackboneError
from bench.training.student import WEIGHTS_FILE, changed, get_student, own_copy, smaller
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint, tokens

INPUTS = {"input_ids": tokens(2, 7)}
LEFT = Structure((1,), ((0, 3),), ((1, 2, 3),))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_made_once_and_comes_back(family: Family, tmp_path: Path) -> None:
    config = quick_config(task_file(tmp_path / "task"), tiny_checkpoint(tmp_path / family, family), method="dense")
    answers, made = [], []
    for _ in range(2):
        ctx = context(config, tmp_path / "cache")
        teacher = get_teacher(ctx)
        before = digest(teacher.model)

        def make(checkpoint: Path, model: Any = teacher.model) -> tuple[Any, dict[str, Any]]:
            student = smaller(model, LEFT)
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.add_(0.01)
            made.append(student.eval()(**INPUTS).logits.detach())
            return student, {"structure": LEFT.to_json(), "stages": []}

        student = get_student(
            teacher,
            ctx,
            lambda notes, model=teacher.model: smaller(model, Structure.from_json(notes["structure"])),
            make,
        )
        assert not student.training and not any(p.requires_grad for p in student.parameters())
        assert digest(teacher.model) == before and ctx.bytes_added > 0
        answers.append(student(**INPUTS).logits)
    assert len(made) == 1 and torch.equal(*answers)
    torch.testing.assert_close(answers[0], made[0], rtol=1e-5, atol=1e-5)
    (weights,) = (tmp_path / "cache").glob(f"student-*/{WEIGHTS_FILE}")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BackboneError, match="Remove the folder, and the next run makes it again"):
        get_student(teacher, ctx, lambda notes: smaller(teacher.model, LEFT), make)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_differs_is_kept(family: Family, tmp_path: Path) -> None:
    config = quick_config(task_file(tmp_path / "task"), tiny_checkpoint(tmp_path / family, family), method="dense")
    teacher = get_teacher(context(config, tmp_path / "cache")).model
    assert changed(write_out(teacher), teacher) == {}
    copy = own_copy(teacher)
    assert len(changed(copy, teacher)) == len(list(teacher.parameters()))
    assert all(p.requires_grad for p in copy.parameters())
    torch.testing.assert_close(copy(**INPUTS).logits, teacher(**INPUTS).logits, atol=1e-5, rtol=1e-5)
    assert len(written_encoder(smaller(teacher, LEFT)).layers) == 1


def test_a_stage_may_have_left_its_outcome_elsewhere(tmp_path: Path) -> None:
    config = quick_config(task_file(tmp_path / "task"), tiny_checkpoint(tmp_path / "bert", "bert"), method="dense")
    ctx = context(config, tmp_path / "cache")
    teacher = get_teacher(ctx)
    common = {"steps": 1, "examples": 8, "flops": 1.0, "seconds": 0.0, "history": []}
    first = {"name": "first", "artifact": "structure-0", "cached": True, **common}
    notes = {"stages": [first, {"name": "second", **common}]}
    get_student(teacher, ctx, lambda _: own_copy(teacher.model), lambda _: (own_copy(teacher.model), notes))
    key = ctx.cache.key("student", ctx.identity)
    assert [(s.artifact, s.cached) for s in ctx.stages[1:]] == [("structure-0", True), (key, False)]
