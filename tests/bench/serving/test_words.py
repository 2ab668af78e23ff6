"""Loads and policies as a person writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import ConfigError
from bench.serving.loads import LOADS, Bursty, Day, Load, Poisson, Replay
from bench.serving.policies import Deadline, Policy, QueueLength, Static, policies
from bench.serving.words import read, written


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("poisson", Poisson(0.7)),
        ("poisson:", Poisson(0.7)),
        ("poisson:1.1", Poisson(1.1)),
        ("poisson:load=2e-1", Poisson(0.2)),
        ("bursty:high=2,stay=10", Bursty(0.4, 2.0, 10.0)),
        ("bursty:0.1,high=2", Bursty(0.1, 2.0)),
        ("day:low=1,high=1", Day(1.0, 1.0)),
        ("replay:trace.txt", Replay(Path("trace.txt"))),
        ("replay:file=a=b.txt", Replay(Path("a=b.txt"))),
    ],
)
def test_a_load_is_read(text: str, meant: Load) -> None:
    assert read(text, "load", LOADS) == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("static", Static(1)),
        ("static:8", Static(8)),
        ("queue:up=24,down=4", QueueLength(24.0, 4.0)),
        ("queue:down=0", QueueLength(1.0, 0.0)),
        ("deadline:0.25", Deadline(0.25)),
    ],
)
def test_a_policy_is_read(text: str, meant: Policy) -> None:
    assert read(text, "policy", policies()) == meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bursti", r"unknown load 'bursti'\. Did you mean 'bursty'\? Known: bursty, day, poisson, replay\."),
        ("", "unknown load ''"),
        (
            "bursty:hihg=2",
            r"'bursty:hihg=2': unknown field 'hihg'\. Did you mean 'high'\? Fields of bursty: low, high,",
        ),
        ("bursty:0.1,0.2", r"'0\.2' is no field=value\. Fields of bursty: low, high, stay"),
        ("poisson:1,load=2", "'load' is given twice"),
        ("poisson:fast", "load: input should be a valid number"),
        ("poisson:0", "load: input should be greater than 0"),
        ("poisson:nan", "load: "),
        ("poisson:inf", "load: "),
        ("poisson:-1", "load: input should be greater than 0"),
        ("poisson:2000", "load: input should be less than or equal to 1000"),
        ("bursty:stay=0", "stay: input should be greater than 0"),
        ("bursty:low=2", r"low is 2 and above high, 1\.4"),
        ("day:low=2", r"low is 2 and above high, 1\.4"),
        ("replay", "file: field required"),
    ],
)
def test_what_is_no_load_is_an_error(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(text, "load", LOADS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dedline", r"unknown policy 'dedline'\. Did you mean 'deadline'\?"),
        ("static:0", "k: input should be greater than or equal to 1"),
        ("static:2.5", "k: input should be a valid integer"),
        ("queue:up=1,down=1", "down is 1 and must be below up, 1"),
        ("queue:up=0", "up: input should be greater than 0"),
        ("queue:down=-1", "down: input should be greater than or equal to 0"),
        ("queue:up=nan", "up: "),
        ("deadline:1", "margin: input should be less than 1"),
        ("deadline:margin=-0.1", "margin: input should be greater than or equal to 0"),
    ],
)
def test_what_is_no_policy_is_an_error(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(text, "policy", policies())


SHARES = st.floats(1e-12, 1000)
CHOICES = st.one_of(
    st.builds(Poisson, SHARES),
    st.tuples(SHARES, SHARES, st.floats(1e-9, 1e12)).map(lambda t: Bursty(min(t[:2]), max(t[:2]), t[2])),
    st.tuples(SHARES, SHARES).map(lambda t: Day(min(t), max(t))),
    st.builds(Replay, st.from_regex(r"(/[a-z=. ]{1,5}){1,3}/trace", fullmatch=True).map(Path)),
    st.builds(Static, st.integers(1, 10**6)),
    st.tuples(st.floats(0, 1e9), st.floats(1e-9, 1e9))
    .filter(lambda t: t[0] < t[1])
    .map(lambda t: QueueLength(t[1], t[0])),
    st.builds(Deadline, st.floats(0, 1, exclude_max=True)),
)


@given(CHOICES)
def test_what_is_written_is_read_again_to_the_last_digit(choice: Load | Policy) -> None:
    known: dict[str, type[Load | Policy]] = {**LOADS, **policies()}
    assert read(written(choice.name, choice), "choice", known) == choice


def test_whole_numbers_are_written_short() -> None:
    assert written("bursty", Bursty(0.5, 1.0, 3.0)) == "bursty:low=0.5,high=1,stay=3"
    assert written("nothing", object.__new__(type("Nothing", (), {}))) == "nothing"
