"""Hard-concrete gates follow their closed forms, and a gated encoder is the smaller one that they are folded into."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit, logit
from scipy.stats import logistic
from torch import Tensor, nn

from bench.backbones.surgery import Structure, cut
from bench.backbones.write_out import write_out, written_encoder
from bench.methods.budget import UnitCosts
from bench.methods.hard_concrete import Gates, HardConcrete, Multipliers
from bench.training.loop import Group, Schedule, train
from tests.checkpoints import tiny_model, tokens

SHAPES = [("bert", {}), ("t5", {}), ("t5", {"feed_forward_proj": "gated-gelu"})]
LOG_ALPHAS = (-4.0, -1.6, -0.5, 0.0, 1.0, 2.5, 5.0)
DRAWS = 200_000


def quantile(u: float, log_alpha: float) -> float:
    """Louizos et al. with beta = 2/3, gamma = -0.1, zeta = 1.1."""
    s = expit((logit(u) + log_alpha) / (2 / 3))
    return float(np.clip(s * 1.2 - 0.1, 0, 1))


def mean(log_alpha: float) -> float:
    # the two places where the integrand has a corner
    corners = [expit((2 / 3) * logit(s) - log_alpha) for s in (1 / 12, 11 / 12)]
    value: float = quad(quantile, 0, 1, args=(log_alpha,), points=corners, limit=200)[0]
    return value


def open_probability(log_alpha: Any) -> Any:
    """Logistic noise lifts the sample above 0 where s is above 1/12."""
    return logistic.sf((2 / 3) * logit(1 / 12) - np.asarray(log_alpha))


def gate(log_alpha: float, count: int = 1) -> HardConcrete:
    return HardConcrete((count,), log_alpha)


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_samples_follow_the_closed_forms(log_alpha: float) -> None:
    torch.manual_seed(0)
    gates = gate(log_alpha, DRAWS)
    z = gates()
    assert z.min() >= 0 and z.max() <= 1
    p = gates.log_open()[0].exp().item()
    assert p == pytest.approx(open_probability(log_alpha), rel=1e-5)
    assert (z > 0).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / DRAWS) ** 0.5)
    assert z.mean().item() == pytest.approx(mean(log_alpha), abs=5 * z.std().item() / DRAWS**0.5)


@pytest.mark.parametrize("log_alpha", LOG_ALPHAS)
def test_gradients_follow_the_closed_forms(log_alpha: float) -> None:
    torch.manual_seed(1)
    gates = gate(log_alpha, DRAWS)
    (pathwise,) = torch.autograd.grad(gates().sum(), gates.log_alpha)
    slope = (mean(log_alpha + 1e-3) - mean(log_alpha - 1e-3)) / 2e-3
    assert pathwise.mean().item() == pytest.approx(slope, abs=5 * pathwise.std().item() / DRAWS**0.5 + 1e-4)
    (analytic,) = torch.autograd.grad(gates.log_open().exp().sum(), gates.log_alpha)
    p = open_probability(log_alpha)
    assert analytic[0].item() == pytest.approx(p * (1 - p), rel=1e-4)


def test_in_evaluation_a_gate_is_a_number() -> None:
    gates = HardConcrete((5,), 0.0).eval()
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor([0.0, logit(11 / 12) + 1e-3, logit(1 / 12) - 1e-3, -60.0, 60.0]))
    assert torch.equal(gates(), gates())
    torch.testing.assert_close(gates(), torch.tensor([0.5, 1.0, 0.0, 0.0, 1.0]))
    assert gates.log_open().isfinite().all()


def test_at_the_start_all_is_open() -> None:
    gates = Gates(2, 4, 64).eval()
    assert all(torch.equal(factor, torch.ones_like(factor)) for factor in gates())
    assert gates.expected_remaining(UnitCosts(head=16, neuron=1, layer=128, layers=2)).item() > 0.95


def random_gates(layers: int, heads: int, neurons: int, seed: int = 0) -> Gates:
    """Return gates of which some are 0, some 1, and some between, in evaluation."""
    generator = torch.Generator().manual_seed(seed)
    gates = Gates(layers, heads, neurons).eval()
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 3)
    return gates


def test_expected_flops_are_those_of_all_outcomes() -> None:
    """Every way in which two layers of two heads and one neuron can be open, weighted by its probability."""
    costs = UnitCosts(head=7, neuron=3, layer=17, layers=2)
    gates = random_gates(2, 2, 1)
    expected = 0.0
    for layer in range(2):
        p = [*gates.heads.log_alpha[layer], *gates.neurons.log_alpha[layer], *gates.sublayers.log_alpha[layer]]
        p = [float(open_probability(x.item())) for x in p]
        for outcome in itertools.product((0, 1), repeat=5):
            first, second, neuron, attention, ffn = outcome
            macs = 7 * attention * (first + second) + 3 * ffn * neuron
            expected += macs * np.prod([q if o else 1 - q for q, o in zip(p, outcome, strict=True)]) / 34
    assert gates.expected_remaining(costs).item() == pytest.approx(expected, rel=1e-5)


def test_expected_flops_are_the_mean_of_drawn_ones() -> None:
    costs, draws = UnitCosts(head=16, neuron=1, layer=128, layers=3), 4000
    gates = random_gates(3, 4, 64).train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [costs.remaining(*(int((factor > 0).sum()) for factor in gates())) for _ in range(draws)]
        expected = gates.expected_remaining(costs).item()
    assert np.mean(drawn) == pytest.approx(expected, abs=5 * float(np.std(drawn)) / draws**0.5)


def written(family: Any, changes: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    depth = {"num_hidden_layers": 4} if family == "bert" else {"num_layers": 4}
    inputs = {"input_ids": tokens(3, 9), "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8])}
    if family == "t5":
        inputs["decoder_input_ids"] = tokens(3, 4, seed=1)
    return write_out(tiny_model(family, **changes, **depth)), inputs


def open_units(gates: Gates) -> Structure:
    heads, neurons = (
        tuple(tuple(np.flatnonzero(layer.detach().numpy()).tolist()) for layer in factor) for factor in gates()
    )
    return Structure(tuple(range(len(heads))), heads, neurons)


@pytest.mark.parametrize(("family", "changes"), SHAPES)
@torch.no_grad()
def test_the_smaller_model_is_the_gated_one(family: str, changes: dict[str, Any]) -> None:
    """With a layer whose attention is shut, one whose FFN is, and one that is shut altogether."""
    model, inputs = written(family, changes)
    encoder, gates = written_encoder(model), random_gates(4, 4, 64)
    gates.sublayers.log_alpha.copy_(torch.tensor([[1.0, 5.0], [-5.0, 0.5], [5.0, -5.0], [-5.0, -5.0]]))
    gates.heads.log_alpha[0].copy_(torch.tensor([-9.0, 0.3, 9.0, -9.0]))
    dense = model(**inputs).logits
    with gates.on(encoder):
        gated = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, gated)
    assert torch.equal(model(**inputs).logits, dense) and not torch.allclose(gated, dense, atol=1e-2)
    structure = open_units(gates)
    assert structure.heads[0] == (1, 2) and not structure.heads[1] and not structure.neurons[2]
    assert not structure.heads[3] and not structure.neurons[3] and 0 < len(structure.neurons[0]) < 64
    small, _ = written(family, changes)
    gates.fold(written_encoder(small))
    cut(written_encoder(small), structure)
    torch.testing.assert_close(small(**inputs).logits, gated, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_each_pass_draws_anew_from_torch_s_generator() -> None:
    model, inputs = written("bert", {})
    gates = random_gates(4, 4, 64).train()
    with gates.on(written_encoder(model)):
        answers = []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            answers.append(model(**inputs).logits)
    assert torch.equal(answers[0], answers[2]) and not torch.allclose(answers[0], answers[1], atol=1e-3)


def test_multipliers_ascend() -> None:
    multipliers = Multipliers()
    with torch.no_grad():
        multipliers.values.copy_(torch.tensor([2.0, 5.0]))
    gap = torch.tensor(-0.3, requires_grad=True)
    loss = multipliers(gap)
    loss.backward()
    assert loss.item() == pytest.approx(2 * -0.3 + 5 * 0.09)
    assert gap.grad is not None and gap.grad.item() == pytest.approx(2 + 2 * 5 * -0.3)
    assert multipliers.values.grad is not None
    torch.testing.assert_close(multipliers.values.grad, torch.tensor([0.3, -0.09]))


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_the_constraint_is_met_and_what_matters_stays_open(target: float) -> None:
    """Half of the units pull the loss towards being open; the others do not care."""
    costs = UnitCosts(head=16, neuron=1, layer=128, layers=3)
    gates, multipliers = Gates(3, 4, 64).train(), Multipliers()
    worth = torch.linspace(0, 1, 64)

    def losses(step: int) -> tuple[Tensor, dict[str, float]]:
        heads, neurons = gates()
        loss = ((1 - neurons) * worth).mean() + (1 - heads).mean()
        aim = max(target, 1 - (1 - target) * step / 75)
        return loss + multipliers(gates.expected_remaining(costs) - aim), {}

    idle = nn.Parameter(torch.zeros(1))
    groups = [
        Group([idle]),
        Group(list(gates.parameters()), lr_scale=3000.0, weight_decay=0.0),
        Group(list(multipliers.parameters()), lr_scale=300.0, weight_decay=0.0),
    ]
    train(losses, groups, Schedule(150, lr=1e-4, precision="fp32"), seed=0, device=torch.device("cpu"))
    assert gates.expected_remaining(costs).item() == pytest.approx(target, abs=0.03)
    opened = gates.neurons.log_open().detach().mean(0)
    assert opened[48:].mean() > opened[:16].mean() + 0.5
