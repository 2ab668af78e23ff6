"""Every method that is installed, as a class of tests of its own: ``pruning_l0`` is ``TestPruningL0``."""

from __future__ import annotations

import re
from typing import Any

from bench.registry import methods
from bench.testing.conformance import MethodConformance

_QUICK: dict[str, dict[str, Any]] = {"variator": {"pretrain_steps": 2, "pretrain_batch_size": 4, "pretrain_length": 32}}

for _name in methods():
    _class = "Test" + "".join(part[:1].upper() + part[1:] for part in re.split(r"\W|_", _name))
    globals()[_class] = type(
        _class,
        (MethodConformance,),
        {"__doc__": f"Tests of {_name}.", "method": _name, "options": _QUICK.get(_name, {})},
    )
