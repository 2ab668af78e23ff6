"""The ``bench`` command as a stranger uses it: what it shows, and what it says to what cannot be meant."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench.cli import main
from bench.config import known_keys
from bench.describe import keys
from bench.registry import methods
from tests.checkpoints import task_file, tiny_checkpoint

ROOT = Path(__file__).parents[2]
COMMANDS = ("list", "plan", "report", "run", "status", "sweep")


def invoke(*words: str | Path) -> Result:
    done = CliRunner().invoke(main, [str(word) for word in words], prog_name="bench")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to an empty folder with a tiny task ``mood/mood.yaml`` and checkpoint ``bert``, away from any other cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BENCH_DATA_ROOT", raising=False)
    task_file(tmp_path / "mood")
    tiny_checkpoint(tmp_path / "bert", "bert")
    return tmp_path


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_fits_a_terminal_and_keeps_its_examples_whole(words: list[str]) -> None:
    text = invoke(*words).stdout
    assert max(map(len, text.splitlines())) <= 88
    assert "\\b" not in text and "..." not in text.split("[ARGS]...")[-1]
    for example in re.findall(r"^ {2}(bench .+)$", text, re.M):
        assert example.split()[1] in COMMANDS
    if words[0] in ("run", "plan", "sweep", "--help"):
        assert re.search(r"^ {2}bench \w+", text, re.M)


def test_every_key_is_an_option_with_its_meaning_and_its_readers() -> None:
    rows = keys()
    assert {key.name for key in rows} == set(known_keys()) and all(key.text for key in rows)
    text = "".join(invoke("run", "--help").stdout.split())
    for key in rows:
        assert "".join(f"--{key.name.replace('_', '-')} VALUE {key.text}".split()) in text
        assert not key.default or "".join(f"[default: {key.default}]".split()) in text
        assert "run" in key.defaults or "".join(key.readers.split()) in text


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("tasks", ["mnli", "squad", "movie_snippets", "entailment / not_entailment", "bundled"]),
        ("methods", ["dense", "variator", "EMNLP 2023"]),
        ("backbones", ["t5-11b", "11,307.3 M", "minilm-l6", "(extra: quickstart)", "google-t5/t5-base"]),
        ("recipes", ["default", "released", "pretrain_steps=60000"]),
        ("keys", ["teacher_batch_size", "pretrain_length", "variator"]),
        ("policies", ["static    k=1 ", "queue     up=1,down=0.25 ", "deadline  margin=0.5 ", "The same k "]),
        ("loads", ["poisson  load=0.7 ", "bursty   low=0.4,high=1.4,stay=3 ", "day ", "replay   file  ", "one rate."]),
    ],
)
def test_listings(what: str, words: list[str]) -> None:
    text = invoke("list", what).stdout
    assert [word for word in words if word not in text] == []
    assert "\x1b" not in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_the_catalogue_of_methods_fits_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block a method: its name at the margin, and a line or two for each fact, none cut short."""
    from rich.console import Console

    from bench.launch import listing

    console = Console(width=columns, color_system=None)
    monkeypatch.setattr(listing, "console", lambda: console)
    with console.capture() as capture:
        listing.print_listing("methods")
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= columns and "…" not in capture.get()
    assert [line.split()[0] for line in lines if line[:1].strip()] == list(methods())
    text = " ".join(capture.get().split())
    for cls in methods().values():
        for fact in (cls.summary, cls.trains, cls.saves, cls.knob):
            assert fact in text


