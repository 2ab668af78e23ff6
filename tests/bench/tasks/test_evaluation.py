"""Evaluation runs the real thing: order, padding, modes, decoding and metrics."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertForSequenceClassification, T5ForConditionalGeneration

from bench.errors import Diverged
from bench.tasks.catalogue import TASKS
from bench.tasks.data import Example
from bench.tasks.encoding import encode
from bench.tasks.evaluation import batches, evaluate, predict
from bench.tasks.features import Feature, collate
from bench.tasks.metrics import compute
from bench.tasks.spec import Source, TaskSpec
from tests.tiny import WORDS, bert_tokenizer, t5_tokenizer, tiny_bert_config, tiny_t5_config

RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, size=int(n))) for n in RNG.integers(1, 40, 23)]
EXAMPLES = [Example(f"dev-{i}", text, None, i % 2) for i, text in enumerate(TEXTS)]
SST2, SQUAD = TASKS["sst2"], TASKS["squad"]
REGRESSION = TaskSpec(
    name="r", kind="regression", text="t", prompt="", metrics=("pearson", "spearman"), source=Source()
)


class Counter(nn.Module):
    """Its logits are a known function of the real tokens; it notes the shapes that it is given."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs, self.shapes, self.frozen = outputs, [], nn.Dropout().eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> object:
        assert not self.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(input_ids.shape))
        total = (input_ids * attention_mask).sum(1).float() / 100
        return SimpleNamespace(logits=torch.stack([torch.sin(total * (c + 1)) for c in range(self.outputs)], 1))


def expected_logits(features: list[Feature], outputs: int) -> np.ndarray:
    totals = np.array([sum(f["input_ids"]) / 100 for f in features])
    return np.stack([np.sin(totals * (c + 1)) for c in range(outputs)], 1)


def test_predictions_come_back_in_order_with_their_probabilities() -> None:
    features = encode(EXAMPLES, SST2, bert_tokenizer(), "bert")
    model = Counter(2).train()
    model.frozen.eval()
    done: list[int] = []
    evaluation, frame = evaluate(
        model, EXAMPLES, features, SST2, "bert", bert_tokenizer(), batch_size=5, on_batch=done.append, resamples=50
    )
    logits = expected_logits(features, 2)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert frame["id"].tolist() == [e.id for e in EXAMPLES]
    assert frame["label"].tolist() == [e.label for e in EXAMPLES]
    assert frame["prediction"].tolist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(frame["score"], probabilities.max(1), atol=1e-5)
    assert evaluation.n_examples == 23 and evaluation.split == "dev"
    accuracy = float((frame["prediction"] == frame["label"]).mean())
    assert evaluation.metrics["accuracy"].value == pytest.approx(accuracy)
    assert evaluation.metrics["accuracy"].resamples == 50
    assert done == [5, 5, 5, 5, 3]
    assert model.training and not model.frozen.training, "the modes of the modules must be as before"


def test_batches_are_sorted_by_length_and_padded_no_further_than_needed() -> None:
    features = encode(EXAMPLES, SST2, bert_tokenizer(), "bert")
    lengths = [len(f["input_ids"]) for f in features]
    made = batches(features, 5)
    assert sorted(i for batch in made for i in batch) == list(range(23))
    assert [lengths[i] for batch in made for i in batch] == sorted(lengths, reverse=True)
    model = Counter(2)
    predict(model, features, SST2, "bert", bert_tokenizer(), batch_size=5)
    assert model.shapes == [(len(batch), max(lengths[i] for i in batch)) for batch in made]


def test_regression_gives_the_number() -> None:
    examples = [Example(str(i), text, None, float(i)) for i, text in enumerate(TEXTS)]
    features = encode(examples, REGRESSION, bert_tokenizer(), "bert")
    evaluation, frame = evaluate(Counter(1), examples, features, REGRESSION, "bert", bert_tokenizer(), resamples=20)
    expected = expected_logits(features, 1)[:, 0]
    np.testing.assert_allclose(frame["prediction"], expected, atol=1e-5)
    assert frame["score"].tolist() == frame["prediction"].tolist()
    correlation = np.corrcoef(expected, np.arange(23))[0, 1]
    assert evaluation.metrics["pearson"].value == pytest.approx(correlation, abs=1e-5)


