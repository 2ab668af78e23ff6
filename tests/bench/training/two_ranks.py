"""What the tests of `bench.training.parallel` run in two processes that train together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.errors import BenchError
from bench.training.loop import Checkpoint, Schedule, train
from bench.training.parallel import Ranks, average, current, of_all, set_current, working_on
from tests.workers import TwoLayers, tokens

CPU = torch.device("cpu")


class Cut(Exception):
    """Ends a training in the middle."""


def shared(loss_of: Any, count: int) -> Any:
    """Turn a loss of rows ``0 .. count`` into what this rank adds to it, as `run_stage` does."""

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        ranks = current()
        rows, share = ranks.part(count) if ranks else (slice(0, count), 1.0)
        if ranks is None:
            loss = loss_of(step, rows)
        else:
            with working_on(share):
                loss = loss_of(step, rows)
        return loss * share, {"part": loss.item() * share}

    return losses


def trained(count: int, steps: int = 5) -> tuple[Tensor, list[dict[str, float]]]:
    """Train on means over ``count`` examples and over their tokens, and on statistics of the whole batch."""
    torch.manual_seed(3)
    linear, unused = nn.Linear(6, 2), nn.Parameter(torch.ones(3))
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(count, 9, 6, generator=generator)
    mask = torch.arange(9) < torch.randint(1, 9, (count, 1), generator=generator)

    def loss_of(step: int, rows: slice) -> Tensor:
        x, real = inputs[rows] + step, mask[rows]
        y = linear(x)
        per_token = of_all(y[real].square().mean(), real)
        spread = average(x[real].square().mean(), real)
        level = average(y[real].mean(), real)
        return y.mean() + per_token / spread + (level - 1).square()

    schedule = Schedule(steps, 1e-2, weight_decay=0.5, precision="fp32")
    parameters = [*linear.parameters(), unused]
    history = train(shared(loss_of, count), parameters, schedule, seed=0, device=CPU, log_every=1)
    return torch.cat([parameter.detach().flatten() for parameter in parameters]), history


def diverges() -> str:
    """Train until one example, which one rank alone has, gives no number."""
    weight = nn.Parameter(torch.ones(1))
    values = torch.tensor([1.0, 1.0, 1.0, math.nan])
    losses = shared(lambda step, rows: (weight * values[rows][: 2 if step == 2 else 1]).sum(), 4)
    try:
        train(losses, [weight], Schedule(5, 0.1, precision="fp32"), seed=0, device=CPU)
    except BenchError as error:
        return str(error)
    return "it did not"


def with_dropout(checkpoint: Checkpoint | None, cut_at: int = 0) -> tuple[Tensor, list[dict[str, float]]]:
    """Train a plugin with dropout, which each rank draws for itself."""
    model, seen = TwoLayers(), []

    def loss_of(step: int, rows: slice) -> Tensor:
        return (model.student.bert(tokens(4, 6, seed=step)[rows]).last_hidden_state).square().mean()

    def on_step(step: int, _: Any) -> None:
        seen.append(step)
        if step == cut_at:
            raise Cut

    history = train(
        shared(loss_of, 4), model.plugin.parameters(), Schedule(12, 1e-2, precision="fp32"),
        seed=7, device=CPU, on_step=on_step, checkpoint=checkpoint, log_every=3,
    )  # fmt: skip
    weights = torch.cat([p.detach().flatten() for p in model.plugin.parameters()])
    return weights, [*history, {"steps": float(len(seen))}]


def rank(number: int, folder: Path) -> None:
    """Run everything as one of two processes, and save what comes out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=number, world_size=2)
    set_current(Ranks(number, 2, CPU))
    found: dict[str, Any] = {f"of {count}": trained(count) for count in (1, 4, 7)}
    found["diverged"] = diverges()
    found["whole"] = with_dropout(None)
    checkpoint = Checkpoint(folder / "x.pt", every_seconds=0.0)
    try:
        with_dropout(checkpoint, cut_at=8)
    except Cut:
        found["resumed"] = with_dropout(checkpoint)
    try:
        current().must_agree(number, "their number")  # type: ignore[union-attr]
    except BenchError as error:
        found["differ"] = str(error)
    torch.save(found, folder / f"{number}.pt")
    dist.destroy_process_group()
