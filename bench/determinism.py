"""The same numbers again: every source of chance seeded, and deterministic kernels where there are any."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

CUBLAS_WORKSPACE = ":4096:8"
"""Without a workspace of a fixed size, cuBLAS may add up in another order from one call to the next."""


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Let what runs within give the same numbers whenever it runs on the same machine.

    Whatever draws a number seeds its own generator besides; this is for code of other packages, which may draw from the
    global ones. Timings belong outside: a deterministic kernel may be slower than the one that a user would have.

    Parameters
    ----------
    seed
        Of the run.
    """
    import numpy as np
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # an operation without such a kernel says so once, and is no reason to refuse the run
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
