"""Time the harness itself: planning, reading results, drawing, a sweep that is done, and what it adds to training.

    python benchmarks/harness.py [--cells 10000]

Needs no network. Processor seconds are given beside wall seconds, since a busy machine changes the second alone.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from rich.console import Console

from bench.cell import Surroundings
from bench.config import RunConfig
from bench.launch.display import Display
from bench.launch.plan import plan
from bench.launch.sweep import expand
from bench.results import ResultStore
from bench.testing.checkpoints import QUICK, context, task_file, tiny_checkpoint
from bench.training.loop import Schedule
from bench.training.losses import task_loss
from bench.training.stage import FeatureBatches, label_inputs, model_inputs, run_stage

ROOT = Path(__file__).parents[1]


@click.command()
@click.option("--cells", default=10_000, show_default=True, help="Cells that are planned, and results that are read.")
@click.option("--pairs", default=15, show_default=True, help="Pairs of timed trainings.")
def main(cells: int, pairs: int) -> None:
    """Print a line a question: what was timed, its bound, wall seconds and processor seconds."""
    click.echo(f"{'':52}{'bound':>8}{'wall':>8}{'processor':>11}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        line(f"plan {cells:,} cells", "5 s", lambda: plan_many(cells, folder))
        results_of_many(cells, folder / "many" / "runs")
        from analysis.frames import read_study
        from analysis.report import regenerate

        line(f"read {cells:,} results into a frame", "5 s", lambda: read_study(folder / "many"))
        line("their tables and figures", "30 s", lambda: regenerate(folder, "many"))
        words = done_sweep(folder)
        line("bench sweep, all cells done", "3 s", lambda: subprocess.run(words, check=True, capture_output=True))
        ratio = overhead(folder, pairs)
        click.echo(f"{'training in the harness / in a bare loop, median':52}{'1.03':>8}{np.median(ratio):8.3f}")


def line(what: str, bound: str, call: Callable[[], Any]) -> None:
    """Time a call and print it."""
    began, used = time.perf_counter(), _used()
    call()
    click.echo(f"{what:52}{bound:>8}{time.perf_counter() - began:8.2f}{_used() - used:11.2f}")


def _used() -> float:
    import resource

    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def plan_many(cells: int, folder: Path) -> None:
    """Plan the grid of GLUE with as many seeds as it takes."""
    parameters = yaml.safe_load((ROOT / "sweeps" / "glue.yaml").read_text())["parameters"]
    grid = {key: entry.get("values", [entry.get("value")]) for key, entry in parameters.items()}
    one = len(expand(grid | {"seed": [0]}))
    configs = expand(grid | {"seed": list(range(-(-cells // one)))})[:cells]
    planned = plan(configs, ResultStore(folder / "none", "none"), Surroundings(cache_dir=folder / "cache"))
    assert len(planned) == cells


def results_of_many(count: int, folder: Path) -> None:
    """Write the committed pilot's results over and over, as those of further seeds."""
    folder.mkdir(parents=True)
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "results" / "pilot" / "runs").glob("*.json"))]
    done = [result for result in found if result["status"] == "done"]
    for number in range(count):
        result = done[number % len(done)]
        seed, name = number // len(done), f"{number:016x}"
        config, identity = result["config"] | {"seed": seed}, result["identity"] | {"seed": seed}
        changed = result | {"run_id": name, "config": config, "identity": identity, "predictions": None}
        (folder / f"{name}.json").write_text(json.dumps(changed, indent=1))


def done_sweep(folder: Path) -> list[str]:
    """Run a sweep of two small cells, and return the command that finds it done."""
    values = QUICK | {
        "task": str(task_file(folder / "task")),
        "backbone": str(tiny_checkpoint(folder / "bert", "bert")),
    }
    lines = {key: {"value": value} for key, value in values.items()}
    lines |= {"method": {"values": ["dense", "variator"]}, "ratio": {"value": 2}}
    (folder / "small.yaml").write_text(yaml.safe_dump({"name": "small", "method": "grid", "parameters": lines}))
    words = [sys.executable, "-m", "bench", "sweep", str(folder / "small.yaml"), "--results", str(folder / "results")]
    words += ["--cache-dir", str(folder / "cache"), "--device", "cpu"]
    subprocess.run(words, check=True, capture_output=True)
    return words


def overhead(folder: Path, pairs: int, steps: int = 10) -> np.ndarray[Any, Any]:
    """Return training seconds in the harness over those of a bare loop, pair by pair, on MiniLM and film reviews."""
    config = RunConfig.build({"train_examples": 1000, "precision": "fp32"})
    ctx = context(config, folder / "cache" / "artifacts")
    batches = FeatureBatches(ctx.features["train"], 16, ctx.tokenizer.pad_token_id, 0, ctx.device)
    cells = plan([config], ResultStore(folder / "none", "none"), Surroundings())
    model = ctx.pretrained().requires_grad_(True)

    def losses(step: int, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return task_loss(ctx.task.kind, model(**model_inputs(batch)).logits, label_inputs(batch)), {}

    def harness() -> None:
        with Display(cells, None, Console(file=io.StringIO())) as display:
            lane = display.begin(0)
            run_stage("teacher", losses, model.parameters(), batches, Schedule(steps, 1e-5, precision="fp32"),
                      spec=ctx.spec, passes=3, seed=0, progress=lane, checkpoint=folder / "checkpoint.pt")  # fmt: skip

    def bare() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        for step in range(steps):
            loss, _ = losses(step, batches(step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    seconds: dict[Callable[[], None], list[float]] = {harness: [], bare: []}
    for number in range(pairs + 1):
        for train in (harness, bare) if number % 2 else (bare, harness):
            began = time.perf_counter()
            train()
            seconds[train].append(time.perf_counter() - began)
    return np.array(seconds[harness][1:]) / np.array(seconds[bare][1:])  # the first pair warms up


if __name__ == "__main__":
    main()
