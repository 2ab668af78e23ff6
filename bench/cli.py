"""The ``bench`` command: parse, call, print. Nothing here imports torch before a run needs it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench import __version__
from bench.errors import BenchError, suggest

if TYPE_CHECKING:
    from bench.describe import Key

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
MODES = ("missing", "retry-failed", "force", "read-only")
LONGEST_TITLE = 72
"""Characters of a section of a help text, which click does not break."""


class _Group(click.Group):
    """Names the nearest command, and turns the suite's errors into one line and exit code 2."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message}{suggest(args[0], self.list_commands(ctx))}", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BenchError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped; what was finished is stored, and the same command goes on from there", err=True)
            sys.exit(130)


class _RunCommand(click.Command):
    """A command whose options include every key of a run, shown by who reads them."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, _Key):
                for section, line in parameter.records():
                    sections.setdefault(section, []).append(line)
            elif record := parameter.get_help_record(ctx):
                sections.setdefault("Options", []).append(record)
        for title, records in sorted(sections.items(), key=lambda item: item[0] != "Options"):
            with formatter.section(title):
                formatter.write_dl(records)


class _Key(click.Option):
    """An option made from a key; W&B passes keys with underscores, people write dashes.

    Parameters
    ----------
    name
        What the key is called.
    meanings
        What it means to whom; methods may differ.
    """

    def __init__(self, name: str, meanings: Sequence[Key]) -> None:
        self.dashed, self.meanings = f"--{name.replace('_', '-')}", meanings
        super().__init__([*dict.fromkeys([self.dashed, f"--{name}"]), name], type=str, default=None)

    def records(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Yield the section and the line of each meaning."""
        for key in self.meanings:
            section, text = "Run" if "run" in key.defaults else f"Options of {key.readers}", key.text
            if len(section) > LONGEST_TITLE:
                section, text = "Options of several methods", f"{text} Read by {key.readers}."
            shown = f"  [default: {key.default}]" if key.default else ""
            yield section, (f"{self.dashed} VALUE", f"{text}{shown}")


def _with_keys(command: Callable[..., Any]) -> click.Command:
    """Turn a function into a command that takes every key of a run as ``keys``."""
    from bench.describe import keys

    meanings: dict[str, list[Key]] = {}
    for key in keys():
        meanings.setdefault(key.name, []).append(key)
    options = {name: _Key(name, those) for name, those in meanings.items()}

    def call(**given: Any) -> Any:
        chosen = {name: given.pop(name) for name in options if name in given}
        # "None" is what an agent writes for a sweep's null: the default
        return command(keys={k: v for k, v in chosen.items() if v is not None and v != "None"}, **given)

    own = list(reversed(getattr(command, "__click_params__", [])))
    doc = inspect.cleandoc(command.__doc__ or "")
    return _RunCommand(
        command.__name__.strip("_"), callback=call, params=[*own, *options.values()], help=doc, context_settings=CONTEXT
    )


_FOLDER = click.Path(file_okay=False, path_type=Path)
_results = click.option(
    "--results", type=_FOLDER, default=Path("results"), show_default=True, help="Folder of studies."
)


