"""Time every method against the teacher, interleaved in one process, to see whether wall time falls as FLOPs do.

    python benchmarks/wall_time.py [--k 4] [--steps 0] [--method variator --method pruning]

Needs no network: all-MiniLM-L6-v2 and bundled film reviews. Models are compressed but not trained, since the values of
weights do not change what a product costs; where they decide what is removed, the FLOPs are those of the timed batch.
"""

from __future__ import annotations

import click
import numpy as np
import torch
from scipy.stats import quantile_test, spearmanr

from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.costing import full_batch, parts_of
from bench.errors import Unreachable
from bench.measure.flops import count_dispatched
from bench.measure.latency import interleaved
from bench.registry import methods
from bench.tasks.data import load_task
from bench.testing.checkpoints import context
from bench.training.teacher import get_teacher

EXAMPLES = 1000
"""Training examples of the teacher, and of the methods that look at examples to decide what to remove."""


@click.command()
@click.option("--k", default=4, show_default=True, help="Budget: what remains with a plugin at this k.")
@click.option("--method", "chosen", multiple=True, type=click.Choice(list(methods())), help="Methods; all by default.")
@click.option("--batch-size", default=32, show_default=True, help="Sequences a batch.")
@click.option("--length", default=128, show_default=True, help="Tokens of a sequence.")
@click.option("--steps", default=0, show_default=True, help="Steps of training of each method.")
@click.option("--pairs", default=30, show_default=True, help="Pairs of timed calls a method.")
def main(k: int, chosen: tuple[str, ...], batch_size: int, length: int, steps: int, pairs: int) -> None:
    """Print a line a method: FLOPs of the encoder and time, as shares of the teacher's."""
    click.echo(f"k = {k}, batches of {batch_size} x {length}, {torch.get_num_threads()} threads")
    click.echo(f"{'method':20}{'FLOPs':>8}{'time':>8}   95 % interval of the median")
    shares = []
    for name in chosen or methods():
        values = {"method": name, "ratio": k, "steps": steps, "train_examples": EXAMPLES, "teacher_epochs": 1}
        config = RunConfig.build(values | {"pretrain_steps": 0, "precision": "fp32"})
        if reason := Cell.resolve(config, Surroundings()).skip_reason():
            click.echo(f"{name:20}skipped: {reason}")
            continue
        ctx = context(config, Surroundings().artifacts)
        teacher, method = get_teacher(ctx), config.build_method()
        try:
            ctx.setting = method.setting(ctx.spec, config.ratio, ctx.lengths("selection"))
            model = method.compress(teacher, load_task(ctx.task, None, EXAMPLES), ctx).eval()
        except Unreachable as error:
            click.echo(f"{name:20}skipped: {error}")
            continue
        inputs = full_batch(ctx, batch_size, length)
        dense, compressed = (count_dispatched(m, inputs, parts_of(m)).encoder for m in (teacher.model, model))
        latency = interleaved(
            teacher.model, model, inputs, ctx.device, min_samples=pairs, max_samples=pairs, max_seconds=600.0
        )
        ratios = np.array(latency.compressed_seconds) / np.array(latency.dense_seconds)
        time, interval = float(np.median(ratios)), quantile_test(ratios, p=0.5).confidence_interval()
        shares.append((compressed / dense, time))
        click.echo(f"{name:20}{compressed / dense:8.1%}{time:8.2f}   [{interval.low:.2f}, {interval.high:.2f}]")
    if len(shares) > 2:
        click.echo(f"rank correlation of FLOPs and time: {spearmanr(*zip(*shares, strict=True)).statistic:.2f}")


if __name__ == "__main__":
    main()
