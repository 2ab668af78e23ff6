"""Every loss part against numbers worked out one element at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.backbones.model import TaskOutput
from bench.errors import ConfigError
from bench.tasks.spec import Kind
from bench.training.losses import distillation_losses, task_loss
from bench.training.mix import HIDDEN_PARTS, PARTS, parse_mix

B, N, D, LAYERS = 3, 5, 4, 2
LENGTHS = [5, 2, 3]
MASK = torch.arange(N) < torch.tensor(LENGTHS).unsqueeze(1)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(seed: int, logits: Tensor | None = None, targets: int = 0) -> TaskOutput:
    hidden = tuple(rand(B, N, D, seed=seed + layer) * (layer + 1) for layer in range(LAYERS))
    decoder = rand(B, targets, D, seed=seed + 50) if targets else None
    return TaskOutput(rand(B, 2, seed=seed + 60) if logits is None else logits, hidden, decoder)


def loss(part: str, kind: Kind | None, student: TaskOutput, teacher: TaskOutput, **kwargs: Any) -> float:
    given = {"labels": {}, **kwargs}
    (value,) = distillation_losses({part: 3.0}, kind, student, teacher, MASK, **given).values()
    assert value.shape == ()
    return value.item()  # parts come without their weight


def relative(student: Tensor, teacher: Tensor, keep: list[tuple[int, int]]) -> float:
    """Squared error over the kept positions, by the variance of the teacher's vectors around their mean."""
    mean = [sum(teacher[b, i, j].item() for b, i in keep) / len(keep) for j in range(D)]
    error = sum((student[b, i, j] - teacher[b, i, j]).item() ** 2 for b, i in keep for j in range(D))
    spread = sum((teacher[b, i, j].item() - mean[j]) ** 2 for b, i in keep for j in range(D))
    return error / spread


REAL = [(b, i) for b in range(B) for i in range(LENGTHS[b])]


def test_last_hidden_is_over_real_tokens_in_units_of_the_teachers_variance() -> None:
    student, teacher = outputs(0), outputs(10)
    expected = relative(student.encoder_hidden[-1], teacher.encoder_hidden[-1], REAL)
    assert loss("last_hidden", "single", student, teacher) == pytest.approx(expected, rel=1e-5)


def test_all_hidden_is_the_mean_over_the_layers() -> None:
    student, teacher = outputs(0), outputs(10)
    pairs = zip(student.encoder_hidden, teacher.encoder_hidden, strict=True)
    expected = np.mean([relative(s, t, REAL) for s, t in pairs])
    assert loss("all_hidden", None, student, teacher) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("part", ["last_hidden", "all_hidden"])
def test_the_last_decoder_layer_is_added(part: str) -> None:
    student, teacher = outputs(0, targets=2), outputs(10, targets=2)
    assert student.decoder_hidden is not None and teacher.decoder_hidden is not None
    everywhere = [(b, i) for b in range(B) for i in range(2)]
    expected = relative(student.decoder_hidden, teacher.decoder_hidden, everywhere)
    without = loss(part, "single", outputs(0), outputs(10))
    cloze = {"labels": torch.tensor([0, 1, 0])}
    assert loss(part, "single", student, teacher, labels=cloze) == pytest.approx(without + expected, rel=1e-5)


def test_padded_targets_take_no_part_in_the_decoders_share() -> None:
    student, teacher = outputs(0, targets=4), outputs(10, targets=4)
    assert student.decoder_hidden is not None and teacher.decoder_hidden is not None
    labels = torch.tensor([[7, 1, -100, -100], [7, 8, 9, 1], [1, -100, -100, -100]])
    real = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    expected = relative(student.decoder_hidden, teacher.decoder_hidden, real)
    without = loss("last_hidden", "qa", outputs(0), outputs(10))
    actual = loss("last_hidden", "qa", student, teacher, labels={"labels": labels})
    assert actual == pytest.approx(without + expected, rel=1e-5)


