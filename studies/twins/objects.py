"""synth-objects: composite objects over clutter, drawn from parameters, with a mask for every part.

After FunnyBirds (Hesse, Schaub-Meyer and Roth, ICCV 2023): the same scene can be drawn again with parts removed, so
that what a part does to a prediction is known, not guessed. Ten classes share parts (a bird and a fish have a body, a
tail and an eye; a house and a car have windows), lone parts lie about as distractors, and colours say nothing of the
class: only the composition does. As in FunnyBirds some scenes lack a part, so that a removed part is nothing new
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

Points = np.ndarray  # (N, 2) float, x to the right, y down; objects lie in about -1..1
Part = tuple[str, list[Points]]  # name, outlines to fill
Params = dict[str, Any]  # plain numbers, strings and lists: goes through JSON unchanged

SIZE = 64
COUNTS = {"train": 4000, "val": 1000}
CLASSES = ("bird", "boat", "butterfly", "car", "cup", "fish", "house", "mushroom", "teapot", "tree")
EDGE = 1 / 96  # width of the dark outline, as a fraction of the image
SCALE = 3  # drawn this many times larger, then averaged down
AREA = (0.11, 0.22)  # fraction of the image that the object covers
MISSING = 0.25  # share of scenes that lack one part


# --- outlines ---------------------------------------------------------------------------------------------------------


def _poly(*corners: tuple[float, float]) -> Points:
    return np.array(corners, float)


def _box(x1: float, y1: float, x2: float, y2: float) -> Points:
    return _poly((x1, y1), (x2, y1), (x2, y2), (x1, y2))


@cache
def _arc(start: float, stop: float) -> Points:
    angles = np.radians(np.linspace(start, stop, 25))
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _oval(
    x: float, y: float, rx: float, ry: float, turn: float = 0.0, start: float = 0.0, stop: float = 360.0
) -> Points:
    """An ellipse, or the piece of it between two angles; degrees, clockwise from the right as y points down."""
    points = _arc(start, stop) * (rx, ry)
    return (points @ _turn(turn).T if turn else points) + (x, y)


def _ring(x: float, y: float, rx: float, ry: float, width: float) -> Points:
    """Outer edge, then the inner edge backwards: one outline, with its seam on the left."""
    inner = _oval(x, y, rx - width, ry - width, 0, 180, 540)
    return np.concatenate([_oval(x, y, rx, ry, 0, 180, 540), inner[::-1]])


def _turn(degrees: float) -> np.ndarray:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, -sin], [sin, cos]])


# --- the classes: parts from back to front; a and b in -1..1 vary the proportions -------------------------------------


def _bird(a: float, b: float) -> list[Part]:
    legs = [_box(x, 0.35, x + 0.09, 0.95) for x in (-0.12, 0.18)]
    return [
        ("tail", [_poly((-0.4, 0.0), (-1.15, -0.38 - 0.1 * b), (-1.2, 0.0), (-1.05, 0.22), (-0.4, 0.3))]),
        ("legs", legs),
        ("beak", [_poly((0.78, -0.58), (1.3 + 0.1 * b, -0.36), (0.78, -0.24))]),
        ("body", [_oval(0.0, 0.12, 0.68, 0.44 + 0.05 * a, -14)]),
        ("head", [_oval(0.58, -0.4, 0.34, 0.34)]),
        (
            "wing",
            [_poly((0.3, 0.1), (0.1, 0.38), (-0.35, 0.36), (-0.85, 0.02), (-0.35, -0.12), (0.1, -0.14))],
        ),
        ("eye", [_oval(0.66, -0.46, 0.1, 0.1)]),
    ]


def _fish(a: float, b: float) -> list[Part]:
    height = 0.5 + 0.06 * a
    top = _oval(0.15, 0.42, 0.95, height + 0.42, 0, 206, 334)
    bottom = _oval(0.15, -0.42, 0.95, height + 0.42, 0, 26, 154)
    fins = [
        _poly((-0.35, -0.3), (-0.1, -0.85 - 0.08 * b), (0.5, -0.35)),
        _poly((-0.15, 0.35), (-0.2, 0.8), (0.3, 0.4)),
    ]
    return [
        ("tail", [_poly((-0.5, 0.0), (-1.2, -0.58 - 0.1 * b), (-0.98, 0.0), (-1.2, 0.58 + 0.1 * b))]),
        ("fins", fins),
        ("body", [np.concatenate([top, bottom])]),
        ("stripes", [_box(x, -0.32, x + 0.14, 0.32) for x in (-0.3, 0.06)]),
        ("eye", [_oval(0.62, -0.1, 0.12, 0.12)]),
    ]


def _butterfly(a: float, b: float) -> list[Part]:
    def both(shape: Points) -> list[Points]:
        return [shape, shape * (-1, 1)]

    wings = both(_oval(0.55, -0.4, 0.62, 0.42 + 0.05 * a, -38)) + both(
        _oval(0.42, 0.42, 0.46, 0.34 + 0.05 * b, 42)
    )
    antennae = both(_poly((0.0, -0.6), (0.26, -1.05), (0.36, -1.0), (0.08, -0.55)))
    return [
        ("antennae", antennae),
        ("wings", wings),
        ("spots", both(_oval(0.62, -0.45, 0.19, 0.16)) + both(_oval(0.46, 0.44, 0.14, 0.13))),
        ("body", [_oval(0.0, 0.02, 0.13, 0.72)]),
    ]


def _car(a: float, b: float) -> list[Part]:
    body = _poly((-1.1, 0.0), (-1.0, -0.12), (0.6, -0.12), (1.05, 0.02), (1.12, 0.42), (-1.1, 0.42))
    top = -0.62 - 0.08 * a
    windows = [
        _poly((-0.52, -0.18), (-0.4, top + 0.1), (-0.08, top + 0.1), (-0.08, -0.18)),
        _poly((0.06, -0.18), (0.06, top + 0.1), (0.3, top + 0.1), (0.5, -0.18)),
    ]
    wheels = [_oval(x, 0.45, 0.27 + 0.02 * b, 0.27 + 0.02 * b) for x in (-0.62, 0.62)]
    return [
        ("cabin", [_poly((-0.78, -0.06), (-0.52, top), (0.36, top), (0.74, -0.06))]),
        ("windows", windows),
        ("body", [body]),
        ("wheels", wheels),
        ("hubs", [_oval(x, 0.45, 0.1, 0.1) for x in (-0.62, 0.62)]),
    ]


def _house(a: float, b: float) -> list[Part]:
    side = 0.72 + 0.08 * a
    peak = -0.98 - 0.08 * b
    return [
        ("chimney", [_box(0.36, -0.92, 0.58, -0.4)]),
        ("body", [_box(-side, -0.3, side, 0.85)]),
        ("windows", [_box(-0.52, -0.05, -0.18, 0.28), _box(0.2, -0.05, 0.54, 0.28)]),
        ("door", [_box(-0.16, 0.36, 0.16, 0.85)]),
        ("roof", [_poly((-side - 0.24, -0.24), (0.0, peak), (side + 0.24, -0.24))]),
    ]


def _boat(a: float, b: float) -> list[Part]:
    sails = [
        _poly((0.1, -1.0), (0.1, 0.26), (0.86 + 0.06 * a, 0.26)),
        _poly((-0.1, -0.75), (-0.1, 0.26), (-0.7 - 0.06 * b, 0.26)),
    ]
    return [
        ("mast", [_box(-0.06, -1.15, 0.06, 0.45)]),
        ("flag", [_poly((-0.06, -1.3), (-0.5, -1.14), (-0.06, -0.98))]),
        ("sails", sails),
        ("hull", [_poly((-1.05, 0.36), (1.1, 0.36), (0.74, 0.88), (-0.72, 0.88))]),
    ]


def _tree(a: float, b: float) -> list[Part]:
    crown = [
        _oval(-0.38, -0.25, 0.46, 0.42),
        _oval(0.38, -0.25, 0.46, 0.42),
        _oval(0.0, -0.62 - 0.06 * a, 0.46, 0.44),
    ]
    spots = [_oval(x, y, 0.13, 0.13) for x, y in ((-0.42, -0.22), (0.1, -0.7), (0.42, -0.28), (-0.05, -0.2))]
    return [
        (
            "stem",
            [
                _poly(
                    (-0.13, -0.2),
                    (0.13, -0.2),
                    (0.16 + 0.03 * b, 0.7),
                    (0.36, 1.0),
                    (-0.36, 1.0),
                    (-0.16, 0.7),
                )
            ],
        ),
        ("crown", crown),
        ("spots", spots),
    ]


def _mushroom(a: float, b: float) -> list[Part]:
    cap = np.concatenate(
        [_oval(0.0, 0.0, 0.98, 0.88 + 0.08 * a, 0, 180, 360), _oval(0.0, 0.0, 0.98, 0.16, 0, 0, 180)]
    )
    spots = [_oval(-0.5, -0.28, 0.16, 0.14), _oval(0.05, -0.55, 0.19, 0.16), _oval(0.54, -0.22, 0.15, 0.14)]
    return [
        ("stem", [_poly((-0.22, 0.0), (0.22, 0.0), (0.34 + 0.04 * b, 0.92), (-0.34 - 0.04 * b, 0.92))]),
        ("cap", [cap]),
        ("spots", spots),
    ]


def _cup(a: float, b: float) -> list[Part]:
    foot = 0.42 + 0.05 * a
    return [
        ("handle", [_ring(0.66, -0.02, 0.44, 0.44 + 0.04 * b, 0.19)]),
        ("saucer", [_oval(0.0, 0.72, 0.98, 0.17)]),
        ("body", [_poly((-0.68, -0.62), (0.68, -0.62), (foot, 0.66), (-foot, 0.66))]),
        ("rim", [_oval(0.0, -0.62, 0.68, 0.17)]),
    ]


def _teapot(a: float, b: float) -> list[Part]:
    spout = _poly(
        (-0.45, 0.5), (-0.8, 0.28), (-0.92, -0.3), (-1.24, -0.5), (-0.98, -0.62), (-0.68, -0.42), (-0.45, 0.0)
    )
    lid = _oval(0.0, -0.36, 0.44, 0.26, 0, 180, 360)
    return [
        ("handle", [_ring(0.72, 0.08, 0.46, 0.46 + 0.04 * b, 0.19)]),
        ("spout", [spout]),
        ("body", [_oval(0.0, 0.16, 0.7, 0.56 + 0.04 * a)]),
        ("lid", [lid, _oval(0.0, -0.66, 0.12, 0.12)]),
    ]


_DRAW: dict[str, Callable[[float, float], list[Part]]] = {
    "bird": _bird,
    "boat": _boat,
    "butterfly": _butterfly,
    "car": _car,
    "cup": _cup,
    "fish": _fish,
    "house": _house,
    "mushroom": _mushroom,
    "teapot": _teapot,
    "tree": _tree,
}
_TYPICAL = {name: dict(outlines(0.0, 0.0)) for name, outlines in _DRAW.items()}
PARTS = {name: tuple(parts) for name, parts in _TYPICAL.items()}

# what lies about alone: everything but what is too small to be seen for what it is
_LOOSE = [
    (name, part) for name in CLASSES for part in PARTS[name] if part not in ("eye", "hubs", "mast", "spots")
]


# --- parameters -------------------------------------------------------------------------------------------------------


def sample(class_index: int, rng: np.random.Generator) -> Params:
    """Parameters of one scene of a class: pose, proportions, colours, light, background and distractors.

    Lengths are fractions of the image side, angles degrees, colours 0..255. Raises ValueError for an unknown class.
    """
    if not 0 <= class_index < len(CLASSES):
        raise ValueError(f"class_index must be 0..{len(CLASSES) - 1}, not {class_index}")
    name = CLASSES[class_index]
    shape = [_between(rng, -1, 1), _between(rng, -1, 1)]
    removable = _removable(name)
    absent = [removable[int(rng.random() * len(removable))]] if rng.random() < MISSING else []
    angle, flip = _between(rng, -16, 16), rng.random() < 0.5
    outline = np.concatenate([points for _, shapes in _DRAW[name](*shape) for points in shapes])
    outline = outline * (-1 if flip else 1, 1) @ _turn(angle).T
    low, high = outline.min(0), outline.max(0)
    scale = math.sqrt(_between(rng, *AREA) / _areas(name)[""])
    scale = round(min(scale, 0.94 / float((high - low).max())), 4)
    # anywhere in the image where the whole object fits, rather towards the borders: the centre must not be a good guess
    corner = 0.02 + (0.96 - scale * (high - low)) * rng.beta(0.3, 0.3, 2)
    ground = _colour(rng, (0.08, 0.5), (0.25, 0.9))
    return {
        "class": name,
        "shape": shape,
        "absent": absent,
        "angle": angle,
        "flip": flip,
        "scale": scale,
        "center": (corner - scale * low).round(4).tolist(),
        "colours": {part: _unlike(rng, ground) for part in PARTS[name]},
        "background": {
            "colours": [ground, _near(rng, ground), _near(rng, ground)],
            "stripes": 1 + int(6 * rng.random()) if rng.random() < 0.5 else 0,
            "stripe_angle": _between(rng, 0, 180),
            "seed": int(rng.random() * 2**31),
        },
        "distractors": [_distractor(rng, ground) for _ in range(4 + int(5 * rng.random()))],
        "light": [_between(rng, -0.25, 0.25), _between(rng, -0.25, 0.25), _between(rng, 0.85, 1.1)],
        "noise": _between(rng, 2, 8),
    }


def _distractor(rng: np.random.Generator, ground: list[int]) -> Params:
    owner, part = _LOOSE[int(rng.random() * len(_LOOSE))]
    return {
        "class": owner,
        "part": part,
        "angle": _between(rng, 0, 360),
        "scale": _between(rng, 0.1, 0.24),
        "center": [_between(rng, 0, 1), _between(rng, 0, 1)],
        "colour": _unlike(rng, ground),
    }


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return round(low + (high - low) * rng.random(), 4)


def _colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> list[int]:
    rgb = colorsys.hsv_to_rgb(rng.random(), _between(rng, *saturation), _between(rng, *value))
    return [round(255 * channel) for channel in rgb]


def _near(rng: np.random.Generator, colour: list[int]) -> list[int]:
    return [min(255, max(0, channel + int(91 * rng.random()) - 45)) for channel in colour]


def _unlike(rng: np.random.Generator, ground: list[int]) -> list[int]:
    """A colour that stands out from the ground; drawn in the same way for every part, class and distractor."""
    while True:
        colour = _colour(rng, (0.1, 1.0), (0.15, 1.0))
        if sum(abs(mine - its) for mine, its in zip(colour, ground, strict=True)) > 150:
            return colour


# --- drawing ----------------------------------------------------------------------------------------------------------


def render(
    params: Params, removed: Collection[str] = (), size: int = SIZE
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw a scene, without the parts in `removed`: what lies behind them shows, nothing else changes.

    Returns the image, uint8 (size, size, 3), and for every part that is drawn its visible pixels, bool (size, size);
    the masks do not overlap. Raises ValueError for a part that the class does not have.
    """
    name = params["class"]
    if unknown := sorted(set(removed) - set(PARTS[name])):
        raise ValueError(f"a {name} has no part {unknown[0]!r}; it has {', '.join(PARTS[name])}")
    image, owners = draw(params, removed, size)
    here = [part for part in PARTS[name] if part not in removed and part not in params["absent"]]
    return image, {part: owners == 1 + PARTS[name].index(part) for part in here}


