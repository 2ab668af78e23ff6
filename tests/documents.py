"""The site's hooks as modules, and the code of the documents."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
HOOKS = ROOT / "docs" / "hooks"


def hook(name: str) -> ModuleType:
    """Import ``docs/hooks/<name>.py``."""
    sys.path.insert(0, str(HOOKS))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(HOOKS))


def python_blocks(page: Path) -> Iterator[str]:
    """Yield the Python code of a page, block by block."""
    yield from re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
