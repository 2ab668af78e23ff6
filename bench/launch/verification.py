"""What ``bench verify`` prints."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from rich.console import Console

from analysis.report import studies
from bench.cell import Surroundings
from bench.config import RunConfig
from bench.errors import BenchError, ConfigError, suggest
from bench.launch.display import Display, clock, console, one_line, say
from bench.launch.plan import estimate_seconds, observed_rate, plan
from bench.results import ResultStore, RunResult
from bench.serving.records import SERVING_FILE
from bench.tasks.own import read_own
from bench.verify.again import Elsewhere, Judgement, choose, make_again, recorded_config
from bench.verify.comparing import COST_TOLERANCE, MEMORY_TOLERANCE, METRIC_TOLERANCE, PREDICTION_TOLERANCE
from bench.verify.tables import compile_again

SHOWN = 8
"""Differences of one run that are printed; the worst first."""


def find_study(results: Path, given: str) -> ResultStore:
    """Return the study that a name below ``results``, or the path of a folder, means.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    for folder in (results / given, Path(given)):
        if (folder / "runs").is_dir() or (folder / SERVING_FILE).is_file():
            folder = folder.resolve()
            return ResultStore(folder.parent, folder.name)
    known = studies(results)
    raise ConfigError(
        f"no study '{given}': neither a folder with runs/ nor one below {results}.{suggest(given, known)} "
        f"Studies: {', '.join(known) or 'none'}."
    )


def read_elsewhere(tasks: Sequence[Path], backbones: Sequence[str]) -> Elsewhere:
    """Read what a reviewer says of where things are.

    Parameters
    ----------
    tasks
        YAML files of tasks, which name themselves.
    backbones
        ``NAME=FOLDER``, or a folder that is called as its backbone was.

    Raises
    ------
    BenchError
        If a file cannot be read or a folder is not there.
    """
    folders = {}
    for text in backbones:
        name, _, path = text.rpartition("=")
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"--backbone {text}: there is no folder {folder}")
        folders[name or folder.name] = folder
    return Elsewhere({read_own(path).name: path for path in tasks}, folders)


def verify_and_print(
    store: ResultStore,
    where: Surroundings,
    elsewhere: Elsewhere,
    sample: int | None = None,
    run_ids: Sequence[str] = (),
) -> int:
    """Make runs again, print what becomes of each, and return the exit code: 1 where a number does not stand.

    Parameters
    ----------
    store
        The study, of which nothing is written.
    where
        Data and device; its cache holds what need not be made again, ``None`` for nothing.
    elsewhere
        Where one's own tasks and backbones are.
    sample, run_ids
        As for `bench.verify.again.choose`.

    Raises
    ------
    ConfigError
        If there is no such run.
    """
    out, judgements = console(), list[Judgement]()
    results, damaged = _read(store)
    chosen = choose(results, sample, run_ids)
    unreadable = damaged if sample is None and not run_ids else []
    if not chosen and not unreadable:
        raise BenchError(f"{store.folder} has no runs")
    with tempfile.TemporaryDirectory(prefix="bench-verify-") as folder:
        scratch = ResultStore(Path(folder) / "results", store.study)
        fresh = where.cache_dir is None
        where = replace(where, cache_dir=Path(folder) / "cache") if fresh else where
        configs, judged = _configs(chosen, elsewhere, Path(folder) / "backbones")
        cells = plan(list(configs.values()), scratch, where, "force")
        seconds = estimate_seconds(cells, observed_rate(store))
        kept = "a fresh cache, so that everything is made again" if fresh else f"the cache {where.cache_dir}"
        count = f"{len(chosen)} of {len(results)} runs of {store.study}"
        say(out, f"{count}, with {kept}; {f'about {clock(seconds)}' if cells else 'none can be made again'}")
        try:
            with Display(cells, observed_rate(store), console(stderr=True)) as display:
                for result in chosen:
                    judgement = judged.get(result.run_id)
                    if judgement is None:
                        index = list(configs).index(result.run_id)
                        config, lane = configs[result.run_id], display.begin(index)
                        judgement = make_again(result, store, config, where, scratch, lane)
                        display.finish(index, judgement.outcome)
                    judgements.append(judgement)
                    with display.paused():
                        _print_judgement(judgement, result, fresh, out)
        except KeyboardInterrupt:
            say(out, f"stopped: {len(judgements)} of {len(chosen)} runs are judged")
            return 130
    for problem in unreadable:
        say(out, f"cannot be made again: {problem}")
    _print_summary(judgements, len(unreadable), out)
    return 0 if not unreadable and all(judgement.good for judgement in judgements) else 1


