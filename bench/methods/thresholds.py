"""Thresholds on the importance of tokens, soft or hard: what they leave of an encoder, how they meet a budget."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from bench.backbones.encoder import Encoder, Seen, Tokens, TokenStep
from bench.backbones.model import TaskModel
from bench.backbones.write_out import written_encoder
from bench.context import RunContext
from bench.errors import Unreachable
from bench.measure.closed_form import layer_macs, remaining
from bench.methods.attention_importance import importance, presence
from bench.tasks.evaluation import EVALUATION_BATCH_SIZE, batches
from bench.tasks.features import Feature, collate
from bench.training.parallel import average
from bench.training.stage import model_inputs

SMALLEST = 1e-30
"""Least share of a vector that is left, so that its logarithm is finite."""

CLOSE = 0.001
"""Relative distance from the budget at which a calibration is content."""

FARTHEST = 60.0
"""Largest logarithm of the common factor: at minus this nothing is below a threshold, at plus this everything is."""


class Threshold(TokenStep):
    """Keeps the vectors whose importance is at least a learned threshold; special tokens and the best one always.

    Parameters
    ----------
    log_threshold
        Logarithm of the threshold at the start, so that it is above 0 whatever is learned.

    Attributes
    ----------
    temperature
        Where it is set, vectors are removed in part: what stays of each is a sigmoid of how far its importance is above
        the threshold, in units of the temperature, times what the layers below have left. By so much less it is
        attended to, by so much less it counts as a query of the importance, and so much less of what the sublayers
        change reaches it. As the temperature falls to 0, all of this becomes the removal itself.
    """

    needs_probabilities = True
    input_dependent = True

    def __init__(self, log_threshold: float) -> None:
        super().__init__()
        self.log_threshold = nn.Parameter(torch.tensor(log_threshold))
        self.temperature: float | None = None

    def forward(self, tokens: Tokens, seen: Seen) -> Tokens:
        """Remove the other vectors, or some of each."""
        score, threshold = importance(tokens, seen), self.log_threshold.exp()
        if tokens.special is not None:
            score = score.masked_fill(tokens.special, math.inf)
        if self.temperature is None:
            score = score.masked_fill(~tokens.mask, -math.inf)
            return tokens.keep(score >= torch.minimum(threshold, score.amax(1, keepdim=True)))
        gate = ((score - threshold) / self.temperature).sigmoid()
        left = (gate if tokens.size is None else gate * tokens.size).clamp_min(SMALLEST)
        return tokens.replace(size=left, gate=left, bias=None)


def thresholds_of(model: TaskModel) -> list[Threshold]:
    """Return the steps of ``model``, the first layer's first."""
    return [module for module in written_encoder(model).modules() if isinstance(module, Threshold)]


@contextmanager
def softly(model: TaskModel, temperature: float) -> Iterator[None]:
    """Remove vectors in part for the length of a ``with`` block."""
    steps = thresholds_of(model)
    for step in steps:
        step.temperature = temperature
    try:
        yield
    finally:
        for step in steps:
            step.temperature = None


@contextmanager
def counted(encoder: Encoder) -> Iterator[list[Tensor]]:
    """Yield a list that each forward pass fills with how many vectors an example has in each layer.

    With L layers it holds L + 1 tensors, each (B,): what the first layer reads, then what each layer's step leaves, on
    which its FFN and the next attention run. They are fractions where vectors are removed in part.
    """
    counts: list[Tensor] = []

    def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
        counts[:] = [args[1].sum(1)]

    def note(_: nn.Module, __: Any, tokens: Tokens) -> None:
        there = presence(tokens)
        counts.append((there if tokens.size is not None else there.long()).sum(1))

    with ExitStack() as stack:
        stack.callback(encoder.register_forward_pre_hook(begin).remove)
        for layer in encoder.layers:
            stack.callback(layer.register_forward_hook(note).remove)
        yield counts


def share_of(counts: Sequence[Tensor], ctx: RunContext) -> Tensor:
    """Return the share of the encoder's FLOPs that examples cost together, from what `counted` gives.

    Attention runs on the vectors that come in, the FFN on those that stay; the arithmetic takes tensors as it does
    numbers, and fractions of vectors too. In a step that several processes share, it is that of the whole batch.
    """
    macs: Any = layer_macs
    left = torch.stack([macs(ctx.spec, n, n, stay).sum() for n, stay in itertools.pairwise(counts)]).sum()
    dense: Tensor = macs(ctx.spec, *[counts[0]] * 3).sum() * ctx.spec.encoder_layers
    return average(left / dense, dense)


@torch.inference_mode()
def share_left(model: TaskModel, features: Sequence[Feature], ctx: RunContext) -> float:
    """Return the share of the encoder's FLOPs that ``features`` cost, each alone and unpadded: one evaluation."""
    training = model.training
    model.eval()
    found: list[list[Tensor]] = []
    with counted(written_encoder(model)) as counts:
        for indices in batches(features, EVALUATION_BATCH_SIZE):
            inputs = model_inputs(collate([features[i] for i in indices], ctx.tokenizer.pad_token_id))
            model(**{name: tensor.to(ctx.device) for name, tensor in inputs.items()})
            found.append(list(counts))
    model.train(training)
    return share_of([torch.cat(layer) for layer in zip(*found, strict=True)], ctx).item()


def budget_of(features: Sequence[Feature], ctx: RunContext) -> float:
    """Return the share of the encoder's FLOPs that the run's ratio asks for on ``features``, at most all."""
    lengths = Counter(len(feature["input_ids"]) for feature in features)
    return min(1.0, remaining(ctx.spec, int(ctx.config.ratio or 0), lengths))


def calibrate(model: TaskModel, features: Sequence[Feature], ctx: RunContext) -> float:
    """Multiply all thresholds by the factor with which ``features`` cost just what the budget allows.

    Returns
    -------
    float
        The share of the encoder's FLOPs that they then cost.

    Raises
    ------
    Unreachable
        If they cost more even where nothing is left but what no threshold removes.
    """
    thresholds, budget = [step.log_threshold for step in thresholds_of(model)], budget_of(features, ctx)
    start = [threshold.detach().clone() for threshold in thresholds]
    shares: dict[float, float] = {}

    @torch.no_grad()
    def shift(offset: float) -> None:
        for threshold, origin in zip(thresholds, start, strict=True):
            threshold.copy_(origin + offset)

    def gap(offset: float) -> float:
        if offset not in shares:
            shift(offset)
            shares[offset] = share_left(model, features, ctx)
        relative = shares[offset] / budget - 1
        return 0.0 if abs(relative) <= CLOSE else relative

    # the dearer it is, the higher the thresholds: away from where they are, in ever larger steps, until it is too cheap
    near, far = 0.0, math.copysign(0.125, gap(0.0))
    while gap(near) * gap(far) > 0 and abs(far) < FARTHEST:
        near, far = far, 2 * far
    if gap(near) * gap(far) < 0:
        brentq(gap, near, far, xtol=1e-4)
    best = min(shares, key=lambda offset: abs(shares[offset] - budget))
    if gap(best) > 0 and far >= FARTHEST:
        raise Unreachable(
            f"the first attention, and the tokens that no threshold removes, leave {shares[best]:.1%} of the encoder's "
            f"FLOPs, more than the {budget:.1%} asked for"
        )
    shift(best)
    return shares[best]
