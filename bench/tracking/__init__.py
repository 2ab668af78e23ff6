"""Runs that Weights & Biases watches; a run without it is complete.

W&B lives in a process beside each run, which may hang or die without the run being stopped or slowed: what it did not
send stays in a folder that ``wandb sync`` reads. Nothing here imports wandb but the modules of that process.
"""

from bench.tracking.run import Tracking, run_tracked

__all__ = ["Tracking", "run_tracked"]
