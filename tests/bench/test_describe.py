"""What the library says of its own keys and methods comes from the code that defines them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import describe
from bench.config import RunConfig, known_keys
from bench.describe import Entry, Key, attributes, fill, keys
from bench.methods.base import Method
from bench.registry import methods


def test_descriptions_come_from_the_docstrings() -> None:
    class Thing:
        """A thing.

        Attributes
        ----------
        one
            The first,
            on two lines with ``code``.
        two, three
            Both.

        Notes
        -----
        four
            No attribute.
        """

    assert attributes(Thing) == {"one": "The first, on two lines with code.", "two": "Both.", "three": "Both."}
    assert attributes(int) == {}
    for cls in (RunConfig, *methods().values()):
        fields = set(attributes(cls)) - set(attributes(Method)) - {"options"}
        assert fields <= set(known_keys()), "a docstring speaks of what is no key"


@dataclass(frozen=True)
class _Trained(Method):
    """Trains.

    Attributes
    ----------
    rate
        How fast.
    """

    paper = summary = trains = saves = "-"
    version = 1

    rate: float = 0.1

    def compress(self, teacher: Any, data: Any, ctx: Any) -> Any:
        return teacher.model


def _kind(name: str, uses: frozenset[str], rate: float = 0.1, **options: tuple[type, Any, str]) -> type[Method]:
    """Return a method whose further options are given as name -> (type, default, meaning)."""
    body = {"name": name, "uses": uses, "rate": rate, **{key: default for key, (_, default, _) in options.items()}}
    hints = {"rate": float, **{key: kind for key, (kind, _, _) in options.items()}}
    meanings = "".join(f"{key}\n    {text}\n" for key, (_, _, text) in options.items())
    doc = f"A method.\n\nAttributes\n----------\n{meanings}" if meanings else "A method."
    cls = type(name, (_Trained,), body | {"__annotations__": hints, "__doc__": doc})
    return dataclass(frozen=True)(cls)


TRAINING = frozenset({"ratio", "steps", "batch_size"})


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Key]:
    """Return the keys of six methods made up here, under ``name``, or ``name/reader`` for what means two things."""
    found = {
        "a": _kind("a", TRAINING, width=(int, 4, "How wide.")),
        "b": _kind("b", TRAINING, width=(int, 8, "How wide.")),
        "c": _kind("c", TRAINING, rate=0.2, width=(str, "all", "Which widths.")),
        "d": _kind("d", TRAINING, rate=0.2),
        "e": _kind("e", TRAINING),
        "still": _kind("still", frozenset({"ratio"}), length=(int, 3, "How long.")),
    }
    monkeypatch.setattr(describe, "methods", lambda: found)
    return {f"{key.name}/{next(iter(key.defaults))}" if key.name == "width" else key.name: key for key in keys()}


def test_what_means_the_same_is_one_key_with_every_default(known: dict[str, Key]) -> None:
    assert known["rate"].text == "How fast."
    assert known["rate"].default == "0.1; c, d 0.2"
    assert known["width/a"].defaults == {"a": 4, "b": 8} and known["width/a"].default == "4; b 8"
    assert known["width/c"].defaults == {"c": "all"} and known["width/c"].text == "Which widths."
    assert known["seed"].defaults == {"run": 0} and known["ratio"].default == ""


def test_readers_are_named_shortly(known: dict[str, Key]) -> None:
    assert known["seed"].readers == "run"
    assert known["width/a"].readers == "a, b", "five train, so that naming those that do not is no shorter"
    assert known["length"].readers == "still"
    assert known["rate"].readers == "a, b, c, d, e, still", "one of them does not train"
    every = dict.fromkeys("abcde", 1)
    assert Key("x", every, "").readers == "every method that trains"
    assert Key("x", {name: 1 for name in every if name != "c"}, "").readers == "every method that trains but c"
    assert Key("x", dict.fromkeys("abe", 1), "").readers == "every method that trains but c and d"


def test_keys_come_by_how_many_read_them(known: dict[str, Key]) -> None:
    order = list(known)
    assert order[0] == "task" and order.index("precision") < order.index("rate") < order.index("length")
    assert order.index("width/a") < order.index("width/c")


class _Picky(_Trained):
    name = "picky"

    def skip(self, backbone: Any, task: Any, ratio: float | None) -> str | None:
        if task.kind == "qa":
            return "finds no answers"
        return "a gate is in the way" if backbone.gated else None


class _OnlyBert(_Trained):
    name = "only_bert"

    def skip(self, backbone: Any, task: Any, ratio: float | None) -> str | None:
        return None if backbone.family == "bert" else "needs BERT"


def test_the_catalogue_says_where_a_method_does_not_run() -> None:
    picky, only = Entry.of(_Picky), Entry.of(_OnlyBert)
    assert picky.families == ("bert", "t5")
    assert picky.limits == ("not qa: finds no answers", "not single, regression on flan-t5-base: a gate is in the way")
    assert only.families == ("bert",) and only.limits == ("not t5-base, flan-t5-base: needs BERT",)


def test_the_tables_of_the_documents_are_those_of_the_code() -> None:
    docs = Path(__file__).parents[2] / "docs"
    filled = [path for path in docs.glob("*.md") if "<!-- /" in path.read_text()]
    assert {path.name for path in filled} == {"methods.md", "saved.md"}
    for path in filled:
        assert fill(path.read_text()) == path.read_text(), "run `make docs`"
    path = docs / "methods.md"
    for name in methods():
        assert path.read_text().count(f"| `{name}` |") == 2


def _numbers(table: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0].split(":")[0].strip("*"): [cell.strip("*") for cell in row[1:]] for row in rows}


def test_the_sum_of_the_claim_is_reckoned_by_hand() -> None:
    """T5-base, 128 tokens, k = 4, from the formulas of the paper's release and not from this library."""
    n, d, f, r, k = 128, 768, 3072, 64, 4
    attention, ffn = 4 * n * d * d + 2 * n * n * d, 2 * n * d * f
    merging, concat, split = n * k * d + n * d, 3 * n * d * r, (n // k + 2 * n) * d * r
    dense = attention + ffn
    released, ours = (attention + ffn // k + merging + adapter for adapter in (concat, split))
    found = _numbers(describe.arithmetic_table())
    columns = zip(
        (attention, ffn, 0, 0, dense),
        (attention, ffn // k, merging, concat, released),
        (attention, ffn // k, merging, split, ours),
        strict=True,
    )
    for row, numbers in zip(("attention", "FFN", "merging", "expanding", "sum"), columns, strict=True):
        assert found[row] == [f"{number:,}" for number in numbers]
    assert found["remaining"] == ["100.0%", "53.4%", "52.9%"] and found["saved"] == ["0.0%", "46.6%", "47.1%"]
    assert [f"{share / dense:.1%}" for share in (dense, released, ours)] == found["remaining"]


def test_what_remains_at_every_k_is_the_known_arithmetic() -> None:
    found = _numbers(describe.shares_table())
    assert {k: row[:2] for k, row in found.items()} == {
        "2": ["69.6%", "30.4%"],
        "4": ["53.4%", "46.6%"],
        "8": ["45.4%", "54.6%"],
        "16": ["41.4%", "58.6%"],
    }
    assert [row[-1] for row in found.values()][:3] == ["0.81%", "0.86%", "1.06%"]
    spec = describe.spec_of("t5-base")
    least = min(describe.remaining(spec, k, {128: 1}, form=form) for k in range(2, 129) for form in ("concat", "split"))
    assert 0.38 < least < 0.39, "docs/saved.md says that no k saves more than 62 %"


def test_a_table_goes_between_its_markers_and_nowhere_else() -> None:
    text = "a\n<!-- settings -->\nstale text\n<!-- /settings -->\nz <!-- others -->\n"
    once = fill(text)
    assert once.startswith("a\n<!-- settings -->\n\n| method |") and once.endswith(
        "|\n\n<!-- /settings -->\nz <!-- others -->\n"
    )
    assert "stale" not in once and fill(once) == once and fill("none") == "none"
