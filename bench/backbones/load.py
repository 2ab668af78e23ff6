"""Weights and tokenizer of a checkpoint, with the head of a task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
)

from bench.backbones.model import EncoderTaskModel, TaskModel, TextToTextModel
from bench.backbones.source import fetch
from bench.backbones.spec import BackboneSpec
from bench.errors import BackboneError
from bench.tasks.encoding import verbaliser_ids
from bench.tasks.spec import TaskSpec

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# what a checkpoint may lack: heads, which are new where it has none of the task's shape
_NEW = ("classifier.", "qa_outputs.", "bert.pooler.")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "spiece.model")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of backbone ``name``.

    Raises
    ------
    BackboneError
        If it is missing, torn, or no fast one.
    """
    folder = fetch(name)
    # without a vocabulary transformers makes up a tokenizer of nothing but special tokens
    if not any((folder / vocabulary).is_file() for vocabulary in _VOCABULARIES):
        raise BackboneError(f"{folder} holds no tokenizer ({' or '.join(_VOCABULARIES)}); save it beside the weights")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare exceptions for a torn file
        raise BackboneError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise BackboneError(f"backbone '{name}' has no fast tokenizer (tokenizer.json), which this suite needs")
    return tokenizer


def load_task_model(
    name: str, spec: BackboneSpec, task: TaskSpec, tokenizer: PreTrainedTokenizerBase, seed: int
) -> TaskModel:
    """Load backbone ``name`` in fp32 with a head for ``task``.

    Parameters
    ----------
    name
        Built-in name, Hub id, or local folder.
    spec
        Its shape.
    task
        Decides on the head; T5 needs none. A head of the checkpoint that has the task's shape is kept.
    tokenizer
        Of the same backbone.
    seed
        Seeds the weights of a new head.

    Raises
    ------
    BackboneError
        If a file is missing or torn, or a weight of the backbone itself is not in the checkpoint.
    """
    folder = fetch(name)
    torch.manual_seed(seed)
    if spec.family == "t5":
        model = _load(T5ForConditionalGeneration, folder)
        if not spec.tied_embeddings and model.lm_head.weight is model.shared.weight:
            raise BackboneError(f"the checkpoint in {folder} lacks lm_head.weight, which its config does not tie")
        return wrap(model, task, tokenizer)
    if task.kind == "qa":
        return wrap(_load(AutoModelForQuestionAnswering, folder), task, tokenizer)
    return wrap(_load(AutoModelForSequenceClassification, folder, num_labels=task.n_outputs), task, tokenizer)


def wrap(model: Any, task: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> TaskModel:
    """Return a transformers model with its head as a task model."""
    if model.config.model_type != "t5":
        return EncoderTaskModel(model)
    words = [] if task.kind == "qa" else verbaliser_ids(task, tokenizer)
    values = [float(word) for word in task.label_words] if task.kind == "regression" else None
    return TextToTextModel(model, tokenizer.get_vocab()["<extra_id_0>"], words, values)


def _load(cls: Any, folder: Path, **kwargs: Any) -> Any:
    try:
        model, info = cls.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except SafetensorError as error:
        raise BackboneError(f"the weights in {folder} are torn or no safetensors file: {error}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise BackboneError(f"the checkpoint in {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    missing = sorted(key for key in lacking if not key.startswith(_NEW))
    if missing:
        raise BackboneError(
            f"the checkpoint in {folder} lacks {len(missing)} weights of its own config, or has them in another shape, "
            f"such as {missing[0]}"
        )
    return model
