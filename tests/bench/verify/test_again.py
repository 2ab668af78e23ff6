"""A small study, run in one process and made again in others: identical, until one thing is changed on purpose."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.results import ResultStore
from bench.verify.again import choose
from tests.bench_command import Command, bench, launch, tiny_sweep

ROOT = Path(__file__).parents[3]
Edit = Callable[[dict[str, Any]], None]


def fresh(words: list[str | Path], at: Path, hash_seed: int) -> str:
    """Run ``bench`` in an interpreter that has imported nothing yet, and return what it printed."""
    surroundings = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    command = [sys.executable, "-m", "tests.bench_command", *map(str, words)]
    done = subprocess.run(command, cwd=at, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where a small study ran."""
    at = tmp_path_factory.mktemp("original")
    methods = ["dense", "variator", "token_merging", "pruning_l0", "distillation"]
    sweep = tiny_sweep(at, method=methods, ratio=[2], dev_examples=60)
    fresh(["sweep", sweep, "--device", "cpu", "--cache-dir", "cache"], at, hash_seed=1)
    return at


@pytest.fixture
def at(original: Path, tmp_path: Path) -> Path:
    """Return a copy of it."""
    for name in ("mood", "bert", "results"):
        shutil.copytree(original / name, tmp_path / name)
    (tmp_path / "cache").symlink_to(original / "cache")
    return tmp_path


def run_ids(at: Path) -> dict[str, str]:
    return {str(result.config["method"]): result.run_id for result in ResultStore(at / "results", "tiny")}


def verify(at: Path, *words: str, method: str | None = "dense", here: bool = True) -> tuple[int, Command]:
    """Run ``bench verify`` on the study, or on its run of one method."""
    chosen = ["--run", run_ids(at)[method]] if method else []
    own = ["--task", "mood/mood.yaml", "--backbone", "bert"] if here else []
    return bench(["verify", "results/tiny", *chosen, *own, "--cache-dir", "cache", *words], at, machine=False)


def edit(at: Path, change: Edit, method: str = "dense") -> None:
    """Change a stored result."""
    path = at / "results" / "tiny" / "runs" / f"{run_ids(at)[method]}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def move_a_score(at: Path, by: float = 1e-4, method: str = "dense") -> None:
    """Change how sure the model was of one answer, from which no metric is made."""
    path = at / "results" / "tiny" / "predictions" / f"{run_ids(at)[method]}.parquet"
    frame = pd.read_parquet(path)
    frame.loc[3, "score"] += by
    frame.to_parquet(path, index=False)


def test_everything_comes_out_again_in_a_fresh_process(original: Path) -> None:
    """Under another hash seed too, with nothing in a cache, and without a trace in the study."""
    study = original / "results" / "tiny"
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    out = fresh(["verify", "tiny", "--task", "mood/mood.yaml", "--backbone", "bert=bert"], original, hash_seed=2)
    ids = run_ids(original)
    assert len(ids) == 5
    for method, run_id in ids.items():
        assert re.search(rf"^identical: mood · bert · {method}\b.*\({run_id}\)", out, re.MULTILINE), out
    assert "so that everything is made again" in out
    assert out.count("made teacher") == 1 and len(re.findall(r"teacher\b.* as above$", out, re.MULTILINE)) == 4, (
        "one teacher for all of this command"
    )
    assert "\n5 identical" in out
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


def test_a_cache_is_used_only_where_it_is_named(original: Path) -> None:
    _, command = verify(original, method="variator")
    assert (
        "identical: " in command.out
        and "; teacher, adapt from the cache" in command.out
        and "; made" not in command.out
    )


