"""The figures: the right points, the same bytes, and labels that cover nothing."""

import re
import subprocess
import sys
import warnings
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from analysis.cells import AVERAGE, cells, defaults
from analysis.drops import drops_figure, options_figure
from analysis.figures import overview_figure, pareto_figure, write_figures
from analysis.frames import read_study
from analysis.labels import Label, place
from analysis.latency import latency_figure
from analysis.predictions import Predictions
from analysis.report import regenerate
from analysis.style import RC, looks
from tests.analysis.synthetic import LOSS, glue, make_run, write_runs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    runs = glue(tasks=("sst2", "rte"), seeds=(0, 1), backbones=("base", "large"))
    return read_study(write_runs(root, runs))


@pytest.fixture(scope="module")
def table(study):
    return cells(study, Predictions(study.folder))


def panel(table, task="sst2", backbone="base"):
    rows = table[(table["backbone"] == backbone) & (table["task"] == task)]
    with mpl.rc_context(RC):
        return rows, pareto_figure(rows, backbone, looks(table["series"]))


def markers(axes):
    """Single points as (x, y) -> (marker, face colour)."""
    single = [
        line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_marker() not in ("", "None", ".", "_")
    ]
    return {
        (line.get_xdata()[0], line.get_ydata()[0]): (line.get_marker(), line.get_markerfacecolor()) for line in single
    }


def test_every_cell_is_a_point_filled_where_no_other_beats_it(table):
    rows, figure = panel(table)
    drawn = markers(figure.axes[0])
    assert len(drawn) == len(rows) == 16
    for _, row in rows.iterrows():
        near = [
            (abs(x - 100 * row["remaining"]), face) for (x, y), (_, face) in drawn.items() if y == 100 * row["score"]
        ]
        distance, face = min(near)
        assert distance < 2.0  # marks of equal cost stand side by side
        assert (face != "white") == row["on_front"]
    assert 100.0 in [x for x, _ in drawn]


def test_error_bars_span_the_interval_over_examples(table):
    rows, figure = panel(table)
    bars = [path.vertices for collection in figure.axes[0].collections for path in collection.get_paths()]
    spans = sorted(tuple(sorted(bar[:, 1])) for bar in bars)
    expected = sorted(zip(100 * rows["example_low"], 100 * rows["example_high"], strict=True))
    assert np.array(spans) == pytest.approx(np.array(expected))


def test_cheaper_is_to_the_left_and_what_is_saved_is_on_top(table):
    _, figure = panel(table)
    axes = figure.axes[0]
    left, right = axes.get_xlim()
    assert left < 45.4 < 100 < right
    assert "remaining encoder FLOPs (% of dense" in axes.get_xlabel()
    top = axes.child_axes[0]
    assert "saved" in top.get_xlabel()
    for remaining in (45.4, 100.0):
        at = axes.transData.transform((remaining, 80))[0]
        assert top.transData.transform((100 - remaining, 0))[0] == pytest.approx(at)


def boxes_of(figure, texts):
    renderer = figure.canvas.get_renderer()
    return {text: text.get_window_extent(renderer) for text in texts if text.get_text()}


@pytest.mark.parametrize("task", ["sst2", "rte", AVERAGE])
@pytest.mark.parametrize("backbone", ["base", "large"])
def test_labels_cover_neither_each_other_nor_a_point(table, task, backbone):
    _, figure = panel(table, task, backbone)
    axes = figure.axes[0]
    boxes = boxes_of(figure, axes.texts)
    names = {text.get_text() for text in boxes}
    assert {"dense", "variator", *LOSS, "k = 2", "k = 4", "k = 8"} <= names
    for (a, box), (b, other) in combinations(boxes.items(), 2):
        assert not box.overlaps(other), (a.get_text(), b.get_text())
    centres = axes.transData.transform(list(markers(axes)))
    frame = axes.get_window_extent()
    for text, box in boxes.items():
        assert not [c for c in centres if box.contains(*c)], text.get_text()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def test_points_off_their_ratios_guide_are_labelled_with_it(table):
    _, figure = panel(table)
    shown = [text.get_text() for text in figure.axes[0].texts]
    # pruning and distillation missed their target by more than the guide's reach, the others stand on it
    assert sorted(t for t in shown if t.startswith("k=")) == ["k=2", "k=2", "k=4", "k=4", "k=8", "k=8"]


