"""RunConfig -> RunResult: the one path that every run takes."""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Callable
from typing import Literal

from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.errors import BenchError, DamagedResult, Diverged, MachineError, Unreachable
from bench.execution import execute
from bench.locks import hold
from bench.progress import Progress, Silent
from bench.provenance import collect
from bench.results import ResultStore, RunResult

Mode = Literal["missing", "retry-failed", "force", "read-only"]
MODES: tuple[Mode, ...] = ("missing", "retry-failed", "force", "read-only")
RETRIED = ("failed", "diverged", "interrupted")


def _named(cell: Cell) -> dict[str, str]:
    """Return names in place of paths, which mean nothing elsewhere; the identity holds the content."""
    return {"task": cell.task.name, "backbone": cell.spec.name}


def is_settled(result: RunResult | None, mode: Mode) -> bool:
    """Return whether a stored result stands under ``mode``."""
    if result is None or mode == "force":
        return False
    if mode == "read-only":
        return True
    if result.status in RETRIED:
        return mode == "missing" and result.status != "interrupted"
    return result.status in ("done", "skipped")


def run(
    config: RunConfig,
    store: ResultStore,
    where: Surroundings | None = None,
    mode: Mode = "missing",
    progress: Progress | None = None,
    begin: Callable[[], None] = lambda: None,
) -> RunResult:
    """Return the result of one cell, running it if the store does not have it.

    Parameters
    ----------
    config
        The cell.
    store
        Where results are.
    where
        Data, cache and device.
    mode
        ``missing`` runs what has no result or was interrupted, ``retry-failed`` also what failed or diverged, ``force``
        everything, ``read-only`` nothing.
    progress
        Who watches.
    begin
        Called where this process is the one that runs the cell, before it does.

    Raises
    ------
    BenchError
        If the cell cannot be resolved, results cannot be written, or ``read-only`` finds nothing. What fails after that
        is a result with status ``failed``.
    KeyboardInterrupt
        After noting the run as interrupted.
    """
    where, progress = where or Surroundings(), progress or Silent()
    cell = Cell.resolve(config, where)
    if (found := _stored(cell, store, mode, progress)) is not None and is_settled(found, mode):
        return found
    if mode == "read-only":
        raise BenchError(f"no result for {config.label} (run {cell.run_id}) in {store.folder}, and nothing may be run")
    waiting = f"{config.label}: another process is on it; waiting"
    with hold(store.lock_path(cell.run_id), lambda: progress.message(waiting)):
        if (found := store.read(cell.run_id)) is not None and is_settled(found, mode):
            return found
        store.clear(cell.run_id)
        begin()
        return _run_locked(cell, store, where, progress)


def _stored(cell: Cell, store: ResultStore, mode: Mode, progress: Progress) -> RunResult | None:
    """Return the stored result; one that is damaged is put aside, and is none."""
    try:
        return store.read(cell.run_id)
    except DamagedResult as error:
        if mode == "read-only":
            raise
        kept = store.quarantine(cell.run_id)
        problem = str(error).partition(" Move it away")[0]
        progress.message(f"{cell.config.label}: {problem} It is kept as {kept}, and the cell is run again.")
        return None


def _run_locked(cell: Cell, store: ResultStore, where: Surroundings, progress: Progress) -> RunResult:
    config = cell.config
    result = RunResult(
        run_id=cell.run_id,
        study=store.study,
        status="running",
        config=config.model_dump(mode="json"),
        identity=dict(cell.identity),
        task={
            "name": cell.task.name,
            "kind": cell.task.kind,
            "metrics": list(cell.task.metrics),
            "caveat": cell.task.caveat,
        },
        provenance=collect(config.model_copy(update=_named(cell)).command()),
    )
    result.config |= _named(cell) | {"family": cell.spec.family}
    result.provenance.model_digest = cell.revisions["model"]
    result.provenance.seeds = {"run": config.seed}
    earlier = store.read(cell.run_id)
    kept = earlier is not None and earlier.status == "done"
    if not kept:
        store.write(result)
    began = time.monotonic()
    try:
        if reason := cell.skip_reason():
            result.status, result.reason = "skipped", reason
        else:
            execute(cell, store, where, progress, result)
            result.status = "done"
    except Unreachable as error:
        result.status, result.reason = "skipped", str(error)
    except Diverged as error:
        result.status, result.reason = "diverged", str(error)
    except KeyboardInterrupt:
        result.status, result.reason = "interrupted", "stopped by the user"
        if not kept:
            store.write(result)
        raise
    except Exception as error:
        result.status = "interrupted" if _is_of_the_machine(error) else "failed"
        result.reason = str(error) if isinstance(error, BenchError) else f"{type(error).__name__}: {error}"
        result.traceback = traceback.format_exc()
    result.provenance.seconds = round(time.monotonic() - began, 3)
    if not (kept and result.status == "interrupted"):
        store.write(result)
    return result


def _is_of_the_machine(error: BaseException | None) -> bool:
    """Return whether a run failed for want of space, permission, network or device, and not of its own."""
    while error is not None:
        if isinstance(error, MachineError) or "No space left on device" in str(error):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            return True
        error = error.__cause__ or error.__context__
    return False
