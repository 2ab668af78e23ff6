"""The ``bench`` command: parse, call, print. Nothing here imports torch before a run needs it."""

from __future__ import annotations

import click

from bench import __version__
from bench.cli.group import Group
from bench.cli.listing import list_
from bench.cli.serving import export, serve_sim, storage
from bench.cli.sharing import convert, hub, pull
from bench.cli.studies import report, status, verify
from bench.cli.sweeps import plan, run, sweep

COMMANDS = (list_, plan, run, sweep, serve_sim, export, status, pull, hub, report, verify, storage, convert)
"""In the order of the reference."""


# In the docstrings of commands, which are the help texts, click keeps the lines of a paragraph that begins with \b.
@click.group(
    cls=Group, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="bench")
def main() -> None:
    """Benchmark Variator and its rivals: accuracy against FLOPs, over tasks, ratios and backbones.

    \b
    bench plan sweeps/quickstart.yaml     what would run, what it costs, what is cached
    bench sweep sweeps/quickstart.yaml    run it; run it again to go on
    bench report quickstart               tables, figures and a page from the results
    """  # noqa: D301
