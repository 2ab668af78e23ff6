"""The tiny tokenizers and shapes of `bench.testing`, under the name that these tests know."""

from bench.testing.tiny import SENTINELS, WORDS, bert_tokenizer, t5_tokenizer, tiny_bert_config, tiny_t5_config

__all__ = ["SENTINELS", "WORDS", "bert_tokenizer", "t5_tokenizer", "tiny_bert_config", "tiny_t5_config"]
