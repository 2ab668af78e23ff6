"""Print what came of loads that were served."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from bench.launch.display import console, say
from bench.serving.records import ServingCell, ServingStore


def print_served(store: ServingStore) -> None:
    """Print a table of every load, engine by engine; cells that differ in the load's seed alone are averaged."""
    out = console()
    groups: dict[tuple[str, str, int, float, float], dict[tuple[str, str], list[ServingCell]]] = {}
    for cell in store:
        key = (cell.load, cell.mode, cell.replicas, cell.times, cell.seconds)
        groups.setdefault(key, {}).setdefault((cell.engine, cell.policy), []).append(cell)
    for (load, mode, replicas, times, seconds), rows in sorted(groups.items()):
        scale = f", {replicas} replicas, load × {times:g}" if replicas > 1 or times != 1 else ""
        table = Table(title=f"{load} · {seconds:g} s · {mode}{scale}", title_justify="left")
        for name in ("engine", "policy"):
            table.add_column(name)
        for name in ("accuracy", "in time", "right in time", "p50 ms", "p95 ms", "p99 ms", "answers/s", "at k"):
            table.add_column(name, justify="right")
        for (engine, policy), cells in sorted(rows.items()):
            table.add_row(engine, policy, *_numbers(cells))
        out.print(table)
    say(out, str(store.folder))


def _numbers(cells: Sequence[ServingCell]) -> list[str]:
    def mean(name: str) -> float:
        return float(sum(getattr(cell.summary, name) for cell in cells)) / len(cells)

    ks = sorted({k for cell in cells for k in cell.summary.share_at_k})
    shares = {k: sum(cell.summary.share_at_k.get(k, 0.0) for cell in cells) / len(cells) for k in ks}
    return [
        *(f"{mean(name):.1%}" for name in ("accuracy", "in_time", "right_in_time")),
        *(f"{1e3 * mean(name):.0f}" for name in ("p50_seconds", "p95_seconds", "p99_seconds")),
        f"{mean('throughput'):.1f}",
        " ".join(f"{k}:{share:.0%}" for k, share in shares.items()),
    ]
