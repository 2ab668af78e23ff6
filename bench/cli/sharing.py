"""Commands that bring in what others made, or send what was made here."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bench.cli.group import Group
from bench.cli.options import FOLDER, cache_dir, results, surroundings


@click.command
@click.argument("project")
@click.option("--study", help="Study that the results go to; that of each result.")
@results
def pull(project: str, study: str | None, results: Path) -> None:
    """Bring finished runs of a W&B project back as results.

    PROJECT is ENTITY/PROJECT, or ENTITY/PROJECT/SWEEP for the runs of one sweep. Results that are here stay.
    """
    from bench.launch.remote import pull_and_print

    sys.exit(pull_and_print(project, results, study))


@click.group(cls=Group)
def hub() -> None:
    """Share plugins and studies on the Hugging Face Hub."""


@hub.command("push")
@click.argument("what")
@click.argument("repo", metavar="USER/NAME")
@click.option("--public", is_flag=True, help="Let everybody see a repository that is made now.")
@click.option("--license", default="apache-2.0", show_default=True, help="Licence, as the Hub names it.")
@cache_dir
@results
def hub_push(what: str, repo: str, public: bool, license: str, cache_dir: Path | None, results: Path) -> None:
    """Send a study, or a plugin with the run that made it.

    WHAT is a study, the id of a run whose plugin is in the cache, or the folder of a plugin. A repository that is made
    is private. It all goes in one commit, or nothing does.

    \b
    bench hub push pilot ME/variator-pilot
    bench hub push 6fbc3866484420a3 ME/variator-sst2-k4
    """  # noqa: D301
    from bench.launch.sharing import push_and_print

    push_and_print(what, repo, results, surroundings(None, cache_dir, "cpu"), private=not public, license=license)


@hub.command("pull")
@click.argument("repo", metavar="USER/NAME")
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--study", help="Study that results go to; that of each result.")
@click.option("--out", type=FOLDER, help="Folder that a plugin goes to; plugins/NAME.")
@results
def hub_pull(repo: str, revision: str | None, study: str | None, out: Path | None, results: Path) -> None:
    """Bring a study or a plugin back. Results that are here stay.

    Nothing but JSON, Parquet and safetensors is read.
    """
    from bench.launch.sharing import pull_and_print

    sys.exit(pull_and_print(repo, results, study, revision, out))


@click.command
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=FOLDER)
@click.option("--backbone", help="What it was made for; the original T5 of its width and depth.")
def convert(file: Path, out: Path, backbone: str | None) -> None:
    """Convert a plugin that the authors of Variator released.

    FILE is their checkpoint, OUT the folder to make. Nothing but tensors is read: a pickle that would do anything else
    is refused.
    """
    from bench.launch.listing import convert_and_print

    convert_and_print(file, out, backbone)