@pytest.mark.parametrize("remaining", [0.96, 1.07])
def test_a_target_that_was_missed_by_far_does_not_tear_the_layout(tmp_path, remaining):
    table = cells(read_study(write_runs(tmp_path, [make_run(remaining=remaining), make_run("rte", remaining=0.3)])))
    with mpl.rc_context(RC), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = pareto_figure(table[table["task"] == "sst2"], "base", looks(table["series"]))
    axes = figure.axes[0]
    left, right = axes.get_xlim()
    assert left < min(100, 100 * remaining) and max(100, 100 * remaining) < right
    frame = axes.get_window_extent()
    assert "k=4" in {text.get_text() for text in axes.texts}
    for text, box in boxes_of(figure, axes.texts).items():
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()


def test_long_names_go_to_a_legend(tmp_path):
    runs = [make_run(ratio=k, options=o) for k in (2.0, 4.0) for o in ({}, {"bottleneck": 16, "mask_padding": False})]
    table = cells(read_study(write_runs(tmp_path, runs)))
    with mpl.rc_context(RC):
        figure = pareto_figure(table, "base", looks(table["series"]))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["dense", *sorted(set(table["series"]) - {"dense"})]
    assert not [text for text in figure.axes[0].texts if "variator" in text.get_text()]


def test_series_are_told_apart_without_colour():
    styles = looks(["dense", "variator", *(f"m{i}" for i in range(40))])
    assert len({(look.marker, str(look.dashes)) for look in styles.values()}) == len(styles)
    assert [look.colour for look in styles.values()].count(styles["variator"].colour) == 1
    styles = looks(["dense", "variator", *(f"m{i}" for i in range(8)), "m0 (steps=1)", "a (steps=1)"])
    assert len({look.colour for name, look in styles.items() if "(" not in name}) == 10
    first = [styles[name] for name in ("variator", "m0", "m1", "m2")]
    light = [float(np.dot(to_rgb(look.colour), (0.2126, 0.7152, 0.0722))) for look in first]
    assert min(abs(a - b) for a, b in pairwise(light)) > 0.02


def test_the_same_series_look_alike_whatever_their_order():
    assert looks(["variator", "a", "b"]) == looks(["b", "variator", "a", "a"])


def test_the_overview_has_a_panel_for_every_backbone_and_task(table):
    with mpl.rc_context(RC):
        figure = overview_figure(table, {"base": "base", "large": "large"}, looks(table["series"]))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"{name} · {task}" for name in ("base", "large") for task in (AVERAGE, "rte", "sst2")]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["dense", "variator"]