def test_a_plan_is_a_line_a_cell_with_its_reasons_below(here: Path) -> None:
    done = invoke("plan", "--task", "mood/mood.yaml,sst3", "--backbone", "bert", "--ratio", "2,2.5", "--seed", "0,1")
    assert done.exit_code == 1, "a cell that cannot be resolved"
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0].split() == ["task", "backbone", "method", "seed", "knob", "remaining", "added", "state"]
    rows = [line.split() for line in lines[1:9]]
    assert sorted((row[0], row[3], row[-1]) for row in rows) == sorted(
        [(task, seed, state) for seed in "01" for task, state in [("mood", "do"), ("mood", "skipped")]]
        + [("sst3", seed, "error") for seed in "01" for _ in range(2)]
    )
    assert [row[4:6] for row in rows if row[-1] == "skipped"] == [["ratio", "2.5"]] * 2
    text = done.stdout
    assert "skipped (2 cells): the ratio of variator is k, a whole number of at least 2; got 2.5" in text
    assert "error (4 cells): unknown task 'sst3'. Did you mean 'sst2'?" in text
    assert "8 cells: 2 to do, 2 skipped, 4 error." in text
    assert re.search(r"^About \d+ s to run \(a rough guess", text, re.M)
    assert not (here / "results").exists()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_plan_fits_a_terminal(columns: int, here: Path) -> None:
    """In 80 columns no word is cut in two."""
    from rich.console import Console

    from bench.cell import Surroundings
    from bench.launch.plan import plan
    from bench.launch.plan_view import _cells
    from bench.launch.sweep import find_sweep, read_sweep
    from bench.results import ResultStore

    cells = plan(read_sweep(find_sweep("quickstart")).configs, ResultStore(here, "x"), Surroundings())
    console = Console(width=columns, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(_cells(cells))
    rows = [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in capture.get().splitlines()]
    assert len(rows) == 1 + len(cells) and max(map(len, rows)) <= columns
    assert all(row.startswith("movie_snippets  minilm-l6  ") and row.endswith("to do") for row in rows[1:])


USAGE: list[tuple[Sequence[str], str]] = [
    (["swep", "quickstart"], "No such command 'swep'. Did you mean 'sweep'?"),
    (["list", "task"], "'task' is not one of 'tasks', 'methods', 'backbones', 'recipes', 'keys'"),
    (["run", "--ratoi", "2"], "No such option '--ratoi'. Did you mean '--ratio'?"),
    (["run", "--ratio"], "requires an argument"),
    (["run", "--mode", "maybe"], "'maybe' is not one of 'missing', 'retry-failed', 'force', 'read-only'"),
    (["run", "extra"], "unexpected extra argument"),
    (["run", "--method", "varitor"], "unknown method 'varitor'. Did you mean 'variator'?"),
    (["run", "--recipe", "relesed"], "unknown recipe 'relesed'. Did you mean 'released'?"),
    (["run", "--lr", "fast", "--ratio", "2"], "lr = 'fast'"),
    (["run", "--steps", "1.5", "--ratio", "2"], "steps = '1.5'"),
    (["run", "--seed", "-1", "--ratio", "2"], "seed = '-1'"),
    (["run", "--task", "sst3", "--ratio", "2"], "unknown task 'sst3'. Did you mean 'sst2'?"),
    (["run", "--task", "moody.yaml", "--ratio", "2"], "cannot read the task file moody.yaml"),
    (["run", "--task", "mood/mood.yaml", "--backbone", "gpt", "--ratio", "2"], "'gpt2', which is not supported"),
    (["run", "--task", "mood/mood.yaml", "--backbone", "mood", "--ratio", "2"], "a folder without config.json"),
    (["run", "--task", "sst2", "--ratio", "2", "--data-root", "nowhere"], "data root nowhere is not a folder"),
    (["run", "--backbone", "bert", "--ratio", "2", "--results", "mood/mood.yaml"], "'mood/mood.yaml' is a file"),
    (["run", "--backbone", "bert", "--ratio", "2", "--cache-dir", "mood/mood.yaml"], "'mood/mood.yaml' is a file"),
    (["sweep"], "Missing argument 'SWEEP'"),
    (["sweep", "qickstart"], "no sweep file 'qickstart'. Did you mean 'quickstart'?"),
    (["sweep", "quickstart", "--task", "sst3"], "unknown task 'sst3'. Did you mean 'sst2'?"),
    (["plan", "quickstart", "--seed", "0,x"], "seed = 'x'"),
    (["report"], "Missing argument 'STUDY'"),
]


@pytest.mark.parametrize(("words", "message"), USAGE, ids=[" ".join(words) for words, _ in USAGE])
def test_what_cannot_be_meant_says_so_and_stores_nothing(here: Path, words: list[str], message: str) -> None:
    (here / "gpt").mkdir()
    (here / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    done = invoke(*words)
    assert done.exit_code == 2
    assert message in done.stderr and done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not (here / "results").exists()


def test_a_result_that_is_torn_is_named(here: Path) -> None:
    words = ["--task", "mood/mood.yaml", "--backbone", "bert"]
    assert invoke("run", *words).exit_code == 0, "no ratio: skipped"
    [path] = (here / "results" / "runs" / "runs").glob("*.json")
    path.write_text(path.read_text()[:50])
    done = invoke("run", *words)
    assert done.exit_code == 0 and str(path.relative_to(here)) in done.stderr and "is run again" in done.stderr


@pytest.mark.parametrize("ratio", [None, "1", "2.5"])
def test_a_ratio_that_is_no_k_is_skipped_with_the_reason(here: Path, ratio: str | None) -> None:
    words = [] if ratio is None else ["--ratio", ratio]
    for _ in range(2):
        done = invoke("run", "--task", "mood/mood.yaml", "--backbone", "bert", *words)
        assert done.exit_code == 0
        assert done.stdout.startswith("skipped: the ratio of variator is k, a whole number of at least 2; got ")
    assert invoke("status").stdout.startswith("runs: 1 skipped\n")


def test_results_that_cannot_be_written_say_so(here: Path) -> None:
    """Below /proc nobody makes folders, whoever runs the tests."""
    done = invoke("run", "--task", "mood/mood.yaml", "--backbone", "bert", "--results", "/proc/bench")
    assert done.exit_code == 1
    assert "cannot write /proc/bench/runs" in done.stdout and "Choose another folder" in done.stdout


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["plan", "--backbone", "some/model", "--ratio", "2"], "local folder"),
        (["run", "--backbone", "some/model", "--ratio", "2"], "local folder"),
    ],
)
def test_without_network_it_ends_within_seconds(here: Path, words: list[str], flag: str) -> None:
    surroundings = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(here / "hub"),
        "PYTHONPATH": str(ROOT),
    }
    code = f"from bench.cli import main; main({words!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=surroundings, capture_output=True, text=True, timeout=30
    )
    text = done.stdout + done.stderr
    assert done.returncode == {"plan": 1, "run": 2}[words[0]], text
    assert "the Hub cannot be reached" in text and flag in text


def test_a_pipe_that_closes_early_is_no_error(here: Path) -> None:
    code = "from bench.cli import main; main(['list', 'keys'])"
    command = f'"{sys.executable}" -c "{code}" | head -n 1'
    done = subprocess.run(
        command, shell=True, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["key", "read", "by", "default", "meaning"]
    assert done.stderr == ""
