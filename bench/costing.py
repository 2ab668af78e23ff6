"""What a model costs, measured on the very module that was run, against the teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.backbones.encoder import Overhead
from bench.backbones.model import TaskModel
from bench.backbones.sites import EncoderView
from bench.context import RunContext, Teacher
from bench.errors import BenchError
from bench.measure.closed_form import accumulate, remaining
from bench.measure.flops import Parts, count_dispatched, count_lengths
from bench.measure.latency import interleaved
from bench.measure.memory import peak_bytes
from bench.measure.size import bytes_on_disk, count_bytes, count_parameters
from bench.methods.base import TOLERANCE
from bench.results import Cost, CostPair, Flops, Latency, Memory
from bench.tasks.evaluation import EVALUATION_BATCH_SIZE, batches
from bench.tasks.features import Feature, collate
from bench.training.stage import model_inputs
from bench.training.teacher import WEIGHTS_FILE

TIMED_BATCH_SIZES = (1, 32)
TIMED_LENGTH = 128


def parts_of(model: TaskModel) -> Parts:
    """Say which submodules are encoder, decoder and a method's overhead."""
    view = EncoderView(model)
    decoder = (model.model.decoder,) if view.family == "t5" else ()
    overhead = tuple((m, m.backbone_modules()) for m in model.modules() if isinstance(m, Overhead))
    return Parts(encoder=tuple(view.modules), decoder=decoder, overhead=overhead)


def measure_cost(model: TaskModel, teacher: Teacher, ctx: RunContext) -> Cost:
    """Count FLOPs, parameters and bytes of ``model`` and of its teacher on the dev split.

    Raises
    ------
    BenchError
        If the two counters of ``bench.measure.flops`` disagree, or an op cannot be counted.
    """
    dev = ctx.features["dev"]
    real = CostPair(dense=_real(teacher.model, dev, ctx), compressed=_real(model, dev, ctx))
    padded = CostPair(dense=_padded(teacher.model, dev, ctx), compressed=_padded(model, dev, ctx))
    lengths = Counter(len(feature["input_ids"]) for feature in dev)
    ratio = ctx.config.ratio if "ratio" in ctx.config.build_method().uses else None
    own = {id(p) for p in teacher.model.parameters()}
    total = count_parameters(model.parameters())
    return Cost(
        real=real,
        padded=padded,
        batch_size=EVALUATION_BATCH_SIZE,
        requested_remaining=None if ratio is None else remaining(ctx.spec, int(ratio), lengths),
        achieved_remaining=real.remaining_encoder,
        parameters_teacher=count_parameters(teacher.model.parameters()),
        parameters_total=total,
        parameters_added=count_parameters(p for p in model.parameters() if id(p) not in own),
        parameters_trained=ctx.trained_parameters,
        bytes_added=ctx.bytes_added,
        bytes_teacher=bytes_on_disk(teacher.artifact.folder / WEIGHTS_FILE),
        bytes_total=count_bytes(model.parameters()),
    )


def depends_on_input(model: TaskModel) -> bool:
    """Whether two inputs of one length may cost differently."""
    return any(getattr(module, "input_dependent", False) for module in model.modules())


def check_budget(cost: Cost, ctx: RunContext) -> None:
    """Note in the result why a model does not cost what its ratio asks for.

    A setting is solved for the selection split. Where its lengths differ so much from those of dev that the same ratio
    asks for something else there, meeting the former is what can be asked.

    Raises
    ------
    BenchError
        If it is more than `TOLERANCE` away (relative) and the method gave no reason.
    """
    if cost.requested_remaining is None:
        return
    if ctx.setting.note:
        ctx.notes.append(ctx.setting.note)
    elif _near(cost.achieved_remaining, cost.requested_remaining):
        return
    elif _near(cost.achieved_remaining, ctx.budget):
        ctx.notes.append(
            f"{cost.achieved_remaining:.1%} of the encoder's FLOPs remain: what the ratio asks for on the lengths of "
            f"the selection split, {ctx.budget:.1%}, for which the setting was solved; on those of dev it asks for "
            f"{cost.requested_remaining:.1%}"
        )
    else:
        raise BenchError(
            f"{cost.achieved_remaining:.2%} of the encoder's FLOPs remain where the ratio asks for "
            f"{cost.requested_remaining:.2%}: more than {TOLERANCE:.0%} away, and {ctx.config.method} gave no reason"
        )


