"""Time what switching k costs: the call itself, and the first batch behind it, plain and compiled.

    python benchmarks/switching.py [--rounds 12] [--batch-size 2] [--length 64] [--plain]

Needs no network: all-MiniLM-L6-v2 and bundled film reviews. Plugins are not trained, since the values of weights do
not change what a product costs. Plain and compiled model are timed in turn in one process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import quantile_test
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from bench.config import RunConfig
from bench.costing import full_batch
from bench.measure.latency import no_garbage_collection
from bench.plugins.bank import PluginBank
from bench.plugins.plugin import Plugin
from bench.testing.checkpoints import context

KS = (2, 4, 8)
BATCHES = 4
"""Batches that are timed behind each switch; the first is compared with the mean of the others."""
SELECTIONS = 10_000


class Operations(TorchDispatchMode):
    """Counts every operation on tensors, and so every tensor that is made."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@click.command()
@click.option("--rounds", default=12, show_default=True, help="Visits to each k.")
@click.option("--batch-size", default=2, show_default=True, help="Sequences a batch.")
@click.option("--length", default=64, show_default=True, help="Tokens of a sequence.")
@click.option("--plain", "plain_alone", is_flag=True, help="Leave the compiled model out.")
def main(rounds: int, batch_size: int, length: int, plain_alone: bool) -> None:
    """Print what a call of ``select`` costs, and a line a model and k."""
    with TemporaryDirectory() as folder:
        ctx = context(RunConfig.build({"train_examples": 100, "precision": "fp32"}), Path(folder))
    model, inputs = ctx.pretrained(), full_batch(ctx, batch_size, length)
    torch.manual_seed(0)
    bank = PluginBank(Plugin.for_model(model, k).eval().requires_grad_(False) for k in KS)
    bank.attach(model)
    click.echo(
        f"k = {', '.join(map(str, bank.ks))}, batches of {batch_size} x {length}, {torch.get_num_threads()} threads"
    )
    time_selection(bank, model)
    calls: dict[str, Callable[..., Any]] = {"plain": model}
    with torch.inference_mode(), no_garbage_collection():
        if not plain_alone:
            calls["compiled"] = torch.compile(model)
        for name, call in calls.items():
            warm_up(name, call, bank, inputs)
        graphs = counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance("default" if plain_alone else "fail_on_recompile"):
            seconds = visit(calls, bank, inputs, rounds)
    if not plain_alone:
        made = counters["stats"]["unique_graphs"]
        click.echo(f"graphs compiled: {graphs} in the warm-up, {made - graphs} in {rounds * len(bank.ks)} switches")
    show(seconds)


def time_selection(bank: PluginBank, model: torch.nn.Module) -> None:
    """Time ``select`` call by call, and look whether it makes or moves a tensor."""
    places = [(p.data_ptr(), p._version) for p in model.parameters()]
    seconds = np.empty(SELECTIONS)
    with no_garbage_collection():
        for number in range(SELECTIONS):
            k = bank.ks[number % len(bank.ks)]
            began = perf_counter()
            bank.select(k)
            seconds[number] = perf_counter() - began
    with Operations() as operations:
        for k in bank.ks:
            bank.select(k)
    moved = sum(place != (p.data_ptr(), p._version) for place, p in zip(places, model.parameters(), strict=True))
    median, slow = np.quantile(seconds, (0.5, 0.99)) * 1e6
    click.echo(
        f"select: median {median:.2f} us, 99 % below {slow:.2f} us; "
        f"{operations.count} operations on tensors, {moved} of {len(places)} parameters moved or changed"
    )


def warm_up(name: str, call: Callable[..., Any], bank: PluginBank, inputs: dict[str, Tensor]) -> None:
    """Run each k until it is warm, and say what the first call took."""
    first = []
    for k in bank.ks:
        bank.select(k)
        first.append(timed(call, inputs))
        for _ in range(3):
            call(**inputs)
    click.echo(f"{name}: first call ever, at each k: {', '.join(f'{s:.2f}' for s in first)} s")


def visit(
    calls: dict[str, Callable[..., Any]], bank: PluginBank, inputs: dict[str, Tensor], rounds: int
) -> dict[tuple[str, int], NDArray[np.float64]]:
    """Switch through all ks in random order, round by round; return seconds, (rounds, `BATCHES`), by model and k."""
    rng = np.random.default_rng(0)
    seconds = {(name, k): np.empty((rounds, BATCHES)) for name in calls for k in bank.ks}
    last = bank.ks[-1]
    for number in range(rounds):
        order = rng.permutation(bank.ks).tolist()
        if order[0] == last:  # a visit that is no switch
            order.reverse()
        for k in order:
            for name in sorted(calls, reverse=bool(number % 2)):
                # each model is left at the k before, so that its own last batch was another one's
                bank.select(last)
                calls[name](**inputs)
                bank.select(k)
                seconds[name, k][number] = [timed(calls[name], inputs) for _ in range(BATCHES)]
            last = k
    return seconds


def timed(call: Callable[..., Any], inputs: dict[str, Tensor]) -> float:
    """Return the seconds of one batch."""
    began = perf_counter()
    call(**inputs)
    return perf_counter() - began


def show(seconds: dict[tuple[str, int], NDArray[np.float64]]) -> None:
    """Print medians, quartiles, and the first batch as a share of the later ones of the same visit."""
    click.echo(f"{'':10}{'k':>3}{'first, ms':>24}{'later, ms':>24}   first / later, median and its 95 % interval")
    for (name, k), rows in seconds.items():
        first, later = rows[:, 0], rows[:, 1:]
        shares = first / later.mean(axis=1)
        interval = quantile_test(shares, p=0.5).confidence_interval()
        click.echo(
            f"{name:10}{k:>3}{spread(first):>24}{spread(later):>24}   "
            f"{np.median(shares):.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        )


def spread(seconds: NDArray[np.float64]) -> str:
    """Return median and quartiles in milliseconds."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)) * 1e3
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
