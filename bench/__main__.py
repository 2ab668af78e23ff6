"""``python -m bench``: the ``bench`` command, also of several processes that ``accelerate launch`` starts together."""

from __future__ import annotations

import contextlib

from bench.cli import main
from bench.team import joined


def run() -> None:
    """Run the command; of several processes the first does, and the others train along with it."""
    with joined() as team:
        if team is not None and team.rank:
            from bench.execution import follow

            with contextlib.suppress(KeyboardInterrupt):  # the first process says what there is to say
                follow(team)
        else:
            main(prog_name="bench")


if __name__ == "__main__":
    run()
