"""What grows on a rendered face: hair, beard and brows."""

import numpy as np

from studies.twins.face_canvas import Face, rgb
from studies.twins.shapes import Points, across, both, curve, ellipse, points, smooth, symmetric

_COLOURS = {"black": "#1c1715", "brown": "#5e3a1f", "blond": "#d9b162", "gray": "#a3a5a8", "red": "#a4461d"}


def _colour(face: Face) -> np.ndarray:
    return rgb(_COLOURS[face.p["hair"]])


class Hair:
    """Hair in three layers: behind the neck, at the sides of the face, and over the forehead."""

    def __init__(self, face: Face, rng: np.random.Generator) -> None:
        p = face.p
        self.face, self.p, self.rng, self.colour = face, p, rng, _colour(face)
        self.none, self.short, self.curly = p["Bald"], p["length"] == "short", p["texture"] == "curly"
        self.volume = 5 + 3 * p["shape"][5] + (5 if self.curly else 0) + (0 if p["Male"] else 2)
        self.end = {"short": 4.0, "middle": 58.0, "long": 102.0}[p["length"]]
        self.wave = 3.4 if p["texture"] == "wavy" else 0.0

    def behind(self) -> None:
        """What hangs behind the neck."""
        if self.none or self.short:
            return
        flare = 6 if self.wave else 2
        head = [(0, -70), (38, -62), (53 + self.volume * 0.4, -20), (52 + flare, 30)]
        tips = [(50 + flare, self.end - 10), (40, self.end), (0, self.end - 4)]
        shape = self._rough(symmetric([*head, *tips]))
        falls = [self._fall(side * 30, side * (54 + flare), -20, self.end, 26) for side in (-1, 1)]
        self._paint([shape], np.concatenate(falls), -6, "hair", curls=150, dim=True)

    def sides(self) -> None:
        """Locks beside the face; short hair ends at the ears."""
        if self.none:
            return
        outer = 50 + self.volume * 0.6
        inner = 41.5 if self.short or self.p["tucked"] else 37.5
        end = 6 if self.short else self.end
        tip = (outer - 6, end + 2) if self.short else (outer + 2, end - 6)
        lock = [(36, -40), (outer, -38), (outer + 1, 0), (tip[0], end), (inner + 1, tip[1]), (inner, -4)]
        shapes, falls = [], []
        for side, outline in zip((-1, 1), both(lock), strict=True):
            shapes.append(self._rough(smooth(outline)))
            falls.append(self._fall(side * inner, side * outer, -34, end, 9 if self.short else 16))
        self._paint(shapes, np.concatenate(falls), -1, "hair", curls=60 if self.short else 130)

    def front(self) -> None:
        """From the crown to the hairline, and the bangs."""
        if self.none:
            return
        v, rng = self.volume, self.rng
        crown = across([(0, -70 - v), (31 + 0.5 * v, -64 - 0.6 * v), (47 + 0.7 * v, -34), (48 + 0.5 * v, -6)])
        hairline = across("0,-53 15,-60 31,-55 40,-34 41,-8")
        if not self.p["Receding_Hairline"]:
            hairline = points("-41,-4 -38,-26 -30,-40 -12,-45 0,-49 12,-46 30,-40 38,-26 41,-4")
            hairline[4, 0] = 9 * self.p["shape"][1]  # the parting
        top, line = curve(crown), curve(hairline)
        shape = self._rough(np.vstack([top, line[::-1]]))
        # strands along the head, each at its own height, over a part of the way
        height = rng.uniform(0.05, 0.98, (56, 1))
        start, stop = np.sort(rng.uniform(0, 1, (2, 56, 1)), 0)
        along = start + (stop - start) * np.linspace(0, 1, 18)
        high, low = (way[(along * (len(way) - 1)).astype(int)] for way in (top, line))
        strands = low + height[:, :, None] * (high - low)
        swing = self.wave * 0.7 * np.sin(np.linspace(0, 18, 18) * (stop - start) + 6 * height)
        self._paint([shape], strands + swing[:, :, None], 1, "hair", curls=170)
        if self.p["texture"] == "straight":  # it shines
            glow = curve(crown[1:-1] * (0.84, 0.93))
            self.face.line(glow, 1, self.colour * 0.5 + 127, 5, opacity=0.4, soft=2.2)
        if self.p["Bangs"]:
            self._bangs()

    def _bangs(self) -> None:
        xs = np.linspace(-36, 36, 9)
        tips = -18 + self.rng.uniform(-3, 2, 9) - 0.004 * xs**2
        fringe = [(-37, -44), (-18, -56), (0, -58), (18, -56), (37, -44)]
        for x, tip in zip(xs[::-1], tips, strict=True):
            fringe += [(x + 3.6, tip - 5), (x, tip), (x - 3.6, tip - 5)]
        x, down = self.rng.uniform(-37, 37, (46, 1)), np.linspace(0, 1, 12)
        swing = self.wave * 0.4 * np.sin(6 * down)
        strands = np.stack(np.broadcast_arrays(x * (0.75 + 0.25 * down) + swing, -55 + 38 * down), 2)
        self._paint([points(fringe)], strands, 3, "bangs", curls=60)

    def _rough(self, outline: Points) -> Points:
        """The outline of straight hair is smooth, that of wavy hair swings, that of curly hair is frayed."""
        if self.curly:
            return outline + self.rng.normal(0, 1.5, outline.shape)
        step = np.cumsum(np.hypot(*np.diff(outline, axis=0, prepend=outline[:1]).T))
        return outline + (self.wave * np.sin(step / 5.0))[:, None] * (1, 0.35)

    def _fall(self, left: float, right: float, top: float, bottom: float, count: int) -> Points:
        """Strands (count, 14, 2) that hang between x = left and x = right."""
        y = np.linspace(top, bottom, 14)
        x = self.rng.uniform(min(left, right), max(left, right), (count, 1))
        bend = self.rng.normal(0, 0.02, (count, 1))
        swing = self.wave * 1.5 * np.sin((y - top) / 7.0 + 0.12 * x) if self.wave else bend * (y - top)
        return np.stack(np.broadcast_arrays(x + swing, y), 2)

    def _paint(
        self, shapes: list[Points], strands: Points, depth: float, part: str, curls: int, dim: bool = False
    ) -> None:
        """Paint the shapes, and on them light and dark strands or, in curly hair, so many small rings."""
        outlines, lines = [self.face.at(shape, depth) for shape in shapes], self.face.at(strands, depth)
        if self.curly:
            everything = np.concatenate(outlines)
            low, high = everything.min(0), everything.max(0)
            centres = low + (high - low) * self.rng.random((curls, 1, 2))
            lines = centres + ellipse(0, 0, 1, 1, 9)[:8] * self.rng.uniform(1.8, 3.4, (curls, 1, 1))
        colour, light, dark = self.colour, self.colour * 0.55 + 115, self.colour * 0.5
        light_opacity = 0.55 if self.p["texture"] == "straight" else 0.42
        if dim:
            colour, light, dark, light_opacity = colour * 0.8, colour * 0.7 + 60, colour * 0.45, 0.4
        self.face.paint(outlines, colour, part=part)
        self.face.strands(lines[::2], outlines, light, light_opacity)
        self.face.strands(lines[1::2], outlines, dark, 0.7)


