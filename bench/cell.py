"""A cell that is resolved: what it is called, and where its machine keeps things. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.backbones.catalogue import spec_of
from bench.backbones.source import local_folder, model_revision
from bench.backbones.spec import BackboneSpec
from bench.config import RunConfig, hash_of, run_id
from bench.errors import BenchError
from bench.tasks.catalogue import resolve_task
from bench.tasks.digests import cache_folder
from bench.tasks.sources import data_revision
from bench.tasks.spec import TaskSpec


@dataclass(frozen=True)
class Surroundings:
    """What a run needs to know of its machine, none of which changes a number.

    Attributes
    ----------
    data_root
        Local data root; ``None`` for ``BENCH_DATA_ROOT`` or the Hub.
    cache_dir
        Folder of the artifact cache; ``None`` for ``BENCH_CACHE`` or the user's cache folder.
    device
        ``auto``, ``cpu`` or ``cuda``.
    """

    data_root: Path | None = None
    cache_dir: Path | None = None
    device: str = "auto"

    @property
    def artifacts(self) -> Path:
        """Folder of the artifact cache."""
        return (self.cache_dir or cache_folder()) / "artifacts"


@dataclass(frozen=True)
class Cell:
    """A run that is resolved: its task, backbone and identity are known. Imports no torch."""

    config: RunConfig
    task: TaskSpec
    spec: BackboneSpec
    revisions: Mapping[str, str]
    identity: Mapping[str, Any]

    @classmethod
    def resolve(cls, config: RunConfig, where: Surroundings) -> Cell:
        """Look up names and revisions.

        Raises
        ------
        BenchError
            If a name is unknown, or data or weights are not where they should be.
        """
        task = resolve_task(config.task)
        folder = local_folder(config.backbone)
        spec = dataclasses.replace(spec_of(str(folder) if folder else config.backbone), name=_short(config.backbone))
        length = config.max_length or task.max_length
        if spec.max_positions is not None and length > spec.max_positions:
            raise BenchError(
                f"max_length {length} of task '{task.name}' is beyond the {spec.max_positions} positions of "
                f"backbone '{spec.name}'"
            )
        revisions = {
            "data": f"{task.name}@{data_revision(task, where.data_root)}@{hash_of(task.identity())[:16]}",
            "model": f"{spec.name}@{model_revision(config.backbone)}",
        }
        identity = config.identity(revisions["data"], revisions["model"], where.data_root, spec.family)
        return cls(config, task, spec, revisions, identity)

    @property
    def run_id(self) -> str:
        """The hash of the identity."""
        return run_id(self.identity)

    def skip_reason(self) -> str | None:
        """Why this cell cannot be run, or ``None``."""
        return self.config.build_method().skip(self.spec, self.task, self.config.ratio)


def _short(backbone: str) -> str:
    return Path(backbone).name if "/" in backbone and Path(backbone).is_dir() else backbone
