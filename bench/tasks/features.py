"""What a model is fed: one feature an input, and features stacked into padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
T5_START_ID = 0


class Feature(TypedDict):
    """One input of a model; every list is as long as the input or the target, without padding.

    Keys
    ----
    input_ids, token_type_ids
        Token ids with special tokens; the segment of each token (BERT).
    labels
        Class id, number, or target ids (text-to-text qa and pre-training).
    decoder_input_ids
        Target ids shifted right, where ``labels`` are target ids.
    start_positions, end_positions
        First and last token of the answer (BERT qa); both 0 where this window lacks it.
    example, context, context_start, offsets
        BERT qa: which example the window belongs to, its context, the index of the first of the window's tokens that is
        in the context, and for it and each one after it in the context the characters that it covers, (m, 2).
    """

    input_ids: list[int]
    token_type_ids: NotRequired[list[int]]
    labels: NotRequired[int | float | list[int]]
    decoder_input_ids: NotRequired[list[int]]
    start_positions: NotRequired[int]
    end_positions: NotRequired[int]
    example: NotRequired[int]
    context: NotRequired[str]
    context_start: NotRequired[int]
    offsets: NotRequired[NDArray[np.int32]]


def with_targets(feature: Feature, targets: list[int]) -> Feature:
    """Add target ids and, shifted right behind T5's start token, the decoder input that predicts them."""
    return {**feature, "labels": targets, "decoder_input_ids": [T5_START_ID, *targets[:-1]]}


def collate(features: Sequence[Feature], pad_token_id: int) -> dict[str, Tensor]:
    """Stack features, padded on the right to the longest of them.

    Parameters
    ----------
    features
        A batch, all with the same keys.
    pad_token_id
        What fills ``input_ids`` and ``decoder_input_ids``.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` (batch, n) int64, and what the features have of ``token_type_ids``
        (batch, n; padded with 0), ``labels`` ((batch,) int64 or float32; target ids (batch, m) padded with -100),
        ``decoder_input_ids`` (batch, m), ``start_positions`` and ``end_positions`` (batch,).
    """
    inputs = [feature["input_ids"] for feature in features]
    batch = {
        "input_ids": _padded(inputs, pad_token_id),
        "attention_mask": _padded([[1] * len(ids) for ids in inputs], 0),
    }
    if "token_type_ids" in features[0]:
        batch["token_type_ids"] = _padded([feature["token_type_ids"] for feature in features], 0)
    if "decoder_input_ids" in features[0]:
        batch["decoder_input_ids"] = _padded([feature["decoder_input_ids"] for feature in features], pad_token_id)
    if "start_positions" in features[0]:
        batch["start_positions"] = torch.tensor([feature["start_positions"] for feature in features])
        batch["end_positions"] = torch.tensor([feature["end_positions"] for feature in features])
    if "labels" in features[0]:
        batch["labels"] = _labels([feature["labels"] for feature in features])
    return batch


def _padded(rows: Sequence[list[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64)


def _labels(labels: list[int | float | list[int]]) -> Tensor:
    if isinstance(labels[0], list):
        return _padded([ids for ids in labels if isinstance(ids, list)], IGNORED)
    return torch.tensor(labels, dtype=torch.float32 if isinstance(labels[0], float) else torch.int64)
