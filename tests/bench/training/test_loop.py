"""The loop: schedules in closed form, its optimiser against a plain one, and training that is cut short and goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.errors import Diverged
from bench.training.loop import Checkpoint, Group, Schedule, train
from tests.workers import finish, start, train_in_process, train_tiny, wait_for

CPU = torch.device("cpu")


class Cut(Exception):
    """Ends a training in the middle."""


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Schedule(steps=4, lr=1.0), [1, 3 / 4, 2 / 4, 1 / 4]),
        (Schedule(steps=4, lr=1.0, decay="constant"), [1, 1, 1, 1]),
        (Schedule(steps=4, lr=1.0, warmup=3, decay="constant"), [1 / 4, 2 / 4, 3 / 4, 1]),
        (Schedule(steps=6, lr=1.0, warmup=2), [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        (Schedule(steps=4, lr=1.0, decay="cosine"), [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        (Schedule(steps=2, lr=1.0, warmup=2), [1 / 3, 2 / 3]),
    ],
)
def test_schedule(schedule: Schedule, factors: list[float]) -> None:
    assert [schedule.factor(step) for step in range(schedule.steps)] == pytest.approx(factors)


def test_training_is_adamw_with_the_schedule_and_the_clip() -> None:
    def fresh() -> nn.Parameter:
        return nn.Parameter(torch.tensor([3.0, -2.0, 0.5]))

    def loss(parameter: Tensor, step: int) -> Tensor:
        return ((parameter - step) ** 2 * torch.tensor([1.0, 10.0, 100.0])).sum()

    schedule = Schedule(steps=7, lr=0.1, warmup=2, weight_decay=0.3, clip=0.5, precision="fp32")
    actual, plain = fresh(), fresh()
    history = train(lambda step: (loss(actual, step), {}), [actual], schedule, seed=0, device=CPU, log_every=2)

    first, second, values = torch.zeros(3), torch.zeros(3), []
    for step in range(7):
        lr = 0.1 * [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2][step]
        value = loss(plain, step)
        (gradient,) = torch.autograd.grad(value, plain)
        gradient = gradient * min(1.0, 0.5 / gradient.norm().item())
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        plain = (plain * (1 - lr * 0.3) - lr * corrected).detach().requires_grad_(True)
        values.append(value.item())
    torch.testing.assert_close(actual.detach(), plain.detach())
    assert [record["step"] for record in history] == [2, 4, 6, 7]
    assert [record["lr"] for record in history] == pytest.approx([0.1 * 2 / 3, 0.08, 0.04, 0.02])
    means = [sum(values[a:b]) / (b - a) for a, b in ((0, 2), (2, 4), (4, 6), (6, 7))]
    assert [record["loss"] for record in history] == pytest.approx(means)


def test_seed_decides_on_dropout() -> None:
    def once(seed: int) -> list[dict[str, float]]:
        weight = nn.Parameter(torch.ones(64))
        losses = lambda step: (nn.functional.dropout(weight, 0.5).sum(), {})  # noqa: E731
        return train(losses, [weight], Schedule(3, 0.1, precision="fp32"), seed=seed, device=CPU, log_every=1)

    assert once(1) == once(1)
    assert once(1) != once(2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_of_the_forward_pass_alone(precision: str) -> None:
    linear, seen = nn.Linear(4, 4), []

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        out = linear(torch.ones(2, 4))
        seen.append(out.dtype)
        return out.float().square().mean(), {}

    train(losses, linear.parameters(), Schedule(2, 0.1, precision=precision), seed=0, device=CPU)  # type: ignore[arg-type]
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32] * 2
    assert linear.weight.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_training(value: float) -> None:
    weight = nn.Parameter(torch.ones(2))
    steps: list[int] = []

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        return (weight * (value if step == 3 else 1.0)).sum(), {}

    with pytest.raises(Diverged, match=r"loss became (nan|inf) at step 4 of 9 \(lr 0\.01\)"):
        train(losses, [weight], Schedule(9, 0.01), seed=0, device=CPU, on_step=lambda step, _: steps.append(step))
    assert steps == [1, 2, 3]
    assert weight.isfinite().all()


def test_history_averages_every_part_since_the_last_record() -> None:
    weight = nn.Parameter(torch.ones(1))
    losses = lambda step: (weight.sum() * 0 + step, {"part": 10.0 * step})  # noqa: E731
    history = train(losses, [weight], Schedule(5, 0.1, precision="fp32"), seed=0, device=CPU, log_every=2)
    assert [(r["step"], r["loss"], r["part"]) for r in history] == [(2, 0.5, 5.0), (4, 2.5, 25.0), (5, 4.0, 40.0)]


@pytest.mark.parametrize("cut_at", [3, 10, 23])
def test_a_training_that_was_cut_short_ends_as_if_it_had_not_been(tmp_path: Path, cut_at: int) -> None:
    """To the bit: weights, optimiser, dropout and history."""
    weights, history = train_tiny(None)
    checkpoint, steps = Checkpoint(tmp_path / "deep" / "x.pt", every_seconds=0.0), []

    def cut(step: int) -> None:
        steps.append(step)
        if step == cut_at and len(steps) == cut_at:
            raise Cut

    with pytest.raises(Cut):
        train_tiny(checkpoint, cut)
    again, history_again = train_tiny(checkpoint, cut)
    assert steps[cut_at] == cut_at // 3 * 3 + 1  # it went on where the last checkpoint was
    assert history_again == history
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_killed_process_is_continued_by_the_next(tmp_path: Path) -> None:
    checkpoint, steps = tmp_path / "x.pt", tmp_path / "steps"
    process = start(train_in_process, checkpoint, steps, tmp_path / "out", 14)
    wait_for(lambda: steps.exists() and len(steps.read_text().split()) >= 14, process)
    process.kill()
    process.join()
    assert process.exitcode == -9 and not (tmp_path / "out").exists()
    done = len(steps.read_text().split())
    whole = start(train_in_process, tmp_path / "fresh.pt", tmp_path / "fresh", tmp_path / "whole", None)
    assert finish(start(train_in_process, checkpoint, steps, tmp_path / "out", None), whole) == [0, 0]
    assert [int(n) for n in steps.read_text().split()][done:] == list(range(13, 25))
    (weights, history), (expected, expected_history) = (torch.load(tmp_path / name) for name in ("out", "whole"))
    assert history == expected_history
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_torn_checkpoint_costs_only_its_steps(tmp_path: Path, keep: int) -> None:
    path, steps = tmp_path / "x.pt", []
    checkpoint = Checkpoint(path, every_seconds=0.0)
    expected, _ = train_tiny(checkpoint, steps=9)
    path.write_bytes(path.read_bytes()[:keep])
    weights, _ = train_tiny(checkpoint, steps.append, steps=9)
    assert steps == list(range(1, 10))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_checkpoint_of_another_training_costs_nothing(tmp_path: Path) -> None:
    weight, steps = nn.Parameter(torch.ones(3)), []
    checkpoint = Checkpoint(tmp_path / "x.pt", every_seconds=0.0)
    train_tiny(checkpoint, steps=9)
    assert checkpoint.path.exists()
    train(
        lambda step: (weight.sum(), {}), [weight], Schedule(2, 0.1, precision="fp32"), seed=0, device=CPU,
        on_step=lambda step, _: steps.append(step), checkpoint=checkpoint,
    )  # fmt: skip
    assert steps == [1, 2]


def test_a_checkpoint_is_no_code(tmp_path: Path) -> None:
    """A pickle that would run something is not read."""

    class Marker:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"step": Marker()}, tmp_path / "x.pt")
    assert Checkpoint(tmp_path / "x.pt").load([]) is None
    assert not (tmp_path / "ran").exists()


def test_checkpoints_keep_their_distance(tmp_path: Path) -> None:
    train_tiny(Checkpoint(tmp_path / "x.pt", every_seconds=1000.0), steps=9)
    assert not (tmp_path / "x.pt").exists()
    assert Checkpoint(tmp_path / "x.pt").load([]) is None


def test_a_group_has_its_own_rate_and_decay() -> None:
    """AdamW's first step moves every entry by the learning rate, whatever the gradient; decay comes on top."""
    one, ten, decayed = (nn.Parameter(torch.tensor([2.0])) for _ in range(3))
    groups = [Group([one]), Group([ten], lr_scale=10.0), Group([decayed], weight_decay=0.5)]
    schedule = Schedule(steps=1, lr=0.01, clip=1e9, precision="fp32")
    train(lambda step: ((one + 3 * ten + decayed).sum(), {}), groups, schedule, seed=0, device=CPU)
    moved = [2.0 - p.item() for p in (one, ten, decayed)]
    assert moved == pytest.approx([0.01, 0.1, 0.01 + 0.01 * 0.5 * 2.0], rel=1e-4)
