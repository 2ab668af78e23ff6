"""Put the written-out encoder in the place of the transformers one, in a model of either family."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from bench.backbones.encoder import Encoder, EncoderLayer, RelativePosition
from bench.backbones.model import share_weights
from bench.backbones.sites import BertFFN, bert_attention, t5_attention
from bench.errors import BackboneError

Module = TypeVar("Module", bound=nn.Module)


class BertEncoderStack(nn.Module):
    """Called as ``BertModel`` calls its encoder."""

    def __init__(self, written: Encoder) -> None:
        super().__init__()
        self.written = written
        self._ids: Tensor | None = None

    def see_ids(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the ids that are embedded (forward pre-hook of the embeddings): ``BertModel`` does not hand them on."""
        self._ids = kwargs.get("input_ids", args[0] if args else None)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Run the encoder on embeddings; the mask is the four-dimensional one that ``BertModel`` makes."""
        if attention_mask is None:
            mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        else:
            keys = attention_mask[:, 0, 0]
            mask = keys if keys.dtype == torch.bool else keys == 0
        ids, self._ids = self._ids, None
        states = self.written(hidden_states, mask, self.written.special(ids))
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)


class T5EncoderStack(nn.Module):
    """Called as ``T5ForConditionalGeneration`` calls its encoder."""

    main_input_name = "input_ids"

    def __init__(self, config: Any, embed_tokens: nn.Module, dropout: float, written: Encoder) -> None:
        super().__init__()
        self.config, self.embed_tokens, self.dropout, self.written = config, embed_tokens, nn.Dropout(dropout), written

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Run the encoder on ids or embeddings; the mask is (B, n), true or not 0 at real tokens."""
        x = self.dropout(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        mask = x.new_ones(x.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        return BaseModelOutput(last_hidden_state=self.written(x, mask, self.written.special(input_ids)))


def write_out(model: Module) -> Module:
    """Return a model that shares all weights of ``model`` and whose encoder is an `Encoder`.

    Raises
    ------
    BackboneError
        If ``model`` holds no transformers encoder of a supported family.
    """
    written = share_weights(model)
    for module in written.modules():
        kind = type(module).__name__
        if kind == "BertModel":
            _write_out_bert(module)
            return written
        if kind == "T5ForConditionalGeneration":
            _write_out_t5(module)
            return written
    raise BackboneError(f"{type(model).__name__} holds no encoder that can be written out (bert, t5)")


def written_encoder(model: nn.Module) -> Encoder:
    """Return the written-out encoder inside ``model``.

    Raises
    ------
    BackboneError
        If there is none.
    """
    found = next((module for module in model.modules() if isinstance(module, Encoder)), None)
    if found is None:
        raise BackboneError(f"the encoder of {type(model).__name__} is not written out")
    return found


def _write_out_bert(bert: Any) -> None:
    layers = []
    for layer in bert.encoder.layer:
        out, attention = layer.attention.output, bert_attention(layer.attention)
        ffn = BertFFN(layer.intermediate, layer.output.dense)
        layers.append(EncoderLayer(attention, out.LayerNorm, ffn, layer.output.LayerNorm, False, out.dropout.p))
    bert.encoder = BertEncoderStack(Encoder(layers)).train(bert.training)
    # a bound method, which a copy of the model takes along to its own encoder
    bert.embeddings.register_forward_pre_hook(bert.encoder.see_ids, with_kwargs=True)


def _write_out_t5(model: Any) -> None:
    stack, layers = model.encoder, []
    for block in stack.block:
        attention = t5_attention(block.layer[0].SelfAttention)
        ffn = block.layer[1]
        layers.append(
            EncoderLayer(attention, block.layer[0].layer_norm, ffn.DenseReluDense, ffn.layer_norm, True, ffn.dropout.p)
        )
    first = stack.block[0].layer[0].SelfAttention
    position = RelativePosition(first.relative_attention_bias, first.relative_attention_max_distance)
    p = stack.dropout.p
    written = Encoder(layers, position, stack.final_layer_norm, p)
    model.encoder = T5EncoderStack(stack.config, stack.embed_tokens, p, written).train(model.training)
