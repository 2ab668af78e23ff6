"""One frozen model with its bank, from folders alone: what a replica of a deployment holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from bench.backbones.catalogue import spec_of
from bench.backbones.load import load_task_model, load_tokenizer
from bench.backbones.source import fetch
from bench.errors import BackboneError, ConfigError, DataError, suggest
from bench.measure.closed_form import remaining
from bench.measure.latency import no_garbage_collection
from bench.plugins.bank import PluginBank
from bench.plugins.plugin import Plugin
from bench.serving.records import Calibration, ServedModel
from bench.serving.times import ServiceTimes
from bench.tasks.data import Example
from bench.tasks.encoding import encode
from bench.tasks.evaluation import predict
from bench.tasks.features import Feature
from bench.tasks.spec import TaskSpec

SAMPLES = 3
PATIENCE = 20.0
"""Seconds that timing everything once may take before it is done but once more."""


class ResidentModel:
    """A fine-tuned model of a task, with plugins that stay attached.

    Parameters
    ----------
    model
        Folder or Hub id of the fine-tuned checkpoint, with its head and its tokenizer.
    plugins
        Folders or Hub ids of plugins that were made for it, at most one a k.
    task
        What it was fine-tuned on.
    device
        Where it runs.

    Raises
    ------
    BackboneError
        If the checkpoint is missing or torn, has no head for the task, names other classes, or has fewer positions
        than the task's longest input.
    PluginError
        If a plugin is missing or torn, does not fit the model, or there are two of one k.
    ConfigError
        If the task's answers are put together from several inputs.
    """

    def __init__(self, model: str, plugins: Sequence[str], task: TaskSpec, device: str = "cpu") -> None:
        self.task, self.name, self.device = task, model, torch.device(device)
        self.spec, self.tokenizer = spec_of(model), load_tokenizer(model)
        if self.spec.max_positions is not None and task.max_length > self.spec.max_positions:
            raise BackboneError(f"{model} has {self.spec.max_positions} positions; inputs may have {task.max_length}")
        if self.spec.family == "bert":
            if task.kind == "qa":
                raise ConfigError(
                    f"{task.name} with a bert backbone has answers that are put together from several inputs; serve a "
                    "task of classification or regression, or text-to-text question answering"
                )
            _check_head(model, task)
        loaded = load_task_model(model, self.spec, task, self.tokenizer, seed=0)
        self.model = loaded.to(self.device).eval().requires_grad_(False)
        self.sources = list(plugins)
        found = [Plugin.from_pretrained(name).to(self.device).eval().requires_grad_(False) for name in plugins]
        self.bank = PluginBank(found)
        self.bank.attach(self.model)

    @property
    def ks(self) -> tuple[int, ...]:
        """What can be chosen, ascending; 1 is the dense model."""
        return self.bank.ks

    def read(self, fields: object) -> Feature:
        """Encode a request.

        Parameters
        ----------
        fields
            ``text``, and ``text_pair`` where the task has two, or the task's own names of these.

        Raises
        ------
        DataError
            If a field is missing, unknown or no text; the message says what was expected.
        """
        task = self.task
        own = {"text": task.text} | ({"text_pair": task.text_pair} if task.text_pair else {})
        wanted = "expected JSON such as {" + ", ".join(f'"{name}": "..."' for name in own.values()) + "}"
        if not isinstance(fields, Mapping):
            raise DataError(f"{wanted}, found {type(fields).__name__}")
        # names of one kind: the task's own `text` may be its second text
        names = own if own.keys() - fields.keys() else {name: name for name in own}
        if missing := [name for name in names.values() if name not in fields]:
            raise DataError(f"the field '{missing[0]}' is missing; {wanted}")
        if unknown := [name for name in fields if name not in names.values()]:
            raise DataError(f"unknown field {unknown[0]!a}.{suggest(str(unknown[0]), names.values())} {wanted}")
        texts = {}
        for general, name in names.items():
            if not isinstance(value := fields[name], str) or not _is_unicode(value):
                raise DataError(f"the field '{name}' is no text; {wanted}")
            texts[general] = value
        example = Example("request", texts["text"], texts.get("text_pair"), None, ("",) if task.kind == "qa" else ())
        [feature] = encode([example], task, self.tokenizer, self.spec.family)
        return feature

    def read_json(self, body: bytes) -> Feature:
        """Encode a request that is JSON; see `read`."""
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError):
            raise DataError("the body is no JSON") from None
        return self.read(fields)

    def answer(self, k: int, features: Sequence[Feature]) -> list[dict[str, Any]]:
        """Answer a batch at ``k``: ``label`` of a class, else ``answer``, a number or a text.

        Raises
        ------
        PluginError
            If there is no such k.
        Diverged
            If a logit is not finite.
        """
        self.bank.select(k)
        task = self.task
        found = predict(
            self.model, features, task, self.spec.family, self.tokenizer, batch_size=len(features), device=self.device
        )
        if task.is_classification:
            return [{"label": task.labels[int(value)]} for value in found.values]
        return [{"answer": value} for value in found.values]

    def calibrate(self, max_batch: int) -> ServiceTimes:
        """Time every k on this machine, in turn: batches of one, of a quarter and of all of ``max_batch``.

        Inputs are a quarter of the task's longest, and the longest, filled with one token: what it is costs nothing,
        but where answers are generated, as long as they happen to be. Where all that takes more than
        `PATIENCE` seconds, it is timed once.
        """
        sizes = sorted({1, -(-max_batch // 4), max_batch})
        lengths = sorted({-(-self.task.max_length // 4), self.task.max_length})
        with no_garbage_collection():
            began = perf_counter()
            self._time(sizes, lengths)
            samples = SAMPLES if perf_counter() - began < PATIENCE else 1
            seconds = np.stack([self._time(sizes, lengths) for _ in range(samples)], axis=-1)
        longest = Counter([lengths[-1]])
        served = [
            ServedModel(
                k=k,
                source=self.name,
                config={},
                remaining=remaining(self.spec, k, longest) if k > 1 else 1.0,
                accuracy=0.0,
            )
            for k in self.ks
        ]
        return ServiceTimes(
            Calibration(
                engine="variator",
                models=served,
                resident_bytes=0,
                sizes=sizes,
                lengths=lengths,
                seconds=seconds.tolist(),
                examples=[lengths[-1]],
                scores=[],
            )
        )

    def _time(self, sizes: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float64]:
        """Return the seconds of one batch, (ks, sizes, lengths)."""
        seconds = np.empty((len(self.ks), len(sizes), len(lengths)))
        for s, size in enumerate(sizes):
            for g, length in enumerate(lengths):
                batch = [self._filler(length)] * size
                for which, k in enumerate(self.ks):
                    began = perf_counter()
                    self.answer(k, batch)
                    seconds[which, s, g] = perf_counter() - began
        return seconds

    def _filler(self, length: int) -> Feature:
        filler = self.tokenizer("the", add_special_tokens=False)["input_ids"][0]
        feature: Feature = {"input_ids": [filler] * length}
        return {**feature, "token_type_ids": [0] * length} if self.spec.family == "bert" else feature


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written, which half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_head(model: str, task: TaskSpec) -> None:
    """Raise ``BackboneError`` where loading would make up a head, which answers at random, or classes are others."""
    folder, name = fetch(model), "classifier.weight"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BackboneError(f"{folder} holds no *.safetensors; save the model again with save_pretrained")
    shapes = []
    for path in files:
        with safe_open(path, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 - it is no mapping
                shapes.append(tensors.get_slice(name).get_shape())
    if not shapes:
        raise BackboneError(
            f"{folder} holds no head ({name} in *.safetensors), so that it was not fine-tuned on {task.name}; "
            "`bench export` writes a teacher that was"
        )
    if shapes[0][0] != task.n_outputs:
        raise BackboneError(f"the head in {folder} has {shapes[0][0]} outputs, and {task.name} {task.n_outputs}")
    named = json.loads((folder / "config.json").read_text()).get("id2label") or {}
    found = [str(label) for _, label in sorted(named.items(), key=lambda item: int(item[0]))]
    given = [] if all(label.startswith("LABEL_") for label in found) else found
    if task.labels and given and [label.lower() for label in given] != [label.lower() for label in task.labels]:
        raise BackboneError(
            f"the classes of {folder} are {', '.join(given)}; those of {task.name} are {', '.join(task.labels)}, and "
            "their order counts"
        )
