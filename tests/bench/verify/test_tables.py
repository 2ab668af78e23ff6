"""Every committed table and figure against the one that the results make, until one is changed on purpose."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread, imsave

from analysis.report import regenerate
from bench.results import ResultStore
from bench.storage import STORAGE_FILE
from bench.verify.tables import Compilation, compile_again
from tests.analysis.synthetic import glue, write_runs
from tests.bench_command import bench

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a results folder with a study whose tables and figures are made."""
    root = tmp_path_factory.mktemp("original") / "results"
    write_runs(root, glue(tasks=("sst2",), seeds=(0,), methods=("variator",)))
    shutil.copy(ROOT / "results" / "storage" / STORAGE_FILE, root / "glue")
    regenerate(root, "glue")
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "results"))


def again(root: Path) -> Compilation:
    return compile_again(ResultStore(root, "glue"), root.parent / f"scratch-{len(list(root.parent.iterdir()))}")


def failing(made: Compilation) -> dict[str, str]:
    return {file.name: f"{file.outcome}: {file.text}" for file in made.files if file.outcome != "identical"}


def test_all_are_identical_and_nothing_of_the_study_is_written(original: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in original.rglob("*") if path.is_file()}
    made = compile_again(ResultStore(original, "glue"), original.parent / "scratch")
    assert made.good and not made.causes and not failing(made)
    assert {file.name.rpartition(".")[2] for file in made.files} == {"csv", "md", "tex", "png", "svg", "pdf"}
    assert {"tables/storage.csv", "figures/storage.svg"} <= {file.name for file in made.files}
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in original.rglob("*") if path.is_file()
    } == before


def test_a_changed_cell_is_named_by_line_and_column(root: Path) -> None:
    path = root / "glue" / "tables" / "summary.csv"
    lines = path.read_text().splitlines(keepends=True)
    column = lines[0].split(",").index("score_percent")
    cells = lines[2].split(",")
    honest, cells[column] = cells[column], "99.9"
    path.write_text("".join([*lines[:2], ",".join(cells), *lines[3:]]))
    made = again(root)
    assert failing(made) == {
        "tables/summary.csv": f"different: line 3, score_percent: '99.9' committed, '{honest}' made again"
    }
    assert not made.good and any(cause.startswith("record: ") for cause in made.causes)


def test_changed_words_missing_files_and_left_over_ones_are_named(root: Path) -> None:
    tables = root / "glue" / "tables"
    path = tables / "summary.md"
    path.write_text(path.read_text().replace("variator", "valiator", 1))
    (tables / "failures.md").unlink()
    (tables / "by_hand.csv").write_text("a,b\n1,2\n")
    (tables / ".DS_Store").touch()
    found = failing(again(root))
    assert set(found) == {"tables/summary.md", "tables/failures.md", "tables/by_hand.csv"}
    assert "valiator" in found["tables/summary.md"] and "line " in found["tables/summary.md"]
    assert found["tables/failures.md"].startswith("missing: ") and found["tables/by_hand.csv"].startswith("left over: ")


def test_a_changed_result_shows_in_tables_and_figures(root: Path) -> None:
    path = sorted((root / "glue" / "runs").glob("*.json"))[0]
    path.write_text(re.sub(r'("achieved_remaining": 0\.)\d+', r"\g<1>77", path.read_text()))
    found = failing(again(root))
    assert "tables/summary.csv" in found and any(name.startswith("figures/") for name in found)


@pytest.fixture
def figure(root: Path) -> Path:
    return sorted((root / "glue" / "figures").glob("*.svg"))[0]


