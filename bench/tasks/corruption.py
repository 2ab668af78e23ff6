"""Features for pre-training: spans of text, masked for BERT or span-corrupted for T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bench.errors import ConfigError
from bench.tasks.features import Feature, with_targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def bert_features(
    spans: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, mask_probability: float = 0.0, seed: int = 0
) -> list[Feature]:
    """Wrap spans as ``[CLS] span [SEP]``, each token masked with the given probability.

    Parameters
    ----------
    spans
        Token ids without special tokens; the features are two tokens longer.
    tokenizer
        The backbone's.
    mask_probability
        Chance of each token to become ``[MASK]``.
    seed
        With the index of a span, all that its masks depend on.
    """
    features = []
    for index, span in enumerate(spans):
        masked = np.random.default_rng([seed, index]).random(len(span)) < mask_probability
        body = [tokenizer.mask_token_id if hide else token for token, hide in zip(span, masked, strict=True)]
        ids = [tokenizer.cls_token_id, *body, tokenizer.sep_token_id]
        features.append(Feature(input_ids=ids, token_type_ids=[0] * len(ids)))
    return features


def t5_features(
    spans: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    rate: float = 0.15,
    mean_span: float = 3.0,
) -> list[Feature]:
    """Corrupt spans as T5 was pre-trained (Raffel et al., 2020, section 3.1.4).

    Runs of tokens are taken out, each leaving a sentinel; the target is the runs, each behind its sentinel, and one
    more sentinel. The sentinels count up from ``<extra_id_0>``; input and target end with the end-of-sequence token.

    Parameters
    ----------
    spans
        Token ids without special tokens, at least two each.
    tokenizer
        The backbone's.
    seed
        With the index of a span, all that its corruption depends on.
    rate
        Share of the tokens that is taken out.
    mean_span
        Mean length of the runs in tokens.

    Raises
    ------
    ConfigError
        If the tokenizer has too few sentinels for spans of this length.
    """
    features, vocabulary = [], tokenizer.get_vocab()
    for index, span in enumerate(spans):
        kept, taken = segments(len(span), np.random.default_rng([seed, index]), rate, mean_span)
        sentinels = _sentinels(vocabulary, len(taken) + 1)
        inputs: list[int] = []
        targets: list[int] = []
        position = 0
        for sentinel, keep, take in zip(sentinels, kept, taken, strict=False):
            inputs += [*span[position : position + keep], sentinel]
            targets += [sentinel, *span[position + keep : position + keep + take]]
            position += keep + take
        eos = tokenizer.eos_token_id
        features.append(with_targets(Feature(input_ids=[*inputs, eos]), [*targets, sentinels[-1], eos]))
    return features


def segments(length: int, rng: np.random.Generator, rate: float, mean_span: float) -> tuple[list[int], list[int]]:
    """Draw the lengths of the runs that are kept and of those taken out, in turn, each at least 1."""
    n_taken = min(max(round(length * rate), 1), length - 1)
    n_runs = min(max(round(n_taken / mean_span), 1), n_taken, length - n_taken)
    return _composition(length - n_taken, n_runs, rng), _composition(n_taken, n_runs, rng)


def _composition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Draw one of the ways to write ``total`` as a sum of positive parts, all equally likely."""
    cuts = np.sort(rng.choice(total - 1, size=parts - 1, replace=False)) + 1
    return [int(n) for n in np.diff([0, *cuts, total])]


def _sentinels(vocabulary: Mapping[str, int], count: int) -> list[int]:
    names = [f"<extra_id_{i}>" for i in range(count)]
    if names[-1] not in vocabulary:
        raise ConfigError(f"the tokenizer has no {names[-1]}, which spans of this length need; use shorter spans.")
    return [vocabulary[name] for name in names]
