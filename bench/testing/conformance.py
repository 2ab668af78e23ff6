"""What a method promises, as tests that any method runs on itself."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench.backbones.catalogue import spec_of
from bench.backbones.encoder import Overhead
from bench.backbones.model import TaskModel, TaskOutput
from bench.costing import check_budget, depends_on_input, measure_cost, parts_of
from bench.describe import EXAMPLES, attributes
from bench.errors import ConfigError, Unreachable
from bench.measure.flops import count, count_dispatched
from bench.methods.base import TOLERANCE, Method
from bench.registry import METHOD_GROUP, methods
from bench.tasks.spec import Kind
from bench.testing.case import KINDS, Case, Prepared, answers, elsewhere, skip_reason
from bench.testing.checkpoints import FAMILIES, Family


@dataclass
class Training:
    """What an optimiser was given, sizes of parameters by their identity, and how many steps it took."""

    parameters: dict[int, int]
    steps: int = 0


@dataclass(frozen=True)
class Made:
    """What one training left behind.

    Attributes
    ----------
    case, cache
        The cell, and a folder of artifacts that held nothing but the teacher.
    prepared, model
        What the method was given, and what it returned.
    before, after
        `_state` of the teacher.
    trainings
        One for each optimiser that took a step.
    """

    case: Case
    cache: Path
    prepared: Prepared
    model: TaskModel
    before: dict[str, str]
    after: dict[str, str]
    trainings: list[Training]


class MethodConformance:
    """Tests of one method; subclass it and name the method.

    Every test compresses random models of four layers of width 32, so that all of them take seconds.

    Attributes
    ----------
    method
        Name under which the method is registered.
    options
        Options that make it quick, such as few steps of pre-training.
    families
        Families of backbones to try; a cell that the method refuses is skipped with its reason.
    shape
        Family -> changes to the config of the tiny checkpoint, for a method that needs, say, a ReLU.
    """

    method: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    families: ClassVar[tuple[Family, ...]] = FAMILIES
    shape: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @pytest.fixture(scope="class")
    @classmethod
    def chosen(cls) -> type[Method]:
        """Return the class of the method."""
        name = cls.method
        if name not in methods():
            pytest.fail(
                f"no method '{name}' is registered in the entry-point group '{METHOD_GROUP}' of what is installed"
            )
        return methods()[name]

    @pytest.fixture(scope="class", params=FAMILIES)
    @classmethod
    def case(
        cls, request: pytest.FixtureRequest, chosen: type[Method], tmp_path_factory: pytest.TempPathFactory
    ) -> Case:
        """Return one cell on each family; it is skipped where the method refuses it."""
        family = request.param
        if family not in cls.families:
            pytest.skip(f"{family} is left out")
        base = tmp_path_factory.getbasetemp()
        # processes that test in parallel share what is made
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "conformance"
        options, shape = tuple(sorted(cls.options.items())), tuple(sorted(cls.shape.get(family, {}).items()))
        return _unless_refused(Case(folder, cls.method, family, options=options, shape=shape))

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, case: Case, tmp_path_factory: pytest.TempPathFactory) -> Made:
        """Compress a model here and now, whatever was made before."""
        return _make(case, tmp_path_factory.mktemp("fresh"))

    def test_it_says_what_it_is(self, chosen: type[Method]) -> None:
        """Name, source, one line each for the catalogue, and a description of every option."""
        assert chosen.name == self.method, f"registered as '{self.method}', but its name is '{chosen.name}'"
        assert isinstance(chosen.version, int) and chosen.version >= 1, "version is a number from 1 on"
        said = {name: getattr(chosen, name, None) for name in ("paper", "summary", "trains", "saves")}
        if "ratio" in chosen.uses:
            said["knob"] = chosen.knob
        for name, text in said.items():
            assert isinstance(text, str) and text.strip() and "\n" not in text, f"{name} is one line of text: {text!r}"
        assert chosen.uses <= {"ratio", "steps", "batch_size"}, "uses names budget fields of a run"
        silent = set(chosen.options()) - set(attributes(chosen))
        assert not silent, f"options without an entry in the docstring's Attributes: {sorted(silent)}"

    def test_its_options_build_it(self, chosen: type[Method]) -> None:
        """Every option has a default and a type, and what the identity names is plain."""
        built = chosen.from_options(chosen.options())
        assert built == chosen(), "the defaults do not build the default method"
        chosen.from_options(chosen.options() | dict(self.options))
        for name in chosen.options():
            with pytest.raises(ConfigError):  # else the option takes anything: give it a type
                chosen.from_options({name: object()})
        identity = built.identity(None)
        assert json.loads(json.dumps(identity)) == identity, "identity holds more than plain JSON"

    def test_it_plans_without_torch(self, chosen: type[Method]) -> None:
        """`bench plan` and `bench list` stay instant: nothing heavy is imported before a model is compressed."""
        code = f"""
