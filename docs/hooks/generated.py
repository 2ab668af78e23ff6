"""Pages made of code, results and notebook whenever the site is built, so that none can grow stale."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import api  # noqa: E402
import notebook  # noqa: E402
import reference  # noqa: E402
import studies  # noqa: E402

MADE: dict[str, str | bytes] = {}
"""The pages of the build that is running."""


def pages() -> dict[str, str | bytes]:
    """Return source path -> content of everything in the site that is not below docs/ in the repository."""
    return {**reference.pages(), **api.pages(), **studies.pages(ROOT / "results"), **notebook.pages()}


def on_config(config: Any) -> Any:
    """Make the pages, and put them where the navigation names their folder (called by MkDocs)."""
    MADE.clear()
    MADE.update(pages())
    config.nav = [_expanded(item) for item in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages (called by MkDocs)."""
    for path, content in MADE.items():
        files.append(File.generated(config, path, content=content))
    return files


def _expanded(item: Any) -> Any:
    if isinstance(item, list):
        return [_expanded(part) for part in item]
    if isinstance(item, dict):
        return {title: _expanded(part) for title, part in item.items()}
    return [path for path in MADE if path.startswith(item) and path.endswith(".md")] if item.endswith("/") else item
