"""An encoder whose removed vectors are masked and not gone: a reference that no gathering can be wrong in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

Rule = Callable[[int, Tensor, list[int]], list[int]]
"""Layer (0-based), attention that each position which is still there is paid in the mean over heads and such positions,
and these positions -> indices into them of those that stay."""


@torch.no_grad()
def encode_masked(model: Any, ids: Tensor, rule: Rule) -> tuple[Tensor, list[int]]:
    """Run the transformers encoder of a dense task model on one example, (n,), one layer and one head at a time.

    Returns the final states, (n, d), and how many positions were there at the start and behind each layer's rule. The
    state of a position that is not there any more does not change.
    """
    backbone = model.model.base_model
    bert = hasattr(backbone, "embeddings")
    n = len(ids)
    if bert:
        x = backbone.embeddings(input_ids=ids[None])[0]
        layers = [_bert_parts(layer) for layer in backbone.encoder.layer]
        bias = torch.zeros(1, n, n)
    else:
        stack = model.model.encoder
        x = stack.embed_tokens(ids)
        layers = [_t5_parts(block) for block in stack.block]
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(n, n)[0]
    present, counts = list(range(n)), [n]
    for i, part in enumerate(layers):
        u = x if bert else part["norm1"](x)
        width = part["q"].out_features // part["heads"]
        mixed, paid = torch.zeros(n, part["q"].out_features), torch.zeros(len(present))
        for h in range(part["heads"]):
            rows = slice(h * width, (h + 1) * width)
            q, k, v = (part[name](u)[:, rows] for name in "qkv")
            logits = q @ k.T * (1 / math.sqrt(width) if bert else 1.0) + bias[h % len(bias)]
            a = logits[:, present].softmax(-1)
            mixed[:, rows] = a @ v[present]
            paid += a[present].mean(0) / part["heads"]
        x = _only(present, x, part["norm1"](x + part["o"](mixed)) if bert else x + part["o"](mixed))
        present = [present[place] for place in sorted(rule(i, paid, present))]
        counts.append(len(present))
        x = _only(present, x, part["norm2"](x + part["ffn"](x)) if bert else x + part["ffn"](part["norm2"](x)))
    return (x if bert else cast(Tensor, stack.final_layer_norm(x))), counts


def _only(present: list[int], old: Tensor, new: Tensor) -> Tensor:
    x = old.clone()
    x[present] = new[present]
    return x


def _bert_parts(layer: Any) -> dict[str, Any]:
    own, out = layer.attention.self, layer.attention.output
    return {"q": own.query, "k": own.key, "v": own.value, "o": out.dense, "heads": own.num_attention_heads,
            "norm1": out.LayerNorm, "norm2": layer.output.LayerNorm,
            "ffn": lambda x: layer.output.dense(layer.intermediate(x))}  # fmt: skip


def _t5_parts(block: Any) -> dict[str, Any]:
    own, ffn = block.layer[0].SelfAttention, block.layer[1]
    return {"q": own.q, "k": own.k, "v": own.v, "o": own.o, "heads": own.n_heads,
            "norm1": block.layer[0].layer_norm, "norm2": ffn.layer_norm, "ffn": ffn.DenseReluDense}  # fmt: skip
