"""What a backbone and a plugin cost, by arithmetic alone. Imports no torch, so that a plan is instant.

FLOPs are 2 x the multiply-accumulates of matrix products. Norms, softmax, activations and other elementwise work count
as 0, here and in ``bench.measure.flops``; the two agree to the last FLOP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from bench.backbones.spec import BackboneSpec
from bench.results import Flops

BYTES_PER_PARAMETER = {"float32": 4, "float16": 2, "bfloat16": 2}

Compression = Literal["attention", "mean", "conv"]
Decompression = Literal["adapter", "copy"]


@dataclass(frozen=True)
class PluginShape:
    """Shape of a compression plugin.

    Attributes
    ----------
    k
        How many neighbouring hidden vectors are merged into one, at least 2.
    bottleneck
        Width of the decompression adapter.
    form
        ``"split"`` runs the adapter's y half on the short sequence, as ``bench.plugins.layers`` does; ``"concat"``
        runs it on every position, as the released code does. The results are the same, the cost is not.
    compression, decompression
        How vectors are merged and expanded; see ``bench.plugins.layers``.
    attention_k
        How many vectors are merged into one before the attention's keys and values are made of them; ``None`` where
        each vector has its own.
    """

    k: int
    bottleneck: int = 64
    form: Literal["split", "concat"] = "split"
    compression: Compression = "attention"
    decompression: Decompression = "adapter"
    attention_k: int | None = None

    def __post_init__(self) -> None:
        for name, k in (("k", self.k), ("attention_k", self.attention_k)):
            if k is not None and k < 2:
                raise ValueError(f"{name} must be at least 2, got {k}")


def encoder(spec: BackboneSpec, n: int, batch: int = 1, plugin: PluginShape | None = None) -> Flops:
    """FLOPs of the encoder on ``batch`` sequences of ``n`` tokens, dense or with a plugin around every FFN.

    With a plugin the FFN runs on ceil(n/k) rows, the attention's keys and values on ceil(n/attention_k) where they are
    merged too, and the plugin's own work is the ``overhead``.
    """
    rows, keys, own = n, n, 0
    if plugin is not None:
        rows = -(-n // plugin.k)
        own = _merge(spec.d_model, rows, plugin.k, plugin.compression) + _expand(spec.d_model, rows, plugin)
        if plugin.attention_k is not None:
            keys = -(-n // plugin.attention_k)
            own += _merge(spec.d_model, keys, plugin.attention_k, plugin.compression)
    layer, overhead = layer_macs(spec, n, keys, rows), spec.encoder_layers * own
    return Flops(encoder=2 * batch * (spec.encoder_layers * layer + overhead), overhead=2 * batch * overhead)


def decoder(spec: BackboneSpec, targets: int, n: int, batch: int = 1) -> Flops:
    """FLOPs of the decoder stack, without cache: ``targets`` tokens that attend to ``n`` encoder positions each.

    Causal masking halves nothing: the masked scores are computed too.
    """
    layer = _attention(spec, targets, targets) + _attention(spec, targets, n) + targets * _ffn_weights(spec)
    return Flops(encoder=0, decoder=2 * batch * spec.decoder_layers * layer)


def lm_head(spec: BackboneSpec, targets: int, batch: int = 1) -> Flops:
    """FLOPs of the language-model head on ``targets`` decoder positions, over the whole vocabulary."""
    return Flops(encoder=0, head=2 * batch * targets * spec.d_model * spec.vocab_size)


def pooled_head(spec: BackboneSpec, labels: int, batch: int = 1) -> Flops:
    """FLOPs of BERT's pooler and classifier, on the first position; ``labels`` is 1 for regression."""
    return Flops(encoder=0, head=2 * batch * spec.d_model * (spec.d_model + labels))


def span_head(spec: BackboneSpec, n: int, batch: int = 1) -> Flops:
    """FLOPs of a start and an end score for each of ``n`` positions."""
    return Flops(encoder=0, head=2 * batch * n * spec.d_model * 2)


def accumulate(counts: Iterable[tuple[Flops, int]]) -> Flops:
    """Sum FLOPs, each as many times as its multiplicity says."""
    total = dict.fromkeys(Flops.model_fields, 0)
    for flops, times in counts:
        for part in total:
            total[part] += times * getattr(flops, part)
    return Flops(**total)


def remaining(
    spec: BackboneSpec,
    k: int,
    lengths: Mapping[int, int],
    bottleneck: int = 64,
    form: Literal["split", "concat"] = "split",
) -> float:
    """Share of the encoder's FLOPs that remains with the plugin at ``k``: the budget that a ratio stands for.

    Parameters
    ----------
    spec
        The backbone.
    k
        How many neighbouring hidden vectors are merged into one.
    lengths
        Number of tokens -> number of examples of that length, each run alone and unpadded.
    bottleneck, form
        See ``PluginShape``.
    """
    return remaining_with(spec, PluginShape(k, bottleneck, form), lengths)