def test_a_real_encoder_gives_the_same_alone_as_in_a_batch() -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert_config(num_labels=2))
    features = encode(EXAMPLES, SST2, bert_tokenizer(), "bert")
    together = predict(model, features, SST2, "bert", bert_tokenizer(), batch_size=8)
    alone = predict(model, features, SST2, "bert", bert_tokenizer(), batch_size=1)
    assert together.values == alone.values
    np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)


class SpanModel(nn.Module):
    """Adapts transformers' question answering head to the contract: start and end logits in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = BertForQuestionAnswering(tiny_bert_config())

    def forward(self, **inputs: Tensor) -> object:
        output = self.model(**inputs)
        return SimpleNamespace(logits=torch.stack([output.start_logits, output.end_logits], -1))


QUESTIONS = [
    Example("q0", "who saw the dog", "the cat saw the dog and the bird", None, ("the cat", "cat"), (0, 4)),
    Example("q1", "what was red", "the house was red " * 12, None, ("the house",), (0,)),
]


def test_an_encoder_that_learnt_two_answers_gives_them() -> None:
    torch.manual_seed(0)
    tokenizer, model = bert_tokenizer(), SpanModel()
    features = encode(QUESTIONS, SQUAD, tokenizer, "bert", 40)
    assert len(features) > 2
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    batch = collate(features, tokenizer.pad_token_id)
    for _ in range(60):
        loss = model.model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    evaluation, frame = evaluate(model, QUESTIONS, features, SQUAD, "bert", tokenizer, resamples=10)
    assert frame["prediction"].tolist() == ["the cat", "the house"]
    assert [list(x) for x in frame["label"]] == [["the cat", "cat"], ["the house"]]
    assert frame["score"].tolist() == [1.0, 1.0]
    assert evaluation.metrics["exact_match"].value == 1 and list(evaluation.metrics) == ["token_f1", "exact_match"]


def test_a_text_to_text_model_that_learnt_two_answers_generates_them() -> None:
    torch.manual_seed(0)
    tokenizer, model = t5_tokenizer(), T5ForConditionalGeneration(tiny_t5_config(dropout_rate=0.0))
    features = encode(QUESTIONS, SQUAD, tokenizer, "t5")
    batch = collate(features, tokenizer.pad_token_id)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model(**batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    _, frame = evaluate(model, QUESTIONS, features, SQUAD, "t5", tokenizer, resamples=10)
    assert frame["prediction"].tolist() == ["the cat", "the house"]
    assert frame["score"].tolist() == [1.0, 1.0]


def test_logits_that_are_not_finite_are_a_divergence_and_modes_are_restored() -> None:
    class Broken(Counter):
        def forward(self, *args: Tensor, **inputs: Tensor) -> object:
            output = super().forward(*args, **inputs)
            output.logits[0, 0] = float("nan")
            return output

    model = Broken(2).train()
    features = encode(EXAMPLES, SST2, bert_tokenizer(), "bert")
    with pytest.raises(Diverged, match="not finite"):
        predict(model, features, SST2, "bert", bert_tokenizer())
    assert model.training


def test_predictions_survive_parquet_and_still_give_the_metric(tmp_path) -> None:
    import pandas as pd

    features = encode(EXAMPLES, SST2, bert_tokenizer(), "bert")
    evaluation, frame = evaluate(Counter(2), EXAMPLES, features, SST2, "bert", bert_tokenizer(), resamples=10)
    frame.to_parquet(tmp_path / "p.parquet")
    back = pd.read_parquet(tmp_path / "p.parquet")
    assert compute("accuracy", back.prediction, back.label) == pytest.approx(evaluation.metrics["accuracy"].value)
