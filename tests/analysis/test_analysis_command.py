"""`python -m analysis` and the summary in the terminal."""

import io
import os
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner
from rich.console import Console

from analysis.__main__ import main
from analysis.console import print_summary
from analysis.report import made_before, regenerate
from tests.analysis.synthetic import glue, make_run, write_runs


def invoke(root, *arguments):
    return CliRunner().invoke(main, ["--results", str(root), "--format", "svg", *arguments])


def test_it_writes_the_named_studies_and_says_what_it_wrote(tmp_path):
    for study in ("a", "b"):
        write_runs(tmp_path, [make_run(), make_run(seed=1, status="failed", reason="boom")], study)
    (tmp_path / "b" / "runs" / "torn.json").write_text("{")
    result = invoke(tmp_path, "b")
    assert result.exit_code == 0
    assert "b: 1 done, 1 failed" in result.stdout and "torn.json" in result.stderr
    named = {Path(line) for line in result.stdout.splitlines() if line.startswith(str(tmp_path))}
    written = {path for folder in ("tables", "figures") for path in (tmp_path / "b" / folder).iterdir()}
    written.add(tmp_path / "b" / "report.html")
    assert named == written and not (tmp_path / "a" / "tables").exists()
    assert "a: 1 done" in invoke(tmp_path).stdout


def test_tables_come_from_runs_alone(tmp_path):
    folder = write_runs(tmp_path, [make_run(), make_run(method="dense", ratio=None)])
    first = regenerate(tmp_path, "glue", ["svg"])
    before = {path: path.read_bytes() for path in first.paths}
    (folder / "tables" / "runs.csv").write_text("nonsense")
    assert {path: path.read_bytes() for path in regenerate(tmp_path, "glue", ["svg"]).paths} == before


def test_an_unknown_study_names_the_nearest(tmp_path):
    write_runs(tmp_path, [make_run()], "glue-small")
    result = invoke(tmp_path, "glue-smal")
    assert result.exit_code == 1
    assert "no study 'glue-smal'" in result.stderr and "Did you mean 'glue-small'?" in result.stderr


def test_a_study_without_runs_is_an_error(tmp_path):
    (tmp_path / "empty" / "runs").mkdir(parents=True)
    (tmp_path / "empty" / "runs" / "torn.json").write_text("{")
    result = invoke(tmp_path, "empty")
    assert result.exit_code == 1 and "no run that can be read" in result.stderr and "torn.json" in result.stderr
    assert invoke(tmp_path / "nowhere").exit_code == 1


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    folder = write_runs(tmp_path, [make_run()])
    result = invoke(tmp_path, "--format", "gif", "glue")
    assert result.exit_code == 2 and "png, svg, pdf" in result.stderr and not (folder / "tables").exists()


def test_a_study_of_failures_has_its_failures_written(tmp_path):
    folder = write_runs(tmp_path, [make_run(status="failed", reason="boom")])
    report = regenerate(tmp_path, "glue")
    assert [path.name for path in report.paths] == ["failures.csv", "failures.md", "runs.csv", "report.html"]
    assert report.counts == {"failed": 1} and "boom" in (folder / "tables" / "failures.md").read_text()


def test_analysis_needs_no_torch(tmp_path):
    write_runs(tmp_path, [make_run()])
    script = (
        "import sys; from analysis.report import regenerate; from pathlib import Path; import analysis.console;"
        f"regenerate(Path({str(tmp_path)!r}), 'glue', ['svg']);"
        "heavy = {'torch', 'transformers', 'datasets', 'evaluate', 'wandb', 'sklearn', 'matplotlib.pyplot'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root)


def printed(folder, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_summary(folder, console)
    return console.file.getvalue()


def test_the_summary_fits_the_terminal_and_tells_scores_and_costs(tmp_path):
    text = printed(write_runs(tmp_path, glue(tasks=("sst2", "rte"), seeds=(0, 1), methods=("variator", "pruning"))))
    assert max(map(len, text.splitlines())) <= 100
    row = next(line for line in text.splitlines() if "variator" in line and " 4 " in line).split()
    assert row[-6:-2][1:] == ["53.4", "46.6", "0.852"]
    assert all(0.4 < float(ratio) < 0.8 for ratio in row[-2:])
    assert text.index("rte") < text.index("sst2") < text.index("average")
    assert "failed: t5-base sst2 pruning 16, seed 1: RuntimeError: out of memory" in text
    assert "FLOPs = 2 × multiply–accumulates" in text


def test_brackets_are_no_markup(tmp_path):
    result, predictions = make_run(options={"layers": ["a", "b"]})
    interval = result.evaluations[1].metrics["accuracy"]
    text = printed(write_runs(tmp_path, [(result, predictions), make_run(options={"layers": "[red]"})]))
    assert "layers=[red]" in text
    assert f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]" in text


def test_a_long_study_is_summed_up_by_its_averages(tmp_path):
    text = printed(write_runs(tmp_path, glue(tasks=("sst2", "rte"), backbones=("a", "b"), seeds=(0,))))
    assert "average" in text and "rte " not in text and "tables/summary.md" in text


def test_a_study_without_scores_still_prints_why(tmp_path):
    assert printed(write_runs(tmp_path, [make_run(status="skipped", reason="[too far]")])) == (
        "skipped: t5-base sst2 variator 4, seed 0: [too far]\n"
    )


def test_tables_and_figures_are_taken_for_fresh_only_while_every_result_is_older(tmp_path):
    folder = write_runs(tmp_path, [make_run(seed=0), make_run(method="dense", seed=0)])
    assert made_before(folder) == []
    made = regenerate(tmp_path, folder.name, formats=("png",)).paths
    assert sorted(made_before(folder)) == sorted(made)
    newest = max(path.stat().st_mtime for path in made)
    result = next((folder / "runs").glob("*.json"))
    os.utime(result, (newest + 1, newest + 1))
    assert made_before(folder) == [], "a result is newer"
    for path in made:
        os.utime(path, (newest + 2, newest + 2))
    assert sorted(made_before(folder)) == sorted(made)
    (folder / "README.md").write_text("It says more now.")
    os.utime(folder / "README.md", (newest + 3, newest + 3))
    assert made_before(folder) == [], "the page shows the README"
    (folder / "README.md").unlink()
    (folder / "report.html").unlink()
    assert made_before(folder) == [], "it was stopped before the page"
    (folder / "report.html").touch()
    os.utime(folder / "report.html", (newest + 2, newest + 2))
    assert made_before(folder)
    for path in (folder / "figures").iterdir():
        path.unlink()
    assert made_before(folder) == [], "it was stopped before the figures"
