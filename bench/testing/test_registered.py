"""Every method that is installed, as a class of tests of its own: ``pruning_l0`` is ``TestPruningL0``."""

from __future__ import annotations

import re
from typing import Any

from bench.registry import methods
from bench.testing.conformance import MethodConformance

_OPTIONS: dict[str, dict[str, Any]] = {
    "variator": {"pretrain_steps": 2, "pretrain_batch_size": 4, "pretrain_length": 32},
    # what trains has more to get wrong; without a step it is what it is by default
    "token_merging": {"finetune": True},
    "ffn_token_merging": {"finetune": True},
}
_SHAPES: dict[str, dict[str, dict[str, Any]]] = {"moefication": {"bert": {"hidden_act": "relu"}}}

for _name in methods():
    _class = "Test" + "".join(part[:1].upper() + part[1:] for part in re.split(r"\W|_", _name))
    globals()[_class] = type(
        _class,
        (MethodConformance,),
        {
            "__doc__": f"Tests of {_name}.",
            "method": _name,
            "options": _OPTIONS.get(_name, {}),
            "shape": _SHAPES.get(_name, {}),
        },
    )
