"""The canvas of the rendered faces: painted outlines, and a label for the part that each pixel shows."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np

from studies.twins.face_params import PARTS, Params
from studies.twins.shapes import Points, Shape, points

SIZE = (218, 178)  # height and width, as CelebA's aligned images
_EYES = (88.5, 111.0)  # the middle between the eyes: the origin of a face's own frame, whose unit is a pixel

Window = tuple[slice, slice]  # rows and columns
Figure = Points | str | list[Points]  # one shape, or several that are painted as one


def pose(p: Params) -> Callable[[Shape, float], Points]:
    """What brings shapes of the face's own frame, at a depth, into the image.

    depth: how far a part stands out towards the camera; turning the head moves it by that much.
    """
    turn = math.radians(p["angle"])
    cos, sin = math.cos(turn) * p["scale"], math.sin(turn) * p["scale"]
    turned = np.array([[cos, sin], [-sin, cos]])
    matrix = turned * [[1 - 0.035 * abs(p["yaw"])], [1]]  # turning the head makes it narrower
    middle, outward = np.array(_EYES) + p["shift"], p["yaw"] * turned[0]
    return lambda shape, depth: points(shape) @ matrix + (middle + depth * outward)


def rgb(colour: str | Sequence[float]) -> np.ndarray:
    """A colour, "#rrggbb" or three numbers, as float32 (3, 1, 1) in 0..255."""
    channels = list(bytes.fromhex(colour[1:])) if isinstance(colour, str) else colour
    return np.array(channels, np.float32).reshape(3, 1, 1)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(plane, (0, 0), sigma) for plane in image])


_NOISE = np.random.default_rng(0).standard_normal((3, 512, 512)).astype(np.float32)


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Normal noise, float32 (3, height, width), cut from a tile that all images share."""
    y, x = rng.integers(0, 512 - height), rng.integers(0, 512 - width)
    return _NOISE[:, y : y + height, x : x + width]


def sixteenths(outline: Points) -> np.ndarray:
    """Coordinates as OpenCV takes them where edges are antialiased: whole sixteenths of a pixel."""
    return np.rint(outline * 16).astype(np.int32)


@cache
def among(names: str) -> np.ndarray:
    """Which labels are those of the parts named in one string: bool (1 + len(PARTS),)."""
    return np.isin(np.arange(1 + len(PARTS)), [1 + PARTS.index(name) for name in names.split()])


@cache
def _taper(count: int) -> np.ndarray:
    """The width of a line along its way, (count, 1) in 0..1."""
    return np.asarray(np.sqrt(np.sin(np.linspace(0.12, math.pi - 0.12, count)))[:, None])


class Canvas:
    """The picture under the brush, and the label of the part that each pixel shows. Coordinates are pixels.

    image: float32 (3, H, W) in 0..255; numpy is twice as fast on planes as on pixels of three.
    """

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.parts: np.ndarray = np.zeros(image.shape[1:], np.uint8)

    def mask(self, outlines: list[Points], soft: float = 0.0) -> tuple[Window, np.ndarray]:
        """The window around the outlines, and how much of each of its pixels they cover: float32 in 0..1.

        soft: the edge's blur in pixels.
        """
        margin = 2 + int(3 * soft)
        x, y, w, h = cv2.boundingRect(np.concatenate(outlines).astype(np.float32))
        height, width = self.parts.shape
        # at least one pixel, even where nothing is in sight
        left, top = min(max(0, x - margin), width - 1), min(max(0, y - margin), height - 1)
        right, bottom = min(max(left + 1, x + w + margin), width), min(max(top + 1, y + h + margin), height)
        covered = np.zeros((bottom - top, right - left), np.uint8)
        for outline in outlines:
            cv2.fillPoly(covered, [sixteenths(outline)], 255, cv2.LINE_AA, 4, (-16 * left, -16 * top))
        alpha: np.ndarray = covered.astype(np.float32) * np.float32(1 / 255)
        if soft:
            alpha = cv2.GaussianBlur(alpha, (0, 0), soft)
        return (slice(top, bottom), slice(left, right)), alpha

    def blend(self, window: Window, amount: np.ndarray, colour: np.ndarray) -> None:
        """Mix a colour (3, 1, 1), or a picture (3, h, w), into a window; amount (h, w) is in 0..1."""
        below = self.image[:, window[0], window[1]]
        below += amount * (colour - below)

    def paint(
        self,
        outlines: list[Points],
        colour: np.ndarray | None,
        *,
        part: str = "",
        opacity: float = 1.0,
        soft: float = 0.0,
        grain: np.ndarray | None = None,
        only: str = "",
    ) -> None:
        """Paint inside the outlines and label what is painted; without a colour, only label it.

        grain: noise (H, W) that makes the paint uneven, as hair is. only: the parts on which to paint.
        """
        window, alpha = self.mask(outlines, soft)
        if only:
            alpha = alpha * among(only)[self.parts[window]]
        if colour is not None:
            amount = alpha * np.float32(opacity)
            if grain is not None:
                amount *= np.clip(0.9 + 0.25 * grain[window], 0.3, 1)
            self.blend(window, amount, colour)
        if part:
            self.parts[window][alpha > 0.5] = 1 + PARTS.index(part)

    def strands(self, curves: Points, inside: list[Points], colour: np.ndarray, opacity: float) -> None:
        """Thin lines (n, points, 2), drawn only where the outlines `inside` are."""
        window, alpha = self.mask(inside)
        drawn = np.zeros(alpha.shape, np.uint8)
        corner = np.array([window[1].start, window[0].start])
        cv2.polylines(drawn, list(sixteenths(curves - corner)), False, 255, 1, cv2.LINE_AA, 4)
        self.blend(window, alpha * drawn.astype(np.float32) * np.float32(opacity / 255), colour)


class Face(Canvas):
    """A face being drawn. Its shapes are given in its own frame, each at a depth (see `pose`).

    wall: what lies behind it. skin: its colour. grain: noise (H, W) for hair and cloth.
    """

    def __init__(self, p: Params, wall: np.ndarray, skin: np.ndarray, grain: np.ndarray) -> None:
        super().__init__(wall)
        self.p, self.skin, self.grain, self.at = p, skin, grain, pose(p)

    def fill(self, shape: Figure, depth: float, colour: np.ndarray | None = None, **paint: Any) -> None:
        """Paint a shape, or several as one; without a colour, only label it. paint: as for `Canvas.paint`."""
        shapes = shape if isinstance(shape, list) else [shape]
        self.paint([self.at(one, depth) for one in shapes], colour, **paint)

    def line(self, way: Points, depth: float, colour: np.ndarray, width: float, **paint: Any) -> None:
        """Paint along an open curve, thinner towards its ends. paint: as for `Canvas.paint`."""
        way = self.at(way, depth)
        along = np.vstack([way[1] - way[0], way[2:] - way[:-2], way[-1] - way[-2]])
        length = np.sqrt((along * along).sum(1, keepdims=True)) + 1e-6
        half = along[:, ::-1] * (-1, 1) / length * _taper(len(way)) * (width / 2)
        self.paint([np.vstack([way + half, (way - half)[::-1]])], colour, **paint)
