"""Features: what is cut and what never is, verbalisers, and the laws of collation."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import ConfigError
from bench.tasks.catalogue import TASKS
from bench.tasks.data import Example
from bench.tasks.encoding import encode, verbaliser_ids
from bench.tasks.features import Feature, collate
from bench.tasks.prompts import SENTINEL, fill
from tests.tiny import WORDS, bert_tokenizer, t5_tokenizer

SST2, RTE, SQUAD = TASKS["sst2"], TASKS["rte"], TASKS["squad"]
SENTENCES = st.builds(
    lambda n, seed: " ".join(random.Random(seed).choices(WORDS, k=n)), st.integers(0, 90), st.integers(0, 10**6)
)


def example(text: str, pair: str | None = None, label: float | None = 1) -> Example:
    return Example("x", text, pair, label)


def test_a_short_prompt_is_the_template_filled() -> None:
    tokenizer = t5_tokenizer()
    (feature,) = encode([example("the film was great")], SST2, tokenizer, "t5")
    assert feature["input_ids"] == tokenizer(f"sentence: the film was great It was {SENTINEL}.")["input_ids"]
    assert feature["labels"] == 1 and "decoder_input_ids" not in feature


@settings(max_examples=60, deadline=None)
@given(SENTENCES, SENTENCES, st.integers(90, 130))
def test_only_texts_are_cut_from_a_long_prompt_and_the_longest_first(first: str, second: str, length: int) -> None:
    tokenizer = t5_tokenizer()
    whole = tokenizer(fill(RTE.prompt, first, second))["input_ids"]
    (feature,) = encode([example(first, second)], RTE, tokenizer, "t5", length)
    ids = feature["input_ids"]
    assert len(ids) == min(len(whole), length)
    head, rest = RTE.prompt.split("{text}")
    middle, tail = rest.split("{text_pair}")
    text = tokenizer.decode(ids[:-1]).replace(f" {SENTINEL} ", f" {SENTINEL}")
    assert text.startswith(head)
    assert text.endswith(tail)
    left, right = text[len(head) : len(text) - len(tail)].split(middle.rstrip(" "))
    assert first.startswith(left) and second.startswith(right.strip(" "))
    kept = [len(tokenizer.tokenize(t)) for t in (left, right)]
    cut = [n < len(tokenizer.tokenize(t)) for n, t in zip(kept, (first, second), strict=True)]
    assert not cut[0] or kept[0] >= kept[1] - 1, "a text that was cut is not the shorter one"
    assert not cut[1] or kept[1] >= kept[0] - 1, "a text that was cut is not the shorter one"
    assert ids.count(tokenizer.convert_tokens_to_ids(SENTINEL)) == 1 and ids[-1] == 1


def test_a_cut_that_parts_tokens_at_the_seam_is_cut_again() -> None:
    tokenizer = t5_tokenizer()
    # "re" and the template's "d" are one token; with a letter of "re" gone they are three.
    spec = SST2.model_copy(update={"prompt": f"{{text}}d day {SENTINEL}"})
    (feature,) = encode([example("the cat re")], spec, tokenizer, "t5", 6)
    assert tokenizer.convert_ids_to_tokens(feature["input_ids"]) == ["▁the", "d", "▁day", "▁", SENTINEL, "</s>"]


def test_a_template_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="alone is longer than max_length = 8"):
        encode([example("the cat", "the dog")], RTE, t5_tokenizer(), "t5", 8)


def test_a_text_that_spells_slots_or_special_tokens_stays_text() -> None:
    assert fill("{text} | {text_pair}", "{text_pair}", "{text}") == "{text_pair} | {text}"
    t5, bert = t5_tokenizer(), bert_tokenizer()
    (feature,) = encode([example(f"the </s> cat {SENTINEL} <pad>")], SST2, t5, "t5")
    special = [i for i in feature["input_ids"] if i in t5.all_special_ids]
    assert special == [t5.convert_tokens_to_ids(SENTINEL), t5.eos_token_id]
    (feature,) = encode([example("the [SEP] cat [PAD] [MASK]")], SST2, bert, "bert")
    assert [i for i in feature["input_ids"] if i in bert.all_special_ids] == [bert.cls_token_id, bert.sep_token_id]


def test_bert_pairs_have_segments_and_lose_the_end_of_the_longer_text() -> None:
    tokenizer = bert_tokenizer()
    (feature,) = encode([example("the cat", "dog " * 50)], RTE, tokenizer, "bert", 20)
    tokens = tokenizer.convert_ids_to_tokens(feature["input_ids"])
    assert tokens == ["[CLS]", "the", "cat", "[SEP]", *["dog"] * 15, "[SEP]"]
    assert feature["token_type_ids"] == [0] * 4 + [1] * 16


def test_generated_answers_are_predicted_from_the_tokens_before() -> None:
    tokenizer = t5_tokenizer()
    question = Example("q", "who saw", "the cat saw", None, ("the cat", "cat"), (0, 4))
    (feature,) = encode([question], SQUAD, tokenizer, "t5")
    target = tokenizer("the cat")["input_ids"]
    assert tokenizer.decode(feature["input_ids"][:-1]) == "question: who saw context: the cat saw"
    assert feature["labels"] == target and target[-1] == tokenizer.eos_token_id
    assert feature["decoder_input_ids"] == [0, *target[:-1]]


def test_no_examples_give_no_features() -> None:
    assert encode([], RTE, bert_tokenizer(), "bert") == []


def test_verbalisers_are_the_tokens_that_follow_the_sentinel() -> None:
    tokenizer = t5_tokenizer()
    assert tokenizer.convert_ids_to_tokens(verbaliser_ids(TASKS["mnli"], tokenizer)) == ["▁yes", "▁maybe", "▁no"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("bad", "splendid"), r"label word 'splendid' of task 'sst2' is 9 tokens \(▁ s p l e n d i d\)"),
        (("good", "good"), r"is the same token \(▁good\) as 'good'"),
        (("bad", "ü"), "is 2 tokens|is unknown"),
        ((), "has no label_words"),
    ],
)
def test_a_word_that_is_no_token_of_its_own_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verbaliser_ids(SST2.model_copy(update={"label_words": words}), t5_tokenizer())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=12), min_size=1, max_size=6))
def test_collation_pads_on_the_right_and_loses_nothing(rows: list[list[int]]) -> None:
    batch = collate([Feature(input_ids=row, token_type_ids=[1] * len(row), labels=0) for row in rows], pad_token_id=3)
    assert batch["input_ids"].shape == (len(rows), max(map(len, rows)))
    for i, row in enumerate(rows):
        n = len(row)
        assert batch["input_ids"][i, :n].tolist() == row
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert set(batch["input_ids"][i, n:].tolist()) <= {3}
        assert batch["token_type_ids"][i].sum() == n


def test_labels_have_the_type_of_their_task() -> None:
    classes = collate([Feature(input_ids=[1], labels=2), Feature(input_ids=[1], labels=0)], 0)["labels"]
    numbers = collate([Feature(input_ids=[1], labels=2.0), Feature(input_ids=[1], labels=0.5)], 0)["labels"]
    targets = collate(
        [
            Feature(input_ids=[1], labels=[7, 1], decoder_input_ids=[0, 7]),
            Feature(input_ids=[1], labels=[1], decoder_input_ids=[0]),
        ],
        pad_token_id=4,
    )
    assert (classes.dtype, classes.tolist()) == (torch.int64, [2, 0])
    assert (numbers.dtype, numbers.tolist()) == (torch.float32, [2.0, 0.5])
    assert targets["labels"].tolist() == [[7, 1], [1, -100]]
    assert targets["decoder_input_ids"].tolist() == [[0, 7], [0, 4]]
    spans = collate([Feature(input_ids=[1], start_positions=1, end_positions=2)], 0)
    assert (spans["start_positions"].tolist(), spans["end_positions"].tolist()) == ([1], [2])