def test_the_latency_figure_sets_time_against_flops(table):
    rows = table[(table["backbone"] == "base") & (table["task"] == AVERAGE)]
    with mpl.rc_context(RC):
        figure = latency_figure(rows, "base", looks(table["series"]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["batch 1", "batch 32"]
    for axes, column in zip(figure.axes, ("latency_ratio.b1", "latency_ratio.b32"), strict=True):
        identity = axes.lines[0]
        assert (np.asarray(identity.get_xdata()) == np.asarray(identity.get_ydata())).all()
        ours = rows[rows["series"] == "variator"].sort_values("remaining_total")
        line = next(line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 3)
        assert np.column_stack(line.get_data()) == pytest.approx(ours[["remaining_total", column]].to_numpy())
        assert to_hex(line.get_color()).upper() == looks(table["series"])["variator"].colour


def test_nothing_timed_gives_no_latency_figure(tmp_path):
    study = read_study(write_runs(tmp_path, [make_run(latency=False), make_run(method="dense", ratio=None)]))
    names = [path.name for path in write_figures(study, cells(study), ["svg"])]
    assert names == ["pareto_t5-base_sst2.svg"]


def test_svg_keeps_its_text_and_no_date(study, table):
    base = table[(table["backbone"] == "base") & (table["task"] == "sst2")]
    text = write_figures(study, base, ["svg"])[-1].read_text()
    words = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert {"variator", "token_dropping", "k = 4", "saved (%)"} <= set(words)
    assert "<dc:date>" not in text


def test_figures_of_runs_that_are_gone_are_removed_and_others_left(study, table):
    folder = study.folder / "figures"
    table = table[table["task"] == "sst2"]
    write_figures(study, table[table["backbone"] == "base"], ["svg"])
    (folder / "mine.svg").write_text("<svg/>")
    (folder / "pareto_old_task.svg").write_text("<svg/>")
    rest = write_figures(study, table[table["backbone"] == "large"], ["svg"])
    assert set(folder.glob("*.svg")) == {*rest, folder / "mine.svg"}


def test_another_process_writes_the_same_bytes(tmp_path):
    runs = [make_run(), make_run(ratio=8.0), make_run(method="pruning"), make_run(method="dense", ratio=None)]
    folder = write_runs(tmp_path, runs)
    ours = {path: path.read_bytes() for path in regenerate(tmp_path, "glue").paths}
    assert {path.suffix for path in ours} == {".png", ".svg", ".pdf", ".csv", ".md", ".tex", ".html"}
    for path in ours:
        path.unlink()
    command = [sys.executable, "-m", "analysis", "--results", str(tmp_path), "glue"]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[2], capture_output=True)
    theirs = {
        path: path.read_bytes()
        for path in [*folder.glob("*/*.*"), folder / "report.html"]
        if path.parent.name not in ("runs", "predictions")
    }
    assert theirs == ours


def test_a_label_moves_away_from_what_is_there_and_is_tied_to_its_point():
    figure = Figure(figsize=(4, 3), dpi=100)
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    crowd = np.array([[5.0, 5.0], *[[x, y] for x in np.arange(3, 7.1, 0.5) for y in np.arange(3, 7.1, 0.5)]])
    place(figure, axes, [Label("free", "k", 5, 5)], np.array([[5.0, 5.0]]), [])
    place(figure, axes, [Label("crowded", "k", 5, 5)], crowd, [])
    free, crowded, tie = axes.texts
    assert np.hypot(*free.xyann) < np.hypot(*crowded.xyann)
    box = crowded.get_window_extent(figure.canvas.get_renderer())
    assert not [c for c in axes.transData.transform(crowd) if box.contains(*c)]
    assert tie.arrow_patch is not None and (tie.xy == crowded.xy)


def test_dense_alone_makes_a_report_without_a_latency_figure(tmp_path):
    """As after a sweep whose other cells failed: the dense run is timed too, against itself."""
    write_runs(tmp_path, [make_run(method="dense", ratio=None), make_run(status="failed", reason="off budget")])
    made = regenerate(tmp_path, "glue", ["svg"])
    assert made.paths and not any("latency" in path.name for path in made.paths)


def test_drops_are_ranked_within_each_ratio_with_their_paired_intervals(table):
    rows = table[(table["backbone"] == "base") & (table["task"] == "sst2")]
    with mpl.rc_context(RC):
        figure = drops_figure(rows, "base", looks(table["series"]))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left").startswith("k = ")]
    assert [axes.get_title(loc="left") for axes in panels] == ["k = 2", "k = 4", "k = 8"]
    for axes, (_, block) in zip(panels, rows[rows["ratio"].notna()].groupby("ratio"), strict=True):
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == list(block.sort_values("drop")["series"])
        points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() not in ("None", "", None)]
        assert points == pytest.approx(sorted(100 * block["drop"]))
        bars = [bar.get_segments()[0][:, 0] for bar in axes.collections]
        ordered = block.sort_values("drop")
        assert np.array(bars) == pytest.approx(100 * ordered[["drop_low", "drop_high"]].to_numpy())


