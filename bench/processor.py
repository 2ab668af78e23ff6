"""What computes here: its name, and what it can multiply by itself. Imports no torch before it is asked."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe() -> str:
    """Return the processor's name, its cores, and the instructions that torch uses.

    Virtual machines give processors of several kinds one name; what differs in them is what sums are made with.
    """
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    bf16 = "with" if multiplies_bf16() else "without"
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()} {bf16} bf16"


def multiplies_bf16() -> bool:
    """Return whether torch multiplies bf16 by instructions of this processor."""
    import torch

    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
