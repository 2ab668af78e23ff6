"""A group of commands that names the nearest one, and says the suite's errors in a line."""

from __future__ import annotations

import sys
from typing import Any

import click

from bench.errors import BenchError, suggest


class Group(click.Group):
    """Names the nearest command, and turns the suite's errors into one line and exit code 2."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command (called by click)."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message}{suggest(args[0], self.list_commands(ctx))}", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command (called by click)."""
        try:
            return super().invoke(ctx)
        except BenchError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped; what was finished is stored, and the same command goes on from there", err=True)
            sys.exit(130)