import json, sys
from bench.backbones.catalogue import spec_of
from bench.errors import Unreachable
from bench.tasks.catalogue import TASKS
from {chosen.__module__} import {chosen.__qualname__} as chosen
chosen = chosen()
for name in ("minilm-l6", "t5-base"):
    if chosen.skip(spec_of(name), TASKS["sst2"], 4) is None:
        try:
            chosen.setting(spec_of(name), 4, {{128: 1}})
        except Unreachable:
            pass
chosen.work(10, 8), chosen.identity(None)
print(json.dumps([name for name in ("torch", "transformers", "datasets", "pandas") if name in sys.modules]))
"""
        path = os.pathsep.join(part for part in sys.path if part)
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        heavy = json.loads(done.stdout.splitlines()[-1])
        assert not heavy, f"planning imports {', '.join(heavy)}; import them inside `compress`"

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("backbone", ["bert-base-uncased", "minilm-l6", "t5-base", "flan-t5-base"])
    def test_it_refuses_a_cell_with_a_reason(self, chosen: type[Method], backbone: str, kind: Kind) -> None:
        """Whatever the ratio, a cell is refused in words, or has a setting with a cost, or is `Unreachable`."""
        spec, task = spec_of(backbone), EXAMPLES[kind]
        for ratio in (None, 0.5, 1, 2, 2.5, 4, 7, 64, 1e6):
            reason = chosen().skip(spec, task, ratio)
            assert reason is None or (isinstance(reason, str) and reason.strip()), f"skip gives {reason!r} for {ratio}"
            if reason is not None:
                continue
            assert "ratio" not in chosen.uses or ratio is not None, "a cell without a ratio is neither refused nor run"
            try:
                setting = chosen().setting(spec, ratio, {64: 2, 128: 1})
            except Unreachable as error:
                if not str(error).strip():
                    pytest.fail(f"Unreachable says nothing for {ratio}")
                continue
            assert math.isfinite(setting.remaining) and setting.remaining > 0, f"{setting} for {ratio}"
            assert json.loads(json.dumps(setting.knob)) == setting.knob, "a knob holds more than plain JSON"

    def test_it_runs_on_some_backbone(self, chosen: type[Method]) -> None:
        """A method that refuses everything passes every other test by skipping it."""
        cells = [(spec_of(name), kind) for name in ("minilm-l6", "t5-base") for kind in KINDS]
        assert any(chosen().skip(spec, EXAMPLES[kind], 4) is None for spec, kind in cells), (
            "refuses every cell at k = 4"
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_called_like_the_teacher(self, case: Case, kind: Kind) -> None:
        """Same arguments, same shapes and types: logits, hidden states where asked for, generated text."""
        case = _unless_refused(case.replace(kind=kind))
        prepared = case.prepare()
        model, teacher = _compressed(prepared), prepared.teacher.model
        inputs = prepared.inputs(prepared.examples[:5])
        expected, output = _run(teacher, inputs, hidden=True), _run(model, inputs, hidden=True)
        plain = _run(model, inputs)
        logits, wanted = output.logits, expected.logits
        assert logits.shape == wanted.shape and logits.dtype == wanted.dtype, (
            f"logits are {logits.dtype} {tuple(logits.shape)}, the teacher's {wanted.dtype} {tuple(wanted.shape)}"
        )
        assert torch.isfinite(logits).all(), "logits are not finite"
        _same(plain.logits, logits, "hidden=True changes the logits")
        assert output.encoder_hidden, "hidden=True gives no encoder_hidden"
        shapes = {tuple(h.shape) for h in output.encoder_hidden}
        assert shapes == {tuple(expected.encoder_hidden[0].shape)}, (
            f"encoder_hidden is {shapes}: each state has the input's full length, where vectors were removed too"
        )
        assert not plain.encoder_hidden and plain.decoder_hidden is None, "hidden states that nobody asked for"
        if expected.decoder_hidden is not None:
            assert output.decoder_hidden is not None, "hidden=True gives no decoder_hidden"
            assert output.decoder_hidden.shape == expected.decoder_hidden.shape
        # an input without padding may come without a mask
        alone = prepared.inputs(prepared.examples[:1])
        bare = {name: tensor for name, tensor in alone.items() if name != "attention_mask"}
        _same(_run(model, bare).logits, _run(model, alone).logits, "a mask of ones is not the same as no mask")
        if kind == "qa" and case.family == "t5":
            texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            generated: Any = model
            tokens = generated.generate(**texts, max_new_tokens=4)
            assert tokens.dtype == torch.long and tokens.shape[0] == 5 and tokens.shape[1] <= 5, "generate gives ids"

    @pytest.mark.parametrize("ratio", [2, 4])
    def test_it_costs_what_the_ratio_asks_for(self, case: Case, made: Made, ratio: int) -> None:
        """FLOPs that were executed: within 2 % of the budget or with a note, and what the setting says.

        Work that is masked and done all the same is counted, since it was done.
        """
        if ratio != made.case.ratio:
            prepared = _unless_refused(case.replace(ratio=ratio)).prepare()
            model = _compressed(prepared)
        else:
            prepared, model = made.prepared, made.model
        ctx, setting = prepared.ctx, prepared.ctx.setting
        cost = measure_cost(model, prepared.teacher, ctx)
        check_budget(cost, ctx)
        slack = TOLERANCE if depends_on_input(model) else 1e-6
        assert cost.achieved_remaining == pytest.approx(setting.remaining, rel=slack), (
            f"{cost.achieved_remaining:.3%} of the encoder's FLOPs are executed, {setting.remaining:.3%} by the setting"
        )
        assert json.loads(json.dumps(setting.knob)) == setting.knob, "a knob holds more than plain JSON"
        batch, parts = prepared.inputs(prepared.examples[:8]), parts_of(model)
        traced, dispatched = count(model, batch, parts), count_dispatched(model, batch, parts)
        assert traced == dispatched, f"a padded batch is {traced} to one counter and {dispatched} to the other"

    def test_the_teacher_is_untouched(self, made: Made) -> None:
        """Weights, buffers, modes, gradients, hooks and modules of the teacher are what they were."""
        changed = [
            f"{name}: {made.before.get(name, 'not there')} -> {made.after.get(name, 'gone')}"
            for name in dict.fromkeys([*made.before, *made.after])
            if made.before.get(name) != made.after.get(name)
        ]
        assert not changed, "compress changed the teacher, which other methods share:\n" + "\n".join(changed[:10])

    def test_no_gradients_are_left(self, made: Made) -> None:
        """The returned model is for inference: nothing in it asks for gradients."""
        asking = [name for name, parameter in made.model.named_parameters() if parameter.requires_grad]
        assert not asking, f"requires_grad is still set on {len(asking)} parameters such as {asking[0]}"

    def test_it_trains_what_it_says(self, made: Made) -> None:
        """``trained_parameters`` is what an optimiser was given, and no optimiser was given the teacher's weights."""
        trained, given = made.prepared.ctx.trained_parameters, [sum(t.parameters.values()) for t in made.trainings]
        assert not given or trained in given, f"trained_parameters is {trained:,}; optimisers were given {given}"
        own = {id(p) for p in made.prepared.teacher.model.parameters()}
        assert not any(own & set(t.parameters) for t in made.trainings), "the teacher's own weights are trained"

    def test_it_trains_as_long_as_it_says(self, made: Made) -> None:
        """What was taken, planned and recorded are the run's steps, beside what ``work`` says that tasks share."""
        if not made.trainings:
            pytest.skip(f"{self.method} trains nothing")
        ctx = made.prepared.ctx
        work = ctx.config.build_method().work(ctx.config.steps, ctx.config.batch_size)
        taken, planned = sum(t.steps for t in made.trainings), sum(w.steps for w in work)
        recorded = sum(stage.steps for stage in ctx.stages if stage.name != "teacher")
        assert taken == planned == recorded, f"{taken} steps taken, {planned} in `work`, {recorded} in the result"
        own = taken - sum(w.steps for w in work if w.shared)
        assert own == ctx.config.steps, f"{own} steps on the task, where the run has {ctx.config.steps}"

    def test_a_frozen_backbone_is_the_teachers_own(self, chosen: type[Method], made: Made) -> None:
        """With ``frozen``, whatever is not the teacher's very tensor belongs to the method."""
        if not chosen.frozen:
            pytest.skip(f"{self.method} has weights of its own")
        own = {id(p) for p in made.prepared.teacher.model.parameters()}
        added = [m for m in made.model.modules() if isinstance(m, Overhead)]
        inside = {id(p) for module in added for p in module.parameters()}
        inside -= {id(p) for module in added for part in module.backbone_modules() for p in part.parameters()}
        stray = [name for name, p in made.model.named_parameters() if id(p) not in own | inside]
        assert not stray, (
            f"frozen, yet {len(stray)} parameters of the backbone such as {stray[0]} are not the teacher's"
        )

    def test_what_it_adds_is_stored(self, made: Made) -> None:
        """A model with weights that the teacher lacks needs bytes on disk, and the result says how many."""
        own = {id(p) for p in made.prepared.teacher.model.parameters()}
        added = [name for name, p in made.model.named_parameters() if id(p) not in own]
        stored = made.prepared.ctx.bytes_added
        assert stored >= 0 and (stored or not added), f"bytes_added is {stored} with weights of its own, as {added[:1]}"

    def test_an_answer_does_not_depend_on_its_batch(self, chosen: type[Method], made: Made) -> None:
        """An example alone, padded to any length, and among 31 others has the same logits."""
        if not chosen.batch_invariant:
            pytest.skip(f"{self.method} says that its answers depend on the batch")
        prepared, model = made.prepared, made.model
        together = prepared.answers(model)
        for i, feature in enumerate(prepared.examples[:6]):
            for longer in (0, 1, 30):
                alone = _run(model, prepared.inputs([feature], longer)).logits[0]
                apart = f"example {i} of {len(feature['input_ids'])} tokens answers otherwise with {longer} of padding"
                _same(alone, together[i], apart)

    def test_it_answers_twice_the_same(self, made: Made) -> None:
        """Nothing is drawn at evaluation."""
        first, again = (made.prepared.answers(made.model, seed) for seed in (1, 2))
        _same(again, first, "the same input is answered otherwise a second time", 1e-6)

    def test_it_comes_back_from_the_cache(self, made: Made) -> None:
        """A second run of the same config trains nothing and has the same model, setting and cost."""
        again = made.case.prepare(made.cache)
        with _trainings() as trainings:
            model = again.compress()
        assert not trainings, "a second run trains again: keep what is trained in ctx.cache"
        same = again.answers(model), made.prepared.answers(made.model)
        _same(*same, "a second run answers otherwise than the first")
        left = [
            (
                p.ctx.setting,
                p.ctx.bytes_added,
                p.ctx.trained_parameters,
                [s.name for s in p.ctx.stages if s.name != "teacher"],
            )
            for p in (made.prepared, again)
        ]
        assert left[0] == left[1], f"a second run says otherwise of itself: {left[1]}, the first {left[0]}"

    def test_another_process_reads_the_same(self, made: Made) -> None:
        """What was stored is all that the model needs."""
        theirs = torch.from_numpy(elsewhere(answers, made.case, made.cache))
        ours = made.prepared.answers(made.model)
        _same(theirs, ours, "another process answers otherwise")

    def test_a_seed_decides_all(self, made: Made, tmp_path: Path) -> None:
        """A training under the same seed in another process gives the same model."""
        _with_teacher(made.prepared, tmp_path)
        theirs = torch.from_numpy(elsewhere(answers, made.case, tmp_path))
        ours = made.prepared.answers(made.model)
        _same(theirs, ours, "the same seed gives another model")

    def test_another_seed_gives_another_model(self, made: Made) -> None:
        """A method that trains draws something from the seed: order of the data, new weights, dropout."""
        if not made.trainings:
            pytest.skip(f"{self.method} trains nothing")
        other = made.case.replace(seed=1).prepare(teacher=made.prepared.teacher)
        theirs, ours = other.answers(_compressed(other)), made.prepared.answers(made.model)
        assert not torch.equal(theirs, ours), "seeds 0 and 1 give the same model: what is drawn ignores the run's seed"

    def test_it_runs_without_steps(self, case: Case) -> None:
        """``steps=0`` compresses without training on the task."""
        prepared = case.replace(steps=0).prepare()
        logits = prepared.answers(_compressed(prepared))
        assert torch.isfinite(logits).all(), "logits are not finite"