def _read(store: ResultStore) -> tuple[list[RunResult], list[str]]:
    results, damaged = [], []
    for path in sorted((store.folder / "runs").glob("*.json")):
        try:
            if result := store.read(path.stem):
                results.append(result)
        except BenchError as error:
            damaged.append(one_line(str(error)))
    return results, damaged


def _configs(
    chosen: Sequence[RunResult], elsewhere: Elsewhere, links: Path
) -> tuple[dict[str, RunConfig], dict[str, Judgement]]:
    """Return run id -> configuration, and a judgement of each run that has none here."""
    configs, judged = dict[str, RunConfig](), dict[str, Judgement]()
    for result in chosen:
        try:
            configs[result.run_id] = recorded_config(result, elsewhere, links)
        except BenchError as error:
            judged[result.run_id] = Judgement(result.run_id, "cannot be made again", str(error))
    return configs, judged


def _print_judgement(judgement: Judgement, result: RunResult, fresh: bool, out: Console) -> None:
    reason = f": {one_line(judgement.reason)}" if judgement.reason else ""
    stages = [f"made {', '.join(judgement.made)}"] if judgement.made else []
    if judgement.found:
        # in a fresh cache it can only be what a run before this one has made
        stages.append(f"{', '.join(judgement.found)} {'as above' if fresh else 'from the cache'}")
    what = "; ".join([f"{result.label} ({result.run_id}){reason}", *stages])
    say(out, f"{judgement.outcome}: {what}")
    shown = sorted(judgement.differences, key=lambda difference: difference.within)
    for difference in shown[:SHOWN]:
        say(out, f"  {'' if difference.within else '! '}{one_line(difference.text)}")
    if len(shown) > SHOWN:
        say(out, f"  and {len(shown) - SHOWN} more")
    if judgement.outcome != "identical":
        for cause in judgement.causes:
            say(out, f"  cause seen: {cause}")


def _print_summary(judgements: Sequence[Judgement], unreadable: int, out: Console) -> None:
    counts = Counter[str](judgement.outcome for judgement in judgements)
    if unreadable:
        counts["cannot be made again"] += unreadable
    say(out, ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if counts["within tolerance"]:
        say(
            out,
            "Within tolerance: metrics to half the width of their recorded interval, or "
            f"{METRIC_TOLERANCE:.2f}; no more answers changed than were wrong, or {PREDICTION_TOLERANCE:.0%}; costs of "
            f"the dense model exact, FLOPs and bytes of the compressed one to {COST_TOLERANCE:.0%}, its memory to "
            f"{MEMORY_TOLERANCE:.0%}.",
        )
    moved = [judgement.moved for judgement in judgements if judgement.moved is not None]
    if len(moved) > 1 and any(moved):
        say(
            out,
            f"The dev metric of {len(moved)} runs, made again minus recorded: {fmean(moved):+.4f} on average, "
            f"from {min(moved):+.4f} to {max(moved):+.4f}. Runs of one teacher move together.",
        )
    same = {str(cause) for j in judgements if j.outcome == "identical" for cause in j.causes}
    for text in sorted(same):
        say(out, f"Identical in spite of {text}")


def verify_tables_and_print(store: ResultStore) -> int:
    """Make tables and figures again, print what differs, and return the exit code."""
    out = console()
    with tempfile.TemporaryDirectory(prefix="bench-verify-") as folder:
        made = compile_again(store, Path(folder))
    for file in made.files:
        if file.outcome != "identical":
            say(out, f"{file.outcome}: {file.name}: {file.text}")
    for cause in made.causes:
        say(out, f"  cause seen: {cause}")
    for problem in made.problems:
        say(out, f"warning: {problem}")
    for kind in ("tables", "figures"):
        counts = Counter[str](file.outcome for file in made.files if file.name.startswith(kind))
        say(out, f"{store.study} {kind}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items()) or 'none'}")
    return 0 if made.good else 1