def test_a_figure_that_draws_something_else_is_different(root: Path, figure: Path) -> None:
    text = figure.read_text()
    moved = re.sub(r"M (\d+)\.", lambda m: f"M {int(m[1]) + 3}.", text, count=1)
    assert moved != text
    figure.write_text(moved)
    png = figure.with_suffix(".png")
    pixels = np.array(imread(png))
    pixels[: len(pixels) // 4] = 0.5
    imsave(png, pixels)
    found = failing(again(root))
    assert set(found) == {f"figures/{figure.name}", f"figures/{png.name}"}
    assert found[f"figures/{figure.name}"] == "different: the same elements, up to 3 apart"
    assert re.fullmatch(r"different: \d+\.\d+% of its pixels differ", found[f"figures/{png.name}"])


def test_names_of_elements_are_no_drawing(root: Path, figure: Path) -> None:
    """They are hashes of floating-point numbers, and differ where the last bit of a place does, which nobody sees."""
    text = figure.read_text()
    renamed = re.sub(r"\bp(?=[0-9a-f]{10}\b)", "q", text)
    assert renamed != text
    figure.write_text(renamed)
    made = again(root)
    assert made.good and failing(made) == {
        f"figures/{figure.name}": "within tolerance: the same elements, up to 0 apart"
    }


def test_words_in_a_figure_are_compared(root: Path, figure: Path) -> None:
    figure.write_text(figure.read_text().replace(">variator", ">winner", 1))
    assert failing(again(root))[f"figures/{figure.name}"].startswith("different: it says 'winner")


def test_another_version_may_draw_a_hair_elsewhere(root: Path, figure: Path) -> None:
    """Another matplotlib: other metadata, and coordinates that differ in the last digits."""
    whole = figure.read_text()

    def move(by: float) -> None:
        figure.write_text(re.sub(r"M (\d+\.\d+)", lambda m: f"M {float(m[1]) + by:.6f}", whole, count=1))

    move(0.01)
    assert list(failing(again(root)).values()) == ["different: the same elements, up to 0.01 apart"]
    for path in (root / "glue" / "figures").glob("*.svg"):
        path.write_text(re.sub(r"Matplotlib v[\d.]+", "Matplotlib v3.9.1", path.read_text()))
    whole = whole.replace("Matplotlib v", "Matplotlib v3.9.1 was v")
    made = again(root)
    assert made.good and {o.partition(":")[0] for o in failing(made).values()} == {"within tolerance"}
    assert made.causes[0].startswith("version: the figures were drawn by matplotlib 3.9.1, here by matplotlib ")
    move(0.4)
    png = figure.with_suffix(".png")
    pixels = np.array(imread(png))
    pixels[: len(pixels) // 4] = 0.5
    imsave(png, pixels)
    different = {name for name, text in failing(again(root)).items() if text.startswith("different: ")}
    assert different == {f"figures/{figure.name}", f"figures/{png.name}"}


def test_a_torn_figure_is_different_and_not_a_crash(root: Path, figure: Path) -> None:
    for suffix in (".svg", ".png", ".pdf"):
        path = figure.with_suffix(suffix)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert {text.partition(":")[0] for text in failing(again(root)).values()} == {"different"}


def git(*words: str, at: Path) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *words], cwd=at, check=True, capture_output=True)


def test_git_says_whether_results_changed_or_a_table_was_edited(root: Path) -> None:
    git("init", "--quiet", at=root)
    git("add", ".", at=root)
    git("commit", "--quiet", "-m", "all", at=root)
    table = root / "glue" / "tables" / "summary.csv"
    table.write_text(table.read_text() + "more\n")
    assert again(root).causes == ["record: not as committed: summary.csv"]
    git("checkout", "--quiet", ".", at=root)
    path = sorted((root / "glue" / "runs").glob("*.json"))[0]
    path.unlink()
    causes = again(root).causes
    assert len(causes) == 1 and re.match(
        r"data: since commit \w{8}, 1 results of this study changed, such as .*" + path.name, causes[0]
    )


def test_the_command_says_so_and_exits_with_1(root: Path) -> None:
    at = root.parent
    code, command = bench(["verify", "results/glue", "--tables"], at, machine=False)
    assert code == 0 and re.search(r"glue tables: \d+ identical\nglue figures: \d+ identical", command.out), command.err
    (root / "glue" / "tables" / "summary.tex").write_text("nothing\n")
    code, command = bench(["verify", "glue", "--tables"], at, machine=False)
    assert code == 1 and "different: tables/summary.tex: " in command.out and "1 different" in command.out
