"""synth-faces: parametric faces with CelebA's forty attributes, and a label for every pixel.

The twin of CelebA (Liu et al., ICCV 2015), after FunnyBirds (Hesse, Schaub-Meyer and Roth, ICCV 2023): the same face can be
drawn again with a part removed, so that what a part does to a prediction is known, not guessed. Framing and landmarks are
those of CelebA's aligned images, 178x218 with the eyes near (69, 111) and (108, 111). Attributes are correlated roughly as
they are in CelebA (lipstick with long hair, beards with square jaws, grey hair with wrinkles); rare ones are drawn more
often, so that a few thousand faces suffice to learn them. What lies on the wall behind a face (ovals, pairs of rings, bars,
dots) looks like lips, glasses, ties and jewels and says nothing.

`Attractive` is a judgement, not a thing to draw. Here it is a planted rule (:data:`ATTRACTIVE`): a bias of known causes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np

from studies.twins.apart import drawn_by

Points = np.ndarray  # (N, 2) float, x to the right, y down
Params = dict[str, Any]  # plain numbers, booleans, strings and lists: goes through JSON unchanged

SIZE = (218, 178)  # height and width, as CelebA's aligned images
COUNTS = {"train": 6000, "val": 1500, "test": 1500, "spurious": 6000}
EYES = (88.5, 111.0)  # the middle between the eyes: the origin of the face's own frame, whose unit is a pixel

ATTRIBUTES = (
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
)

PARTS = (
    "skin",
    "ears",
    "neck",
    "cloth",
    "scalp",
    "forehead",
    "cheeks",
    "chin",
    "bags",
    "nose",
    "eyes",
    "brows",
    "mouth",
    "stubble",
    "goatee",
    "mustache",
    "sideburns",
    "hair",
    "bangs",
    "glasses",
    "hat",
    "earrings",
    "necklace",
    "necktie",
)

# where an attribute is to be seen; the others belong to the whole face
REGIONS: dict[str, tuple[str, ...]] = {
    "5_o_Clock_Shadow": ("stubble",),
    "Arched_Eyebrows": ("brows",),
    "Bags_Under_Eyes": ("bags",),
    "Bald": ("scalp",),
    "Bangs": ("bangs",),
    "Big_Lips": ("mouth",),
    "Big_Nose": ("nose",),
    "Black_Hair": ("hair", "bangs"),
    "Blond_Hair": ("hair", "bangs"),
    "Brown_Hair": ("hair", "bangs"),
    "Bushy_Eyebrows": ("brows",),
    "Double_Chin": ("chin",),
    "Eyeglasses": ("glasses",),
    "Goatee": ("goatee",),
    "Gray_Hair": ("hair", "bangs"),
    "High_Cheekbones": ("cheeks",),
    "Mouth_Slightly_Open": ("mouth",),
    "Mustache": ("mustache",),
    "Narrow_Eyes": ("eyes",),
    "Pointy_Nose": ("nose",),
    "Receding_Hairline": ("forehead",),
    "Rosy_Cheeks": ("cheeks",),
    "Sideburns": ("sideburns",),
    "Smiling": ("mouth",),
    "Straight_Hair": ("hair", "bangs"),
    "Wavy_Hair": ("hair", "bangs"),
    "Wearing_Earrings": ("earrings",),
    "Wearing_Hat": ("hat",),
    "Wearing_Lipstick": ("mouth",),
    "Wearing_Necklace": ("necklace",),
    "Wearing_Necktie": ("necktie",),
}

# A face counts as attractive when these points add up to more than 1. No wish of anybody's: a bias to be found again.
ATTRACTIVE = {
    "Young": 1.0,
    "Wearing_Lipstick": 1.0,
    "Smiling": 0.5,
    "Eyeglasses": -1.0,
    "Chubby": -1.0,
    "Bald": -1.0,
}

# what a part looks like without the attributes that it can carry
NEUTRAL: dict[str, Params] = {
    "skin": {"Pale_Skin": False, "Young": True},
    "scalp": {"Bald": False},
    "forehead": {"Receding_Hairline": False},
    "cheeks": {"Rosy_Cheeks": False, "High_Cheekbones": False},
    "chin": {"Double_Chin": False},
    "bags": {"Bags_Under_Eyes": False},
    "nose": {"nose": "plain"},
    "eyes": {"Narrow_Eyes": False, "Heavy_Makeup": False},
    "brows": {"brows": "plain"},
    "mouth": {"Smiling": False, "Mouth_Slightly_Open": False, "Big_Lips": False, "Wearing_Lipstick": False},
    "stubble": {"5_o_Clock_Shadow": False},
    "goatee": {"Goatee": False},
    "mustache": {"Mustache": False},
    "sideburns": {"Sideburns": False},
    "hair": {"Bald": True, "Bangs": False},
    "bangs": {"Bangs": False},
    "glasses": {"Eyeglasses": False},
    "hat": {"Wearing_Hat": False},
    "earrings": {"Wearing_Earrings": False},
    "necklace": {"Wearing_Necklace": False},
    "necktie": {"Wearing_Necktie": False},
}

SPURIOUS = 0.9  # correlation of Eyeglasses with Wearing_Hat in the split "spurious"
_SPURIOUS_SHARE = 0.3  # share of faces that have either, there


# --- parameters -------------------------------------------------------------------------------------------------------


def sample(rng: np.random.Generator, *, spurious: bool = False) -> Params:
    """Parameters of one face: attributes, shape, pose, colours, light, background.

    spurious: Eyeglasses and Wearing_Hat correlate at ρ = 0.9; otherwise they are independent.
    """

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def one_of(*options: tuple[str, float]) -> str:
        names, weights = zip(*options, strict=True)
        return str(rng.choice(names, p=np.array(weights) / sum(weights)))

    male, young = chance(0.45), chance(0.72)
    bald = male and chance(0.10 if young else 0.32)
    receding = not bald and chance((0.14 if young else 0.34) if male else 0.05)
    beard = male and chance(0.16)  # a full one: mustache, goatee and sideburns
    chubby, smiling, makeup = chance(0.14), chance(0.48), not male and chance(0.6)
    lipstick = not male and chance(0.92 if makeup else 0.3)
    if spurious:
        p, both = _SPURIOUS_SHARE, _SPURIOUS_SHARE**2 + SPURIOUS * _SPURIOUS_SHARE * (1 - _SPURIOUS_SHARE)
        glasses = chance(p)
        hat = chance(both / p if glasses else (p - both) / (1 - p))
    else:
        glasses, hat = chance(0.18 if young else 0.26), chance(0.15)
    earrings = chance(0.06 if male else 0.42)
    necktie = chance(0.34 if male else 0.03)
    length = (
        one_of(("short", 0.86), ("middle", 0.1), ("long", 0.04))
        if male
        else one_of(("short", 0.1), ("middle", 0.35), ("long", 0.55))
    )
    return {
        "Male": male,
        "Young": young,
        "Bald": bald,
        "Receding_Hairline": receding,
        "Bangs": not bald and not receding and chance(0.12 if male else 0.32),
        "hair": one_of(
            ("black", 0.27),
            ("brown", 0.27),
            ("blond", 0.1 if male else 0.26),
            ("gray", 0.02 if young else 0.5),
            ("red", 0.08),
        ),
        "texture": one_of(("straight", 0.4), ("wavy", 0.22 if male else 0.45), ("curly", 0.2)),
        "length": length,
        "Chubby": chubby,
        "Oval_Face": not chubby and chance(0.34),
        "Double_Chin": chance(0.6 if chubby else 0.08),
        "Pale_Skin": chance(0.1),
        "Rosy_Cheeks": chance(0.05 if male else 0.4 if makeup else 0.12),
        "High_Cheekbones": chance(0.75 if smiling else 0.22),
        "Bags_Under_Eyes": chance(0.18 if young else 0.42),
        "Narrow_Eyes": chance(0.2),
        "Heavy_Makeup": makeup,
        "brows": one_of(("plain", 0.5), ("bushy", 0.36), ("arched", 0.1))
        if male
        else one_of(("plain", 0.42), ("bushy", 0.08), ("arched", 0.5)),
        "nose": one_of(("plain", 0.45), ("big", 0.4), ("pointy", 0.15))
        if male
        else one_of(("plain", 0.5), ("big", 0.16), ("pointy", 0.34)),
        "Smiling": smiling,
        "Mouth_Slightly_Open": chance(0.66 if smiling else 0.3),
        "Big_Lips": chance(0.18 if male else 0.34),
        "Wearing_Lipstick": lipstick,
        "5_o_Clock_Shadow": male and not beard and chance(0.24),
        "Goatee": beard or (male and chance(0.13)),
        "Mustache": beard or (male and chance(0.15)),
        "Sideburns": beard or (male and chance(0.12)),
        "Eyeglasses": glasses,
        "Wearing_Hat": hat,
        "Wearing_Earrings": earrings,
        "Wearing_Necklace": not necktie and chance(0.08 if male else 0.36),
        "Wearing_Necktie": necktie,
        "Blurry": chance(0.08),
        # what no attribute says
        "full": beard,
        "collar": necktie or chance(0.3),
        "tucked": earrings or chance(0.4),
        "angle": _between(rng, -7, 7),
        "scale": _between(rng, 0.93, 1.07),
        "shift": [_between(rng, -4, 4), _between(rng, -4, 4)],
        "yaw": _between(rng, -1, 1),
        "shape": [_between(rng, -1, 1) for _ in range(6)],
        "tone": _between(rng, 0, 1) ** 1.4,
        "iris": rng.choice(["#5b3a1e", "#3b2716", "#3f6a8a", "#4d6b43", "#6b6f72"]).item(),
        "lips": _between(rng, 0, 1),
        "cloth": _colour(rng, 0.7, 0.9),
        "accent": _colour(rng, 0.9, 0.8),
        "hat_colour": _colour(rng, 0.8, 0.75),
        "hat_kind": one_of(("cap", 0.35), ("beanie", 0.3), ("brimmed", 0.35)),
        "frame_kind": one_of(("round", 0.35), ("square", 0.4), ("dark", 0.25)),
        "frame_colour": rng.choice(["#17130f", "#3b2313", "#7a1f1f", "#25304d", "#5c5c5c"]).item(),
        "metal": rng.choice(["#d8b24a", "#c9ccd2", "#efe9df"]).item(),
        "jewel": _between(rng, 0, 1),
        "light": [_between(rng, -0.2, 0.2), _between(rng, -0.14, 0.14), _between(rng, 0.86, 1.12)],
        "cast": [_between(rng, 0.94, 1.06) for _ in range(3)],
        "wall": [_colour(rng, 0.5, 0.95) for _ in range(3)],
        "things": [
            [
                one_of(*((kind, 1.0) for kind in _THINGS)),
                _between(rng, 0, 1),
                _between(rng, 0, 1),
                _between(rng, 0.6, 1.4),
            ]
            for _ in range(int(rng.integers(0, 5)))
        ],
        "noise": _between(rng, 1, 5),
        "seed": int(rng.integers(2**31)),
    }


_THINGS = ("oval", "rings", "bar", "dots", "arc")


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return round(low + (high - low) * rng.random(), 4)


def _colour(rng: np.random.Generator, saturation: float, value: float) -> list[int]:
    grey = _between(rng, 0.12, value)
    return [
        round(255 * min(1.0, max(0.0, grey * (1 + saturation * _between(rng, -0.7, 0.7))))) for _ in range(3)
    ]


def without(params: Params, removed: Collection[str]) -> Params:
    """Parameters of the same face without these parts, or with parts that no face can lack (mouth, nose …) made neutral.

    Raises ValueError for a part that has nothing to remove.
    """
    changed = dict(params)
    for part in removed:
        if part not in NEUTRAL:
            raise ValueError(
                f"there is no part {part!r} to remove from a face; there are {', '.join(NEUTRAL)}"
            )
        changed.update(NEUTRAL[part])
    return changed


def attributes(params: Params) -> np.ndarray:
    """CelebA's forty attributes of a face as they can be seen, int64 (40,) of 0 and 1, in the order of `ATTRIBUTES`."""
    p = params
    bare_head = not p["Wearing_Hat"]
    hair = not p["Bald"]
    seen = {name: bool(p[name]) for name in ATTRIBUTES if name in p} | {
        "Bald": p["Bald"] and bare_head,
        "Bangs": p["Bangs"] and hair and bare_head,
        "Receding_Hairline": p["Receding_Hairline"] and hair and bare_head,
        **{
            f"{name.capitalize()}_Hair": hair and p["hair"] == name
            for name in ("black", "blond", "brown", "gray")
        },
        "Straight_Hair": hair and p["texture"] == "straight",
        "Wavy_Hair": hair and p["texture"] == "wavy",
        "Arched_Eyebrows": p["brows"] == "arched",
        "Bushy_Eyebrows": p["brows"] == "bushy",
        "Big_Nose": p["nose"] == "big",
        "Pointy_Nose": p["nose"] == "pointy",
        "No_Beard": not (p["5_o_Clock_Shadow"] or p["Goatee"] or p["Mustache"] or p["Sideburns"]),
    }
    seen["Attractive"] = sum(points for name, points in ATTRACTIVE.items() if seen[name]) > 1
    return np.array([seen[name] for name in ATTRIBUTES], np.int64)


