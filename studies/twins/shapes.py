"""Outlines and smooth curves from which the twins are drawn; x runs to the right, y down."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

Points = np.ndarray  # (N, 2) float
Shape = Points | Sequence[tuple[float, float]] | str  # a string lists "x,y x,y ...", as in SVG


def points(shape: Shape) -> Points:
    """The points of a shape, (N, 2) float."""
    if isinstance(shape, str):
        return np.array([corner.split(",") for corner in shape.split()], float)
    return np.asarray(shape, float)


@cache
def _circle(count: int) -> Points:
    angles = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def ellipse(x: float, y: float, rx: float, ry: float, count: int = 24) -> Points:
    return _circle(count) * (rx, ry) + (x, y)


# A Catmull-Rom spline: six points for each piece, from the four corners around it.
_T = np.linspace(0, 1, 6, endpoint=False)[:, None]
_CATMULL_ROM = 0.5 * np.hstack(
    [-_T + 2 * _T**2 - _T**3, 2 - 5 * _T**2 + 3 * _T**3, _T + 4 * _T**2 - 3 * _T**3, _T**3 - _T**2]
)


def smooth(shape: Shape) -> Points:
    """A smooth closed outline through the points."""
    corners = points(shape)
    around = (np.arange(len(corners))[:, None] + np.arange(-1, 3)) % len(corners)
    outline: Points = (_CATMULL_ROM @ corners[around]).reshape(-1, 2)
    return outline


def curve(shape: Shape) -> Points:
    """A smooth open curve through the points."""
    corners = points(shape)
    padded = np.vstack([2 * corners[0] - corners[1], corners, 2 * corners[-1] - corners[-2]])
    around = np.arange(len(corners) - 1)[:, None] + np.arange(4)
    return np.vstack([(_CATMULL_ROM @ padded[around]).reshape(-1, 2), corners[-1:]])


# What is symmetric about x = 0 is given by its right half:


def both(shape: Shape) -> list[Points]:
    """The shape's mirror image on the left, and the shape on the right."""
    right = points(shape)
    return [right * (-1, 1), right]


def symmetric(right: Shape) -> Points:
    """A smooth closed outline; its right half runs from the top down."""
    mirrored, corners = both(right)
    left = mirrored[::-1]
    return smooth(np.vstack([corners, left[np.abs(left[:, 0]) > 1e-6]]))


def across(right: Shape) -> Points:
    """Points from the left to the right; the right half runs from the middle outwards."""
    mirrored, corners = both(right)
    return np.vstack([mirrored[:0:-1], corners])


def between_arcs(top: Shape, bottom: Shape) -> Points:
    """A smooth closed outline; the right halves of its top and bottom run from the middle outwards."""
    return smooth(np.vstack([across(top), across(bottom)[::-1]]))
