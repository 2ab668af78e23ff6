"""Predictions of a model on a split, and the metrics of them with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.errors import Diverged
from bench.results import Evaluation
from bench.tasks.encoding import Family
from bench.tasks.features import Feature, collate
from bench.tasks.metrics import bootstrap, token_f1
from bench.tasks.spec import TaskSpec
from bench.tasks.windows import best_answers

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from bench.tasks.data import Example

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MAX_NEW_TOKENS = 32
EVALUATION_BATCH_SIZE = 32


@dataclass(frozen=True)
class Predictions:
    """What a model says of each example, in the order of the examples.

    Attributes
    ----------
    values
        Class ids, numbers or answers.
    scores
        Probability of the predicted class; the number itself; for an encoder's answer the sum of its two logits.
        ``None`` for generated answers.
    """

    values: list[int] | list[float] | list[str]
    scores: list[float] | None


def batches(features: Sequence[Feature], batch_size: int) -> list[list[int]]:
    """Return the indices of the evaluated batches: sorted by length, longest first, so that padding is small."""
    order = sorted(range(len(features)), key=lambda i: (-len(features[i]["input_ids"]), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def predict(
    model: nn.Module,
    features: Sequence[Feature],
    spec: TaskSpec,
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = EVALUATION_BATCH_SIZE,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Predictions:
    """Run a model over a split, in evaluation mode and without gradients; the modes of its modules are restored.

    Parameters
    ----------
    model
        Called as ``model(input_ids=, attention_mask=, token_type_ids=)`` (the last for BERT only), it returns an object
        with ``logits``: (batch, classes), for regression (batch, 1), for an encoder's qa (batch, n, 2). For
        text-to-text qa it has ``generate``.
    features
        Output of `bench.tasks.encoding.encode`.
    spec, family, tokenizer
        The task, and the backbone's family and tokenizer.
    batch_size
        Largest number of features at a time.
    device
        Where the model is.
    on_batch
        Called after each batch with the number of features in it.

    Raises
    ------
    Diverged
        If a logit is not finite.
    """
    generates = spec.kind == "qa" and family == "t5"
    outputs: list[Any] = [None] * len(features)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            for indices in batches(features, batch_size):
                batch = collate([features[i] for i in indices], tokenizer.pad_token_id)
                inputs = {name: batch[name].to(device) for name in MODEL_INPUTS if name in batch}
                rows = _generate(model, inputs, tokenizer) if generates else _logits(model, inputs)
                for i, row in zip(indices, rows, strict=True):
                    outputs[i] = row
                if on_batch is not None:
                    on_batch(len(indices))
    finally:
        for module, training in modes:
            module.training = training
    return _decode(outputs, features, spec, generates)


def _generate(model: Any, inputs: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> NDArray[np.float32]:
    logits = model(**inputs).logits.float()
    if not torch.isfinite(logits).all():
        raise Diverged("the model's logits are not finite on a batch of the evaluation.")
    return np.asarray(logits.cpu().numpy())


def _decode(outputs: list[Any], features: Sequence[Feature], spec: TaskSpec, generated: bool) -> Predictions:
    if generated:
        return Predictions(outputs, None)
    if spec.kind == "qa":
        answers = best_answers(features, outputs)
        return Predictions([text for text, _ in answers], [score for _, score in answers])
    logits = np.stack(outputs).astype(np.float64)
    if spec.kind == "regression":
        return Predictions(logits[:, 0].tolist(), logits[:, 0].tolist())
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return Predictions(logits.argmax(1).tolist(), (odds.max(1) / odds.sum(1)).tolist())


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    features: Sequence[Feature],
    spec: TaskSpec,
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Literal["selection", "dev"] = "dev",
    batch_size: int = EVALUATION_BATCH_SIZE,
    device: torch.device | str = "cpu",
    resamples: int = 1000,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[Evaluation, pd.DataFrame]:
    """Evaluate a model on a split.

    Parameters
    ----------
    model, features, spec, family, tokenizer, batch_size, device, on_batch
        As for `predict`.
    examples
        The examples that ``features`` were made of, in the same order.
    split
        What the split is called in the result.
    resamples
        Bootstrap resamples of each interval.

    Returns
    -------
    tuple
        The metrics, and one row an example: ``id``; ``prediction`` and ``label`` (class ids, numbers, or the answer
        and the list of accepted ones); ``score`` (probability of the predicted class, the number, or the answer's
        token F1).

    Raises
    ------
    Diverged
        If a logit is not finite.
    """
    import pandas as pd

    predictions = predict(model, features, spec, family, tokenizer, batch_size, device, on_batch)
    references: list[Any] = [list(e.answers) if spec.kind == "qa" else e.label for e in examples]
    metrics = {name: bootstrap(name, predictions.values, references, resamples) for name in spec.metrics}
    scores: Sequence[float] | None = predictions.scores
    if spec.kind == "qa":
        pairs = zip(predictions.values, references, strict=True)
        scores = [max(token_f1(str(text), answer) for answer in accepted) for text, accepted in pairs]
    frame = pd.DataFrame(
        {
            "id": [example.id for example in examples],
            "prediction": predictions.values,
            "label": references,
            "score": scores,
        }
    )
    return Evaluation(split=split, n_examples=len(examples), metrics=metrics), frame
