"""What all tests share: no account of this machine, and a Slurm of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium
from tests.slurm_cluster import DAEMONS, Cluster

# no test but those of tracking itself talks to Weights & Biases, whatever account this machine has
for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]
os.environ["WANDB_MODE"] = "disabled"  # before any process is started, which inherits it

LARGEST_ARRAY = 2
collect_ignore = ["tutorial_package"]  # its own tests run where it is installed


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Return a running Slurm; where its packages are not installed, the tests are skipped, and say so."""
    if missing := [name for name in DAEMONS if not shutil.which(name)]:
        reason = f"sweeps on Slurm are not tested here: no {', '.join(missing)} (Debian: slurm-wlm, munge)"
        if os.environ.get("REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder, LARGEST_ARRAY)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return a running Chromium."""
    with chromium() as running:
        yield running