@pytest.mark.parametrize("part", ["last_hidden", "all_hidden"])
def test_padding_takes_no_part_in_a_hidden_loss(part: str) -> None:
    student, teacher = outputs(0), outputs(10)
    before = loss(part, "single", student, teacher)
    for hidden in (*student.encoder_hidden, *teacher.encoder_hidden):
        hidden[~MASK] = 1e6 * torch.randn(int((~MASK).sum()), D)
    assert loss(part, "single", student, teacher) == before


def test_released_hidden_divides_by_every_position() -> None:
    student, teacher = outputs(0, targets=2), outputs(10, targets=2)
    assert student.decoder_hidden is not None and teacher.decoder_hidden is not None
    s, t = student.encoder_hidden[-1], teacher.encoder_hidden[-1]
    encoder = sum((s[b, i] - t[b, i]).square().sum().item() for b, i in REAL) / (B * N * D)
    decoder = (student.decoder_hidden - teacher.decoder_hidden).square().sum().item() / (B * 2 * D)
    assert loss("released_hidden", None, student, teacher) == pytest.approx(encoder + decoder, rel=1e-5)
    s[~MASK] = 1e6
    assert loss("released_hidden", None, student, teacher) == pytest.approx(encoder + decoder, rel=1e-5)


def kl(teacher: Tensor, student: Tensor, temperature: float) -> float:
    p, q = ((x.double() / temperature).exp() for x in (teacher, student))
    p, q = p / p.sum(), q / q.sum()
    return sum(a.item() * math.log(a.item() / b.item()) for a, b in zip(p, q, strict=True)) * temperature**2


