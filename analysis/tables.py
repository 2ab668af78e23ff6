"""The tables of a study: everything as CSV, the summary for people as Markdown and LaTeX, and what failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from analysis import words
from analysis.caveats import caveats, off_target, off_target_note
from analysis.cells import AVERAGE
from analysis.frames import DENSE, Study, groups
from analysis.markup import Bold, latex_escape, latex_table, markdown_escape, markdown_table
from bench.results import write_atomic

PERCENT = (
    "score", "example_low", "example_high", "seed_low", "seed_high", "teacher_score", "drop", "drop_low", "drop_high",
    "requested_remaining", "remaining", "saved", "remaining_padded", "remaining_total",
)  # fmt: skip
RELATIVE = "Drop, % of teacher"
NOTES = (
    words.CONVENTION,
    "A score's interval is the central 95 % of a bootstrap over dev examples, each with all its seeds; the interval "
    "over seeds is Student's.",
    "Ratio k is the plugin's k; for any other method it asks for the same remaining encoder FLOPs as the plugin at k.",
    "Drop is the teacher's score minus the model's, seed by seed: positive is worse. Its interval is a bootstrap over "
    "dev examples, paired: narrower than the scores' own, as both answer the same examples.",
    "A latency ratio is the median of compressed / dense over interleaved timings: below 1 is faster.",
    "p compares with the dense teachers of the same seeds on the same examples: McNemar's exact test for the accuracy "
    "of one seed, else a paired bootstrap of the score.",
)
BOLD = "Bold is the best score of a column at equal ratio."


def write_tables(study: Study, table: pd.DataFrame, pairs: pd.DataFrame) -> list[Path]:
    """Write ``tables/`` of a study and return the paths.

    Parameters
    ----------
    study
        Its runs.
    table
        Its cells, as `analysis.cells.cells` gives them.
    pairs
        Comparisons between its methods, as `analysis.comparisons.comparisons` gives them.
    """
    files = {"runs.csv": _csv(study.frame), "failures.csv": _csv(failures(study.frame))}
    files["failures.md"] = _failures_markdown(study)
    if len(table):
        files["summary.csv"] = _csv(summary(table))
        files["summary.md"] = summary_markdown(study, table)
        files["summary.tex"] = summary_latex(study, table)
        files["comparisons.csv"] = _csv(pairs)
    folder = study.folder / "tables"
    for name, text in files.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in sorted(files)]


def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the runs without a score, with their reasons; a run that is done without a score is one of them."""
    left = frame[(frame["status"] != "done") | frame["score"].isna()]
    columns = ["backbone", "task", "series", "ratio", "seed", "status", "reason", "run_id"]
    left = left[columns].sort_values(columns[:5], ignore_index=True)
    return left.assign(reason=left["reason"].fillna("no reason given"))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return the cells with fractions as percent, the unit being in each column's name."""
    ratios = [c for c in table.columns if c.startswith(("latency_ratio", "memory_ratio"))]
    counts = ["parameters_added_percent", "parameters_trained", "bytes_added", "training_seconds", "training_flops"]
    head = ["backbone", "task", "metric", "series", "method", "ratio", "seeds", "tasks", "missing_tasks", "n_examples"]
    columns = [*head, *PERCENT, "drop_percent", *counts, *ratios, "p", "test", "best", "on_front"]
    shown = table.reindex(columns=columns)
    shown[list(PERCENT)] = (100 * shown[list(PERCENT)]).round(6)
    return shown.rename(
        columns={name: f"{name}_points" if name.startswith("drop") else f"{name}_percent" for name in PERCENT}
    )


