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


def pages() -> dict[str, str | bytes]:
    """Return source path -> content of everything in the site that is not below docs/ in the repository."""
    return {**reference.pages(), **api.pages(), **studies.pages(ROOT / "results"), **notebook.pages()}


def on_config(config: Any) -> Any:
    """Put the generated pages where the navigation names their folder (called by MkDocs)."""
    config.nav = [_expanded(item, pages()) for item in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages (called by MkDocs)."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def _expanded(item: Any, made: dict[str, str | bytes]) -> Any:
    if isinstance(item, list):
        return [_expanded(part, made) for part in item]
    if isinstance(item, dict):
        return {title: _expanded(part, made) for title, part in item.items()}
    return [path for path in made if path.startswith(item) and path.endswith(".md")] if item.endswith("/") else item
