"""What a study of serving shows: numbers against another way to them, tables that are whole, figures and commands."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from scipy import stats

from analysis.report import regenerate
from analysis.serving.figures import policies_figure
from analysis.serving.frames import Serving, agreement_frame, differences_frame, read_serving, served_frame
from analysis.serving.report import write_serving
from analysis.serving.tables import CONDITION, load_name, policy_name, tables
from analysis.style import FORMATS, RC
from bench.cli import main
from bench.errors import DamagedResult
from bench.serving.agreement import simulate_again
from bench.serving.records import Mode, Served, ServingCell, ServingStore, ServingStudy
from tests.analysis.synthetic import make_run, write_runs
from tests.bench.serving.calibrated import calibration

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, REQUESTS, SECONDS, DEADLINE = 50, 250, 10.0, 0.2
KS = (1, 2, 16)
POLICIES = ("static:k=1", "static:k=2", "static:k=16", "deadline:margin=0.5", "queue:up=1,down=0.25")
LOADS = ("poisson:load=1.1", "bursty:low=0.4,high=1.4,stay=3", "replay:file=my_trace_1.txt")
FIGURES = ("agreement", "real", "real_rivals", "simulated", "simulated_rivals", "timeline")
TABLES = {"serving.csv", "serving.md", "serving.tex", "serving_agreement.csv", "serving_differences.csv"}
RIGHT = {
    engine: {k: np.random.default_rng([seed, k]).random(EXAMPLES) < 0.9 - 0.015 * k for k in KS}
    for seed, engine in enumerate(("variator", "pruning"))
}
"""Which dev examples each model answers; what a request finds right depends on nothing else."""


class Key(NamedTuple):
    """What one cell is."""

    mode: Mode
    load: str
    engine: str
    policy: str
    seed: int
    replicas: int = 1
    times: float = 1.0


def serve(key: Key) -> Served:
    """Make up a load: the same requests for every engine and policy, and answers of any lateness."""
    rng = np.random.default_rng([key.seed, LOADS.index(key.load)])
    arrived, example = np.sort(rng.uniform(0, SECONDS, REQUESTS + 10 * key.seed)), None
    example = rng.integers(EXAMPLES, size=len(arrived), dtype=np.int32)
    own = np.random.default_rng([key.seed, *"".join(map(str, key)).encode()])
    static = re.fullmatch(r"static:k=(\d+)", key.policy)
    k = np.full(len(arrived), int(static[1])) if static else own.choice(KS, len(arrived))
    finished, free = np.empty(len(arrived)), 0.0
    for i, seconds in enumerate(own.lognormal(-3.6, 0.6, len(arrived)) / k**0.1):  # one by one
        finished[i] = free = max(free, arrived[i]) + seconds
    latency = finished - arrived
    score = np.array([RIGHT[key.engine][int(at)][i] for at, i in zip(k, example, strict=True)], np.float32)
    return Served(example, arrived, arrived + latency / 3, finished, k.astype(np.int16), score)


def write_study(
    root: Path, loads: Sequence[str] = LOADS, engines: Sequence[str] = ("variator", "pruning"),
    policies: Sequence[str] = POLICIES, modes: Sequence[Mode] = ("real", "simulated"), name: str = "serving",
) -> dict[Key, Served]:  # fmt: skip
    """Write a study as serving does: one seed in real time, three simulated, and those once for ten replicas."""
    store, written = ServingStore(root / name), {}
    keys = [
        Key(mode, load, engine, policy, seed, *scale)
        for mode in modes
        for load in loads
        for engine in engines
        for policy in policies
        for seed, *scale in ([(0,)] if mode == "real" else [(0,), (1,), (2,), (0, 10, 10.0)])
    ]
    run = make_run()[0]
    study = ServingStudy(
        study=name, task="sst2", backbone="t5-base", seed=0, deadline_seconds=DEADLINE, max_batch=4, capacity=30.0,
        provenance=run.provenance,
        calibrations=[
            calibration(lambda k, size, n: [size / 30 / k**0.5] * 3, ks=KS, examples=[8] * EXAMPLES, engine=engine,
                        scores=[RIGHT[engine][k].astype(float).tolist() for k in KS]) for engine in engines
        ],
    )  # fmt: skip
    store.write(study)
    for number, key in enumerate(keys):
        served, cell_id = serve(key), f"{number:016x}"
        cell = ServingCell(
            cell_id=cell_id, engine=key.engine, policy=key.policy, load=key.load, load_seed=key.seed, mode=key.mode,
            replicas=key.replicas, times=key.times, seconds=SECONDS, offered=len(served.arrived) / SECONDS,
            summary=served.summary(DEADLINE), requests=f"requests/{cell_id}.parquet" if key.mode == "real" else None,
        )  # fmt: skip
        store.add(cell, served, served.tally(EXAMPLES, DEADLINE))
        written[key] = served
    return written


class Made(NamedTuple):
    """A study that was written, and what was read of it."""

    root: Path
    written: dict[Key, Served]
    serving: Serving
    agreement: pd.DataFrame


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("results")
    written = write_study(root)
    serving = read_serving(root / "serving")
    assert serving
    return Made(root, written, serving, agreement_frame(serving))


def of(made: Made, row: Any, engine: str | None = None, policy: str | None = None) -> list[Served]:
    """Return what a row of a frame is made of, one load for each seed."""
    wanted = (row.mode, row.load, engine or row.engine, policy or row.policy, row.replicas, row.times)
    return [s for k, s in made.written.items() if (k.mode, k.load, k.engine, k.policy, k.replicas, k.times) == wanted]


def rows(frame: Any, every: int = 1) -> Iterator[Any]:
    yield from list(frame.itertuples())[::every]


def by_example(served: Sequence[Served], late_is_wrong: bool) -> list[list[float]]:
    """Return the scores of all requests for each example."""
    found: list[list[float]] = [[] for _ in range(EXAMPLES)]
    for load in served:
        for i, score, latency in zip(load.example, load.score, load.finished - load.arrived, strict=True):
            found[i].append(float(score) if latency <= DEADLINE or not late_is_wrong else 0.0)
    return found


def resampled(*scores: list[list[float]], draws: int = 2500) -> NDArray[np.float64]:
    """Draw examples with replacement, pool the requests for them, and take the mean; minus the second one's, if any."""
    rng, found = np.random.default_rng(7), []
    sums = [(np.array([sum(s) for s in each]), np.array([len(s) for s in each])) for each in scores]
    for _ in range(draws):
        chosen = rng.integers(EXAMPLES, size=EXAMPLES)
        means = [total[chosen].sum() / count[chosen].sum() for total, count in sums]
        found.append(means[0] - (means[1] if len(means) > 1 else 0))
    return np.array(found)


