"""The reader's page as a file: it holds what the tables hold, the same bytes each time, and nothing that runs."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from analysis import words
from analysis.cells import cells
from analysis.comparisons import comparisons
from analysis.frames import read_study
from analysis.page.findings import findings
from analysis.page.marks import NIGHT, PATHS, contrast, marks
from analysis.page.readme import read_readme
from analysis.predictions import Predictions
from analysis.style import looks
from tests.analysis.synthetic import glue, make_run, report, write_runs

HERE = Path(__file__).resolve()


class Reader(HTMLParser):
    """Collects elements, and what stands in the embedded scripts and the table."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.rows, self._into = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
            self._into = "script"
        if tag == "tr":
            self.rows.append((dict(attributes), []))
        if tag in ("td", "th") and self.rows:
            self.rows[-1][1].append("")
            self._into = "cell"

    def handle_endtag(self, tag):
        if tag in ("script", "td", "th"):
            self._into = None

    def handle_data(self, data):
        if self._into == "script":
            self.scripts[-1] += data
        elif self._into == "cell":
            self.rows[-1][1][-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])

    @property
    def cells(self):
        return [[" ".join(text.split()) for text in texts] for row, texts in self.rows if "data-cell" in row]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    folder = write_runs(
        root, glue(tasks=("sst2", "rte"), seeds=(0, 1), methods=("variator", "pruning", "distillation"))
    )
    report(folder)
    return folder


@pytest.fixture(scope="module")
def page(made):
    return Reader((made / "report.html").read_text("utf-8"))


def test_every_number_is_that_of_the_summary(made, page):
    summary = pd.read_csv(made / "tables" / "summary.csv", keep_default_na=False, na_values=[""])
    held = pd.DataFrame(page.data["cells"])
    key = ["backbone", "task", "series", "ratio"]
    held = held.set_index(pd.MultiIndex.from_frame(held[key].fillna({"ratio": -1.0}).astype({"ratio": float})))
    summary = summary.set_index(pd.MultiIndex.from_frame(summary[key].fillna({"ratio": -1.0})))
    assert set(held.index) == set(summary.index) and len(held) == len(summary)
    summary = summary.loc[held.index]
    compared = 0
    for column in summary.columns:
        name = column.removesuffix("_percent").removesuffix("_points")
        ours = column if column in held else name
        if ours not in held or column in (*key, "tasks", "drop_percent"):
            continue
        np.testing.assert_array_equal(held[ours].to_numpy(dtype=float), summary[column].to_numpy(dtype=float), column)
        compared += 1
    assert compared >= 18


def test_the_table_shows_those_numbers_and_marks_the_best(made, page):
    summary = pd.read_csv(made / "tables" / "summary.csv")
    shown = {(row[2], row[3], row[0], row[1]): row for row in page.cells}
    assert len(shown) == len(summary)
    for _, cell in summary.iterrows():
        row = shown[cell["backbone"], cell["task"], cell["series"], words.ratio(cell["ratio"])]
        low, high = (words.number(cell[f"example_{end}_percent"]) for end in ("low", "high"))
        score = words.number(cell["score_percent"])
        assert row[4] == f"{score}{' best' if cell['best'] else ''} [{low}, {high}]"
        assert row[7].split()[0].rstrip("†") == words.number(cell["remaining_percent"])
        assert row[9].split()[0] == words.number(cell["saved_percent"])
        if cell["method"] != "dense":
            assert row[-1] == words.p_value(cell["p"])
            assert row[6].split()[0] == words.number(cell["drop_points"], sign=True)


def test_the_best_of_each_column_is_marked_at_equal_ratio(made, page):
    summary = pd.read_csv(made / "tables" / "summary.csv")
    for (task, ratio), rivals in summary.groupby(["task", "ratio"]):
        rows = [row for row in page.cells if (row[3], row[1]) == (task, words.ratio(ratio))]
        for column, name, least in (
            (7, "remaining_percent", True),
            (9, "saved_percent", False),
            (6, "drop_points", True),
        ):
            marked = {row[0] for row in rows if " best" in row[column]}
            extreme = rivals[name].min() if least else rivals[name].max()
            assert marked == set(rivals.loc[rivals[name] == extreme, "series"]), (task, ratio, name)
    assert not any(" best" in text for row in page.cells for text in row if row[0] == "dense")


