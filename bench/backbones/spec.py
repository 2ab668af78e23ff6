"""What a checkpoint's ``config.json`` says about its shape. Imports no torch, so that a plan is instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bench.errors import BackboneError

FAMILIES: dict[str, str] = {"bert": "bert", "t5": "t5"}
"""``model_type`` of a config -> family name."""


@dataclass(frozen=True)
class BackboneSpec:
    """Shape of one encoder or encoder-decoder checkpoint.

    Attributes
    ----------
    name
        The name that the user gave.
    family
        ``"bert"`` (encoder, post-norm) or ``"t5"`` (encoder-decoder, pre-norm).
    d_model, d_ff, n_heads, d_head
        Width of the residual stream, of the FFN's inner layer, number of attention heads, width of a head.
    encoder_layers, decoder_layers
        Depth; ``decoder_layers`` is 0 for an encoder.
    gated
        Whether the FFN multiplies two input projections (T5 1.1, FLAN).
    activation
        Name of the FFN's activation as transformers spells it.
    vocab_size
        Rows of the embedding matrix.
    max_positions
        Longest input of a model with absolute positions; ``None`` where positions are relative.
    type_vocab
        Rows of the token-type embedding (BERT); 0 for T5.
    relative_buckets
        Buckets of the relative position bias (T5); 0 for BERT.
    tied_embeddings
        Whether the language-model head shares the embedding matrix.
    """

    name: str
    family: Literal["bert", "t5"]
    d_model: int
    d_ff: int
    n_heads: int
    d_head: int
    encoder_layers: int
    decoder_layers: int
    gated: bool
    activation: str
    vocab_size: int
    max_positions: int | None
    type_vocab: int
    relative_buckets: int
    tied_embeddings: bool

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> BackboneSpec:
        """Read the shape from the content of a ``config.json``.

        Raises
        ------
        BackboneError
            If the family is not supported, or a needed field is missing.
        """
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise BackboneError(
                f"backbone '{name}' is of model_type '{model_type}', which is not supported; "
                f"supported: {', '.join(sorted(FAMILIES))}"
            )
        try:
            return _bert(name, config) if model_type == "bert" else _t5(name, config)
        except KeyError as missing:
            raise BackboneError(f"the config of backbone '{name}' has no field {missing}") from None


def _bert(name: str, c: Mapping[str, Any]) -> BackboneSpec:
    d, heads = int(c["hidden_size"]), int(c["num_attention_heads"])
    return BackboneSpec(
        name=name,
        family="bert",
        d_model=d,
        d_ff=int(c["intermediate_size"]),
        n_heads=heads,
        d_head=d // heads,
        encoder_layers=int(c["num_hidden_layers"]),
        decoder_layers=0,
        gated=False,
        activation=str(c.get("hidden_act", "gelu")),
        vocab_size=int(c["vocab_size"]),
        max_positions=int(c.get("max_position_embeddings", 512)),
        type_vocab=int(c.get("type_vocab_size", 2)),
        relative_buckets=0,
        tied_embeddings=True,
    )


def _t5(name: str, c: Mapping[str, Any]) -> BackboneSpec:
    projection = str(c.get("feed_forward_proj", "relu"))
    gated = projection.startswith("gated-")
    activation = projection.removeprefix("gated-")
    # transformers reads the published "gated-gelu" as the tanh approximation, as T5 1.1 was trained.
    if projection == "gated-gelu":
        activation = "gelu_new"
    layers = int(c["num_layers"])
    return BackboneSpec(
        name=name,
        family="t5",
        d_model=int(c["d_model"]),
        d_ff=int(c["d_ff"]),
        n_heads=int(c["num_heads"]),
        d_head=int(c["d_kv"]),
        encoder_layers=layers,
        decoder_layers=int(c.get("num_decoder_layers") or layers),
        gated=gated,
        activation=activation,
        vocab_size=int(c["vocab_size"]),
        max_positions=None,
        type_vocab=0,
        relative_buckets=int(c.get("relative_attention_num_buckets", 32)),
        tied_embeddings=bool(c.get("tie_word_embeddings", True)),
    )