def agrees(low: float, high: float, draws: NDArray[np.float64]) -> bool:
    """Whether an interval is that of other draws, of which each end has a standard error of about 0.08 sigma."""
    ends = np.quantile(draws, [0.025, 0.975])
    return bool((abs(np.array([low, high]) - ends) < 0.4 * draws.std()).all())


def test_scores_are_means_over_requests_with_intervals_over_examples(made: Made) -> None:
    frame = served_frame(made.serving)
    assert len(frame) == len(LOADS) * 2 * len(POLICIES) * 3
    for row in rows(frame, 9):
        loads = of(made, row)
        assert row.seeds == len(loads) == (3 if row.mode == "simulated" and row.replicas == 1 else 1)
        assert row.requests == sum(len(load.arrived) for load in loads)
        for name, late in (("accuracy", False), ("right_in_time", True)):
            scores = by_example(loads, late)
            assert getattr(row, name) == pytest.approx(np.mean([s for each in scores for s in each]), abs=1e-6)
            low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
            assert low < getattr(row, name) < high and agrees(low, high, resampled(scores))


def test_an_interval_over_examples_is_wider_than_one_over_requests(made: Made) -> None:
    """Several requests for one example say no more of the model than one."""
    frame = served_frame(made.serving)
    row = next(rows(frame[(frame["seeds"] == 3) & (frame["policy"] == "static:k=16")]))
    naive = 2 * 1.96 * np.sqrt(row.accuracy * (1 - row.accuracy) / row.requests)
    assert row.accuracy_high - row.accuracy_low > 2.5 * naive


