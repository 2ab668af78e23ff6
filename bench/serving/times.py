"""Service times of an engine at any batch, from its calibration. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RegularGridInterpolator

from bench.serving.records import Calibration

Sizes = NDArray[np.int64]


class ServiceTimes:
    """Median seconds of every batch, and how much single ones differ from them.

    Between the sizes and lengths that were measured, times are interpolated linearly in both, and beyond the longest
    length they go on linearly.

    Parameters
    ----------
    calibration
        What was measured.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.ks = tuple(model.k for model in calibration.models)
        samples = np.array(calibration.seconds)
        medians = np.median(samples, axis=-1)
        # what makes one run slower than another of the same batch, whatever the batch
        self.spread = (samples / medians[..., None]).reshape(len(self.ks), -1)
        self.largest = calibration.sizes[-1]
        grid = [np.array(points, float) for points in (calibration.sizes, calibration.lengths)]
        for axis, points in enumerate(grid):
            if len(points) == 1:  # nothing to interpolate: the same everywhere
                grid[axis], medians = np.append(points, points + 1), np.repeat(medians, 2, axis=axis + 1)
        longest = max(calibration.examples)
        every = np.meshgrid(np.arange(1, self.largest + 1), np.arange(longest + 1), indexing="ij")
        # shorter batches than any that was measured take as long as the shortest
        wanted = np.stack([every[0], np.maximum(every[1], grid[1][0])], axis=-1)
        self.medians = np.stack(
            [RegularGridInterpolator(grid, table, bounds_error=False, fill_value=None)(wanted) for table in medians]
        )

    def __call__(self, k: int, sizes: Sizes, lengths: Sizes) -> NDArray[np.float64]:
        """Return median seconds of batches of ``sizes`` that are padded to ``lengths``."""
        found: NDArray[np.float64] = self.medians[self.ks.index(k), sizes - 1, lengths]
        return found

    def draw(self, k: int, size: int, length: int, rng: np.random.Generator) -> float:
        """Return the seconds of one batch, as likely as they were measured."""
        at = self.ks.index(k)
        return float(self.medians[at, size - 1, length] * rng.choice(self.spread[at]))

    def capacity(self, k: int, lengths: Sizes) -> float:
        """Return the requests a second that full batches serve.

        Parameters
        ----------
        k
            At which k.
        lengths
            Lengths of the examples that requests ask for, each as likely as the others.
        """
        rng = np.random.default_rng(0)
        longest = rng.choice(lengths, (1000, self.largest)).max(axis=1)
        return self.largest / float(self(k, np.full(1000, self.largest), longest).mean())
