"""Training batches of near-equal length, as a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CHUNK_BATCHES = 50


class LengthBatches:
    """An endless stream of training batches that can be entered at any step.

    Each epoch is shuffled, cut into chunks of 50 batches, each chunk sorted by length and cut into batches, and the
    batches shuffled: padding is small, and which examples meet is still chance. Every example comes once an epoch; the
    remainder is spread, so that the batches of an epoch differ in size by one at most and none exceeds ``batch_size``.

    Parameters
    ----------
    lengths
        Length of each example in tokens.
    batch_size
        Largest size of a batch.
    seed
        Seed of the shuffling.

    Raises
    ------
    ValueError
        If there is no example, or the batch size is not positive.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if not len(lengths) or batch_size < 1:
            raise ValueError(f"cannot make batches of {batch_size} from {len(lengths)} examples")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.batches_per_epoch = -(-len(lengths) // batch_size)
        self._planned: tuple[int, list[NDArray[np.int64]]] = (-1, [])

    def batch(self, step: int) -> list[int]:
        """Return the indices of the examples of one step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return [int(i) for i in self._planned[1][position]]

    def _plan(self, epoch: int) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self.lengths))
        batches: list[NDArray[np.int64]] = []
        sizes = [len(part) for part in np.array_split(shuffled, self.batches_per_epoch)]
        bounds = np.cumsum([0, *sizes])
        for first in range(0, self.batches_per_epoch, CHUNK_BATCHES):
            cuts = bounds[first : first + CHUNK_BATCHES + 1]
            chunk = shuffled[cuts[0] : cuts[-1]]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")]
            batches += np.split(chunk, cuts[1:-1] - cuts[0])
        return [batches[i] for i in rng.permutation(len(batches))]
