"""bf16 where a processor has no instructions for it, and torch's own products are tens of times slower than fp32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench import processor

_ATEN = torch.ops.aten
_PRODUCTS = frozenset(
    {
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN.baddbmm.default,
        _ATEN.convolution.default,
        _ATEN.convolution_backward.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
    }
)
_KEPT = {_ATEN._scaled_dot_product_flash_attention_for_cpu.default: (1,)}
"""Results that are fp32 whatever the inputs: the log-sum-exp, which the backward pass reads."""


def quick_bf16(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products of bf16 tensors are quick on any device.

    Where the processor cannot multiply bf16, the same factors are multiplied in fp32, and what comes out is rounded to
    bf16: what torch computes there too, but for the order of its sums. Forward and backward passes belong inside.
    """
    # every accelerator that can autocast to bf16 multiplies it
    slow = device.type == "cpu" and not processor.multiplies_bf16()
    return ProductsInFp32() if slow else nullcontext()  # type: ignore[no-untyped-call]


class ProductsInFp32(TorchDispatchMode):
    """Computes matrix products, convolutions and attention of bf16 tensors in fp32, and rounds the results."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(isinstance(a, Tensor) and a.dtype is torch.bfloat16 for a in args):
            return func(*args, **kwargs)
        wide, options = tree_map_only(Tensor, _widened, (args, kwargs))
        found = func(*wide, **options)
        if isinstance(found, Tensor):
            return _rounded(found)
        kept = _KEPT.get(func, ())
        return type(found)(
            _rounded(one) if isinstance(one, Tensor) and i not in kept else one for i, one in enumerate(found)
        )


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype is torch.bfloat16 else tensor


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.dtype is torch.float32 else tensor