def test_shares_in_time_and_latencies_have_students_interval_over_seeds(made: Made) -> None:
    for row in rows(served_frame(made.serving), 7):
        loads = of(made, row)
        latencies = [load.finished - load.arrived for load in loads]
        spans = [load.finished.max() - load.arrived.min() for load in loads]
        for name, values in {
            "in_time": [np.mean(seconds <= DEADLINE) for seconds in latencies],
            **{f"p{q}_ms": [1000 * np.quantile(seconds, q / 100) for seconds in latencies] for q in (50, 95, 99)},
            "answers_per_second": [len(load.arrived) / span for load, span in zip(loads, spans, strict=True)],
        }.items():
            assert getattr(row, name) == pytest.approx(np.mean(values))
            bounds = [getattr(row, f"{name}_low"), getattr(row, f"{name}_high")]
            if len(values) == 1:
                assert np.isnan(bounds).all()
            else:
                ends = np.array(stats.ttest_1samp(values, 0).confidence_interval(0.95))
                assert bounds == pytest.approx(np.clip(ends, 0, 1) if name == "in_time" else ends)
        every = np.concatenate([load.k for load in loads])
        assert [getattr(row, f"share_at_k{k}") for k in KS] == pytest.approx([np.mean(every == k) for k in KS])
        assert row.offered_per_second == pytest.approx(np.mean([len(load.arrived) / SECONDS for load in loads]))


def test_differences_are_paired(made: Made) -> None:
    frame = differences_frame(made.serving)
    for row in rows(frame, 13):
        ours, theirs = of(made, row), of(made, row, row.against_engine, row.against_policy)
        for name, late in (("accuracy", False), ("right_in_time", True)):
            scores = [by_example(loads, late) for loads in (ours, theirs)]
            means = [np.mean([s for each in side for s in each]) for side in scores]
            assert getattr(row, name) == pytest.approx(means[0] - means[1], abs=1e-6)
            assert agrees(getattr(row, f"{name}_low"), getattr(row, f"{name}_high"), resampled(*scores))
        a, b = ([np.mean(load.finished - load.arrived <= DEADLINE) for load in side] for side in (ours, theirs))
        assert row.in_time == pytest.approx(np.mean(a) - np.mean(b))
        bounds = [row.in_time_low, row.in_time_high]
        if len(a) == 1:
            assert np.isnan(bounds).all()
        else:
            assert bounds == pytest.approx(stats.ttest_rel(a, b).confidence_interval(0.95))


def test_an_adaptive_policy_is_set_against_its_statics_and_itself_on_rivals(made: Made) -> None:
    frame = differences_frame(made.serving)
    one = frame[(frame["mode"] == "real") & (frame["load"] == LOADS[0])]
    pairs = {(row.engine, row.policy, row.against_engine, row.against_policy) for row in rows(one)}
    adaptive, statics = POLICIES[3:], POLICIES[:3]
    assert pairs == {(e, a, e, s) for e in ("variator", "pruning") for a in adaptive for s in statics} | {
        ("variator", a, "pruning", a) for a in adaptive
    }
    assert len(one) == len(pairs) and len(frame) == len(pairs) * len(LOADS) * 3


def test_policies_that_answer_alike_do_not_differ(tmp_path: Path) -> None:
    """Paired by example, two that answer the same have no difference, however uncertain the level of each is."""
    write_study(tmp_path, LOADS[:1], ["variator"], ["static:k=2", "deadline:margin=0.5"], ["simulated"])
    store = ServingStore(tmp_path / "serving")
    cells = {(cell.policy, cell.load_seed, cell.replicas): cell for cell in store}
    for (policy, *which), cell in cells.items():
        if policy.startswith("deadline"):
            content = (store.folder / f"tallies/{cells['static:k=2', *which].cell_id}.parquet").read_bytes()
            (store.folder / f"tallies/{cell.cell_id}.parquet").write_bytes(content)
    serving = read_serving(store.folder)
    assert serving
    for row in rows(differences_frame(serving)):
        assert (row.accuracy, row.accuracy_low, row.accuracy_high) == (0, 0, 0)


def test_real_time_is_set_against_the_simulation_of_the_same_arrivals(made: Made) -> None:
    frame = made.agreement
    assert len(frame) == len(LOADS) * 2 * len(POLICIES) and set(frame["seed"]) == {0}
    cells = {(c.engine, c.policy, c.load): c for c in made.serving.store if c.mode == "real"}
    for row in rows(frame):
        key = Key("real", row.load, row.engine, row.policy, 0)
        pair = [made.written[key], made.written[key._replace(mode="simulated")]]
        real, simulated = (1000 * np.quantile(served.finished - served.arrived, 0.95) for served in pair)
        assert (row.p95_ms_real, row.p95_ms_simulated) == pytest.approx((real, simulated))
        assert row.ratio == pytest.approx(simulated / real)
        again = simulate_again(made.serving.store, made.serving.study, cells[row.engine, row.policy, row.load])
        assert again
        assert (row.pace, row.p95_ms_paced) == (again[0], 1000 * again[1].summary(DEADLINE).p95_seconds)
        assert row.ratio_paced == pytest.approx(row.p95_ms_paced / real)


