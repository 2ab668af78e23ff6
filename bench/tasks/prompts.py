"""Prompts of text-to-text backbones: filled, and where too long cut in the texts alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bench.tasks.data import Example

SENTINEL = "<extra_id_0>"
_SLOT = re.compile(r"(\{text\}|\{text_pair\})")


def defuse(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Break up what in a text is spelled like a special token, so that it stays text."""
    for token in tokenizer.all_special_tokens if "<" in text or "[" in text else ():
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def token_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return where each token of a text ends, in characters."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [end for _, end in encoded["offset_mapping"]]


def fill(prompt: str, text: str, text_pair: str | None) -> str:
    """Put the texts into a template, in one pass: a text that itself says ``{text_pair}`` stays as it is."""
    values = {"{text}": text, "{text_pair}": text_pair or ""}
    return "".join(values.get(part, part) for part in _SLOT.split(prompt))


def fill_prompts(
    examples: Sequence[Example], prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[int]]:
    """Fill a template and tokenise it.

    Parameters
    ----------
    examples
        One split.
    prompt
        Template with ``{text}`` and ``{text_pair}``.
    tokenizer
        The backbone's, a fast one.
    max_length
        Longest input in tokens; where it is exceeded the longest text loses its end, and the template stays whole.

    Returns
    -------
    list
        Token ids with the final end-of-sequence token, one list an example.

    Raises
    ------
    ConfigError
        If the template alone is longer than ``max_length``.
    """
    texts = [[defuse(t, tokenizer) for t in (e.text, e.text_pair) if t is not None] for e in examples]
    encoded: list[list[int]] = tokenizer([_filled(prompt, parts) for parts in texts], verbose=False)["input_ids"]
    return [
        ids if len(ids) <= max_length else _shorten(prompt, parts, len(ids) - max_length, tokenizer, max_length)
        for ids, parts in zip(encoded, texts, strict=True)
    ]


def _filled(prompt: str, parts: Sequence[str]) -> str:
    return fill(prompt, parts[0], parts[1] if len(parts) > 1 else None)


def _shorten(
    prompt: str, parts: Sequence[str], overflow: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[int]:
    ends = [token_ends(part, tokenizer) for part in parts]
    keep = [len(e) for e in ends]
    ids: list[int] = []
    # Tokens at the seams with the template may join or part, so that one pass need not be enough.
    while overflow > 0:
        for _ in range(overflow):
            longest = keep.index(max(keep))
            if keep[longest] == 0:
                raise ConfigError(f"the prompt {prompt!r} alone is longer than max_length = {max_length} tokens.")
            keep[longest] -= 1
        cut = [part[: e[k - 1] if k else 0] for part, e, k in zip(parts, ends, keep, strict=True)]
        ids = tokenizer(_filled(prompt, cut))["input_ids"]
        overflow = len(ids) - max_length
    return ids
