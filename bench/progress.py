"""What a run tells whoever watches. Imports no torch."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what a run is doing."""

    def stage(self, name: str, total: int, weight: float = 0.0) -> None:
        """Begin a stage of ``total`` steps, each of ``weight`` FLOPs."""

    def advance(self, steps: int = 1, **numbers: float) -> None:
        """Count ``steps`` of the current stage as done, with live numbers such as losses."""

    def message(self, text: str) -> None:
        """Say one line."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: int, weight: float = 0.0) -> None:
        """Ignore."""

    def advance(self, steps: int = 1, **numbers: float) -> None:
        """Ignore."""

    def message(self, text: str) -> None:
        """Ignore."""
