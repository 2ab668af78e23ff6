"""A load served in real time by one engine in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from bench.measure.latency import no_garbage_collection
from bench.serving.queueing import Queue
from bench.serving.records import Served

Run = Callable[[int, Sequence[int]], NDArray[np.float32]]


def serve(queue: Queue, run: Run, progress: Callable[[int], None] = lambda answered: None) -> Served:
    """Serve every request of a queue at the moment it arrives, and return once the last is answered.

    Arrival times are given and do not wait for answers, so that a server that is late makes every later request wait:
    nothing is left out of the latencies (no coordinated omission).

    Parameters
    ----------
    queue
        A new one, of one replica.
    run
        ``run(k, examples)`` answers a batch and returns the scores of the answers, (batch,).
    progress
        Called after each batch with the number of its requests.
    """
    with no_garbage_collection():
        began = perf_counter()
        while (arrival := queue.next_arrival()) is not None:
            if (early := arrival - (perf_counter() - began)) > 0:
                time.sleep(early)
            started = max(perf_counter() - began, arrival)
            batch = queue.take(started)
            examples = queue.requests.example[batch.first : batch.last]
            scores = run(batch.k, examples.tolist())
            queue.answer(batch, started, perf_counter() - began, scores)
            progress(batch.last - batch.first)
    return queue.served()