def blocks(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (backbone, task, rows) in the order in which they are read: the average first, dense on top of each."""
    for backbone in sorted(table["backbone"].unique()):
        mine = table[table["backbone"] == backbone]
        for task in sorted(mine["task"].unique(), key=lambda name: (name != AVERAGE, name)):
            rows = mine[mine["task"] == task]
            yield backbone, task, _ordered(rows)


def summary_markdown(study: Study, table: pd.DataFrame) -> str:
    """Write the summary that a stranger reads: conventions, an overview and the details for each backbone."""
    names = words.short_names(table["backbone"])
    text = [f"# {markdown_escape(study.name)}\n"]
    notes = [*NOTES, *([BOLD] if table["best"].any() else []), *caveats(study, table)]
    text += [f"- {markdown_escape(note)}" for note in notes]
    current = None
    for backbone, task, rows in blocks(table):
        if backbone != current:
            current = backbone
            text.append(f"\n## {markdown_escape(names[backbone])}\n")
            headers, layout = overview(study, table, backbone)
            text.append(markdown_table(headers, [row for group in layout for row in group]))
        headers, details = detail(rows)
        text.append(f"### {markdown_escape(task_title(task, rows))}\n\n{markdown_table(headers, details)}")
    return "\n".join(text)


def summary_latex(study: Study, table: pd.DataFrame) -> str:
    r"""Write the same as floats to be ``\input`` into a document that loads booktabs."""
    names = words.short_names(table["backbone"])
    parts = [f"% {study.name}: made by python -m analysis. Needs \\usepackage{{booktabs}}.\n"]
    parts += [f"% {latex_escape(line)}" for line in caveats(study, table)]
    for backbone in sorted(names):
        headers, layout = overview(study, table, backbone)
        caption = f"{names[backbone]}: scores on dev (×100). {words.CONVENTION} {BOLD}"
        parts.append(latex_table(headers, layout, caption, f"tab:{words.slug(names[backbone])}"))
    for backbone, task, rows in blocks(table):
        headers, details = detail(rows, narrow=True)
        title = f"{names[backbone]}, {task_title(task, rows)}."
        caption = " ".join([title, words.CONVENTION, NOTES[1], off_target_note(rows)]).rstrip()
        label = f"tab:{words.slug(names[backbone])}:{words.slug(task)}"
        parts.append(latex_table(headers, [details], caption, label))
    return "\n".join(parts)


def overview(study: Study, table: pd.DataFrame, backbone: str) -> tuple[list[str], list[list[list[str]]]]:
    """Lay out methods x tasks: headers, and the rows of each ratio.

    The remaining share is the average over tasks; a cell without a score says what became of its runs.
    """
    mine = table[table["backbone"] == backbone]
    tasks = sorted(mine["task"].unique(), key=lambda name: (name == AVERAGE, name))
    headers = ["Method", "Ratio k", "Remaining encoder FLOPs, % (real tokens)"]
    headers += [task if task == AVERAGE else f"{task}, {words.metric(_first(mine, task))}" for task in tasks]
    runs = study.frame[study.frame["backbone"] == backbone]
    layout = []
    for ratio, block in groups(_ordered(mine), "ratio", sort=False):
        group = []
        for series, cells in groups(block, "series", sort=False):
            by_task = cells.set_index("task")
            real = cells[cells["task"] != AVERAGE]
            row = [series, words.ratio(ratio), words.number(real["remaining"].mean(), scale=100)]
            for task in tasks:
                if task in by_task.index and pd.notna(by_task.loc[task, "score"]):
                    text = words.number(by_task.loc[task, "score"], scale=100)
                    row.append(Bold(text) if by_task.loc[task, "best"] else text)
                else:
                    row.append(_fate(runs, task, series, ratio))
            group.append(row)
        layout.append(group)
    return headers, layout


def detail(rows: pd.DataFrame, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Lay out all numbers of one backbone and task; ``narrow`` leaves out what a page's width has no room for."""
    latency = words.batch_columns(rows.columns)
    latency = {column: text for column, text in latency.items() if rows[column].notna().any()}
    headers = [
        "Method", "Ratio k", f"{words.metric(rows['metric'].iloc[0])} [over examples]", "[over seeds] (seeds)",
        "Drop, points [paired, over examples]", RELATIVE, "Remaining encoder FLOPs, % (real tokens)", "Saved, %",
        "Parameters added, % of teacher", *(f"Latency ratio, {shape}" for shape in latency.values()), "p against dense",
    ]  # fmt: skip
    grid = []
    for (_, row), off in zip(rows.iterrows(), off_target(rows), strict=True):
        score = words.interval(row["score"], row["example_low"], row["example_high"], scale=100)
        if row["missing_tasks"]:
            score = f"lacks {row['missing_tasks']}"
        compressed = row["method"] != DENSE
        grid.append(
            [
                str(row["series"]),
                words.ratio(row["ratio"]),
                Bold(score) if row["best"] else score,
                _over_seeds(row),
                words.interval(row["drop"], row["drop_low"], row["drop_high"], scale=100, sign=True)
                if compressed
                else "",
                words.number(row["drop_percent"], sign=True) if compressed else "",
                words.number(row["remaining"], scale=100) + ("†" if off else ""),
                words.number(row["saved"], scale=100),
                words.added(row["parameters_added_percent"]),
                *(_latency(row, column, narrow) for column in latency),
                words.p_value(row["p"]) if compressed else "",
            ]
        )
    kept = [i for i, header in enumerate(headers) if not (narrow and header == RELATIVE)]
    return [headers[i] for i in kept], [[row[i] for i in kept] for row in grid]


def _latency(row: pd.Series, column: str, narrow: bool) -> str:
    if row["method"] == DENSE:
        return ""
    if narrow:
        return words.number(row[column], 2)
    return words.interval(row[column], row[f"{column}_low"], row[f"{column}_high"], 2)


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    ranked = rows.assign(rank=rows["series"].map(words.reading_order))
    return ranked.sort_values(["ratio", "rank"], na_position="first").drop(columns="rank")


def _over_seeds(row: pd.Series) -> str:
    if pd.isna(row["seeds"]):
        return words.MISSING
    if pd.isna(row["seed_low"]):
        return f"({row['seeds']:.0f})"
    low, high = (words.number(row[end], scale=100) for end in ("seed_low", "seed_high"))
    return f"[{low}, {high}] ({row['seeds']:.0f})"


def _fate(runs: pd.DataFrame, task: str, series: str, ratio: float) -> str:
    if task == AVERAGE:
        return words.MISSING
    same = runs["ratio"].isna() if pd.isna(ratio) else runs["ratio"] == ratio
    found = sorted(runs.loc[(runs["task"] == task) & (runs["series"] == series) & same, "status"].unique())
    return ", ".join(found) or "not run"


def _first(rows: pd.DataFrame, task: str) -> str:
    return str(rows.loc[rows["task"] == task, "metric"].iloc[0])


def task_title(task: str, rows: pd.DataFrame) -> str:
    """Name a task, or the average over so many."""
    return f"average over {int(rows['tasks'].max())} tasks" if task == AVERAGE else task


def _failures_markdown(study: Study) -> str:
    left = failures(study.frame)
    text = [f"# {markdown_escape(study.name)}: failed, skipped and unfinished runs\n"]
    if left.empty:
        text.append("None.\n")
    else:
        headers = ["Backbone", "Task", "Method", "Ratio k", "Seed", "Status", "Reason", "Run"]
        shown = left.assign(ratio=left["ratio"].map(words.ratio))
        text.append(markdown_table(headers, shown.astype(str).to_numpy().tolist(), len(headers)))
    text += [f"- {markdown_escape(problem)}" for problem in study.problems]
    return "\n".join(text).rstrip() + "\n"


def _csv(frame: pd.DataFrame) -> str:
    return str(frame.to_csv(index=False, lineterminator="\n"))
