"""Films of a detector at work: crops with their heatmaps over the sound and the scores, and marked people.

Frames are composed with OpenCV and not with Matplotlib, so that a widget redraws one in a few milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selib import plot
from selib.plot import INK, Picture, write_line
from studies.data.crops import corners

Frames = Tensor | NDArray[Any]
Colour = tuple[int, int, int]
RATE = 16000  # samples a second of every sound track
SPEAKS: Colour = (0, 128, 96)  # green and vermilion of one lightness: the label and the line say it as well
SILENT: Colour = (200, 72, 16)
FAINT, BAND, WHITE = (200, 200, 200), (204, 236, 227), (255, 255, 255)
LINES: tuple[Colour, ...] = ((0, 114, 178), (213, 94, 0))  # of plot.OURS and plot.OTHERS
HEAD, BETWEEN = 20, 8  # pixels of the headline, and from one crop to the next


def probability(logits: Tensor, target: int = 0) -> NDArray[Any]:
    """The target's probability in each frame (T,) from logits (T, K): their sigmoid if K is 1, or softmax."""
    single = logits.shape[-1] == 1
    found = logits.sigmoid()[..., 0] if single else logits.softmax(-1)[..., target]
    return found.float().cpu().numpy()


def spans(truth: Frames) -> list[tuple[int, int]]:
    """The stretches [start, stop) in which 0/1 labels (T,) are 1."""
    edges = np.diff(np.asarray(truth).astype(np.int8), prepend=0, append=0)
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


def envelope(wave: NDArray[Any], columns: int) -> NDArray[np.float64]:
    """The lowest and highest sample of a track (N,) in each of ``columns`` stretches: (columns, 2) in ±1."""
    parts = np.array_split(np.pad(wave, (0, max(0, columns - len(wave)))), columns)
    ends = np.array([(part.min(), part.max()) for part in parts], dtype=np.float64)
    return ends / max(1e-12, float(np.abs(ends).max()))


def check_clip(frames: Mapping[str, Frames], maps: Mapping[str, Frames], timed: Mapping[str, Any]) -> None:
    """ValueError unless frames and maps {stream: (T, h, w)} and values {name: (T,)} are of one clip."""
    length = len(next(iter(frames.values())))
    for name, values in {**frames, **timed}.items():
        if values is not None and (len(values) != length or (name in timed and values.ndim != 1)):
            raise ValueError(f"{name!r} has the shape {tuple(values.shape)}, but there are {length} frames")
    shapes = {name: tuple(clip.shape) for name, clip in frames.items()}
    for name, found in maps.items():
        if shapes.get(name) != tuple(found.shape):
            raise ValueError(f"maps for {name!r} of {tuple(found.shape)} do not fit the frames {shapes}")


def _curve(
    picture: Picture, points: NDArray[Any], colour: Colour, *, dashed: bool = False, thickness: int = 2
) -> None:
    """Draw a line through points (n, 2) in pixels, x first."""
    lines = [points]
    if dashed:
        way = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
        on, period = 3 * thickness, 7 * thickness
        lines = []
        for start in np.arange(0, way[-1], period):
            at = np.linspace(start, min(start + on, way[-1]), 4)
            lines.append(np.stack([np.interp(at, way, points[:, 0]), np.interp(at, way, points[:, 1])], 1))
    sixteenths = [np.rint(16 * line).astype(np.int32) for line in lines]
    cv2.polylines(picture, sixteenths, False, colour, thickness, cv2.LINE_AA, 4)


