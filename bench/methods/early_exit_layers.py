"""An encoder whose examples leave the batch as soon as a head is sure of their answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from bench.backbones.encoder import Encoder, EncoderLayer, Overhead, Tokens
from bench.backbones.model import TaskModel, TaskOutput
from bench.backbones.write_out import write_out, written_encoder


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row of ``logits``, (B, classes), as a share of the largest possible, in float64.

    In float32 the entropies of sure answers would be lost in rounding, and with them their order.
    """
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])


class ExitHead(Overhead):
    """Classes from the hidden states between two layers, by a pooler and a classifier like those of BERT itself.

    Parameters
    ----------
    width, outputs
        Width of the hidden states, number of classes.
    mean
        Whether to read the mean of the real vectors (T5) or the first one (BERT).
    """

    def __init__(self, width: int, outputs: int, mean: bool) -> None:
        super().__init__()
        self.pooler, self.classifier, self.mean = nn.Linear(width, width), nn.Linear(width, outputs), mean

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return logits, (B, classes).

        Parameters
        ----------
        x
            States as the next layer reads them, (B, n, d).
        mask
            True at real tokens, (B, n).
        """
        if self.mean:
            real = mask.unsqueeze(-1).to(x.dtype)
            pooled = (x * real).sum(1) / real.sum(1)
        else:
            pooled = x[:, 0]
        return cast(Tensor, self.classifier(torch.tanh(self.pooler(pooled))))


@dataclass
class Exits:
    """Who is where in one forward pass over B examples.

    Attributes
    ----------
    rows
        Examples that are still in the batch, (remaining,).
    unsure
        True at examples that no head has answered, (B,).
    answers
        Of each head that answered some: which examples, and their logits.
    """

    rows: Tensor
    unsure: Tensor
    answers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class ExitingEncoder(Encoder):
    """Runs each layer on the examples that no head is sure of yet.

    Examples leave only during a call of the task model (`expect`), whose answer is then put together from those of the
    heads and its own (`collect`); called otherwise, as ``generate`` does, this is the plain encoder. While hidden
    states are recorded nobody leaves, since each layer must give a state for every example; the answers are the same.

    Parameters
    ----------
    encoder
        The encoder whose layers are run.
    heads
        One for every layer but the last.
    threshold
        Entropy, as in `entropy`, below which an example exits.
    """

    input_dependent = True

    def __init__(self, encoder: Encoder, heads: Sequence[ExitHead], threshold: float) -> None:
        layers = [cast(EncoderLayer, layer) for layer in encoder.layers]
        super().__init__(layers, encoder.position, encoder.final_norm, encoder.dropout.p)
        self.heads, self.threshold = nn.ModuleList(heads), threshold
        self._depth = 0
        self._expected = False
        self._exits: Exits | None = None

    def expect(self, *_: Any) -> None:
        """Let examples leave in the next forward pass (forward pre-hook of the task model)."""
        self._expected = True

    def remaining(self) -> Tensor | None:
        """Return which examples have come to the end, (remaining,); ``None`` if none may leave."""
        return None if self._exits is None else self._exits.rows

    def start(self, x: Tensor, mask: Tensor, special: Tensor | None) -> Tokens:
        """Return what the first layer is given, with every example there."""
        expected, self._expected, self._depth = self._expected, False, 0
        rows = torch.arange(len(x), device=x.device)
        self._exits = Exits(rows, torch.ones_like(rows, dtype=torch.bool)) if expected else None
        return super().start(x, mask, special)

    def run(self, layer: nn.Module, tokens: Tokens) -> Tokens:
        """Run one layer and the head behind it, and let examples leave."""
        exits = self._exits
        if exits is not None and not len(exits.rows):
            return tokens
        tokens = super().run(layer, tokens)
        self._depth += 1
        if exits is None or self._depth == len(self.layers):
            return tokens
        follower = cast(EncoderLayer, self.layers[self._depth])
        x = follower.attention_norm(tokens.x) if follower.pre_norm else tokens.x
        logits = self.heads[self._depth - 1](x, tokens.mask)
        sure = entropy(logits) < self.threshold
        if not sure.any():
            return tokens
        new = sure & exits.unsure[exits.rows]
        exits.answers.append((exits.rows[new], logits[new]))
        exits.unsure[exits.rows[new]] = False
        if self.record:
            return tokens
        exits.rows = exits.rows[~sure]
        return _select(tokens, ~sure)

    def collect(self, _: nn.Module, __: Any, output: TaskOutput) -> TaskOutput:
        """Return the task model's output with the heads' answers in it (its forward hook)."""
        exits, self._exits = self._exits, None
        if exits is None or not exits.answers:
            return output
        own = output.logits
        logits = own.new_empty(len(exits.unsure), own.shape[1])
        for rows, answer in exits.answers:
            logits[rows] = answer.to(own.dtype)
        logits[exits.unsure] = own[exits.unsure[exits.rows]]
        return dataclasses.replace(output, logits=logits)


class RemainingDecoder(nn.Module):
    """Runs T5's decoder on the examples that have come to the end of the encoder.

    Parameters
    ----------
    decoder
        The decoder.
    remaining
        Gives their rows, as `ExitingEncoder.remaining`.
    """

    def __init__(self, decoder: nn.Module, remaining: Callable[[], Tensor | None]) -> None:
        super().__init__()
        self.decoder, self.remaining = decoder, remaining

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Take ids and mask of all examples, and states of the remaining ones."""
        rows = self.remaining()
        if rows is not None:
            input_ids = input_ids[rows]
            encoder_attention_mask = None if encoder_attention_mask is None else encoder_attention_mask[rows]
        if not len(input_ids):  # which the transformers decoder cannot be called with
            none = encoder_hidden_states.new_empty(0, input_ids.shape[1], encoder_hidden_states.shape[-1])
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=none)
        return self.decoder(
            input_ids=input_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )


def let_exit(model: TaskModel, outputs: int, threshold: float) -> TaskModel:
    """Return a model that shares the weights of ``model`` and from which examples exit, with random heads.

    Parameters
    ----------
    model
        A task model of either family, which stays as it is.
    outputs
        Number of classes.
    threshold
        Entropy, as in `entropy`, below which an example exits.
    """
    exiting = write_out(model)
    plain, t5 = written_encoder(exiting), hasattr(exiting.model, "decoder")
    width = cast(EncoderLayer, plain.layers[0]).attention.q.in_features
    heads = [ExitHead(width, outputs, mean=t5) for _ in plain.layers[1:]]
    encoder = ExitingEncoder(plain, heads, threshold).train(exiting.training)
    exiting.model.base_model.encoder.written = encoder
    if t5:
        exiting.model.decoder = RemainingDecoder(exiting.model.decoder, encoder.remaining)
    # bound methods, which a copy of the model takes along to its own encoder
    exiting.register_forward_pre_hook(encoder.expect)
    exiting.register_forward_hook(encoder.collect)
    return exiting


def _select(tokens: Tokens, kept: Tensor) -> Tokens:
    """Take examples out of a batch; a bias that all of them share stays as it is."""
    fields = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    return Tokens(**{k: v if v is None or len(v) != len(kept) else v[kept] for k, v in fields.items()})
