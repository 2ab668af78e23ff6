"""``python -m bench`` with its measuring cut short, for tests that launch several processes of it."""

from __future__ import annotations

import os
from typing import Any

import bench.team
from bench.plugins.plugin import Plugin
from tests.workers import quick_measuring


def no_memory(*_: Any, **__: Any) -> None:
    raise RuntimeError("no memory left on this one")


if __name__ == "__main__":
    quick_measuring()
    bench.team.GRACE = 5.0
    if os.environ.get("FAILING_RANK") == os.environ.get("RANK", "none"):
        Plugin.for_model = no_memory  # type: ignore[method-assign, assignment]
    from bench.__main__ import run

    run()