def test_what_is_said_goes_to_a_file_that_is_named_for_it(at: Path) -> None:
    """With standard error on a terminal, where bars run."""
    terminal, slave = os.openpty()
    words = ["verify", "tiny", "--run", run_ids(at)["dense"], "--cache-dir", "cache", "--task", "mood/mood.yaml"]
    command = [sys.executable, "-m", "tests.bench_command", *words, "--backbone", "bert"]
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    done = subprocess.run(command, cwd=at, env=surroundings, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    os.close(terminal)
    assert done.returncode == 0 and "\nidentical: mood" in done.stdout and "\n1 identical" in done.stdout


def test_bars_give_way_to_what_is_said(at: Path) -> None:
    words = ["verify", "tiny", "--sample", "2", "--cache-dir", "cache", "--task", "mood/mood.yaml"]
    command = launch([*words, "--backbone", "bert"], at, terminal=True, machine=False)
    assert command.wait() == 0
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r") for line in command.out.split("\n")]
    assert sum(line.startswith("identical: mood") for line in lines) == 2, command.out


def test_a_study_is_named_or_is_a_path(at: Path) -> None:
    assert bench(["verify", "tiny", "--run", "ffff"], at, machine=False)[1].err.startswith("error: no run 'ffff'")
    code, command = bench(["verify", "results/tini"], at, machine=False)
    assert code == 2 and "Did you mean 'tiny'" not in command.err and "no study 'results/tini'" in command.err
    code, command = bench(["verify", "tini"], at, machine=False)
    assert code == 2 and "Did you mean 'tiny'? Studies: tiny." in command.err
    code, command = bench(["verify", "tiny", "--tables", "--sample", "2"], at, machine=False)
    assert code == 2 and "choose one of" in command.err


def test_a_sample_takes_methods_in_turn(original: Path) -> None:
    results = list(ResultStore(original / "results", "tiny"))
    twice = [r.model_copy(update={"run_id": f"{i}{r.run_id[1:]}"}) for i in (5, 3, 4) for r in results]
    sample = choose(twice, 7)
    assert [r.config["method"] for r in sample[:5]] == sorted(r.config["method"] for r in results)
    assert [r.config["method"] for r in sample[5:]] == ["dense", "distillation"]
    assert {r.run_id[0] for r in sample[:5]} == {"3"} and {r.run_id[0] for r in sample[5:]} == {"4"}
    assert choose(reversed(twice), 7) == sample, "whatever the order that they are read in"
    assert len(choose(twice, 100)) == 15 == len(choose(twice))


def accuracy(content: dict[str, Any], value: float) -> None:
    dev = next(e for e in content["evaluations"] if e["split"] == "dev")
    dev["metrics"]["accuracy"]["value"] = value


def test_a_number_that_was_edited_is_refuted_by_its_own_predictions(at: Path) -> None:
    edit(at, lambda content: accuracy(content, 0.999))
    code, command = verify(at)
    assert code == 1 and "different: " in command.out
    assert re.search(r"cause seen: record: accuracy\.value is 0\.999, and 0\.\d+ by its own predictions", command.out)
    assert re.search(r"! dev accuracy: 0\.999 \[.*\] recorded, 0\.\d+ \[.*\] made again", command.out)


def test_an_edit_that_agrees_with_itself_does_not_come_out(at: Path) -> None:
    """Predictions and cost changed by hand, with nothing else that could explain it."""
    move_a_score(at)
    code, command = verify(at)
    assert code == 1 and "different: " in command.out
    assert "scores of the predictions: up to 0.0001 apart" in command.out
    # where the code here is not committed, that may be why
    assert re.search(r"cause seen: (record: nothing else that is recorded differs|code: the code here)", command.out)

    def cheaper(content: dict[str, Any]) -> None:
        content["cost"]["parameters_teacher"] -= 1

    edit(at, cheaper, "variator")
    code, command = verify(at, method="variator")
    assert code == 1 and "! cost.parameters_teacher: " in command.out


def test_other_data_are_named_and_nothing_is_run(at: Path) -> None:
    path = at / "mood" / "train.csv"
    path.write_text(path.read_text().replace("good", "bad", 1))
    code, command = verify(at)
    assert code == 1 and re.search(r"cause seen: data: data was mood@sha256:\w+.*, and is mood@sha256:", command.out)
    assert "teacher" not in command.out, "there is nothing to compare with"


def test_another_definition_of_the_task_is_code(at: Path) -> None:
    path = at / "mood" / "mood.yaml"
    path.write_text(path.read_text().replace("max_length: 32", "max_length: 16"))
    code, command = verify(at)
    assert code == 1 and "cause seen: code: the task is defined otherwise" in command.out


def test_the_same_rows_in_another_format_are_the_same_data(at: Path) -> None:
    for split in ("train", "dev"):
        csv = at / "mood" / f"{split}.csv"
        pd.read_csv(csv).to_parquet(csv.with_suffix(".parquet"))
        csv.unlink()
    yaml = at / "mood" / "mood.yaml"
    yaml.write_text(yaml.read_text().replace(".csv", ".parquet"))
    code, command = verify(at)
    assert code == 0 and "identical: " in command.out, command.out


def test_another_model_is_named(at: Path) -> None:
    path = at / "bert" / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")
    code, command = verify(at)
    assert code == 1 and re.search(r"cause seen: model: model was bert@sha256:\w+…, and is bert@sha256:", command.out)


def test_a_checkpoint_may_lie_in_a_folder_of_another_name(at: Path) -> None:
    (at / "bert").rename(at / "downloaded")
    code, command = verify(at, "--task", "mood/mood.yaml", here=False)
    assert code == 1 and "cannot be made again: " in command.out and "--backbone bert=FOLDER" in command.out
    code, command = verify(at, "--task", "mood/mood.yaml", "--backbone", "bert=downloaded", here=False)
    assert code == 0 and "identical: " in command.out, command.out


def test_data_that_are_not_here_are_named(at: Path) -> None:
    code, command = verify(at, "--backbone", "bert", here=False)
    assert code == 1 and "cannot be made again: " in command.out and "name it with --task FILE" in command.out


def provenance(name: str, value: Any) -> Edit:
    def change(content: dict[str, Any]) -> None:
        content["provenance"][name] = value

    return change


def other_torch(content: dict[str, Any]) -> None:
    content["provenance"]["versions"]["torch"] = "2.9.0"


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (other_torch, r"version: torch 2\.9\.0, here 2\."),
        (provenance("platform", "Linux x86_64, Python 3.10.1"), r"version: Python 3\.10\.1, here 3\."),
        (provenance("hardware", "Abacus, 10 rods"), r"hardware: Abacus, 10 rods, here "),
        (provenance("device", "NVIDIA H100"), r"hardware: NVIDIA H100, here cpu"),
        (provenance("threads", 4096), r"threads: 4096, here \d+"),
    ],
    ids=["torch", "python", "hardware", "device", "threads"],
)
def test_elsewhere_a_tolerance_is_given_and_its_cause_named(at: Path, change: Edit, cause: str) -> None:
    edit(at, change)
    move_a_score(at)
    code, command = verify(at, "--device", "cpu")
    assert code == 0 and "within tolerance: " in command.out, command.out
    assert re.search(rf"cause seen: {cause}", command.out), command.out
    assert "Within tolerance: metrics to half the width of their recorded interval" in command.out


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="this machine has one core")
def test_as_many_threads_are_used_as_were_recorded(at: Path) -> None:
    """Which this process would not: it has one."""
    edit(at, provenance("threads", 2))
    move_a_score(at)
    _, command = verify(at)
    assert "different: " in command.out and "cause seen: threads" not in command.out