# --- the face's own frame -----------------------------------------------------------------------------------------------


class _Pose:
    """Maps points of the face's own frame (pixels from the middle between the eyes) into the image."""

    def __init__(self, p: Params) -> None:
        turn = math.radians(p["angle"])
        cos, sin = math.cos(turn) * p["scale"], math.sin(turn) * p["scale"]
        turned = np.array([[cos, sin], [-sin, cos]])
        self.matrix = turned * [[1 - 0.035 * abs(p["yaw"])], [1]]  # turning the head makes it narrower
        self.offset = np.array(EYES) + p["shift"]
        self.outward = p["yaw"] * turned[0]

    def __call__(self, points: Points, depth: float = 0.0) -> Points:
        """depth: how far a part stands out towards the camera; turning the head moves it by that much."""
        moved: Points = points @ self.matrix + (self.offset + depth * self.outward)
        return moved


_STEPS = np.linspace(0, 1, 6, endpoint=False)[:, None]
_CATMULL_ROM = 0.5 * np.hstack(
    [
        -_STEPS + 2 * _STEPS**2 - _STEPS**3,
        2 - 5 * _STEPS**2 + 3 * _STEPS**3,
        _STEPS + 4 * _STEPS**2 - 3 * _STEPS**3,
        _STEPS**3 - _STEPS**2,
    ]
)


def _p(*corners: tuple[float, float]) -> Points:
    return np.array(corners, float)


@cache
def _neighbours(count: int, closed: bool) -> np.ndarray:
    """For each piece of a curve the four points that shape it."""
    if closed:
        return (np.arange(count)[:, None] + np.arange(-1, 3)) % count
    return np.arange(count - 1)[:, None] + np.arange(4)  # of points with one more at either end


def _closed(points: Points) -> Points:
    """A smooth closed curve through the points (Catmull-Rom), six per piece."""
    curve: Points = (_CATMULL_ROM @ points[_neighbours(len(points), True)]).reshape(-1, 2)
    return curve


def _open(points: Points) -> Points:
    """A smooth open curve through the points."""
    padded = np.concatenate([[2 * points[0] - points[1]], points, [2 * points[-1] - points[-2]]])
    curve = (_CATMULL_ROM @ padded[_neighbours(len(points), False)]).reshape(-1, 2)
    return np.concatenate([curve, points[-1:]])


def _mirrored(right: Points) -> Points:
    """The right half of an outline, from the top down, closed by its mirror image."""
    left = right[::-1] * (-1, 1)
    keep = left[np.abs(left[:, 0]) > 1e-6]
    return np.vstack([right, keep])


@cache
def _circle(count: int) -> Points:
    angles = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _ellipse(x: float, y: float, rx: float, ry: float, count: int = 24) -> Points:
    return _circle(count) * (rx, ry) + (x, y)


@cache
def _taper(count: int) -> np.ndarray:
    """The width of a brush stroke along its way, (count, 1) in 0..1."""
    return np.asarray(np.sqrt(np.sin(np.linspace(0.12, math.pi - 0.12, count)))[:, None])


def _rgb(colour: str | Sequence[int]) -> np.ndarray:
    if isinstance(colour, str):
        colour = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return np.array(colour, np.float32)


@cache
def _grain() -> np.ndarray:
    """A tile of normal noise from which every image cuts its own window."""
    return np.random.default_rng(0).standard_normal((3, 512, 512)).astype(np.float32)


