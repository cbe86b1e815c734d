"""Crops of frames by boxes, as the detectors of speakers take them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

NOTHING = (
    110  # what a crop shows where its box leaves the frame: the middle grey that TalkNet's demo pads with
)


def corners(box: Sequence[float]) -> tuple[int, int, int, int]:
    """The whole pixels that :func:`crop` shows of a box: left, top, right, bottom, at least one each way."""
    left, top = (math.floor(edge + 0.5) for edge in box[:2])
    return left, top, max(left + 1, math.floor(box[2] + 0.5)), max(top + 1, math.floor(box[3] + 0.5))


def crop(frame: np.ndarray, box: Sequence[float], *, side: int = 112, margin: float = 0.0) -> np.ndarray:
    """What a box shows, in grey and stretched to a square: uint8 (side, side).

    frame uint8 (H, W, 3) RGB or (H, W) grey; box: x1, y1, x2, y2 in pixels, widened on every side by `margin` times its
    width and height. Where it leaves the frame the crop is grey (110). Raises ValueError for a box that is not finite,
    has no area or lies outside the frame altogether.
    """
    grey = frame if frame.ndim == 2 else cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
    x1, y1, x2, y2 = (float(edge) for edge in box)
    dx, dy = margin * (x2 - x1), margin * (y2 - y1)
    edges = (x1 - dx, y1 - dy, x2 + dx, y2 + dy)
    if not np.isfinite(edges).all() or edges[2] <= edges[0] or edges[3] <= edges[1]:
        raise ValueError(f"box must be finite x1 < x2, y1 < y2, not {tuple(box)}")
    left, top = (int(np.floor(edge + 0.5)) for edge in edges[:2])
    right, bottom = max(left + 1, int(np.floor(edges[2] + 0.5))), max(top + 1, int(np.floor(edges[3] + 0.5)))
    height, width = grey.shape
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(f"box {tuple(box)} lies outside the frame of {width}x{height} pixels")
    inside = grey[max(top, 0) : bottom, max(left, 0) : right]
    around = (max(-top, 0), max(bottom - height, 0), max(-left, 0), max(right - width, 0))
    whole = cv2.copyMakeBorder(inside, *around, cv2.BORDER_CONSTANT, value=NOTHING)
    return fit_square(whole, side)


def body_box(face: Sequence[float]) -> tuple[float, float, float, float]:
    """Where the body to a face is looked for where nobody marked it: x1, y1, x2, y2 in the units of the face's box.

    Three and a half faces wide, about its middle, and four high, from half a face above it. It may leave the frame.
    """
    x1, y1, x2, y2 = face
    width, height = x2 - x1, y2 - y1
    return x1 - 1.25 * width, y1 - 0.5 * height, x2 + 1.25 * width, y1 + 3.5 * height


def fit_square(image: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W) stretched to (side, side): averaged where it shrinks, linear where it grows."""
    if image.shape == (side, side):
        return image
    shrinks = min(image.shape) > side
    return np.asarray(
        cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    )
