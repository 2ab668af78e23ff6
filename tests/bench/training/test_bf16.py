"""bf16 where the processor has none: the same numbers as torch's own products, from a training too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForSequenceClassification, T5ForConditionalGeneration

from bench import processor
from bench.testing.tiny import tiny_bert_config, tiny_t5_config
from bench.training.bf16 import ProductsInFp32, quick_bf16
from bench.training.loop import Schedule, train

CPU = torch.device("cpu")
ROUNDING = 2.0**-8
"""Half the distance of neighbouring bf16 numbers, relative to the larger."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16().requires_grad_()


PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "matmul": (torch.matmul, [drawn(5, 40), drawn(40, 7)]),
    "linear": (F.linear, [drawn(3, 5, 40), drawn(7, 40), drawn(7)]),
    "batched": (torch.bmm, [drawn(3, 5, 40), drawn(3, 40, 7)]),
    "added": (torch.baddbmm, [drawn(3, 5, 7), drawn(3, 5, 40), drawn(3, 40, 7)]),
    "einsum": (lambda a, b: torch.einsum("bnd,bmd->bnm", a, b), [drawn(3, 5, 40), drawn(3, 7, 40)]),
    "convolution": (lambda x, w, b: F.conv1d(x, w, b, stride=4), [drawn(2, 8, 16), drawn(8, 8, 4), drawn(8)]),
    "attention": (F.scaled_dot_product_attention, [drawn(2, 4, 9, 16), drawn(2, 4, 9, 16), drawn(2, 4, 9, 16)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_their_gradients_are_those_of_higher_precision_rounded(name: str) -> None:
    product, factors = PRODUCTS[name]
    exact = [factor.detach().double().requires_grad_() for factor in factors]
    wanted = product(*exact)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad(wanted, exact, weights.double())
    with ProductsInFp32():
        found = product(*factors)
        ours = torch.autograd.grad(found, factors, weights)
    # the backward pass of attention takes differences of what was rounded
    several = 8 if name == "attention" else 1
    for mine, its in zip([found, *ours], [wanted, *gradients], strict=True):
        assert mine.dtype is torch.bfloat16 and mine.shape == its.shape
        assert (mine.double() - its).abs().max() <= several * ROUNDING * its.abs().max()


def test_each_product_is_made_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, so that none of them is left to the slow path."""
    seen: list[tuple[str, set[torch.dtype]]] = []

    class Below(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
            seen.append((str(func), dtypes))
            return func(*args, **(kwargs or {}))

    for product, factors in PRODUCTS.values():
        with Below(), ProductsInFp32():
            product(*factors).sum().backward()
    heavy = [(name, dtypes) for name, dtypes in seen if any(k in name for k in ("mm", "convolution", "attention"))]
    assert len(heavy) >= 2 * len(PRODUCTS)
    assert {torch.bfloat16} not in [dtypes for _, dtypes in heavy], heavy


def test_what_is_not_bf16_is_left_alone() -> None:
    a, b = torch.randn(4, 30), torch.randn(30, 4)
    with ProductsInFp32():
        assert torch.equal(a @ b, torch.mm(a, b)) and (a.double() @ b.double()).dtype is torch.float64


def tiny_bert() -> nn.Module:
    return BertForSequenceClassification(tiny_bert_config())


def tiny_t5() -> nn.Module:
    return T5ForConditionalGeneration(tiny_t5_config())


@pytest.mark.parametrize("make", [tiny_bert, tiny_t5])
def test_a_training_is_the_same_but_for_rounding(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(native: bool) -> list[float]:
        monkeypatch.setattr(processor, "multiplies_bf16", lambda: native)
        torch.manual_seed(0)
        model = make().train()
        ids = torch.randint(5, 40, (8, 12), generator=torch.Generator().manual_seed(3))
        labels = ids[:, 0] % 2
        given = {"labels": labels} if make is tiny_bert else {"labels": labels[:, None] + 5}

        def loss(step: int) -> tuple[Tensor, dict[str, float]]:
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).loss, {}

        schedule = Schedule(12, 3e-3, precision="bf16")
        history = train(loss, list(model.parameters()), schedule, seed=0, device=CPU, log_every=1)
        return [record["loss"] for record in history]

    theirs, ours = losses(native=True), losses(native=False)
    assert ours == pytest.approx(theirs, rel=0.03)
    assert ours[-1] < 0.8 * ours[0]


def test_only_a_processor_without_bf16_is_helped(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(processor, "multiplies_bf16", lambda native=native: native)
        assert isinstance(quick_bf16(CPU), ProductsInFp32) is not native
        assert not isinstance(quick_bf16(torch.device("cuda")), ProductsInFp32)


def test_the_record_says_what_the_processor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, word in ((True, "with"), (False, "without")):
        monkeypatch.setattr(processor, "multiplies_bf16", lambda native=native: native)
        assert processor.describe().endswith(f" cores, {torch.backends.cpu.get_cpu_capability()} {word} bf16")
