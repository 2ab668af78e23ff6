"""The notebook as a page, with its stored outputs; as a script, it executes and stores it anew."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebooks" / "tour.ipynb"
SECONDS = 600
"""A cell that takes longer hangs."""


def pages() -> dict[str, str | bytes]:
    """Return source path -> content of the page and of its figures."""
    body, resources = MarkdownExporter().from_filename(str(NOTEBOOK))
    body = re.sub(r"<style scoped>.*?</style>\n", "", body, flags=re.S)
    body = re.sub(r"!\[[^\]]*\]\(", "![Output of the cell above](", body)
    folder = NOTEBOOK.parent.name
    figures = {f"{folder}/{name}": content for name, content in resources["outputs"].items()}
    return {f"{folder}/{NOTEBOOK.stem}.md": body, **figures}


def executed(path: Path = NOTEBOOK) -> nbformat.NotebookNode:
    """Return a notebook with the outputs that it has here and now, and nothing of this machine beside them."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, coalesce_streams=True, record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # warnings name paths of the machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
