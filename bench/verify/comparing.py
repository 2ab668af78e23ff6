"""What differs between a recorded result and the one that was made again, and whether that is within the tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.results import Evaluation, RunResult, TrainingStage
from bench.verify.records import plain

if TYPE_CHECKING:
    import pandas as pd

METRIC_TOLERANCE = 0.01
"""What a metric, or an end of its interval, may always move: a point, and on few examples two of them."""
PREDICTION_TOLERANCE = 0.05
"""Share of dev examples that may always be answered otherwise; of a regression, share of the labels' range."""
COST_TOLERANCE = 0.02
"""Largest relative difference of what the compressed model costs; what the dense one costs is exact anywhere."""
MEMORY_TOLERANCE = 0.1
"""Largest relative difference of the compressed model's peak memory: a part that is cut elsewhere shows in it."""
_FREE = math.inf


@dataclass(frozen=True)
class Difference:
    """One thing that did not come out as it was recorded.

    Attributes
    ----------
    text
        What it is, what was recorded and what was made.
    within
        Whether another machine or another version may make it so.
    """

    text: str
    within: bool


def differences(
    recorded: RunResult, made: RunResult, before: pd.DataFrame | None, now: pd.DataFrame | None
) -> list[Difference]:
    """Compare everything but timings.

    Parameters
    ----------
    recorded, made
        The stored result, and the one that was made again.
    before, now
        Their predictions.
    """
    if recorded.status != made.status:
        said = " · ".join(
            f"{what} {result.status}{f' ({result.reason})' if result.reason else ''}"
            for what, result in (("recorded", recorded), ("made again", made))
        )
        return [Difference(f"status: {said}", within=False)]
    found = list(_values("reason", recorded.reason, made.reason, _FREE))
    found += _values("examples", recorded.examples, made.examples, 0.0)
    found += _evaluations(recorded, made)
    found += _predictions(recorded, before, now)
    found += _costs(recorded, made)
    # what a method decided shows in what its model costs and answers, which is what is judged
    found += _values("knob", recorded.knob, made.knob, _FREE)
    found += _values("notes", recorded.notes, made.notes, _FREE)
    found += _training(recorded.training, made.training)
    return found


def _evaluations(recorded: RunResult, made: RunResult) -> Iterator[Difference]:
    groups = (("", recorded.evaluations, made.evaluations),
              ("teacher's ", recorded.teacher_evaluations, made.teacher_evaluations))  # fmt: skip
    for whose, old, new in groups:
        then, again = ({e.split: e for e in evaluations} for evaluations in (old, new))
        if then.keys() != again.keys():
            yield Difference(f"{whose}evaluations: on {', '.join(then)}; made again on {', '.join(again)}", False)
        for split in [split for split in then if split in again]:
            yield from _evaluation(f"{whose}{split}", then[split], again[split])


def _evaluation(what: str, before: Evaluation, now: Evaluation) -> Iterator[Difference]:
    if before.n_examples != now.n_examples or before.metrics.keys() != now.metrics.keys():
        yield Difference(f"{what}: it is of other examples or has other metrics", within=False)
        return
    for name, old in before.metrics.items():
        new = now.metrics[name]
        if old != new:
            tolerance = max(METRIC_TOLERANCE, 2 / max(1, before.n_examples), (old.high - old.low) / 2)
            distance = max(abs(getattr(old, end) - getattr(new, end)) for end in ("value", "low", "high"))
            text = " recorded, ".join(f"{i.value:.6g} [{i.low:.6g}, {i.high:.6g}]" for i in (old, new))
            yield Difference(f"{what} {name}: {text} made again", distance <= tolerance)


