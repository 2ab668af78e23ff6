"""What a method is given: the teacher, and the surroundings of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bench.artifacts import Artifact, ArtifactCache
from bench.backbones.load import load_task_model
from bench.backbones.model import TaskModel
from bench.backbones.spec import BackboneSpec
from bench.config import RunConfig
from bench.measure.closed_form import remaining
from bench.methods.base import Setting
from bench.progress import Progress
from bench.results import TrainingStage
from bench.tasks.features import Feature
from bench.tasks.spec import TaskSpec


@dataclass(frozen=True)
class Teacher:
    """The backbone fine-tuned on the task: the dense reference of every comparison.

    Attributes
    ----------
    model
        In evaluation mode, without gradients; nobody changes it.
    artifact
        Where its weights are kept.
    """

    model: TaskModel
    artifact: Artifact


@dataclass
class RunContext:
    """The surroundings of one run.

    Attributes
    ----------
    config, task, spec, tokenizer, device, data_root
        The run, its task, the backbone's shape and tokenizer, where tensors go, the local data root.
    features
        Split (``train``, ``selection``, ``dev``) -> encoded examples.
    identity
        The run's identity; artifacts that belong to this run alone are keyed by it.
    revisions
        ``data`` and ``model`` -> what identifies them.
    cache, progress
        Shared artifacts, and whoever watches.
    place
        Puts a model where it is trained, if that is in parts on several devices; ``None`` for ``device`` alone.
    stages, notes, setting
        What the method leaves for the result: its trainings, remarks, native setting (which it may make exact).
    bytes_added
        Bytes on disk that the method must store beyond the teacher.
    trained_parameters
        Parameters that the method trained.
    """

    config: RunConfig
    task: TaskSpec
    spec: BackboneSpec
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    data_root: Path | None
    features: dict[str, list[Feature]]
    identity: dict[str, Any]
    revisions: dict[str, str]
    cache: ArtifactCache
    progress: Progress
    place: Callable[[TaskModel], TaskModel] | None = None
    stages: list[TrainingStage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    setting: Setting = field(default_factory=lambda: Setting({}))
    bytes_added: int = 0
    trained_parameters: int = 0

    def lengths(self, split: str) -> Counter[int]:
        """Return number of tokens -> number of examples of a split."""
        return Counter(len(feature["input_ids"]) for feature in self.features[split])

    @property
    def budget(self) -> float:
        """Remaining encoder FLOPs that the ratio asks for, on the selection split."""
        return remaining(self.spec, int(self.config.ratio or 1), self.lengths("selection"))

    def pretrained(self) -> TaskModel:
        """Load the backbone as it was published, frozen, in evaluation mode."""
        model = load_task_model(self.config.backbone, self.spec, self.task, self.tokenizer, self.config.seed)
        return self.placed(model.eval().requires_grad_(False))

    def placed(self, model: TaskModel) -> TaskModel:
        """Move a model to where it runs; what is frozen by then may lie in parts."""
        return self.place(model) if self.place else model.to(self.device)

    def record(self, artifact: Artifact) -> None:
        """Note the trainings that made ``artifact``, here or earlier."""
        for stage in artifact.meta["stages"]:
            self.stages.append(TrainingStage(**{**stage, "cached": artifact.cached or stage.get("cached", False)}))
