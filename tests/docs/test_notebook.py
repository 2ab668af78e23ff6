"""The notebook runs from top to bottom in a fresh kernel, and says what it was stored saying."""

from __future__ import annotations

import re
from typing import Any

import nbformat
import pytest

from tests.documents import hook

notebook = hook("notebook")
SAME_EVERYWHERE = re.compile(r"FLOPs|parameters|bit-identical|batch \d|copied|bytes|to train on|same again")
"""Lines that depend on no machine's rounding."""


def _lines(cell: Any) -> list[str]:
    """Return what a cell says, but for figures and what is meant for a browser."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])]
    return [line for text in texts for line in text.splitlines() if not line.startswith("<Figure")]


def _of(cells: list[Any], word: str) -> Any:
    [found] = [cell for cell in cells if word in cell.source and cell.cell_type == "code"]
    return found


@pytest.mark.timeout(900)
def test_it_runs_and_says_what_was_stored() -> None:
    stored, now = nbformat.read(notebook.NOTEBOOK, as_version=4).cells, notebook.executed().cells
    said = [
        [line for cell in cells for line in _lines(cell) if SAME_EVERYWHERE.search(line)] for cells in (stored, now)
    ]
    assert said[0] == said[1] and len(said[0]) > 12, "run `make docs`"
    assert _lines(_of(stored, "read_study(")) == _lines(_of(now, "read_study(")), "results changed: run `make docs`"
    [image] = [output["data"] for output in _of(now, "pareto_figure(").outputs if "image/png" in output["data"]]
    assert len(image["image/png"]) > 20_000
    scores = [float(score) for line in _lines(_of(now, "evaluate(")) for score in re.findall(r": ([\d.]+)%", line)]
    assert len(scores) == 4 and scores[0] > 70, "k = 1 is a teacher that has learnt something"
    assert "bit-identical afterwards: True" in said[1] and "weights copied: none" in said[1]


def test_what_is_stored_is_whole_and_of_no_machine() -> None:
    text = notebook.NOTEBOOK.read_text("utf-8")
    cells = nbformat.read(notebook.NOTEBOOK, as_version=4).cells
    assert [cell.execution_count for cell in cells if cell.cell_type == "code"] == list(
        range(1, 1 + sum(cell.cell_type == "code" for cell in cells))
    )
    assert not re.search(r"site-packages|\"stderr\"|Error|/tmp|ipykernel_", text)


def test_the_page_shows_text_code_outputs_and_figures() -> None:
    made = notebook.pages()
    page = made["notebooks/tour.md"]
    assert page.startswith("# ") and "```python" in page and "saved" in page and "<style" not in page
    figures = re.findall(r"!\[[^\]]+\]\((\w+\.png)\)", page)
    assert figures and {f"notebooks/{name}" for name in figures} <= set(made)
