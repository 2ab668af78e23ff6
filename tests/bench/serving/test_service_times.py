"""Service times between, at and beyond what was measured, against interpolation by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bench.serving.times import ServiceTimes
from tests.bench.serving.calibrated import calibration


def one(times: ServiceTimes, k: int, size: int, length: int) -> float:
    return float(times(k, np.array([size]), np.array([length]))[0])


@pytest.fixture(scope="module")
def measured() -> ServiceTimes:
    """Times that are no product and no sum of a part for the size and one for the length; a tenth for k = 2."""
    table = {(1, 10): 1.0, (1, 20): 2.0, (4, 10): 3.0, (4, 20): 8.0, (6, 10): 4.0, (6, 20): 20.0}

    def seconds(k: int, size: int, length: int) -> list[float]:
        median = table[size, length] / (1 if k == 1 else 10)
        return [3 * median, median, 0.9 * median]  # as raw as samples are: neither sorted nor even

    made = calibration(seconds, ks=(1, 2), sizes=(1, 4, 6), lengths=(10, 20), examples=[5, 12, 25, 30])
    return ServiceTimes(made)


def test_at_what_was_measured_it_is_the_median(measured: ServiceTimes) -> None:
    found = measured(1, np.array([1, 4, 6, 6]), np.array([20, 10, 10, 20]))
    assert found.tolist() == pytest.approx([2.0, 3.0, 4.0, 20.0])
    assert one(measured, 2, 4, 20) == pytest.approx(0.8)
    assert measured.ks == (1, 2)


def test_between_it_is_linear_in_size_and_in_length(measured: ServiceTimes) -> None:
    assert one(measured, 1, 1, 13) == pytest.approx(1.3)
    assert one(measured, 1, 2, 10) == pytest.approx(1 + 2 / 3)
    assert one(measured, 1, 5, 20) == pytest.approx(14.0)
    # size 3 is two thirds of the way from 1 to 4, length 15 half of that from 10 to 20
    at_10, at_20 = 1 + 2 / 3 * (3 - 1), 2 + 2 / 3 * (8 - 2)
    assert one(measured, 1, 3, 15) == pytest.approx((at_10 + at_20) / 2)
    assert one(measured, 2, 3, 15) == pytest.approx((at_10 + at_20) / 20)


def test_beyond_the_longest_it_goes_on_and_below_the_shortest_it_stays(measured: ServiceTimes) -> None:
    assert one(measured, 1, 1, 30) == pytest.approx(3.0)
    assert one(measured, 1, 6, 25) == pytest.approx(28.0)
    assert one(measured, 1, 4, 0) == one(measured, 1, 4, 5) == pytest.approx(3.0)


def test_one_size_or_one_length_is_the_same_everywhere() -> None:
    single = ServiceTimes(calibration(lambda k, size, n: [k * n / 10] * 3, ks=(1, 3), sizes=(1,), lengths=(10, 20),
                                      examples=(15, 20)))  # fmt: skip
    assert one(single, 3, 1, 15) == pytest.approx(4.5) and single.largest == 1
    flat = ServiceTimes(calibration(lambda k, size, n: [size], sizes=(1, 2), lengths=(7,), examples=(3, 7, 50)))
    assert [one(flat, 4, 2, length) for length in (0, 3, 7, 8, 50)] == [2.0] * 5
    assert one(ServiceTimes(calibration(lambda k, size, n: [0.5], sizes=(1,), lengths=(7,))), 4, 1, 8) == 0.5


def test_draws_differ_from_the_median_as_the_samples_did() -> None:
    """Each sample over the median of its own batch, at any size, with each k's own spread."""

    def seconds(k: int, size: int, length: int) -> list[float]:
        return [size, 1.5 * size, 0.9 * size] if k == 1 else [size / 10, size / 10, size / 10]

    times = ServiceTimes(calibration(seconds, ks=(1, 2), sizes=(1, 4), lengths=(10, 20), examples=(20,)))
    rng = np.random.default_rng(0)
    drawn = np.array([times.draw(1, 2, 15, rng) for _ in range(6000)])
    values, counts = np.unique(drawn.round(9), return_counts=True)
    assert values.tolist() == pytest.approx([1.8, 2.0, 3.0])
    # a third of the draws each: five sigmas of a binomial law
    assert (abs(counts - 2000) < 5 * np.sqrt(6000 * 2 / 9)).all()
    assert {times.draw(2, 4, 10, rng) for _ in range(20)} == {0.4}


def test_capacity_of_batches_of_one_length_is_their_size_over_their_time() -> None:
    times = ServiceTimes(calibration(lambda k, size, n: [0.1 / k * size], sizes=(1, 8), examples=[8] * 5))
    assert times.capacity(1, np.full(5, 8)) == pytest.approx(10.0)
    assert times.capacity(4, np.full(5, 8)) == pytest.approx(40.0)


def test_capacity_counts_on_the_longest_of_each_batch() -> None:
    """Half of the examples are long: of a batch of 4, one in 2^4 has none of them."""
    times = ServiceTimes(calibration(lambda k, size, n: [n / 10], sizes=(1, 4), lengths=(10, 30), examples=(10, 30)))
    expected = 4 / (3 - 2 * 0.5**4)
    sigma = 2 * np.sqrt(0.5**4 * (1 - 0.5**4) / 1000) / (3 - 2 * 0.5**4)
    assert times.capacity(1, np.array([10, 30])) == pytest.approx(expected, rel=5 * sigma)
    assert times.capacity(1, np.array([10, 30])) == times.capacity(1, np.array([10, 30]))
