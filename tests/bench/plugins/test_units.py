"""Training in units: the same function, the same weights afterwards, and steps of one size in units of the channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.plugins.fit import scaled_bottleneck
from bench.plugins.plugin import Plugin
from bench.plugins.units import Units, in_units, plugin_scales, scaled, spread, weighted_spread
from tests.checkpoints import encode_hidden, random_plugin, tiny_model, tokens

D, K = 32, 2


def some_units(layers: int) -> list[Units]:
    generator = torch.Generator().manual_seed(3)
    return [Units(*(10 ** (4 * torch.rand(D, generator=generator) - 2) for _ in range(3))) for _ in range(layers)]


def weights(plugin: Plugin) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in plugin.state_dict().items()}


@pytest.mark.parametrize("twin", [{}, {"compression": "conv"}, {"decompression": "copy"}, {"attention_k": 2}], ids=str)
def test_what_is_computed_and_stored_stays_the_same(twin: dict[str, Any]) -> None:
    model = tiny_model("t5")
    plugin = random_plugin(model, K, **twin)
    before, batch = weights(plugin), {"input_ids": tokens(3, 9)}
    with torch.no_grad(), plugin.attached(model):
        expected = encode_hidden(model, **batch)
        with in_units(plugin_scales(plugin, some_units(2))):
            torch.testing.assert_close(encode_hidden(model, **batch), expected, rtol=1e-4, atol=1e-4)
    after = weights(plugin)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=0)


def test_a_step_of_adam_is_one_unit_of_each_channel() -> None:
    """Whose first step is the learning rate for every entry, whatever its gradient."""
    model, lr, units = tiny_model("t5"), 1e-3, some_units(2)
    plugin = random_plugin(model, K)
    before = weights(plugin)
    with in_units(plugin_scales(plugin, units)), plugin.attached(model):
        optimizer = torch.optim.Adam(plugin.parameters(), lr=lr, eps=0)
        encode_hidden(model, input_ids=tokens(4, 12)).square().sum().backward()
        optimizer.step()
    moved = {name: (weight - before[name]).abs() for name, weight in weights(plugin).items()}
    for index, unit in enumerate(units):
        steps = {
            "score.weight": (1 / unit.u).repeat(K).expand(K, -1),
            "w1_y.weight": (1 / unit.y).expand(8, -1),
            "w1_u.weight": (1 / unit.u).expand(8, -1),
            "w1_u.bias": torch.ones(8),
            "w2.weight": unit.z.unsqueeze(1).expand(-1, 8),
            "w2.bias": unit.z,
        }
        for name, step in steps.items():
            torch.testing.assert_close(moved[f"pairs.{index}.{name}"], lr * step, rtol=1e-2, atol=1e-6)


def test_weights_are_weights_again_whatever_happens() -> None:
    plugin = random_plugin(tiny_model("t5"), K)
    names = set(dict(plugin.named_parameters()))
    with pytest.raises(RuntimeError, match="lost"), in_units(plugin_scales(plugin, some_units(2))):
        raise RuntimeError("lost")
    assert set(dict(plugin.named_parameters())) == names


def test_a_channel_that_hardly_varies_is_not_blown_up() -> None:
    values = torch.randn(200, 5, dtype=torch.float64) * torch.tensor([1.0, 2.0, 1e-9, 0.0, 3.0])
    found = weighted_spread(values, torch.ones(200, 1))
    torch.testing.assert_close(found, spread(values.square().sum(0), values.sum(0), torch.tensor(200.0)))
    expected = values.std(0, correction=0)
    torch.testing.assert_close(found[[0, 1, 4]], expected[[0, 1, 4]])
    torch.testing.assert_close(found[2:4], (1e-3 * values.square().mean(0).sqrt().median()).expand(2))


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e5])
def test_no_unit_is_next_to_nothing_where_nothing_varies(size: float) -> None:
    values = torch.full((9, 4), size, dtype=torch.float64) * torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert (weighted_spread(values, torch.ones(9, 1)) >= (0.999e-3 * size or 1.0)).all()


@pytest.mark.parametrize("mean", [1.0, 50.0, 1e4])
def test_a_nearly_constant_channel_does_not_rule_a_ridge(mean: float) -> None:
    """What the others say in full stays said."""
    torch.manual_seed(0)
    x = torch.randn(4000, 12, dtype=torch.float64)
    y = x[:, 1:] @ torch.randn(11, 3, dtype=torch.float64)
    x[:, 0] = mean + 1e-4 * x[:, 0]
    x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
    w1, b1, w2, b2 = scaled_bottleneck(x.T @ x, x.T @ y, y.square().sum(0), 3)
    left = y - ((x[:, :-1] @ w1.T + b1) @ w2.T + b2)
    assert left.var() < 1e-4 * y.var()
    plain = scaled(x[:, :-1], weighted_spread(x[:, :-1], torch.ones(4000, 1)))
    assert plain[:, 1:].std(0).sub(1).abs().max() < 1e-3 and plain.abs().max() < 200


def test_a_weight_of_three_is_three_samples() -> None:
    values, weights = torch.randn(50, 4, dtype=torch.float64), torch.randint(1, 4, (50, 1)).double()
    repeated = values.repeat_interleave(weights.squeeze(1).long(), dim=0)
    torch.testing.assert_close(weighted_spread(values, weights), repeated.std(0, correction=0))
