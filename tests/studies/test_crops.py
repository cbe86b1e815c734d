"""Crops of frames by boxes."""

from __future__ import annotations

import numpy as np
import pytest

from studies.data.crops import body_box, corners, crop


def test_a_crop_is_its_box_in_grey() -> None:
    frame = np.zeros((100, 120, 3), np.uint8)
    frame[20:60, 30:90] = (200, 100, 50)
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert (abs(crop(frame, (30, 20, 90, 60)).astype(int) - grey) <= 1).all()
    wide = crop(frame, (0, 0, 120, 80), side=80)  # a quarter more on every side is black
    assert wide.shape == (80, 80) and (wide[:18] == 0).all() and (wide[:, :18] == 0).all()
    assert (abs(wide[22:58, 22:58].astype(int) - grey) <= 1).all()
    assert np.array_equal(crop(frame, (30, 20, 90, 60)), crop(frame, (30.4, 19.6, 89.7, 60.4)))


def test_beyond_the_frame_a_crop_is_grey() -> None:
    frame = np.full((50, 50, 3), 255, np.uint8)
    found = crop(frame, (-25, 0, 25, 50), side=50)
    assert (found[:, :24] == 110).all() and (found[:, 26:] == 255).all()


def test_a_box_covers_at_least_one_pixel() -> None:
    assert corners((3.4, 5.5, 3.45, 5.6)) == (3, 6, 4, 7)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 10, 20), "x1 < x2"),
        ((0, 20, 10, 10), "y1 < y2"),
        ((0, 0, float("nan"), 5), "is empty"),
        ((50, 0, 60, 10), "outside the frame of 50x40 pixels"),
        ((0, -9, 9, -1), "outside"),
    ],
)
def test_crop_refuses(box: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crop(np.zeros((40, 50, 3), np.uint8), box)


def test_a_body_lies_around_and_below_its_face() -> None:
    assert body_box((100, 100, 120, 140)) == (75, 80, 145, 240)
