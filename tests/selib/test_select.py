"""Selection rules against counts and masks worked out by hand."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selib.select import All, Channels, NormalQuantile, Select, Threshold, TopFraction, TopK

W = torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.3], [5.0, -1.0, 0.0, 2.0, 2.0]])
ROWS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)


def indices(rule: Select, weights: torch.Tensor = W) -> list[list[int]]:
    mask = rule.mask(weights)
    assert mask.dtype == torch.bool and mask.shape == weights.shape
    return [row.nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (All(), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (TopK(1), [[1], [0]]),
        (TopK(2), [[1, 2], [0, 3]]),  # ties: the lower index wins
        (TopK(9), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (TopFraction(0.2), [[1], [0]]),
        (TopFraction(0.21), [[1, 2], [0, 3]]),
        (TopFraction(1), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (Threshold(0.5), [[1], [0, 3, 4]]),
        (Threshold(9), [[], []]),
        (Channels([4, 0]), [[0, 4], [0, 4]]),
        (Channels([-1]), [[4], [4]]),
        (Channels([]), [[], []]),
        (NormalQuantile(), [[1], [0]]),  # .46 + 1.2816 · .297 = .84 and 1.6 + 1.2816 · 2.302 = 4.55
        (NormalQuantile(0.1), [[1, 2, 3], [0, 3, 4]]),  # .49 and 1.83
    ],
    ids=repr,
)
def test_by_hand(rule: Select, expected: list[list[int]]) -> None:
    assert indices(rule) == expected


@pytest.mark.parametrize(
    ("q", "channels", "count"),
    [
        (0.1, 30, 3),
        (0.07, 100, 7),
        (0.55, 100, 55),
        (0.1, 192, 20),
        (0.1, 128, 13),
        (0.1, 5, 1),
        (0.3, 10, 3),
        (1, 7, 7),
    ],
)
def test_the_count_is_the_ceiling_of_the_exact_product(q: float, channels: int, count: int) -> None:
    assert TopFraction(q).count(channels) == count


@given(st.integers(1, 1000), st.integers(1, 4096))
def test_counts_for_every_tenth_of_a_percent(thousandths: int, channels: int) -> None:
    expected = max(1, math.ceil(Fraction(thousandths, 1000) * channels))
    assert TopFraction(thousandths / 1000).count(channels) == expected


@given(ROWS, st.floats(0.001, 1))
def test_the_top_fraction_is_a_top(row: list[float], q: float) -> None:
    weights = torch.tensor([row])
    mask = TopFraction(q).mask(weights)
    assert mask.sum() == TopFraction(q).count(len(row))
    assert torch.equal(mask, TopK(TopFraction(q).count(len(row))).mask(weights))
    if not mask.all():
        assert weights[mask].min() >= weights[~mask].max()


@given(ROWS, st.floats(-2, 3))
def test_the_normal_rule_is_numpys_or_the_exact_quantile_but_never_empty(row: list[float], z: float) -> None:
    weights = torch.tensor([row])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mask = NormalQuantile(z).mask(weights)[0]
    assert mask.any()
    if caught or len(row) < 2:
        return
    exact = np.asarray(row, np.float64)
    limit = exact.mean() + z * exact.std(ddof=1)
    margin = 1e-4 * (1 + np.abs(exact).max())  # float32 cannot tell channels closer to the limit
    assert mask[torch.tensor(exact > limit + margin)].all()
    assert not mask[torch.tensor(exact < limit - margin)].any()


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 300))
def test_constant_gates_fall_back_to_the_exact_decile_and_say_so(value: float, channels: int) -> None:
    weights = torch.full((3, channels), value)
    with pytest.warns(UserWarning, match="selected no channel for 3 of 3 samples"):
        mask = NormalQuantile().mask(weights)
    assert torch.equal(mask, TopFraction(0.1).mask(weights))


def test_only_the_empty_rows_fall_back() -> None:
    weights = torch.full((2, 20), 0.5)
    weights[0, 7] = 0.9
    with pytest.warns(UserWarning, match=r"no channel for 1 of 2 .*the top 10% were"):
        assert indices(NormalQuantile(), weights) == [[7], [0, 1]]


def test_one_channel_is_always_shown() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert indices(NormalQuantile(), torch.tensor([[0.5], [0.1]])) == [[0], [0]]


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_rows_are_independent_and_scale_does_not_matter(seed: int) -> None:
    weights = torch.rand(4, 30, generator=torch.Generator().manual_seed(seed))
    for rule in (TopK(3), TopFraction(0.25), NormalQuantile(0.5)):
        alone = torch.cat([rule.mask(weights[i : i + 1]) for i in range(4)])
        assert torch.equal(rule.mask(weights), alone)
        assert torch.equal(rule.mask(4 * weights), alone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "k of at least 1, got 0"),
        (lambda: TopFraction(0), "0 < q <= 1, got 0"),
        (lambda: TopFraction(1.5), "got 1.5"),
        (lambda: TopFraction(math.nan), "got nan"),
        (lambda: Channels([1, 5, -6]).mask(W), r"\[5, -6\] are not among the 5 channels"),
    ],
)
def test_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "rule", [TopK(2), TopFraction(0.3), Threshold(0.2), Channels([0, -1]), NormalQuantile(0.5), All()]
)
def test_the_weights_of_every_target_are_ranked_by_themselves(rule: Select) -> None:
    weights = torch.rand(4, 3, 7, generator=torch.Generator().manual_seed(0))
    together = rule.mask(weights)
    assert together.shape == weights.shape
    for target in range(3):
        assert torch.equal(together[:, target], rule.mask(weights[:, target]))
