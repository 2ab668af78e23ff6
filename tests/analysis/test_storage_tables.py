"""Tables and figure of a storage measurement, from its JSON alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest

from analysis.report import made_before, regenerate
from analysis.storage import series_names, storage_figure, storage_frame, write_storage
from bench.errors import BenchError, DamagedResult
from bench.storage import StorageResult, read_storage
from bench.storage import write_storage as store
from tests.analysis.synthetic import glue, write_runs


def _point(tasks: int, each: int, shared: int, memory: bool = True) -> dict[str, Any]:
    size = shared + tasks * each
    measured = {"tensor_bytes": size, "resident_bytes": size + 1, "load_seconds": 0.1, "ran": tasks}
    return {"tasks": tasks, "distinct": min(tasks, 3), "disk_bytes": size + 100, "files": tasks} | (
        measured if memory else {"reason": "9.9 GB do not fit into the 1.0 GB that were free"}
    )


def _series(method: str, each: int, shared: int, lora: bool = True, ratios: tuple[float, ...] = ()) -> dict[str, Any]:
    return {
        "method": method,
        "lora": lora,
        "ratios": list(ratios),
        "runs": {"rte": ["a" * 16]},
        "shared_bytes": shared,
        "task_bytes": {"rte": each, "sst2": each + 2},
        "points": [_point(n, each, shared, memory=each < 90_000_000 or n < 100) for n in (1, 3, 10, 100)],
        "agreement": [{"k": 4, "examples": 48, "batches": 3, "same": 47, "largest_difference": 2.5e-6}]
        if shared > 80_000_000
        else [],
    }


@pytest.fixture
def measured(provenance: dict[str, Any]) -> StorageResult:
    return StorageResult.model_validate(
        {
            "study": "many",
            "backbone": "minilm-l6",
            "family": "bert",
            "backbone_bytes": 90_000_000,
            "series": [
                _series("pruning", 20_000_000, 47_000_000, ratios=(4.0,)),
                _series("dense", 90_000_000, 0, lora=False),
                _series("dense", 1_500_000, 90_000_000),
                _series("variator", 3_000_000, 90_000_000, ratios=(2.0, 4.0)),
            ],
            "provenance": provenance,
        }
    )


@pytest.fixture
def provenance() -> dict[str, Any]:
    return {
        "commit": None, "dirty": None, "command": ["bench", "storage"], "started": "2026-01-01T00:00:00+00:00",
        "host": "h", "platform": "p", "hardware": "c", "device": "cpu", "threads": 1, "versions": {},
    }  # fmt: skip


def test_the_file_comes_back_as_it_was(measured: StorageResult, tmp_path: Path) -> None:
    assert read_storage(tmp_path) is None
    path = store(measured, tmp_path)
    assert read_storage(tmp_path) == measured
    whole = path.read_text()
    for text, kind, message in (
        (whole[:-20], DamagedResult, "not a valid measurement"),
        (whole.replace('"study"', '"stud"'), DamagedResult, "not a valid measurement"),
        ("[]", DamagedResult, "not a valid measurement"),
        (
            json.dumps(json.loads(whole) | {"schema_version": 9}),
            BenchError,
            r"schema_version is 9.*Update this library",
        ),
    ):
        path.write_text(text)
        with pytest.raises(kind, match=message):
            read_storage(tmp_path)


def test_ways_are_named_by_what_tells_them_apart(measured: StorageResult) -> None:
    assert series_names(measured.series) == [
        "pruning (k = 4)", "dense (all weights)", "dense (LoRA)", "variator (k = 2, 4)",
    ]  # fmt: skip


def test_the_tables_hold_what_was_measured(measured: StorageResult, tmp_path: Path) -> None:
    store(measured, tmp_path)
    write_storage(tmp_path, ["png"])
    frame = pd.read_csv(tmp_path / "tables" / "storage.csv")
    assert list(frame["series"].unique()) == [
        "dense (LoRA)", "dense (all weights)", "variator (k = 2, 4)", "pruning (k = 4)",
    ]  # fmt: skip
    row = frame[(frame["series"] == "variator (k = 2, 4)") & (frame["tasks"] == 100)].iloc[0]
    assert (row["disk_bytes"], row["tensor_bytes"]) == (390_000_100, 390_000_000)
    assert (row["distinct"], row["further_bytes"]) == (3, 3_000_001)
    text = (tmp_path / "tables" / "storage.md").read_text()
    assert "9.9 GB do not fit" in text and "Up to 3 tasks were trained" in text
    lines = {line.split("|")[1].strip(): line for line in text.split("## In memory")[0].splitlines() if "|" in line}
    cells = [cell.strip() for cell in lines["variator (k = 2, 4)"].strip("|").split("|")]
    assert cells[1:] == ["90.0", "3.00", "93.0", "99.0", "120", "390"]
    memory = text.split("## In memory")[1].split("## Resident")[0]
    assert next(line for line in memory.splitlines() if "all weights" in line).split("|")[-2].strip() == "n/a"
    assert "| 47 |" in text.replace("  ", " ") or "47" in text.split("## Mixed")[1]


def test_the_figure_draws_each_way_on_both_panels(measured: StorageResult) -> None:
    figure = storage_figure(storage_frame(measured), "minilm-l6")
    disk, memory = figure.axes
    assert disk.get_xscale() == disk.get_yscale() == "log"
    lengths = [sorted(len(line.get_xdata()) for line in axes.get_lines()) for axes in (disk, memory)]  # type: ignore[arg-type]
    assert lengths == [[4, 4, 4, 4], [3, 4, 4, 4]]  # what did not fit is a point less, and no guess
    values = {tuple(line.get_ydata()) for line in disk.get_lines()}  # type: ignore[arg-type]
    assert (93.0001, 99.0001, 120.0001, 390.0001) in values
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["dense (LoRA)", "dense (all weights)", "variator (k = 2, 4)", "pruning (k = 4)"]
    dashes = {(line.get_color(), str(line.get_linestyle())) for line in disk.get_lines()}
    assert len(dashes) == 4 and all(style != "None" for _, style in dashes)


def test_a_study_is_reported_with_its_storage_and_the_same_each_time(measured: StorageResult, tmp_path: Path) -> None:
    write_runs(tmp_path, glue(("rte",), seeds=(0,), methods=("variator", "pruning")), "many")
    store(measured, tmp_path / "many")
    report = regenerate(tmp_path, "many", ["png", "svg"])
    names = {path.name for path in report.paths}
    assert {"storage.md", "storage.csv", "storage.tex", "storage.png", "storage.svg", "summary.md"} <= names
    assert matplotlib.image.imread(tmp_path / "many" / "figures" / "storage.png").std() > 0.01
    first = {path: path.read_bytes() for path in report.paths}
    assert made_before(tmp_path / "many")
    store(measured, tmp_path / "many")
    assert not made_before(tmp_path / "many")  # the measurement is newer than its tables
    assert {path: path.read_bytes() for path in regenerate(tmp_path, "many", ["png", "svg"]).paths} == first
    (tmp_path / "many" / "storage.json").unlink()
    regenerate(tmp_path, "many", ["png", "svg"])
    assert not list((tmp_path / "many").rglob("storage.*"))