def test_what_differs_and_changes_nothing_is_said(at: Path) -> None:
    edit(at, other_torch)
    code, command = verify(at)
    assert code == 0 and "1 identical" in command.out and "Identical in spite of version: torch 2.9.0" in command.out


def test_beyond_the_tolerance_is_different_on_any_machine(at: Path) -> None:
    """Every answer, with the metric that follows from them."""
    edit(at, other_torch)
    store = ResultStore(at / "results", "tiny")
    path = store.predictions_path(run_ids(at)["dense"])
    frame = pd.read_parquet(path)
    frame["prediction"] = 1 - frame["prediction"]
    frame.to_parquet(path, index=False)
    from bench.tasks.metrics import bootstrap

    interval = bootstrap("accuracy", frame["prediction"].tolist(), frame["label"].tolist()).model_dump()

    def follows(content: dict[str, Any]) -> None:
        next(e for e in content["evaluations"] if e["split"] == "dev")["metrics"]["accuracy"] = interval

    edit(at, follows)
    code, command = verify(at)
    assert code == 1 and "different: " in command.out
    assert "! predictions: 60 of 60 changed (100.0%)" in command.out and "cause seen: version: torch" in command.out
    assert "cause seen: record" not in command.out


@pytest.mark.parametrize("commit", ["0" * 40, "first"])
def test_other_code_is_named_and_excuses_nothing(at: Path, commit: str) -> None:
    if commit == "first":
        log = subprocess.run(["git", "log", "--format=%H", "-1", "--skip=20"], cwd=ROOT, capture_output=True, text=True)
        commit = log.stdout.strip()
        if not commit:
            pytest.skip("this checkout has no history")
    edit(at, provenance("commit", commit))
    move_a_score(at)
    code, command = verify(at)
    assert code == 1 and "different: " in command.out
    assert re.search(r"cause seen: code: ", command.out) and commit[:8] in command.out