@pytest.mark.parametrize("kind", ["single", "pair"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_is_the_divergence_from_the_teacher(kind: Kind, temperature: float) -> None:
    student, teacher = outputs(0), outputs(10)
    expected = np.mean([kl(teacher.logits[b], student.logits[b], temperature) for b in range(B)])
    actual = loss("logits", kind, student, teacher, temperature=temperature)
    assert actual == pytest.approx(expected, rel=1e-4)
    assert loss("logits", kind, teacher, teacher, temperature=temperature) == pytest.approx(0, abs=1e-6)


def test_logits_of_a_regression_is_the_squared_error() -> None:
    student, teacher = outputs(0, logits=torch.tensor([[1.0], [2.0], [4.0]])), outputs(1, logits=torch.zeros(3, 1))
    assert loss("logits", "regression", student, teacher) == pytest.approx((1 + 4 + 16) / 3)


def test_logits_of_spans_is_over_real_positions_for_start_and_end() -> None:
    student, teacher = (outputs(0, logits=rand(B, N, 2, seed=s) * 2) for s in (3, 4))
    rows = [(b, slice(LENGTHS[b]), end) for b in range(B) for end in (0, 1)]
    expected = np.mean([kl(teacher.logits[row], student.logits[row], 2.0) for row in rows])
    labels = {"start_positions": torch.zeros(B).long(), "end_positions": torch.zeros(B).long()}
    actual = loss("logits", "qa", student, teacher, labels=labels, temperature=2.0)
    assert actual == pytest.approx(expected, rel=1e-4)
    student.logits[~MASK] = 500.0
    teacher.logits[~MASK] = -500.0
    assert loss("logits", "qa", student, teacher, labels=labels, temperature=2.0) == pytest.approx(actual, rel=1e-6)


def test_logits_of_text_is_the_mean_over_target_tokens() -> None:
    labels = torch.tensor([[4, 1, -100], [2, -100, -100], [3, 3, 1]])
    student, teacher = (outputs(0, logits=rand(B, 3, 6, seed=s)) for s in (3, 4))
    real = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    expected = np.mean([kl(teacher.logits[at], student.logits[at], 1.0) for at in real])
    assert loss("logits", "qa", student, teacher, labels={"labels": labels}) == pytest.approx(expected, rel=1e-4)


def cross_entropy(logits: Tensor, label: int) -> float:
    odds = logits.double().exp()
    return -math.log((odds[label] / odds.sum()).item())


def test_task_loss_of_each_kind() -> None:
    logits, labels = rand(B, 4, seed=1), torch.tensor([3, 0, 1])
    expected = np.mean([cross_entropy(logits[b], int(labels[b])) for b in range(B)])
    assert task_loss("single", logits, {"labels": labels}).item() == pytest.approx(expected, rel=1e-5)
    student = outputs(0, logits=logits)
    assert loss("task", "pair", student, student, labels={"labels": labels}) == pytest.approx(expected, rel=1e-5)

    numbers = {"labels": torch.tensor([0.5, 2.0, -1.0])}
    assert task_loss("regression", torch.tensor([[1.0], [2.0], [1.0]]), numbers).item() == pytest.approx(4.25 / 3)

    spans = rand(B, N, 2, seed=2)
    starts, ends = torch.tensor([0, 1, 2]), torch.tensor([4, 1, 2])
    both = [(cross_entropy(spans[b, :, 0], int(starts[b])) + cross_entropy(spans[b, :, 1], int(ends[b]))) / 2
            for b in range(B)]  # fmt: skip
    positions = {"start_positions": starts, "end_positions": ends}
    assert task_loss("qa", spans, positions).item() == pytest.approx(np.mean(both), rel=1e-5)

    text, targets = rand(2, 3, 6, seed=3), torch.tensor([[4, 1, -100], [2, -100, -100]])
    tokens = [cross_entropy(text[0, 0], 4), cross_entropy(text[0, 1], 1), cross_entropy(text[1, 0], 2)]
    assert task_loss("qa", text, {"labels": targets}).item() == pytest.approx(np.mean(tokens), rel=1e-5)


def test_parts_of_a_mix_are_computed_and_no_others() -> None:
    student, teacher = outputs(0), outputs(10)
    weights = parse_mix("last_hidden=0.5, logits=2,task=0")
    parts = distillation_losses(weights, "single", student, teacher, MASK, {})
    assert list(parts) == ["last_hidden", "logits"]
    assert list(distillation_losses(weights, None, student, teacher, MASK, {})) == ["last_hidden"]


def test_gradients_reach_the_student_alone() -> None:
    student, teacher = outputs(0), outputs(10)
    for tensor in (*student.encoder_hidden, student.logits):
        tensor.requires_grad_(True)
    parts = distillation_losses({"all_hidden": 1, "logits": 1}, "single", student, teacher, MASK, {})
    torch.stack(list(parts.values())).sum().backward()
    for tensor in student.encoder_hidden:
        assert tensor.grad is not None
        assert tensor.grad[MASK].abs().min() > 0 and not tensor.grad[~MASK].any()
    assert student.logits.grad is not None and student.logits.grad.any()


@pytest.mark.parametrize(
    ("mix", "weights"),
    [
        ("all_hidden=1,logits=1", {"all_hidden": 1.0, "logits": 1.0}),
        (" task = 0.25 , last_hidden", {"task": 0.25, "last_hidden": 1.0}),
        ("released_hidden=1e-2,task=0", {"released_hidden": 0.01}),
    ],
)
def test_a_mix_is_read(mix: str, weights: dict[str, float]) -> None:
    assert parse_mix(mix) == weights


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        ("al_hidden=1", "unknown loss part 'al_hidden'. Did you mean 'all_hidden'"),
        ("logits=much", "number of at least 0, got 'logits=much'"),
        ("logits=-1", "number of at least 0, got 'logits=-1'"),
        ("logits=nan", "got 'logits=nan'"),
        ("logits=inf", "got 'logits=inf'"),
        ("logits=1,logits=2", "'logits' comes twice"),
        ("", "nothing to train on"),
        ("task=0", "nothing to train on"),
    ],
)
def test_a_mix_that_cannot_be_meant_says_why(mix: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mix(mix)
    assert said in str(caught.value)


def test_pre_training_has_hidden_parts_alone() -> None:
    assert set(HIDDEN_PARTS) < set(PARTS)
    with pytest.raises(ConfigError, match=r"unknown loss part 'logits'.*all_hidden, last_hidden, released_hidden"):
        parse_mix("all_hidden=1,logits=1", HIDDEN_PARTS)
