"""One op at a time: both counters against the number of products that its definition says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.errors import BenchError
from bench.measure.flops import Parts, count, count_dispatched
from bench.measure.handles import matmul_like


class Inside(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Around(nn.Module):
    """Calls one function behind a submodule that stands for the encoder."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.encoder, self.inside = nn.Dropout(), Inside(function)

    def forward(self, x: Tensor) -> Any:
        return self.inside(self.encoder(x))


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x.t()


def attend(queries: int, keys: int, value_width: int = 4, heads: tuple[int, int] = (1, 1), **options: Any) -> Any:
    q = torch.ones(2, heads[0], queries, 4)
    k, v = (torch.ones(2, heads[1], keys, width) for width in (4, value_width))
    return lambda x: F.scaled_dot_product_attention(q * x[0, 0], k, v, **options)


ones = torch.ones
# The input is 3 x 4. Each case: what is called, and its multiply-accumulates by definition.
COUNTED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "linear": (nn.Linear(4, 5), 3 * 4 * 5),
    "linear on 3 axes": (lambda x: F.linear(x.expand(2, 3, 4), ones(5, 4)), 2 * 3 * 4 * 5),
    "mm": (lambda x: torch.mm(x, x.t()), 3 * 4 * 3),
    "mm of int8": (lambda x: torch._int_mm(x.to(torch.int8), ones(4, 5, dtype=torch.int8)), 3 * 4 * 5),
    "bmm": (lambda x: torch.bmm(x.expand(2, 3, 4), ones(2, 4, 5)), 2 * 3 * 4 * 5),
    "matmul": (lambda x: x @ ones(4, 5), 3 * 4 * 5),
    "matmul, broadcast": (lambda x: x.expand(2, 1, 3, 4) @ ones(5, 4, 6), 2 * 5 * 3 * 4 * 6),
    "matrix times vector": (lambda x: x @ ones(4), 3 * 4),
    "vector times matrix": (lambda x: ones(3) @ x, 3 * 4),
    "dot": (lambda x: torch.dot(x[0], x[1]), 4),
    "addmm": (lambda x: torch.addmm(ones(5), x, ones(4, 5)), 3 * 4 * 5),
    "addmv": (lambda x: torch.addmv(ones(3), x, ones(4)), 3 * 4),
    "addbmm": (lambda x: torch.addbmm(ones(3, 5), x.expand(2, 3, 4), ones(2, 4, 5)), 2 * 3 * 4 * 5),
    "baddbmm": (lambda x: torch.baddbmm(ones(3, 5), x.expand(2, 3, 4), ones(2, 4, 5)), 2 * 3 * 4 * 5),
    "einsum": (lambda x: torch.einsum("bij,bjk->bik", x.expand(2, 3, 4), ones(2, 4, 5)), 2 * 3 * 4 * 5),
    "einsum to a vector": (lambda x: torch.einsum("ij,j->i", x, ones(4)), 3 * 4),
    "einsum that sums one side first": (lambda x: torch.einsum("ijl,kj->ik", x.expand(5, 3, 4), ones(2, 3)), 5 * 3 * 2),
    "einsum without a product sum": (lambda x: torch.einsum("ij,ij->ij", x, x), 0),
    "einsum of one": (lambda x: torch.einsum("ij->j", x), 0),
    "conv1d": (lambda x: F.conv1d(x.view(1, 3, 4), ones(6, 3, 2)), 6 * 3 * 2 * 3),
    "conv1d in groups": (lambda x: F.conv1d(x.view(1, 4, 3), ones(6, 2, 2), groups=2), 6 * 2 * 2 * 2),
    "conv_transpose1d": (lambda x: F.conv_transpose1d(x.view(1, 3, 4), ones(3, 5, 2), stride=2), 4 * 3 * 5 * 2),
    "conv2d": (lambda x: F.conv2d(x.view(1, 1, 3, 4), ones(2, 1, 2, 2), padding=1), 2 * 4 * (4 * 5)),
    "attention": (attend(3, 7), 2 * 2 * 3 * 7 * 4),
    "attention, causal": (attend(3, 3, is_causal=True), 2 * 2 * 3 * 3 * 4),
    "attention, masked": (attend(3, 7, attn_mask=ones(3, 7)), 2 * 2 * 3 * 7 * 4),
    "attention, wide values": (attend(3, 7, value_width=6), 2 * 3 * 7 * (4 + 6)),
    "attention, grouped heads": (attend(3, 7, heads=(4, 2), enable_gqa=True), 2 * 4 * 3 * 7 * (4 + 4)),
    "norm, softmax, activation": (lambda x: F.gelu(F.layer_norm(x, (4,))).softmax(-1).norm(), 0),
    "pooling and resizing": (lambda x: F.interpolate(x.view(1, 3, 4), scale_factor=2, mode="linear").cummax(-1)[0], 0),
}


@pytest.mark.parametrize("counter", [count, count_dispatched])
@pytest.mark.parametrize("case", COUNTED)
def test_products_are_counted(case: str, counter: Any) -> None:
    function, macs = COUNTED[case]
    model = Around(function).eval()
    assert counter(model, {"x": ones(3, 4)}, Parts((model.encoder,))).head == 2 * macs


# What nobody has a formula for, and whether torch's dispatcher breaks it down into ops that it does know.
UNCOUNTED: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "cdist": (lambda x: torch.cdist(x, x), False),
    "cdist by products": (lambda x: torch.cdist(x.repeat(20, 1), x.repeat(20, 1)), False),
    "lstm": (nn.LSTM(4, 2), False),
    "bilinear": (lambda x: F.bilinear(x, x, ones(2, 4, 4)), False),
    "tensordot": (lambda x: torch.tensordot(x, x, ([1], [1])), True),
    "matrix_power": (lambda x: torch.matrix_power(ones(3, 3) * x[0, 0], 3), True),
    "einsum of three": (lambda x: torch.einsum("ij,jk,kl->il", x, ones(4, 4), ones(4, 2)), True),
    "einsum '...j": (lambda x: torch.einsum("...j,kj->...k", x, ones(2, 4)), True),
    "Opaque": (Opaque.apply, True),
}


@pytest.mark.parametrize("case", UNCOUNTED)
def test_whatever_else_multiplies_is_an_error(case: str) -> None:
    function, known_to_torch = UNCOUNTED[case]
    model = Around(function).eval()
    parts = Parts((model.encoder,))
    with pytest.raises(BenchError, match=case.split()[0]) as error:
        count(model, {"x": ones(3, 4)}, parts)
    if "einsum" not in case:
        assert "in module 'Around.inside" in str(error.value)
    if known_to_torch:
        assert count_dispatched(model, {"x": ones(3, 4)}, parts).head > 0
    else:
        with pytest.raises(BenchError, match=r"in module 'Around.inside"):
            count_dispatched(model, {"x": ones(3, 4)}, parts)


@pytest.mark.parametrize(
    "name",
    [
        "cummax",
        "cummin",
        "digamma",
        "mvlgamma",
        "upsample_bilinear2d",
        "linalg_vector_norm",
        "softmax",
        "mul",
        "sum",
        "_convert_indices_from_coo_to_csr",
        "masked_fill",
        "embedding",
        "logcumsumexp",
    ],
)
def test_names_that_only_look_alike(name: str) -> None:
    assert not matmul_like(f"aten::{name}")