def _near(achieved: float, requested: float) -> bool:
    return abs(achieved / requested - 1) <= TOLERANCE


def _real(model: TaskModel, features: Sequence[Feature], ctx: RunContext) -> Flops:
    """Sum over examples, each alone and unpadded; examples of one length cost the same unless the model says no."""
    if depends_on_input(model):
        return count_lengths(
            model, parts_of(model), lambda i: _inputs([features[i]], ctx), dict.fromkeys(range(len(features)), 1)
        )
    example = {_lengths(feature): feature for feature in features}
    counts = Counter(_lengths(feature) for feature in features)
    return count_lengths(model, parts_of(model), lambda lengths: _inputs([example[lengths]], ctx), counts)


def _padded(model: TaskModel, features: Sequence[Feature], ctx: RunContext) -> Flops:
    """Sum over the batches that were evaluated; batches of one shape cost the same unless the model says no."""
    parts, by_input = parts_of(model), depends_on_input(model)
    counted: dict[tuple[int, ...], Flops] = {}
    shapes: list[tuple[int, ...]] = []
    for indices in batches(features, EVALUATION_BATCH_SIZE):
        inputs = _inputs([features[i] for i in indices], ctx)
        shape = tuple(size for tensor in inputs.values() for size in tensor.shape)
        shape = (*shape, len(shapes)) if by_input else shape
        if shape not in counted:
            counted[shape] = count_dispatched(model, inputs, parts)
        shapes.append(shape)
    return accumulate((counted[shape], 1) for shape in shapes)


def _lengths(feature: Feature) -> tuple[int, ...]:
    return len(feature["input_ids"]), len(feature.get("decoder_input_ids", ()))


def _inputs(features: Sequence[Feature], ctx: RunContext) -> dict[str, Tensor]:
    batch = model_inputs(collate(features, ctx.tokenizer.pad_token_id))
    return {name: tensor.to(ctx.device) for name, tensor in batch.items()}


def measure_speed(model: TaskModel, teacher: Teacher, ctx: RunContext) -> tuple[list[Latency], list[Memory]]:
    """Time both models in turn and find their peak memory, on full batches of real dev tokens."""
    length = min(TIMED_LENGTH, ctx.config.max_length or ctx.task.max_length)
    ctx.progress.stage("measure", len(TIMED_BATCH_SIZES))
    latencies, memories = [], []
    for size in TIMED_BATCH_SIZES:
        inputs = full_batch(ctx, size, length)
        latency = interleaved(teacher.model, model, inputs, ctx.device, max_seconds=4.0)
        latency.dense_flops = count_dispatched(teacher.model, inputs, parts_of(teacher.model)).total
        latency.compressed_flops = count_dispatched(model, inputs, parts_of(model)).total
        latencies.append(latency)
        memories.append(
            Memory(
                batch_size=size,
                sequence_length=length,
                dense_bytes=peak_bytes(teacher.model, inputs),
                compressed_bytes=peak_bytes(model, inputs),
            )
        )
        ctx.progress.advance()
    return latencies, memories


def full_batch(ctx: RunContext, size: int, length: int) -> dict[str, Tensor]:
    """Fill a batch without padding by joining the tokens of dev examples."""
    tokens: list[int] = []
    for feature in ctx.features["dev"]:
        tokens += feature["input_ids"]
        if len(tokens) >= size * length:
            break
    tokens *= -(-size * length // len(tokens))
    ids = torch.tensor(tokens[: size * length], device=ctx.device).reshape(size, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if ctx.spec.family == "bert":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    elif ctx.task.kind == "qa":
        inputs["decoder_input_ids"] = torch.zeros_like(ids[:, :8])
    return inputs
