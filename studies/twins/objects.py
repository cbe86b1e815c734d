"""synth-objects: composite objects over clutter, drawn from parameters, with a mask for every part.

After FunnyBirds (Hesse, Schaub-Meyer and Roth, ICCV 2023): the same scene can be drawn again with parts
removed, so that what a part does to a prediction is known, not guessed. Ten classes share parts (a bird and
a fish have a body, a tail and an eye), lone parts lie about as distractors, and colours say nothing of the
class: only the composition does. As in FunnyBirds some scenes lack a part: removing one is nothing new.
"""

import colorsys
import math
from collections.abc import Collection
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from studies.twins.sampling import between, chance
from studies.twins.shapes import Points, points

Parts = dict[str, list[Points]]  # outlines of every part, from back to front; objects lie in about -1..1
Params = dict[str, Any]  # plain numbers, strings and lists: goes through JSON unchanged

SIZE = 64
COUNTS = {"train": 4000, "val": 1000}
CLASSES = ("bird", "boat", "butterfly", "car", "cup", "fish", "house", "mushroom", "teapot", "tree")
_EDGE = 1 / 96  # width of the dark outline, as a fraction of the image
SCALE = 3  # drawn this many times larger, then averaged down
_AREA = (0.11, 0.22)  # fraction of the image that the object covers


def _turn(degrees: float) -> np.ndarray:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos, -sin], [sin, cos]])


