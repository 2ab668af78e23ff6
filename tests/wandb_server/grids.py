"""What a sweep asks for, and which runs a filter means."""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests.wandb_server.graphql import Refused

_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda v, w: v == w or (isinstance(v, list) and w in v),
    "$ne": operator.ne,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
    "$in": lambda v, w: v in w,
    "$nin": lambda v, w: v not in w,
}


def check_sweep(config: Any) -> None:
    """Refuse what W&B refuses."""
    for section, kind in (("method", str), ("parameters", dict)):
        if not isinstance(config, dict) or not isinstance(config.get(section), kind):
            raise Refused(f"Invalid sweep config: Sweep config must contain {section} section")
    if config["method"] != "grid":
        raise Refused(f"Invalid sweep config: this server has no method {config['method']}")
    list(_leaves(config["parameters"]))


def grid_points(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each point as the arguments of an agent: ``{"lr": {"value": 0.1}}``."""
    names, lists = zip(*_leaves(config["parameters"]), strict=True)
    for point in itertools.product(*lists):
        yield {name: {"value": value} for name, value in zip(names, point, strict=True)}


def _leaves(parameters: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for key in sorted(parameters):
        spec = parameters[key]
        if not isinstance(spec, dict) or not {"value", "values"} & set(spec):
            raise Refused(f"Invalid sweep config: invalid hyperparameter configuration: {key}")
        values = spec["values"] if "values" in spec else [spec["value"]]
        yield key, list({json.dumps(v, sort_keys=True): v for v in values}.values())


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"lr": 1}`` for ``{"lr": {"value": 1}}``, without the client's own keys."""
    return {
        k: v["value"] if isinstance(v, dict) and "value" in v else v
        for k, v in config.items()
        if k not in ("_wandb", "wandb_version")
    }


def find_runs(runs: Sequence[dict[str, Any]], arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the runs that a query's ``filters`` mean, in its ``order``."""
    order = (arguments.get("order") or "+created_at").split(",")[0]
    found = [r for r in runs if _matches(r, json.loads(arguments.get("filters") or "{}"))]
    known = [r for r in found if _value_of(r, order.lstrip("+-")) is not None]
    known.sort(key=lambda r: _value_of(r, order.lstrip("+-")), reverse=order.startswith("-"))
    return known + [r for r in found if r not in known]


def _value_of(run: Mapping[str, Any], path: str) -> Any:
    """Return what a filter names: ``config.lr``, ``summary_metrics.loss``, ``state`` and so on."""
    head, _, rest = path.partition(".")
    if head not in ("config", "summary_metrics", "summaryMetrics"):
        names = {"display_name": "displayName", "created_at": "createdAt", "name": "id", "job_type": "jobType"}
        return run.get(names.get(head, head))
    node: Any = plain(run["rawConfig"]) if head == "config" else run["summary"]
    for part in [rest] if rest in node else rest.removesuffix(".value").split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _matches(run: Mapping[str, Any], query: Mapping[str, Any]) -> bool:
    return all(_holds(run, key, want) for key, want in query.items())


def _holds(run: Mapping[str, Any], key: str, want: Any) -> bool:
    if key in ("$and", "$or"):
        return not want or (all if key == "$and" else any)(_matches(run, q) for q in want)
    tests = want if isinstance(want, dict) else {"$eq": want}
    try:
        return all(_TESTS[name](_value_of(run, key), w) for name, w in tests.items())
    except TypeError:  # None < 1: what a run does not have matches nothing
        return False