def _window(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = rng.integers(0, 512 - height), rng.integers(0, 512 - width)
    return _grain()[:, y : y + height, x : x + width]


@cache
def _among(parts: tuple[str, ...]) -> np.ndarray:
    """Bool (1 + len(PARTS),): which labels are of these parts."""
    return np.isin(np.arange(1 + len(PARTS)), [1 + PARTS.index(part) for part in parts])


class _Canvas:
    """The picture under the brush, and which part each pixel shows."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = (
            image  # float32 (3, H, W) in 0..255: numpy is twice as fast on planes as on pixels of three
        )
        self.parts = np.zeros(image.shape[1:], np.uint8)

    def mask(
        self, outlines: Sequence[Points], soft: float = 0.0
    ) -> tuple[tuple[slice, slice], np.ndarray] | None:
        """The window that the outlines cover, and how much of each pixel in it: float32 in 0..1; None when out of sight."""
        margin = 2 + int(3 * soft)
        boxes = [cv2.boundingRect(points.astype(np.float32)) for points in outlines]
        left, top = max(0, min(b[0] for b in boxes) - margin), max(0, min(b[1] for b in boxes) - margin)
        right = min(SIZE[1], max(b[0] + b[2] for b in boxes) + margin)
        bottom = min(SIZE[0], max(b[1] + b[3] for b in boxes) + margin)
        if right <= left or bottom <= top:
            return None
        covered = np.zeros((bottom - top, right - left), np.uint8)
        # sixteenths of a pixel: the edges are antialiased
        for points in outlines:
            sixteenths = np.rint(points * 16).astype(np.int32)
            cv2.fillPoly(covered, [sixteenths], 255, cv2.LINE_AA, 4, (-16 * left, -16 * top))
        alpha: np.ndarray = covered.astype(np.float32)
        alpha *= np.float32(1 / 255)
        if soft:
            alpha = cv2.GaussianBlur(alpha, (0, 0), soft)
        return (slice(top, bottom), slice(left, right)), alpha

    def blend(self, window: tuple[slice, slice], paint: np.ndarray, colour: np.ndarray) -> None:
        """Mix a colour (3,), or a picture (3, h, w), into a window: paint float32 (h, w) in 0..1 says how much of it."""
        below = self.image[:, window[0], window[1]]
        change = (colour.reshape(3, 1, 1) if colour.ndim == 1 else colour) - below
        change *= paint
        below += change

    def fill(
        self,
        outlines: Sequence[Points] | Points,
        colour: np.ndarray | None,
        *,
        part: str | None = None,
        opacity: float = 1.0,
        soft: float = 0.0,
        grain: np.ndarray | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        """Paint outlines, soft-edged if wanted, and say what part they are; colour None: only say so.

        grain: noise (H, W, …) that makes the paint uneven, as hair is. only: on these parts, and nowhere else.
        """
        shapes = [outlines] if isinstance(outlines, np.ndarray) else list(outlines)
        found = self.mask(shapes, soft)
        if found is None:
            return
        window, alpha = found
        if only is not None:
            alpha = alpha * _among(tuple(only))[self.parts[window]]
        if colour is not None:
            paint = alpha * np.float32(opacity)
            if grain is not None:
                paint *= np.clip(0.9 + 0.25 * grain[0][window], 0.3, 1)
            self.blend(window, paint, colour)
        if part is not None:
            self.parts[window][alpha > 0.5] = 0 if part == "" else 1 + PARTS.index(part)

    def line(
        self,
        points: Points,
        colour: np.ndarray,
        width: float,
        *,
        opacity: float = 1.0,
        part: str | None = None,
        soft: float = 0.0,
    ) -> None:
        """Paint along an open curve, thinner towards its ends."""
        along = np.empty_like(points)
        along[1:-1] = points[2:] - points[:-2]
        along[0], along[-1] = points[1] - points[0], points[-1] - points[-2]
        length = np.sqrt((along * along).sum(1, keepdims=True)) + 1e-6
        half = along[:, ::-1] * (-1, 1) / length * _taper(len(points)) * (width / 2)
        self.fill(
            np.vstack([points + half, (points - half)[::-1]]), colour, opacity=opacity, part=part, soft=soft
        )

    def strands(self, curves: Points, inside: Sequence[Points], colour: np.ndarray, opacity: float) -> None:
        """Thin lines (n, points, 2), drawn only where the outlines `inside` are."""
        found = self.mask(inside)
        if found is None:
            return
        window, alpha = found
        drawn = np.zeros(alpha.shape, np.uint8)
        low = np.array([window[1].start, window[0].start])
        lines = list(np.round((curves - low) * 16).astype(np.int32))
        cv2.polylines(drawn, lines, False, 255, 1, cv2.LINE_AA, 4)
        self.blend(window, alpha * drawn.astype(np.float32) * np.float32(opacity / 255), colour)


# --- drawing ------------------------------------------------------------------------------------------------------------

_TONES = np.array(
    [[246, 214, 190], [232, 190, 158], [208, 158, 120], [166, 114, 78], [118, 78, 52]], np.float32
)
_PALE = np.array([246, 230, 224], np.float32)
_HAIR = {"black": "#1c1715", "brown": "#5e3a1f", "blond": "#d9b162", "gray": "#a3a5a8", "red": "#a4461d"}


def skin_tone(p: Params) -> np.ndarray:
    """The skin's colour, float32 (3,) in 0..255."""
    if p["Pale_Skin"]:
        return _PALE
    place = p["tone"] * (len(_TONES) - 1)
    low = min(int(place), len(_TONES) - 2)
    return _TONES[low] + np.float32(place - low) * (_TONES[low + 1] - _TONES[low])


def _proportions(p: Params) -> tuple[float, float]:
    """How much wider than the average the face is, and where its chin ends."""
    wide = 2.0 * p["shape"][0] + (7 if p["Chubby"] else 0) - (2.5 if p["Oval_Face"] else 0)
    return wide, 69 + 1.5 * p["shape"][2] + (6 if p["Oval_Face"] else -1) + 0.5 * p.get("gap", 0.0)


def _outline(p: Params) -> Points:
    """The face's contour."""
    wide, chin = _proportions(p)
    b = p["shape"][1]
    jaw = (
        (37 if p["Male"] else 33)
        + wide
        + 1.2 * b
        - (2.0 if p["Oval_Face"] else 0)
        + (3 if p["Chubby"] else 0)
    )
    tip = 19 if p["Male"] else 14
    return _mirrored(
        _p(
            (0, -68),
            (24, -63),
            (39, -44),
            (44.5 + 0.4 * wide, -14),
            (43.5 + 0.8 * wide, 14),
            (jaw + 2, 40),
            (tip + 8 + 0.4 * wide, 58),
            (tip - 4, chin - 3),
            (0, chin),
        )
    )


def draw(params: Params, removed: Collection[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """A face without the parts in `removed` (see :func:`without`); nothing else changes.

    A parameter "gap" opens the mouth by so many pixels and lowers the chin with it, for faces that speak.

    Returns the image, uint8 (218, 178, 3), and which part each pixel shows, uint8 (218, 178): 1 + its index in `PARTS`, 0 for
    the background.
    """
    p = without(params, removed)
    rng = np.random.default_rng(p["seed"])
    at = _Pose(p)
    canvas = _Canvas(_wall(p, rng))
    skin = skin_tone(p)
    face = _closed(_outline(p))
    grain = _window(rng, *SIZE)
    hair = _Hair(p, np.random.default_rng([p["seed"], 1]), at)
    hair.behind(canvas)
    _body(canvas, p, at, skin)
    if p["tucked"] or hair.short:
        hair.sides(canvas)
    ears = [at(_ellipse(side * (45.5 + p["shape"][0]), 7, 6.5, 12), -3) for side in (-1, 1)]
    canvas.fill(ears, skin * 0.9, part="ears")
    canvas.fill(
        [at(_ellipse(side * (46.5 + p["shape"][0]), 7, 3, 7), -3) for side in (-1, 1)], skin * 0.7, soft=1.2
    )
    _skin(canvas, p, at, skin, face)
    _wrinkles(canvas, p, at, skin)
    _beard(canvas, p, at, grain)
    _eyes(canvas, p, at, skin)
    _nose(canvas, p, at, skin)
    _mouth(canvas, p, at, skin)
    if p["Mustache"]:
        shape = _mirrored(_p((0, 28.5), (8, 28), (17, 31.5), (20.5, 37), (14, 36), (6, 35), (0, 35.5)))
        canvas.fill(
            at(_closed(shape), 7), _hair_colour(p) * 0.9, part="mustache", grain=grain, soft=0.7, opacity=1
        )
    hair.front(canvas)
    if not (p["tucked"] or hair.short):
        hair.sides(canvas)
    _brows(canvas, p, at, grain)
    if p["Wearing_Earrings"]:
        _earrings(canvas, p, at)
    if p["Wearing_Hat"]:
        _hat(canvas, p, at, grain)
    if p["Eyeglasses"]:
        _glasses(canvas, p, at)
    return _light(canvas.image, p, rng), canvas.parts


def render(params: Params, removed: Collection[str] = ()) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The image, uint8 (218, 178, 3), and for every part that is to be seen its pixels, bool (218, 178), without overlap.

    Raises ValueError for a part that cannot be removed.
    """
    image, parts = draw(params, removed)
    return image, {PARTS[index - 1]: parts == index for index in np.unique(parts).tolist() if index}


def landmarks(params: Params) -> np.ndarray:
    """CelebA's five points, int64 (5, 2) as x, y: eyes, nose, corners of the mouth; "left" is the left of the image."""
    at = _Pose(params)
    wide, lift = _smile(params)
    points = [
        at(_p((-19.5, 0), (19.5, 0)), 4),
        at(_p((0, 22)), 13),
        at(_p((-wide, 41 - lift), (wide, 41 - lift)), 7),
    ]
    return np.rint(np.concatenate(points)).astype(np.int64)


def _wall(p: Params, rng: np.random.Generator) -> np.ndarray:
    """The background: three colours that run into each other, and a few things that mean nothing."""
    colours = np.array(p["wall"], np.float32)
    mix = rng.random((4, 4, 3)).astype(np.float32) ** 2
    coarse = (mix / mix.sum(2, keepdims=True)) @ colours
    smooth = cv2.resize(coarse, (SIZE[1], SIZE[0]), interpolation=cv2.INTER_CUBIC)
    image = np.ascontiguousarray(smooth.transpose(2, 0, 1)).clip(0, 255)
    canvas = _Canvas(image)
    for kind, x, y, size in p["things"]:
        centre = np.array([x * SIZE[1], y * SIZE[0] * 0.8])
        colour = 255 * rng.random(3).astype(np.float32)
        if kind == "oval":
            canvas.fill(centre + _ellipse(0, 0, 16 * size, 6 * size), colour)
        elif kind == "rings":
            for side in (-1, 1):
                canvas.fill(centre + _ellipse(side * 15 * size, 0, 11 * size, 10 * size), colour)
                canvas.fill(centre + _ellipse(side * 15 * size, 0, 8.5 * size, 7.5 * size), colours[0])
        elif kind == "bar":
            canvas.fill(centre + _p((-7, -34), (7, -34), (11, 34), (-11, 34)) * size, colour)
        elif kind == "dots":
            canvas.fill([centre + _ellipse(6 * i - 15, (i % 2) * 3, 2.5, 2.5, 10) for i in range(6)], colour)
        else:
            canvas.fill(centre + _closed(_p((-24, 6), (0, -14), (24, 6), (0, -6))) * size, colour)
    if p["seed"] % 3 == 0:  # a wall in focus is rare
        return canvas.image
    return _blurred(canvas.image, 1.5)


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(plane, (0, 0), sigma) for plane in image])


def _body(canvas: _Canvas, p: Params, at: _Pose, skin: np.ndarray) -> None:
    width = 27 if p["Male"] else 22
    width += 3 if p["Chubby"] else 0
    cloth = _rgb(p["cloth"])
    shoulders = _closed(_mirrored(_p((0, 84), (width + 1, 82), (56, 92), (88, 106), (98, 150), (0, 160))))
    canvas.fill(at(shoulders, -6), cloth, part="cloth")
    canvas.fill(at(shoulders + (0, 9), -6), cloth * 0.8, opacity=0.5, soft=5, only=("cloth",))
    low = 88 if p["collar"] else 104
    neck = _closed(
        _mirrored(
            _p((0, 40), (width - 1, 46), (width - 2, 74), (width + 2, 84), (width * 0.7, low - 4), (0, low))
        )
    )
    canvas.fill(at(neck, -4), skin * 0.88, part="neck")
    # the shadow under the jaw
    canvas.fill(
        at(_closed(_mirrored(_p((0, 52), (38, 44), (30, 66), (12, 80), (0, 82)))), -2),
        skin * 0.55,
        opacity=0.6,
        soft=4,
        only=("neck",),
    )
    if p["collar"]:
        shirt = _rgb("#f2f2ee") * (0.86 + 0.14 * p["jewel"])
        canvas.fill(
            at(
                _p(
                    (-width - 3, 80),
                    (0, 97),
                    (width + 3, 80),
                    (width + 12, 90),
                    (26, 150),
                    (-26, 150),
                    (-width - 12, 90),
                ),
                -5,
            ),
            shirt,
            part="cloth",
        )
        for side in (-1, 1):
            canvas.line(
                at(_p((side * (width + 3), 80), (side * 12, 92), (side * 3, 98)), -5), shirt * 0.7, 1.5
            )
    elif p["jewel"] < 0.5:
        canvas.line(
            at(
                _open(_p((-width - 2, 82), (-width * 0.6, 97), (0, 103), (width * 0.6, 97), (width + 2, 82))),
                -4,
            ),
            cloth * 0.6,
            2,
        )
    if p["Wearing_Necktie"]:
        tie = _rgb(p["accent"])
        canvas.fill(
            at(_p((-6.5, 87), (6.5, 87), (4, 97), (9, 112), (12, 150), (-12, 150), (-9, 112), (-4, 97)), -4),
            tie,
            part="necktie",
        )
        for y in range(98, 140, 7):
            canvas.fill(
                at(_p((-10, y + 5), (10, y - 3), (10, y), (-10, y + 8)), -4),
                tie * 0.55 + 90,
                only=("necktie",),
            )
        canvas.fill(at(_p((-6.5, 87), (6.5, 87), (4, 97), (-4, 97)), -4), tie * 0.7)
    if p["Wearing_Necklace"]:
        metal = _rgb(p["metal"])
        curve = _open(_p((-width + 1, 79), (-width * 0.62, 91), (0, 97), (width * 0.62, 91), (width - 1, 79)))
        if p["jewel"] < 0.5:  # beads
            along = curve[:: max(1, len(curve) // 11)]
            shapes = [at(_ellipse(x, y, 2.9, 2.9, 10), -3) for x, y in along]
            canvas.fill(
                [at(_ellipse(x, y + 0.8, 3.4, 3.4, 10), -3) for x, y in along], metal * 0.35, part="necklace"
            )
            canvas.fill(shapes, metal)
            canvas.fill(
                [at(_ellipse(x - 0.8, y - 0.9, 0.9, 0.9, 8), -3) for x, y in along], metal * 0.2 + 204
            )
        else:  # a chain and a pendant
            canvas.line(at(curve + (0, 0.8), -3), metal * 0.35, 4.2, part="necklace")
            canvas.line(at(curve, -3), metal, 2.6)
            canvas.fill(at(_p((0, 94), (5.5, 100), (0, 107), (-5.5, 100)), -3), metal * 0.5, part="necklace")
            canvas.fill(at(_p((0, 96), (3.5, 100), (0, 105), (-3.5, 100)), -3), _rgb(p["accent"]) * 0.5 + 110)


def _skin(canvas: _Canvas, p: Params, at: _Pose, skin: np.ndarray, face: Points) -> None:
    outline = at(face)
    canvas.fill(outline, skin * 0.82, part="skin")
    canvas.fill(at(face * (0.86, 0.9) + (0, -1), 2), skin, soft=7, only=("skin",))
    canvas.fill(at(_ellipse(0, -34, 22, 12), 6), skin * 0.4 + 255 * 0.6, opacity=0.22, soft=7, only=("skin",))
    for side in (-1, 1):  # eye sockets, and the hollow below the cheekbones
        canvas.fill(at(_ellipse(side * 19.5, -2, 14, 9), 3), skin * 0.68, opacity=0.38, soft=3.5)
        canvas.fill(at(_ellipse(side * 33, 36, 7, 14), 1), skin * 0.7, opacity=0.3, soft=5, only=("skin",))
    top = -57 if p["Receding_Hairline"] else -46
    canvas.fill(
        at(_closed(_mirrored(_p((0, top), (22, top + 2), (34, -36), (36, -22), (20, -19), (0, -19))))),
        None,
        part="forehead",
        only=("skin",),
    )
    if p["Bald"]:
        skull = _closed(
            _mirrored(
                _p((0, -72), (26, -67), (41, -47), (46, -20), (40, -14), (33, -36), (18, -47), (0, -49))
            )
        )
        canvas.fill(at(skull), skin * 0.9, part="scalp")
        canvas.fill(at(skull * (0.9, 0.95)), skin * 1.0, opacity=0.8, soft=4, only=("scalp",))
        canvas.fill(
            at(_ellipse(-10 * np.sign(p["light"][0]), -60, 15, 5)),
            _rgb("#ffffff"),
            opacity=0.45,
            soft=3,
            only=("scalp",),
        )
    cheeks = [at(_closed(_ellipse(side * 29, 22, 12, 11, 12)), 3) for side in (-1, 1)]
    canvas.fill(cheeks, None, part="cheeks", only=("skin",))
    if p["Rosy_Cheeks"]:
        # on dark skin a blush darkens, so it is drawn stronger there
        canvas.fill(cheeks, _rgb("#dd2f4c"), opacity=0.5 + 0.12 * p["tone"], soft=3.0)
    if p["High_Cheekbones"]:
        for side in (-1, 1):
            bone = _open(_p((side * 18, 19), (side * 28, 16), (side * 39, 8)))
            canvas.line(at(bone, 4), np.minimum(skin * 1.12 + 26, 255), 8, opacity=0.75, soft=2.0)
            canvas.line(at(bone + (0, 11), 3), skin * 0.5, 7, opacity=0.6, soft=2.0)
    chin = 1 + _proportions(p)[1]
    canvas.fill(at(_ellipse(0, chin - 9, 17, 11), 5), None, part="chin", only=("skin",))
    canvas.fill(at(_ellipse(0, chin - 11, 8, 4), 6), skin * 0.5 + 128, opacity=0.16, soft=3)
    if p["Double_Chin"]:
        fold = _closed(
            _mirrored(_p((0, chin - 1), (20, chin - 8), (31, chin - 6), (21, chin + 8), (0, chin + 12)))
        )
        canvas.fill(at(fold, 3), skin * 0.94, part="chin")
        canvas.line(
            at(_open(_p((-22, chin - 8), (-12, chin - 1), (0, chin + 1), (12, chin - 1), (22, chin - 8))), 4),
            skin * 0.42,
            3.2,
            opacity=0.9,
            soft=0.8,
        )
        canvas.line(
            at(
                _open(_p((-24, chin + 4), (-12, chin + 11), (0, chin + 13), (12, chin + 11), (24, chin + 4))),
                2,
            ),
            skin * 0.45,
            3,
            opacity=0.8,
            soft=1,
        )


def _wrinkles(canvas: _Canvas, p: Params, at: _Pose, skin: np.ndarray) -> None:
    dark = skin * 0.55
    if not p["Young"]:
        for y in (-40, -34, -28):
            canvas.line(
                at(_open(_p((-24, y + 1), (-10, y - 1.5), (4, y), (24, y + 1))), 5),
                dark,
                1.7,
                opacity=0.75,
                soft=0.4,
            )
        for side in (-1, 1):
            for tilt in (-5, 0, 5):
                canvas.line(
                    at(_p((side * 32, 1 + tilt * 0.3), (side * 36, 1 + tilt * 0.7), (side * 40, 1 + tilt))),
                    dark,
                    1.4,
                    opacity=0.8,
                )
            canvas.line(
                at(_open(_p((side * 10, 25), (side * 17, 32), (side * 21, 43))), 5),
                dark,
                2,
                opacity=0.75,
                soft=0.4,
            )
            canvas.line(
                at(_open(_p((side * 21, 50), (side * 23, 56), (side * 22, 61))), 4),
                dark,
                1.6,
                opacity=0.6,
                soft=0.4,
            )
    if p["Bags_Under_Eyes"]:
        for side in (-1, 1):
            bag = _closed(
                _p(
                    (side * 9, 6.5),
                    (side * 19, 8.5),
                    (side * 29.5, 6),
                    (side * 27, 12),
                    (side * 19, 14.5),
                    (side * 12, 12),
                )
            )
            canvas.fill(at(bag, 4), skin * 0.5 + _rgb("#3c2350") * 0.3, opacity=0.62, soft=1.1)
            canvas.fill(at(bag, 4), None, part="bags")
            canvas.line(
                at(_open(_p((side * 11, 12), (side * 19, 15), (side * 28, 12))), 4),
                dark * 0.8,
                1.6,
                opacity=0.9,
            )


def _hair_colour(p: Params) -> np.ndarray:
    return _rgb(_HAIR[p["hair"]])


def _beard(canvas: _Canvas, p: Params, at: _Pose, grain: np.ndarray) -> None:
    colour = _hair_colour(p) * 0.9
    wide, chin = _proportions(p)
    face = ("skin", "chin", "cheeks")
    if p["5_o_Clock_Shadow"]:
        zone = _mirrored(
            _p(
                (0, 26),
                (12, 29),
                (24, 34),
                (40 + wide, 22),
                (42 + wide, 34),
                (38 + wide, 44),
                (24 + 0.4 * wide, 61),
                (0, chin + 1),
            )
        )
        canvas.fill(at(_closed(zone), 2), _rgb("#2c3038"), opacity=0.5, soft=1.6, grain=grain, only=face)
        canvas.fill(at(_closed(zone), 2), None, part="stubble", only=face)
    if p["Sideburns"]:
        for side in (-1, 1):
            x = side * (42.5 + 0.8 * wide)
            strip = _p(
                (x, -14),
                (x - side * 9, -10),
                (x - side * 10, 14),
                (x - side * 11, 31),
                (x - side * 2, 33),
                (x + side * 2, 10),
            )
            canvas.fill(at(_closed(strip)), colour, part="sideburns", grain=grain, soft=0.8)
        if p["full"]:  # the jaw joins them
            jaw = _mirrored(
                _p(
                    (0, 60),
                    (14, 52),
                    (26, 38),
                    (34 + wide, 22),
                    (42 + 0.9 * wide, 20),
                    (39 + wide, 42),
                    (25 + 0.4 * wide, 62),
                    (0, chin + 3),
                )
            )
            canvas.fill(at(_closed(jaw), 2), colour, part="sideburns", grain=grain, soft=0.9)
    if p["Goatee"]:
        tuft = _mirrored(
            _p((0, 50), (9, 51.5), (15, 44), (19.5, 43), (18, 58), (12, chin - 1), (0, chin + 5))
        )
        canvas.fill(at(_closed(tuft), 6), colour, part="goatee", grain=grain, soft=0.8)


def _eyes(canvas: _Canvas, p: Params, at: _Pose, skin: np.ndarray) -> None:
    tall = 2.1 if p["Narrow_Eyes"] else 5.2 + 0.5 * p["shape"][3]
    for side in (-1, 1):
        x = side * 19.5
        rim = _closed(
            _p(
                (x - 10.5, 0.8),
                (x - 5, -0.72 * tall),
                (x + 1, -tall),
                (x + 6, -0.66 * tall),
                (x + 10.5, 0.2),
                (x + 5, 0.6 * tall),
                (x - 4, 0.72 * tall),
            )
        )
        rim = rim if side > 0 else rim * (-1, 1) + (2 * x, 0)
        lid = _closed(
            _p((x - 13, 1), (x - 6, -9.5), (x + 4, -10.5), (x + 13, -2), (x + 9, 5.5), (x - 7, 5.5))
        )
        if p["Heavy_Makeup"]:
            paint = _closed(
                _p((x - 12, 0), (x - 6, -10), (x + 5, -10.5), (x + 13, -3), (x + 6, -1), (x - 6, -1))
            )
            canvas.fill(at(paint, 4), _rgb(p["accent"]) * 0.5 + _rgb("#5a2f6e") * 0.5, opacity=0.7, soft=1.1)
        canvas.fill(at(lid, 4), None, part="eyes")
        eye = at(rim, 4)
        canvas.fill(eye, _rgb("#f3efe9") * 0.97, part="eyes")
        found = canvas.mask([eye])
        if found is not None:  # the iris shows where the lids leave it free
            window, alpha = found
            for radius, colour in ((5.2, _rgb(p["iris"])), (2.4, _rgb("#0c0a09"))):
                iris = np.zeros_like(canvas.parts)
                cv2.fillPoly(
                    iris,
                    [
                        np.round(at(_ellipse(x + 1.2 * p["yaw"], -0.3, radius, radius), 4) * 16).astype(
                            np.int32
                        )
                    ],
                    255,
                    cv2.LINE_AA,
                    4,
                )
                canvas.blend(window, alpha * iris[window] / np.float32(255), colour)
        if not p["Narrow_Eyes"]:
            canvas.fill(at(_ellipse(x + 1.5, -2, 1.1, 1.1, 10), 4), _rgb("#fafafa"))
        upper = _open(
            np.array(
                [
                    (x - 11.5, 1.2),
                    (x - 5, -0.72 * tall - 0.3),
                    (x + 1, -tall - 0.4),
                    (x + 6, -0.66 * tall - 0.3),
                    (x + 11.2, 0.2),
                ]
            )
        )
        upper = upper if side > 0 else upper * (-1, 1) + (2 * x, 0)
        heavy = 3.4 if p["Heavy_Makeup"] else 1.8 if p["Male"] else 2.2
        canvas.line(at(upper, 4), _rgb("#1a1210"), heavy, opacity=0.95)
        canvas.line(at(upper * (1, 1) + (0, -3.6), 4), skin * 0.5, 1.3, opacity=0.6)
        if p["Heavy_Makeup"]:  # lashes
            for point, slant in zip(upper[::5], np.linspace(-3, 3, len(upper[::5])), strict=True):
                tip = point + (slant, -4.2)
                canvas.line(at(np.vstack([point, (point + tip) / 2, tip]), 4), _rgb("#120c0a"), 1.1)


def _brows(canvas: _Canvas, p: Params, at: _Pose, grain: np.ndarray) -> None:
    dark = (
        _rgb(_HAIR["brown"]) * 0.5 + _rgb(_HAIR["black"]) * 0.3
        if p["hair"] in ("blond", "red")
        else _hair_colour(p) * 0.8
    )
    for side in (-1, 1):
        if p["brows"] == "arched":
            curve = _p((8.5, -14), (15, -19), (23, -22.5), (30, -19), (35.5, -10.5))
            width = 4.2
        else:
            curve = _p((7, -14.5), (16, -16.6), (25, -16.4), (33.5, -12.5))
            width = 8.6 if p["brows"] == "bushy" else 3.9
        curve = _open(curve * (side, 1))
        canvas.line(at(curve, 5), dark, width, opacity=0.92, part="brows", soft=0.5)
        if p["brows"] == "bushy":
            hairs = at(np.stack([curve[1::2], curve[1::2] + (side * 2.2, -4.6)], 1), 5)
            around = [at(_ellipse(side * 20, -16, 19, 10), 5)]
            canvas.strands(hairs, around, dark * 0.7, 0.8)


def _nose(canvas: _Canvas, p: Params, at: _Pose, skin: np.ndarray) -> None:
    kind = p["nose"]
    wide = {"plain": 8.5, "big": 14.5, "pointy": 6.0}[kind]
    tip = {"plain": 26.0, "big": 28.5, "pointy": 30.5}[kind]
    shadow = skin * 0.6
    area = _closed(
        _mirrored(_p((0, -8), (4.5, -6), (5.5, 8), (wide + 3, tip - 9), (wide + 3, tip), (0, tip + 3.5)))
    )
    canvas.fill(at(area, 8), None, part="nose")
    for side in (-1, 1):
        strength = 0.34 + 0.14 * side * float(np.sign(p["light"][0]))
        flank = _p(
            (side * 5, -8),
            (side * 3.6, 6),
            (side * (wide - 1), tip - 8),
            (side * (wide + 1.5), tip - 2),
            (side * (wide - 3), tip - 6),
            (side * 2, 4),
        )
        canvas.fill(at(_closed(flank), 9), shadow, opacity=strength, soft=1.6)
        wing = _open(
            _p((side * (wide - 2.5), tip - 9), (side * (wide + 1), tip - 5), (side * (wide - 0.5), tip - 0.5))
        )
        canvas.line(at(wing, 10), shadow * 0.85, 2.4, opacity=0.75, soft=0.5)
        canvas.fill(
            at(_ellipse(side * wide * 0.48, tip - 1.2, wide * 0.27, 1.7, 12), 11),
            skin * 0.28,
            opacity=0.9,
            soft=0.4,
        )
    canvas.fill(at(_ellipse(0, 6, 2.2, 12), 12), skin * 0.4 + 153, opacity=0.4, soft=1.5)
    if kind == "pointy":
        canvas.fill(at(_p((-5, tip - 7), (5, tip - 7), (0, tip + 3)), 13), skin * 0.5, opacity=0.8, soft=0.7)
        canvas.fill(
            at(_p((-1.6, -2), (1.6, -2), (2.4, tip - 6), (-2.4, tip - 6)), 13),
            skin * 0.2 + 204,
            opacity=0.6,
            soft=0.7,
        )
    else:
        canvas.fill(
            at(_ellipse(0, tip - 7.5, wide * 0.42, wide * 0.36), 13), skin * 0.4 + 153, opacity=0.5, soft=1.6
        )
        canvas.line(
            at(_open(_p((-wide * 0.6, tip - 0.4), (0, tip + 1.6), (wide * 0.6, tip - 0.4))), 11),
            shadow,
            2,
            opacity=0.6,
            soft=0.6,
        )
    if kind == "big":
        canvas.line(
            at(_open(_p((-wide, tip - 8), (-wide - 1.6, tip - 3), (-wide + 2, tip + 1))), 10),
            shadow * 0.6,
            2.6,
            opacity=0.9,
        )
        canvas.line(
            at(_open(_p((wide, tip - 8), (wide + 1.6, tip - 3), (wide - 2, tip + 1))), 10),
            shadow * 0.6,
            2.6,
            opacity=0.9,
        )


def _smile(p: Params) -> tuple[float, float]:
    """Half the mouth's width, and how far its corners are drawn up."""
    return (20.5, 5.5) if p["Smiling"] else (14.5 + p["shape"][4], -1.0)


def _mouth(canvas: _Canvas, p: Params, at: _Pose, skin: np.ndarray) -> None:
    wide, lift = _smile(p)
    y, sag = 41.0, 0.9 * max(lift, 0.0)
    gap = p["gap"] if "gap" in p else (7.0 if p["Smiling"] else 8.5) if p["Mouth_Slightly_Open"] else 0.0
    upper, lower = (6.2, 7.8) if p["Big_Lips"] else (3.0, 4.0)
    if p["Wearing_Lipstick"]:
        lips = _rgb(("#b3122d", "#c22a63", "#8e1f3f", "#d0333a")[int(p["lips"] * 3.99)])
    else:
        lips = skin * 0.74 + _rgb("#a0524d") * 0.16
    corner = y - lift
    edge = (wide + 1.5) * 0.55
    whole = _closed(
        _p(
            (-wide - 1, corner),
            (-edge, y - upper - 1 - 0.35 * lift + 0.2 * sag),
            (-3.2, y - upper - 1.6 + sag * 0.3),
            (0, y - upper + sag * 0.3),
            (3.2, y - upper - 1.6 + sag * 0.3),
            (edge, y - upper - 1 - 0.35 * lift + 0.2 * sag),
            (wide + 1, corner),
            (edge, y + gap + lower * 0.72 + sag * 0.35),
            (0, y + gap + lower + sag),
            (-edge, y + gap + lower * 0.72 + sag * 0.35),
        )
    )
    inner_top = [
        (-wide + 1.2, corner + 0.3),
        (-edge, y - 0.3 * lift + 0.4 * sag),
        (0, y + sag * 0.55),
        (edge, y - 0.3 * lift + 0.4 * sag),
        (wide - 1.2, corner + 0.3),
    ]
    canvas.fill(
        at(_ellipse(0, y + gap + lower + sag + 3.5, wide * 0.5, 2.2), 7), skin * 0.6, opacity=0.45, soft=1.6
    )
    canvas.fill(at(whole * (1.08, 1) + (0, 0), 7), None, part="mouth")
    canvas.fill(at(whole, 7), lips, part="mouth")
    canvas.fill(
        at(_ellipse(0, y + gap + lower * 0.55 + sag, wide * 0.34, lower * 0.22), 8),
        lips * 0.4 + 153,
        opacity=0.42,
        soft=0.9,
    )
    if gap:
        hole = _closed(
            _p(
                *inner_top,
                (edge, y + gap * 0.75 + 0.5 * sag),
                (0, y + gap + 0.8 * sag),
                (-edge, y + gap * 0.75 + 0.5 * sag),
            )
        )
        canvas.fill(at(hole, 7), _rgb("#3a0f12"))
        teeth = np.array(
            [
                *inner_top,
                (edge * 0.85, y + gap * 0.42 + 0.45 * sag),
                (0, y + gap * (0.62 if p["Smiling"] else 0.4) + 0.7 * sag),
                (-edge * 0.85, y + gap * 0.42 + 0.45 * sag),
            ]
        )
        canvas.fill(at(_closed(teeth), 7), _rgb("#f4f0e8"))
    else:
        canvas.line(at(_open(np.array(inner_top)), 7), lips * 0.35, 1.7)
    if p["Smiling"]:
        for side in (-1, 1):
            canvas.line(
                at(_open(_p((side * 12, 24), (side * 22, 30), (side * 26.5, 40))), 5),
                skin * 0.55,
                2.2,
                opacity=0.7,
                soft=0.7,
            )
            canvas.fill(
                at(_ellipse(side * (wide + 1.5), corner, 1.6, 2.6, 12), 6), skin * 0.45, opacity=0.6, soft=0.7
            )


class _Hair:
    """Hair in three layers: behind the neck, at the sides of the face, and over the forehead."""

    def __init__(self, p: Params, rng: np.random.Generator, at: _Pose) -> None:
        self.p, self.rng, self.at = p, rng, at
        self.none = p["Bald"]
        self.short = p["length"] == "short"
        self.colour = _hair_colour(p)
        self.volume = 5 + 3 * p["shape"][5] + (5 if p["texture"] == "curly" else 0) + (0 if p["Male"] else 2)
        self.end = {"short": 4.0, "middle": 58.0, "long": 102.0}[p["length"]]
        self.wave = {"straight": 0.0, "wavy": 3.4, "curly": 0.0}[p["texture"]]

    def _rough(self, points: Points) -> Points:
        """The outline of straight hair is smooth, that of wavy hair swings, that of curly hair is frayed."""
        if self.p["texture"] == "curly":
            return points + self.rng.normal(0, 1.5, points.shape)
        if self.wave:
            step = np.cumsum(np.hypot(*np.diff(points, axis=0, prepend=points[:1]).T))
            return points + (self.wave * np.sin(step / 5.0))[:, None] * (1, 0.35)
        return points

    def _paint(self, canvas: _Canvas, shapes: Sequence[Points], curves: Points, part: str) -> None:
        canvas.fill(shapes, self.colour, part=part)
        light, dark = self.colour * 0.55 + 115, self.colour * 0.5
        canvas.strands(curves[::2], shapes, light, 0.55 if self.p["texture"] == "straight" else 0.42)
        canvas.strands(curves[1::2], shapes, dark, 0.7)

    def _curl(self, shapes: Sequence[Points], count: int) -> Points:
        """Small rings (count, 8, 2) all over: what curly hair shows in place of strands."""
        everything = np.concatenate(shapes)
        low, high = everything.min(0), everything.max(0)
        centres = low + (high - low) * self.rng.random((count, 1, 2))
        return centres + _circle(9)[:8] * self.rng.uniform(1.8, 3.4, (count, 1, 1))

    def _fall(self, left: float, right: float, top: float, bottom: float, count: int) -> Points:
        """Strands (count, 14, 2) that hang between x = left and x = right, in the face's frame."""
        y = np.linspace(top, bottom, 14)
        x = self.rng.uniform(min(left, right), max(left, right), (count, 1))
        bend = self.rng.normal(0, 0.02, (count, 1))
        swing = self.wave * 1.5 * np.sin((y - top) / 7.0 + 0.12 * x) if self.wave else bend * (y - top)
        return np.stack(np.broadcast_arrays(x + swing, y), 2)

    def behind(self, canvas: _Canvas) -> None:
        if self.none or self.short:
            return
        flare = 6 if self.wave else 2
        shape = self._rough(
            _closed(
                _mirrored(
                    _p(
                        (0, -70),
                        (38, -62),
                        (53 + self.volume * 0.4, -20),
                        (52 + flare, 30),
                        (50 + flare, self.end - 10),
                        (40, self.end),
                        (0, self.end - 4),
                    )
                )
            )
        )
        shapes = [self.at(shape, -6)]
        curves = self.at(
            np.concatenate(
                [self._fall(side * 30, side * (54 + flare), -20, self.end, 26) for side in (-1, 1)]
            ),
            -6,
        )
        if self.p["texture"] == "curly":
            curves = self._curl(shapes, 150)
        canvas.fill(shapes, self.colour * 0.8, part="hair")
        canvas.strands(curves[::2], shapes, self.colour * 0.7 + 60, 0.4)
        canvas.strands(curves[1::2], shapes, self.colour * 0.45, 0.7)

    def sides(self, canvas: _Canvas) -> None:
        """Locks beside the face; short hair ends at the ears."""
        if self.none:
            return
        outer = 50 + self.volume * 0.6
        shapes, falls = [], []
        for side in (-1, 1):
            end = self.end if not self.short else 6
            inner = 41.5 if self.short or self.p["tucked"] else 37.5
            lock = _p(
                (side * 36, -40),
                (side * outer, -38),
                (side * (outer + 1), 0),
                (side * (outer + (2 if not self.short else -6)), end),
                (side * (inner + 1), end + (2 if self.short else -6)),
                (side * inner, -4),
            )
            shapes.append(self.at(self._rough(_closed(lock)), -1))
            falls.append(self._fall(side * inner, side * outer, -34, end, 9 if self.short else 16))
        curves = self.at(np.concatenate(falls), -1)
        if self.p["texture"] == "curly":
            curves = self._curl(shapes, 60 if self.short else 130)
        self._paint(canvas, shapes, curves, "hair")

    def front(self, canvas: _Canvas) -> None:
        if self.none:
            return
        v = self.volume
        outer = _p(
            (-48 - 0.5 * v, -6),
            (-47 - 0.7 * v, -34),
            (-31 - 0.5 * v, -64 - 0.6 * v),
            (0, -70 - v),
            (31 + 0.5 * v, -64 - 0.6 * v),
            (47 + 0.7 * v, -34),
            (48 + 0.5 * v, -6),
        )
        if self.p["Receding_Hairline"]:
            inner = _p(
                (41, -8),
                (40, -34),
                (31, -55),
                (15, -60),
                (0, -53),
                (-15, -60),
                (-31, -55),
                (-40, -34),
                (-41, -8),
            )
        else:
            part = 9 * self.p["shape"][1]
            inner = _p(
                (41, -4),
                (38, -26),
                (30, -40),
                (12, -46),
                (part, -49),
                (-12, -45),
                (-30, -40),
                (-38, -26),
                (-41, -4),
            )
        top, line = _open(outer), _open(inner[::-1])
        edge = self._rough(np.vstack([top, line[::-1]]))
        shapes = [self.at(edge, 1)]
        # between the crown and the hairline, each at its own height, over a part of the way
        u = self.rng.uniform(0.05, 0.98, (56, 1))
        start, stop = np.sort(self.rng.uniform(0, 1, (2, 56, 1)), 0)
        along = start + (stop - start) * np.linspace(0, 1, 18)
        high, low = (curve[(along * (len(curve) - 1)).astype(int)] for curve in (top, line))
        strands = low + u[:, :, None] * (high - low)
        if self.wave:
            strands += (self.wave * 0.7 * np.sin(np.linspace(0, 18, 18) * (stop - start) + 6 * u))[:, :, None]
        curves = self.at(strands, 1)
        if self.p["texture"] == "curly":
            curves = self._curl(shapes, 170)
        self._paint(canvas, shapes, curves, "hair")
        if self.p["texture"] == "straight":  # it shines
            glow = _open(outer[1:-1] * (0.84, 0.93))
            canvas.line(self.at(glow, 1), self.colour * 0.5 + 127, 5, opacity=0.4, soft=2.2)
        if self.p["Bangs"]:
            count = 9
            xs = np.linspace(-36, 36, count)
            tips = -18 + self.rng.uniform(-3, 2, count) - 0.004 * xs**2
            points = [(-37, -44), (-18, -56), (0, -58), (18, -56), (37, -44)]
            for x, tip in zip(xs[::-1], tips, strict=True):
                points += [(x + 3.6, tip - 5), (x, tip), (x - 3.6, tip - 5)]
            fringe = np.array(points)
            shapes = [self.at(fringe, 3)]
            x, down = self.rng.uniform(-37, 37, (46, 1)), np.linspace(0, 1, 12)
            swing = self.wave * 0.4 * np.sin(6 * down)
            curves = self.at(
                np.stack(np.broadcast_arrays(x * (0.75 + 0.25 * down) + swing, -55 + 38 * down), 2), 3
            )
            if self.p["texture"] == "curly":
                curves = self._curl(shapes, 60)
            self._paint(canvas, shapes, curves, "bangs")


def _earrings(canvas: _Canvas, p: Params, at: _Pose) -> None:
    metal = _rgb(p["metal"])
    size = 1 + 0.35 * p["jewel"]
    for side in (-1, 1):
        x, y = side * (47.5 + p["shape"][0]), 20.0
        if p["frame_kind"] == "round":  # hoops
            ring = _ellipse(x, y + 8 * size, 6.5 * size, 8 * size)
            canvas.fill(at(ring, -2), metal * 0.55, part="earrings")
            canvas.fill(at((ring - (x, y + 8 * size)) * 0.82 + (x, y + 8 * size), -2), metal)
            canvas.fill(at((ring - (x, y + 8 * size)) * 0.55 + (x, y + 8 * size), -2), metal * 0.28)
        else:  # drops
            drop = _p(
                (x, y), (x + 3.6 * size, y + 9 * size), (x, y + 17 * size), (x - 3.6 * size, y + 9 * size)
            )
            canvas.fill(at(_closed(drop), -2), metal * 0.45, part="earrings")
            canvas.fill(at(_closed((drop - (x, y + 8 * size)) * 0.74 + (x, y + 8 * size)), -2), metal)
            canvas.fill(at(_ellipse(x, y + 10 * size, 1.9, 2.4, 10), -2), _rgb(p["accent"]) * 0.6 + 90)


def _hat(canvas: _Canvas, p: Params, at: _Pose, grain: np.ndarray) -> None:
    colour, band = _rgb(p["hat_colour"]), _rgb(p["accent"])
    kind = p["hat_kind"]
    if kind == "beanie":
        dome = _mirrored(_p((0, -98), (30, -90), (51, -62), (55, -36), (0, -42)))
        canvas.fill(at(_closed(dome), 1), colour, part="hat")
        for x in range(-44, 45, 11):
            canvas.line(
                at(_open(_p((x * 0.5, -94), (x * 0.9, -66), (x, -38))), 1), colour * 0.65, 2.6, opacity=0.8
            )
        fold = _closed(_mirrored(_p((0, -48), (40, -46), (56, -42), (55, -27), (38, -31), (0, -33))))
        canvas.fill(at(fold, 2), colour * 0.75 + 24, part="hat")
    elif kind == "cap":
        dome = _mirrored(_p((0, -94), (30, -86), (50, -58), (51, -34), (0, -38)))
        canvas.fill(at(_closed(dome), 1), colour, part="hat")
        canvas.line(at(_open(_p((0, -93), (4 * p["yaw"], -66), (0, -40))), 2), colour * 0.6, 2)
        visor = _closed(_mirrored(_p((0, -40), (30, -40), (47, -33), (33, -22), (0, -17))))
        canvas.fill(at(visor, 9), colour * 0.62, part="hat")
        canvas.line(
            at(_open(_p((-46, -33), (-28, -22), (0, -18), (28, -22), (46, -33))), 9), colour * 0.4 + 60, 1.8
        )
        canvas.fill(at(_ellipse(0, -60, 8, 8), 4), band)
    else:
        crown = _mirrored(_p((0, -96), (26, -98), (37, -82), (42, -44), (0, -40)))
        canvas.fill(at(_closed(crown), 1), colour, part="hat")
        canvas.fill(at(_p((-41.5, -54), (41.5, -54), (42.5, -43), (-42.5, -43)), 1), band, part="hat")
        brim = _closed(_mirrored(_p((0, -47), (42, -47), (72, -41), (60, -31), (28, -27), (0, -25))))
        canvas.fill(at(brim, 6), colour * 0.8, part="hat")
        canvas.line(at(_open(_p((-71, -41), (-58, -31), (0, -25), (58, -31), (71, -41))), 6), colour * 0.5, 2)
    # its shadow on the forehead
    canvas.fill(
        at(_ellipse(0, -24, 40, 8), 3),
        _rgb("#141414"),
        opacity=0.35,
        soft=3,
        only=("forehead", "skin", "bangs"),
    )
    woven = canvas.parts == 1 + PARTS.index("hat")
    canvas.image[:, woven] *= np.clip(1 + 0.06 * grain[0][woven], 0.8, 1.2)


def _glasses(canvas: _Canvas, p: Params, at: _Pose) -> None:
    colour = _rgb(p["frame_colour"])
    round_ = p["frame_kind"] == "round"
    keep = canvas.parts.copy()
    for side in (-1, 1):
        x = side * 19.8
        outer = (
            _ellipse(x, 1.5, 15.8, 14.2)
            if round_
            else _closed(
                _p(
                    (x - 15, -9.5),
                    (x, -11.5),
                    (x + 15, -9.5),
                    (x + 16.5, 0),
                    (x + 12, 12),
                    (x, 13.5),
                    (x - 12, 12),
                    (x - 16.5, 0),
                )
            )
        )
        lens = (outer - (x, 1)) * (0.84, 0.8) + (x, 1)
        inside = canvas.mask([at(lens, 9)])
        behind = canvas.image[:, inside[0][0], inside[0][1]].copy() if inside else None
        canvas.fill(at(outer, 9), colour, part="glasses")
        if inside is None or behind is None:
            continue
        window, alpha = inside
        if p["frame_kind"] == "dark":
            behind = behind * 0.12 + 14
        canvas.blend(window, alpha, behind * 0.96 + 8)
        canvas.line(
            at(_p((x - 8, 6), (x - 3, 0), (x + 3, -7)), 9), _rgb("#ffffff"), 2.2, opacity=0.5, soft=0.5
        )
    canvas.line(at(_open(_p((-6, -1), (0, -4), (6, -1))), 11), colour, 3.4, part="glasses")
    for side in (-1, 1):
        canvas.line(
            at(_p((side * 34, -4), (side * 40, -3.4), (side * 46, -2)), 1), colour, 3.2, part="glasses"
        )
    if p["frame_kind"] != "dark":  # what is seen through a clear lens is an eye or a brow still
        through = _among(("eyes", "brows"))[keep]
        frame = np.abs(canvas.image - colour[:, None, None]).sum(0) < 60
        back = through & ~frame
        canvas.parts[back] = keep[back]


def _light(image: np.ndarray, p: Params, rng: np.random.Generator) -> np.ndarray:
    """Light from one side, a cast of colour, blur, grain -> uint8."""
    x = np.linspace(-1, 1, SIZE[1], dtype=np.float32)
    y = np.linspace(-1, 1, SIZE[0], dtype=np.float32)[:, None]
    across, down, level = p["light"]
    image = image * (np.float32(level) * (1 + np.float32(across) * x + np.float32(down) * y))
    image *= np.array(p["cast"], np.float32)[:, None, None]
    image = _blurred(image, 3.2 if p["Blurry"] else 0.5)
    image += np.float32(p["noise"]) * _window(rng, *SIZE)
    return np.rint(image).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


# --- sets ---------------------------------------------------------------------------------------------------------------


def scenes(count: int, split: str, seed: int) -> list[Params]:
    """Parameters of the first `count` faces of a split; a larger count only adds faces.

    In the split "spurious" glasses and hats go together (`sample`). Raises ValueError for an unknown split.
    """
    if split not in COUNTS:
        raise ValueError(f"split must be one of {', '.join(COUNTS)}, not {split!r}")
    key, spurious = list(COUNTS).index(split), split == "spurious"
    return [sample(np.random.default_rng([seed, key, n]), spurious=spurious) for n in range(count)]


def draw_apart(faces: Sequence[tuple[Params, Sequence[str]]]) -> np.ndarray:
    """Many faces, each with what to remove from it: uint8 (n, 218, 178, 4), image and labels as :func:`draw` gives them.

    Drawn by a process of its own, since much of the work holds the interpreter's lock: call it from several threads.
    """
    drawn = drawn_by("studies.twins.faces", "faces", faces)
    return np.frombuffer(drawn, np.uint8).reshape(len(faces), *SIZE, 4)


def _main() -> None:
    cv2.setNumThreads(1)  # one process a core
    for line in sys.stdin:
        sys.stdout.buffer.write(np.dstack(draw(*json.loads(line))).tobytes())


if __name__ == "__main__":
    _main()