def draw_beard(face: Face, wide: float, chin: float) -> None:
    """All but the mustache, which lies over the lips. wide, chin: see `face_drawing.proportions`."""
    p, grain = face.p, face.grain
    colour = _colour(face) * 0.9
    if p["5_o_Clock_Shadow"]:
        jaw = [(40 + wide, 22), (42 + wide, 34), (38 + wide, 44), (24 + 0.4 * wide, 61), (0, chin + 1)]
        zone, bare = symmetric([(0, 26), (12, 29), (24, 34), *jaw]), "skin chin cheeks"
        face.fill(zone, 2, rgb("#2c3038"), opacity=0.5, soft=1.6, grain=grain, only=bare)
        face.fill(zone, 2, part="stubble", only=bare)
    if p["Sideburns"]:
        x = 42.5 + 0.8 * wide
        for strip in both([(x, -14), (x - 9, -10), (x - 10, 14), (x - 11, 31), (x - 2, 33), (x + 2, 10)]):
            face.fill(smooth(strip), 0, colour, part="sideburns", grain=grain, soft=0.8)
        if p["full"]:  # the jaw joins them
            inner = [(0, 60), (14, 52), (26, 38), (34 + wide, 22)]
            outer = [(42 + 0.9 * wide, 20), (39 + wide, 42), (25 + 0.4 * wide, 62), (0, chin + 3)]
            jaw_beard = symmetric([*inner, *outer])
            face.fill(jaw_beard, 2, colour, part="sideburns", grain=grain, soft=0.9)
    if p["Goatee"]:
        tuft = symmetric([(0, 50), (9, 51.5), (15, 44), (19.5, 43), (18, 58), (12, chin - 1), (0, chin + 5)])
        face.fill(tuft, 6, colour, part="goatee", grain=grain, soft=0.8)


def draw_mustache(face: Face) -> None:
    if face.p["Mustache"]:
        shape = symmetric("0,28.5 8,28 17,31.5 20.5,37 14,36 6,35 0,35.5")
        face.fill(shape, 7, _colour(face) * 0.9, part="mustache", grain=face.grain, soft=0.7)


def draw_brows(face: Face) -> None:
    kind = face.p["brows"]
    dark = _colour(face) * 0.8
    if face.p["hair"] in ("blond", "red"):
        dark = rgb(_COLOURS["brown"]) * 0.5 + rgb(_COLOURS["black"]) * 0.3
    shape = "7,-14.5 16,-16.6 25,-16.4 33.5,-12.5"
    if kind == "arched":
        shape = "8.5,-14 15,-19 23,-22.5 30,-19 35.5,-10.5"
    width = {"arched": 4.2, "bushy": 8.6, "plain": 3.9}[kind]
    for side, way in zip((-1, 1), both(shape), strict=True):
        brow = curve(way)
        face.line(brow, 5, dark, width, opacity=0.92, part="brows", soft=0.5)
        if kind == "bushy":
            hairs = face.at(np.stack([brow[1::2], brow[1::2] + (side * 2.2, -4.6)], 1), 5)
            face.strands(hairs, [face.at(ellipse(side * 20, -16, 19, 10), 5)], dark * 0.7, 0.8)
