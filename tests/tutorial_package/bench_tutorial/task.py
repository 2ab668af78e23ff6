"""A task: its YAML file, with the data beside it in the package."""

from pathlib import Path

TICKETS = Path(__file__).parent / "tickets" / "tickets.yaml"
