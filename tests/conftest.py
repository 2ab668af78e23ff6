"""No test but those of tracking itself talks to Weights & Biases, whatever account this machine has."""

from __future__ import annotations

import os

for name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[name]
os.environ["WANDB_MODE"] = "disabled"  # before any process is started, which inherits it
