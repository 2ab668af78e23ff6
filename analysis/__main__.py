"""``python -m analysis``: make every table, figure and page again from ``results/``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from analysis.report import regenerate, studies
from analysis.style import FORMATS
from bench.errors import BenchError


def _formats(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    chosen = [part.strip().lower() for part in value.split(",") if part.strip()]
    if unknown := sorted(set(chosen) - set(FORMATS)):
        raise click.BadParameter(f"'{unknown[0]}' is no format; choose of {', '.join(FORMATS)}")
    return chosen


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[STUDY]...")
@click.option("--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True,
              help="Folder of studies.")  # fmt: skip
@click.option("--format", "formats", default=",".join(FORMATS), show_default=True, callback=_formats,
              help="Formats of the figures, separated by commas.")  # fmt: skip
def main(names: tuple[str, ...], results: Path, formats: list[str]) -> None:
    """Write tables/, figures/ and report.html of each STUDY from its runs; of all studies if none is named."""
    try:
        chosen = names or studies(results)
        if not chosen:
            raise BenchError(f"no study in {results}: it should hold <study>/runs/*.json. Name another with --results.")
        for name in chosen:
            report = regenerate(results, name, formats)
            for path in report.paths:
                click.echo(path)
            for problem in report.problems:
                click.echo(f"warning: {problem}", err=True)
            click.echo(f"{name}: {', '.join(f'{n} {status}' for status, n in report.counts.items())}")
    except BenchError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="python -m analysis")
