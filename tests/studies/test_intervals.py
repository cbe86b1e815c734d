"""Intervals and tests: closed forms, coverage, scipy, and what pairing buys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from studies.metrics import (
    Interval,
    bootstrap,
    holm,
    non_inferiority,
    p_value,
    paired,
    percentile,
    t_interval,
)


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def test_the_interval_of_many_values_is_the_normal_one() -> None:
    x = normal(400)
    found = bootstrap(x, resamples=5000)
    half = 1.96 * x.std() / 20
    assert found.mean == pytest.approx(x.mean())
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.01)
    assert isinstance(found, Interval) and found._fields == ("mean", "low", "high")


def test_the_interval_is_scipys() -> None:
    x = np.random.default_rng(1).exponential(size=60)
    other = scipy_stats.bootstrap((x,), np.mean, method="percentile", n_resamples=9999, rng=0)
    found = bootstrap(x, resamples=9999)
    assert (found.low, found.high) == pytest.approx(tuple(other.confidence_interval), abs=0.03)


@pytest.mark.slow
def test_about_95_of_100_intervals_hold_the_truth() -> None:
    found = [bootstrap(normal(60, seed), resamples=500) for seed in range(200)]
    assert 0.89 <= np.mean([i.low <= 0 <= i.high for i in found]) <= 0.99


def test_two_values_have_three_possible_resamples() -> None:
    # means 0, ½, 1 with probability ¼, ½, ¼: both ends are reached
    assert bootstrap([0.0, 1.0]) == (0.5, 0.0, 1.0)


def test_the_same_numbers_give_the_same_interval() -> None:
    assert bootstrap(normal(50)) == bootstrap(normal(50)) != bootstrap(normal(50, 1))
    assert bootstrap(np.full(50, 0.25)) == (0.25, 0.25, 0.25)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=30), scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_it_scales_with_the_values_and_lies_between_them(values: list[float], scale: float) -> None:
    one = bootstrap(values, resamples=200)
    assert min(values) - 1e-9 <= one.low <= one.high <= max(values) + 1e-9
    scaled = bootstrap(np.array(values) * scale, resamples=200)
    assert scaled == pytest.approx(np.array(one) * scale, abs=1e-9)


def test_pairing_removes_what_both_share() -> None:
    hard = 10 * normal(100)  # how hard each image is
    a, b = hard + 0.1, hard
    assert paired(a, b) == pytest.approx((0.1, 0.1, 0.1))
    assert paired(b, a).mean == pytest.approx(-0.1)
    assert paired(a, b + normal(100, 1)) == bootstrap(a - (b + normal(100, 1)))


def test_runs_of_constant_difference_give_the_27_resamples_of_three() -> None:
    runs = [np.full(20, d) for d in (0.0, 1.0, 2.0)]
    # all three draws the same: 1/27 for each end, more than 2.5 %
    assert bootstrap(runs) == pytest.approx((1.0, 0.0, 2.0))
    assert paired(runs, np.zeros((3, 20))) == bootstrap(runs)


def test_runs_that_agree_leave_the_spread_of_the_images() -> None:
    d = normal(200)
    one, three = bootstrap(d, resamples=4000), bootstrap([d] * 3, resamples=4000)
    assert (three.low, three.high) == pytest.approx((one.low, one.high), abs=0.02)
    assert bootstrap([d]) == bootstrap(d)


def test_a_statistic_that_is_no_mean() -> None:
    x = np.exp(normal(300))
    found = percentile(np.median(x), lambda rng: np.median(rng.choice(x, len(x))), resamples=2000)
    other = scipy_stats.bootstrap((x,), np.median, method="percentile", n_resamples=2000, rng=0)
    assert found.mean == np.median(x)
    assert (found.low, found.high) == pytest.approx(tuple(other.confidence_interval), abs=0.05)


@pytest.mark.parametrize(
    "bad", [[], [1.0], [1.0, np.nan], [1.0, np.inf], np.zeros((2, 1)), np.zeros((2, 2, 2))]
)
def test_values_that_give_no_interval_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"at least two finite values, \(n,\) or \(runs, n\), got shape"):
        bootstrap(bad)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        bootstrap([0, 1], resamples=0)
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(2,\)"):
        paired([1, 2, 3], [1, 2])


# ---- over training runs ----------


def test_the_t_interval_by_hand() -> None:
    # mean 2, s = 1, t(0.975; 2) = 4.3027: half = 4.3027 / √3
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert t_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
    for bad in ([1.0], [1.0, np.nan], np.zeros((2, 2))):
        with pytest.raises(ValueError, match="at least two finite values"):
            t_interval(bad)


def test_95_of_100_t_intervals_of_five_runs_hold_the_truth() -> None:
    found = [t_interval(normal(5, seed)) for seed in range(1000)]
    assert 0.935 <= np.mean([i.low <= 0 <= i.high for i in found]) <= 0.965


def test_the_margin_decides_what_is_harm() -> None:
    assert non_inferiority(Interval(0, -0.4, 0.4), 0.5) == "non-inferior"
    assert non_inferiority(Interval(-0.3, -0.4, -0.2), 0.5) == "non-inferior"  # a loss that does not matter
    assert non_inferiority(Interval(-0.3, -0.5, -0.1), 0.5) == "harmed"
    assert non_inferiority(Interval(-0.2, -0.6, 0.2), 0.5) == "undecided"
    with pytest.raises(ValueError, match="must be positive"):
        non_inferiority(Interval(0, 0, 0), 0)


# ---- p-values ----------


def test_the_p_value_counts_sign_flips() -> None:
    # of the 16 flips of four equal differences two are as far from 0: all plus, all minus
    assert p_value([1.0, 1, 1, 1], np.zeros(4)) == 2 / 16
    assert p_value([1.0, 2, 3], [1.0, 2, 3]) == 1
    # |±1 ±2| ≥ |2 - 1|: all four
    assert p_value([2.0, 0], [0, 1.0]) == 1
    assert p_value([[2.0, 0], [0, 2.0]], np.zeros((2, 2))) == p_value([1.0, 1], [0.0, 0])


def test_the_p_value_is_the_t_tests_where_differences_are_normal() -> None:
    a, b = normal(200) + 0.15, normal(200, 1)
    assert p_value(a, b) == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue, abs=0.01)
    assert p_value(a, b) == p_value(b, a) == p_value(a, b)
    with pytest.raises(ValueError, match="two finite pairs"):
        p_value([1.0, np.nan], [0, 0])


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, and never falling: .04 .06 .06 .06
    assert holm([0.03, 0.01, 0.04, 0.02]).tolist() == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).tolist() == []
    for bad in ([0.1, 1.2], [np.nan]):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            holm(bad)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_the_p_values_and_bonferronis(p_values: list[float]) -> None:
    p, found = np.array(p_values), holm(p_values)
    assert (found >= p).all() and (found <= np.minimum(1, p * len(p)) + 1e-12).all()
    assert found[p.argmin()] == min(1, p.min() * len(p))  # Bonferroni's for the smallest
    assert (np.diff(found[p.argsort(kind="stable")]) >= 0).all()
