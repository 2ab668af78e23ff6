"""The work of ``bench storage``: run what is missing of some sweeps, and measure what keeping their tasks takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.cell import Surroundings
from bench.errors import BenchError, ConfigError
from bench.launch.display import console, say
from bench.launch.listing import print_report, run_and_print
from bench.launch.plan import plan
from bench.launch.sweep import find_sweep, read_sweep
from bench.results import ResultStore
from bench.storage import write_storage


def read_counts(text: str) -> list[int]:
    """Read ``1,3,10,100``.

    Raises
    ------
    ConfigError
        If a part is no positive whole number.
    """
    try:
        counts = sorted({int(part) for part in text.split(",")})
        if counts[0] < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--tasks {text}: expected numbers of tasks such as 1,3,10,100") from None
    return counts


def store_and_print(
    sweeps: Sequence[str], results: Path, study: str | None, where: Surroundings, counts: Sequence[int]
) -> int:
    """Measure the storage of the tasks of ``sweeps`` and print it; return the exit code, 1 where a cell failed.

    Raises
    ------
    BenchError
        If the sweeps belong to several studies, a cell was skipped, or `bench.serving.store` refuses them.
    """
    from bench.serving.store import measure_storage

    read = [read_sweep(find_sweep(name), {}, where.data_root) for name in sweeps]
    studies = sorted({sweep.study for sweep in read})
    if study is None and len(studies) > 1:
        raise BenchError(f"the sweeps belong to studies {' and '.join(studies)}; say with --study where this goes")
    # several sweeps may list one cell
    cells = list({config.model_dump_json(): config for sweep in read for config in sweep.configs}.values())
    store = ResultStore(results, study or studies[0])
    if any(cell.pending or cell.state == "error" for cell in plan(cells, store, where, "missing")) and run_and_print(
        cells, store, where, "missing", summary=True
    ):
        return 1
    left = [cell for cell in plan(cells, store, where, "missing") if cell.state != "done"]
    if left:
        raise BenchError(
            f"{left[0].config.label} is not done ({left[0].reason or left[0].state}); nothing was measured"
        )
    errors = console(stderr=True)
    command = ["bench", "storage", *sweeps, "--tasks", ",".join(map(str, counts))]
    result = measure_storage(cells, where, store.study, command, counts, lambda text: say(errors, text))
    path = write_storage(result, store.folder)
    print_report(results, store.study)
    say(console(), str(path))
    return 0