class Film:
    """A clip drawn frame by frame: crops with heatmaps side by side, over the sound and the scores.

    ``film[t]`` is frame t, RGB uint8 (H, W, 3), all of one size; what does not move is drawn once.

    Args:
        frames: {stream: grey (T, h, w)}, uint8 or in [0, 1].
        maps: {stream: heatmaps (T, h, w)}, uint8 or in [0, 1]; a stream without them is shown as it is.
        scores: {line: probability of speaking (T,)}; the first line is solid, the second dashed.
        labels: 0/1 (T,): true speech is a shaded band.
        wave: the sound track (N,) at 16 kHz.
        off: streams, and "audio", that are shown as switched off.
        opacity, colormap: of the heatmaps, see :func:`selib.plot.tint`.
    """

    def __init__(
        self,
        frames: Mapping[str, Frames],
        maps: Mapping[str, Frames] | None = None,
        *,
        scores: Mapping[str, Frames] | None = None,
        labels: Frames | None = None,
        wave: NDArray[Any] | None = None,
        off: Collection[str] = (),
        fps: float = 25.0,
        opacity: float = 0.85,
        colormap: str = plot.COLORMAP,
    ) -> None:
        check_clip(frames, maps or {}, {**(scores or {}), "labels": labels})
        self.frames = {name: plot.pixels(clip) for name, clip in frames.items()}
        self.maps = {name: plot.pixels(clip) for name, clip in (maps or {}).items()}
        self.scores = {name: np.asarray(line, dtype=float) for name, line in (scores or {}).items()}
        self.labels = None if labels is None else np.asarray(labels)
        self.off, self.fps, self._opacity, self._colormap = off, fps, opacity, colormap
        self._scale = 1 if len(frames) > 2 else 2
        widths = [clip.shape[2] * self._scale for clip in self.frames.values()]
        self._width = max(240, sum(widths) + BETWEEN * (len(widths) - 1))
        self._lines: dict[str, NDArray[Any]] = {}  # of the scores, in pixels of the track
        self._track = self._draw_track(wave)

    def __len__(self) -> int:
        return len(next(iter(self.frames.values())))

    def __iter__(self) -> Iterator[Picture]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, t: int) -> Picture:
        if not 0 <= t < len(self):
            raise IndexError(f"frame {t} of {len(self)}")
        crops = [self._crop(name, t) for name in self.frames]
        below = HEAD + max(crop.shape[0] for crop in crops)
        picture = np.full((below + len(self._track), self._width, 3), 255, np.uint8)
        said = [f"{t / self.fps:.2f} s"]
        if self.scores:
            said.append("speaking: " + ", ".join(f"{n} {line[t]:.0%}" for n, line in self.scores.items()))
        if self.labels is not None:
            said.append("truth: speaks" if self.labels[t] else "truth: does not")
        write_line(picture[:HEAD], "   ".join(said), 2, 2)
        left = 0
        for crop in crops:
            picture[HEAD : HEAD + crop.shape[0], left : left + crop.shape[1]] = crop
            left += crop.shape[1] + BETWEEN
        track = picture[below:]
        track[:] = self._track
        x = self._x(t)
        cv2.line(track, (round(x), 0), (round(x), self._floor), INK, 1)
        for i, line in enumerate(self._lines.values()):
            centre = round(16 * x), round(16 * line[t, 1])
            cv2.circle(track, centre, 16 * 4, LINES[i % 2], 2 if i else -1, cv2.LINE_AA, 4)
        return picture

    def _x(self, t: float) -> float:
        """Where the middle of frame t lies in the track."""
        return (t + 0.5) / len(self) * (self._width - 1)

    def _crop(self, name: str, t: int) -> Picture:
        grey = self.frames[name][t]
        if name in self.maps:
            crop = plot.tint(grey, self.maps[name][t], opacity=self._opacity, colormap=self._colormap)
        else:
            crop = np.repeat(grey[..., None], 3, 2)
        size = grey.shape[1] * self._scale, grey.shape[0] * self._scale
        large: Picture = np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
        title = name
        if name in self.off:
            title, large = f"{name}, off", 96 + large // 4
            cv2.line(large, (0, 0), (size[0] - 1, size[1] - 1), WHITE, 1, cv2.LINE_AA)
        write_line(large, title, 4, 2, colour=(0, 0, 0))
        write_line(large, title, 3, 1, colour=WHITE)
        return large

    def _draw_track(self, wave: NDArray[Any] | None) -> Picture:
        """Everything beneath the crops but the cursor."""
        with_scores = bool(self.scores) or self.labels is not None
        self._floor = 6 + 60 * (wave is not None) + 84 * with_scores
        track = np.full((self._floor + 18, self._width, 3), 255, np.uint8)
        for start, stop in spans(self.labels) if self.labels is not None else ():
            track[6 : self._floor, round(self._x(start - 0.5)) : round(self._x(stop - 0.5))] = BAND
        if wave is not None:
            self._draw_sound(track, wave)
        if with_scores:
            self._draw_scores(track, self._floor - 6, 62)
        self._draw_seconds(track)
        return track

    def _draw_sound(self, track: Picture, wave: NDArray[Any]) -> None:
        off = "audio" in self.off
        length = round(len(self) / self.fps * RATE)
        heard = np.pad(wave[:length], (0, max(0, length - len(wave))))
        for x, (low, high) in enumerate(np.rint(40 - 22 * envelope(heard, self._width)).astype(int)):
            track[high : low + 1, x] = FAINT if off else INK
        write_line(track, "sound, off" if off else "sound", 3, 5, size=10)

    def _draw_scores(self, track: Picture, base: int, tall: int) -> None:
        for value, colour in ((0, FAINT), (0.5, (150, 150, 150)), (1, FAINT)):
            y = round(base - tall * value)
            cv2.line(track, (0, y), (self._width, y), colour, 1)
        write_line(track, "p(speaking)", 3, base - tall - 15, size=10)
        at = [self._x(t) for t in range(len(self))]
        left = 80  # of the legend
        for i, (name, line) in enumerate(self.scores.items()):  # the dashed one on top: seen where they agree
            self._lines[name] = np.stack([at, base - tall * line], 1)
            _curve(track, self._lines[name], LINES[i % 2], dashed=i > 0)
            if len(self.scores) > 1:
                sample = np.array([[left, base - tall - 8], [left + 22, base - tall - 8]])
                _curve(track, sample, LINES[i % 2], dashed=i > 0)
                write_line(track, name, left + 28, base - tall - 15, size=10)
                left += 44 + math.ceil(plot.font(10).getlength(name))

    def _draw_seconds(self, track: Picture) -> None:
        cv2.line(track, (0, self._floor), (self._width, self._floor), INK, 1)
        seconds = len(self) / self.fps
        step = next(step for step in (0.5, 1, 2, 5, 10, 30, 60, math.inf) if seconds / step <= 10)
        for mark in np.arange(0, seconds, step):
            x = round(self._x(mark * self.fps - 0.5))
            cv2.line(track, (x, self._floor), (x, self._floor + 3), INK, 1)
            write_line(track, f"{mark:g} s", x + 2, self._floor + 4, size=10)


