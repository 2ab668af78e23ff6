"""Tables of a study of serving: CSV for programs, Markdown for people, LaTeX for a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import words
from analysis.frames import groups
from analysis.markup import Bold, latex_table, markdown_escape, markdown_table
from analysis.serving.frames import MILLISECONDS, Condition, Serving, differences_frame, served_frame
from bench.serving.records import Calibration
from bench.serving.times import ServiceTimes

HEAD = ("engine", "policy", "accuracy, %", "in time, %", "right in time, %", "p50, ms", "p95, ms", "p99, ms",
        "answers/s", "share at k, %")  # fmt: skip
ENVELOPE = 0.15
"""By how much a simulated p95 may differ from the real one."""
CONDITION = list(Condition._fields)
NOTES = (
    "Accuracy: of all answers. In time: answered within the deadline. Right in time: a late answer counts as wrong.",
    "Intervals are 95 %. Accuracy and right in time: dev examples are drawn again, with all requests for them. In time "
    "and latencies: Student's, over the seeds of the arrivals; one seed has none.",
    "Under one load all engines and policies had the same requests at the same moments. Bold: nothing else under that "
    "load has more right in time.",
    "Loads are shares of what the dense model can serve in full batches; 1 is its limit.",
)


def tables(serving: Serving, agreement: pd.DataFrame) -> dict[str, str]:
    """Return the text of each table by file name; there is none of what was not compared.

    Parameters
    ----------
    serving
        The study.
    agreement
        As `analysis.serving.frames.agreement_frame` gives it.
    """
    served, differences = served_frame(serving), differences_frame(serving)
    texts = {"serving.csv": served, "serving_differences.csv": differences, "serving_agreement.csv": agreement}
    return {
        **{name: frame.to_csv(index=False, lineterminator="\n") for name, frame in texts.items() if len(frame)},
        "serving.md": _markdown(serving, served, differences, agreement),
        "serving.tex": _latex(serving, served),
    }


def load_name(text: str) -> str:
    """Say a load in words: ``bursty, 0.4 to 1.6``."""
    name, _, rest = text.partition(":")
    fields = dict(re.findall(r"(\w+)=([^,]+)", rest))
    if name == "poisson":
        return f"Poisson, {fields['load']}"
    if "low" in fields and "high" in fields:
        return f"{name}, {fields['low']} to {fields['high']}"
    return f"{name}, {rest}" if rest else name


def policy_name(text: str) -> str:
    """Say a policy in words: ``static, k = 4``."""
    static = re.fullmatch(r"static:k=(\d+)", text)
    return f"static, k = {static[1]}" if static else text.partition(":")[0]


def condition_name(row: Any) -> str:
    """Say what arrived and how it was served."""
    scale = f", {words.plural(row.replicas, 'replica')}, load × {row.times:g}" if row.replicas * row.times != 1 else ""
    return f"{load_name(row.load)} · {row.mode}{scale}"


def _markdown(serving: Serving, served: pd.DataFrame, differences: pd.DataFrame, agreement: pd.DataFrame) -> str:
    study = serving.study
    notes = [
        *NOTES,
        f"A request has {MILLISECONDS * study.deadline_seconds:g} ms. The dense model serves "
        f"{study.capacity:.1f} requests a second in full batches of {study.max_batch}.",
        *dict.fromkeys(f"{policy_name(policy)} is `{policy}`." for policy in served["policy"] if ":" in policy
                       and not policy.startswith("static:")),
    ]  # fmt: skip
    text = [f"# {markdown_escape(study.study)}: serving\n", *(f"- {note}" for note in notes), ""]
    text.append(f"{study.backbone} on {study.task}, seed {study.seed}; {study.provenance.hardware}.\n")
    text.append(f"## What can be chosen\n\n{markdown_table(*_engines(study.calibrations))}")
    for _, mine in groups(served, CONDITION, sort=False):
        first: Any = next(mine.itertuples())
        seeds = words.plural(first.seeds, "seed")
        about = f"{seeds} of {first.seconds:g} s, {first.offered_per_second:.1f} requests a second."
        rows = [_cells(row) for row in _marked(mine)]
        text.append(f"## {condition_name(first)}\n\n{about}\n\n{markdown_table(HEAD, rows, 2)}")
    if len(differences):
        text.append("## Adaptive policies against the others\n\nPercentage points, on the same requests.\n")
        head = ["engine", "policy", "against", "accuracy", "in time", "right in time"]
        for _, mine in groups(differences, CONDITION, sort=False):
            rows = [_difference(row) for row in mine.itertuples()]
            text.append(f"### {condition_name(next(mine.itertuples()))}\n\n{markdown_table(head, rows, 3)}")
    if len(agreement):
        text.append(
            "## Simulated against real\n\n"
            f"p95 of the simulation over p95 in real time, with the same arrivals, in {len(agreement)} pairs:\n\n"
            f"- from the calibration alone {_spread(agreement['ratio'])};\n"
            f"- with all batches as much slower as they were on average while the load was served "
            f"{_spread(agreement['ratio_paced'].dropna())}.\n\n"
            "Each pair is in `serving_agreement.csv`.\n"
        )
    return "\n".join(text)


def _spread(ratios: pd.Series[float]) -> str:
    within = int(((ratios - 1).abs() <= ENVELOPE).sum())
    return (
        f"{within} of {len(ratios)} within {ENVELOPE:.0%}, median {ratios.median():.2f}, from {ratios.min():.2f} to "
        f"{ratios.max():.2f}"
    )


def _engines(calibrations: Sequence[Calibration]) -> tuple[list[str], list[list[str]]]:
    head = ["engine", "k", "accuracy, %", "remaining encoder FLOPs, %", "requests/s", "in memory, all k, MB"]
    rows = []
    for calibration in calibrations:
        times, lengths = ServiceTimes(calibration), np.array(calibration.examples)
        rows += [
            [
                calibration.engine if model.k == 1 else "",
                f"{model.k}",
                words.number(model.accuracy, scale=100),
                words.number(model.remaining, scale=100),
                words.number(times.capacity(model.k, lengths)),
                words.number(calibration.resident_bytes / 1e6) if model.k == 1 else "",
            ]
            for model in calibration.models
        ]
    return head, rows


def _marked(mine: pd.DataFrame) -> list[Any]:
    best = mine["right_in_time"].max()
    return [(row, row.right_in_time == best) for row in mine.itertuples()]


def _cells(marked: tuple[Any, bool]) -> list[str]:
    row, best = marked
    right = _interval(row, "right_in_time", 100)
    shares = [(name.removeprefix("share_at_k"), share) for name, share in row._asdict().items() if "share_at_k" in name]
    return [
        row.engine,
        policy_name(row.policy),
        _interval(row, "accuracy", 100),
        _interval(row, "in_time", 100),
        Bold(right) if best else right,
        *(words.number(getattr(row, f"{name}_ms"), 0) for name in ("p50", "p95", "p99")),
        words.number(row.answers_per_second),
        " ".join(f"{k}: {words.number(share, 0, 100)}" for k, share in shares if share > 0),
    ]


def _difference(row: Any) -> list[str]:
    rival = row.against_engine != row.engine
    against = f"{row.against_engine}, same policy" if rival else policy_name(row.against_policy)
    numbers = [_interval(row, name, 100, sign=True) for name in ("accuracy", "in_time", "right_in_time")]
    return [row.engine, policy_name(row.policy), against, *numbers]


def _interval(row: Any, name: str, scale: float, sign: bool = False) -> str:
    value, low, high = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
    return words.interval(value, low, high, scale=scale, sign=sign)


def _latex(serving: Serving, served: pd.DataFrame) -> str:
    """Return the simulated loads of one model alone, which have several seeds; what was served in real time else."""
    one = served[(served["replicas"] == 1) & (served["times"] == 1)]
    mode = "simulated" if (one["mode"] == "simulated").any() else "real"
    head = ["load", "engine", "policy", "accuracy, %", "in time, %", "right in time, %", "p95, ms"]
    body = []
    for _, mine in groups(one[one["mode"] == mode], "load", sort=False):
        rows = [_cells(row) for row in _marked(mine)]
        name = load_name(str(mine["load"].iloc[0]))
        body.append([[name if i == 0 else "", *row[:5], row[6]] for i, row in enumerate(rows)])
    caption = (
        f"Serving {serving.study.task} with {serving.study.backbone} and a deadline of "
        f"{MILLISECONDS * serving.study.deadline_seconds:g} ms, {mode}."
    )
    return latex_table(head, body, caption, f"tab:{words.slug(serving.study.study)}-serving", 3)
