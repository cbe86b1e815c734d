"""The grid pointing game: quadrants by hand, and maps that know the answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from studies.mosaics import Mosaics, grid_pointing, mosaics, quadrant_energy


def flat(classes: int = 6, each: int = 2) -> tuple[Tensor, Tensor]:
    """Images that are their own class everywhere."""
    targets = torch.arange(classes).repeat(each)
    return targets.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 5).clone(), targets


def test_a_quarter_of_a_constant_map_lies_in_each_quadrant() -> None:
    assert quadrant_energy(torch.ones(4, 6, 8), torch.arange(4)).tolist() == [0.25] * 4
    assert quadrant_energy(torch.zeros(1, 4, 4), torch.tensor([0])).tolist() == [0]
    by_hand = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(4, 2, 2)
    assert quadrant_energy(by_hand, torch.arange(4)).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(2, 9), width=st.integers(2, 9))
def test_the_quadrants_share_all_energy(seed: int, height: int, width: int) -> None:
    maps = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    shares = [quadrant_energy(maps, torch.full((3,), q)) for q in range(4)]
    assert torch.allclose(sum(shares), torch.ones(3, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_mosaic_has_four_images_of_its_four_classes(seed: int) -> None:
    images, targets = flat()
    found = mosaics(images, targets, 5, seed)
    assert found.images.shape == (5, 3, 8, 10) and found.images.dtype == torch.uint8
    quarters = found.images.unflatten(2, (2, 4)).unflatten(4, (2, 5))  # (M, 3, 2, H, 2, W)
    for q in range(4):
        part = quarters[:, :, q // 2, :, q % 2]
        assert (part == found.targets[:, q, None, None, None]).all()
    assert all(len(set(four)) == 4 for four in found.targets.tolist())
    again = mosaics(images, targets, 5, seed)
    assert torch.equal(again.images, found.images) and torch.equal(again.targets, found.targets)


def test_four_classes_are_needed() -> None:
    images, targets = flat(3)
    with pytest.raises(ValueError, match="four classes, these are of 3"):
        mosaics(images, targets, 1)


def test_who_knows_the_class_wins_and_who_does_not_gets_a_quarter() -> None:
    grids = mosaics(*flat(), 7)

    def knows(images: Tensor, targets: Tensor) -> Tensor:
        return (images[:, 0] == targets[:, None, None]).float()

    assert (grid_pointing(knows, grids, batch_size=3) == 1).all()
    assert (grid_pointing(lambda x, k: torch.ones(len(x), 8, 10), grids) == 0.25).all()
    assert grid_pointing(knows, Mosaics(grids.images, grids.targets.roll(1, 1))).tolist() == [[0.0] * 4] * 7
