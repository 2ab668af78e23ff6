"""Ways to keep many tasks, on disk and in memory: adapters on one backbone, or a model for each."""

from __future__ import annotations

import copy
import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.backbones.model import TaskModel
from bench.cell import Cell, Surroundings
from bench.context import RunContext
from bench.execution import rebuild
from bench.plugins.plugin import CONFIG_FILE, Plugin
from bench.serving.multitask import MultiTaskModel, stacked
from bench.training.teacher import WEIGHTS_FILE

SHARED_FILE, MODEL_FILE = "shared.safetensors", "model.safetensors"
NOISE = 1e-3
"""Of a tensor's own spread: what is added to the numbers of a copy, so that no two tasks have a tensor in common."""


@dataclass(frozen=True)
class Cells:
    """The runs of one series: of each task the cells of its ratios, in one order."""

    tasks: tuple[tuple[Cell, ...], ...]
    where: Surroundings

    def of(self, index: int) -> tuple[Cell, ...]:
        """Return the cells of a task; from the number of tasks on, those that it is a copy of."""
        return self.tasks[index % len(self.tasks)]

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [cells[0].task.name for cells in self.tasks]


class Keeping(ABC):
    """A way to keep tasks: what is written once, what is written for each, and what comes into memory of it.

    Parameters
    ----------
    cells
        Its runs, all of one method and backbone.
    """

    def __init__(self, cells: Cells) -> None:
        self.cells = cells
        self.inputs: list[dict[str, Tensor]] = []

    held: nn.Module
    """Whatever is in memory of the tasks that were loaded."""

    @abstractmethod
    def shared(self) -> dict[str, Tensor]:
        """Return the weights of the backbone that the tasks refer to."""

    @abstractmethod
    def write(self, index: int, folder: Path) -> None:
        """Write the files of task ``index`` into an empty folder; beyond the last one, of a copy with other numbers."""

    @abstractmethod
    def empty(self) -> None:
        """Let go of every weight, and keep the modules."""

    @abstractmethod
    def load_shared(self, path: Path | None) -> None:
        """Read what is stored once into memory."""

    @abstractmethod
    def load(self, index: int, folder: Path) -> None:
        """Read task ``index`` into memory, beside those before it."""

    @abstractmethod
    def run(self) -> int:
        """Let each task answer a batch, and return how many did; an answer that is not finite is an error."""

    def sample(self, ctx: RunContext, examples: int = 4) -> None:
        """Keep the first dev examples of a task for `run`."""
        self.inputs.append(stacked(ctx.features["dev"][:examples], ctx.tokenizer.pad_token_id))


class Adapters(Keeping):
    """LoRA, head and plugins of each task, on one resident backbone."""

    def __init__(self, cells: Cells) -> None:
        super().__init__(cells)
        self.folders: list[tuple[Path, dict[int, Path]]] = []
        for own in cells.tasks:
            plugins: dict[int, Path] = {}
            for cell in own:
                ctx, teacher, _ = rebuild(cell, cells.where)
                if cell.config.method == "variator":
                    artifact = ctx.cache.find("plugin", ctx.identity)
                    plugins[int(cell.config.ratio or 0)] = cast(Any, artifact).folder
            self.sample(ctx)
            self.folders.append((teacher.artifact.folder, plugins))
        first = cells.tasks[0][0]
        self.model = MultiTaskModel(first.config.backbone, first.spec)

    @property
    def ks(self) -> tuple[int, ...]:
        """Every k that a task has, 1 included."""
        return (1, *self.folders[0][1])

    def shared(self) -> dict[str, Tensor]:
        """Return the whole backbone, without a head."""
        return dict(self.model.body.named_parameters())

    def write(self, index: int, folder: Path) -> None:
        """Write the artifacts as the cache has them."""
        teacher, plugins = self.folders[index % len(self.folders)]
        copied = index >= len(self.folders)
        if not copied:
            shutil.copy(teacher / WEIGHTS_FILE, folder)
        else:
            save_file(varied(load_file(teacher / WEIGHTS_FILE), index), folder / WEIGHTS_FILE)
        for k, source in plugins.items():
            plugin = Plugin.from_pretrained(source)
            if copied:
                plugin.load_state_dict(varied(plugin.state_dict(), index))
            plugin.save_pretrained(folder / f"k{k}")

    def empty(self) -> None:
        """Let go of the backbone."""
        self.model.body = filled(self.model.body, None)

    def load_shared(self, path: Path | None) -> None:
        """Read the backbone."""
        self.model.body = filled(self.model.body, owned(path))
        self.held = self.model

    def load(self, index: int, folder: Path) -> None:
        """Read the files of a task as whoever serves it would."""
        plugins = [own_memory(Plugin.from_pretrained(place.parent)) for place in folder.glob(f"*/{CONFIG_FILE}")]
        self.model.add(str(index), self.cells.of(index)[0].task, folder, plugins)

    def run(self) -> int:
        """Let each task answer a batch at each k."""
        tasks = self.model.tasks
        for index, task in enumerate(tasks):
            inputs = self.inputs[index % len(self.inputs)]
            for k in self.ks:
                self.model.select(k, [task] * len(inputs["input_ids"]))
                answers = (
                    self.model(**inputs)
                    if self.cells.of(index)[0].task.kind != "qa" or self.model.spec.family == "bert"
                    else [self.model.generate(**inputs, max_new_tokens=2).float()]
                )
                check_finite(answers, task)
        return len(tasks)