def test_one_method_alone_has_no_figure_of_drops(tmp_path):
    table = cells(read_study(write_runs(tmp_path, [make_run(), make_run(method="dense", ratio=None)])))
    assert drops_figure(table, "base", looks(table["series"])) is None


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """Of Variator a default and a better and cheaper twin, of pruning twins alone, and a rival; and their cells."""
    runs = [
        make_run(method="dense", ratio=None),
        make_run(accuracy=0.90),
        make_run(options={"bottleneck": 16}, accuracy=0.91, remaining=0.50),
        make_run(method="pruning", options={"heads": 1}, accuracy=0.88),
        make_run(method="pruning", options={"heads": 2}, accuracy=0.87),
        make_run(method="distillation", accuracy=0.80, remaining=0.51),
    ]
    study = read_study(write_runs(tmp_path_factory.mktemp("results"), runs))
    return study, cells(study, Predictions(study.folder))


def test_methods_are_compared_as_they_are_by_default(twins):
    study, table = twins
    shown = defaults(table).set_index("series")
    assert set(table["series"]) - set(shown.index) == {"variator (bottleneck=16)"}
    assert {"pruning (heads=1)", "pruning (heads=2)"} < set(shown.index), "which of them is the default, none can tell"
    beaten = table.set_index("series")["on_front"]
    assert not beaten["variator"] and not beaten["distillation"]
    assert shown["on_front"]["variator"] and shown["on_front"]["distillation"]
    drawn = {path.name: path.read_text() for path in write_figures(study, table, ["svg"])}
    twin = re.compile(r"<text[^>]*>[^<]*bottleneck=16[^<]*</text>")
    assert [name for name, text in drawn.items() if twin.search(text)] == ["options_t5-base.svg"]


def test_options_are_ranked_beside_the_default_of_their_method(twins):
    _, table = twins
    with mpl.rc_context(RC):
        figure = options_figure(table, "base", looks(table["series"]))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}
    names = {title: [label.get_text() for label in axes.get_yticklabels()] for title, axes in panels.items()}
    assert names == {"variator, k = 4": ["bottleneck=16", "default"], "pruning, k = 4": ["heads=1", "heads=2"]}


def test_no_options_no_figure_of_them(table):
    rows = table[(table["backbone"] == "base") & (table["task"] == "sst2")]
    assert options_figure(rows, "base", looks(table["series"])) is None


def test_marks_of_equal_cost_stand_in_the_order_of_their_cost(tmp_path):
    """Else the front would fall on its way to the right."""
    cost = {"token_merging": 0.531, "token_dropping": 0.532, "pruning": 0.533, "distillation": 0.534, "variator": 0.535}
    runs = [make_run(method=name, remaining=share, accuracy=share + 0.3) for name, share in cost.items()]
    table = cells(read_study(write_runs(tmp_path, [make_run(method="dense", ratio=None), *runs])))
    _, figure = panel(table, backbone="t5-base")
    by_cost = sorted(markers(figure.axes[0]))
    assert [y for _, y in by_cost] == sorted(y for _, y in by_cost)
    steps = np.diff([x for x, _ in by_cost])
    assert min(steps) > 0.5, "they hide each other"
    assert np.mean([x for x, _ in by_cost[:5]]) == pytest.approx(53.3, abs=0.01), "they moved away from their cost"


def test_the_overview_has_no_empty_panel_where_backbones_have_other_tasks(tmp_path):
    runs = [make_run(task, method, ratio, backbone=name) for name, tasks in (("a", ["sst2"]), ("b", ["rte", "sst2"]))
            for task in tasks for method, ratio in (("dense", None), ("variator", 4.0))]  # fmt: skip
    table = cells(read_study(write_runs(tmp_path, runs)))
    with mpl.rc_context(RC):
        figure = overview_figure(table, {"a": "A", "b": "B"}, looks(table["series"]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["A · sst2", "B · average", "B · rte", "B · sst2"]
    assert all(axes.has_data() for axes in figure.axes)
