"""Examples as token ids for a family of backbones, and the tokens that stand for classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from bench.errors import ConfigError
from bench.tasks.features import Feature, collate, with_targets
from bench.tasks.prompts import SENTINEL, defuse, fill_prompts
from bench.tasks.spec import TaskSpec
from bench.tasks.windows import windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bench.tasks.data import Example

__all__ = ["Family", "Feature", "collate", "encode", "verbaliser_ids", "with_targets"]

Family = Literal["bert", "t5"]


def encode(
    examples: Sequence[Example],
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    max_length: int | None = None,
) -> list[Feature]:
    """Turn examples into features.

    BERT gets ``[CLS] text [SEP]`` or ``[CLS] text [SEP] text_pair [SEP]``, the longer text cut first; in qa a context
    that does not fit becomes several overlapping windows, each a feature. T5 gets the task's prompt, in which only the
    texts are cut, the longest first. Its classification and regression features hold no decoder input: the model adds
    it.

    Parameters
    ----------
    examples
        One split.
    spec
        The task.
    tokenizer
        The backbone's, a fast one.
    family
        ``"bert"`` or ``"t5"``.
    max_length
        Longest input in tokens, special tokens included; ``None`` for the task's own.

    Raises
    ------
    ConfigError
        If ``max_length`` leaves no room for the texts.
    """
    length = max_length or spec.max_length
    if not examples:
        return []
    if family == "bert" and spec.kind == "qa":
        return windows(examples, tokenizer, length)
    features = (
        _bert_features(examples, tokenizer, length)
        if family == "bert"
        else [Feature(input_ids=ids) for ids in fill_prompts(examples, spec.prompt, tokenizer, length)]
    )
    if spec.kind == "qa":
        targets = tokenizer([defuse(example.answers[0], tokenizer) for example in examples])["input_ids"]
        return [with_targets(feature, target) for feature, target in zip(features, targets, strict=True)]
    for feature, example in zip(features, examples, strict=True):
        if example.label is not None:
            feature["labels"] = example.label
    return features


def _bert_features(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Feature]:
    texts = [defuse(example.text, tokenizer) for example in examples]
    pairs = [defuse(example.text_pair or "", tokenizer) for example in examples]
    encoded = tokenizer(
        texts,
        None if examples[0].text_pair is None else pairs,
        truncation="longest_first",
        max_length=max_length,
        return_token_type_ids=True,
        return_attention_mask=False,
    )
    return [
        Feature(input_ids=ids, token_type_ids=types)
        for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
    ]


def verbaliser_ids(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that stands for each class in a text-to-text backbone, as it follows ``<extra_id_0>``.

    Raises
    ------
    ConfigError
        If the task has no label words, or one is not a single known token, or two share a token.
    """
    if not spec.label_words:
        raise ConfigError(
            f"task '{spec.name}' has no label_words, which a text-to-text backbone needs: one word a class, or for "
            'regression the numbers that span the range, e.g. ["0", "1", "2", "3", "4", "5"].'
        )
    ids: list[int] = []
    for word in spec.label_words:
        _, *tokens = tokenizer(f"{SENTINEL} {word}", add_special_tokens=False)["input_ids"]
        pieces = " ".join(tokenizer.convert_ids_to_tokens(tokens))
        problem = None
        if len(tokens) != 1:
            problem = f"is {len(tokens)} tokens ({pieces})"
        elif tokens[0] == tokenizer.unk_token_id:
            problem = "is unknown"
        elif tokens[0] in ids:
            problem = f"is the same token ({pieces}) as '{spec.label_words[ids.index(tokens[0])]}'"
        if problem:
            raise ConfigError(
                f"label word '{word}' of task '{spec.name}' {problem} in this backbone's vocabulary; each class needs "
                "a token of its own. Set label_words to short everyday words such as yes, no, maybe, good, bad."
            )
        ids.append(tokens[0])
    return ids
