"""Bootstrap intervals: closed forms, coverage, scipy, and what pairing buys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from selib import stats
from selib.stats import Interval, bootstrap, paired, paired_over_seeds


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def test_the_interval_of_many_values_is_the_normal_one():
    x = normal(400)
    found = bootstrap(x, resamples=5000)
    half = 1.96 * x.std() / 20
    assert found.mean == pytest.approx(x.mean())
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.01)
    assert isinstance(found, Interval) and found._fields == ("mean", "low", "high")


def test_the_interval_is_scipys():
    x = np.random.default_rng(1).exponential(size=60)
    other = scipy_stats.bootstrap(
        (x,), np.mean, method="percentile", n_resamples=9999, rng=0
    ).confidence_interval
    found = bootstrap(x, resamples=9999)
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=0.03)


def test_about_95_of_100_intervals_hold_the_truth():
    held = [
        i.low <= 0 <= i.high
        for i in (bootstrap(normal(60, seed), resamples=500, seed=seed) for seed in range(200))
    ]
    assert 0.89 <= np.mean(held) <= 0.99


def test_two_values_have_three_possible_resamples():
    found = bootstrap([0.0, 1.0])  # means 0, ½, 1 with probability ¼, ½, ¼: both ends are reached
    assert found == (0.5, 0.0, 1.0)
    assert bootstrap([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)


def test_seeds_repeat_and_chunks_do_not_matter_to_a_constant(monkeypatch):
    x = normal(50)
    assert bootstrap(x, seed=3) == bootstrap(x, seed=3) != bootstrap(x, seed=4)
    monkeypatch.setattr(stats, "_CELLS", 120)  # two resamples at a time
    small = bootstrap(x, resamples=1001)
    assert small == pytest.approx(bootstrap(x, resamples=1001, seed=1), abs=0.1)
    assert bootstrap(np.full(50, 0.25)) == (0.25, 0.25, 0.25)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=30), scale=st.sampled_from([0.5, 2.0, 8.0]))
def test_it_scales_with_the_values_and_lies_between_them(values, scale):
    one = bootstrap(values, resamples=200)
    assert min(values) - 1e-9 <= one.low <= one.high <= max(values) + 1e-9
    assert bootstrap(np.array(values) * scale, resamples=200) == pytest.approx(
        np.array(one) * scale, abs=1e-9
    )


def test_pairing_removes_what_both_share():
    hard = 10 * normal(100)  # how hard each image is
    a, b = hard + 0.1, hard
    found = paired(a, b)
    assert found == pytest.approx((0.1, 0.1, 0.1))
    assert paired(b, a).mean == pytest.approx(-0.1)
    assert paired(a, b + normal(100, 1)) == bootstrap(a - (b + normal(100, 1)))


def test_seeds_of_constant_difference_give_the_27_resamples_of_three():
    runs = [(np.full(20, d), np.zeros(20)) for d in (0.0, 1.0, 2.0)]
    for same in (True, False):
        found = paired_over_seeds(runs, same_images=same)
        assert found == pytest.approx(
            (1.0, 0.0, 2.0)
        )  # all three draws the same: 1/27 each end, more than 2.5 %
        assert paired_over_seeds(runs, same_images=same, level=0.9) == pytest.approx((1.0, 1 / 3, 5 / 3))


def test_runs_that_agree_leave_the_spread_of_the_images():
    d = normal(200)
    runs = [(d, np.zeros(200))] * 3
    one = bootstrap(d, resamples=4000)
    shared = paired_over_seeds(runs, resamples=4000)
    assert (shared.low, shared.high) == pytest.approx((one.low, one.high), abs=0.02)
    # Three independent sets of images hold more than one set measured three times.
    own = paired_over_seeds(
        [(normal(200, s), np.zeros(200)) for s in range(3)], same_images=False, resamples=4000
    )
    assert own.high - own.low < 0.75 * (shared.high - shared.low)


def test_runs_may_differ_in_length_only_with_images_of_their_own():
    runs = [(normal(30), normal(30, 1)), (normal(20), normal(20, 1))]
    with pytest.raises(ValueError, match="same_images=False"):
        paired_over_seeds(runs)
    found = paired_over_seeds(runs, same_images=False)
    assert found.mean == pytest.approx(
        np.mean([(a - b).mean() for a, b in runs])
    )  # each run has the same weight
    assert found.low < found.mean < found.high


def test_nested_resamples_have_the_variance_of_seeds_plus_images():
    # Two runs with the same mean, 40 images each: only the images vary, and two independent draws are averaged.
    d = normal(40)
    found = paired_over_seeds([(d, 0 * d), (d, 0 * d)], same_images=False, resamples=8000, level=0.6827)
    assert (found.high - found.low) / 2 == pytest.approx(d.std() / np.sqrt(40 * 2), rel=0.05)


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, np.nan], [1.0, np.inf], np.zeros((2, 2))])
def test_values_that_give_no_interval_are_refused(bad):
    with pytest.raises(ValueError, match="at least two finite values"):
        bootstrap(bad)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="level"):
        bootstrap([0, 1], level=95)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap([0, 1], resamples=0)
    with pytest.raises(ValueError, match="same length"):
        paired([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="two runs"):
        paired_over_seeds([([1, 2], [3, 4])])
    with pytest.raises(ValueError, match="run 1"):
        paired_over_seeds([([1, 2], [3, 4]), ([1, 2], [3])])
