"""Bootstrap intervals: closed forms, coverage, scipy, and what pairing buys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from studies.metrics import Interval, bootstrap, paired, percentile


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
