"""Names -> methods, built in or from other packages through the entry-point group ``bench.methods``."""

from __future__ import annotations

import functools
from importlib import import_module

from bench.entry_points import Registered, from_entry_points
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
def registered_methods() -> dict[str, Registered[type[Method]]]:
    """Return the methods of other packages by name, each with its origin."""
    return from_entry_points(METHOD_GROUP, "method", _read, _BUILT_IN)


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Return every method by name."""
    own = {name: _load(where) for name, where in _BUILT_IN.items()}
    return own | {name: found.value for name, found in registered_methods().items()}


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


def _read(name: str, found: object) -> type[Method]:
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise TypeError(f"{found!r} is no subclass of bench.methods.base.Method")
    return found


def _load(where: str) -> type[Method]:
    module, _, attribute = where.partition(":")
    cls: type[Method] = getattr(import_module(module), attribute)
    return cls
