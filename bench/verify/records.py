"""Whether a stored result agrees with itself, which needs nothing to be run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench.config import run_id
from bench.errors import BenchError
from bench.results import ResultStore, RunResult

if TYPE_CHECKING:
    import pandas as pd


def read_predictions(store: ResultStore, result: RunResult) -> pd.DataFrame | None:
    """Return the per-example predictions of a result, or ``None`` where it has none.

    Raises
    ------
    BenchError
        If the file is missing or torn.
    """
    import pandas as pd

    if result.predictions is None:
        return None
    path = store.folder / result.predictions
    try:
        return pd.read_parquet(path)
    except Exception as error:  # pyarrow has its own errors for what is torn
        raise BenchError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def contradictions(result: RunResult, predictions: pd.DataFrame | None) -> Iterator[str]:
    """Yield each statement of a result that another of its statements refutes.

    Parameters
    ----------
    result
        The stored result.
    predictions
        Its own per-example predictions, those of dev.
    """
    if run_id(result.identity) != result.run_id:
        yield f"the identity is that of run {run_id(result.identity)}"
    if result.status != "done":
        return
    dev = result.evaluation("dev")
    if predictions is None or dev is None or result.cost is None:
        yield "it is done, but lacks predictions, an evaluation on dev or a cost"
        return
    if len(predictions) != dev.n_examples:
        yield f"{dev.n_examples} dev examples, but {len(predictions)} predictions"
        return
    from bench.tasks.metrics import bootstrap

    answers, labels = predictions["prediction"].tolist(), plain(predictions["label"])
    for name, stated in dev.metrics.items():
        found = bootstrap(name, answers, labels, stated.resamples, level=stated.level)
        for what in ("value", "low", "high"):
            said, follows = getattr(stated, what), getattr(found, what)
            # a library may round the last digit otherwise
            if not math.isclose(said, follows, rel_tol=1e-9, abs_tol=1e-9):
                yield f"{name}.{what} is {said:.6g}, and {follows:.6g} by its own predictions"
    achieved, follows = result.cost.achieved_remaining, result.cost.real.remaining_encoder
    if not math.isclose(achieved, follows, rel_tol=1e-9):
        yield f"achieved_remaining is {achieved:.6g}, and {follows:.6g} by its own FLOPs"


def plain(labels: pd.Series[Any]) -> list[Any]:
    """Return labels as they were before parquet, which makes an array of a question's accepted answers."""
    return [label if isinstance(label, str | int | float) else list(label) for label in labels.tolist()]
