"""RunConfig: what one run is, and its identity. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.errors import ConfigError, suggest, unknown
from bench.methods.base import Method
from bench.registry import method, methods
from bench.results import SCHEMA_VERSION

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    # the released scripts, to the setting (references in docs/variator.md)
    "released": {
        "teacher_lr": 1e-5,
        "teacher_decay": "constant",
        "teacher_warmup": 0.0,
        "teacher_weight_decay": 1e-5,
        "teacher_clip": 10.0,
        "teacher_epochs": 5.0,
        "steps": 26_000,
        "mask_padding": False,
        "init": "released",
        "pretrain_steps": 60_000,
        "pretrain_batch_size": 64,
        "pretrain_length": 224,
        "pretrain_lr": 1e-3,
        "pretrain_losses": "released_hidden=1",
        "lr": 1e-5,
        "decay": "constant",
        "warmup": 0.0,
        "weight_decay": 1e-5,
        "clip": 10.0,
        "losses": "released_hidden=1",
    },
}
"""Named sets of defaults. Precedence: field default < recipe < sweep file < command line."""

_BUDGET = frozenset({"ratio", "steps", "batch_size"})
"""Fields that a method may leave unread; ``Method.uses`` names those that it reads."""

Decay = Literal["linear", "cosine", "constant"]


class RunConfig(BaseModel):
    """One cell of a sweep. Every field that can change the number is here.

    Attributes
    ----------
    task
        Built-in name, or path of a task file.
    backbone
        Built-in name, Hub id, or local folder.
    method
        Name of the method; ``bench list methods`` shows them.
    ratio
        For Variator k; for any other method, the remaining encoder FLOPs of the plugin at that k.
    seed
        Seeds heads, data order, plugins and dropout.
    recipe
        Named set of defaults; ``bench list recipes`` shows what each sets.
    train_examples
        Use only so many training examples (a fixed subset); all by default.
    dev_examples
        Report on only so many dev examples (a fixed subset); all by default.
    max_length
        Longest input in tokens; the task's own by default.
    teacher_epochs
        Passes over the training split to fine-tune the teacher.
    teacher_batch_size
        Examples a step of the teacher's fine-tuning.
    teacher_lr
        Peak learning rate of the teacher's fine-tuning.
    teacher_decay
        Teacher's learning rate after the warm-up: ``linear`` or ``cosine`` to zero, or ``constant``.
    teacher_warmup
        Share of the teacher's steps over which its learning rate rises.
    teacher_weight_decay
        AdamW's weight decay of the teacher's fine-tuning.
    teacher_clip
        Largest gradient norm of the teacher's fine-tuning.
    teacher_lora
        Fine-tune the teacher by LoRA (q and v, rank 16, alpha 32) instead of all weights.
    steps
        Optimiser steps on the task of every method that trains.
    batch_size
        Examples a step of every method that trains.
    precision
        ``bf16`` trains under autocast; evaluation and measuring are always in fp32.
    options
        Hyper-parameters of the method.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = "movie_snippets"
    backbone: str = "minilm-l6"
    method: str = "variator"
    ratio: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    recipe: str = "default"
    train_examples: int | None = Field(default=None, gt=0)
    dev_examples: int | None = Field(default=None, gt=0)
    max_length: int | None = Field(default=None, ge=8)
    teacher_epochs: float = Field(default=3.0, gt=0)
    teacher_batch_size: int = Field(default=32, gt=0)
    teacher_lr: float = Field(default=1e-4, gt=0)
    teacher_decay: Decay = "linear"
    teacher_warmup: float = Field(default=0.1, ge=0, lt=1)
    teacher_weight_decay: float = Field(default=0.01, ge=0)
    teacher_clip: float = Field(default=1.0, gt=0)
    teacher_lora: bool = False
    steps: int = Field(default=1200, ge=0)
    batch_size: int = Field(default=32, gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> RunConfig:
        """Resolve flat keys (run fields and method options together) into one run.

        A key that only other methods know is dropped: a sweep over methods may set it for all.

        Raises
        ------
        ConfigError
            If a key or name is unknown (the nearest is given), or a value is of the wrong type or out of range.
        """
        chosen = method(str(values.get("method") or cls.model_fields["method"].default))
        recipe = str(values.get("recipe") or "default")
        if recipe not in RECIPES:
            raise unknown("recipe", recipe, RECIPES)
        known = known_keys()
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown key '{key}'.{suggest(key, known)} `bench list keys` shows all.")
        merged = {**RECIPES[recipe], **{k: v for k, v in values.items() if v is not None}}
        unused = _BUDGET - chosen.uses
        core = {k: v for k, v in merged.items() if k in cls.model_fields and k not in unused}
        own = {k: merged[k] for k in chosen.options() if k in merged}
        try:
            config = cls(**core, options=chosen.options() | own)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{where} = {first['input']!r}: {first['msg'].lower()}") from None
        built = chosen.from_options(config.options)
        return config.model_copy(update={"options": {k: getattr(built, k) for k in config.options}})

    def command(self) -> list[str]:
        """Return the command that runs this cell again: every key that differs from the library's defaults."""
        defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
        always = ("task", "backbone", "method", "seed")
        values = {k: getattr(self, k) for k in defaults if k not in ("options", "recipe")} | self.options
        defaults |= method(self.method).options()
        chosen = {k: v for k, v in values.items() if k in always or v != defaults[k]}
        return ["bench", "run", *(part for k, v in chosen.items() for part in (f"--{k.replace('_', '-')}", str(v)))]

    def build_method(self) -> Method:
        """Return the method with this run's hyper-parameters."""
        return method(self.method).from_options(self.options)

    @property
    def label(self) -> str:
        """A short name for people, such as ``sst2 · minilm · variator k=4 · seed 0``."""
        ratio = f" k={self.ratio:g}" if self.ratio is not None and "ratio" in method(self.method).uses else ""
        backbone = Path(self.backbone).name if Path(self.backbone).is_dir() else self.backbone
        task = Path(self.task).stem if "/" in self.task else self.task
        return f"{task} · {backbone} · {self.method}{ratio} · seed {self.seed}"

    def teacher_identity(self, data_revision: str, model_revision: str) -> dict[str, Any]:
        """Return everything that can change the teacher."""
        fields = [f for f in RunConfig.model_fields if f.startswith("teacher_")]
        fields += ["seed", "train_examples", "max_length", "precision"]
        return {
            "schema": SCHEMA_VERSION,
            "data": data_revision,
            "model": model_revision,
            **{f: getattr(self, f) for f in sorted(fields)},
        }

    def identity(
        self, data_revision: str, model_revision: str, data_root: Path | None = None, family: str = "bert"
    ) -> dict[str, Any]:
        """Return everything that can change the number, and nothing else.

        Parameters
        ----------
        data_revision, model_revision
            What the task's data and the backbone's weights are, independent of where they lie.
        data_root
            Where a method's further inputs lie, such as a pre-training corpus.
        family
            Of the backbone.
        """
        chosen = self.build_method()
        unused = _BUDGET - chosen.reads()
        core = {
            name: getattr(self, name)
            for name in RunConfig.model_fields
            if name not in unused | {"task", "backbone", "recipe", "options", "method"}
        }
        return {
            "schema": SCHEMA_VERSION,
            "data": data_revision,
            "model": model_revision,
            "method": f"{self.method}@{chosen.version_on(family)}",
            **core,
            **{f"option.{k}": v for k, v in sorted(chosen.identity(data_root).items())},
        }


def run_id(identity: Mapping[str, Any]) -> str:
    """Return the hash that names a run."""
    return hash_of(identity)[:16]


def hash_of(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of a mapping's canonical JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def known_keys() -> dict[str, str]:
    """Return every key that a sweep or the command line may set, with who reads it."""
    keys = {name: "run" for name in RunConfig.model_fields if name != "options"}
    for name, cls in methods().items():
        for option in cls.options():
            keys[option] = f"{keys[option]}, {name}" if option in keys else name
    return keys