def _where(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where things are."""
    for option in (
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda."),
        click.option("--cache-dir", type=_FOLDER, help="Teachers and plugins; BENCH_CACHE, else ~/.cache/bench."),
        click.option(
            "--data-root", type=_FOLDER, help="Local data, DIR/<task>/<split>.parquet; BENCH_DATA_ROOT, else the Hub."
        ),
        _results,
    ):
        command = option(command)
    return command


def _mode(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "Run what is missing, also what failed, everything again, or nothing."
    return click.option("--mode", type=click.Choice(MODES), default="missing", show_default=True, help=text)(command)


def _executor(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what runs the cells of a sweep; those that were given for Slurm come as ``cluster``."""
    count, slurm = click.IntRange(min=1), ("partition", "account", "time", "cpus", "gpus", "memory", "more")

    @functools.wraps(command)
    def call(**given: Any) -> Any:
        cluster = {name: given.pop(name) for name in slurm}
        return command(cluster={name: value for name, value in cluster.items() if value}, **given)

    for option in (
        click.option(
            "--slurm",
            "more",
            multiple=True,
            metavar="KEY=VALUE",
            help="Slurm: any other parameter of sbatch; repeat it.",
        ),
        click.option("--memory", help="Slurm: memory of a cell, such as 16G."),
        click.option("--gpus", type=count, help="Slurm: GPUs of a cell, which train it together."),
        click.option("--cpus", type=count, help="Slurm: processors of a cell, which are its threads."),
        click.option(
            "--time", type=count, help="Slurm: minutes, after which a cell is queued again and goes on.  [default: 240]"
        ),
        click.option("--account", help="Slurm: account that pays."),
        click.option("--partition", help="Slurm: partition."),
        click.option(
            "--jobs",
            type=count,
            help="Cells at once: processes with their share of the cores and a GPU of their own, or tasks of a Slurm "
            "array.  [default: 1, on Slurm no limit]",
        ),
        click.option(
            "--executor",
            type=click.Choice(["local", "slurm"]),
            default="local",
            show_default=True,
            help="Run on this machine, or submit to Slurm and leave.",
        ),
    ):
        call = option(call)
    return call


def _surroundings(data_root: Path | None, cache_dir: Path | None, device: str) -> Any:
    from bench.cell import Surroundings

    return Surroundings(data_root, cache_dir, device)


# In the docstrings below, which are the help texts, click keeps the lines of a paragraph that begins with \b.
@click.group(cls=_Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="bench")
def main() -> None:
    """Benchmark Variator and its rivals: accuracy against FLOPs, over tasks, ratios and backbones.

    \b
    bench plan sweeps/quickstart.yaml     what would run, what it costs, what is cached
    bench sweep sweeps/quickstart.yaml    run it; run it again to go on
    bench report quickstart               tables, figures and a page from the results
    """  # noqa: D301


@main.command("list", context_settings=CONTEXT)
@click.argument("what", type=click.Choice(["tasks", "methods", "backbones", "recipes", "keys", "policies", "loads"]))
def list_(what: str) -> None:
    """Show the known tasks, methods, backbones, recipes, keys, policies or loads."""
    from bench.launch.listing import print_listing

    print_listing(what)


def _plan(keys: dict[str, str], sweep: str | None, study: str | None, results: Path, mode: str, **where: Any) -> None:
    """Show what a sweep would run, what it costs and what is cached.

    SWEEP is a file or a shipped name. Without one, the keys name the cells, commas separating values:

    \b
    bench plan sweeps/glue.yaml
    bench plan --backbone t5-3b --ratio 2,4,8
    """  # noqa: D301
    from bench.launch.plan import observed_rate, plan
    from bench.launch.plan_view import print_plan
    from bench.launch.sweep import expand, find_sweep, parse_list, read_sweep
    from bench.results import ResultStore

    if sweep:
        read = read_sweep(find_sweep(sweep), keys, where["data_root"])
        name, configs = read.study, read.configs
    else:
        name, configs = "runs", expand({key: parse_list(key, text) for key, text in keys.items()}, where["data_root"])
    store = ResultStore(results, study or name)
    cells = plan(configs, store, _surroundings(**where), mode)  # type: ignore[arg-type]
    print_plan(cells, observed_rate(store))
    if any(cell.state == "error" for cell in cells):
        sys.exit(1)


_plan = click.argument("sweep", required=False)(
    click.option("--study", help="Study to compare with; that of the sweep.")(_mode(_where(_plan)))
)
main.add_command(_with_keys(_plan))


def _run(keys: dict[str, str], study: str, results: Path, mode: str, **where: Any) -> None:
    """Run one cell, or show its stored result.

    This is what sweeps, agents and clusters call; keys may also be written as W&B does, --train_examples=60.

    \b
    bench run --task sst2 --method variator --ratio 4 --backbone t5-base --seed 0
    """  # noqa: D301
    from bench.config import RunConfig
    from bench.launch.listing import run_and_print
    from bench.results import ResultStore
    from bench.tracking import Tracking

    config, store = RunConfig.build(keys), ResultStore(results, study)
    sys.exit(run_and_print([config], store, _surroundings(**where), mode, Tracking(group=study)))  # type: ignore[arg-type]


_run = click.option("--study", default="runs", show_default=True, help="Study that the result goes to.")(
    _mode(_where(_run))
)
main.add_command(_with_keys(_run))


def _sweep(
    keys: dict[str, str],
    sweep: str,
    study: str | None,
    results: Path,
    mode: Any,
    executor: str,
    jobs: int | None,
    cluster: dict[str, Any],
    to_wandb: bool,
    **where: Any,
) -> None:
    """Run what is missing of a sweep, here or on a Slurm cluster.

    SWEEP is a file or a shipped name. Stop it at any moment and run it again to go on. A key replaces the file's
    values, commas separating several:

    \b
    bench sweep sweeps/glue.yaml
    bench sweep glue --task rte --seed 0,1
    bench sweep glue --jobs 4
    bench sweep glue --executor slurm --partition gpu --gpus 1
    bench sweep glue --to-wandb
    """  # noqa: D301
    from bench.launch.sweep import find_sweep, read_sweep
    from bench.results import ResultStore
    from bench.tracking import Tracking

    if cluster and executor != "slurm":
        name = next(iter(cluster)).replace("more", "slurm")
        raise click.UsageError(f"--{name} is for --executor slurm")
    read = read_sweep(find_sweep(sweep), keys, where["data_root"])
    if to_wandb:
        from bench.launch.remote import hand_over

        if keys or study or executor != "local" or jobs:
            raise click.UsageError("--to-wandb hands the file over as it is; its agents take no other options")
        return hand_over(find_sweep(sweep), read.project)
    store, surroundings = ResultStore(results, study or read.study), _surroundings(**where)
    tracking = Tracking(read.project or Tracking.project, read.name)
    if executor == "slurm":
        from bench.launch.slurm import SlurmOptions, submit

        options = SlurmOptions(**cluster | {"jobs": jobs, "more": SlurmOptions.read_more(cluster.get("more", ()))})
        sys.exit(submit(read.configs, store, surroundings, mode, options, tracking))
    from bench.launch.listing import run_and_print

    sys.exit(run_and_print(read.configs, store, surroundings, mode, tracking, jobs=jobs or 1, summary=True))


_sweep = click.option(
    "--to-wandb", is_flag=True, help="Make it a sweep at W&B, and print the line that runs an agent."
)(_sweep)
_sweep = click.argument("sweep")(
    click.option("--study", help="Study that the results go to; that of the sweep.")(_executor(_mode(_where(_sweep))))
)
main.add_command(_with_keys(_sweep))


def _serve_sim(
    keys: dict[str, str],
    sweep: str,
    study: str,
    results: Path,
    load: tuple[str, ...],
    policy: tuple[str, ...],
    replicas: tuple[str, ...],
    load_seeds: int,
    seconds: float,
    max_batch: int,
    deadline: float | None,
    real: bool,
    **where: Any,
) -> None:
    """Serve loads, while policies choose k batch by batch.

    They are served in real time and simulated. SWEEP is a file or a shipped name; its cells of one task, backbone and
    seed make an engine for each method, whose ratios are the k to choose from. A key replaces the file's values. What
    is finished is kept.

    \b
    bench serve-sim sweeps/pilot.yaml --task sst2 --method variator,pruning
    bench serve-sim quickstart --load poisson:0.9 --load replay:arrivals.txt --policy deadline:margin=0.1
    bench serve-sim quickstart --simulated --replicas 4 --replicas 100x100
    """  # noqa: D301
    from bench.launch.serving import read_setup, serve_and_print
    from bench.launch.sweep import find_sweep, read_sweep

    setup = read_setup(
        load,
        policy,
        replicas,
        load_seeds=range(load_seeds),
        seconds=seconds,
        max_batch=max_batch,
        deadline=deadline,
        real=real,
    )
    configs = read_sweep(find_sweep(sweep), keys, where["data_root"]).configs
    serve_and_print(configs, results, study, _surroundings(**where), setup, statics=not policy)


for _option in (
    click.option("--simulated", "real", flag_value=False, default=True, type=bool, help="Leave real time out."),
    click.option(
        "--deadline",
        type=click.FloatRange(min=0, min_open=True),
        help="Seconds from arrival to answer.  [default: twice the dense model's longest full batch]",
    ),
    click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Requests of a batch."),
    click.option(
        "--seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        help="How long requests arrive.",
    ),
    click.option(
        "--load-seeds",
        type=click.IntRange(min=1),
        default=3,
        show_default=True,
        help="Draws of the arrivals; the first is served in real time too.",
    ),
    click.option(
        "--replicas",
        multiple=True,
        metavar="N[xTIMES]",
        help="Simulate N models that share the queue, with TIMES the load; repeat it.  [default: 1x1]",
    ),
    click.option(
        "--policy",
        multiple=True,
        metavar="NAME[:FIELD=VALUE,...]",
        help="static:K, queue, deadline or another package's; repeat it.  [default: every static one, queue, deadline]",
    ),
    click.option(
        "--load",
        multiple=True,
        metavar="NAME[:FIELD=VALUE,...]",
        help="poisson, bursty, day, rates being shares of what the dense model can serve, or replay:FILE; repeat it.  "
        "[default: poisson:0.5, poisson:1.1, bursty, day]",
    ),
    click.option("--study", default="serving", show_default=True, help="Study that the results go to."),
    _where,
):
    _serve_sim = _option(_serve_sim)
_serve_sim.__name__ = "serve-sim"
main.add_command(_with_keys(click.argument("sweep")(_serve_sim)))


@main.command(context_settings=CONTEXT)
@click.argument("study", required=False)
@_results
def status(study: str | None, results: Path) -> None:
    """Show how far STUDY is, or every study; what failed and why."""
    from bench.launch.status import print_status

    print_status(results, study)


@main.command(context_settings=CONTEXT)
@click.argument("project")
@click.option("--study", help="Study that the results go to; that of each result.")
@_results
def pull(project: str, study: str | None, results: Path) -> None:
    """Bring finished runs of a W&B project back as results.

    PROJECT is ENTITY/PROJECT, or ENTITY/PROJECT/SWEEP for the runs of one sweep. Results that are here stay.
    """
    from bench.launch.remote import pull_and_print

    sys.exit(pull_and_print(project, results, study))


@main.group(cls=_Group, context_settings=CONTEXT)
def hub() -> None:
    """Share plugins and studies on the Hugging Face Hub."""


@hub.command("push", context_settings=CONTEXT)
@click.argument("what")
@click.argument("repo", metavar="USER/NAME")
@click.option("--public", is_flag=True, help="Let everybody see a repository that is made now.")
@click.option("--license", default="apache-2.0", show_default=True, help="Licence, as the Hub names it.")
@click.option("--cache-dir", type=_FOLDER, help="Teachers and plugins; BENCH_CACHE, else ~/.cache/bench.")
@_results
def hub_push(what: str, repo: str, public: bool, license: str, cache_dir: Path | None, results: Path) -> None:
    """Send a study, or a plugin with the run that made it.

    WHAT is a study, the id of a run whose plugin is in the cache, or the folder of a plugin. A repository that is made
    is private. It all goes in one commit, or nothing does.

    \b
    bench hub push pilot ME/variator-pilot
    bench hub push 6fbc3866484420a3 ME/variator-sst2-k4
    """  # noqa: D301
    from bench.launch.sharing import push_and_print

    push_and_print(what, repo, results, _surroundings(None, cache_dir, "cpu"), private=not public, license=license)


@hub.command("pull", context_settings=CONTEXT)
@click.argument("repo", metavar="USER/NAME")
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--study", help="Study that results go to; that of each result.")
@click.option("--out", type=_FOLDER, help="Folder that a plugin goes to; plugins/NAME.")
@_results
def hub_pull(repo: str, revision: str | None, study: str | None, out: Path | None, results: Path) -> None:
    """Bring a study or a plugin back. Results that are here stay.

    Nothing but JSON, Parquet and safetensors is read.
    """
    from bench.launch.sharing import pull_and_print

    sys.exit(pull_and_print(repo, results, study, revision, out))


@main.command(context_settings=CONTEXT)
@click.argument("study")
@_results
def report(study: str, results: Path) -> None:
    """Make the tables, the figures and the page of STUDY.

    The page, report.html, opens from disk in any browser and loads nothing.
    """
    from bench.launch.listing import print_report

    print_report(results, study)


@main.command(context_settings=CONTEXT)
@click.argument("study")
@click.option("--run", "run_ids", multiple=True, metavar="ID", help="This run alone, or its beginning; repeat it.")
@click.option("--sample", type=click.IntRange(min=1), help="So many runs: one of each method in turn.")
@click.option("--tables", is_flag=True, help="Its tables and figures, from the results as they are.")
@click.option("--task", "tasks", multiple=True, metavar="FILE", type=click.Path(path_type=Path),
              help="Where a task of one's own is, which results only name; repeat it.")  # fmt: skip
@click.option("--backbone", "backbones", multiple=True, metavar="NAME=FOLDER",
              help="Where a backbone is that was a local folder; repeat it.")  # fmt: skip
@click.option("--device", default="auto", help="auto, cpu or cuda.  [default: as recorded]")
@click.option("--cache-dir", type=_FOLDER, help="Find teachers and plugins here.  [default: all are made again]")
@click.option(
    "--data-root", type=_FOLDER, help="Local data, DIR/<task>/<split>.parquet; BENCH_DATA_ROOT, else the Hub."
)
@_results
def verify(
    study: str,
    run_ids: tuple[str, ...],
    sample: int | None,
    tables: bool,
    tasks: tuple[Path, ...],
    backbones: tuple[str, ...],
    results: Path,
    **where: Any,
) -> None:
    """Make recorded runs again, and judge them.

    STUDY is a name or the path of its folder, which is only read. All its runs are made again, unless some are chosen:

    \b
    bench verify results/pilot --sample 3
    bench verify pilot --run 25b4c6f8 --cache-dir ~/.cache/bench
    bench verify pilot --tables

    Each is identical, within the tolerance that another machine or other versions are given, different, or cannot be
    made again; what differs is named by its cause. The exit code is 1 unless all are identical or within tolerance.
    """  # noqa: D301
    from bench.launch.verification import find_study, read_elsewhere, verify_and_print, verify_tables_and_print

    if tables + bool(run_ids) + (sample is not None) > 1:
        raise click.UsageError("choose one of --run, --sample and --tables")
    store = find_study(results, study)
    if tables:
        sys.exit(verify_tables_and_print(store))
    elsewhere = read_elsewhere(tasks, backbones)
    sys.exit(verify_and_print(store, _surroundings(**where), elsewhere, sample, run_ids))


@main.command(context_settings=CONTEXT)
@click.argument("sweeps", nargs=-1, required=True, metavar="SWEEP...")
@click.option("--tasks", default="1,3,10,100", show_default=True, help="Numbers of tasks.")
@click.option("--study", help="Study that the results go to; that of the sweeps.")
@_where
def storage(sweeps: tuple[str, ...], tasks: str, study: str | None, results: Path, **where: Any) -> None:
    """Measure what many tasks take on disk and in memory.

    Each way to keep them that the sweeps list is measured; what is missing of the sweeps is run first. Files are really
    written, to TMPDIR, and really loaded, each time in a new process; where more tasks are asked for than were trained,
    the rest are copies with other numbers in them.

    \b
    bench storage storage storage-rivals storage-full --data-root DATA
    """  # noqa: D301
    from bench.launch.storing import read_counts, store_and_print

    sys.exit(store_and_print(sweeps, results, study, _surroundings(**where), read_counts(tasks)))


@main.command(context_settings=CONTEXT)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=_FOLDER)
@click.option("--backbone", help="What it was made for; the original T5 of its width and depth.")
def convert(file: Path, out: Path, backbone: str | None) -> None:
    """Convert a plugin that the authors of Variator released.

    FILE is their checkpoint, OUT the folder to make. Nothing but tensors is read: a pickle that would do anything else
    is refused.
    """
    from bench.launch.listing import convert_and_print

    convert_and_print(file, out, backbone)
