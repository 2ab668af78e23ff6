"""The command that shows what there is to choose from."""

from __future__ import annotations

import click


@click.command("list")
@click.argument("what", type=click.Choice(["tasks", "methods", "backbones", "recipes", "keys", "policies", "loads"]))
def list_(what: str) -> None:
    """Show what there is to choose from, such as tasks or methods."""
    from bench.launch.listing import print_listing

    print_listing(what)
