"""Tiny random checkpoints, tasks and runs: everything that the library reads from a disk, written in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from transformers import BertForSequenceClassification, T5ForConditionalGeneration

from bench.artifacts import ArtifactCache
from bench.backbones.load import load_tokenizer
from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.context import RunContext
from bench.progress import Silent
from bench.tasks.data import load_task
from bench.tasks.encoding import encode
from bench.testing.tiny import WORDS, bert_tokenizer, t5_tokenizer, tiny_bert_config, tiny_t5_config

Family = Literal["bert", "t5"]
FAMILIES: tuple[Family, ...] = ("bert", "t5")

QUICK = {
    "teacher_epochs": 1.0,
    "teacher_batch_size": 16,
    "teacher_lr": 1e-3,
    "steps": 6,
    "batch_size": 8,
    "precision": "fp32",
    "pretrain_steps": 0,
    "bottleneck": 8,
}
"""Settings of a run of a second or two."""


def tiny_model(family: Family, seed: int = 0, **changes: Any) -> Any:
    """Return a random transformers model with its head, in evaluation mode.

    Weights are large and norms are not the identity, so that a wrong term shows in the output.
    """
    torch.manual_seed(seed)
    model: Any = (
        BertForSequenceClassification(tiny_bert_config(**changes))
        if family == "bert"
        else T5ForConditionalGeneration(tiny_t5_config(**changes))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif family == "bert":
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def tiny_checkpoint(folder: Path, family: Family, seed: int = 0, **changes: Any) -> Path:
    """Save a random model and its tokenizer as a checkpoint that ``load_task_model`` reads."""
    tiny_model(family, seed, **changes).save_pretrained(folder)
    (bert_tokenizer() if family == "bert" else t5_tokenizer()).save_pretrained(folder)
    return folder


def task_file(folder: Path, examples: int = 60, words: tuple[int, int] = (1, 14), **changes: Any) -> Path:
    """Write a task of one's own, two classes that a word tells apart, and return its YAML file.

    Parameters
    ----------
    folder
        Where the file and its data go.
    examples
        Examples of each split.
    words
        Least number of words before the one that decides, and the number that is beyond the largest.
    changes
        Keys of the file, ``None`` to leave one out. The data have more columns than the two that it names: ``other``, a
        second text, ``number``, and ``answer``, a word of the text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, seed in (("train", 0), ("dev", 1)):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, examples)
        texts = [
            " ".join([*rng.choice(WORDS[:20], size=int(n)), "good" if label else "bad"])
            for n, label in zip(rng.integers(*words, examples), labels, strict=True)
        ]
        columns = {
            "text": texts,
            "label": labels,
            "other": [" ".join(rng.choice(WORDS[20:], size=3)) for _ in texts],
            "number": rng.uniform(0, 3, examples),
            "answer": [text.split()[-1] for text in texts],
        }
        pd.DataFrame(columns).to_csv(folder / f"{split}.csv", index=False)
    lines = {
        "train": "train.csv",
        "dev": "dev.csv",
        "labels": "[bad, good]",
        "prompt": '"{text} <extra_id_0>"',
        "max_length": 32,
        **changes,
    }
    path = folder / "mood.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None))
    return path


def quick_config(task: Path, backbone: Path, **values: Any) -> RunConfig:
    """Return a run of a second or two on a tiny task and checkpoint."""
    return RunConfig.build({**QUICK, "task": str(task), "backbone": str(backbone), **values})


def context(config: RunConfig, cache: Path) -> RunContext:
    """Return what a method is given for ``config``, as a run makes it."""
    cell = Cell.resolve(config, Surroundings(cache_dir=cache))
    data, tokenizer = load_task(cell.task, None, config.train_examples), load_tokenizer(config.backbone)
    splits = {"train": data.train, "selection": data.selection, "dev": data.dev}
    return RunContext(
        config=config,
        task=cell.task,
        spec=cell.spec,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        data_root=None,
        features={n: encode(x, cell.task, tokenizer, cell.spec.family, config.max_length) for n, x in splits.items()},
        identity=dict(cell.identity),
        revisions=dict(cell.revisions),
        cache=ArtifactCache(cache),
        progress=Silent(),
    )
