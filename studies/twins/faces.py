"""synth-faces: parametric faces with CelebA's forty attributes, and a label for every pixel.

The twin of CelebA (Liu et al., ICCV 2015), after FunnyBirds (Hesse, Schaub-Meyer and Roth, ICCV 2023): a
face can be drawn again with a part removed, so that what a part does to a prediction is known, not guessed.
Size and landmarks are those of CelebA's aligned images, 178x218 with the eyes near (69, 111) and (108,
111). Attributes correlate roughly as in CelebA; rare ones are drawn more often, so that a few thousand
faces suffice to learn them. What lies on the wall behind a face looks like lips, glasses, ties and jewels
and says nothing. `Attractive` is a judgement, not a thing to draw: here it is a planted rule
(`ATTRACTIVE`), a known bias.
"""

import json
import sys
from collections.abc import Collection, Sequence

import cv2
import numpy as np

from studies.twins import face_drawing as drawing
from studies.twins.apart import drawn_by
from studies.twins.face_canvas import SIZE, Canvas, Face, blurred, noise, pose, rgb
from studies.twins.face_drawing import skin_tone
from studies.twins.face_hair import Hair, draw_beard, draw_brows, draw_mustache
from studies.twins.face_params import (  # noqa: F401  (names for those who import this module)
    ATTRACTIVE,
    ATTRIBUTES,
    NEUTRAL,
    PARTS,
    REGIONS,
    Params,
    attributes,
    sample,
    without,
)
from studies.twins.shapes import ellipse, points, smooth

COUNTS = {"train": 6000, "val": 1500, "test": 1500, "spurious": 6000}


def draw(params: Params, removed: Collection[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """A face without the parts in `removed` (see `without`); nothing else changes.

    A parameter "gap" opens the mouth by so many pixels and lowers the chin with it, for faces that speak.

    Returns the image, uint8 (218, 178, 3), and the part that each pixel shows, uint8 (218, 178): 1 + its
    index in `PARTS`, 0 for the background.
    """
    p = without(params, removed)
    rng = np.random.default_rng(p["seed"])
    face = Face(p, _wall(p, rng), skin_tone(p), noise(rng, *SIZE)[0])
    hair = Hair(face, np.random.default_rng([p["seed"], 1]))
    behind_ears = p["tucked"] or hair.short
    hair.behind()
    drawing.draw_body(face)
    if behind_ears:
        hair.sides()
    drawing.draw_skin(face)
    drawing.draw_age(face)
    draw_beard(face, *drawing.proportions(p))
    drawing.draw_eyes(face)
    drawing.draw_nose(face)
    drawing.draw_mouth(face)
    draw_mustache(face)
    hair.front()
    if not behind_ears:
        hair.sides()
    draw_brows(face)
    if p["Wearing_Earrings"]:
        drawing.draw_earrings(face)
    if p["Wearing_Hat"]:
        drawing.draw_hat(face)
    if p["Eyeglasses"]:
        drawing.draw_glasses(face)
    return _photographed(face.image, p, rng), face.parts


def render(params: Params, removed: Collection[str] = ()) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The image, uint8 (218, 178, 3), and the pixels that show each part: bool (218, 178), without overlap.

    Raises ValueError for a part that cannot be removed.
    """
    image, parts = draw(params, removed)
    return image, {PARTS[index - 1]: parts == index for index in np.unique(parts).tolist() if index}


def landmarks(params: Params) -> np.ndarray:
    """CelebA's five points, int64 (5, 2) as x, y: the eyes (left, right), the nose, the mouth's corners."""
    at = pose(params)
    wide, lift = drawing.smile(params)
    corners = [(-wide, 41 - lift), (wide, 41 - lift)]
    found = [at("-19.5,0 19.5,0", 4), at("0,22", 13), at(corners, 7)]
    return np.rint(np.concatenate(found)).astype(np.int64)


def _wall(p: Params, rng: np.random.Generator) -> np.ndarray:
    """The background: three colours that run into each other, and a few things that mean nothing."""
    colours = np.array(p["wall"], np.float32)
    mix = rng.random((4, 4, 3)).astype(np.float32) ** 2
    coarse = (mix / mix.sum(2, keepdims=True)) @ colours
    smooth_wall = cv2.resize(coarse, (SIZE[1], SIZE[0]), interpolation=cv2.INTER_CUBIC)
    canvas = Canvas(np.ascontiguousarray(smooth_wall.transpose(2, 0, 1)).clip(0, 255))
    for kind, x, y, size in p["things"]:
        centre = np.array([x * SIZE[1], y * SIZE[0] * 0.8])
        colour = 255 * rng.random((3, 1, 1)).astype(np.float32)
        if kind == "oval":
            canvas.paint([centre + ellipse(0, 0, 16 * size, 6 * size)], colour)
        elif kind == "rings":
            for side in drawing.SIDES:
                canvas.paint([centre + ellipse(side * 15 * size, 0, 11 * size, 10 * size)], colour)
                canvas.paint(
                    [centre + ellipse(side * 15 * size, 0, 8.5 * size, 7.5 * size)], rgb(p["wall"][0])
                )
        elif kind == "bar":
            canvas.paint([centre + points("-7,-34 7,-34 11,34 -11,34") * size], colour)
        elif kind == "dots":
            canvas.paint([centre + ellipse(6 * i - 15, (i % 2) * 3, 2.5, 2.5, 10) for i in range(6)], colour)
        else:
            canvas.paint([centre + smooth("-24,6 0,-14 24,6 0,-6") * size], colour)
    return blurred(canvas.image, 1.5) if p["seed"] % 3 else canvas.image  # a wall in focus is rare


def _photographed(image: np.ndarray, p: Params, rng: np.random.Generator) -> np.ndarray:
    """Light from one side, a cast of colour, blur, noise -> uint8 (H, W, 3)."""
    x = np.linspace(-1, 1, SIZE[1], dtype=np.float32)
    y = np.linspace(-1, 1, SIZE[0], dtype=np.float32)[:, None]
    across, down, level = (np.float32(strength) for strength in p["light"])
    image = image * (level * (1 + across * x + down * y))
    image *= rgb(p["cast"])
    image = blurred(image, 3.2 if p["Blurry"] else 0.5)
    image += np.float32(p["noise"]) * noise(rng, *SIZE)
    return np.rint(image).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def scenes(count: int, split: str, seed: int) -> list[Params]:
    """Parameters of the first `count` faces of a split; a larger count only adds faces.

    In the split "spurious" glasses and hats go together (`sample`). Raises ValueError for an unknown split.
    """
    if split not in COUNTS:
        raise ValueError(f"split must be one of {', '.join(COUNTS)}, not {split!r}")
    key, spurious = list(COUNTS).index(split), split == "spurious"
    return [sample(np.random.default_rng([seed, key, n]), spurious=spurious) for n in range(count)]


def draw_apart(faces: Sequence[tuple[Params, Sequence[str]]]) -> np.ndarray:
    """Many faces, each with what to remove from it: uint8 (n, 218, 178, 4), image and labels as from `draw`.

    Drawn by a process of its own, as the work holds the interpreter's lock: call it from several threads.
    """
    drawn = drawn_by("studies.twins.faces", "faces", faces)
    return np.frombuffer(drawn, np.uint8).reshape(len(faces), *SIZE, 4)


def _main() -> None:
    cv2.setNumThreads(1)  # one process a core
    for line in sys.stdin:
        sys.stdout.buffer.write(np.dstack(draw(*json.loads(line))).tobytes())


if __name__ == "__main__":
    _main()
