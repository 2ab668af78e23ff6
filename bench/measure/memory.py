"""Peak bytes of the tensors that one forward pass makes and keeps alive at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from bench.measure.latency import no_garbage_collection


def peak_bytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Measure one forward pass in inference mode; weights and inputs do not count, the outputs do.

    On CUDA this is what the allocator had to hand out at once beyond what it held before, scratch space of the kernels
    included. Elsewhere it is the exact size of the live tensors, which does not depend on the machine.

    Parameters
    ----------
    model
        Called as ``model(**inputs)``.
    inputs
        Tensors by name, on the model's device.

    Returns
    -------
    int
        Bytes.
    """
    device = next(iter(inputs.values())).device
    with torch.inference_mode():
        return _allocated(model, inputs, device) if device.type == "cuda" else _tracked(model, inputs)


def _allocated(model: nn.Module, inputs: Mapping[str, Tensor], device: torch.device) -> int:
    model(**inputs)  # libraries take their workspaces at first use
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(**inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _tracked(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    # Tensors in a reference cycle would otherwise die whenever the collector happens to run.
    tracker = _Tracker()
    with no_garbage_collection(), tracker:
        model(**inputs)
    return tracker.peak


class _Tracker(TorchDispatchMode):
    """Knows the storages that are alive: by identity, so that views count once, and weakly, so that it keeps none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._bytes: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            # What goes into an op before any op has made it was there already: a weight, a buffer, an input.
            self._bytes.setdefault(tensor.untyped_storage(), 0)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            self._bytes.setdefault(storage, storage.nbytes())
        self.peak = max(self.peak, sum(self._bytes.values()))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