def remaining_with(spec: BackboneSpec, plugin: PluginShape, lengths: Mapping[int, int]) -> float:
    """Share of the encoder's FLOPs that remains with a plugin of any shape; ``lengths`` as for `remaining`."""
    compressed = accumulate((encoder(spec, n, plugin=plugin), times) for n, times in lengths.items())
    dense = accumulate((encoder(spec, n), times) for n, times in lengths.items())
    return compressed.encoder / dense.encoder


def layer_macs(
    spec: BackboneSpec, queries: int, keys: int, rows: int, heads: int | None = None, neurons: int | None = None
) -> int:
    """MACs of one encoder layer whose sequence or width differs from the backbone's.

    Parameters
    ----------
    spec
        The backbone.
    queries, keys, rows
        Vectors that the attention queries with, that it attends to, and that the FFN runs on.
    heads, neurons
        Attention heads and width of the FFN's inner layer; the backbone's own by default.
    """
    narrow = dataclasses.replace(
        spec,
        n_heads=spec.n_heads if heads is None else heads,
        d_ff=spec.d_ff if neurons is None else neurons,
    )
    return _attention(narrow, queries, keys) + rows * _ffn_weights(narrow)


def backbone_parameters(spec: BackboneSpec, labels: int | None = None) -> int:
    """Parameters of a backbone with its head, tied ones counted once.

    Parameters
    ----------
    spec
        The backbone. T5 comes with its language-model head.
    labels
        For BERT, the outputs of the classifier behind the pooler; ``None`` for a span head, which has no pooler.
    """
    return _t5_parameters(spec) if spec.family == "t5" else _bert_parameters(spec, labels)


def plugin_parameters(d_model: int, layers: int, plugin: PluginShape) -> int:
    """Parameters of a plugin; the form makes no difference."""
    merging = sum(_merge_parameters(d_model, k, plugin) for k in (plugin.k, plugin.attention_k) if k is not None)
    adapter = 2 * d_model * plugin.bottleneck + plugin.bottleneck + plugin.bottleneck * d_model + d_model
    return layers * (merging + (adapter if plugin.decompression == "adapter" else 0))


def weight_bytes(parameters: int, dtype: str = "float32") -> int:
    """Bytes that so many parameters take in memory or in a safetensors file (without its header)."""
    return parameters * BYTES_PER_PARAMETER[dtype]


def _attention(spec: BackboneSpec, queries: int, keys: int) -> int:
    """MACs: q and o run on the queries, k and v on the keys; then scores and mix."""
    inner = spec.n_heads * spec.d_head
    return 2 * (queries + keys) * spec.d_model * inner + 2 * queries * keys * inner


def _ffn_weights(spec: BackboneSpec) -> int:
    """Weights of one FFN without biases, which is also its MACs a row."""
    return (3 if spec.gated else 2) * spec.d_model * spec.d_ff


def _merge(d: int, groups: int, k: int, compression: Compression) -> int:
    """MACs of merging vectors, on sequences padded to a multiple of k."""
    n = groups * k
    return {"attention": n * k * d + n * d, "mean": 0, "conv": n * d}[compression]


def _merge_parameters(d: int, k: int, plugin: PluginShape) -> int:
    return {"attention": k * d * k + k, "mean": 0, "conv": k * d}[plugin.compression]


def _expand(d: int, groups: int, plugin: PluginShape) -> int:
    """MACs of expanding the FFN's output to sequences padded to a multiple of k."""
    n = groups * plugin.k
    y_rows = groups if plugin.form == "split" else n
    return (y_rows + 2 * n) * d * plugin.bottleneck if plugin.decompression == "adapter" else 0


def _t5_parameters(spec: BackboneSpec) -> int:
    d, attention = spec.d_model, 4 * spec.d_model * spec.n_heads * spec.d_head
    encoder_layer = attention + _ffn_weights(spec) + 2 * d
    decoder_layer = 2 * attention + _ffn_weights(spec) + 3 * d
    # Each stack has one final norm, and one relative position bias that its layers share.
    stacks = 2 * (d + spec.relative_buckets * spec.n_heads)
    embeddings = (1 if spec.tied_embeddings else 2) * spec.vocab_size * d
    return embeddings + spec.encoder_layers * encoder_layer + spec.decoder_layers * decoder_layer + stacks


def _bert_parameters(spec: BackboneSpec, labels: int | None) -> int:
    d, norm = spec.d_model, 2 * spec.d_model
    embeddings = (spec.vocab_size + (spec.max_positions or 0) + spec.type_vocab) * d + norm
    layer = 4 * (d * d + d) + _ffn_weights(spec) + spec.d_ff + d + 2 * norm
    pooler = 0 if labels is None else d * d + d
    outputs = 2 if labels is None else labels
    return embeddings + spec.encoder_layers * layer + pooler + outputs * (d + 1)
