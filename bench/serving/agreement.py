"""A load that was served in real time, simulated again at the speed that the machine had then. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pandas as pd

from bench.errors import ConfigError
from bench.serving import words
from bench.serving.policies import policies
from bench.serving.queueing import Batch, Queue, Requests
from bench.serving.records import Served, ServingCell, ServingStore, ServingStudy
from bench.serving.simulation import simulate
from bench.serving.times import ServiceTimes


def simulate_again(store: ServingStore, study: ServingStudy, cell: ServingCell) -> tuple[float, Served] | None:
    """Simulate what was served in real time, with all service times longer by what they were longer then.

    A simulation assumes that the machine is as quick as when it was calibrated. Near its limit a queue multiplies what
    it is slower by, so that this tells a simulation that is wrong from a machine whose speed has drifted. The policy
    still sees the calibrated times, as it did.

    Parameters
    ----------
    store, study
        Where the cell is stored.
    cell
        A cell of mode ``real``.

    Returns
    -------
    tuple or None
        Pace, the seconds of all its batches over those that the calibration expects of them, and what is simulated at
        that pace. ``None`` if its policy is of a package that is not installed.

    Raises
    ------
    DamagedResult
        If its single requests cannot be read.
    """
    try:
        policy = words.read(cell.policy, "policy", policies())
    except ConfigError:
        return None
    calibration = next(c for c in study.calibrations if c.engine == cell.engine)
    times, lengths = ServiceTimes(calibration), np.array(calibration.examples)
    table = store.requests(cell)
    requests = Requests(
        table["arrived"].to_numpy(np.float64), table["example"].to_numpy(np.int32), lengths[table["example"]]
    )
    measured = expected = 0.0
    for batch, seconds in batches(table):
        longest = requests.lengths[batch.first : batch.last].max(keepdims=True)
        expected += float(times(batch.k, np.array([batch.last - batch.first]), longest)[0])
        measured += seconds
    scores = {m.k: np.array(row, np.float32) for m, row in zip(calibration.models, calibration.scores, strict=True)}
    queue = Queue(requests, policy, times, study.max_batch, study.deadline_seconds)
    pace = measured / expected
    return pace, simulate(queue, scores, np.random.default_rng([cell.load_seed, 1]), pace)


def batches(table: pd.DataFrame) -> Iterator[tuple[Batch, float]]:
    """Yield each batch of one model's requests, in order, and how many seconds it took.

    Parameters
    ----------
    table
        As `bench.serving.records.ServingStore.requests` returns it. Requests of a batch are answered at one moment,
        and a batch starts once the one before is answered and its first request has come.
    """
    arrived, k = table["arrived"].to_numpy(np.float64), table["k"].to_numpy()
    finished = arrived + table["latency"].to_numpy(np.float64)
    # both were stored in single precision
    apart = np.diff(finished) > 4 * np.spacing(np.float32(finished.max()))
    starts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(table)]
    free = 0.0
    for first, last in itertools.pairwise(starts):
        yield Batch(first, last, int(k[first])), float(finished[first] - max(free, arrived[first]))
        free = float(finished[first])
