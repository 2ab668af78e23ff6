"""A page for each committed study: its README, its tables and its figures."""

from __future__ import annotations

import re
from pathlib import Path

FIRST = ("serving_simulated", "serving", "storage", "pareto_overview", "pareto_", "drops_", "options_", "latency_")
CAPTIONS = {
    "serving": "Policies under load",
    "storage": "Bytes against the number of tasks",
    "pareto": "Score against remaining encoder FLOPs",
    "drops": "What is lost",
    "options": "What options lose",
    "latency": "Time against FLOPs",
}
TABLES = ("serving.md", "storage.md", "summary.md")


def pages(results: Path) -> dict[str, str | bytes]:
    """Return source path -> content of a page for each study, and of its figures."""
    made: dict[str, str | bytes] = {}
    names = sorted((path.parent.name for path in results.glob("*/README.md")), key=lambda name: (name != "pilot", name))
    for name in names:
        folder = results / name
        figures = sorted((folder / "figures").glob("*.png"), key=_order)
        made[f"studies/{name}.md"] = _page(folder, figures)
        made |= {f"studies/{name}/{figure.name}": figure.read_bytes() for figure in figures}
    return made


def _page(folder: Path, figures: list[Path]) -> str:
    text = (folder / "README.md").read_text("utf-8").rstrip()
    parts = [text]
    if figures:
        parts.append("## Figures")
        parts += [f"![{_caption(figure.stem)}]({folder.name}/{figure.name}){{ loading=lazy }}" for figure in figures]
    tables = [path.read_text("utf-8") for name in TABLES if (path := folder / "tables" / name).is_file()]
    if tables:
        # one level down, below this page's own title
        parts.append("## Tables")
        parts += [re.sub(r"^#", "##", re.sub(r"\A# .*\n", "", table), flags=re.M).strip() for table in tables]
    return "\n\n".join(parts) + "\n"


def _order(figure: Path) -> tuple[int, str]:
    return next(i for i, kind in enumerate((*FIRST, "")) if figure.stem.startswith(kind)), figure.stem


def _caption(stem: str) -> str:
    kind, _, of = stem.partition("_")
    return ": ".join([CAPTIONS.get(kind, kind), *([of.replace("_", ", ")] if of else [])])
