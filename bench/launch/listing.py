"""What the commands print. Imports torch, pandas and the analysis only where a command needs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.config import RECIPES, RunConfig
from bench.errors import BenchError, suggest
from bench.launch.display import Display, clock
from bench.launch.plan import PLANNED_LENGTH, PlannedCell, estimate_seconds, observed_rate, plan
from bench.locks import is_held
from bench.results import ResultStore, RunResult
from bench.runner import Mode, Surroundings


def console(stderr: bool = False) -> Console:
    """Return a console that is wide enough for the tables also where output goes to a file."""
    probe = Console(stderr=stderr)
    return probe if probe.is_terminal else Console(stderr=stderr, width=140)


def print_listing(what: str) -> None:
    """Print the tasks, methods, backbones, recipes or keys that there are."""
    table = Table(box=None, pad_edge=False, header_style="bold")

    def head(*columns: str) -> None:
        for column in columns:
            table.add_column(column, overflow="fold")

    if what == "tasks":
        from bench.tasks.catalogue import TASKS

        head("task", "kind", "metrics", "labels", "tokens", "source")
        for name, task in TASKS.items():
            labels = " / ".join(task.labels) or "-"
            source = task.source.hub or "bundled"
            table.add_row(name, task.kind, ", ".join(task.metrics), labels, str(task.max_length), source)
    elif what == "methods":
        from bench.registry import methods

        head("method", "what it does", "paper", "trains", "saves")
        for name, cls in methods().items():
            table.add_row(name, cls.summary, cls.paper, cls.trains, cls.saves)
    elif what == "backbones":
        from bench.backbones.catalogue import known_backbones, spec_of
        from bench.backbones.source import EMBEDDED
        from bench.measure.closed_form import backbone_parameters

        head("backbone", "family", "layers", "width", "FFN", "parameters", "on the Hub")
        for name, hub in known_backbones().items():
            spec = spec_of(name)
            layers = f"{spec.encoder_layers}+{spec.decoder_layers}" if spec.decoder_layers else str(spec.encoder_layers)
            size = f"{backbone_parameters(spec, 2) / 1e6:,.1f} M"
            where = f"{hub} (extra: {EMBEDDED[name].extra})" if name in EMBEDDED else hub
            table.add_row(name, spec.family, layers, str(spec.d_model), str(spec.d_ff), size, where)
    elif what == "recipes":
        head("recipe", "sets")
        for name, values in RECIPES.items():
            table.add_row(name, ", ".join(f"{k}={v}" for k, v in values.items()) or "the defaults of `bench list keys`")
    else:
        from bench.describe import keys

        head("key", "read by", "default", "meaning")
        for key, owner, default, text in keys():
            table.add_row(key, owner, "" if default is None else str(default), text)
    console().print(table)


def print_plan(cells: Sequence[PlannedCell], rate: float | None) -> None:
    """Print one line a cell, and what all of it will take."""
    out = console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "task",
        "backbone",
        "method",
        "seed",
        "knob",
        f"remaining@{PLANNED_LENGTH}",
        "dense GFLOPs",
        "parameters",
        "fp32 weights",
        "added",
        "cached",
        "state",
    ):
        table.add_column(column, overflow="fold", justify="right" if column[0] in "rdpfa" else "left")
    for cell in cells:
        config = cell.config
        names = [Path(n).name if "/" in n else n for n in (config.task, config.backbone)]
        state = f"{cell.state}: {cell.reason}" if cell.reason else cell.state
        if cell.remaining is None or cell.parameters is None or cell.added is None:
            table.add_row(*names, config.method, str(config.seed), *[""] * 7, state)
            continue
        added = f"{cell.added:,} ({cell.added / cell.parameters:.2%})" if cell.added else "0"
        table.add_row(
            *names,
            config.method,
            str(config.seed),
            cell.knob,
            f"{cell.remaining:.1%}",
            f"{cell.encoder_gflops or 0:,.2f}",
            f"{cell.parameters / 1e6:,.1f} M",
            f"{(cell.weight_bytes or 0) / 2**30:,.2f} GiB",
            added,
            ", ".join(cell.cached),
            state,
        )
    out.print(table)
    states = Counter(cell.state for cell in cells)
    seconds = estimate_seconds(cells, rate)
    basis = (
        "from the rate of the store's earlier runs"
        if rate
        else "a rough guess for two CPU cores; no run was timed here yet"
    )
    out.print(f"{len(cells)} cells: {', '.join(f'{n} {state}' for state, n in states.items())}.", highlight=False)
    if seconds:
        out.print(f"About {clock(seconds)} to run ({basis}).", highlight=False)


def run_and_print(
    configs: Sequence[RunConfig], store: ResultStore, where: Surroundings, mode: Mode, summary: bool = False
) -> int:
    """Run cells under a live display and print the outcome; return the exit code, 1 where a cell failed."""
    from bench.launch.local import run_all

    cells = plan(configs, store, where, mode)
    rate = observed_rate(store) if any(cell.flops for cell in cells) else None
    with Display(cells, rate, console(stderr=True)) as display:

        def on_cell(index: int, result: RunResult | None) -> None:
            if result is None:
                display.begin(index)
            else:
                display.finish(index, result.status)

        results, failures = run_all(configs, store, where, mode, display, on_cell)
    out = console()
    if summary and any(result.status == "done" for result in results):
        print_report(store.root, store.study)
    elif not summary:
        for result in results:
            _print_result(result, store, where, out)
    for config, reason in failures:
        out.print(f"not done: {config.label}: {reason}", highlight=False, markup=False)
    return 1 if failures else 0


def _print_result(result: RunResult, store: ResultStore, where: Surroundings, out: Console) -> None:
    evaluation = result.evaluation("dev")
    if evaluation and result.cost:
        for name, interval in evaluation.metrics.items():
            out.print(
                f"{name} {interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}] "
                f"on {evaluation.n_examples} dev examples"
            )
        cost = result.cost
        out.print(
            f"remaining encoder FLOPs {cost.achieved_remaining:.2%}, saved {1 - cost.achieved_remaining:.2%}; "
            f"added parameters {cost.parameters_added:,} ({cost.parameters_added / cost.parameters_teacher:.2%})"
        )
        if plugin := next((s.artifact for s in result.training if s.artifact.startswith("plugin-")), None):
            out.print(f"plugin: {where.artifacts / plugin}", soft_wrap=True, highlight=False)
    elif result.status == "skipped":
        out.print(f"skipped: {result.reason}", markup=False)
    out.print(f"{result.status}: {store.path(result.run_id)}", soft_wrap=True, highlight=False)


def print_status(root: Path, study: str | None) -> None:
    """Print how far each study is, and every cell that is not done.

    Raises
    ------
    BenchError
        If there is no such study.
    """
    found = sorted(p.parent.name for p in root.glob("*/runs") if p.is_dir()) if root.is_dir() else []
    if study and study not in found:
        raise BenchError(f"no study '{study}' in {root}.{suggest(study, found)} Studies: {', '.join(found) or 'none'}.")
    if not found:
        raise BenchError(f"no study in {root}; `bench sweep quickstart` makes one")
    out = console()
    for name in [study] if study else found:
        store, counts, rest = ResultStore(root, name), Counter[str](), []
        for path in sorted((store.folder / "runs").glob("*.json")):
            try:
                result = store.read(path.stem)
            except BenchError as error:
                counts["unreadable"] += 1
                rest.append(str(error))
                continue
            if result is None:
                continue
            state: str = result.status
            if state == "running" and not is_held(store.lock_path(result.run_id)):
                state = "interrupted"
            counts[state] += 1
            if state != "done":
                rest.append(f"{state}: {_label(result)}: {result.reason or ''}")
        out.print(f"{name}: {', '.join(f'{n} {state}' for state, n in counts.items()) or 'no runs'}", highlight=False)
        for line in rest:
            out.print(f"  {line.rstrip(': ')}", highlight=False, markup=False)


def _label(result: RunResult) -> str:
    config = result.config
    ratio = f" k={config['ratio']:g}" if config.get("ratio") and config.get("method") != "dense" else ""
    return (
        f"{config.get('task')} · {config.get('backbone')} · {config.get('method')}{ratio} · seed {config.get('seed')}"
    )


def print_report(root: Path, study: str) -> None:
    """Make tables and figures of a study again and print the summary and their paths."""
    from analysis.console import print_summary
    from analysis.report import regenerate

    made = regenerate(root, study)
    out = console()
    print_summary(root / study, out)
    for problem in made.problems:
        out.print(f"warning: {problem}", highlight=False, markup=False)
    for path in made.paths:
        if path.suffix in (".png", ".md"):
            out.print(str(path), soft_wrap=True, highlight=False)
