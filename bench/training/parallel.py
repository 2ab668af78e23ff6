"""Several processes that train one model together: which one this is, and what is summed over all of them.

Every process (a rank, in torch's word) holds the same parameters and draws the same batches, of each of which it takes
its part. The loss of a step is the sum over the ranks of what each has of it, and so is its gradient; every rank then
takes the same optimiser step. Nothing is wrapped in ``DistributedDataParallel``, which overlaps that sum with the
backward pass of one module whose forward it owns: a loss here is a closure over several modules that share weights, of
which only some learn.

A mean over examples is the sum of the ranks' means weighted by their examples, which `bench.training.stage` sees to. A
loss that is a mean over something else, or needs a statistic of the whole batch, says so by `of_all` and `average`;
alone, both return what they are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.errors import MachineError

BUCKET = 1 << 24
"""Numbers that are summed at once: enough to keep the links busy, little beside a model."""

SEED_STRIDE = 1_000_003
"""Between the seeds of two ranks' dropout, so that no rank draws what another run's first one draws."""

_ranks: Ranks | None = None
_share: float | None = None


@dataclass(frozen=True)
class Ranks:
    """The processes of this run; `current` returns them.

    Attributes
    ----------
    rank, size
        Which one this is, from 0, and how many there are.
    device
        Where this one computes.
    sharded
        Whether a frozen backbone lies in parts on all of them (`bench.training.sharding`).
    """

    rank: int
    size: int
    device: torch.device
    sharded: bool = False

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def part(self, count: int) -> tuple[slice, float]:
        """Return which of ``count`` examples this rank takes, and their share of all.

        Where there are fewer examples than ranks, some take the first one with a share of 0: all must run, since all
        take part in every sum.
        """
        first, last = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return (slice(first, last), (last - first) / count) if first < last else (slice(0, 1), 0.0)

    def seed(self, seed: int) -> int:
        """Return the seed of this rank's dropout."""
        return seed + SEED_STRIDE * self.rank

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all ranks."""
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def decided(self, flag: bool) -> bool:
        """Return the main rank's ``flag``."""
        return self.total([float(flag and self.main)]) > [0.0]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, on the CPU; they are of one shape."""
        own = tensor.to(self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [each.cpu() for each in found]

    def must_agree(self, number: int, what: str) -> None:
        """Raise unless all ranks give the same number.

        Raises
        ------
        MachineError
            If they do not.
        """
        if len({int(each) for each in self.gather(torch.tensor(number))}) > 1:
            raise MachineError(
                f"the processes of this run do not agree on {what}. They need the same code, data and cache folder: "
                "on several machines, a --cache-dir that all of them share."
            )

    @torch.no_grad()
    def start_alike(self, parameters: Sequence[Tensor]) -> None:
        """Give every rank the main one's values, also where their arithmetic had differed in a bit."""
        sizes = [size for parameter in parameters for size in (-1, *parameter.shape)]
        self.must_agree(hash(tuple(sizes)) % (1 << 62), "the shape of what is trained")
        for bucket in _buckets(parameters):
            flat = torch.cat([parameter.reshape(-1) for parameter in bucket])
            dist.broadcast(flat, 0)
            for parameter, values in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.copy_(values.view_as(parameter))

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their sums over all ranks; one that no rank has stays away, as it does alone."""
        for bucket in _buckets(parameters):
            lacking = [parameter.grad is None for parameter in bucket]
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            given = torch.tensor([0.0 if none else 1.0 for none in lacking], dtype=parts[0].dtype)
            flat = torch.cat([part.reshape(-1) for part in parts] + [given.to(parts[0].device)])
            dist.all_reduce(flat)
            *sums, counts = flat.split([*(p.numel() for p in bucket), len(bucket)])
            there = (counts > 0).tolist() if any(lacking) else [True] * len(bucket)
            for parameter, total, known in zip(bucket, sums, there, strict=True):
                parameter.grad = total.view_as(parameter) if known else None


def _buckets(parameters: Sequence[Any]) -> Iterator[list[Any]]:
    """Yield parameters in order, as many at a time as are summed at once."""
    bucket: list[Any] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > BUCKET
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def current() -> Ranks | None:
    """Return the processes of this run, or ``None`` where there is but this one."""
    return _ranks


def writes() -> bool:
    """Return whether this process is the one whose files are kept."""
    return _ranks is None or _ranks.main


def set_current(ranks: Ranks | None) -> None:
    """Say which processes train together from now on; their process group is there."""
    global _ranks
    _ranks = ranks


@contextmanager
def working_on(share: float) -> Iterator[None]:
    """Compute the loss of a part of a batch, ``share`` of its examples, for the length of a ``with`` block."""
    global _share
    _share = share
    try:
        yield
    finally:
        _share = None


class _Sum(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def average(values: Tensor, rows: Tensor) -> Tensor:
    """Return the mean over the whole batch of which ``values`` is the mean over this rank's rows.

    Parameters
    ----------
    values
        Any shape; a gradient passes through.
    rows
        What was averaged over: the sum says how many rows there are, or how much this rank's weigh.
    """
    if _share is None:
        return values
    weight, total = _weighed(rows)
    found: Tensor = _Sum.apply(values * (weight / total).to(values.dtype))  # type: ignore[no-untyped-call]
    return found


def of_all(loss: Tensor, rows: Tensor) -> Tensor:
    """Return a mean loss over this rank's rows in such units that the ranks' make up the mean over all rows.

    Parameters
    ----------
    loss
        Any shape.
    rows
        As for `average`. A mean over examples needs no correction.
    """
    if _share is None:
        return loss
    weight, total = _weighed(rows)
    return loss * (weight / total / _share).to(loss.dtype) if _share else loss


def _weighed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of this rank's rows, 0 where it only runs along, and that of all."""
    weight = rows.detach().sum(dtype=torch.float64) * bool(_share)
    total = weight.clone()
    dist.all_reduce(total)
    return weight, total