def _unless_refused(case: Case) -> Case:
    if reason := skip_reason(case):
        pytest.skip(reason)
    return case


def _compressed(prepared: Prepared) -> TaskModel:
    try:
        return prepared.compress()
    except Unreachable as error:
        pytest.skip(str(error))


def _run(model: TaskModel, inputs: Mapping[str, Tensor], **how: bool) -> TaskOutput:
    torch.manual_seed(0)
    with torch.inference_mode():
        output: TaskOutput = model(**inputs, **how)
    return output


def _make(case: Case, cache: Path) -> Made:
    _with_teacher(case.prepare(), cache)
    prepared = case.prepare(cache)
    # transformers puts hooks of its own into a model that is first asked for hidden states
    prepared.teacher.model(**prepared.inputs(prepared.examples[:1]), hidden=True)
    before = _state(prepared.teacher.model)
    # whoever draws from a global generator without seeding it draws something else each time
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(int.from_bytes(os.urandom(4)))
    with _trainings() as trainings:
        model = _compressed(prepared)
    prepared.answers(model)
    return Made(case, cache, prepared, model, before, _state(prepared.teacher.model), trainings)


def _with_teacher(prepared: Prepared, cache: Path) -> None:
    """Put the teacher, which is dear, and nothing else into a cache."""
    artifact = prepared.teacher.artifact
    shutil.copytree(artifact.folder, cache / artifact.key)


