"""Crops of frames by boxes, as the detectors of speakers take them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

BEYOND = 110  # where a box leaves its frame, the crop shows the middle grey that TalkNet's demo pads with


def corners(box: Sequence[float]) -> tuple[int, int, int, int]:
    """The whole pixels that a box covers, at least one each way: left, top, right, bottom."""
    left, top = (math.floor(edge + 0.5) for edge in box[:2])
    return left, top, max(left + 1, math.floor(box[2] + 0.5)), max(top + 1, math.floor(box[3] + 0.5))


def check_box(box: Sequence[float], width: int, height: int) -> None:
    """ValueError for a box that is empty, or outside a frame of this size altogether."""
    said = f"the box {', '.join(f'{edge:g}' for edge in box)}"
    if not np.isfinite(box).all() or box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"{said} is empty: x1 < x2 and y1 < y2")
    left, top, right, bottom = corners(box)
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(f"{said} lies outside the frame of {width}x{height} pixels")


def crop(frame: NDArray[np.uint8], box: Sequence[float], *, side: int = 112) -> NDArray[np.uint8]:
    """What a box shows, in grey and stretched to a square: uint8 (side, side).

    Args:
        frame: RGB uint8 (H, W, 3).
        box: x1, y1, x2, y2 in pixels. Where it leaves the frame the crop is grey (110).

    Raises:
        ValueError: see :func:`check_box`.
    """
    height, width = frame.shape[:2]
    check_box(box, width, height)
    left, top, right, bottom = corners(box)
    grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    inside = grey[max(top, 0) : bottom, max(left, 0) : right]
    around = (max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0))
    whole = cv2.copyMakeBorder(inside, *around, cv2.BORDER_CONSTANT, value=BEYOND)
    return fit_square(whole.astype(np.uint8, copy=False), side)


def body_box(face: Sequence[float]) -> tuple[float, float, float, float]:
    """Where the body to a face is looked for when nobody marked it: x1, y1, x2, y2, as the face's box.

    Three and a half faces wide, about its middle, and four high, from half a face above it on.
    """
    x1, y1, x2, y2 = face
    width, height = x2 - x1, y2 - y1
    return x1 - 1.25 * width, y1 - 0.5 * height, x2 + 1.25 * width, y1 + 3.5 * height


def fit_square(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """An image (H, W) stretched to (side, side): averaged where it shrinks, linear where it grows."""
    if image.shape == (side, side):
        return image
    shrinks = min(image.shape) > side
    way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (side, side), interpolation=way), dtype=np.uint8)
