"""int8: how near it comes, that its products are of whole numbers, what is stored, and what it is counted as."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.backbones.model import TaskModel
from bench.backbones.sites import digest
from bench.cell import Surroundings
from bench.context import RunContext
from bench.costing import check_budget, measure_cost, parts_of
from bench.errors import MachineError
from bench.measure.flops import count, count_dispatched
from bench.measure.memory import peak_bytes
from bench.methods.int8_linear import Int8Linear, to_int8
from bench.methods.quantization import Quantization
from bench.results import ResultStore
from bench.runner import run
from bench.tasks.data import load_task
from bench.training.student import WEIGHTS_FILE
from bench.training.teacher import get_teacher
from tests.checkpoints import FAMILIES, Family, context, quick_config, task_file, tiny_checkpoint, tokens

INPUTS = {"input_ids": tokens(3, 9)}
# 2 layers of width 32 with an FFN of 64; T5's decoder attends twice in each of its 2 layers, without biases
MATRICES = {"bert": 2 * (4 * 32 * 32 + 2 * 32 * 64), "t5": 2 * (4 * 32 * 32 + 4096) + 2 * (8 * 32 * 32 + 4096)}
ROWS = {"bert": 2 * (4 * 32 + 64 + 32), "t5": 2 * (4 * 32 + 96) + 2 * (8 * 32 + 96)}


class World:
    """A task, a checkpoint, and its teacher."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.task = folder, task_file(folder / "task")
        self.backbone = tiny_checkpoint(folder / "tiny", family)
        self.teacher = get_teacher(self.context())

    def context(self, cache: str = "cache", **values: Any) -> RunContext:
        config = quick_config(self.task, self.backbone, **{"method": "quantization", **values})
        return context(config, self.folder / cache)

    def compress(self, ctx: RunContext) -> TaskModel:
        chosen = Quantization()
        ctx.setting = chosen.setting(ctx.spec, ctx.config.ratio, ctx.lengths("selection"))
        return chosen.compress(self.teacher, load_task(ctx.task), ctx)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("quantization"), request.param)


class _Dtypes(TorchDispatchMode):
    """Notes the operands of every product."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "mm" in name:
            self.products.append((name, args[-1].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_by_hand(bias: bool) -> None:
    """Two tokens and two outputs, every step and whole number written out."""
    linear = nn.Linear(2, 2, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[127.0, -1.0], [0.5, 0.26]]))
        if bias:
            linear.bias.copy_(torch.tensor([10.0, 20.0]))
    quantised = Int8Linear(linear)
    # row 0 has steps of 1; row 1 of 0.5/127, in which 0.26 is 66.04
    assert quantised.weight.tolist() == [[127, -1], [127, 66]] and quantised.weight.dtype == torch.int8
    assert quantised.step.tolist() == pytest.approx([1, 0.5 / 127])
    # token 0 has steps of 2, in which 3.1 is 1.55; token 1 of 1/127, in which 0.3 is 38.1
    x = torch.tensor([[-254.0, 3.1], [1.0, 0.3]])
    whole = torch.tensor([[-127 * 127 - 2, -127 * 127 + 2 * 66], [127 * 127 - 38, 127 * 127 + 38 * 66]])
    expected = whole * torch.tensor([[2.0], [1 / 127]]) * torch.tensor([1, 0.5 / 127])
    torch.testing.assert_close(quantised(x), expected + (linear.bias if bias else 0))


def test_rounding_is_off_by_half_a_step_at_most() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    quantised = Int8Linear(linear)
    weight = quantised.weight * quantised.step[:, None]
    assert ((weight - linear.weight).abs() <= linear.weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    # |sum of products of the errors| by the triangle inequality, token by token however large each token is
    x = torch.randn(5, 7, 64) * torch.logspace(-6, 6, 7)[:, None]
    step_x, step_w = x.abs().amax(-1, keepdim=True) / 127, linear.weight.abs().amax(1) / 127
    bound = (step_x * linear.weight.abs().sum(1) + x.abs().sum(-1, keepdim=True) * step_w + 32 * step_x * step_w) / 2
    wanted = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    error = (quantised(x) - wanted).abs()
    assert (error <= bound * 1.001).all() and (error > 0).any()


def test_zeros_and_nothing_at_all() -> None:
    linear = nn.Linear(6, 5)
    with torch.no_grad():
        linear.weight[1] = 0
    quantised = Int8Linear(linear)
    assert torch.equal(quantised(torch.zeros(2, 6)), linear.bias.expand(2, 5))
    assert torch.equal(quantised(torch.randn(3, 6))[:, 1], linear.bias[1].expand(3))
    assert quantised(torch.zeros(0, 4, 6)).shape == (0, 4, 5)
    x = torch.ones(2, 6)
    x[1, 0] = torch.nan
    assert quantised(x).isnan().tolist() == [[False] * 5, [True] * 5], "a diverged token must show"


def test_a_token_is_rounded_by_its_own_step() -> None:
    """Whatever stands beside it, however large, it comes out to the bit the same."""
    torch.manual_seed(0)
    quantised = Int8Linear(nn.Linear(16, 16))
    x = torch.randn(4, 16)
    beside = torch.cat((x, 1e4 * torch.randn(3, 16)))
    assert torch.equal(quantised(beside)[:4], quantised(x))


def test_only_linear_maps_are_replaced() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.LayerNorm(4)}))
    to_int8(model)
    assert [type(m) for m in model.modules()][1:] == [nn.Embedding, nn.ModuleDict, Int8Linear, nn.LayerNorm]


def test_every_product_of_a_matrix_in_the_layers_is_of_whole_numbers(world: World) -> None:
    """What is left in floats are attention's own products and the head."""
    model = world.compress(world.context())
    with torch.no_grad(), _Dtypes() as seen:
        model(**INPUTS)
    whole = [dtype for name, dtype in seen.products if name == "_int_mm"]
    assert whole == [torch.int8] * (2 * 6 if world.teacher.model.config.model_type == "bert" else 2 * 6 + 2 * 10)
    floats = [name for name, _ in seen.products if name in ("mm", "addmm")]
    assert len(floats) == (2 if world.teacher.model.config.model_type == "bert" else 1)