def _box(x1: float, y1: float, x2: float, y2: float) -> Points:
    return points([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def _oval(
    x: float, y: float, rx: float, ry: float, turn: float = 0, start: float = 0, stop: float = 360
) -> Points:
    """An ellipse or its piece between two angles; degrees, clockwise from the right as y points down."""
    angles = np.radians(np.linspace(start, stop, 25))
    arc = np.stack([np.cos(angles), np.sin(angles)], 1) * (rx, ry)
    return (arc @ _turn(turn).T if turn else arc) + (x, y)


def _ring(x: float, y: float, rx: float, ry: float, width: float) -> Points:
    """Outer edge, then the inner edge backwards: one outline, with its seam on the left."""
    inner = _oval(x, y, rx - width, ry - width, 0, 180, 540)
    return np.concatenate([_oval(x, y, rx, ry, 0, 180, 540), inner[::-1]])


def _both(shape: Points) -> list[Points]:
    return [shape, shape * (-1, 1)]


def _bird(a: float, b: float) -> Parts:
    return {
        "tail": [points([(-0.4, 0), (-1.15, -0.38 - 0.1 * b), (-1.2, 0), (-1.05, 0.22), (-0.4, 0.3)])],
        "legs": [_box(x, 0.35, x + 0.09, 0.95) for x in (-0.12, 0.18)],
        "beak": [points([(0.78, -0.58), (1.3 + 0.1 * b, -0.36), (0.78, -0.24)])],
        "body": [_oval(0, 0.12, 0.68, 0.44 + 0.05 * a, -14)],
        "head": [_oval(0.58, -0.4, 0.34, 0.34)],
        "wing": [points("0.3,0.1 0.1,0.38 -0.35,0.36 -0.85,0.02 -0.35,-0.12 0.1,-0.14")],
        "eye": [_oval(0.66, -0.46, 0.1, 0.1)],
    }


def _boat(a: float, b: float) -> Parts:
    right = points([(0.1, -1), (0.1, 0.26), (0.86 + 0.06 * a, 0.26)])
    left = points([(-0.1, -0.75), (-0.1, 0.26), (-0.7 - 0.06 * b, 0.26)])
    return {
        "mast": [_box(-0.06, -1.15, 0.06, 0.45)],
        "flag": [points("-0.06,-1.3 -0.5,-1.14 -0.06,-0.98")],
        "sails": [right, left],
        "hull": [points("-1.05,0.36 1.1,0.36 0.74,0.88 -0.72,0.88")],
    }


def _butterfly(a: float, b: float) -> Parts:
    upper, lower = _oval(0.55, -0.4, 0.62, 0.42 + 0.05 * a, -38), _oval(0.42, 0.42, 0.46, 0.34 + 0.05 * b, 42)
    return {
        "antennae": _both(points("0,-0.6 0.26,-1.05 0.36,-1 0.08,-0.55")),
        "wings": _both(upper) + _both(lower),
        "spots": _both(_oval(0.62, -0.45, 0.19, 0.16)) + _both(_oval(0.46, 0.44, 0.14, 0.13)),
        "body": [_oval(0, 0.02, 0.13, 0.72)],
    }


def _car(a: float, b: float) -> Parts:
    top, wheel = -0.62 - 0.08 * a, 0.27 + 0.02 * b
    rear = points([(-0.52, -0.18), (-0.4, top + 0.1), (-0.08, top + 0.1), (-0.08, -0.18)])
    front = points([(0.06, -0.18), (0.06, top + 0.1), (0.3, top + 0.1), (0.5, -0.18)])
    return {
        "cabin": [points([(-0.78, -0.06), (-0.52, top), (0.36, top), (0.74, -0.06)])],
        "windows": [rear, front],
        "body": [points("-1.1,0 -1,-0.12 0.6,-0.12 1.05,0.02 1.12,0.42 -1.1,0.42")],
        "wheels": [_oval(x, 0.45, wheel, wheel) for x in (-0.62, 0.62)],
        "hubs": [_oval(x, 0.45, 0.1, 0.1) for x in (-0.62, 0.62)],
    }


def _cup(a: float, b: float) -> Parts:
    foot = 0.42 + 0.05 * a
    return {
        "handle": [_ring(0.66, -0.02, 0.44, 0.44 + 0.04 * b, 0.19)],
        "saucer": [_oval(0, 0.72, 0.98, 0.17)],
        "body": [points([(-0.68, -0.62), (0.68, -0.62), (foot, 0.66), (-foot, 0.66)])],
        "rim": [_oval(0, -0.62, 0.68, 0.17)],
    }


def _fish(a: float, b: float) -> Parts:
    height, fin = 0.5 + 0.06 * a + 0.42, 0.58 + 0.1 * b
    top, bottom = _oval(0.15, 0.42, 0.95, height, 0, 206, 334), _oval(0.15, -0.42, 0.95, height, 0, 26, 154)
    back = points([(-0.35, -0.3), (-0.1, -0.85 - 0.08 * b), (0.5, -0.35)])
    return {
        "tail": [points([(-0.5, 0), (-1.2, -fin), (-0.98, 0), (-1.2, fin)])],
        "fins": [back, points("-0.15,0.35 -0.2,0.8 0.3,0.4")],
        "body": [np.concatenate([top, bottom])],
        "stripes": [_box(x, -0.32, x + 0.14, 0.32) for x in (-0.3, 0.06)],
        "eye": [_oval(0.62, -0.1, 0.12, 0.12)],
    }


def _house(a: float, b: float) -> Parts:
    side = 0.72 + 0.08 * a
    return {
        "chimney": [_box(0.36, -0.92, 0.58, -0.4)],
        "body": [_box(-side, -0.3, side, 0.85)],
        "windows": [_box(-0.52, -0.05, -0.18, 0.28), _box(0.2, -0.05, 0.54, 0.28)],
        "door": [_box(-0.16, 0.36, 0.16, 0.85)],
        "roof": [points([(-side - 0.24, -0.24), (0, -0.98 - 0.08 * b), (side + 0.24, -0.24)])],
    }


def _mushroom(a: float, b: float) -> Parts:
    dome, brim = _oval(0, 0, 0.98, 0.88 + 0.08 * a, 0, 180, 360), _oval(0, 0, 0.98, 0.16, 0, 0, 180)
    foot = 0.34 + 0.04 * b
    spots = ((-0.5, -0.28, 0.16, 0.14), (0.05, -0.55, 0.19, 0.16), (0.54, -0.22, 0.15, 0.14))
    return {
        "stem": [points([(-0.22, 0), (0.22, 0), (foot, 0.92), (-foot, 0.92)])],
        "cap": [np.concatenate([dome, brim])],
        "spots": [_oval(*spot) for spot in spots],
    }


def _teapot(a: float, b: float) -> Parts:
    spout = "-0.45,0.5 -0.8,0.28 -0.92,-0.3 -1.24,-0.5 -0.98,-0.62 -0.68,-0.42 -0.45,0"
    return {
        "handle": [_ring(0.72, 0.08, 0.46, 0.46 + 0.04 * b, 0.19)],
        "spout": [points(spout)],
        "body": [_oval(0, 0.16, 0.7, 0.56 + 0.04 * a)],
        "lid": [_oval(0, -0.36, 0.44, 0.26, 0, 180, 360), _oval(0, -0.66, 0.12, 0.12)],
    }


def _tree(a: float, b: float) -> Parts:
    stem = [(-0.13, -0.2), (0.13, -0.2), (0.16 + 0.03 * b, 0.7), (0.36, 1), (-0.36, 1), (-0.16, 0.7)]
    leaves = [_oval(x, -0.25, 0.46, 0.42) for x in (-0.38, 0.38)]
    spots = ((-0.42, -0.22), (0.1, -0.7), (0.42, -0.28), (-0.05, -0.2))
    return {
        "stem": [points(stem)],
        "crown": [*leaves, _oval(0, -0.62 - 0.06 * a, 0.46, 0.44)],
        "spots": [_oval(x, y, 0.13, 0.13) for x, y in spots],
    }


# what draws the parts of each class, given two numbers in -1..1 that vary the proportions
_DRAWN_BY = (_bird, _boat, _butterfly, _car, _cup, _fish, _house, _mushroom, _teapot, _tree)
_DRAW = dict(zip(CLASSES, _DRAWN_BY, strict=True))
_TYPICAL = {name: outlines(0, 0) for name, outlines in _DRAW.items()}
PARTS = {name: tuple(parts) for name, parts in _TYPICAL.items()}

# what lies about alone: everything but what is too small to be seen for what it is
_TINY = ("eye", "hubs", "mast", "spots")
_LOOSE = [(name, part) for name in CLASSES for part in PARTS[name] if part not in _TINY]


@cache
def _area(name: str, part: str = "") -> float:
    """Area of a part, or of the whole object, in units of the object's own frame."""
    side, span = 256, 1.5
    image = Image.new("1", (side, side))
    for outline in _TYPICAL[name][part] if part else chain(*_TYPICAL[name].values()):
        corners = ((outline / span + 1) / 2 * side).ravel().tolist()
        ImageDraw.Draw(image).polygon(corners, fill=1)
    return float(np.asarray(image).mean() * (2 * span) ** 2)


def sample(class_index: int, rng: np.random.Generator) -> Params:
    """Parameters of one scene of a class: pose, proportions, colours, light, background and distractors.

    Lengths are fractions of the image side, angles are degrees. Raises ValueError for an unknown class.
    """
    if not 0 <= class_index < len(CLASSES):
        raise ValueError(f"class_index must be 0..{len(CLASSES) - 1}, not {class_index}")
    name = CLASSES[class_index]
    shape = [between(rng, -1, 1), between(rng, -1, 1)]
    # without a larger part, little would be left to recognise
    removable = [part for part in PARTS[name] if _area(name, part) < 0.3 * _area(name)]
    absent = [removable[int(rng.random() * len(removable))]] if chance(rng, 0.25) else []
    angle, flip = between(rng, -16, 16), chance(rng, 0.5)
    outline = np.concatenate(list(chain(*_DRAW[name](*shape).values())))
    outline = outline * (-1 if flip else 1, 1) @ _turn(angle).T
    low, high = outline.min(0), outline.max(0)
    scale = math.sqrt(between(rng, *_AREA) / _area(name))
    scale = round(min(scale, 0.94 / float((high - low).max())), 4)
    # anywhere in the image where the object fits, rather towards the borders: the centre is no good guess
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
            "stripes": 1 + int(6 * rng.random()) if chance(rng, 0.5) else 0,
            "stripe_angle": between(rng, 0, 180),
            "seed": int(rng.random() * 2**31),
        },
        "distractors": [_distractor(rng, ground) for _ in range(4 + int(5 * rng.random()))],
        "light": [between(rng, -0.25, 0.25), between(rng, -0.25, 0.25), between(rng, 0.85, 1.1)],
        "noise": between(rng, 2, 8),
    }


