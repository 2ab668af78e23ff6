"""A model from folders: what it reads, what it answers, what it takes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForQuestionAnswering, BertForSequenceClassification

from bench.errors import BackboneError, ConfigError, DataError, PluginError
from bench.serving.resident import ResidentModel
from bench.tasks.catalogue import resolve_task
from bench.tasks.spec import TaskSpec
from tests.checkpoints import Family, random_plugin, task_file, tiny_checkpoint

WORDS = ("good film", "bad", "a film that is good and bad")
PAIR = {"kind": "pair", "text_pair": "other", "prompt": '"{text} {text_pair} <extra_id_0>"'}
QUESTIONS = {"kind": "qa", "text": "other", "text_pair": "text", "label": "answer", "labels": None,
             "prompt": '"{text} {text_pair}"'}  # fmt: skip
NUMBERS = {"kind": "regression", "label": "number", "labels": None, "label_words": '["0", "1", "2", "3"]'}


def task_of(folder: Path, **settings: Any) -> TaskSpec:
    return resolve_task(str(task_file(folder / "task", **settings)))


def resident(folder: Path, family: Family, task: TaskSpec) -> ResidentModel:
    """Return a tiny model with a head for the task and plugins for k = 2 and 4."""
    checkpoint = tiny_checkpoint(folder / "model", family)
    if family == "bert":
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(
            checkpoint, num_labels=task.n_outputs, ignore_mismatched_sizes=True
        )
        model.save_pretrained(checkpoint)
    bare = ResidentModel(str(checkpoint), [], task)
    plugins = [folder / f"k{k}" for k in (2, 4)]
    for k, plugin in zip((2, 4), plugins, strict=True):
        random_plugin(bare.model.model, k).save_pretrained(plugin)
    return ResidentModel(str(checkpoint), list(map(str, plugins)), task)


@pytest.fixture
def bert(tmp_path: Path) -> ResidentModel:
    return resident(tmp_path, "bert", task_of(tmp_path))


@pytest.mark.parametrize(
    ("family", "kind"),
    # the tiny T5 has no tokens for the numbers of a regression
    [("bert", kind) for kind in ("single", "pair", "regression", "qa")] + [("t5", k) for k in ("single", "pair", "qa")],
)
def test_every_kind_is_answered_at_every_k_and_timed(tmp_path: Path, family: Family, kind: str) -> None:
    settings = {"single": {}, "pair": PAIR, "regression": NUMBERS, "qa": QUESTIONS}[kind]
    if (family, kind) == ("bert", "qa"):
        task, checkpoint = task_of(tmp_path, **settings), tiny_checkpoint(tmp_path / "model", "bert")
        BertForQuestionAnswering.from_pretrained(checkpoint).save_pretrained(checkpoint)
        with pytest.raises(ConfigError, match="put together from several inputs"):
            ResidentModel(str(checkpoint), [], task)
        return
    task = task_of(tmp_path, **settings)
    served = resident(tmp_path, family, task)
    texts = [{"text": text} | ({"text_pair": "a film"} if task.text_pair else {}) for text in WORDS]
    features = [served.read(fields) for fields in texts]
    for k in (4, 1, 2):
        together = served.answer(k, features)
        alone = [served.answer(k, [feature])[0] for feature in features]
        if kind == "regression":
            np.testing.assert_allclose([a["answer"] for a in together], [a["answer"] for a in alone], atol=1e-4)
        else:
            assert together == alone
            assert {type(value) for answer in together for value in answer.values()} == {str}
        json.dumps(together)
    times = served.calibrate(2)
    assert times.ks == (1, 2, 4)
    assert all((times(k, np.array([1, 2]), np.array([task.max_length])) > 0).all() for k in times.ks)


def test_a_request_is_encoded_as_transformers_does(bert: ResidentModel, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in WORDS:
        expected = tokenizer(text, truncation=True, max_length=bert.task.max_length)["input_ids"]
        assert bert.read({"text": text})["input_ids"] == expected
        assert bert.read_json(json.dumps({"text": text}).encode())["input_ids"] == expected


def test_texts_go_by_the_general_names_or_by_the_tasks_own(tmp_path: Path) -> None:
    """Where the task's second text is called ``text`` too."""
    task = task_of(tmp_path, **PAIR).model_copy(update={"text": "title", "text_pair": "text"})
    served = resident(tmp_path, "bert", task)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = tokenizer("good", "bad film")["input_ids"]
    assert served.read({"text": "good", "text_pair": "bad film"})["input_ids"] == expected
    assert served.read({"title": "good", "text": "bad film"})["input_ids"] == expected
    with pytest.raises(DataError, match="the field 'text' is missing"):
        served.read({"title": "good", "text_pair": "bad"})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{good", "no JSON"),
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'["good"]', "found list"),
        (b"{}", 'the field \'text\' is missing; expected JSON such as {"text": "..."}'),
        (b'{"txt": "good"}', "the field 'text' is missing"),
        (b'{"text": "good", "txet": "bad"}', "unknown field 'txet'. Did you mean 'text'?"),
        (b'{"text": "good", "\\ud800": "bad"}', "unknown field"),
        (b'{"text": "\\ud800"}', "the field 'text' is no text"),
        (b'{"text": 3}', "the field 'text' is no text"),
    ],
)
def test_what_cannot_be_read_says_what_was_expected(bert: ResidentModel, body: bytes, said: str) -> None:
    with pytest.raises(DataError) as refused:
        bert.read_json(body)
    assert said in str(refused.value)
    str(refused.value).encode()


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    task, checkpoint = task_of(tmp_path), tiny_checkpoint(tmp_path / "bert", "bert")
    BertForSequenceClassification.from_pretrained(checkpoint).bert.save_pretrained(checkpoint)
    with pytest.raises(BackboneError, match="holds no head"):
        ResidentModel(str(checkpoint), [], task)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    task, checkpoint = task_of(tmp_path), tiny_checkpoint(tmp_path / "bert", "bert")
    BertForSequenceClassification.from_pretrained(
        checkpoint, num_labels=3, ignore_mismatched_sizes=True
    ).save_pretrained(checkpoint)
    with pytest.raises(BackboneError, match="3 outputs, and mood 2"):
        ResidentModel(str(checkpoint), [], task)


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    task, checkpoint = task_of(tmp_path), tiny_checkpoint(tmp_path / "bert", "bert")
    model = BertForSequenceClassification.from_pretrained(checkpoint)
    for labels, fits in ((task.labels, True), (task.labels[::-1], False)):
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
        model.save_pretrained(checkpoint)
        if fits:
            assert ResidentModel(str(checkpoint), [], task).ks == (1,)
            continue
        with pytest.raises(BackboneError, match="their order counts"):
            ResidentModel(str(checkpoint), [], task)


def test_inputs_beyond_the_positions_are_refused(bert: ResidentModel) -> None:
    longer = bert.task.model_copy(update={"max_length": 10_000})
    with pytest.raises(BackboneError, match="inputs may have 10000"):
        ResidentModel(bert.name, [], longer)


def test_plugins_of_one_k_are_refused(bert: ResidentModel) -> None:
    with pytest.raises(PluginError, match="have k=2"):
        ResidentModel(bert.name, [bert.sources[0], bert.sources[0]], bert.task)
