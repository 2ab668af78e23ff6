"""``bench serve-sim`` on a tiny sweep: what it leaves, that it goes on wherever it was cut off, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import bench.methods.variator
from bench.cell import Surroundings
from bench.cli import main
from bench.launch.serving import read_setup, serve_and_print
from bench.launch.sweep import read_sweep
from bench.serving.policies import registered_policies
from tests.bench_command import bench as run_bench
from tests.bench_command import launch, tiny_sweep
from tests.workers import wait_for

LOADS = ["--load", "poisson:0.3", "--load", "replay:arrivals.txt"]
SETUP = [*LOADS, "--seconds", "0.5", "--max-batch", "2", "--load-seeds", "2"]
POLICIES = ("static:k=1", "static:k=2", "static:k=4", "queue:up=1,down=0.25", "deadline:margin=0.5")
ARRIVALS = [0, 0, 0.1, 0.1, 0.1, 0.2, 0.4, 0.45, 0.55, 7]


@dataclass(frozen=True)
class Study:
    """A study that was killed in the middle and then ended."""

    at: Path
    sweep: Path
    kept: dict[str, bytes]
    killed: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        return self.at / "results" / "serving"

    @property
    def common(self) -> dict[str, Any]:
        """What is common to all cells."""
        found: dict[str, Any] = json.loads((self.folder / "serving.json").read_text())
        return found

    def call(self, *words: str, study: str = "serving", setup: list[str] = SETUP) -> str:
        """Serve in this process, which has loaded everything, and return what is said."""
        words = ("serve-sim", str(self.sweep), "--method", "variator", "--study", study, *setup, *words)
        done = CliRunner().invoke(main, [*words, "--cache-dir", str(self.at / "cache"), "--device", "cpu"])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return f"{done.exit_code}\n{done.output}"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cells(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Kill a study with signal 9 while it serves its third cell or a later one, and let the same command end it."""
    at = tmp_path_factory.mktemp("served")
    (at / "arrivals.txt").write_text("# seconds\n" + "".join(f"{100 + t}\n" for t in ARRIVALS))
    sweep, folder = tiny_sweep(at, teacher_epochs=12), at / "results" / "serving" / "cells"
    words: list[str | Path] = ["serve-sim", sweep, "--method", "variator", *SETUP]
    command = launch(words, at)
    wait_for(lambda: len(list(folder.glob("*.json"))) >= 2, command.process)
    assert command.process.pid
    os.kill(command.process.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    kept = files(folder.parent)
    code, again = run_bench(words, at)
    assert code == 0, again.err
    return Study(at, sweep, kept, len(list(folder.glob("*.json"))), again.out, again.err)


@pytest.fixture(autouse=True)
def there(study: Study, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(study.at)
    monkeypatch.setattr(bench.methods.variator, "FIT_TOKENS", 2000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_cell_is_there_with_its_files(study: Study) -> None:
    found = cells(study.folder)
    loads = {cell["load"] for cell in found}
    assert {load.split("@")[0] for load in loads} == {"poisson:load=0.3", "replay:file=arrivals.txt"}
    wanted = {
        (load, policy, mode, seed)
        for load in loads
        for policy in POLICIES
        for mode, seed in (("real", 0), ("simulated", 0), ("simulated", 1))
    }
    assert sorted((c["load"], c["policy"], c["mode"], c["load_seed"]) for c in found) == sorted(wanted)
    names = {name for cell in found for name in _names(cell)}
    assert set(files(study.folder)) == names | {"serving.json"}
    common = study.common
    assert (common["task"], common["backbone"], common["max_batch"]) == ("mood", "bert", 2)
    assert common["provenance"]["threads"] == 1 and common["provenance"]["device"] == "cpu"
    [calibration] = common["calibrations"]
    slowest = np.median(calibration["seconds"], axis=-1)[0, -1, -1]
    assert common["deadline_seconds"] == round(2 * slowest, 3)


def _names(cell: dict[str, Any]) -> list[str]:
    name = cell["cell_id"]
    kept = [f"requests/{name}.parquet"] if cell["mode"] == "real" else []
    return [f"cells/{name}.json", f"tallies/{name}.parquet", *kept]


def test_what_was_finished_before_the_kill_is_not_served_again(study: Study) -> None:
    """All of it is there to the byte; in real time nothing would come out the same twice."""
    now = files(study.folder)
    finished = [name for name in study.kept if name.startswith("cells/")]
    assert len(finished) >= 2
    for cell in (json.loads(study.kept[name]) for name in finished):
        for name in _names(cell):
            assert study.kept[name] == now[name]
    assert study.kept["serving.json"] == now["serving.json"], "nor is anything calibrated again"
    assert f"{30 - len(finished)} cells to serve" in study.err and "calibrating" not in study.err


def test_summaries_are_those_of_the_single_requests(study: Study) -> None:
    """Each number again, from the requests and by its definition."""
    deadline = study.common["deadline_seconds"]
    right = {m["k"]: row for c in study.common["calibrations"] for m, row in zip(c["models"], c["scores"], strict=True)}
    arrivals: dict[str, set[tuple[float, ...]]] = {}
    for cell in cells(study.folder):
        if cell["mode"] != "real":
            continue
        table, summary = pd.read_parquet(study.folder / cell["requests"]), cell["summary"]
        assert len(table) == summary["requests"] == round(cell["offered"] * cell["seconds"])
        assert summary["accuracy"] == pytest.approx(table.score.mean())
        assert summary["p95_seconds"] == pytest.approx(np.quantile(table.latency, 0.95), rel=1e-5)
        late = (table.latency > deadline).mean()
        assert summary["in_time"] == pytest.approx(
            1 - late, abs=1e-9 + ((table.latency - deadline).abs() < 1e-6).mean()
        )
        shares = {int(k): v for k, v in summary["share_at_k"].items()}
        assert shares == pytest.approx(table.k.value_counts(normalize=True).to_dict())
        if cell["policy"].startswith("static"):
            assert set(shares) == {int(cell["policy"][-1])}
        assert table.score.tolist() == [right[k][i] for k, i in zip(table.k, table.example, strict=True)]
        arrivals.setdefault(cell["load"].split(":")[0], set()).add((*table.arrived, *table.example))
    assert {load: len(seen) for load, seen in arrivals.items()} == {"poisson": 1, "replay": 1}, (
        "the same for each policy"
    )
    [replayed] = arrivals["replay"]
    assert replayed[:8] == pytest.approx(ARRIVALS[:8], abs=1e-6), "what comes later is left out"


def test_tables_show_every_cell(study: Study) -> None:
    titles = re.findall(r"^(\S+) · 0.5 s · (real|simulated) *$", study.out, re.M)
    assert sorted({(load.split(":")[0], mode) for load, mode in titles}) == [
        (load, mode) for load in ("poisson", "replay") for mode in ("real", "simulated")
    ]
    rows = re.findall(r"variator +│ (\S+) +│ +([\d.]+)% │ +([\d.]+)% │", study.out)
    assert sorted(policy for policy, _, _ in rows) == sorted(4 * POLICIES)
    real = next(c for c in cells(study.folder) if c["mode"] == "real" and c["policy"] == "static:k=4")
    assert (
        real["policy"],
        f"{100 * real['summary']['accuracy']:.1f}",
        f"{100 * real['summary']['in_time']:.1f}",
    ) in rows
    assert study.out.rstrip().endswith("results/serving")


def test_a_second_call_serves_nothing(study: Study) -> None:
    before = files(study.folder)
    said = study.call()
    assert said.startswith("0\n") and "0 cells to serve" in said
    assert files(study.folder) == before


def test_simulated_cells_are_the_same_in_another_process(study: Study, tmp_path: Path) -> None:
    """From the same calibration; nothing is served in real time then."""
    other = tmp_path / "results" / "serving"
    other.mkdir(parents=True)
    shutil.copy(study.folder / "serving.json", other)
    said = study.call("--simulated", "--results", str(other.parent))
    assert said.startswith("0\n"), said
    found = cells(other)
    assert len(found) == 20 and {cell["mode"] for cell in found} == {"simulated"}
    mine, theirs = files(other), files(study.folder)
    for cell in found:
        for name in _names(cell):
            assert mine[name] == theirs[name]
    assert not (other / "requests").exists()


def test_replicas_multiply_models_and_load(study: Study, tmp_path: Path) -> None:
    other = tmp_path / "results" / "serving"
    other.mkdir(parents=True)
    shutil.copy(study.folder / "serving.json", other)
    setup = ["--load", "poisson:0.5", "--seconds", "0.3", "--max-batch", "2", "--load-seeds", "1"]
    given = ["--simulated", "--replicas", "100x100", "--replicas", "1x100", "--policy", "static:2"]
    said = study.call(*given, "--results", str(other.parent), setup=setup)
    assert said.startswith("0\n") and "simulated, 100 replicas, load × 100" in said, said
    found = {(c["replicas"], c["times"]): c for c in cells(other)}
    assert set(found) == {(100, 100), (1, 100)}
    many, one = found[100, 100], found[1, 100]
    assert many["offered"] == pytest.approx(0.5 * 100 * study.common["capacity"], rel=0.2)
    assert many["summary"]["requests"] == one["summary"]["requests"], "the same requests"
    assert 10 * many["summary"]["p95_seconds"] < one["summary"]["p95_seconds"], "as one model alone is swamped by them"


def test_a_torn_cell_is_named(study: Study, tmp_path: Path) -> None:
    torn = Path(shutil.copytree(study.folder, tmp_path / "results" / "serving"))
    path = sorted((torn / "cells").glob("*.json"))[0]
    for content in (path.read_bytes()[:100], b"", b"\xff", b"{}"):
        path.write_bytes(content)
        said = study.call("--results", str(torn.parent))
        assert said.startswith("2\n") and f"error: {path} is not a valid result of serving" in said
        assert "Move it away and serve again." in said and "Traceback" not in said
    path.unlink()
    assert "1 cells to serve" in study.call("--results", str(torn.parent))
    (torn / "serving.json").write_text("{")
    assert f"error: {torn / 'serving.json'} is not a valid" in study.call("--results", str(torn.parent))


def test_a_file_of_arrivals_that_changed_is_another_load(study: Study, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(study.folder, tmp_path / "results" / "serving"))
    before, setup = files(copy), ["--load", "replay:arrivals.txt", *SETUP[4:]]
    path = study.at / "arrivals.txt"
    text = path.read_text()
    path.write_text("0\n0.01\n0.02\n")
    try:
        said = study.call("--results", str(copy.parent), "--simulated", "--policy", "static", setup=setup)
    finally:
        path.write_text(text)
    assert "2 cells to serve" in said, said
    new = [cell for cell in cells(copy) if f"cells/{cell['cell_id']}.json" not in before]
    assert len(new) == 2 and {cell["summary"]["requests"] for cell in new} == {3}
    assert {c["load"] for c in new}.isdisjoint({c["load"] for c in cells(study.folder)})


def test_another_setup_is_refused(study: Study) -> None:
    before = files(study.folder)
    common = study.common
    quick = ["--ratio", "2", "--teacher-epochs", "1", "--steps", "1"]
    refused = f"error: {Path('results/serving')} holds a study with"
    deadline = common["deadline_seconds"]
    said = study.call("--deadline", "3.25")
    assert said.startswith("2\n") and f"{refused} --deadline {deadline} and not 3.25; choose another --study" in said
    assert f"{refused} --max-batch 2 and not 4;" in study.call("--max-batch", "4")
    assert f"{refused} seed 0 and not 3;" in study.call("--seed", "3", *quick)
    assert f"{refused} another teacher;" in study.call(*quick)
    torch.set_num_threads(2)
    assert f"{refused} threads 1 and not 2;" in study.call()
    torch.set_num_threads(1)
    other = study.at / "else" / "else.yaml"
    shutil.copytree(study.at / "mood", other.parent, dirs_exist_ok=True)
    (other.parent / "mood.yaml").rename(other)
    assert f"{refused} task mood and not else;" in study.call("--task", str(other), *quick)
    said = study.call("--ratio", "2")
    assert "results/serving holds variator with the models of other runs; choose another --study" in said
    assert files(study.folder) == before
    assert study.call("--deadline", str(deadline)).startswith("0\n"), "the same one is no other"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--load", "burst"], "unknown load 'burst'. Did you mean 'bursty'? Known: bursty, day, poisson, replay."),
        (["--policy", "dedline"], "unknown policy 'dedline'. Did you mean 'deadline'? Known: "),
        (["--policy", "queue:dwn=0.1"], "unknown field 'dwn'. Did you mean 'down'? Fields of queue: up, down."),
        (["--load", "poisson:load=fast"], "load 'poisson:load=fast': load: "),
        (["--load", "replay:nowhere.txt"], "cannot read arrivals of nowhere.txt: No such file or directory"),
        (["--policy", "static:3"], "policy static:3: the models serve k = 1, 2, 4"),
        (["--replicas", "x100"], "--replicas x100: a whole number, or it and how many times the load"),
        (["--replicas", "2x-1"], "--replicas 2x-1: "),
        (["--replicas", "2xinf"], "--replicas 2xinf: "),
        (["--replicas", "0"], "--replicas 0: "),
        (["--method", "dense"], "there is nothing to choose from: no cell has a method with a ratio"),
        (["--seed", "0,1"], "what is served has one teacher and answers one dev split; choose by --seed"),
        (["--method", "quantization"], "a server chooses among whole ratios of at least 2"),
        (["--bottleneck", "4,8"], "there are two of it with different options; choose one by its keys"),
    ],
)
def test_what_cannot_be_meant_is_said(study: Study, words: list[str], error: str) -> None:
    said = study.call(*words, study="none")
    assert said.startswith("2\n") and "error: " in said and error in said, said
    assert not (study.at / "results" / "none").exists()


def test_what_is_asked_for_twice_is_served_once(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.folder, tmp_path / "serving")
    setup = ["--load", "day", "--load", "day:low=0.2", *SETUP[4:]]
    given = ["--policy", "static:2", "--policy", "static:k=2", "--simulated", "--results", str(tmp_path)]
    assert "2 cells to serve" in study.call(*given, setup=setup)


def test_engines_need_not_have_the_same_ks(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is served at what it has; without a policy named, that is every k of either."""
    where = Surroundings(cache_dir=study.at / "cache", device="cpu")
    keys = {"method": "variator,pruning"}
    configs = [c for c in read_sweep(study.sweep, keys, None).configs if (c.method, c.ratio) != ("pruning", 2)]
    setup = read_setup(["poisson:0.3"], [], [], load_seeds=[0], seconds=0.1, max_batch=1, real=False)
    serve_and_print(configs, study.at / "results", "two", where, setup, statics=True)
    found = cells(study.at / "results" / "two")
    own = {"variator": set(POLICIES), "pruning": set(POLICIES) - {"static:k=2"}}
    assert {(c["engine"], c["policy"]) for c in found} == {(engine, p) for engine in own for p in own[engine]}
    assert capsys.readouterr().out.count("│ pruning") == 4


def test_a_policy_of_another_package_serves(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "bench_tutorial-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-tutorial\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[bench.policies]\npatience = bench_tutorial.policy:Patience\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tutorial_package")
    shutil.copytree(study.folder, tmp_path / "serving")
    given = ["--load", "poisson:0.9", *SETUP[4:], "--results", str(tmp_path), "--policy"]
    registered_policies.cache_clear()
    try:
        said = study.call("patience:share=0.000001", setup=given)
        assert "unknown policy 'patients'. Did you mean 'patience'?" in study.call("patients", setup=given)
    finally:
        registered_policies.cache_clear()
    assert said.startswith("0\n") and "3 cells to serve" in said, said
    chosen = [cell["summary"]["share_at_k"] for cell in cells(tmp_path / "serving") if cell["policy"].startswith("pat")]
    assert len(chosen) == 3
    assert set().union(*chosen) == {"1", "4"}, "who waits not at all has the one, any other the other"