@dataclass(frozen=True)
class Mark:
    """What is drawn of one person in one frame.

    Boxes are x1, y1, x2, y2 in pixels of the frame and may leave it; heatmaps (h, w), uint8 or in [0, 1], are
    stretched over them.
    """

    box: Sequence[float]  # of the face
    probability: float  # of speaking
    heatmap: NDArray[Any] | None = None
    body: Sequence[float] | None = None
    body_heatmap: NDArray[Any] | None = None
    name: str = ""


def annotate(frames: Iterable[Picture], marks: Iterable[Sequence[Mark]]) -> Iterator[Picture]:
    """Draw people into frames, RGB uint8 (H, W, 3): heatmaps, boxes, probabilities.

    A speaker's box is green with a solid line, another's red with a broken line; the label says it in words.
    """
    for frame, people in zip(frames, marks, strict=True):
        picture = np.array(frame, order="C")
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
    said = "speaking" if speaks else "not speaking"
    text = f"{person.name} {said} {person.probability:.0%}".strip()
    tall, wide = sum(plot.font(size).getmetrics()), math.ceil(plot.font(size).getlength(text))
    x1, y1, _, _ = corners(person.box)
    x, y = min(max(0, x1), max(0, width - wide - 6)), min(max(0, y1 - tall - 2), max(0, height - tall))
    picture[y : y + tall, x : x + wide + 6] = colour
    write_line(picture, text, x + 3, y, size=size, colour=WHITE)
