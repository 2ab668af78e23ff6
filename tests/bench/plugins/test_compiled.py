"""A compiled model with a bank: the answers of the plain one, and once warm no compilation however k is switched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from bench.plugins.bank import PluginBank
from tests.checkpoints import FAMILIES, Family, random_plugin, tiny_model, tokens

SWITCHES = (4, 1, 2, 1, 4, 2, 1)


class Operations(TorchDispatchMode):
    """Notes every operation on tensors, and so every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def batch(family: Family, n: int = 11) -> dict[str, Tensor]:
    mask = (torch.arange(n) < torch.tensor([[n], [4], [7]])).long()
    inputs = {"input_ids": tokens(3, n), "attention_mask": mask}
    return inputs | ({"decoder_input_ids": torch.zeros(3, 2, dtype=torch.long)} if family == "t5" else {})


def attach(model: Any, *ks: int, **settings: Any) -> PluginBank:
    """Attach a plugin a k, the last with ``settings``."""
    plain = [random_plugin(model, k, seed=k) for k in ks[:-1]]
    bank = PluginBank([*plain, random_plugin(model, ks[-1], seed=9, **settings)])
    bank.attach(model)
    return bank


def by_k(call: Any, bank: PluginBank, inputs: dict[str, Tensor], ks: Iterable[int]) -> list[tuple[int, Tensor]]:
    """Return the logits of a batch at each of ``ks`` in turn."""
    found = []
    for k in ks:
        bank.select(k)
        found.append((k, call(**inputs).logits))
    return found


@pytest.mark.parametrize(
    ("family", "ks", "settings", "backend"),
    [
        ("bert", (2, 4), {}, "aot_eager"),
        ("t5", (2, 4), {"attention_k": 2, "compression": "conv"}, "aot_eager"),
        ("bert", (4,), {}, "inductor"),
    ],
    ids=["bert", "t5", "inductor"],
)
@torch.inference_mode()
def test_answers_are_those_of_the_plain_model_and_switching_compiles_nothing(
    family: Family, ks: tuple[int, ...], settings: dict[str, Any], backend: str
) -> None:
    model, inputs = tiny_model(family), batch(family)
    bank = attach(model, *ks, **settings)
    plain = dict(by_k(model, bank, inputs, bank.ks))
    assert all(not torch.equal(plain[a], plain[b]) for a in plain for b in plain if a < b)
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # the hooks that note the mask break no graph
    warm = by_k(compiled, bank, inputs, bank.ks)
    assert counters["stats"]["unique_graphs"] == len(bank.ks)
    with torch.compiler.set_stance("fail_on_recompile"):
        switched = by_k(compiled, bank, inputs, [k for k in SWITCHES if k in bank.ks])
    assert counters["stats"]["unique_graphs"] == len(bank.ks)
    for k, logits in [*warm, *switched]:
        torch.testing.assert_close(logits, plain[k], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_graph_a_k_serves_every_batch_whose_length_is_a_multiple() -> None:
    """As docs/serving.md says of ``dynamic=True``."""
    model = tiny_model("bert", num_hidden_layers=1)
    bank = attach(model, 4)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    by_k(compiled, bank, batch("bert", 12), bank.ks)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (8, 16, 24):
            found = by_k(compiled, bank, batch("bert", n), (4, 1, 4))
            expected = dict(by_k(model, bank, batch("bert", n), bank.ks))
            for k, logits in found:
                torch.testing.assert_close(logits, expected[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_selecting_runs_no_operation_and_moves_no_tensor(family: Family) -> None:
    model = tiny_model(family)
    bank = attach(model, 2, 4)
    before = [(name, p.data_ptr(), p._version) for name, p in model.named_parameters()]
    with Operations() as operations:
        for k in SWITCHES:
            bank.select(k)
        assert operations.seen == []
        torch.zeros(1)
        assert operations.seen, "what is made is seen"
    assert [(name, p.data_ptr(), p._version) for name, p in model.named_parameters()] == before
