"""Arrivals against the laws that they are to follow. Seeded, with bounds that chance leaves once in millions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from bench.errors import ConfigError
from bench.serving.loads import Bursty, Day, Load, Poisson, Replay

LOADS = [Poisson(0.7), Bursty(0.4, 1.4, 3.0), Day(0.2, 1.4)]
SIGMAS = 5.0


def counts(load: Load, capacity: float, seconds: float, seeds: int) -> NDArray[np.int64]:
    return np.array([len(load.arrivals(capacity, seconds, np.random.default_rng(seed))) for seed in range(seeds)])


def mean_is(values: NDArray[np.int64], mean: float, variance: float) -> bool:
    return bool(abs(values.mean() - mean) < SIGMAS * np.sqrt(variance / len(values)))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("seconds", [0.01, 7.0, 300.0])
def test_arrivals_ascend_and_end_in_time(load: Load, seconds: float) -> None:
    for seed in range(20):
        times = load.arrivals(40.0, seconds, np.random.default_rng(seed))
        assert (np.diff(times) >= 0).all() and (times >= 0).all() and (times < seconds).all()


@pytest.mark.parametrize("load", LOADS)
def test_the_same_seed_gives_the_same_arrivals(load: Load) -> None:
    first, again, other = (load.arrivals(40.0, 60.0, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert len(first) != len(other) or (first != other).any()


@pytest.mark.parametrize("load", LOADS)
def test_a_quicker_machine_gets_as_many_times_the_requests(load: Load) -> None:
    """On average; a burst is as long on any machine."""
    slow, quick = (counts(load, capacity, 60.0, 300) for capacity in (10.0, 100.0))
    spread = np.sqrt(quick.var() / 300 + 100 * slow.var() / 300)
    assert abs(quick.mean() - 10 * slow.mean()) < SIGMAS * spread
    assert quick.mean() > 5 * slow.mean()


@pytest.mark.parametrize(("share", "capacity"), [(0.7, 50.0), (1.3, 20.0)])
def test_gaps_of_a_poisson_process_are_exponential(share: float, capacity: float) -> None:
    times = Poisson(share).arrivals(capacity, 1000.0, np.random.default_rng(0))
    gaps = np.diff(times, prepend=0.0)
    assert stats.kstest(gaps, stats.expon(scale=1 / (share * capacity)).cdf).pvalue > 1e-4
    # and a gap says nothing of the next one
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < SIGMAS / np.sqrt(len(gaps))


def test_counts_of_a_poisson_process_have_one_mean_and_variance() -> None:
    n, expected = 2000, 0.7 * 30 * 4
    found = counts(Poisson(0.7), 30.0, 4.0, n)
    assert mean_is(found, expected, expected)
    # the variance of a sample variance of a Poisson law is (2 m^2 + m) / n, but for terms of 1 / n^2
    assert abs(found.var(ddof=1) - expected) < SIGMAS * np.sqrt((2 * expected**2 + expected) / n)


def test_counts_of_bursts_follow_the_law_of_a_modulated_poisson_process() -> None:
    """Mean (low + high) / 2; the variance has a second part, that of the rate integrated over the run.

    With states that are left at rate s, the rate's covariance at distance u is ((high - low) / 2)^2 exp(-2 s u).
    """
    low, high, stay, seconds, capacity, n = 0.4, 1.6, 2.0, 30.0, 40.0, 3000
    found = counts(Bursty(low, high, stay), capacity, seconds, n)
    mean = (low + high) / 2 * capacity * seconds
    decay = 2 / stay
    of_rate = 2 * ((high - low) / 2 * capacity) ** 2 * (seconds / decay - (1 - np.exp(-decay * seconds)) / decay**2)
    assert mean_is(found, mean, mean + of_rate)
    dispersion = found.var(ddof=1) / found.mean()
    assert dispersion > 10
    # the sum over many stays is nearly normal, whose sample variance has a relative deviation of sqrt(2 / n)
    assert abs(dispersion / ((mean + of_rate) / mean) - 1) < SIGMAS * np.sqrt(2 / n)


def test_a_burst_stays_as_long_as_it_says() -> None:
    """A state that lasts much longer than the run makes two kinds of runs, both Poisson."""
    found = counts(Bursty(0.2, 2.0, 1e9), 50.0, 10.0, 400)
    quiet, busy = found[found < 500], found[found >= 500]
    assert mean_is(quiet, 100, 100) and mean_is(busy, 1000, 1000)
    assert abs(len(busy) - 200) < SIGMAS * 10


def test_a_day_follows_its_curve() -> None:
    low, high, capacity, seconds, seeds, bins = 0.2, 1.4, 60.0, 24.0, 400, 12
    found = [Day(low, high).arrivals(capacity, seconds, np.random.default_rng(seed)) for seed in range(seeds)]
    seen, edges = np.histogram(np.concatenate(found), bins=bins, range=(0, seconds))
    # the integral of low + (high - low) (1 - cos(2 pi t / T)) / 2
    swing, turn = (high - low) / 2, 2 * np.pi / seconds
    whole = (low + swing) * edges - swing * np.sin(turn * edges) / turn
    expected = seeds * capacity * np.diff(whole)
    assert np.isclose(expected.sum(), seeds * capacity * seconds * (low + high) / 2)
    assert (abs(seen - expected) < SIGMAS * np.sqrt(expected)).all()
    assert seen[0] < seen[2] < seen[5] and seen[-1] < seen[-3] < seen[6]
    # thinned, it is still a Poisson process: counts of whole days vary as much as they are many
    each = np.array([len(times) for times in found])
    assert abs(each.var(ddof=1) / each.mean() - 1) < SIGMAS * np.sqrt(2 / seeds)


def test_a_flat_day_is_a_poisson_process() -> None:
    times = Day(0.5, 0.5).arrivals(40.0, 500.0, np.random.default_rng(3))
    assert stats.kstest(np.diff(times), stats.expon(scale=1 / 20).cdf).pvalue > 1e-4


def replay(folder: Path, text: str, seconds: float = 10.0, capacity: float = 1.0) -> list[float]:
    path = folder / "trace.txt"
    path.write_text(text)
    return Replay(path).arrivals(capacity, seconds, np.random.default_rng(0)).tolist()


def test_a_file_is_replayed_as_it_is(tmp_path: Path) -> None:
    text = "# a trace of last night\n100\n\n100.5  # two at once\n100.5\n  101.25\n1.09e2\n110\n200\n"
    for capacity in (1.0, 1000.0):
        assert replay(tmp_path, text, capacity=capacity) == [0, 0.5, 0.5, 1.25, 9]
    assert replay(tmp_path, text, seconds=10.1) == [0, 0.5, 0.5, 1.25, 9, 10]
    assert replay(tmp_path, "-3\n-1\n") == [0, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0\n1;2\n", r"trace\.txt: arrivals are one number of seconds a line; .*'1;2'"),
        ("time\n0\n", r"trace\.txt: .*'time'"),
        ("", r"trace\.txt: .*at least one"),
        ("# nothing\n\n", r"trace\.txt: .*at least one"),
        ("1\n0.5\n", r"trace\.txt: .*in ascending order"),
        ("0\nnan\n1\n", r"trace\.txt: .*finite"),
        ("0\ninf\n", r"trace\.txt: .*finite"),
    ],
)
def test_a_file_that_holds_anything_else_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replay(tmp_path, text)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read arrivals of .*nowhere\.txt: No such file"):
        Replay(tmp_path / "nowhere.txt").arrivals(1, 1, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"cannot read arrivals of .*: Is a directory"):
        Replay(tmp_path).arrivals(1, 1, np.random.default_rng(0))
    (tmp_path / "trace.gz").write_bytes(b"\x1f\x8b\xff\xfe")
    with pytest.raises(ConfigError, match=r"trace\.gz: arrivals are one number"):
        Replay(tmp_path / "trace.gz").arrivals(1, 1, np.random.default_rng(0))
