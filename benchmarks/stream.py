"""Show how large the residual stream of an encoder is, token by token, and what its FFNs read of it and add to it.

    python benchmarks/stream.py BACKBONE [--task movie_snippets] [--data-root DIR] [--examples 400]

BACKBONE is a Hub id or a local folder of the T5 family, as it was published; BERT normalises its stream, which has no
loud tokens. No timing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from torch import Tensor

from bench.backbones.sites import EncoderView
from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.execution import prepare
from bench.progress import Silent
from bench.training.stage import FeatureBatches, model_inputs

LOUD = 20
"""A token is loud whose stream is so many times that of the median token."""


@click.command()
@click.argument("backbone")
@click.option("--task", default="movie_snippets", show_default=True, help="Whose training texts are read.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Local data, DIR/<task>/<split>.parquet.")
@click.option("--examples", default=400, show_default=True, help="Texts.")
@torch.no_grad()
def main(backbone: str, task: str, data_root: Path | None, examples: int) -> None:
    """Print a line an encoder layer, and which tokens are loud."""
    config = RunConfig.build({"task": task, "backbone": backbone, "train_examples": examples, "ratio": 4})
    with TemporaryDirectory() as folder:
        where = Surroundings(data_root, Path(folder))
        ctx, _ = prepare(Cell.resolve(config, where), where, Silent(), torch.device("cpu"))
    model = ctx.pretrained()
    sites = EncoderView(model).sites()
    if any(site.norm is None for site in sites):
        raise click.UsageError(f"{backbone} normalises its stream")
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in sites]
    ids: list[Tensor] = []
    mask = torch.empty(0)
    for site, caught in zip(sites, seen, strict=True):
        stream: list[Tensor] = []
        assert site.norm is not None
        site.norm.register_forward_pre_hook(lambda _, args, stream=stream: stream.append(args[0]))

        def note(_: torch.nn.Module, args: tuple[Tensor], y: Tensor, stream: list[Tensor] = stream,
                 caught: list[tuple[Tensor, Tensor, Tensor]] = caught) -> None:  # fmt: skip
            caught.append((stream.pop()[mask] + y[mask], args[0][mask], y[mask]))

        site.inner.register_forward_hook(note)
    batches = FeatureBatches(ctx.features["train"], 32, ctx.tokenizer.pad_token_id, 0, ctx.device)
    for step in range(-(-len(ctx.features["train"]) // 32)):
        batch = batches(step)
        mask = batch["attention_mask"].bool()
        ids.append(batch["input_ids"][mask])
        model(**model_inputs(batch))
    tokens = ctx.tokenizer.convert_ids_to_tokens(torch.cat(ids).tolist())
    click.echo(f"{'':7}{'stream behind it: largest entry':>40}{'deviation of channels, median [least, most]':>60}")
    click.echo(f"{'layer':7}{'loud, %':>10}{'loud tokens':>15}{'the others':>15}{'FFN input':>30}{'FFN output':>30}")
    ever = torch.zeros(len(tokens), dtype=torch.bool)
    for index, caught in enumerate(seen):
        left, u, y = (torch.cat(parts) for parts in zip(*caught, strict=True))
        size = left.square().mean(1).sqrt()
        loud = size > LOUD * size.median()
        ever |= loud
        largest = f"{left[loud].abs().max():.3g}" if loud.any() else "-"
        deviations = (f"{s.median():.3g} [{s.min():.2g}, {s.max():.2g}]" for s in (u.std(0), y.std(0)))
        others = f"{left[~loud].abs().max():.3g}"
        click.echo(
            f"{index:<7}{100 * loud.float().mean():10.1f}{largest:>15}{others:>15}"
            + "".join(f"{text:>30}" for text in deviations)
        )
    common = Counter(token for token, loud in zip(tokens, ever.tolist(), strict=True) if loud).most_common(5)
    named = ", ".join(f"{token} {times}" for token, times in common) or "none"
    click.echo(f"loud in some layer, of {len(tokens):,} tokens: {named}")


if __name__ == "__main__":
    main()
