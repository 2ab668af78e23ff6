"""The tables that people read: they say what the cells say, and they parse."""

import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.caveats import caveats
from analysis.cells import cells
from analysis.comparisons import comparisons
from analysis.frames import read_study
from analysis.markup import Bold, latex_escape, latex_table, markdown_table
from analysis.predictions import Predictions
from analysis.tables import write_tables
from tests.analysis.synthetic import glue, make_run, write_runs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    runs = glue(tasks=("sst2", "rte"), seeds=(0, 1), backbones=("google-t5/t5-base",), methods=("variator", "pruning"))
    return write_all(tmp_path_factory.mktemp("results"), runs)


def write_all(root, runs):
    folder = write_runs(root, runs, "glue_50%")
    study = read_study(folder)
    table = cells(study, Predictions(folder))
    paths = write_tables(study, table, comparisons(study, Predictions(folder)))
    assert all(path.is_file() for path in paths)
    return folder / "tables", study, table


def split_row(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def markdown_tables(text):
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[split_row(line) for line in block.splitlines()] for block in blocks]


def test_the_tidy_table_holds_every_run_and_every_number(written):
    folder, study, _ = written
    back = pd.read_csv(folder / "runs.csv")
    assert set(back["run_id"]) == set(study.frame["run_id"]) and set(back.columns) == set(study.frame.columns)
    assert back["score"].to_numpy() == pytest.approx(study.frame["score"].to_numpy(), nan_ok=True)


def test_the_summary_is_in_percent(written):
    folder, _, table = written
    back = pd.read_csv(folder / "summary.csv")
    assert len(back) == len(table)
    assert back["score_percent"].to_numpy() == pytest.approx(100 * table["score"].to_numpy(), abs=1e-5)
    assert (back["remaining_percent"] + back["saved_percent"]).to_numpy() == pytest.approx(100)


def test_markdown_shows_each_cell_and_marks_the_best(written):
    folder, _, table = written
    text = (folder / "summary.md").read_text()
    overview, *details = markdown_tables(text)
    for grid in (overview, *details):
        assert len({len(row) for row in grid}) == 1
    assert overview[0] == [
        "Method", "Ratio k", "Remaining encoder FLOPs, % (real tokens)",
        "rte, Accuracy, %", "sst2, Accuracy, %", "average",
    ]  # fmt: skip
    assert [row[0] for row in overview[2:5]] == ["dense", "variator", "pruning"]
    best = table[(table["task"] == "rte") & (table["ratio"] == 4.0)].set_index("series")["score"]
    shown = {row[0]: row[3] for row in overview if row[1] == "4"}
    for series, score in best.items():
        number = f"{100 * score:.1f}"
        assert shown[series] == (f"**{number}**" if score == best.max() else number)
    assert "### average over 2 tasks" in text and text.index("### average") < text.index("### rte")


def test_details_show_intervals_costs_and_units(written):
    folder, _, table = written
    detail = markdown_tables((folder / "summary.md").read_text())[1]
    row = dict(zip(detail[0], next(r for r in detail if r[:2] == ["variator", "4"]), strict=True))
    cell = table[(table["task"] == "average") & (table["series"] == "variator") & (table["ratio"] == 4.0)].iloc[0]
    score = re.match(
        r"\*\*([\d.]+) \[([\d.]+), ([\d.]+)\]\*\*", row["Mean of the tasks' first metrics, % [over examples]"]
    )
    assert [float(part) for part in score.groups()] == pytest.approx(
        [100 * cell[name] for name in ("score", "example_low", "example_high")], abs=0.051
    )
    assert row["Remaining encoder FLOPs, % (real tokens)"] == "53.4" and row["Saved, %"] == "46.6"
    assert row["Parameters added, % of teacher"] == "0.852"
    assert re.fullmatch(r"0\.\d\d \[0\.\d\d, 0\.\d\d\]", row["Latency ratio, batch 32"])
    assert row["[over seeds] (seeds)"].endswith("(2)")


def test_a_missed_target_is_marked_and_explained(written):
    folder, _, _ = written
    text = (folder / "summary.md").read_text()
    pruned = next(row for row in markdown_tables(text)[1] if row[:2] == ["pruning", "4"])
    assert "56.2†" in pruned and "† The achieved remaining share" in text


def test_failures_keep_their_reasons(written):
    folder, _, _ = written
    grid = markdown_tables((folder / "failures.md").read_text())[0]
    assert [row[5] for row in grid[2:]] == ["skipped", "failed"]
    assert grid[2][6] == r"ratio 16 asks for 41 % \| at least 45 % can be had"
    assert pd.read_csv(folder / "failures.csv")["reason"].tolist()[1] == "RuntimeError: out of memory"


