"""Extractive question answering with an encoder: overlapping windows of the context, and back to an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bench.tasks.features import Feature
from bench.tasks.prompts import defuse, token_ends

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from bench.tasks.data import Example

MAX_ANSWER_TOKENS = 30


def windows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Feature]:
    """Cut each example into windows ``[CLS] question [SEP] part of the context [SEP]``.

    Neighbouring windows share a third of ``max_length``; a question may take up another third. The answer's first and
    last token are those of the first accepted answer, or 0 and 0 (``[CLS]``) where it is not whole in the window.

    Parameters
    ----------
    examples
        One split.
    tokenizer
        The backbone's, a fast one.
    max_length
        Longest window in tokens.
    """
    third = max_length // 3
    contexts = [defuse(example.text_pair or "", tokenizer) for example in examples]
    encoded = tokenizer(
        [_cut(defuse(example.text, tokenizer), tokenizer, third) for example in examples],
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=third,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    features = []
    for row, example in enumerate(encoded["overflow_to_sample_mapping"]):
        segments = encoded.sequence_ids(row)
        first = segments.index(1) if 1 in segments else len(segments)
        offsets = np.array(encoded["offset_mapping"][row][first : first + segments.count(1)], np.int32).reshape(-1, 2)
        start, end = _labels(first, offsets, _answer_span(examples[example], contexts[example]))
        features.append(
            Feature(
                input_ids=encoded["input_ids"][row],
                token_type_ids=encoded["token_type_ids"][row],
                start_positions=start,
                end_positions=end,
                example=example,
                context=contexts[example],
                context_start=first,
                offsets=offsets,
            )
        )
    return features


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    ends = token_ends(text, tokenizer)
    return text if len(ends) <= length else text[: ends[length - 1]]


def _answer_span(example: Example, context: str) -> tuple[int, int] | None:
    """Return the characters of the first answer; of the occurrence nearest to its start where that is off."""
    answer, said = example.answers[0], example.answer_starts[0]
    starts = [match.start() for match in re.finditer(re.escape(answer), context)] if answer else []
    if not starts:
        return None
    start = min(starts, key=lambda s: abs(s - said))
    return start, start + len(answer)


def _labels(first: int, offsets: NDArray[np.int32], answer: tuple[int, int] | None) -> tuple[int, int]:
    if answer is None or not len(offsets) or offsets[0, 0] > answer[0] or offsets[-1, 1] < answer[1]:
        return 0, 0
    tokens = first + np.flatnonzero((offsets[:, 1] > answer[0]) & (offsets[:, 0] < answer[1]))
    return (int(tokens[0]), int(tokens[-1])) if len(tokens) else (0, 0)


def best_answers(features: Sequence[Feature], logits: Iterable[NDArray[np.float32]]) -> list[tuple[str, float]]:
    """Choose the best span of each example over all of its windows.

    A span is valid where it lies in the context, ends where it starts or later, and has at most 30 tokens.

    Parameters
    ----------
    features
        All windows of a split.
    logits
        For each window, start and end logits, (n, 2).

    Returns
    -------
    list
        For each example, the answer's text and the sum of its two logits; ``("", -inf)`` where no span is valid.
    """
    best = [("", -np.inf)] * (1 + max(feature["example"] for feature in features))
    for feature, window in zip(features, logits, strict=True):
        first, offsets = feature["context_start"], feature["offsets"]
        if not len(offsets):
            continue
        start, end = window[first : first + len(offsets)].T
        # Row i, column j: the span of tokens i to i + j.
        ends = np.pad(end, (0, MAX_ANSWER_TOKENS - 1), constant_values=-np.inf)
        scores = start[:, None] + np.lib.stride_tricks.sliding_window_view(ends, MAX_ANSWER_TOKENS)
        i, j = np.unravel_index(int(scores.argmax()), scores.shape)
        score = float(scores[i, j])
        if score > best[feature["example"]][1]:
            best[feature["example"]] = (feature["context"][offsets[i, 0] : offsets[i + j, 1]], score)
    return best
