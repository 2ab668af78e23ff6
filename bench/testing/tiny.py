"""Tokenizers and model shapes small enough for a test, made here: no checkpoint and no network is needed."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, T5Config

_TEXT = """
a an the it was is are of to in and or not he she they we you this that who what when where did does do
good bad great poor yes no maybe true false film review sentence question context text label premise claim
first second answer holds follow same say red green blue cat dog bird house river saw ran ate went home day night
"""
WORDS = tuple(_TEXT.split())
CHARACTERS = string.ascii_letters + string.digits + string.punctuation
SENTINELS = 100


@cache
def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Return a lower-casing WordPiece tokenizer that spells what it does not know."""
    letters = string.ascii_lowercase + string.digits
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *string.punctuation]
    pieces = [*dict.fromkeys(pieces), *(f"##{c}" for c in letters)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=512,
    )


@cache
def t5_tokenizer(more: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a Unigram tokenizer with T5's special tokens: pad 0, end 1, unknown 2, and 100 sentinels counting down.

    ``more`` are further words of one token each.
    """
    spelled = [("▁", -4.0), *((c, -8.0) for c in CHARACTERS)]
    words = [(f"▁{word}", -3.0) for word in (*(word for word in WORDS if len(word) > 1), *more)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *words, *spelled]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]
    tokenizer.add_special_tokens(sentinels)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
    )


def tiny_bert_config(**changes: Any) -> BertConfig:
    """Return a BERT of 2 layers, width 32, 4 heads, inner width 64, for `bert_tokenizer`."""
    shape = {
        "vocab_size": len(bert_tokenizer()),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
    }
    return BertConfig(**{**shape, **changes})


def tiny_t5_config(**changes: Any) -> T5Config:
    """Return a T5 of 2 + 2 layers, width 32, 4 heads of 8, inner width 64, for `t5_tokenizer`.

    ``feed_forward_proj`` may be ``"relu"`` (the default here) or ``"gated-gelu"``.
    """
    shape = {
        "vocab_size": len(t5_tokenizer()),
        "d_model": 32,
        "d_kv": 8,
        "num_heads": 4,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "feed_forward_proj": "relu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return T5Config(**{**shape, **changes})