def test_engines_and_ks_are_in_their_order(made: Made) -> None:
    frame = served_frame(made.serving)
    one = frame[(frame["mode"] == "real") & (frame["load"] == LOADS[0])]
    assert list(zip(one["engine"], one["policy"], strict=True)) == [
        (engine, policy) for engine in ("variator", "pruning") for policy in POLICIES
    ]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_is_whole(made: Made) -> None:
    text = tables(made.serving, made.agreement)["serving.md"]
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    # engines, and each of the loads in three ways, with the differences of each
    assert len(blocks) == 1 + 2 * 3 * len(LOADS)
    for block in blocks:
        widths = {len(cells_of(line)) for line in block}
        assert len(widths) == 1 and set(block[1]) <= set("|-: ")
    engines = [cells_of(line) for line in blocks[0][2:]]
    names = [["variator", "1"], ["", "2"], ["", "16"], ["pruning", "1"], ["", "2"], ["", "16"]]
    assert [row[:2] for row in engines] == names
    assert [row[4] for row in engines[:3]] == [f"{30 * k**0.5:.1f}" for k in KS]
    assert [row[2] for row in engines[:3]] == [f"{100 * RIGHT['variator'][k].mean():.1f}" for k in KS]
    loads = served_frame(made.serving).groupby(CONDITION, sort=False)
    for block, (_, mine) in zip(blocks[1:], loads, strict=False):
        served = [cells_of(line) for line in block[2:]]
        assert [row[:2] for row in served] == [[row.engine, policy_name(row.policy)] for row in rows(mine)]
        bold = [i for i, row in enumerate(served) if row[4].startswith("**")]
        assert bold == np.flatnonzero(mine["right_in_time"] == mine["right_in_time"].max()).tolist()
    assert served[2][-1] == "16: 100" and re.fullmatch(r"1: \d+ 2: \d+ 16: \d+", served[3][-1])
    assert "30 pairs" in text and "200 ms" in text and "30.0 requests a second in full batches of 4" in text


def test_csv_is_whole(made: Made) -> None:
    texts = tables(made.serving, made.agreement)
    for name, frame in (("serving.csv", served_frame), ("serving_differences.csv", differences_frame)):
        read = list(csv.reader(texts[name].splitlines()))
        expected = frame(made.serving)
        assert read[0] == list(expected.columns) and {len(row) for row in read} == {len(read[0])}
        assert len(read) == len(expected) + 1
        at = read[0].index("accuracy")
        assert [float(row[at]) for row in read[1:]] == expected["accuracy"].tolist()
    assert len(texts["serving_agreement.csv"].splitlines()) == 31


def test_latex_is_whole(made: Made) -> None:
    text = tables(made.serving, made.agreement)["serving.tex"]
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
    body = text.split(r"\midrule", 1)[1].split(r"\bottomrule")[0]
    lines = [line.strip() for line in body.splitlines() if line.strip() and r"\midrule" not in line]
    assert columns and len(lines) == len(LOADS) * 2 * len(POLICIES)
    assert {len(re.split(r"(?<!\\)&", line)) for line in lines} == {len(columns[1])}
    assert all(line.endswith(r"\\") for line in lines) and text.count("{") == text.count("}")
    assert not re.search(r"(?<!\\)[%#_^~]", text.replace("tab:", "")) and "simulated" in text
    assert [line.split("&")[0].strip() for line in lines if not line.startswith("&")] == [
        "bursty, 0.4 to 1.4", "Poisson, 1.1", r"replay, file=my\_trace\_1.txt"
    ]  # fmt: skip


def test_names_are_said_in_words() -> None:
    assert [load_name(load) for load in (*LOADS[:2], "day:low=0.2,high=1", "theirs")] == [
        "Poisson, 1.1", "bursty, 0.4 to 1.4", "day, 0.2 to 1", "theirs"
    ]  # fmt: skip
    assert [policy_name(policy) for policy in POLICIES] == [
        "static, k = 1", "static, k = 2", "static, k = 16", "deadline", "queue"
    ]  # fmt: skip


