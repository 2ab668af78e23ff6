"""Make recorded runs again from their configuration, and judge what comes out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from bench.backbones.source import local_folder
from bench.cell import Cell, Surroundings
from bench.config import RunConfig
from bench.errors import BenchError, ConfigError, first_fault, suggest
from bench.progress import Progress
from bench.results import ResultStore, RunResult
from bench.runner import run
from bench.tasks.catalogue import resolve_task
from bench.verify.causes import ELSEWHERE, Cause, of_identity, of_surroundings
from bench.verify.comparing import Difference, differences
from bench.verify.records import contradictions, read_predictions

Outcome = Literal["identical", "within tolerance", "different", "cannot be made again"]
UNEXPLAINED = Cause(
    "record",
    "nothing else that is recorded differs: the stored result was changed after it was made, or something that is not "
    "recorded differs",
)


@dataclass(frozen=True)
class Judgement:
    """What became of one recorded run.

    Attributes
    ----------
    run_id, outcome
        Which run, and whether it came out again.
    reason
        Why it could not be made again.
    differences
        What came out otherwise.
    causes
        What differs between there and here; where everything came out, what may differ without changing a number.
    made, found
        Trainings that were done again, and those whose artifact was in the cache.
    moved
        The primary dev metric, made again minus recorded; ``None`` where a run has none.
    """

    run_id: str
    outcome: Outcome
    reason: str = ""
    differences: list[Difference] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    made: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    moved: float | None = None

    @property
    def good(self) -> bool:
        """Whether the recorded number stands."""
        return self.outcome in ("identical", "within tolerance")


@dataclass(frozen=True)
class Elsewhere:
    """Where things of one's own lie on this machine, which a result names but does not locate.

    Attributes
    ----------
    tasks
        Name -> YAML file.
    backbones
        Name -> folder of the checkpoint.
    """

    tasks: Mapping[str, Path] = field(default_factory=dict)
    backbones: Mapping[str, Path] = field(default_factory=dict)


def choose(results: Iterable[RunResult], sample: int | None = None, run_ids: Iterable[str] = ()) -> list[RunResult]:
    """Choose the runs to make again: all, those that are named, or a spread over methods.

    A sample takes one run of each method in turn, by the methods' names, and of a method in the order of run ids, which
    are hashes: the same runs every time, and no choice of anybody's.

    Parameters
    ----------
    results
        The runs of a study.
    sample
        How many.
    run_ids
        Run ids, or beginnings that only one has.

    Raises
    ------
    ConfigError
        If a run id is that of none, or of several.
    """
    known = {result.run_id: result for result in results}
    if named := list(run_ids):
        return list({found.run_id: found for found in (_named(known, text) for text in named)}.values())
    if sample is None:
        return sorted(known.values(), key=lambda result: (str(result.config.get("method")), result.run_id))
    ranks: dict[str, int] = {}
    order = []
    for run_id, result in sorted(known.items()):
        method = str(result.config.get("method"))
        ranks[method] = ranks.get(method, -1) + 1
        order.append((ranks[method], method, run_id))
    return [known[run_id] for _, _, run_id in sorted(order)[:sample]]


def _named(known: Mapping[str, RunResult], text: str) -> RunResult:
    matching = [run_id for run_id in known if run_id.startswith(text)]
    if len(matching) == 1:
        return known[matching[0]]
    if matching:
        raise ConfigError(f"'{text}' begins {len(matching)} runs: {', '.join(sorted(matching))}")
    raise ConfigError(f"no run '{text}' in this study.{suggest(text, known)}")


def recorded_config(recorded: RunResult, elsewhere: Elsewhere, links: Path) -> RunConfig:
    """Return the configuration of a recorded run, with paths of this machine for what is one's own.

    Parameters
    ----------
    recorded
        The stored result.
    elsewhere
        Where one's own things are.
    links
        Folder for links to checkpoints whose folder is called otherwise here: its name is part of a run's identity.

    Raises
    ------
    BenchError
        If the run never finished, this version cannot read it, or something is not on this machine; the message then
        says how to name it.
    """
    if recorded.status in ("running", "interrupted"):
        raise BenchError(f"it is {recorded.status} and has no number yet")
    fields = {name: value for name, value in recorded.config.items() if name != "family"}
    try:
        config = RunConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"this version cannot read its configuration: {first_fault(error)}") from None
    config.build_method()  # raises for an option that is no more
    if own := elsewhere.tasks.get(config.task):
        config = config.model_copy(update={"task": str(own)})
    if folder := elsewhere.backbones.get(config.backbone):
        if folder.name != config.backbone:
            link = links / config.backbone
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(folder.absolute(), target_is_directory=True)
            folder = link
        config = config.model_copy(update={"backbone": str(folder)})
    _must_be_known(config, recorded)
    return config


def _must_be_known(config: RunConfig, recorded: RunResult) -> None:
    """Raise where a name means nothing here, or another thing on the Hub than the folder that the run was made of."""
    if "@sha256:" in str(recorded.identity.get("model")) and local_folder(config.backbone) is None:
        raise BenchError(
            f"its backbone '{config.backbone}' was a local folder, which is not known here; name it with "
            f"--backbone {config.backbone}=FOLDER"
        )
    try:
        resolve_task(config.task)
    except ConfigError as error:
        raise BenchError(f"{error} If it is a file of your own, name it with --task FILE") from None


def make_again(
    recorded: RunResult,
    store: ResultStore,
    config: RunConfig,
    where: Surroundings,
    scratch: ResultStore,
    progress: Progress,
) -> Judgement:
    """Run a recorded cell again and compare.

    Parameters
    ----------
    recorded
        The stored result.
    store
        Where it is stored.
    config
        Its configuration; see `recorded_config`.
    where
        Data, cache and device. ``auto`` is the CPU for what was made on one.
    scratch
        Where the new result goes.
    progress
        Who watches.
    """
    try:
        return _make_again(recorded, store, config, where, scratch, progress)
    except (BenchError, OSError) as error:
        return Judgement(recorded.run_id, "cannot be made again", str(error))


def _make_again(
    recorded: RunResult,
    store: ResultStore,
    config: RunConfig,
    where: Surroundings,
    scratch: ResultStore,
    progress: Progress,
) -> Judgement:
    before = read_predictions(store, recorded)
    record = [Cause("record", text) for text in contradictions(recorded, before)]
    cell = Cell.resolve(config, where)
    changed = of_identity(recorded, cell.identity)
    if changed and {cause.kind for cause in changed} == {"data"} and _same_rows(cell, recorded, where):
        changed = []
    if changed:
        # of other data, weights or definitions another number must come; which one proves nothing
        return Judgement(recorded.run_id, "different", causes=[*record, *changed])
    if recorded.provenance.device == "cpu" and where.device == "auto":
        where = replace(where, device="cpu")
    with _threads(recorded.provenance.threads if recorded.status == "done" else None):
        made = run(config, scratch, where, "force", progress)
    if made.status == "interrupted":
        return Judgement(recorded.run_id, "cannot be made again", made.reason or "")
    now = read_predictions(scratch, made)
    if made.status != "done" or recorded.status != "done":  # what did not run notes no threads
        made.provenance.threads = recorded.provenance.threads
    found = differences(recorded, made, before, now)
    causes = [*record, *of_surroundings(recorded.provenance, made.provenance)]
    return Judgement(
        recorded.run_id,
        _outcome(found, causes),
        differences=found,
        causes=causes or ([UNEXPLAINED] if found else []),
        made=tuple(stage.name for stage in made.training if not stage.cached),
        found=tuple(stage.name for stage in made.training if stage.cached),
        moved=_moved(recorded, made),
    )


def _moved(recorded: RunResult, made: RunResult) -> float | None:
    before, now = recorded.evaluation("dev"), made.evaluation("dev")
    if before is None or now is None or not before.metrics or before.metrics.keys() != now.metrics.keys():
        return None
    primary = next(iter(before.metrics))
    return now.metrics[primary].value - before.metrics[primary].value


def _outcome(found: list[Difference], causes: list[Cause]) -> Outcome:
    if any(cause.kind == "record" for cause in causes):
        return "different"
    if not found:
        return "identical"
    elsewhere = any(cause.kind in ELSEWHERE for cause in causes)
    return "within tolerance" if elsewhere and all(difference.within for difference in found) else "different"


def _same_rows(cell: Cell, recorded: RunResult, where: Surroundings) -> bool:
    """Return whether other files hold the same examples, as when a data set was saved in another format."""
    from bench.tasks.data import load_task

    given = recorded.provenance.data_digest
    names = {
        name for name in {*cell.identity, *recorded.identity} if cell.identity.get(name) != recorded.identity.get(name)
    }
    return given is not None and names == {"data"} and load_task(cell.task, where.data_root).digest == given


@contextmanager
def _threads(recorded: int | None) -> Iterator[None]:
    """Use as many threads as then, if there are cores for them: how a sum is divided among them shows in its bits."""
    if recorded is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(recorded, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