def test_every_run_has_its_provenance_and_its_command(made, page):
    runs = page.data["runs"]
    files = {path.stem: json.loads(path.read_text()) for path in (made / "runs").glob("*.json")}
    assert set(runs) == set(files)
    for run_id, run in runs.items():
        raw = files[run_id]
        assert run["command"].split() == raw["provenance"]["command"] and run["status"] == raw["status"]
        told = dict(map(tuple, run["provenance"]))
        assert told["Commit"] == raw["provenance"]["commit"] and told["Hardware"] == raw["provenance"]["hardware"]
        assert (
            "torch 2.13.0" in told["Versions"]
            and "2 threads" in told["Device"]
            and told["Data"] == f"data-of-{raw['config']['task']}"
        )
    behind = [run for cell in page.data["cells"] for run in cell["runs"]]
    assert sorted(behind) == sorted(run_id for run_id, raw in files.items() if raw["status"] == "done")


def test_averages_name_their_parts(page):
    by_id = {cell["id"]: cell for cell in page.data["cells"]}
    for cell in by_id.values():
        if cell["task"] == "average":
            parts = [by_id[part] for part in cell["parts"]]
            assert {part["task"] for part in parts} == {"sst2", "rte"} and not cell["runs"]
            assert np.mean([part["score"] for part in parts]) == pytest.approx(cell["score"], abs=1e-5)


def test_runs_without_a_score_are_listed_with_reasons(page):
    left = [texts for row, texts in page.rows if "data-run" in row]
    assert sorted((texts[5], texts[6]) for texts in left) == [
        ("failed", "RuntimeError: out of memory"), ("skipped", "ratio 16 asks for 41 % | at least 45 % can be had"),
    ]  # fmt: skip


def test_pairs_are_seen_from_both_sides(made, page):
    pairs = pd.read_csv(made / "tables" / "comparisons.csv")
    pair = pairs[(pairs["task"] == "rte") & (pairs["ratio"] == 4)].iloc[0]
    of = {cell["series"]: cell for cell in page.data["cells"] if (cell["task"], cell["k"]) == ("rte", "4")}
    mine = next(line for line in of[pair["a"]]["against"] if line[0] == pair["b"])
    theirs = next(line for line in of[pair["b"]]["against"] if line[0] == pair["a"])
    scaled = {"scale": 100, "sign": True}
    assert mine[1] == words.interval(pair["difference"], pair["low"], pair["high"], **scaled)
    assert theirs[1] == words.interval(-pair["difference"], -pair["high"], -pair["low"], **scaled)
    assert mine[2:] == theirs[2:] == [words.p_value(pair["p"]), words.p_value(pair["p_holm"])]


def test_colours_and_markers_are_those_of_the_figures():
    names = ["dense", *(f"rival_{i:02}" for i in range(25)), "variator"]
    ours, theirs = marks(names), looks(names)
    assert list(ours) == list(theirs)
    for name, mark in ours.items():
        assert mark.light == to_hex(theirs[name].colour) and mark.path == PATHS[theirs[name].marker]
        assert contrast(mark.dark, NIGHT) >= 4.5
    assert len({(mark.light, mark.path) for mark in ours.values()}) == len(names)
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )
    assert NIGHT in (HERE.parents[2] / "analysis" / "page" / "page.css").read_text()


def test_nothing_is_fetched_and_only_its_own_scripts_run(made, page):
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    assert re.fullmatch(r"'sha256-\S+' 'sha256-\S+'", rules["script-src"]) and "unsafe" not in policy
    for tag, attributes in page.elements:
        assert "src" not in attributes and tag not in ("img", "iframe", "object", "base", "form"), (tag, attributes)
        assert tag != "link" or attributes["href"] == "data:,"