def test_the_line_of_the_static_ks_goes_from_each_to_the_next(made: Made) -> None:
    frame = served_frame(made.serving)
    real = frame[(frame["mode"] == "real") & (frame["engine"] == "variator")]
    with mpl.rc_context(RC):
        figure = policies_figure(real, "title")
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(panels) == len(LOADS)
    for axes, load in zip(panels, dict.fromkeys(real["load"]), strict=True):
        mine = real[real["load"] == load].set_index("policy")
        assert axes.get_title(loc="left") == load_name(load)
        line = next(line for line in axes.lines if len(line.get_xdata()) == 3)
        assert np.column_stack(line.get_data()) == pytest.approx(
            100 * mine.loc[list(POLICIES[:3]), ["in_time", "accuracy"]].to_numpy()
        )
        points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
        for policy in POLICIES[3:]:
            assert (100 * mine.loc[policy, "in_time"], 100 * mine.loc[policy, "accuracy"]) in points


def test_what_was_never_compared_has_no_table_and_no_figure(tmp_path: Path) -> None:
    write_study(tmp_path, LOADS[:1], ["variator"], POLICIES[:2], ["simulated"])
    paths = write_serving(tmp_path / "serving", ["svg"])
    assert sorted(path.name for path in paths) == ["serving.csv", "serving.md", "serving.tex", "serving_simulated.svg"]
    assert write_serving(tmp_path / "nothing") == [] and read_serving(tmp_path / "nothing") is None


def test_a_torn_tally_is_named(tmp_path: Path) -> None:
    write_study(tmp_path, LOADS[:1], ["variator"], POLICIES[:2], ["real"])
    path = next((tmp_path / "serving" / "tallies").iterdir())
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DamagedResult, match=path.name):
        write_serving(tmp_path / "serving")
    shown = CliRunner().invoke(main, ["report", "serving", "--results", str(tmp_path)])
    assert shown.exit_code == 2 and path.name in shown.output and "Traceback" not in shown.output


def test_a_study_that_was_only_served(tmp_path: Path) -> None:
    """The three commands that show it; each makes the same bytes."""
    write_study(tmp_path, LOADS[1:2], ["variator"], POLICIES[2:4], ["real"])
    folder = tmp_path / "serving"

    def bench(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, [*words, "--results", str(tmp_path)])
        return done.exit_code, done.output

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for kind in ("tables", "figures") for path in (folder / kind).iterdir()}

    code, shown = bench("report", "serving")
    assert code == 0 and "deadline:margin=0.5" in shown and "serving.md" in shown, shown
    drawn = {f"serving_{what}.{suffix}" for what in ("real", "timeline") for suffix in FORMATS}
    first = files()
    assert {path.name for path in first} == drawn | TABLES - {"serving_agreement.csv"}
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert all(content.startswith(starts.get(path.suffix, b"")) for path, content in first.items())

    for path in first:
        path.unlink()
    command = [sys.executable, "-m", "analysis", "--results", str(tmp_path)]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert files() == first
    assert "serving: 2 served" in done.stdout and str(folder / "tables" / "serving.md") in done.stdout

    table = folder / "tables" / "serving.csv"
    table.write_text(table.read_text().replace("variator", "variation", 1))
    code, shown = bench("verify", "serving", "--tables")
    assert code == 1 and "different: tables/serving.csv: " in shown and "variation" in shown, shown
    assert "tables: 1 different, 3 identical" in shown and "figures: 6 identical" in shown


def test_every_figure_is_drawn_alike_twice(tmp_path: Path) -> None:
    write_study(tmp_path, LOADS[1:2], policies=POLICIES[2:4])
    first, second = ({path.name: path.read_bytes() for path in write_serving(tmp_path / "serving", ["svg"])}
                     for _ in range(2))  # fmt: skip
    assert first == second and set(first) == {f"serving_{what}.svg" for what in FIGURES} | TABLES


def test_a_study_that_has_runs_too_shows_both(tmp_path: Path) -> None:
    write_runs(tmp_path, [make_run(method="dense", ratio=None, latency=False)], "both")
    write_study(tmp_path, LOADS[:1], ["variator"], POLICIES[:2], ["real"], name="both")
    made = regenerate(tmp_path, "both", ["svg"])
    names = {path.name for path in made.paths}
    assert {"summary.md", "serving.md", "serving_real.svg", "report.html"} <= names and made.counts == {"done": 1}
