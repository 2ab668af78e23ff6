"""What ``bench status`` prints: how far each study is, and every cell that is not done. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console

from bench.errors import BenchError, MachineError, suggest
from bench.launch.display import console, one_line, say
from bench.launch.slurm_queue import Job, SlurmQueue
from bench.locks import is_held
from bench.results import ResultStore, RunResult


def print_status(root: Path, study: str | None) -> None:
    """Print how far each study is, and every cell that is not done.

    Raises
    ------
    BenchError
        If there is no such study.
    """
    found = sorted({p.parent.name for folder in ("runs", ".slurm") for p in root.glob(f"*/{folder}") if p.is_dir()})
    if study and study not in found:
        raise BenchError(f"no study '{study}' in {root}.{suggest(study, found)} Studies: {', '.join(found) or 'none'}.")
    if not found:
        raise BenchError(f"no study in {root}; `bench sweep quickstart` makes one")
    for name in [study] if study else found:
        _print_study(ResultStore(root, name), console())


def _print_study(store: ResultStore, out: Console) -> None:
    queue = SlurmQueue(store)
    problem, jobs, submitted = "", dict[str, Job](), dict[str, str]()
    try:
        submitted = queue.submitted()
        jobs = queue.jobs()
    except MachineError as error:
        problem = str(error)
    counts, waiting, lines = Counter[str](), Counter[tuple[str, str]](), []
    for run_id, state, what in _states(store, submitted, jobs, blind=bool(problem)):
        counts[state] += 1
        if state == "queued" and run_id in jobs:
            waiting[jobs[run_id].array, jobs[run_id].reason] += 1
        elif state != "done":
            log = queue.log(run_id)
            lines.append(f"{state}: {what.rstrip(': ')}" + (f"; log {log}" if log.exists() else ""))
    for (job, reason), count in waiting.items():
        lines.append(f"queued: job {job}, {count:,} cell{'s' if count > 1 else ''} ({reason})")
    say(out, f"{store.study}: {', '.join(f'{n} {state}' for state, n in counts.items()) or 'no runs'}")
    for line in lines:
        say(out, f"  {line}")
    if problem:
        say(out, f"  Slurm cannot be asked: {problem}. What was submitted is taken to be there still.")


def _states(
    store: ResultStore, submitted: Mapping[str, str], jobs: Mapping[str, Job], blind: bool
) -> Iterator[tuple[str, str, str]]:
    """Yield run id, state, and label with reason, of every cell that has a result or was submitted.

    Parameters
    ----------
    store
        The study.
    submitted, jobs
        Labels of what was submitted to Slurm, and what Slurm holds of it.
    blind
        Whether Slurm could not be asked.
    """
    paths = {path.stem: path for path in sorted((store.folder / "runs").glob("*.json"))}
    for run_id in paths:
        try:
            result = store.read(run_id)
        except BenchError as error:
            yield run_id, "unreadable", str(error)
            continue
        if result is not None:
            known = blind and run_id in submitted
            state = _state(result, jobs.get(run_id), known or is_held(store.lock_path(run_id)))
            yield run_id, state, f"{result.label} ({run_id}): {one_line(result.reason or '')}"
    for run_id, label in submitted.items():
        if run_id in paths:
            continue
        if job := jobs.get(run_id):
            yield run_id, job.state, f"{label} ({run_id})"
        elif blind:
            yield run_id, "queued", f"{label} ({run_id})"
        else:
            yield run_id, "interrupted", f"{label} ({run_id}): it left Slurm's queue without a result"


def _state(result: RunResult, job: Job | None, trusted: bool) -> str:
    """Return the state of a cell that has a result; ``running`` in the file is believed where ``trusted``."""
    # what runs begins by noting that; until then an earlier failure stands
    begun, settled = result.status in ("running", "interrupted"), result.status in ("done", "skipped")
    if job and (begun or (job.state == "queued" and not settled)):
        return job.state
    return "interrupted" if result.status == "running" and not trusted else result.status
