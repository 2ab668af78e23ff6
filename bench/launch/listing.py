"""What the commands print, but for the plan. Imports torch, pandas and the analysis only where a command needs them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.cell import Surroundings
from bench.config import RECIPES, RunConfig
from bench.errors import BenchError
from bench.launch.display import Display, console, one_line, say
from bench.launch.plan import observed_rate, plan
from bench.launch.served import print_served
from bench.results import ResultStore, RunResult
from bench.runner import Mode
from bench.serving.records import ServingStore
from bench.tracking import Tracking
from bench.tracking.prepare import prepare


def print_listing(what: str) -> None:
    """Print the tasks, methods, backbones, recipes, keys, policies or loads that there are."""
    table = Table(box=None, pad_edge=False, header_style="bold")

    def head(*columns: str) -> None:
        for column in columns:
            table.add_column(column, overflow="fold")

    if what == "tasks":
        from bench.tasks.catalogue import registered_tasks, tasks

        head("task", "kind", "metrics", "labels", "tokens", "source")
        theirs = registered_tasks()
        for name, task in tasks().items():
            labels = " / ".join(task.labels) or "-"
            source = theirs[name].origin if name in theirs else task.source.hub or "bundled"
            table.add_row(name, task.kind, ", ".join(task.metrics), labels, str(task.max_length), source)
    elif what == "methods":
        from bench.describe import catalogue
        from bench.registry import registered_methods

        # a block each: six columns of phrases would be read at no width
        table.show_header = False
        for column in ("method", "what", "text"):
            table.add_column(column, no_wrap=column != "text")
        for entry in catalogue():
            facts = {"trains": entry.trains, "saves": entry.saves, "ratio sets": entry.knob, "paper": entry.paper}
            facts["runs on"] = "; ".join([", ".join(entry.families), *entry.limits])
            if registered := registered_methods().get(entry.name):
                facts["from"] = registered.origin
            table.add_row(Text(entry.name, "bold"), "does", entry.summary)
            for what, text in facts.items():
                if text.strip("-"):
                    table.add_row("", Text(what, "dim"), text)
            table.add_row()
    elif what == "backbones":
        from bench.backbones.catalogue import known_backbones, registered_backbones, spec_of
        from bench.backbones.source import EMBEDDED
        from bench.measure.closed_form import backbone_parameters

        head("backbone", "family", "layers", "width", "FFN", "parameters", "from")
        places = {name: f"{hub} (extra: {EMBEDDED[name].extra})" if name in EMBEDDED else hub
                  for name, hub in known_backbones().items()}  # fmt: skip
        places |= {name: found.origin for name, found in registered_backbones().items()}
        for name, where in places.items():
            spec = spec_of(name)
            layers = f"{spec.encoder_layers}+{spec.decoder_layers}" if spec.decoder_layers else str(spec.encoder_layers)
            size = f"{backbone_parameters(spec, 2) / 1e6:,.1f} M"
            table.add_row(name, spec.family, layers, str(spec.d_model), str(spec.d_ff), size, where)
    elif what == "recipes":
        head("recipe", "sets")
        for name, values in RECIPES.items():
            table.add_row(name, ", ".join(f"{k}={v}" for k, v in values.items()) or "the defaults of `bench list keys`")
    elif what in ("policies", "loads"):
        from bench.serving.loads import LOADS
        from bench.serving.policies import policies, registered_policies
        from bench.serving.words import defaults

        head("policy" if what == "policies" else "load", "fields", "does", "from")
        origins = {name: found.origin for name, found in registered_policies().items()}
        known: dict[str, type[object]] = {**(policies() if what == "policies" else LOADS)}
        for name, cls in known.items():
            summary = (inspect.getdoc(cls) or "-").splitlines()[0]
            table.add_row(name, defaults(cls) or "-", summary, origins.get(name, "bundled"))
    else:
        from bench.describe import keys

        for column, width in (("key", None), ("read by", 24), ("default", 32), ("meaning", None)):
            table.add_column(column, max_width=width, overflow="fold")
        for key in keys():
            table.add_row(key.name, key.readers, key.default, key.text)
    console().print(table)


def run_and_print(
    configs: Sequence[RunConfig],
    store: ResultStore,
    where: Surroundings,
    mode: Mode,
    tracking: Tracking | None = None,
    jobs: int = 1,
    summary: bool = False,
) -> int:
    """Run cells under a live display and print the outcome; return the exit code, 1 where a cell failed.

    Parameters
    ----------
    configs, store, where, mode, tracking
        As for ``bench.tracking.run_tracked``.
    jobs
        Cells to run at once; one runs in this process.
    summary
        Print the tables of the study in place of each result.

    Raises
    ------
    BenchError
        If no cell can be run at all: that is a mistake in the command and no failure of a cell.
    """
    from bench.launch.local import run_all
    from bench.launch.pool import run_pool

    cells = plan(configs, store, where, mode)
    if all(cell.state == "error" for cell in cells):
        raise BenchError("\n".join(dict.fromkeys(cell.reason for cell in cells)))
    if tracking:
        errors = console(stderr=True)
        pending = [cell.run_id for cell in cells if cell.pending and cell.run_id]
        tracking, fetched = prepare(tracking, pending, store, mode, lambda text: say(errors, text))
        cells = plan(configs, store, where, mode) if fetched else cells
    rate = observed_rate(store) if any(cell.flops for cell in cells) else None
    jobs = max(1, min(jobs, sum(cell.pending for cell in cells)))
    with Display(cells, rate, console(stderr=True), jobs) as display:
        if jobs == 1:
            outcome = run_all(configs, store, where, mode, display, tracking)
        else:
            outcome = run_pool(cells, store, where, mode, display, tracking, jobs)
    out, results = console(), outcome.results
    if summary and any(result.status == "done" for result in results):
        print_report(store.root, store.study, only_if_stale=display.total == 0)
    elif not summary:
        for result in results:
            _print_result(result, store, where, out)
    for config, reason in outcome.failures:
        say(out, f"not done: {config.label}: {one_line(reason)}")
    if mode == "missing" and any(result.status in ("failed", "diverged") for result in results):
        say(out, "Failures are kept. Once the cause is mended, --mode retry-failed runs these cells again.")
    return 1 if outcome.failures else 0


def _print_result(result: RunResult, store: ResultStore, where: Surroundings, out: Console) -> None:
    evaluation = result.evaluation("dev")
    if evaluation and result.cost:
        for name, interval in evaluation.metrics.items():
            say(
                out,
                f"{name} {interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}] "
                f"on {evaluation.n_examples} dev examples",
            )
        cost = result.cost
        say(
            out,
            f"remaining encoder FLOPs {cost.achieved_remaining:.2%}, saved {1 - cost.achieved_remaining:.2%}; "
            f"added parameters {cost.parameters_added:,} ({cost.parameters_added / cost.parameters_teacher:.2%})",
        )
        if plugin := next((s.artifact for s in result.training if s.artifact.startswith("plugin-")), None):
            say(out, f"plugin: {where.artifacts / plugin}")
    elif result.status == "skipped":
        say(out, f"skipped: {one_line(result.reason or '')}")
    say(out, f"{result.status}: {store.path(result.run_id)}")


def print_report(root: Path, study: str, only_if_stale: bool = False) -> None:
    """Make tables, figures and the page of a study again and print the summary and their paths.

    Parameters
    ----------
    root, study
        The results folder, and the study in it.
    only_if_stale
        Leave them where no result is newer.
    """
    from analysis.console import print_summary
    from analysis.report import made_before, regenerate

    paths, problems = made_before(root / study) if only_if_stale else [], []
    if not paths:
        made = regenerate(root, study)
        paths, problems = made.paths, made.problems
    out = console()
    if (root / study / "runs").is_dir():
        print_summary(root / study, out)
    else:
        print_served(ServingStore(root / study))
    for problem in problems:
        say(out, f"warning: {problem}")
    for path in sorted(paths, key=lambda path: (path.suffix == ".html", path.suffix == ".png", path)):
        if path.suffix in (".png", ".md", ".html"):
            say(out, str(path))


def convert_and_print(file: Path, out: Path, backbone: str | None) -> None:
    """Make a plugin of a released checkpoint and say what it is."""
    from bench.plugins.convert import convert

    plugin = convert(file, backbone)
    plugin.save_pretrained(out)
    say(console(), f"k = {plugin.config.k} for {plugin.config.backbone}, {plugin.num_parameters():,} parameters: {out}")
