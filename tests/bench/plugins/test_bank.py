"""Attaching leaves the model as it was; switching copies nothing; what is used wrongly says so and breaks nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.backbones.model import share_weights
from bench.backbones.sites import digest
from bench.backbones.write_out import write_out
from bench.errors import PluginError
from bench.plugins.bank import CompressedFFN, PluginBank
from tests.checkpoints import FAMILIES, Family, encode_hidden, random_plugin, tiny_model, tokens

IDS, MASK = tokens(3, 11), (torch.arange(11) < torch.tensor([[11], [4], [7]])).long()


@pytest.fixture(params=FAMILIES)
def model(request: Any) -> Any:
    return tiny_model(request.param)


def hidden(model: Any) -> Tensor:
    with torch.no_grad():
        return encode_hidden(model, input_ids=IDS, attention_mask=MASK)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could leave behind."""
    return {
        "digest": digest(model),
        "keys": list(model.state_dict()),
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "storage": [(name, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "modes": [(name, module.training) for name, module in model.named_modules()],
    }


def test_model_is_untouched_after_the_block(model: Any) -> None:
    layer = model.get_submodule("bert.encoder.layer.0" if hasattr(model, "bert") else "encoder.block.0")
    layer.training = True  # an odd mode of one module alone is kept too
    before, output = fingerprint(model), hidden(model)
    with random_plugin(model, 2).attached(model):
        assert digest(model) != before["digest"]
        assert not torch.equal(hidden(model), output)
    assert fingerprint(model) == before
    assert torch.equal(hidden(model), output)


def test_model_is_untouched_after_an_exception_in_the_block(model: Any) -> None:
    before, output = fingerprint(model), hidden(model)
    with pytest.raises(ZeroDivisionError), random_plugin(model, 2).attached(model):
        hidden(model)[0, 0, 0] = 1 / 0
    assert fingerprint(model) == before
    assert torch.equal(hidden(model), output)


def test_model_is_untouched_after_an_exception_in_a_forward_pass(model: Any) -> None:
    before, output = fingerprint(model), hidden(model)
    with pytest.raises(IndexError), random_plugin(model, 2).attached(model):
        encode_hidden(model, input_ids=IDS + 10**6, attention_mask=MASK)
    assert fingerprint(model) == before
    assert torch.equal(hidden(model), output)


def test_nothing_of_a_batch_is_kept(model: Any) -> None:
    with random_plugin(model, 2, attention_k=2).attached(model):
        selection = next(module.selection for module in model.modules() if isinstance(module, CompressedFFN))
        before = dict(vars(selection))
        hidden(model)
        assert vars(selection) == before
        with pytest.raises(IndexError):
            encode_hidden(model, input_ids=IDS + 10**6, attention_mask=MASK)
        assert vars(selection) == before


def test_training_a_plugin_leaves_the_backbone_frozen(model: Any) -> None:
    model.requires_grad_(False)
    before, plugin = fingerprint(model), random_plugin(model, 2)
    start, target = digest(plugin), hidden(model)
    with plugin.attached(model):
        model.train()
        optimizer = torch.optim.AdamW(plugin.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            loss = (encode_hidden(model, input_ids=IDS, attention_mask=MASK) - target)[MASK.bool()].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
    assert losses[-1] < 0.7 * losses[0]
    assert digest(plugin) != start
    assert digest(model) == before["digest"]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(hidden(model), target)


def test_k_1_is_the_dense_model_to_the_bit(model: Any) -> None:
    dense, bank = hidden(model), PluginBank([random_plugin(model, 2), random_plugin(model, 4, seed=2)])
    with bank.attached(model):
        assert torch.equal(hidden(model), dense)
        bank.select(4)
        assert not torch.equal(hidden(model), dense)
        bank.select(1)
        assert torch.equal(hidden(model), dense)


def test_a_selected_k_is_that_plugin_alone(model: Any) -> None:
    plugins = [random_plugin(model, k, seed=k) for k in (2, 4)]
    alone = []
    for plugin in plugins:
        with plugin.attached(model):
            alone.append(hidden(model))
    bank = PluginBank(plugins)
    assert bank.ks == (1, 2, 4)
    with bank.attached(model, k=4):
        assert torch.equal(hidden(model), alone[1])
        bank.select(2)
        assert torch.equal(hidden(model), alone[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_plugins_with_and_without_merged_keys_switch(model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    variants: dict[int, dict[str, Any]] = {
        2: {},
        3: {"attention_k": 2},
        4: {"attention_k": 4, "compression": "conv"},
        5: {"attention_k": 2, "compression": "mean", "decompression": "copy"},
    }
    plugins = [random_plugin(model, k, seed=k, **variant) for k, variant in variants.items()]
    before, alone = fingerprint(model), {1: hidden(model)}
    for k, plugin in zip(variants, plugins, strict=True):
        with plugin.attached(model):
            alone[k] = hidden(model)
        assert fingerprint(model) == before
    assert all(not torch.equal(alone[a], alone[b]) for a in alone for b in alone if a < b)
    bank = PluginBank(plugins)
    with bank.attached(model):
        for k in (1, 4, 2, 3, 1, 5, 4, 1):
            bank.select(k)
            assert torch.equal(hidden(model), alone[k])
    assert fingerprint(model) == before
    assert torch.equal(hidden(model), alone[1])


def test_the_written_out_encoder_takes_the_same_plugin(model: Any) -> None:
    plugin, twin = random_plugin(model, 2, attention_k=4), write_out(model)
    dense, real = hidden(twin), MASK.bool()
    with plugin.attached(model):
        expected = hidden(model)
    with plugin.attached(twin):
        torch.testing.assert_close(hidden(twin)[real], expected[real], rtol=0, atol=1e-5)
    assert torch.equal(hidden(twin), dense)


def test_dropout_of_merged_attention_is_that_of_the_model(model: Any) -> None:
    """Off in evaluation and on in training, whenever the plugin came."""
    with random_plugin(model, 2, attention_k=2).attached(model):
        assert torch.equal(hidden(model), hidden(model))
        model.train()
        assert not torch.equal(hidden(model), hidden(model))
        model.eval()
        assert torch.equal(hidden(model), hidden(model))


def test_switching_moves_no_weight(model: Any) -> None:
    bank = PluginBank([random_plugin(model, k, seed=k) for k in (2, 4)])
    with bank.attached(model):
        before = [(name, p.data_ptr(), p._version) for name, p in model.named_parameters()]
        for k in (4, 2, 1, 4):
            bank.select(k)
            hidden(model)
        assert [(name, p.data_ptr(), p._version) for name, p in model.named_parameters()] == before


def test_plugins_of_a_bank_are_resident_in_the_attached_model(model: Any) -> None:
    own = sum(p.numel() for p in model.parameters())
    plugins = [random_plugin(model, k) for k in (2, 4)]
    with PluginBank(plugins).attached(model):
        assert sum(p.numel() for p in model.parameters()) == own + sum(p.num_parameters() for p in plugins)
        assert {id(q) for p in plugins for q in p.parameters()} <= {id(p) for p in model.parameters()}


@pytest.mark.parametrize("copier", [copy.deepcopy, share_weights])
def test_a_copy_of_an_attached_model_is_its_own(model: Any, copier: Any) -> None:
    dense, bank = hidden(model), PluginBank([random_plugin(model, 2)])
    with bank.attached(model, k=2):
        compressed = hidden(model)
        twin = copier(model)
        assert torch.equal(hidden(twin), compressed)
        bank.select(1)
        assert torch.equal(hidden(model), dense)
        assert torch.equal(hidden(twin), compressed)
    assert torch.equal(hidden(twin), compressed)
    assert torch.equal(hidden(model), dense)
    shared = {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert len(shared) == (0 if copier is copy.deepcopy else len({p.data_ptr() for p in model.parameters()}))


def test_attaching_to_a_sharing_copy_leaves_the_original_dense(model: Any) -> None:
    dense, twin = hidden(model), share_weights(model)
    with random_plugin(model, 2).attached(twin):
        assert torch.equal(hidden(model), dense)
        assert not torch.equal(hidden(twin), dense)
    assert torch.equal(hidden(twin), dense)


def test_a_second_bank_on_one_model_is_refused_and_the_first_goes_on(model: Any) -> None:
    before, first = fingerprint(model), PluginBank([random_plugin(model, 2)])
    with first.attached(model, k=2):
        compressed = hidden(model)
        with pytest.raises(PluginError, match="another bank is attached"), random_plugin(model, 4).attached(model):
            pass
        with pytest.raises(PluginError, match="attached already"), first.attached(model):
            pass
        assert torch.equal(hidden(model), compressed)
    assert fingerprint(model) == before


def test_one_bank_on_two_models_is_refused(model: Any) -> None:
    other, bank = tiny_model("t5", seed=5), PluginBank([random_plugin(model, 2)])
    before = fingerprint(other)
    with bank.attached(model), pytest.raises(PluginError, match="attached already"):
        bank.attach(other)
    assert fingerprint(other) == before


def test_detaching_twice_is_refused_and_leaves_a_later_bank_in_place(model: Any) -> None:
    first, second = PluginBank([random_plugin(model, 2)]), PluginBank([random_plugin(model, 4)])
    stale = first.attach(model)
    first.detach(stale)
    with second.attached(model, k=4):
        compressed = hidden(model)
        with pytest.raises(PluginError, match="nothing to detach"):
            first.detach(stale)
        assert torch.equal(hidden(model), compressed)


def test_selecting_wrongly_says_what_there_is(model: Any) -> None:
    bank = PluginBank([random_plugin(model, 2), random_plugin(model, 4)])
    with pytest.raises(PluginError, match="attached to no model"):
        bank.select(2)
    with bank.attached(model), pytest.raises(PluginError, match=r"k=3.*holds k = 1, 2, 4"):
        bank.select(3)
    before = fingerprint(model)
    with pytest.raises(PluginError, match="k=8"), bank.attached(model, k=8):
        pass
    assert fingerprint(model) == before


def test_two_plugins_of_one_k_are_refused(model: Any) -> None:
    with pytest.raises(PluginError, match="k=2"):
        PluginBank([random_plugin(model, 2), random_plugin(model, 2, seed=9)])


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("t5", {"num_layers": 3}, "encoder layers 2 and not 3"),
        ("t5", {"d_model": 16}, "width 32 and not 16"),
        ("t5", {"d_ff": 48}, "FFN width 64 and not 48"),
        ("t5", {"vocab_size": 300}, "vocabulary 264 and not 300"),
        ("bert", {}, "family t5 and not bert"),
    ],
)
def test_a_plugin_for_another_backbone_is_refused(family: Family, changes: dict[str, int], said: str) -> None:
    plugin, model = random_plugin(tiny_model("t5"), 2), tiny_model(family, **changes)
    before = fingerprint(model)
    with pytest.raises(PluginError, match=f"does not fit this model.*{said}"), plugin.attached(model):
        pass
    assert fingerprint(model) == before


def test_t5_generates_with_a_plugin() -> None:
    model = tiny_model("t5")
    with random_plugin(model, 2).attached(model), torch.no_grad():
        encoder = model.encoder(input_ids=IDS, attention_mask=MASK)
        cached = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=5, do_sample=False)
        given = model.generate(encoder_outputs=encoder, attention_mask=MASK, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, given)
