"""The fronts that are shown while a sweep runs: what no other result beats in both score and FLOPs."""

from __future__ import annotations

import random

from bench.launch.front import Fronts, Point
from bench.results import CostPair, Flops, RunResult
from tests.analysis.synthetic import make_run


def point(name: str, remaining: float, score: float, where: str = "sst2 · bert") -> Point:
    return Point(where, name, remaining, score)


def names(fronts: Fronts, where: str = "sst2 · bert") -> list[str]:
    return [p.name for p in fronts.fronts[where]]


def test_a_point_leaves_the_front_when_it_is_beaten() -> None:
    fronts = Fronts()
    for p in (point("dense", 1.0, 0.9), point("a", 0.5, 0.8), point("b", 0.6, 0.8), point("c", 0.4, 0.7)):
        fronts.add(p)
    assert names(fronts) == ["c", "a", "dense"], "b costs more than a for the same score"
    fronts.add(point("d", 0.4, 0.85))
    assert names(fronts) == ["d", "dense"]
    fronts.add(point("e", 0.4, 0.85))
    assert sorted(names(fronts)) == ["d", "dense", "e"], "equals do not beat each other"


def test_the_front_is_that_of_the_definition_whatever_the_order() -> None:
    draw = random.Random(0)
    points = [point(str(i), draw.randrange(10) / 10, draw.randrange(10) / 10) for i in range(60)]
    best = {
        p.name
        for p in points
        if not any(
            q.score >= p.score and q.remaining <= p.remaining and (q.score > p.score or q.remaining < p.remaining)
            for q in points
        )
    }
    for _ in range(5):
        draw.shuffle(points)
        fronts = Fronts()
        for p in points:
            fronts.add(p)
        assert set(names(fronts)) == best
        assert [p.remaining for p in fronts.fronts["sst2 · bert"]] == sorted(
            p.remaining for p in fronts.fronts["sst2 · bert"]
        )


def test_tasks_do_not_compete_and_the_latest_are_shown() -> None:
    fronts = Fronts()
    for number in range(5):
        fronts.add(point("variator k=4", 0.55, 0.5 + number / 10, f"task{number} · bert"))
    fronts.add(point("dense", 1.0, 0.95, "task0 · bert"))
    assert fronts.lines(2) == [
        "task4 · bert: variator k=4 90.0% at 55% FLOPs",
        "task0 · bert: variator k=4 50.0% at 55% FLOPs, dense 95.0% at 100% FLOPs",
    ]


def test_a_result_without_numbers_has_no_point() -> None:
    done, _ = make_run(ratio=4.0)
    assert isinstance(done, RunResult) and done.cost
    done.cost.real = CostPair(dense=Flops(encoder=10), compressed=Flops(encoder=5))
    found = Point.of(done)
    assert found and (found.where, found.name) == ("sst2 · t5-base", "variator k=4")
    assert found.remaining == done.cost.achieved_remaining
    dense = Point.of(make_run(method="dense", ratio=4.0)[0])
    assert dense and dense.name == "dense"
    assert Point.of(make_run(status="failed")[0]) is None
