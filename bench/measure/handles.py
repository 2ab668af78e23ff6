"""How much one op multiplies: handles for fvcore's trace, formulas for torch's dispatcher, and the watch on both."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any

import torch

Shape = tuple[int, ...]

MULTIPLIES = re.compile(
    r"mm(?!a|in)|mv(?!l)|matmul|linear|conv(?!ert)|einsum|attention|dot|[cpn]_?dist|rnn|lstm|gru|transformer"
    r"|matrix_(power|exp)|linalg_(?!.*norm)"
)
"""Names of ops that multiply matrices. Wider than what is counted, so that whatever is missed is an error."""


def matmul_like(name: str) -> bool:
    """Whether an op's name says that it multiplies matrices."""
    return bool(MULTIPLIES.search(name)) and "upsample" not in name


def attention_macs(query: Shape, key: Shape, value: Shape) -> int:
    """MACs of the scores and of the mix; a mask, causal or not, saves nothing."""
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _shape(value: Any) -> Shape:
    return tuple(value.type().sizes())


def _rows(first: int) -> Callable[[Any, Any], int]:
    """Every output element takes one product over the last axis of the operand at ``first``."""
    return lambda inputs, outputs: prod(_shape(outputs[0])) * _shape(inputs[first])[-1]


def _addbmm(inputs: Any, outputs: Any) -> int:
    return prod(_shape(inputs[1])) * _shape(inputs[2])[-1]


def _attention(inputs: Any, outputs: Any) -> int:
    return attention_macs(*(_shape(value) for value in inputs[:3]))


def _convolution(inputs: Any, outputs: Any) -> int:
    transposed = inputs[6].toIValue()
    return prod(_shape(inputs[0] if transposed else outputs[0])) * prod(_shape(inputs[1])[1:])


def _einsum(inputs: Any, outputs: Any) -> int:
    equation = inputs[0].toIValue().replace(" ", "")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    terms, _, result = equation.partition("->")
    names = terms.split(",")
    if len(names) > 2 or "." in equation or not _:
        raise NotImplementedError(f"einsum '{equation}': give two operands, no ellipsis, and the result's indices")
    size = {letter: n for term, shape in zip(names, shapes, strict=True) for letter, n in zip(term, shape, strict=True)}
    contracted = set.intersection(*map(set, names)) - set(result)
    if len(names) == 1 or not contracted:
        return 0
    return prod(size[letter] for letter in contracted | set(result))


TRACED: dict[str, Callable[[Any, Any], int]] = {
    "aten::linear": _rows(0),
    "aten::matmul": _rows(0),
    "aten::mm": _rows(0),
    "aten::_int_mm": _rows(0),
    "aten::bmm": _rows(0),
    "aten::mv": _rows(0),
    "aten::dot": _rows(0),
    "aten::addmm": _rows(1),
    "aten::addmv": _rows(1),
    "aten::baddbmm": _rows(1),
    "aten::addbmm": _addbmm,
    "aten::_convolution": _convolution,
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
}
"""Name of an op in a trace -> its MACs, from the values that go in and come out."""

DISPATCHED: dict[Any, Callable[..., int]] = {
    torch.ops.aten._int_mm: lambda a, b, **_: 2 * prod(a) * b[-1],
    torch.ops.aten.mv: lambda a, b, **_: 2 * prod(a),
    torch.ops.aten.dot: lambda a, b, **_: 2 * prod(a),
    torch.ops.aten.addmv: lambda bias, a, b, **_: 2 * prod(a),
    torch.ops.aten.addbmm: lambda bias, a, b, **_: 2 * prod(a) * b[-1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: 2 * attention_macs(q, k, v),
}
"""Ops that torch's own counter passes over -> their FLOPs, from shapes."""