def draw(params: Params, removed: Collection[str] = (), size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """The image, uint8 (size, size, 3), and the part that each pixel's centre shows, uint8 (size, size).

    A part counts as 1 + its index in `PARTS[class]`, so that 0 is off the object.
    """
    side = size * SCALE
    canvas = _background(params["background"], size).resize((side, side), Image.Resampling.NEAREST)
    edge_width = max(1, round(EDGE * side))
    owners = Image.new("L", (side, side), 0)
    paint, tag = ImageDraw.Draw(canvas), ImageDraw.Draw(owners)

    def put(shapes: list[Points], pose: Params, colour: list[int], owner: int) -> None:
        matrix = _turn(pose["angle"]) * (-1 if pose.get("flip") else 1, 1) * (pose["scale"] * side)
        x, y = pose["center"]
        edge = tuple(channel // 2 for channel in colour)
        for points in shapes:
            corners = (points @ matrix.T + (x * side, y * side)).ravel().tolist()
            paint.polygon(corners, fill=tuple(colour))
            paint.line(corners + corners[:2], fill=edge, width=edge_width)
            if owner:
                tag.polygon(corners, fill=owner)
                tag.line(corners + corners[:2], fill=owner, width=edge_width)

    for item in params["distractors"]:
        shapes = _TYPICAL[item["class"]][item["part"]]
        middle = np.concatenate(shapes).mean(0)
        put([points - middle for points in shapes], item, item["colour"], 0)
    for owner, (part, shapes) in enumerate(_DRAW[params["class"]](*params["shape"]), 1):
        if part not in removed and part not in params["absent"]:
            put(shapes, params, params["colours"][part], owner)

    image = np.asarray(canvas.reduce(SCALE), np.float32)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    across, down, level = params["light"]
    light = (level + down * axis)[:, None] + across * axis
    noise = np.random.default_rng(params["background"]["seed"]).standard_normal(image.shape, np.float32)
    image = image * light[:, :, None] + params["noise"] * noise
    pixels = image.round().clip(0, 255).astype(np.uint8)
    return pixels, np.asarray(
        owners.resize((size, size), Image.Resampling.NEAREST)
    )  # nearest: the centre of the pixel


def _background(spec: Params, size: int) -> Image.Image:
    """Soft blotches of three colours and, in half of the scenes, stripes: (size, size)."""
    rng = np.random.default_rng(spec["seed"])
    colours = np.array(spec["colours"], np.float32)
    blotches = np.zeros((size, size, 3), np.float32)
    for cells, weight in ((4, 0.6), (11, 0.4)):
        mix = rng.random((cells, cells, 3), np.float32) ** 3  # mostly one of the three
        mix /= mix.sum(2, keepdims=True)
        coarse = Image.fromarray((mix @ colours).astype(np.uint8))
        blotches += weight * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    if spec["stripes"]:
        axis = np.linspace(-1, 1, size, dtype=np.float32)
        cos, sin = _turn(spec["stripe_angle"])[:, 0]
        wave = np.sin(math.pi * spec["stripes"] * (cos * axis[None, :] + sin * axis[:, None]))
        blotches += 22 * wave[:, :, None]
    return Image.fromarray(blotches.clip(0, 255).astype(np.uint8))


@cache
def _areas(name: str) -> dict[str, float]:
    """Area of every part alone and, under "", of the whole object, in units of the object's own frame."""
    side, span = 256, 1.5
    whole = Image.new("1", (side, side))
    areas = {}
    for part, shapes in _TYPICAL[name].items():
        alone = Image.new("1", (side, side))
        for points in shapes:
            corners = ((points / span + 1) / 2 * side).ravel().tolist()
            ImageDraw.Draw(alone).polygon(corners, fill=1)
            ImageDraw.Draw(whole).polygon(corners, fill=1)
        areas[part] = float(np.asarray(alone).mean() * (2 * span) ** 2)
    return {**areas, "": float(np.asarray(whole).mean() * (2 * span) ** 2)}


@cache
def _removable(name: str) -> list[str]:
    """The smaller parts: without a larger one, little would be left to recognise."""
    areas = _areas(name)
    return [part for part in PARTS[name] if areas[part] < 0.3 * areas[""]]


# --- sets -------------------------------------------------------------------------------------------------------------


def scenes(count: int, split: str, seed: int) -> list[Params]:
    """Parameters of the first `count` scenes of a split; classes take turns, and a larger count only adds scenes."""
    if split not in COUNTS:
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")
    key = list(COUNTS).index(split)
    return [sample(n % len(CLASSES), np.random.default_rng([seed, key, n])) for n in range(count)]


def render_set(
    count: int, split: str, seed: int, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 (N, 3, size, size), targets int64 (N,) and object masks bool (N, size, size) of a split's scenes."""
    images = np.empty((count, 3, size, size), np.uint8)
    masks = np.empty((count, size, size), bool)
    for row, params in enumerate(
        tqdm(scenes(count, split, seed), desc=f"render {split}", unit="image", leave=False)
    ):
        image, owners = draw(params, (), size)
        images[row], masks[row] = image.transpose(2, 0, 1), owners > 0
    return images, np.arange(count) % len(CLASSES), masks