def test_it_answers_nearly_as_the_teacher(world: World) -> None:
    model, before = world.compress(world.context()), digest(world.teacher.model)
    with torch.no_grad():
        own, dense = (m(**INPUTS, hidden=True) for m in (model, world.teacher.model))
    pairs = zip((*own.encoder_hidden, own.logits), (*dense.encoder_hidden, dense.logits), strict=True)
    errors = [((a - b).norm() / (b - b.mean()).norm()).item() for a, b in pairs]
    assert 1e-4 < max(errors) < 0.05, errors
    assert digest(world.teacher.model) == before
    assert not any(isinstance(m, Int8Linear) for m in world.teacher.model.modules())


def test_what_it_stores_and_how_large_it_is(world: World) -> None:
    """Per matrix a byte a weight and four a row; everything else is the teacher's very tensor."""
    ctx = world.context()
    model = world.compress(ctx)
    family = ctx.spec.family
    stored = load_file(ctx.cache.root / ctx.cache.key("student", ctx.identity) / WEIGHTS_FILE)
    assert sum(t.numel() for t in stored.values() if t.dtype == torch.int8) == MATRICES[family]
    assert sum(t.numel() for t in stored.values() if t.dtype == torch.float32) == ROWS[family]
    assert 0 < ctx.bytes_added - MATRICES[family] - 4 * ROWS[family] < 150 * len(stored), "a header beside it"
    own = {id(p) for p in world.teacher.model.parameters()}
    kept = {n for n, p in model.named_parameters() if id(p) in own}
    assert {n for n, _ in model.named_parameters()} - kept == set(stored)
    cost = measure_cost(model, world.teacher, ctx)
    assert cost.parameters_total == cost.parameters_teacher + ROWS[family]
    assert cost.parameters_added == MATRICES[family] + ROWS[family] and cost.parameters_trained == 0
    assert cost.bytes_total == 4 * cost.parameters_teacher - 3 * MATRICES[family] + 4 * ROWS[family]
    dense = measure_cost(world.teacher.model, world.teacher, ctx)
    assert dense.bytes_total == 4 * dense.parameters_teacher


def test_no_flop_is_saved_and_both_counters_say_so(world: World) -> None:
    ctx = world.context()
    model = world.compress(ctx)
    cost = measure_cost(model, world.teacher, ctx)
    assert cost.real.compressed == cost.real.dense and cost.padded.compressed == cost.padded.dense
    assert cost.achieved_remaining == ctx.setting.remaining == 1 and cost.requested_remaining is None
    assert cost.real.compressed.overhead == 0
    check_budget(cost, ctx)
    assert not ctx.notes
    flops = count(model, INPUTS, parts_of(model))
    assert flops == count_dispatched(world.teacher.model, INPUTS, parts_of(world.teacher.model))
    assert 0 < peak_bytes(model, INPUTS) < 3 * peak_bytes(world.teacher.model, INPUTS)


def test_a_second_run_finds_it_and_a_run_without_finds_the_same(world: World) -> None:
    answers = [world.compress(world.context(cache=name))(**INPUTS).logits for name in ("one", "one", "two")]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_padding_is_no_part_of_an_answer(world: World) -> None:
    """But for roundings that a last bit decides, which are rare enough to find none in most of these."""
    model = world.compress(world.context())
    ids = tokens(16, 7, seed=3)
    padded = torch.cat((ids, torch.zeros(16, 6, dtype=torch.long)), 1)
    mask = (torch.arange(13) < 7).long().expand(16, 13)
    with torch.no_grad():
        differences = (model(padded, attention_mask=mask).logits - model(ids).logits).abs().amax(-1)
    assert differences.median() < 1e-5 and differences.max() < 0.05


def test_it_is_for_the_cpu(world: World) -> None:
    """Not for good: the run is neither failed nor skipped, and can be had on this machine another time."""
    ctx = world.context()
    ctx.device = torch.device("cuda")
    with pytest.raises(MachineError, match="--device cpu"):
        world.compress(ctx)


def test_no_budget_is_part_of_it(world: World) -> None:
    """So that a sweep over ratios holds it once."""
    configs = [world.context(ratio=ratio, steps=steps).config for ratio, steps in ((2, 5), (8, 6), (None, 7))]
    assert len({str(config.identity("d", "m")) for config in configs}) == 1
    assert Quantization().work(5, 5) == [] and not Quantization.batch_invariant


@pytest.mark.parametrize("family", FAMILIES)
def test_it_answers_questions(family: Family, tmp_path: Path) -> None:
    kind = {"kind": "qa", "labels": None, "label": "answer", "text_pair": "text", "text": "other",
            "prompt": '"{text} {text_pair}"'}  # fmt: skip
    task, backbone = (
        task_file(tmp_path / "task", examples=20, **cast(Any, kind)),
        tiny_checkpoint(tmp_path / "m", family),
    )
    config = quick_config(task, backbone, method="quantization")
    result = run(config, ResultStore(tmp_path, "s"), Surroundings(cache_dir=tmp_path / "cache"))
    assert result.status == "done", result.traceback
    assert result.knob == {"bits": 8} and result.cost is not None and result.cost.achieved_remaining == 1
