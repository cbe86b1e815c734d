"""Heatmap math: by hand, against PyTorch's interpolation, and finite in [0, 1] whatever comes in."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selib.heatmap import at_maxima, normalize, resize, weighted_sum

ANY = st.one_of(
    st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, 0.0])
)
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_weighted_sum_by_hand() -> None:
    features = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [1.0, 0.0]]])
    weights = torch.tensor([[1.0, -0.5], [2.0, 10.0]])
    assert weighted_sum(features, weights).tolist() == [[-0.5, 0.0], [10.0, 2.0]]


@pytest.mark.parametrize("space", [(), (5,), (3, 4), (2, 3, 4)])
def test_weighted_sum_in_every_dimension_is_float32(space: tuple[int, ...]) -> None:
    features, weights = random(2, 3, *space), random(2, 3, seed=1)
    expected = sum(weights[:, c].view(2, *[1] * len(space)) * features[:, c] for c in range(3))
    found = weighted_sum(features.double(), weights.bfloat16().double())
    assert found.dtype == torch.float32 and found.shape == (2, *space)
    assert torch.allclose(weighted_sum(features, weights), expected, atol=1e-6)


def test_normalize_by_hand() -> None:
    maps = torch.tensor([[[1.0, 3.0], [2.0, 5.0]], [[-8.0, -8.0], [0.0, -4.0]]])
    assert torch.allclose(normalize(maps), torch.tensor([[[0, 0.5], [0.25, 1]], [[0, 0], [1, 0.5]]]))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 0.1, 3e38, 1e-40, math.nan, math.inf, -math.inf])
def test_a_constant_map_becomes_zeros(value: float) -> None:
    assert not normalize(torch.full((2, 3, 3), value)).any()


def test_noise_of_rounding_is_not_stretched_to_evidence() -> None:
    maps = torch.full((1, 4), 0.3)
    maps[0, 1] = torch.nextafter(maps[0, 1], torch.tensor(1.0))
    assert not normalize(maps).any()
    assert normalize(torch.tensor([[0.0, 1e-30]])).tolist() == [[0, 1]]  # small, but no rounding


def test_what_is_not_finite_counts_as_the_smallest_value() -> None:
    maps = torch.tensor([[2.0, math.nan, 4.0, math.inf, 3.0, -math.inf]])
    assert normalize(maps).tolist() == [[0, 0, 1, 0, 0.5, 0]]


@settings(deadline=None)
@given(st.lists(ANY, min_size=1, max_size=12), st.lists(ANY, min_size=1, max_size=12))
def test_normalize_is_finite_and_in_the_unit_interval(one: list[float], two: list[float]) -> None:
    n = min(len(one), len(two))
    maps = torch.tensor([one[:n], two[:n]])
    found = normalize(maps)
    assert found.isfinite().all() and ((found >= 0) & (found <= 1)).all()
    for row, out in zip(maps, found, strict=True):
        assert out.amin() == 0 and out.amax() in (0, 1)  # stretched to the ends, or flat
        assert torch.equal(out, normalize(row[None])[0])  # samples are independent


@settings(deadline=None)
@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=12),
    st.sampled_from([0.25, 1.0, 8.0]),
    st.integers(-1000, 1000),
)
def test_normalize_ignores_scale_and_offset_and_keeps_the_order(
    values: list[int], scale: float, offset: int
) -> None:
    maps = torch.tensor([values], dtype=torch.float32)
    found = normalize(maps)
    assert torch.allclose(normalize(scale * maps + offset), found, atol=1e-5)
    assert torch.equal(found.argsort(stable=True), maps.argsort(stable=True))


# ---- resizing ----------


def test_the_same_size_changes_nothing() -> None:
    for space in [(5,), (3, 4), (2, 3, 4)]:
        assert torch.allclose(resize(random(2, *space), space), random(2, *space), atol=1e-6)


def test_linear_in_one_dimension_by_hand() -> None:
    assert resize(torch.tensor([[0.0, 1.0]]), (4,)).tolist() == [[0, 0.25, 0.75, 1]]


def test_bicubic_is_pytorchs_clamped_to_the_range_of_the_map() -> None:
    maps = random(3, 5, 4)
    free = F.interpolate(maps[:, None], (20, 12), mode="bicubic")[:, 0]
    expected = torch.stack([f.clamp(m.min(), m.max()) for f, m in zip(free, maps, strict=True)])
    assert (free > maps.amax()).any()  # it does overshoot
    assert torch.allclose(resize(maps, (20, 12)), expected, atol=1e-6)


def test_video_is_linear_in_time_and_bicubic_in_space() -> None:
    maps = random(2, 3, 4, 5)
    found = resize(maps, (6, 8, 10))
    assert found.shape == (2, 6, 8, 10)
    same_time = resize(maps, (3, 8, 10))
    for t in range(3):
        low, high = (f(maps.flatten(1), 1).view(2, 1, 1) for f in (torch.amin, torch.amax))
        expected = F.interpolate(maps[:, t : t + 1], (8, 10), mode="bicubic")[:, 0].clamp(low, high)
        assert torch.allclose(same_time[:, t], expected, atol=1e-6)
    still = maps[:, :1].expand(2, 3, 4, 5)
    assert torch.allclose(resize(still, (6, 8, 10)), resize(still, (1, 8, 10)).expand(2, 6, 8, 10), atol=1e-6)
    steps = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert torch.allclose(resize(steps, (4, 2, 2))[0, :, 0, 0], torch.tensor([0, 0.25, 0.75, 1]))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_resizing_and_scaling_any_finite_map_stays_in_the_unit_interval(data: st.DataObject) -> None:
    space = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    size = data.draw(st.lists(st.integers(1, 7), min_size=len(space), max_size=len(space)))
    n = math.prod(space)
    maps = torch.tensor(data.draw(st.lists(FINITE, min_size=n, max_size=n))).view(1, *space)
    found = resize(maps, size)
    assert found.shape == (1, *size)
    assert (found >= maps.min()).all() and (found <= maps.max()).all()
    scaled = normalize(found)
    assert scaled.isfinite().all() and ((scaled >= 0) & (scaled <= 1)).all()


def test_a_constant_map_stays_constant() -> None:
    assert not normalize(resize(torch.full((1, 2, 2), 0.1), (31, 17))).any()


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 2, 2), (4,), r"size=\(4,\) does not fit a map with 2 spatial axes \(2, 2\)"),
        ((1, 2), (4, 4), r"size=\(4, 4\)"),
        ((1, 2, 2), (0, 4), r"size=\(0, 4\)"),
        ((1, 2, 2, 2, 2), (4, 4, 4, 4), "1, 2 or 3"),
        ((1,), (), "cannot be resized"),
    ],
)
def test_errors(shape: tuple[int, ...], size: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize(torch.zeros(shape), size)


def test_maxima_stand_where_they_are_and_equals_share() -> None:
    features = torch.tensor([[[[1.0, 3.0], [3.0, 2.0]], [[-4.0, -1.0], [-2.0, -3.0]]]])  # (1, 2, 2, 2)
    assert at_maxima(features)[0].tolist() == [[[0, 1.5], [1.5, 0]], [[0, 1], [0, 0]]]
    frames = at_maxima(features, time=0)[0].tolist()  # each row is a frame
    assert frames == [[[0, 3], [3, 0]], [[0, 1], [2, 0]]]
