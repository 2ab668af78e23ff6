"""The Pareto fronts of a sweep that still runs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from bench.results import RunResult


@dataclass(frozen=True)
class Point:
    """A result on the accuracy-against-FLOPs plane.

    Attributes
    ----------
    where
        Task and backbone: only points of one of these are compared.
    name
        Method, and k where it has one.
    remaining
        Remaining encoder FLOPs.
    score
        Primary metric on dev.
    """

    where: str
    name: str
    remaining: float
    score: float

    @classmethod
    def of(cls, result: RunResult) -> Point | None:
        """Return the point of a result, or ``None`` if it has none."""
        evaluation = result.evaluation("dev")
        if result.status != "done" or result.cost is None or evaluation is None:
            return None
        config = result.config
        k = f" k={config['ratio']:g}" if result.cost.requested_remaining is not None and config.get("ratio") else ""
        score = next(iter(evaluation.metrics.values())).value
        where = f"{config['task']} · {config['backbone']}"
        return cls(where, f"{config['method']}{k}", result.cost.achieved_remaining, score)


class Fronts:
    """The points so far that no other point beats in both score and FLOPs, by task and backbone."""

    def __init__(self) -> None:
        self.fronts: dict[str, list[Point]] = {}

    def add(self, point: Point) -> None:
        """Take a point into account; its front becomes the latest."""
        others = self.fronts.pop(point.where, [])
        if not any(_beats(other, point) for other in others):
            others = [point, *(other for other in others if not _beats(point, other))]
        self.fronts[point.where] = sorted(others, key=lambda p: p.remaining)

    def lines(self, most: int = 3) -> list[str]:
        """Return a line for each of the latest fronts, cheapest first."""
        return [
            f"{where}: " + ", ".join(f"{p.name} {p.score:.1%} at {p.remaining:.0%} FLOPs" for p in front)
            for where, front in list(self.fronts.items())[-most:]
        ]


def _beats(one: Point, other: Point) -> bool:
    no_worse = one.score >= other.score and one.remaining <= other.remaining
    return no_worse and (one.score, one.remaining) != (other.score, other.remaining)