@contextmanager
def _trainings() -> Iterator[list[Training]]:
    """Note every optimiser that takes a step inside the block."""
    found: dict[torch.optim.Optimizer, Training] = {}
    trainings: list[Training] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer not in found:
            found[optimizer] = Training({id(p): p.numel() for g in optimizer.param_groups for p in g["params"]})
            trainings.append(found[optimizer])
        found[optimizer].steps += 1

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield trainings
    finally:
        handle.remove()


def _state(model: nn.Module) -> dict[str, str]:
    """Say of every tensor and module what must not change."""
    state = {}
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            gradient = "with" if tensor.grad is not None else "without"
            state[f"{kind} {name}"] = (
                f"{_hash(tensor)}, requires_grad={tensor.requires_grad}, {gradient} a gradient, at {id(tensor)}"
            )
    for name, module in model.named_modules():
        hooks = sum(len(getattr(module, kind)) for kind in _HOOKS)
        state[f"module {name}"] = f"{type(module).__name__}, training={module.training}, {hooks} hooks"
    return state


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hash(tensor: Tensor) -> str:
    import hashlib

    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:12]


def _same(actual: Tensor, expected: Tensor, otherwise: str, tolerance: float = 1e-5) -> None:
    """Fail, saying first what the contract says, where answers differ by more than rounding."""
    message: Any = lambda found: f"{otherwise}\n{found}"  # noqa: E731
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=message)
