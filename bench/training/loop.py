"""The one training loop: resumable to the step, in bf16 where asked, the same batches again under the same seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.errors import Diverged
from bench.training import parallel
from bench.training.bf16 import quick_bf16

Precision = Literal["fp32", "bf16"]

Trained = Iterable[nn.Parameter] | Sequence["Group"]
"""What is trained: parameters, or groups of them that differ in their rates."""


@dataclass(frozen=True)
class Group:
    """Parameters with a rate of their own.

    Attributes
    ----------
    parameters
        What is trained.
    lr_scale
        Factor of the schedule's learning rate.
    weight_decay
        AdamW's weight decay; the schedule's by default.
    """

    parameters: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes
    ----------
    steps
        Optimiser steps.
    lr
        Peak learning rate of AdamW.
    warmup
        Steps of linear warm-up.
    decay
        ``"linear"`` to zero, ``"cosine"`` to zero, or ``"constant"``.
    weight_decay, clip
        AdamW's weight decay and the largest gradient norm.
    precision
        ``"bf16"`` runs forward passes under autocast; weights and optimiser stay in fp32.
    """

    steps: int
    lr: float
    warmup: int = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: Precision = "bf16"

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate at ``step`` (0-based)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.decay == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass
class Checkpoint:
    """Where an unfinished training is kept, and how often.

    Attributes
    ----------
    path
        File to write, replaced whole each time.
    every_seconds
        Least time between two writes.
    """

    path: Path
    every_seconds: float = 60.0

    def load(self, trained: Sequence[Tensor]) -> dict[str, Any] | None:
        """Return the saved state, or ``None`` if there is none or it is no state of ``trained``."""
        try:
            state: dict[str, Any] = torch.load(self.path, weights_only=True, map_location="cpu")
            if [saved.shape for saved in state["parameters"]] == [parameter.shape for parameter in trained]:
                return state
        except FileNotFoundError:
            return None
        except Exception:  # whatever torch raises for a torn or foreign file, which only costs the steps that it held
            pass
        self.path.unlink(missing_ok=True)
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state`` so that a kill leaves the old file or the new one."""
        temporary = self.path.with_suffix(".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, temporary)
            temporary.replace(self.path)
        except (OSError, RuntimeError):  # a full disk must not end a training that it only makes safer
            temporary.unlink(missing_ok=True)


def train(
    losses: Callable[[int], tuple[Tensor, dict[str, float]]],
    parameters: Trained,
    schedule: Schedule,
    *,
    seed: int,
    device: torch.device,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint: Checkpoint | None = None,
    log_every: int = 10,
) -> list[dict[str, float]]:
    """Train ``parameters`` and return the history.

    Parameters
    ----------
    losses
        Step -> (loss to minimise, its named parts). A function of the step alone but for weights and dropout, so that a
        resumed training sees the batches that an uninterrupted one would. Of several processes
        (`bench.training.parallel`) each returns what it adds to either.
    parameters
        What is trained.
    schedule
        Steps, rates, precision.
    seed
        Seeds dropout.
    device
        Where the model is.
    on_step
        Called after each step with its number (1-based) and loss parts.
    checkpoint
        Where to resume from and save to; removed by whoever stores the finished weights.
    log_every
        Steps between records of the history.

    Returns
    -------
    list of dict
        Records with ``step``, ``lr``, ``loss`` and the parts, averaged since the last record.

    Raises
    ------
    Diverged
        If the loss becomes NaN or infinite.
    """
    groups = _groups(parameters)
    trained = [parameter for group in groups for parameter in group.parameters]
    decays = [schedule.weight_decay if group.weight_decay is None else group.weight_decay for group in groups]
    optimizer = torch.optim.AdamW(
        [{"params": group.parameters, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)],
        lr=schedule.lr,
        fused=True,
    )
    ranks = parallel.current()
    torch.manual_seed(ranks.seed(seed) if ranks else seed)
    history: list[dict[str, float]] = []
    first = 0
    if checkpoint and (state := checkpoint.load(trained)):
        first, history = int(state["step"]), list(state["history"])
        for parameter, saved in zip(trained, state["parameters"], strict=True):
            parameter.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        _set_random(state, ranks, device)
    if ranks:
        ranks.must_agree(first, "the step that training goes on from")
        ranks.start_alike(trained)
    bf16 = schedule.precision == "bf16"
    quick = quick_bf16(device) if bf16 else nullcontext()
    saved_at = time.monotonic()
    sums: dict[str, float] = {}
    for step in range(first, schedule.steps):
        for group, own in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = schedule.lr * schedule.factor(step) * own.lr_scale
        with quick, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss, parts = losses(step)
        value = loss.item()
        if ranks:
            value, *numbers = ranks.total([value, *parts.values()])
            parts = dict(zip(parts, numbers, strict=True))
        if not math.isfinite(value):
            raise Diverged(f"the loss became {value} at step {step + 1} of {schedule.steps} (lr {schedule.lr:g})")
        optimizer.zero_grad(set_to_none=True)
        with quick:
            loss.backward()
        if ranks:
            ranks.sum_gradients(trained)
        nn.utils.clip_grad_norm_(trained, schedule.clip)
        optimizer.step()
        for name, number in {"loss": value, **parts}.items():
            sums[name] = sums.get(name, 0.0) + number
        done = step + 1
        if done % log_every == 0 or done == schedule.steps:
            since = done - (int(history[-1]["step"]) if history else 0)
            record = {name: total / since for name, total in sums.items()}
            history.append({"step": float(done), "lr": optimizer.param_groups[0]["lr"], **record})
            sums = {}
            # only at a record's boundary, so that the averages of a resumed history are the same
            if checkpoint and done < schedule.steps:
                due = time.monotonic() - saved_at > checkpoint.every_seconds
                if ranks.decided(due) if ranks else due:
                    saved_at = time.monotonic()
                    state = _state(done, trained, optimizer, history, device, ranks)
                    if not ranks or ranks.main:
                        checkpoint.save(state)
        if on_step:
            on_step(done, {"loss": value, **parts})
    return history


def _groups(trained: Trained) -> list[Group]:
    given = list(trained)
    own = [item for item in given if isinstance(item, Group)]
    return own or [Group([item for item in given if isinstance(item, nn.Parameter)])]


def _state(
    step: int,
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    device: torch.device,
    ranks: parallel.Ranks | None,
) -> dict[str, Any]:
    state: dict[str, Any] = {
        "step": step,
        "parameters": [p.detach() for p in trained],
        "optimizer": optimizer.state_dict(),
        "history": history,
        "rng": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    if ranks:
        state["ranks"] = {name: ranks.gather(state[name]) for name in ("rng", "cuda_rng") if name in state}
    return state


def _set_random(state: dict[str, Any], ranks: parallel.Ranks | None, device: torch.device) -> None:
    """Go on with the dropout that a checkpoint was in; a rank that it does not know stays with its seed."""
    if ranks and not ranks.main:
        known = state.get("ranks", {})
        state = {name: each[ranks.rank] for name, each in known.items() if ranks.rank < len(each)}
    if "rng" in state:
        torch.set_rng_state(state["rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], device)