def _predictions(recorded: RunResult, before: pd.DataFrame | None, now: pd.DataFrame | None) -> Iterator[Difference]:
    if before is None or now is None:
        if (before is None) != (now is None):
            yield Difference("predictions: there are none on one side", within=False)
        return
    if len(before) != len(now) or not before["id"].equals(now["id"]):
        yield Difference("predictions: they are of other examples", within=False)
        return
    if plain(before["label"]) != plain(now["label"]):
        yield Difference("predictions: the examples have other labels", within=False)
    old, new = before["prediction"], now["prediction"]
    if recorded.task.get("kind") == "regression":
        moved, wrong = (float(((old - other) ** 2).mean() ** 0.5) for other in (new, before["label"]))
        most = max(wrong, PREDICTION_TOLERANCE * float(before["label"].max() - before["label"].min()))
        if moved:
            text = f"{moved:.2g} from the recorded ones (root mean square), which are {wrong:.2g} from the labels"
            yield Difference(f"predictions: {text}", moved <= most)
    else:
        changed, wrong = int((old != new).sum()), _wrong(old.tolist(), plain(before["label"]))
        most = max(wrong, PREDICTION_TOLERANCE * len(old))
        if changed:
            text = f"{changed} of {len(old)} changed ({changed / len(old):.1%}), and {wrong} were wrong"
            yield Difference(f"predictions: {text}", changed <= most)
    if not before["score"].equals(now["score"]):
        largest = (before["score"] - now["score"]).abs().max()
        yield Difference(f"scores of the predictions: up to {largest:.2g} apart", within=True)


def _wrong(answers: list[Any], labels: list[Any]) -> int:
    """Count the answers that are not the label, or none of those that are accepted."""
    from bench.tasks.metrics import normalise

    return sum(
        normalise(answer) not in map(normalise, label) if isinstance(label, list) else answer != label
        for answer, label in zip(answers, labels, strict=True)
    )


def _costs(recorded: RunResult, made: RunResult) -> Iterator[Difference]:
    old, new = (r.cost.model_dump() if r.cost else {} for r in (recorded, made))
    if recorded.cost and recorded.cost.bytes_total is None:
        new.pop("bytes_total", None)
        old.pop("bytes_total", None)
    yield from _values("cost", old, new, COST_TOLERANCE, exact=("dense", "teacher", "batch_size"))
    then, again = ({f"batch {m.batch_size}": m.model_dump() for m in r.memory} for r in (recorded, made))
    yield from _values("memory", then, again, MEMORY_TOLERANCE, exact=("dense",))


def _training(recorded: list[TrainingStage], made: list[TrainingStage]) -> Iterator[Difference]:
    if [stage.name for stage in recorded] != [stage.name for stage in made]:
        names = (", ".join(stage.name for stage in stages) or "none" for stages in (recorded, made))
        yield Difference(f"trainings: {next(names)}; made again {next(names)}", within=False)
        return
    for old, new in zip(recorded, made, strict=True):
        exact = {"steps", "examples", "flops"}
        yield from _values(f"training '{old.name}'", old.model_dump(include=exact), new.model_dump(include=exact), 0.0)
        if len(old.history) != len(new.history):
            yield Difference(f"training '{old.name}': {len(old.history)} records, made again {len(new.history)}", False)
        elif old.history != new.history:
            first, largest = None, 0.0
            for before, now in zip(old.history, new.history, strict=True):
                if before != now:
                    first = first if first is not None else before.get("step")
                    largest = max(largest, abs(before.get("loss", 0.0) - now.get("loss", 0.0)))
            text = f"losses of '{old.name}': they part by step {first:.0f}, and are up to {largest:.2g} apart"
            yield Difference(text, within=True)


def _values(what: str, before: Any, now: Any, tolerance: float, exact: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Compare nested values; numbers may differ by ``tolerance``, but where their name holds one of ``exact``.

    Parameters
    ----------
    what
        What they are.
    before, now
        As recorded, and as made again.
    tolerance
        Relative; infinite where anything may differ.
    exact
        Parts of names of what is the same anywhere.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            name = f"{what}.{key}" if what else str(key)
            yield from _values(name, before.get(key), now.get(key), tolerance, exact)
        return
    if before == now or (_is_nan(before) and _is_nan(now)):
        return
    within = math.isinf(tolerance)
    if not within and _is_number(before) and _is_number(now) and not any(part in what for part in exact):
        within = abs(before - now) <= tolerance * max(abs(before), abs(now))
    yield Difference(f"{what}: {_shown(before)} recorded, {_shown(now)} made again", within)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _shown(value: Any) -> str:
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
