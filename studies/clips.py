"""Films of a detector at work: crops with their heatmaps over what is heard and said, and pictures with their people marked.

Frames are composed with OpenCV and not with Matplotlib, so that a widget can redraw one in a few milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selib import plot
from studies.data.crops import corners

Picture = NDArray[np.uint8]  # RGB (H, W, 3)
Colour = tuple[int, int, int]
SPEAKS: Colour = (0, 128, 96)  # green and vermilion of one lightness: the label and the line say it as well
SILENT: Colour = (200, 72, 16)
INK, FAINT, BAND = (60, 60, 60), (200, 200, 200), (204, 236, 227)
LINES: tuple[Colour, ...] = ((0, 114, 178), (213, 94, 0))  # of plot.OURS and plot.OTHERS


def probability(logits: Tensor, target: int = 0) -> NDArray[Any]:
    """What logits (T, K) say of the target in each frame, (T,): yes or no where K is 1, else one class of K."""
    single = logits.shape[-1] == 1
    found = logits.sigmoid()[..., 0] if single else logits.softmax(-1)[..., target]
    return found.float().cpu().numpy()


# ---- drawing -------------------------------------------------------------------------------------------------------------


@lru_cache(512)
def _letters(text: str, size: int) -> NDArray[np.float32]:
    """A line of text as coverage (h, w, 1) in [0, 1]; the height depends on the size alone."""
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    up, down = font.getmetrics()
    page = Image.new("L", (max(1, math.ceil(font.getlength(text))), up + down))
    ImageDraw.Draw(page).text((0, 0), text, fill=255, font=font)
    return np.asarray(page, dtype=np.float32)[..., None] / np.float32(255)


def write_line(picture: Picture, text: str, x: int, y: int, *, size: int = 12, colour: Colour = INK) -> None:
    """A line of text with its upper left corner at (x, y), cut at the edges."""
    letters = _letters(text, size)[max(0, -y) :, max(0, -x) :]
    place = picture[max(0, y) :, max(0, x) :][: letters.shape[0], : letters.shape[1]]
    letters = letters[: place.shape[0], : place.shape[1]]
    place[:] = np.rint((1 - letters) * place + letters * np.array(colour, dtype=np.float32))


def _curve(
    picture: Picture, points: NDArray[Any], colour: Colour, *, dashed: bool = False, thickness: int = 2
) -> None:
    """A line through points (n, 2) in pixels, x first."""
    exact = [points]
    if dashed:
        way = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
        on, period = 3 * thickness, 7 * thickness
        at = [np.linspace(start, min(start + on, way[-1]), 4) for start in np.arange(0, way[-1], period)]
        exact = [np.stack([np.interp(s, way, points[:, 0]), np.interp(s, way, points[:, 1])], 1) for s in at]
    lines = [np.rint(16 * line).astype(np.int32) for line in exact]
    cv2.polylines(picture, lines, False, colour, thickness, cv2.LINE_AA, 4)


class Film:
    """A clip, ready to be drawn frame by frame: crops with heatmaps side by side, over the sound and the scores with a cursor.

    ``film[t]`` is frame t as RGB uint8 (H, W, 3), all of one size; what does not move is drawn once.

    Args:
        frames: {stream: grey (T, h, w)}, uint8 or in [0, 1].
        maps: {stream: heatmaps (T, h, w)}, uint8 or in [0, 1]; a stream without them is shown as it is.
        scores: {line: probability of speaking (T,)}; the first line is solid, the second dashed.
        labels: 0/1 (T,): true speech is a shaded band.
        wave: the sound track (N,), ``rate`` samples a second.
        off: streams and "audio" that are shown as switched off.
        scale: pixels of the film for one of a crop.
        opacity, colormap: of the heatmaps at their maximum, see :func:`selib.plot.tint`.

    Raises:
        ValueError: streams, maps, scores or labels that do not fit each other.
    """

    def __init__(
        self,
        frames: Mapping[str, plot.Frames],
        maps: Mapping[str, plot.Frames] | None = None,
        *,
        scores: Mapping[str, plot.Frames] | None = None,
        labels: plot.Frames | None = None,
        wave: NDArray[Any] | None = None,
        off: Collection[str] = (),
        fps: float = 25.0,
        rate: int = 16000,
        scale: int = 2,
        opacity: float = 0.85,
        colormap: str = plot.COLORMAP,
    ) -> None:
        if not frames:
            raise ValueError("a film needs the frames of at least one stream")
        plot.check_clip(frames, maps or {}, {**(scores or {}), "labels": labels})
        self.frames = {name: plot.pixels(clip) for name, clip in frames.items()}
        self.maps = {name: plot.pixels(clip) for name, clip in (maps or {}).items()}
        self.scores = {name: np.asarray(line, dtype=float) for name, line in (scores or {}).items()}
        self.labels = None if labels is None else np.asarray(labels)
        self.off, self.fps, self.scale = off, fps, scale
        self._look: dict[str, Any] = {"opacity": opacity, "colormap": colormap}
        self._width = sum(clip.shape[2] * scale for clip in self.frames.values()) + 8 * (len(self.frames) - 1)
        self._width = max(self._width, 240)
        self._lines: dict[str, NDArray[Any]] = {}  # in pixels of the track
        self._track = self._drawn(None if wave is None else wave[: round(len(self) / fps * rate)], rate)

    def __len__(self) -> int:
        return len(next(iter(self.frames.values())))

    def __iter__(self) -> Iterator[Picture]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, t: int) -> Picture:
        if not 0 <= t < len(self):
            raise IndexError(f"frame {t} of {len(self)}")
        crops = [self._crop(name, t) for name in self.frames]
        height = max(crop.shape[0] for crop in crops)
        track = self._track.copy()
        x = self._x(t)
        cv2.line(track, (round(x), 0), (round(x), self._floor), INK, 1)
        for (name, line), colour in zip(self._lines.items(), LINES, strict=False):
            centre = round(16 * x), round(16 * line[t, 1])
            cv2.circle(
                track, centre, 16 * 4, colour, -1 if name == next(iter(self._lines)) else 2, cv2.LINE_AA, 4
            )
        picture = np.full((20 + height + len(track), self._width, 3), 255, np.uint8)
        self._headline(picture, t)
        left = 0
        for crop in crops:
            picture[20 : 20 + crop.shape[0], left : left + crop.shape[1]] = crop
            left += crop.shape[1] + 8
        picture[20 + height :] = track
        return picture

    def _x(self, t: float) -> float:
        return (t + 0.5) / len(self) * (self._width - 1)

    def _headline(self, picture: Picture, t: int) -> None:
        said = [f"{t / self.fps:.2f} s"]
        said += [
            "speaking: " + ", ".join(f"{name} {line[t]:.0%}" for name, line in self.scores.items())
        ] * bool(self.scores)
        if self.labels is not None:
            said.append("truth: speaks" if self.labels[t] else "truth: does not")
        write_line(picture, "   ".join(said), 2, 2)

    def _crop(self, name: str, t: int) -> Picture:
        grey = self.frames[name][t]
        crop = (
            plot.tint(grey, self.maps[name][t], **self._look)
            if name in self.maps
            else np.repeat(grey[..., None], 3, 2)
        )
        size = grey.shape[1] * self.scale, grey.shape[0] * self.scale
        large: Picture = np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
        if name in self.off:
            large = 96 + large // 4
            cv2.line(large, (0, 0), (size[0] - 1, size[1] - 1), (255, 255, 255), 1, cv2.LINE_AA)
        write_line(large, f"{name}, off" if name in self.off else name, 4, 2, colour=(0, 0, 0))
        write_line(large, f"{name}, off" if name in self.off else name, 3, 1, colour=(255, 255, 255))
        return large

    def _drawn(self, wave: NDArray[Any] | None, rate: int) -> Picture:
        """Everything beneath the crops but the cursor."""
        sound, curve = 60 * (wave is not None), 84 * bool(self.scores or self.labels is not None)
        self._floor = 6 + sound + curve
        track = np.full((self._floor + 18, self._width, 3), 255, np.uint8)
        for start, stop in plot.spans(self.labels) if self.labels is not None else ():
            track[6 : self._floor, round(self._x(start - 0.5)) : round(self._x(stop - 0.5))] = BAND
        if wave is not None:
            columns = max(1, min(self._width, round(len(wave) / rate * self.fps / len(self) * self._width)))
            ends = np.rint(40 - 22 * plot.envelope(wave, columns)).astype(int)
            colour = FAINT if "audio" in self.off else INK
            for x, (low, high) in enumerate(ends):
                track[high : low + 1, x] = colour
            write_line(track, "sound, off" if "audio" in self.off else "sound", 3, 5, size=10)
        if curve:
            base, tall = self._floor - 6, curve - 22
            for value in (0, 0.5, 1):
                y = round(base - tall * value)
                cv2.line(track, (0, y), (self._width, y), FAINT if value != 0.5 else (150, 150, 150), 1)
            self._legend(track, base - tall - 15)
            at = np.array([self._x(t) for t in range(len(self))])
            for i, (name, line) in enumerate(
                self.scores.items()
            ):  # the dashed one on top, to be seen where they agree
                self._lines[name] = np.stack([at, base - tall * line], 1)
                _curve(track, self._lines[name], LINES[i % 2], dashed=i > 0)
        cv2.line(track, (0, self._floor), (self._width, self._floor), INK, 1)
        seconds = len(self) / self.fps
        step = next(step for step in (0.5, 1, 2, 5, 10, 30, 60, math.inf) if seconds / step <= 10)
        for mark in np.arange(0, seconds, step):
            x = round(self._x(mark * self.fps - 0.5))
            cv2.line(track, (x, self._floor), (x, self._floor + 3), INK, 1)
            write_line(track, f"{mark:g} s", x + 2, self._floor + 4, size=10)
        return track

    def _legend(self, track: Picture, y: int) -> None:
        write_line(track, "p(speaking)", 3, y, size=10)
        right = self._width
        for i, name in reversed(list(enumerate(self.scores if len(self.scores) > 1 else ()))):
            right -= _letters(name, 10).shape[1] + 6
            write_line(track, name, right, y, size=10)
            right -= 26
            _curve(track, np.array([[right, y + 7], [right + 22, y + 7]]), LINES[i % 2], dashed=i > 0)
            right -= 8


def strip_video(
    frames: Mapping[str, plot.Frames], maps: Mapping[str, plot.Frames] | None = None, **details: Any
) -> Iterator[Picture]:
    """The frames of a film of one clip, for :func:`selib.video.write`; the arguments are those of :class:`Film`."""
    return iter(Film(frames, maps, **details))


# ---- a whole picture with its people ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """What is drawn of one person in one frame.

    Attributes:
        box, body: x1, y1, x2, y2 in pixels of the frame; they may leave it.
        probability: of speaking; above one half counts as speaking.
        heatmap, body_heatmap: (h, w), uint8 or in [0, 1], stretched over the box as the crop was taken from it.
        name: shown in front of the label.
    """

    box: Sequence[float]
    probability: float
    heatmap: NDArray[Any] | None = None
    body: Sequence[float] | None = None
    body_heatmap: NDArray[Any] | None = None
    name: str = ""


def annotate(frames: Iterable[Picture], marks: Iterable[Sequence[Mark]]) -> Iterator[Picture]:
    """Draw people into frames, RGB uint8 (H, W, 3): box, probability, heatmaps.

    Who speaks has a green box with a solid line, who does not a red one with a broken line, and the label says it in words.

    Raises:
        ValueError: more frames than marks, or fewer.
    """
    for frame, people in zip(frames, marks, strict=True):
        picture = np.ascontiguousarray(frame).copy()
        for person in people:
            _colour_in(picture, person.body, person.body_heatmap)
        for person in people:
            _colour_in(picture, person.box, person.heatmap)
        for person in people:
            _outline(picture, person)
        yield picture


def _colour_in(picture: Picture, box: Sequence[float] | None, heatmap: NDArray[Any] | None) -> None:
    if box is None or heatmap is None:
        return
    x1, y1, x2, y2 = corners(box)
    whole = cv2.resize(plot.pixels(heatmap), (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR)
    seen = picture[max(0, y1) : max(0, y2), max(0, x1) : max(0, x2)]
    part = whole[max(0, -y1) :, max(0, -x1) :][: seen.shape[0], : seen.shape[1]]
    seen[:] = plot.tint(seen, np.asarray(part))


def _outline(picture: Picture, person: Mark) -> None:
    speaks = person.probability > 0.5
    colour = SPEAKS if speaks else SILENT
    height, width = picture.shape[:2]
    thickness, size = max(2, round(height / 180)), max(11, round(height / 36))
    for box, thick in ((person.body, 1), (person.box, thickness)):
        if box is not None:
            x1, y1, x2, y2 = corners(box)
            x2, y2 = x2 - 1, y2 - 1
            ring = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]], dtype=float)
            _curve(picture, ring, colour, dashed=not speaks, thickness=thick)
    words = [person.name] * bool(person.name) + [
        "speaking" if speaks else "not speaking",
        f"{person.probability:.0%}",
    ]
    text = " ".join(words)
    tall, wide, _ = _letters(text, size).shape
    x1, y1, _, _ = corners(person.box)
    x, y = min(max(0, x1), max(0, width - wide - 6)), min(max(0, y1 - tall - 2), max(0, height - tall))
    picture[y : y + tall, x : x + wide + 6] = colour
    write_line(picture, text, x + 3, y, size=size, colour=(255, 255, 255))