class Models(Keeping):
    """A model for each task and ratio, without what it has in common with the backbone.

    A tensor that is the backbone's own to the last bit is stored once for all tasks, and one that several ratios of a
    task have in common once for the task: the least that a rival can take.
    """

    def __init__(self, cells: Cells) -> None:
        super().__init__(cells)
        first = cells.tasks[0][0]
        backbone = dict(MultiTaskModel(first.config.backbone, first.spec).body.named_parameters())
        known = {content(tensor): name for name, tensor in backbone.items()}
        self.models: list[list[TaskModel]] = []
        self.places: list[list[dict[str, tuple[bool, str]]]] = []
        self.own: list[dict[str, Tensor]] = []
        used: set[str] = set()
        for cells_of in cells.tasks:
            models, places, own, at = [], [], dict[str, Tensor](), dict[str, str]()
            for i, cell in enumerate(cells_of):
                ctx, _, model = rebuild(cell, cells.where)
                where: dict[str, tuple[bool, str]] = {}
                for name, tensor in model.named_parameters():
                    digest = content(tensor)
                    if digest in known:
                        where[name] = True, known[digest]
                        used.add(known[digest])
                    else:
                        key = at.setdefault(digest, f"{i}.{name}")
                        own[key] = tensor.detach()
                        where[name] = False, key
                models.append(model)
                places.append(where)
            self.sample(ctx)
            self.models.append(models)
            self.places.append(places)
            self.own.append(own)
        self._shared = {name: tensor for name, tensor in backbone.items() if name in used}

    def shared(self) -> dict[str, Tensor]:
        """Return what models have in common with the backbone."""
        return self._shared

    def write(self, index: int, folder: Path) -> None:
        """Write what a task's models have of their own."""
        own = self.own[index % len(self.own)]
        tensors = varied(own, index) if index >= len(self.own) else own
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / MODEL_FILE)

    def empty(self) -> None:
        """Let go of every weight."""
        self.models = [[cast(TaskModel, filled(model, None)) for model in models] for models in self.models]
        self.own, self._shared = [{} for _ in self.own], {}

    def load_shared(self, path: Path | None) -> None:
        """Read what is shared."""
        self._shared, self.held = owned(path), nn.ModuleList()

    def load(self, index: int, folder: Path) -> None:
        """Read each of a task's models."""
        own, kind = owned(folder / MODEL_FILE), index % len(self.models)
        for model, places in zip(self.models[kind], self.places[kind], strict=True):
            weights = {name: (self._shared if is_shared else own)[key] for name, (is_shared, key) in places.items()}
            cast(nn.ModuleList, self.held).append(filled(model, weights))

    def run(self) -> int:
        """Let each model answer a batch."""
        ratios, held = len(self.models[0]), cast(nn.ModuleList, self.held)
        for index, model in enumerate(held):
            inputs = self.inputs[index // ratios % len(self.inputs)]
            generates = self.cells.of(index // ratios)[0].task.kind == "qa" and hasattr(model, "generate")
            with torch.inference_mode():
                answers = (
                    cast(Any, model).generate(inputs["input_ids"], inputs["attention_mask"], 2).float()
                    if generates
                    else model(**inputs).logits
                )
            check_finite([answers], str(index // ratios))
        return len(held) // ratios


def check_finite(answers: Sequence[Tensor], task: str) -> None:
    """Raise ``ValueError`` if an answer is not finite."""
    if not all(bool(torch.isfinite(answer).all()) for answer in answers):
        raise ValueError(f"task {task} does not answer with finite numbers")


def content(tensor: Tensor) -> str:
    """Return a hash of a tensor's shape, type and numbers."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def varied(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return tensors of the same shapes with slightly other numbers, a pure function of ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def vary(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator)
        spread = tensor.float().std(correction=0).clamp_min(1e-3)
        return (tensor.float() + NOISE * spread * noise).to(tensor.dtype).contiguous()

    return {name: vary(tensor) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def owned(path: Path | None) -> dict[str, Tensor]:
    """Read a file, if there is one, into memory of this process: what the library returns is mapped from the file."""
    return {} if path is None else {name: tensor.clone() for name, tensor in load_file(path).items()}


def own_memory(plugin: Plugin) -> Plugin:
    """Return ``plugin`` with its weights in memory of this process."""
    for parameter in plugin.parameters():
        parameter.data = parameter.data.clone()
    return plugin


def filled(model: nn.Module, weights: Mapping[str, Tensor] | None) -> nn.Module:
    """Return a copy of ``model`` with these parameters, or with none, on the ``meta`` device; buffers are shared."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        tensor = torch.empty_like(parameter, device="meta") if weights is None else weights[name]
        memo[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    return copy.deepcopy(model, memo)


def keeping(cells: Cells) -> Keeping:
    """Return how the runs of a series are kept."""
    config = cells.tasks[0][0].config
    return Adapters(cells) if config.teacher_lora and config.method in ("dense", "variator") else Models(cells)
