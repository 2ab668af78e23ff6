"""What the page holds of each cell and each run: numbers as in ``tables/summary.csv``, and facts to read."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

import pandas as pd

from analysis import words
from analysis.cells import AVERAGE, defaults
from analysis.comparisons import both_ways
from analysis.frames import DENSE, LeanResult, Study, groups
from analysis.page.marks import Mark
from analysis.tables import PERCENT, summary
from bench.results import Evaluation, Interval

Facts = list[tuple[str, str]]

_CONFIG_SHOWN_ELSEWHERE = {"task", "backbone", "method", "ratio", "seed", "family"}


def page_cells(
    table: pd.DataFrame, study: Study, pairs: pd.DataFrame, names: dict[str, str], styles: dict[str, Mark]
) -> list[dict[str, Any]]:
    """Describe every cell for the chart, the table and its own panel.

    Parameters
    ----------
    table
        Cells in reading order.
    study, pairs
        The runs, and the comparisons between methods.
    names, styles
        How backbones and series are shown.
    """
    if table.empty:
        return []
    numbers = summary(table)
    percent = {name: f"{name}_points" if name.startswith("drop") else f"{name}_percent" for name in PERCENT}
    keys = [*PERCENT, "parameters_added_percent", "seeds", "p", *words.batch_columns(table.columns)]
    identity = ["backbone", "task", "series", "ratio"]
    run_ids = {key: list(rows["run_id"]) for key, rows in groups(study.done, identity)} if len(study.done) else {}
    run_ids = {_key(*key): ids for key, ids in run_ids.items()}
    against = _against(pairs)
    as_default = set(defaults(table).index)
    found: list[dict[str, Any]] = []
    for i, (label, row) in enumerate(table.iterrows()):
        key = _key(*(row[name] for name in identity))
        mark = styles[row["series"]]
        cell: dict[str, Any] = {
            "id": f"c{i}", "backbone": row["backbone"], "backboneName": names[row["backbone"]], "task": row["task"],
            "series": row["series"], "k": words.ratio(row["ratio"]), "ratio": _plain(row["ratio"]),
            "options": "default" if label in as_default else "other",
            "tasks": int(row["tasks"]), "axis": _axis(row), "lacks": row["missing_tasks"],
            "dense": row["method"] == DENSE, "colour": mark.name, "path": mark.path, "dashes": mark.dashes,
            "facts": _cell_facts(row), "runs": run_ids.get(key, []), "against": against.get(key, []),
            "seedScores": [_plain(round(100 * score, 6)) for _, score in row["seed_scores"]]
            if isinstance(row["seed_scores"], tuple) else [],
        }  # fmt: skip
        shown = numbers.iloc[i]
        cell |= {name: _plain(shown[percent.get(name, name)]) for name in keys}
        found.append(cell)
    for cell in found:
        if cell["task"] == AVERAGE:
            same = [other for other in found if _but_task(other) == _but_task(cell) and other["task"] != AVERAGE]
            cell["parts"] = [other["id"] for other in same]
    return found


def page_runs(study: Study) -> dict[str, Any]:
    """Describe every run: what it scored and cost, where it came from, and the command that makes it again."""
    return {run_id: _run(result) for run_id, result in sorted(study.results.items())}


def _key(backbone: str, task: str, series: str, ratio: float) -> tuple[str, str, str, str]:
    return backbone, task, series, words.ratio(ratio)


def _but_task(cell: dict[str, Any]) -> tuple[str, str, str]:
    return cell["backbone"], cell["series"], cell["k"]


def _plain(value: Any) -> float | int | None:
    """Turn a number into what JSON holds."""
    if pd.isna(value) or math.isinf(value):
        return None
    number = float(value)
    return int(number) if number.is_integer() else number


def _axis(row: pd.Series) -> str:
    return "Mean score, × 100" if row["task"] == AVERAGE else words.metric(row["metric"])


def _percent(value: float) -> str:
    return f"{words.number(value, 2, 100)} %" if pd.notna(value) else words.MISSING


def _cell_facts(row: pd.Series) -> Facts:
    facts: Facts = []
    if row["missing_tasks"]:
        facts.append(("No average", f"lacks {row['missing_tasks']}"))
    seeds = "n/a" if pd.isna(row["seeds"]) else words.plural(int(row["seeds"]), "seed")
    over_seeds = f"{words.interval(row['score'], row['seed_low'], row['seed_high'], scale=100)} ({seeds})"
    if pd.isna(row["seed_low"]):
        over_seeds = f"no interval ({seeds})"
    facts += [
        (_axis(row), words.number(row["score"], 2, 100)),
        ("95 % over examples (bootstrap)", _bounds(row, "example")),
        ("95 % over seeds (Student's t)", over_seeds),
    ]
    if row["method"] != DENSE:
        facts += [
            ("Dense teacher", words.number(row["teacher_score"], 2, 100)),
            ("Drop, points [95 %, paired]",
             words.interval(row["drop"], row["drop_low"], row["drop_high"], 2, scale=100, sign=True)),
            ("p against dense", f"{words.p_value(row['p'])}{f' ({row.test})' if row['test'] else ''}"),
            ("Remaining encoder FLOPs: asked for", _percent(row["requested_remaining"])),
            ("Remaining encoder FLOPs: achieved", _percent(row["remaining"])),
            ("Saved encoder FLOPs", _percent(row["saved"])),
            ("Remaining FLOPs of the whole model", _percent(row["remaining_total"])),
            ("Remaining encoder FLOPs in padded batches", _percent(row["remaining_padded"])),
            ("Parameters added", f"{words.added(row['parameters_added_percent'])} % of the teacher's"),
        ]  # fmt: skip
        for column, shape in words.batch_columns(row.index.astype(str)).items():
            if pd.notna(row[column]):
                text = words.interval(row[column], row[f"{column}_low"], row[f"{column}_high"], 2)
                facts.append((f"Latency ratio, {shape}", text))
    return facts


def _bounds(row: pd.Series, kind: str) -> str:
    low, high = row[f"{kind}_low"], row[f"{kind}_high"]
    return words.MISSING if pd.isna(low) else f"[{words.number(low, 2, 100)}, {words.number(high, 2, 100)}]"


def _against(pairs: pd.DataFrame) -> dict[tuple[str, str, str, str], list[list[str]]]:
    """For each cell, how it compares with the others at its ratio: name, difference, p before and after Holm."""
    found: dict[tuple[str, str, str, str], list[list[str]]] = {}
    for _, pair in both_ways(pairs).iterrows():
        gap = words.interval(pair["difference"], pair["low"], pair["high"], scale=100, sign=True)
        line = [pair["other"], gap, words.p_value(pair["p"]), words.p_value(pair["p_holm"])]
        found.setdefault(_key(pair["backbone"], pair["task"], pair["series"], pair["ratio"]), []).append(line)
    return {key: sorted(lines, key=lambda line: words.reading_order(line[0])) for key, lines in found.items()}


def _run(result: LeanResult) -> dict[str, Any]:
    made = result.provenance
    config = result.config
    return {
        "status": result.status,
        "reason": result.reason or "",
        "traceback": result.traceback or "",
        "seed": str(config.get("seed", "")),
        "title": " · ".join(
            str(part) for part in (config.get("method"), config.get("task"), config.get("backbone")) if part
        ),
        "k": "" if config.get("method") == DENSE or config.get("ratio") is None else f"{float(config['ratio']):g}",
        "command": shlex.join(made.command),
        "notes": [*result.notes, *([result.task["caveat"]] if result.task.get("caveat") else [])],
        "provenance": _provenance(result),
        "numbers": _numbers(result),
        "setting": _setting(result),
        "predictions": result.predictions or "",
    }


def _provenance(result: LeanResult) -> Facts:
    made = result.provenance
    changed = {True: ", with uncommitted changes", False: "", None: ""}[made.dirty]
    seconds = "" if made.seconds is None else f", took {made.seconds:,.0f} s"
    seeds = ", ".join(f"{name} {seed}" for name, seed in made.seeds.items())
    data = str(result.identity.get("data", ""))
    return [
        ("Commit", f"{made.commit or 'not known'}{changed}"),
        ("Started", f"{made.started.replace('T', ' ').replace('+00:00', ' UTC')}{seconds}"),
        ("Hardware", made.hardware),
        ("Device", f"{made.device}, {words.plural(made.threads, 'thread')}"),
        ("Platform", f"{made.platform}, host {made.host}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
        ("Seeds", seeds or "not recorded"),
        ("Data", data or "not recorded"),
        ("Data digest", made.data_digest or "not recorded"),
        ("Model digest", made.model_digest or "not recorded"),
    ]


def _numbers(result: LeanResult) -> Facts:
    facts: Facts = []

    def scores(evaluations: list[Evaluation], who: str) -> None:
        for evaluation in evaluations:
            for metric, interval in evaluation.metrics.items():
                where = "dev" if evaluation.split == "dev" else "selection split"
                facts.append((f"{words.metric(metric)}{who}, {where}", _interval(interval, evaluation.n_examples)))

    scores(result.evaluations, "")
    scores(result.teacher_evaluations, " of the teacher")
    cost = result.cost
    if cost:
        dev = result.evaluation("dev")
        n = dev.n_examples if dev else 0
        facts += [
            ("Remaining encoder FLOPs: asked for",
             _percent(math.nan if cost.requested_remaining is None else cost.requested_remaining)),
            ("Remaining encoder FLOPs: achieved", _percent(cost.achieved_remaining)),
            ("Remaining FLOPs of the whole model", _percent(cost.real.remaining_total)),
        ]  # fmt: skip
        if n:
            each = f"{cost.real.compressed.encoder / n / 1e9:,.3f} of {cost.real.dense.encoder / n / 1e9:,.3f} GFLOPs"
            facts.append(("Encoder FLOPs an example", each))
        facts += [
            ("Parameters", f"{cost.parameters_total:,}: added {cost.parameters_added:,}, "
             f"trained {cost.parameters_trained:,}, of the teacher {cost.parameters_teacher:,}"),
            ("Stored beside the teacher", f"{cost.bytes_added:,} bytes"),
        ]  # fmt: skip
    facts += [("Native setting", _pairs(result.knob))] if result.knob else []
    for stage in result.training:
        found = " (found, not made again)" if stage.cached else ""
        facts.append((f"Training: {stage.name}", f"{stage.steps:,} steps, {stage.seconds:,.0f} s{found}"))
    return facts


def _interval(interval: Interval, n: int) -> str:
    text = words.interval(interval.value, interval.low, interval.high, 2, 100)
    return f"{text} on {n:,} examples"


def _setting(result: LeanResult) -> Facts:
    fields = {name: value for name, value in result.config.items() if name not in _CONFIG_SHOWN_ELSEWHERE}
    options = fields.pop("options", {})
    facts = [(name, _value(value)) for name, value in fields.items() if value is not None]
    facts += [(f"option {name}", _value(value)) for name, value in dict(options).items()]
    return facts + [(f"examples: {name.replace('_', ' ')}", f"{n:,}") for name, n in result.examples.items()]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
