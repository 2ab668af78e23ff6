"""Intervals, tests and fronts against scipy, closed forms and brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.statistics import (
    holm,
    mcnemar,
    median_bounds,
    pareto_front,
    percentile_bounds,
    t_interval,
    two_sided,
    wilson,
)

SHORT = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=8)


@pytest.mark.parametrize("values", [[0.8, 0.9], [0.71, 0.74, 0.69], [0.5, 0.5, 0.6, 0.9, 0.1]])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_over_seeds_is_scipys(values, level):
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    assert t_interval(np.array(values), level) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_interval():
    assert np.isnan(t_interval(np.array([0.9]))).all()


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (3, 17), (870, 872)])
def test_wilson_is_scipys(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_bootstrap_of_an_odd_median_is_that_of_all_resamples(n):
    values = np.random.default_rng(n).normal(size=n)
    every = np.sort([np.median(resample) for resample in product(values, repeat=n)])
    for level in (0.5, 0.9, 0.95):
        low = every[int(np.ceil((1 - level) / 2 * len(every) - 1e-9)) - 1]
        high = every[int(np.ceil((1 + level) / 2 * len(every) - 1e-9)) - 1]
        assert median_bounds(values, level) == (low, high)


@pytest.mark.parametrize("n", [4, 20, 31])
def test_the_bootstrap_of_a_median_agrees_with_resampling_and_is_never_narrower(n):
    rng = np.random.default_rng(n)
    values = rng.lognormal(size=n)
    drawn = np.median(rng.choice(values, (40_000, n)), axis=1)
    low, high = median_bounds(values)
    ordered = np.sort(values)
    step = np.diff(ordered).max()
    sampled = percentile_bounds(drawn)
    assert sampled.low - step <= low <= sampled.low + 1e-12
    assert sampled.high - 1e-12 <= high <= sampled.high + step


def test_no_samples_have_no_bounds():
    assert np.isnan(median_bounds(np.array([]))).all()


@pytest.mark.parametrize(("only_a", "only_b", "both"), [(10, 2, 30), (3, 3, 5), (0, 7, 0), (1, 0, 4)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(only_a, only_b, both):
    a = np.array([1.0] * only_a + [0.0] * only_b + [1.0] * both)
    b = np.array([0.0] * only_a + [1.0] * only_b + [1.0] * both)
    expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert mcnemar(a, b) == pytest.approx(expected)
    assert mcnemar(b, a) == pytest.approx(expected)


def test_mcnemar_of_equal_answers_is_one():
    assert mcnemar(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 1.0


def test_a_bootstrap_p_value_counts_the_smaller_tail_twice():
    draws = np.array([-1.0, *[1.0] * 99])
    assert two_sided(draws) == pytest.approx(2 * 2 / 101)
    assert two_sided(-draws) == two_sided(draws)
    assert two_sided(np.zeros(100)) == 1.0
    assert 0 < two_sided(np.ones(100)) < 0.02


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_rejects_what_the_step_down_procedure_rejects(values):
    p = np.array(values)
    adjusted = holm(p)
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for step, index in enumerate(np.argsort(p, kind="stable")):
            if p[index] * (len(p) - step) > level:
                break
            rejected.add(int(index))
        assert {int(i) for i in np.flatnonzero(adjusted <= level)} == rejected


def test_holm_leaves_missing_values_out_of_the_count():
    assert holm(np.array([0.01, np.nan, 0.04])).tolist() == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)


@given(SHORT, st.data())
def test_the_front_holds_exactly_the_points_that_no_other_beats(cost, data):
    score = data.draw(st.lists(st.sampled_from([0.5, 0.6, 0.7, float("nan")]), min_size=len(cost), max_size=len(cost)))
    expected = []
    for c, s in zip(cost, score, strict=True):
        beaten = False
        for other_c, other_s in zip(cost, score, strict=True):
            if other_c <= c and other_s >= s and (other_c < c or other_s > s):
                beaten = True
        expected.append(not beaten and s == s)
    assert pareto_front(np.array(cost), np.array(score)).tolist() == expected
