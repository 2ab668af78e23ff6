"""What must be said with a study's numbers, read off its runs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from analysis import words
from analysis.frames import DENSE, Study
from analysis.statistics import LEVEL


def caveats(study: Study, table: pd.DataFrame) -> list[str]:
    """List the caveats of a study, one sentence or two each.

    Parameters
    ----------
    study
        Its runs.
    table
        Its cells, as `analysis.cells.cells` gives them.
    """
    done = study.done
    lines = [*_subsampling(done), _dev_sizes(done), _seeds(table), _hardware(done), _commits(done)]
    lines += [f"{task}: {text}" for (task, text), _ in done[done["caveat"] != ""].groupby(["task", "caveat"])]
    lines += [off_target_note(table), _incomplete(table), _levels(done)]
    lines += [_not_done(study.frame), _left_out(study.problems)]
    return [line for line in lines if line]


def _subsampling(done: pd.DataFrame) -> list[str]:
    lines = []
    for split, what in (("train", "Trained"), ("dev", "Evaluated")):
        used, there = (
            done.get(f"examples.{name}", pd.Series(np.nan, index=done.index)) for name in (split, f"{split}_available")
        )
        sizes = used[used < there]
        limited = [
            f"{task} ({_spread(rows)} of {_spread(there[rows.index])})" for task, rows in sizes.groupby(done["task"])
        ]
        if limited:
            lines.append(f"{what} on a sub-sample of the examples, not on all: {', '.join(limited)}.")
    return lines


def _dev_sizes(done: pd.DataFrame) -> str:
    sizes = [f"{task} {_spread(rows)}" for task, rows in done["n_examples"].groupby(done["task"])]
    return f"Dev examples evaluated: {', '.join(sizes)}." if sizes else ""


def _seeds(table: pd.DataFrame) -> str:
    own = table.loc[(table["method"] != DENSE) & table["seeds"].notna(), "seeds"]
    if own.empty:
        return ""
    if own.max() == 1:
        return "One seed a cell: there is no interval over seeds, and differences may be due to the seed."
    return f"Seeds in each cell: {_spread(own)}. Scores are means over them."


def _hardware(done: pd.DataFrame) -> str:
    seen = done[["hardware", "device", "threads"]].drop_duplicates().itertuples(index=False, name=None)
    machines = sorted(f"{name} ({device}, {words.plural(threads, 'thread')})" for name, device, threads in seen)
    several = " Latency ratios from different set-ups do not compare." if len(machines) > 1 else ""
    return f"Measured on {'; '.join(machines)}.{several}"


def _commits(done: pd.DataFrame) -> str:
    commits = sorted({str(commit)[:10] for commit in done["commit"].dropna()})
    parts = []
    if len(commits) > 1:
        parts.append(f"The runs come from {len(commits)} commits: {', '.join(commits)}.")
    if n := int((done["dirty"] == True).sum()):  # noqa: E712 - the column holds None too
        parts.append(f"{words.plural(n, 'run')} came from a checkout with uncommitted changes.")
    return " ".join(parts)


def off_target(table: pd.DataFrame) -> pd.Series:
    """Mark the cells whose achieved cost is not what the ratio asked for."""
    return (table["remaining"] - table["requested_remaining"]).abs() > words.OFF_TARGET


def off_target_note(table: pd.DataFrame) -> str:
    """Explain the mark of `off_target`, where some cell carries it."""
    if not off_target(table).any():
        return ""
    points = f"{100 * words.OFF_TARGET:g}"
    return f"† The achieved remaining share is more than {points} percentage point away from what the ratio asks for."


def _incomplete(table: pd.DataFrame) -> str:
    lacking = table[table["missing_tasks"] != ""]
    at = ["" if pd.isna(ratio) else f" at k = {ratio:g}" for ratio in lacking["ratio"]]
    cells = zip(lacking["series"], at, lacking["missing_tasks"], strict=True)
    names = [f"{series}{ratio} (lacks {missing})" for series, ratio, missing in cells]
    return f"No average is given where a task is missing: {'; '.join(names)}." if names else ""


def _levels(done: pd.DataFrame) -> str:
    others = sorted({f"{100 * level:g} %" for level in done["interval_level"] if level != LEVEL})
    return f"Some intervals over examples were stored at {', '.join(others)}, not 95 %." if others else ""


def _not_done(frame: pd.DataFrame) -> str:
    counts = frame.loc[frame["status"] != "done", "status"].value_counts().sort_index()
    if counts.empty:
        return ""
    return f"Not in these numbers: {', '.join(f'{n} {status}' for status, n in counts.items())}; see failures.md."


def _left_out(problems: list[str]) -> str:
    return f"{words.plural(len(problems), 'file')} could not be read and left out." if problems else ""


def _spread(values: Iterable[float]) -> str:
    low, high = int(min(values)), int(max(values))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