def test_a_new_version_of_a_method_is_code(at: Path) -> None:
    """As when a method's arithmetic was mended: what is stored is the result of what it was."""

    def older(content: dict[str, Any]) -> None:
        content["identity"]["method"] = "dense@0"

    edit(at, older)
    code, command = verify(at)
    assert code == 1 and "cause seen: code: method was dense@0, and is dense@" in command.out


def test_an_edited_configuration_contradicts_the_identity(at: Path) -> None:
    def other_seed(content: dict[str, Any]) -> None:
        content["config"]["seed"] = 7

    edit(at, other_seed)
    code, command = verify(at)
    assert code == 1 and "cause seen: record: seed is 0 in the identity and 7 in the configuration" in command.out


def test_a_status_must_come_out_too(at: Path) -> None:
    def failed(content: dict[str, Any]) -> None:
        content |= {"status": "failed", "reason": "it fell over", "evaluations": [], "cost": None, "predictions": None}

    edit(at, failed)
    code, command = verify(at)
    assert code == 1 and "! status: recorded failed (it fell over) · made again done" in command.out


def test_what_failed_or_was_skipped_fails_and_is_skipped_again(at: Path) -> None:
    sweep = tiny_sweep(at, "fated", method=["moefication", "dense"], ratio=[2], teacher_lr=1e30)
    assert bench(["sweep", sweep, "--study", "fated"], at)[0] == 1
    store = ResultStore(at / "results", "fated")
    assert sorted(result.status for result in store) == ["diverged", "skipped"]
    words = ["verify", "fated", "--task", "mood/mood.yaml", "--backbone", "bert"]
    code, command = bench(words, at, machine=False)
    assert code == 0 and "2 identical" in command.out, command.out


def test_unfinished_and_torn_results_are_no_numbers(at: Path) -> None:
    edit(at, lambda content: content.update(status="interrupted"))
    code, command = verify(at)
    assert code == 1 and "cannot be made again: " in command.out and "it is interrupted" in command.out
    path = at / "results" / "tiny" / "runs" / f"{run_ids(at)['pruning_l0']}.json"
    path.write_text(path.read_text()[:-200])
    (at / "results" / "tiny" / "runs" / f"{run_ids_whole(at)}.json").touch()
    code, command = bench(["verify", "tiny", "--task", "mood/mood.yaml", "--backbone", "bert"], at, machine=False)
    assert code == 1 and re.search(rf"cannot be made again: .*{path.name} is not a valid result", command.out)


def run_ids_whole(at: Path) -> str:
    """Return the run id of a result that can be read."""
    paths = sorted((at / "results" / "tiny" / "runs").glob("*.json"))
    return next(p.stem for p in paths if p.read_text().rstrip().endswith("}"))