def test_a_cell_without_a_score_says_what_became_of_it(tmp_path):
    runs = [
        make_run(),
        make_run(ratio=8.0),
        make_run(method="pruning", ratio=8.0),
        make_run("rte"),
        make_run("rte", ratio=8.0),
    ]
    runs.append(make_run("rte", "pruning", 8.0, status="diverged", reason="loss is nan"))
    runs.append(make_run(method="quantization", ratio=None))
    folder, _, _ = write_all(tmp_path, runs)
    text = (folder / "summary.md").read_text()
    overview = {tuple(row[:2]): row[3:] for row in markdown_tables(text)[0]}
    assert overview["pruning", "8"][0] == "diverged" and overview["pruning", "8"][2] == "n/a"
    assert "pruning at k = 8 (lacks rte)" in text


def test_latex_parses(written):
    folder, _, _ = written
    text = (folder / "summary.tex").read_text()
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 4
    for tabular in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in tabular[1].splitlines() if line.endswith(r" \\")]
        assert len(rows) > 3
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) == len(tabular[0]) - 1
        assert [tabular[1].count(rule) for rule in (r"\toprule", r"\bottomrule")] == [1, 1]
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert not re.search(r"(?<!\\)[%#_^~]", body.replace("tab:", ""))
    assert body.count("{") == body.count("}")
    assert "glue_50" in text.splitlines()[0]


@given(st.lists(st.text(st.sampled_from(list("ab \\|*`<>[]_\n"))), min_size=2, max_size=2))
def test_markdown_cells_stay_cells(texts):
    lines = markdown_table(["x", "y"], [texts, [Bold("1"), "2"]], 2).splitlines()
    assert len(lines) == 4
    unescaped = [re.sub(r"\\(.)", "", line) for line in lines]
    assert all(line.count("|") == 3 for line in unescaped)
    assert "**1**" in lines[3]


def test_latex_escapes_what_it_would_run():
    assert latex_escape(r"50 % of a_b & {c} \x") == r"50 \% of a\_b \& \{c\} \textbackslash{}x"
    assert latex_escape("[x]").startswith("{}[")  # after a line break a bracket would be its argument
    table = latex_table(["a_b", "c"], [[["x", "1"]], [[Bold("y"), "2"]]], "100 %", "tab:x")
    assert r"a\_b & c \\" in table and r"\textbf{y} & 2 \\" in table and r"\caption{100 \%}" in table
    assert table.count(r"\midrule") == 2


def test_caveats_are_read_off_the_runs(tmp_path):
    runs = [make_run("rte", seed=seed) for seed in (0, 1)]
    runs.append(make_run("sst2", config={"train_examples": None}))
    runs[0][0].provenance.commit = "fedcba9876543210"
    runs[1][0].provenance.dirty = True
    runs[2][0].provenance.hardware = "Another CPU"
    runs[2][0].evaluations[1].metrics["accuracy"].level = 0.9
    folder = write_runs(tmp_path, runs)
    (folder / "runs" / "torn.json").write_text("{")
    study = read_study(folder)
    text = "\n".join(caveats(study, cells(study, Predictions(folder))))
    for part in (
        "Trained on a sub-sample of the examples, not on all: rte (5,000 of 9,000).",
        "Dev examples evaluated: rte 277, sst2 872.",
        "Seeds in each cell: 1 to 2.",
        "Another CPU (cpu, 2 threads); Example CPU (cpu, 2 threads)",
        "2 commits",
        "1 run came from a checkout with uncommitted changes",
        "rte: A balanced sub-sample.",
        "stored at 90 %",
        "1 file could not be read",
    ):
        assert part in text, part


def test_one_seed_is_a_caveat(tmp_path):
    study = read_study(write_runs(tmp_path, [make_run()]))
    assert "One seed a cell" in "\n".join(caveats(study, cells(study)))


def test_an_average_that_lacks_a_task_is_named_with_its_ratio_if_it_has_one(tmp_path):
    runs = [make_run(task, "dense", None) for task in ("rte", "sst2")]
    runs += [make_run("sst2", "quantization", None, remaining=1.0), make_run("rte")]
    study = read_study(write_runs(tmp_path, runs))
    wanted = "task is missing: quantization (lacks rte); variator at k = 4 (lacks sst2)."
    assert wanted in "\n".join(caveats(study, cells(study)))
