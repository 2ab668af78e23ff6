"""What a study's numbers support, in sentences: who leads at each ratio, where Variator stands, what is told apart."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from analysis import words
from analysis.cells import defaults
from analysis.comparisons import both_ways
from analysis.frames import DENSE, groups
from analysis.statistics import LEVEL
from analysis.tables import blocks, task_title

SUBJECT = "variator"
ALPHA = 1 - LEVEL


class Finding(NamedTuple):
    """What is found at one ratio.

    Attributes
    ----------
    ratio
        ``"k = 4"``, or that there is none.
    asked
        The remaining share that the ratio asks for, as shown.
    sentences
        What is found.
    """

    ratio: str
    asked: str
    sentences: list[str]


class Block(NamedTuple):
    """What is found on one backbone and task."""

    backbone: str
    task: str
    headline: bool
    findings: list[Finding]


def findings(table: pd.DataFrame, pairs: pd.DataFrame, names: dict[str, str]) -> list[Block]:
    """State what is found on each backbone and task, the average over tasks first and as the headline.

    It is about methods as they are by default.

    Parameters
    ----------
    table, pairs
        Cells, and comparisons between methods.
    names
        How backbones are shown.
    """
    found: list[Block] = []
    pairs = both_ways(pairs)
    for backbone, task, rows in blocks(defaults(table)) if len(table) else ():
        scored = rows[rows["score"].notna() & (rows["method"] != DENSE)]
        mine = pairs[(pairs["backbone"] == backbone) & (pairs["task"] == task)]
        at = [_finding(ratio, block, mine[mine["ratio"] == ratio]) for ratio, block in groups(scored, "ratio")]
        first = not any(block.backbone == names[backbone] for block in found)
        if at:
            found.append(Block(names[backbone], task_title(task, rows), first, at))
    return found


def _finding(ratio: float, rows: pd.DataFrame, pairs: pd.DataFrame) -> Finding:
    rows = rows.sort_values(["score", "series"], ascending=[False, True])
    leader = rows.iloc[0]
    sentences = [_leader(rows, leader)] if len(rows) > 1 and pd.notna(ratio) else []
    subject = rows[rows["method"] == SUBJECT].head(1) if sentences else rows
    for place, (_, row) in enumerate(rows.iterrows(), 1):
        if row["series"] in set(subject["series"]) and not (sentences and row["series"] == leader["series"]):
            sentences.append(_place(row, place, len(rows), _pair(pairs, row["series"], leader["series"])))
    if len(rows) > 1 and len(pairs) and pd.notna(ratio):
        sentences.append(_apart(rows, leader, pairs))
    if rows["p"].notna().any():
        sentences.append(_against_dense(rows))
    asked = rows["requested_remaining"].mean()
    return Finding(
        "without a ratio" if pd.isna(ratio) else f"k = {ratio:g}",
        "" if pd.isna(asked) else f"{words.number(asked, scale=100)} % of the encoder’s FLOPs asked for",
        sentences,
    )


def _score(row: pd.Series) -> str:
    return words.interval(row["score"], row["example_low"], row["example_high"], scale=100)


def _drop(row: pd.Series) -> str:
    return f"drop {words.interval(row['drop'], row['drop_low'], row['drop_high'], scale=100, sign=True)}"


def _leader(rows: pd.DataFrame, leader: pd.Series) -> str:
    equal = [name for name in rows.loc[rows["score"] == leader["score"], "series"] if name != leader["series"]]
    beside = f" with {_listed(equal)}" if equal else ""
    after = rows.iloc[1 + len(equal) :]
    following = f" Next is {after['series'].iloc[0]}: {_score(after.iloc[0])}." if len(after) else ""
    return f"{leader['series']} scores highest of {len(rows)}{beside}: {_score(leader)}; {_drop(leader)}.{following}"


def _place(row: pd.Series, place: int, n: int, pair: pd.Series | None) -> str:
    where = f"{row['series']} is {place} of {n}" if n > 1 and pd.notna(row["ratio"]) else str(row["series"])
    text = f"{where}: {_score(row)}; {_drop(row)}."
    if pair is None:
        return text
    apart = "told apart" if pair["p_holm"] < ALPHA else "not told apart"
    gap = words.interval(pair["difference"], pair["low"], pair["high"], scale=100, sign=True)
    return f"{text} Against the highest {gap}, {_p(pair['p_holm'])} after Holm’s correction: {apart}."


def _pair(pairs: pd.DataFrame, series: str, other: str) -> pd.Series | None:
    found = pairs[(pairs["series"] == series) & (pairs["other"] == other)]
    return found.iloc[0] if len(found) else None


def _apart(rows: pd.DataFrame, leader: pd.Series, pairs: pd.DataFrame) -> str:
    others = [name for name in rows["series"] if name != leader["series"]]
    tested = {name: pair for name in others if (pair := _pair(pairs, name, leader["series"])) is not None}
    apart = [name for name, pair in tested.items() if pair["p_holm"] < ALPHA]
    if not apart:
        return f"After Holm’s correction none of the other {len(tested)} is told apart from {leader['series']}."
    return (
        f"Told apart from {leader['series']} after Holm’s correction: {_listed(apart)} ({len(apart)} of {len(tested)})."
    )


def _against_dense(rows: pd.DataFrame) -> str:
    tested = rows[rows["p"].notna()]
    alike = list(tested.loc[tested["p"] >= ALPHA, "series"])
    if not alike:
        return (
            "Told apart from the dense teacher (p < 0.05, not corrected): all."
            if len(tested) > 1
            else ("Told apart from the dense teacher (p < 0.05).")
        )
    if len(tested) == 1:
        return f"Not told apart from the dense teacher ({_p(tested['p'].iloc[0])})."
    return f"Not told apart from the dense teacher (p ≥ 0.05, not corrected): {_listed(alike)}."


def _p(p: float) -> str:
    text = words.p_value(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _listed(names: list[str]) -> str:
    return ", ".join(names)
