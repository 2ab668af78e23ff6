"""Which loss parts there are, and how a mix of them is written. Imports no torch, so that a sweep can be checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.errors import ConfigError, unknown

HIDDEN_PARTS = ("last_hidden", "all_hidden", "released_hidden")
"""Parts that compare hidden states alone; the others need a task."""

PARTS = (*HIDDEN_PARTS, "logits", "task")
"""Names of the loss parts; see ``bench.training.losses.distillation_losses``."""


def parse_mix(mix: str, known: Sequence[str] = PARTS) -> dict[str, float]:
    """Read a mix such as ``"all_hidden=1,logits=0.5"``; a part without a number weighs 1.

    Parameters
    ----------
    mix
        Parts and weights.
    known
        Parts that may be used.

    Returns
    -------
    dict
        Part -> weight, the parts that weigh 0 left out.

    Raises
    ------
    ConfigError
        If a part is unknown or comes twice, a weight is no number of at least 0, or none is above 0.
    """
    weights: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in mix.split(","))):
        name, _, number = (text.strip() for text in item.partition("="))
        if name not in known:
            raise unknown("loss part", name, known)
        if name in weights:
            raise ConfigError(f"the loss part '{name}' comes twice in '{mix}'")
        weights[name] = _weight(number or "1", item)
    if not any(weights.values()):
        raise ConfigError(f"the losses '{mix}' leave nothing to train on; give parts such as 'all_hidden=1'")
    return {name: weight for name, weight in weights.items() if weight}


def _weight(text: str, item: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ConfigError(f"the weight of a loss part is a number of at least 0, got '{item}'")
    return weight
