"""What every method is: names, options with types, an identity, and a plan that needs no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from bench.backbones.catalogue import spec_of
from bench.errors import ConfigError
from bench.methods.base import Method, Work
from bench.methods.dense import Dense
from bench.methods.variator import Variator
from bench.registry import methods
from bench.tasks.catalogue import TASKS

EVERY = sorted(methods().items())


@pytest.mark.parametrize(("name", "cls"), EVERY)
def test_it_says_what_it_is(name: str, cls: type[Method]) -> None:
    assert cls.name == name
    for text in (cls.paper, cls.summary, cls.trains, cls.saves):
        assert text and "\n" not in text
    assert cls.uses <= {"ratio", "steps", "batch_size"}


@pytest.mark.parametrize(("name", "cls"), EVERY)
def test_its_options_build_it(name: str, cls: type[Method]) -> None:
    made = cls.from_options(cls.options())
    assert made == cls() and isinstance(made, cls)
    with pytest.raises(FrozenInstanceError):
        made.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("name", "cls"), EVERY)
def test_its_identity_is_plain(name: str, cls: type[Method]) -> None:
    for value in cls().identity(None).values():
        assert value is None or isinstance(value, str | int | float | bool | list | tuple)


def test_an_option_of_the_wrong_type_names_method_and_option() -> None:
    with pytest.raises(ConfigError, match="variator: bottleneck = 'wide': input should be a valid integer"):
        Variator.from_options({"bottleneck": "wide"})
    assert Variator.from_options({"bottleneck": "32", "lr": "1e-4"}) == Variator(bottleneck=32, lr=1e-4)


@pytest.mark.parametrize("ratio", [None, 1, 0, 1.5, 2.5, -2])
def test_variator_refuses_a_ratio_that_is_no_number_of_vectors(ratio: float | None) -> None:
    reason = Variator().skip(spec_of("t5-base"), TASKS["sst2"], ratio)
    assert reason is not None and "whole number of at least 2" in reason and str(ratio) in reason


@pytest.mark.parametrize("ratio", [2, 2.0, 3, 8, 16])
def test_variator_takes_any_whole_k(ratio: float) -> None:
    assert Variator().skip(spec_of("t5-base"), TASKS["squad"], ratio) is None
    setting = Variator().setting(spec_of("t5-base"), ratio, {128: 1})
    assert setting.knob == {"k": int(ratio)} and setting.note == ""


def test_work_is_what_will_be_trained() -> None:
    adapt = Work("adapt", 100, 8)
    pretrain = Work("pretrain", 50, 4, tokens=64, shared=True)
    plain = Variator(pretrain_steps=0)
    whole = Variator(pretrain_steps=50, pretrain_batch_size=4, pretrain_length=64)
    assert plain.work(100, 8) == [adapt]
    assert whole.work(100, 8) == [pretrain, adapt]
    assert whole.work(0, 8) == [pretrain] and plain.work(0, 8) == []
    assert Dense().work(100, 8) == []


def test_listing_methods_imports_no_torch() -> None:
    code = (
        "import sys\nfrom bench.config import RunConfig, known_keys\nfrom bench.registry import methods\n"
        "known_keys(); RunConfig.build({'ratio': 2}).identity('d', 'm')\n"
        "[m().work(1, 1) for m in methods().values()]\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pandas') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[3]
    )
    assert done.stdout.strip() == "[]", done.stderr
