"""Task models: a backbone with the head of a task, called the same way in both families."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bench.backbones.encoder import Encoder

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class TaskOutput:
    """What a task model returns.

    Attributes
    ----------
    logits
        Classification (batch, classes); regression (batch, 1); span QA (batch, n, 2), start and end; text-to-text
        QA (batch, target length, vocabulary).
    encoder_hidden
        Output of every encoder layer as the next one reads it, bottom first, each (batch, n, d): for T5 behind the
        next layer's norm, the last behind the final norm. Empty unless asked for.
    decoder_hidden
        Last decoder hidden state, (batch, target length, d); ``None`` for an encoder or unless asked for.
    """

    logits: Tensor
    encoder_hidden: tuple[Tensor, ...] = ()
    decoder_hidden: Tensor | None = None


class TaskModel(nn.Module):
    """Base of the task models.

    Parameters
    ----------
    model
        The transformers model with its head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    @property
    def config(self) -> Any:
        """The transformers config of the backbone."""
        return self.model.config

    @property
    def written(self) -> Encoder | None:
        """The encoder where it is written out (`bench.backbones.write_out`), else ``None``."""
        found = getattr(getattr(self.model.base_model, "encoder", None), "written", None)
        return found if isinstance(found, Encoder) else None


class EncoderTaskModel(TaskModel):
    """BERT with a classification, regression or span head."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        hidden: bool = False,
    ) -> TaskOutput:
        """Run the model; ``hidden`` also returns the hidden states."""
        written = self.written
        with recording(written, hidden):
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                output_hidden_states=hidden and written is None,
            )
        logits = out.logits if "logits" in out else torch.stack((out.start_logits, out.end_logits), dim=-1)
        if not hidden:
            return TaskOutput(logits)
        return TaskOutput(logits, tuple(out.hidden_states[1:]) if written is None else written.take_hidden())


class TextToTextModel(TaskModel):
    """T5; a class is a word that the decoder puts in place of ``<extra_id_0>``.

    Parameters
    ----------
    model
        A ``T5ForConditionalGeneration``.
    sentinel
        Token id of ``<extra_id_0>``.
    label_ids
        Token id of each label word; empty for QA, which decodes freely.
    label_values
        For regression, the number that each label word stands for; the prediction is the expected value.
    """

    def __init__(
        self,
        model: nn.Module,
        sentinel: int,
        label_ids: list[int],
        label_values: list[float] | None = None,
    ) -> None:
        super().__init__(model)
        self.sentinel = sentinel
        self.label_ids: Tensor
        self.label_values: Tensor | None
        self.register_buffer("label_ids", torch.tensor(label_ids, dtype=torch.long), persistent=False)
        values = torch.tensor(label_values) if label_values else None
        self.register_buffer("label_values", values, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        hidden: bool = False,
    ) -> TaskOutput:
        """Run the model; without ``decoder_input_ids`` the decoder reads start and sentinel, and the label follows."""
        cloze = decoder_input_ids is None
        if decoder_input_ids is None:
            decoder_input_ids = self.cloze(input_ids)
        written = self.written
        with recording(written, hidden):
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                output_hidden_states=hidden,
                use_cache=False,
            )
        logits = out.logits
        if cloze:
            logits = self.read(logits)
        if not hidden:
            return TaskOutput(logits)
        if written is not None:
            return TaskOutput(logits, written.take_hidden(), out.decoder_hidden_states[-1])
        # the raw stream of a pre-norm model is ruled by a few huge entries that its norms take back
        norms = [block.layer[0].layer_norm for block in self.model.encoder.block[1:]]
        inner = zip(norms, out.encoder_hidden_states[1:-1], strict=True)
        encoder = (*(norm(h) for norm, h in inner), out.encoder_last_hidden_state)
        return TaskOutput(logits, encoder, out.decoder_hidden_states[-1])

    def cloze(self, input_ids: Tensor) -> Tensor:
        """Return what the decoder reads where a label is to follow: start and sentinel, (batch, 2)."""
        start = torch.tensor([[self.config.decoder_start_token_id, self.sentinel]], device=input_ids.device)
        return start.expand(input_ids.shape[0], 2)

    def read(self, logits: Tensor) -> Tensor:
        """Map the decoder's logits, (batch, 2, vocabulary), to those of the labels, or to a number, (batch, 1)."""
        logits = logits[:, 1].index_select(-1, self.label_ids)
        if self.label_values is not None:
            logits = (logits.softmax(-1) * self.label_values).sum(-1, keepdim=True)
        return logits

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 32) -> Tensor:
        """Decode greedily; (batch, length) token ids."""
        tokens: Tensor = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return tokens


@contextmanager
def recording(written: Encoder | None, wanted: bool) -> Iterator[None]:
    """Let a written-out encoder keep its hidden states for the length of a ``with`` block, if they are wanted."""
    if written is not None:
        written.record = wanted
    try:
        yield
    finally:
        if written is not None:
            written.record = False


def share_weights(model: Module) -> Module:
    """Return a structural copy of ``model`` that holds the very same parameter and buffer tensors.

    A plugin attached to the copy leaves the original dense, at no memory.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
