"""How important each vector is, by the attention that it is paid, and a step that keeps the most important ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from bench.backbones.encoder import EncoderLayer, Seen, Tokens, TokenStep
from bench.backbones.model import TaskModel
from bench.backbones.write_out import written_encoder
from bench.context import RunContext
from bench.training.student import own_copy


def presence(tokens: Tokens) -> Tensor:
    """Return how much of each vector is there, (B, n): 0 at padding, 1 at what is real and not partly removed."""
    return tokens.mask.float() if tokens.size is None else tokens.size.float() * tokens.mask


def importance(tokens: Tokens, seen: Seen) -> Tensor:
    """Return the attention that each vector is paid, (B, n), in units of an equal share of the input.

    It is the mean over heads and over the queries that are there, times the real tokens that went in: 1 is what each
    of them would get from attention that made no difference between them. Neither padding nor the length of the input
    plays a part, so that one threshold suits all inputs.

    Notes
    -----
    Kim et al., "Learned token pruning for transformers", KDD 2022, section 3.2, where the score is the mean alone, over
    the padded length.
    """
    assert seen.probabilities is not None
    there = presence(tokens)
    paid = (seen.probabilities.mean(1, dtype=torch.float32) * there.unsqueeze(2)).sum(1)
    return paid * (tokens.real_length() / there.sum(1)).unsqueeze(1)


class KeepMost(TokenStep):
    """Keeps the most important vectors, as many as the length of the input says.

    Special tokens come first, then the others by importance, and of equals the one that comes first in the text.

    Parameters
    ----------
    counts
        How many to keep of an example that had 0, 1, 2, ... real tokens when it went in.
    """

    needs_probabilities = True
    counts: Tensor

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("counts", torch.tensor(counts), persistent=False)

    def forward(self, tokens: Tokens, seen: Seen) -> Tokens:
        """Remove the others."""
        score = importance(tokens, seen).masked_fill(~tokens.mask, -math.inf)
        if tokens.special is not None:
            score = score.masked_fill(tokens.special & tokens.mask, math.inf)
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(1)
        return tokens.keep(rank < self.counts[tokens.real_length()].unsqueeze(1))


def removing(model: TaskModel, steps: Sequence[TokenStep], ctx: RunContext) -> TaskModel:
    """Return a copy of ``model`` with weights of its own and with one step in each encoder layer."""
    student = own_copy(model)
    encoder = written_encoder(student)
    special = set(ctx.tokenizer.all_special_ids) - {ctx.tokenizer.unk_token_id}
    encoder.protect(sorted(special))
    for layer, step in zip(encoder.layers, steps, strict=True):
        cast(EncoderLayer, layer).step = step.to(ctx.device)
    return student