def test_the_same_results_give_the_same_bytes(made, tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.analysis.synthetic import report;report(Path(sys.argv[1]))"
    )
    before = (made / "report.html").read_bytes()
    (made / "report.html").unlink()
    surroundings = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Pacific/Auckland", "PYTHONPATH": str(HERE.parents[2])}
    subprocess.run([sys.executable, "-c", script, str(made)], check=True, env=surroundings, cwd=tmp_path)
    assert (made / "report.html").read_bytes() == before


def test_a_study_of_failures_has_a_page(tmp_path):
    folder = write_runs(tmp_path, [make_run(status="failed", reason="boom")])
    report(folder)
    page = Reader((folder / "report.html").read_text())
    assert page.data["cells"] == [] and next(iter(page.data["runs"].values()))["reason"] == "boom"


def test_files_left_out_are_named(tmp_path):
    folder = write_runs(tmp_path, [make_run()])
    (folder / "runs" / "torn.json").write_text("{")
    report(folder)
    assert "torn.json is left out" in (folder / "report.html").read_text()


def found(runs, root):
    folder = write_runs(root, runs)
    study = read_study(folder)
    predictions = Predictions(folder)
    table = cells(study, predictions)
    blocks = findings(table, comparisons(study, predictions), words.short_names(table["backbone"]))
    return {(block.task, at.ratio): " ".join(at.sentences) for block in blocks for at in block.findings}


def test_findings_say_who_leads_where_variator_stands_and_what_is_told_apart(tmp_path):
    runs = [make_run("sst2", "dense", None)]
    for method, accuracy in (("variator", 0.90), ("pruning", 0.905), ("token_merging", 0.55)):
        runs.append(make_run("sst2", method, 4.0, accuracy=accuracy))
    runs.append(make_run("sst2", "variator", 2.0, accuracy=0.60))
    told = found(runs, tmp_path)
    text = told["sst2", "k = 4"]
    assert text.startswith("pruning scores highest of 3: 90.5 [") and "Next is variator: 90.0 [" in text
    assert "variator is 2 of 3" in text and "after Holm’s correction: not told apart" in text
    assert "Told apart from pruning after Holm’s correction: token_merging (1 of 2)." in text
    assert "Not told apart from the dense teacher" not in text or "token_merging" not in text.rsplit(":", 1)[1]
    alone = told["sst2", "k = 2"]
    assert alone.startswith("variator: 60.") and alone.endswith("Told apart from the dense teacher (p < 0.05).")


def test_findings_are_about_methods_as_they_are_by_default(tmp_path):
    runs = [make_run("sst2", "dense", None), make_run(accuracy=0.85), make_run("sst2", "pruning", accuracy=0.8)]
    runs.append(make_run(options={"bottleneck": 16}, accuracy=0.9))
    text = found(runs, tmp_path)["sst2", "k = 4"]
    assert text.startswith("variator scores highest of 2: 85.0") and "bottleneck" not in text


def test_a_readme_is_shown_without_markup_of_its_own(tmp_path):
    path = tmp_path / "README.md"
    assert read_readme(path) is None
    path.write_text(
        "# The *study*\n\nText <b onclick=x>raw</b> ![see](http://x/y.png)\n"
        "[a](javascript:alert(1)) [b](../other/README.md)\n\n"
        "## Part\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n```sh\nbench run  # x <y>\n```\n"
    )
    readme = read_readme(path)
    assert readme.title == "The *study*" and "<h3>Part</h3>" in readme.body and "<td>2</td>" in readme.body
    tags = Reader(readme.body).elements
    assert [a["href"] for tag, a in tags if tag == "a" and "href" in a and "other" in a["href"]] == [
        "../other/README.md"
    ]
    assert not [tag for tag, a in tags if tag in ("img", "b", "script") or "javascript" in str(a)]
    path.write_bytes(b"no heading \xff\n")
    assert read_readme(path).title == "" and "no heading" in read_readme(path).body
