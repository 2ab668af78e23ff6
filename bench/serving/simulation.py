"""A load served by any number of replicas, as discrete events with calibrated service times. Imports no torch."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from bench.serving.queueing import Batch, Queue
from bench.serving.records import Served


def simulate(
    queue: Queue, scores: dict[int, NDArray[np.float32]], rng: np.random.Generator, pace: float = 1.0
) -> Served:
    """Serve every request of a queue in simulated time.

    Parameters
    ----------
    queue
        A new one, with as many replicas as are to be simulated.
    scores
        k -> score of its answer to each dev example.
    rng
        Where the service times' chance comes from.
    pace
        By how much every batch takes longer than the calibration says.
    """
    import simpy

    environment = simpy.Environment()
    idle = simpy.Resource(environment, queue.replicas)
    requests, times = queue.requests, queue.times

    def run(batch: Batch, started: float, held: simpy.resources.resource.Request) -> Generator[simpy.Event]:
        rows = slice(batch.first, batch.last)
        length = int(requests.lengths[rows].max())
        yield environment.timeout(pace * times.draw(batch.k, batch.last - batch.first, length, rng))
        queue.answer(batch, started, environment.now, scores[batch.k][requests.example[rows]])
        idle.release(held)

    def dispatch() -> Generator[simpy.Event]:
        while (arrival := queue.next_arrival()) is not None:
            held = idle.request()
            yield held
            if arrival > environment.now:
                yield environment.timeout(arrival - environment.now)
            # a sum of floats may fall short of the time that it was to reach
            now = max(environment.now, arrival)
            environment.process(run(queue.take(now), now, held))

    environment.process(dispatch())
    environment.run()
    return queue.served()
