"""Names -> methods, built in or from other packages through the entry-point group ``bench.methods``."""

from __future__ import annotations

import functools
import warnings
from importlib import import_module
from importlib.metadata import entry_points

from bench.errors import unknown
from bench.methods.base import Method

METHOD_GROUP = "bench.methods"

_BUILT_IN = {
    "dense": "bench.methods.dense:Dense",
    "variator": "bench.methods.variator:Variator",
    "distillation": "bench.methods.distillation:Distillation",
    "width_distillation": "bench.methods.width_distillation:WidthDistillation",
    "pruning": "bench.methods.pruning:Pruning",
    "pruning_l0": "bench.methods.pruning_l0:PruningL0",
    "token_dropping": "bench.methods.token_dropping:TokenDropping",
    "topk_tokens": "bench.methods.topk_tokens:TopkTokens",
    "token_merging": "bench.methods.token_merging:TokenMerging",
    "ffn_token_merging": "bench.methods.ffn_token_merging:FFNTokenMerging",
    "token_routing": "bench.methods.token_routing:TokenRouting",
    "moefication": "bench.methods.moefication:Moefication",
    "early_exit": "bench.methods.early_exit:EarlyExit",
    "quantization": "bench.methods.quantization:Quantization",
}


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Return every method by name; a broken third-party one is a warning that names its origin."""
    found = {name: _load(where) for name, where in _BUILT_IN.items()}
    for point in entry_points(group=METHOD_GROUP):
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        try:
            cls = point.load()
            if not (isinstance(cls, type) and issubclass(cls, Method)):
                raise TypeError(f"{point.value} is no subclass of bench.methods.base.Method")
        except Exception as error:
            warnings.warn(
                f"method '{point.name}' from {origin} cannot be loaded and is left out: {error}", stacklevel=2
            )
            continue
        if point.name in found:
            warnings.warn(f"method '{point.name}' from {origin} is left out: the name is taken", stacklevel=2)
            continue
        found[point.name] = cls
    return found


def method(name: str) -> type[Method]:
    """Return the method called ``name``.

    Raises
    ------
    ConfigError
        If there is none; the nearest name is given.
    """
    known = methods()
    if name not in known:
        raise unknown("method", name, known)
    return known[name]


def _load(where: str) -> type[Method]:
    module, _, attribute = where.partition(":")
    cls: type[Method] = getattr(import_module(module), attribute)
    return cls