def _distractor(rng: np.random.Generator, ground: list[int]) -> Params:
    owner, part = _LOOSE[int(rng.random() * len(_LOOSE))]
    return {
        "class": owner,
        "part": part,
        "angle": between(rng, 0, 360),
        "scale": between(rng, 0.1, 0.24),
        "center": [between(rng, 0, 1), between(rng, 0, 1)],
        "colour": _unlike(rng, ground),
    }


def _colour(rng: np.random.Generator, s: tuple[float, float], v: tuple[float, float]) -> list[int]:
    rgb = colorsys.hsv_to_rgb(rng.random(), between(rng, *s), between(rng, *v))
    return [round(255 * channel) for channel in rgb]


def _near(rng: np.random.Generator, colour: list[int]) -> list[int]:
    return [min(255, max(0, channel + int(91 * rng.random()) - 45)) for channel in colour]


def _unlike(rng: np.random.Generator, ground: list[int]) -> list[int]:
    """A colour that stands out from the ground; chosen alike for every part, class and distractor."""
    while True:
        colour = _colour(rng, (0.1, 1.0), (0.15, 1.0))
        if sum(abs(mine - its) for mine, its in zip(colour, ground, strict=True)) > 150:
            return colour


def render(
    params: Params, removed: Collection[str] = (), size: int = SIZE
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw a scene, without the parts in `removed`: what lies behind them shows, nothing else changes.

    Returns the image, uint8 (size, size, 3), and the pixels that show each part, bool (size, size), without
    overlap. Raises ValueError for a part that the class does not have.
    """
    name = params["class"]
    if unknown := sorted(set(removed) - set(PARTS[name])):
        raise ValueError(f"a {name} has no part {unknown[0]!r}; it has {', '.join(PARTS[name])}")
    image, owners = draw(params, removed, size)
    gone = {*removed, *params["absent"]}
    return image, {part: owners == n for n, part in enumerate(PARTS[name], 1) if part not in gone}


def draw(params: Params, removed: Collection[str] = (), size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """The image, uint8 (size, size, 3), and the part that each pixel's centre shows, uint8 (size, size).

    A part counts as 1 + its index in `PARTS[class]`, so that 0 is off the object.
    """
    side = size * SCALE
    canvas = _background(params["background"], size).resize((side, side), Image.Resampling.NEAREST)
    owners = Image.new("L", (side, side), 0)
    paint, tag = ImageDraw.Draw(canvas), ImageDraw.Draw(owners)
    width = max(1, round(_EDGE * side))

    def put(shapes: list[Points], pose: Params, colour: list[int], owner: int) -> None:
        matrix = _turn(pose["angle"]) * (-1 if pose.get("flip") else 1, 1) * (pose["scale"] * side)
        x, y = pose["center"]
        edge = tuple(channel // 2 for channel in colour)
        for outline in shapes:
            corners = (outline @ matrix.T + (x * side, y * side)).ravel().tolist()
            paint.polygon(corners, fill=tuple(colour))
            paint.line(corners + corners[:2], fill=edge, width=width)
            if owner:
                tag.polygon(corners, fill=owner)
                tag.line(corners + corners[:2], fill=owner, width=width)

    for item in params["distractors"]:
        shapes = _TYPICAL[item["class"]][item["part"]]
        middle = np.concatenate(shapes).mean(0)
        put([outline - middle for outline in shapes], item, item["colour"], 0)
    for owner, (part, shapes) in enumerate(_DRAW[params["class"]](*params["shape"]).items(), 1):
        if part not in removed and part not in params["absent"]:
            put(shapes, params, params["colours"][part], owner)

    image = np.asarray(canvas.reduce(SCALE), np.float32)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    across, down, level = params["light"]
    light = (level + down * axis)[:, None] + across * axis
    noise = np.random.default_rng(params["background"]["seed"]).standard_normal(image.shape, np.float32)
    image = image * light[:, :, None] + params["noise"] * noise
    centres = owners.resize((size, size), Image.Resampling.NEAREST)  # nearest: the centre of the pixel
    return image.round().clip(0, 255).astype(np.uint8), np.asarray(centres)


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


def scenes(count: int, split: str, seed: int) -> list[Params]:
    """Parameters of the first `count` scenes of a split, classes in turn; a larger count only adds scenes."""
    if split not in COUNTS:
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")
    key = list(COUNTS).index(split)
    return [sample(n % len(CLASSES), np.random.default_rng([seed, key, n])) for n in range(count)]


def render_set(
    count: int, split: str, seed: int, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A split's images uint8 (N, 3, size, size), targets int64 (N,) and object masks bool (N, size, size)."""
    images = np.empty((count, 3, size, size), np.uint8)
    masks = np.empty((count, size, size), bool)
    bar = tqdm(scenes(count, split, seed), desc=f"render {split}", unit="image", leave=False)
    for row, params in enumerate(bar):
        image, owners = draw(params, (), size)
        images[row], masks[row] = image.transpose(2, 0, 1), owners > 0
    return images, np.arange(count) % len(CLASSES), masks
