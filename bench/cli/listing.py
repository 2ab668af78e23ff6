"""The command that shows what there is to choose from."""

from __future__ import annotations

import click


@click.command("list")
@click.argument("what", type=click.Choice(["tasks", "methods", "backbones", "recipes", "keys", "policies", "loads"]))
def list_(what: str) -> None:
    """Show the known tasks, methods, backbones, recipes, keys, policies or loads."""
    from bench.launch.listing import print_listing

    print_listing(what)
