"""Films of a detector at work: crops with their heatmaps over what is heard and said, and a whole video with its people marked.

Frames are composed with OpenCV and not with Matplotlib, so that a widget can redraw one in a few milliseconds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from selib import plot, video
from selib.attach import bare
from selib.explanation import Method, SEExplainer, Streams
from selib.select import Select
from studies.audio import ROWS, mfcc

Picture = NDArray[np.uint8]  # RGB (H, W, 3)
Colour = tuple[int, int, int]
SPEAKS: Colour = (0, 128, 96)  # green and vermilion of one lightness: the label and the line say it as well
SILENT: Colour = (200, 72, 16)
INK, FAINT, BAND = (60, 60, 60), (200, 200, 200), (204, 236, 227)
LINES: tuple[Colour, ...] = ((0, 114, 178), (213, 94, 0))  # of plot.OURS and plot.OTHERS
GAP = 0.25  # seconds: boxes farther apart are not of one stretch, and what is between them is left alone
SHORTEST = 5  # frames of a stretch that can be explained
COORDINATES = ("x1", "y1", "x2", "y2")


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


def _corners(box: Sequence[float]) -> tuple[int, int, int, int]:
    """Whole pixels of a box, rounded as :func:`selib.video.crop` does."""
    left, top = (math.floor(edge + 0.5) for edge in box[:2])
    return left, top, max(left + 1, math.floor(box[2] + 0.5)), max(top + 1, math.floor(box[3] + 0.5))


def _colour_in(picture: Picture, box: Sequence[float] | None, heatmap: NDArray[Any] | None) -> None:
    if box is None or heatmap is None:
        return
    x1, y1, x2, y2 = _corners(box)
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
            x1, y1, x2, y2 = _corners(box)
            x2, y2 = x2 - 1, y2 - 1
            ring = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]], dtype=float)
            _curve(picture, ring, colour, dashed=not speaks, thickness=thick)
    words = [person.name] * bool(person.name) + [
        "speaking" if speaks else "not speaking",
        f"{person.probability:.0%}",
    ]
    text = " ".join(words)
    tall, wide, _ = _letters(text, size).shape
    x1, y1, _, _ = _corners(person.box)
    x, y = min(max(0, x1), max(0, width - wide - 6)), min(max(0, y1 - tall - 2), max(0, height - tall))
    picture[y : y + tall, x : x + wide + 6] = colour
    write_line(picture, text, x + 3, y, size=size, colour=(255, 255, 255))


# ---- explaining a video of one's own ---------------------------------------------------------------------------------------


@dataclass
class _Stretch:
    """Consecutive boxes of one person, and what the model says of them."""

    entity: str
    seconds: NDArray[np.float64]  # (n,)
    boxes: NDArray[np.float64]  # (n, 4), and with bodies (n, 8)
    lines: list[int]  # of the file

    def span(self, fps: float) -> range:
        """The frames that lie between the first and the last box, by less than half a frame around them."""
        return range(
            max(0, math.ceil(self.seconds[0] * fps - 0.5)), math.floor(self.seconds[-1] * fps + 0.5) + 1
        )

    def at(self, seconds: float) -> tuple[Sequence[float], Sequence[float]]:
        """Face and body at a time, from one box to the next in a straight line."""
        row = [float(np.interp(seconds, self.seconds, edge)) for edge in self.boxes.T]
        return row[:4], row[4:] or video.body_box(row)


def _read_boxes(path: Path) -> tuple[list[_Stretch], bool]:
    """The stretches of a file of boxes, and whether its coordinates are fractions of the frame."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    people: dict[str, list[tuple[float, list[float], int]]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        names = [_plain_name(name) for name in next(reader, [])]
        body = [f"body_{edge}" for edge in COORDINATES]
        wanted = ["frame_timestamp", *COORDINATES, "entity", *(body if set(body) & set(names) else [])]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(
                f"{path}: line 1: no column {', '.join(missing)}: the first line names the columns"
            )
        for row in reader:
            if not row:
                continue
            where = f"{path}: line {reader.line_num}"
            if len(row) != len(names):
                raise ValueError(f"{where}: {len(row)} fields, but the first line names {len(names)}")
            cells = dict(zip(names, row, strict=True))
            seconds, *box = (_number(cells[name], name, where) for name in wanted if name != "entity")
            if seconds < 0:
                raise ValueError(f"{where}: frame_timestamp {seconds:g} is before the video")
            for x1, y1, x2, y2 in (box[:4], box[4:] or box[:4]):
                if x2 <= x1 or y2 <= y1:
                    raise ValueError(
                        f"{where}: the box {x1:g}, {y1:g}, {x2:g}, {y2:g} is empty: x1 < x2 and y1 < y2"
                    )
            people.setdefault(cells["entity"].strip(), []).append((seconds, box, reader.line_num))
    if not people:
        raise ValueError(f"{path}: holds no boxes")
    fractions = max(max(box) for rows in people.values() for _, box, _ in rows) <= 2
    return [stretch for name, rows in people.items() for stretch in _stretches(path, name, rows)], fractions


def _plain_name(name: str) -> str:
    """A column's name without AVA's prefixes: entity_box_x1 is x1, entity_id is entity."""
    name = name.strip().lower()
    return "entity" if name == "entity_id" else name.removeprefix("entity_box_")


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {name} {text!r} is not a number")
    return value


def _stretches(path: Path, entity: str, rows: list[tuple[float, list[float], int]]) -> Iterator[_Stretch]:
    rows.sort(key=lambda row: row[0])
    for (before, _, first), (after, _, second) in pairwise(rows):
        if before == after:
            raise ValueError(
                f"{path}: line {max(first, second)}: a second box of {entity} at {after:g} s: see line {min(first, second)}"
            )
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or rows[stop][0] - rows[stop - 1][0] > GAP:
            seconds, boxes, lines = zip(*rows[start:stop], strict=True)
            yield _Stretch(entity, np.array(seconds), np.array(boxes), list(lines))
            start = stop


@dataclass
class _Found:
    """One stretch, cut out of the video."""

    stretch: _Stretch
    span: range
    crops: dict[str, list[Picture]]
    probability: NDArray[Any]
    maps: dict[str, NDArray[np.uint8]]
    shares: dict[str, float]


def explain_video(
    model: nn.Module,
    path: str | Path,
    boxes: str | Path,
    out: str | Path,
    *,
    method: Method = "influence",
    select: Select | None = None,
    target: int = 0,
    fps: float = 25.0,
    window: int = 250,
) -> list[dict[str, Any]]:
    """Who speaks in a video, and why: writes it as MP4 with boxes, probabilities, heatmaps and its sound.

    Args:
        model: a detector that answers once a frame, with SE blocks; ``model.modalities`` says which of "audio", "face" and "body" it takes.
            Heatmaps are drawn for the blocks called "face" and "body".
        path: a video with sound.
        boxes: a CSV whose first line names its columns: frame_timestamp (seconds), x1, y1, x2, y2, entity, and for bodies of one's own
            body_x1 to body_y2; AVA's names entity_box_x1 … and entity_id do as well. The coordinates are fractions of the frame, as
            AVA's, when none of the file exceeds 2, else pixels. Without bodies, a body is looked for around and below its face.
            From one box to the next of a person the way is straight; where they are more than 0.25 s apart the frames between stay as they
            are. Coordinates may leave the frame, but not altogether.
        out: the MP4 to write, whole or not at all.
        target: the logit that stands for speaking.
        fps: the rate the model was trained at, and that of ``out``.
        window: frames that the model sees at once; a longer stretch is cut evenly. Heatmaps are scaled over such a piece.

    Returns:
        For every stretch of boxes {"entity", "start", "stop" (seconds), "frames", "speaking" (share of its frames), "probability" (mean),
        "shares" {modality: share of the influence}, "seconds" [T], "probabilities" [T]}.

    Raises:
        ValueError: a box or time that the video does not have, a stretch of fewer than 5 frames, no sound, a model that takes other
            streams; it names the file, and the line.
    """
    path, boxes, out = Path(path), Path(boxes), Path(out)
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"{out}: the annotated video is an .mp4")
    streams = _streams_of(model)
    stretches, fractions = _read_boxes(boxes)
    _check_lengths(boxes, stretches, fps)
    wave = video.read_audio(path)
    found, length = _cut_out(
        path, boxes, stretches, fractions, fps, [name for name in streams if name != "audio"]
    )
    with SEExplainer(model) as explainer:
        for one in found:
            _explain(explainer, one, wave, streams, method, select, target, fps, window)
            one.crops.clear()  # only the maps are needed from here on
    marked = annotate((frame for _, frame in video.read_frames(path, fps=fps)), _marks(found, length, fps))
    video.write(out, marked, fps=fps, audio=wave)
    return [_row(one, fps) for one in found]


def _streams_of(model: nn.Module) -> tuple[str, ...]:
    streams = tuple(getattr(bare(model), "modalities", ("audio", "face", "body")))
    unknown = [name for name in streams if name not in ("audio", "face", "body")]
    if unknown:
        raise ValueError(
            f"the model takes {', '.join(unknown)}, but a video with boxes gives audio, face and body"
        )
    return streams


def _check_lengths(path: Path, stretches: list[_Stretch], fps: float) -> None:
    for stretch in stretches:
        if len(stretch.span(fps)) < SHORTEST:
            raise ValueError(
                f"{path}: line {stretch.lines[0]}: only {len(stretch.span(fps))} frames of {stretch.entity} without a gap of more than "
                f"{GAP} s: add boxes around {stretch.seconds[0]:g} s, or leave these out"
            )


def _cut_out(
    path: Path, boxes: Path, stretches: list[_Stretch], fractions: bool, fps: float, streams: Sequence[str]
) -> tuple[list[_Found], int]:
    """The crops of every stretch, in one pass over the video, and how many frames it has."""
    found = [
        _Found(one, one.span(fps), {name: [] for name in streams}, np.empty(0, np.float32), {}, {})
        for one in stretches
    ]
    length = 0
    for k, (_, frame) in enumerate(video.read_frames(path, fps=fps)):
        if k == 0:
            _place(boxes, stretches, fractions, *frame.shape[1::-1])
        for one in found:
            if k in one.span:
                face, body = one.stretch.at(k / fps)
                for name, crops in one.crops.items():
                    crops.append(video.crop(frame, face if name == "face" else body))
        length = k + 1
    for one in found:
        late = [i for i, seconds in enumerate(one.stretch.seconds) if round(seconds * fps) > length]
        if late:
            raise ValueError(
                f"{boxes}: line {one.stretch.lines[late[0]]}: frame_timestamp {one.stretch.seconds[late[0]]:g} is beyond the end of "
                f"{path.name}, which lasts {length / fps:.2f} s"
            )
        one.span = range(one.span.start, min(one.span.stop, length))
    return found, length


def _place(path: Path, stretches: list[_Stretch], fractions: bool, width: int, height: int) -> None:
    """Boxes in pixels; ValueError for one that shows nothing of the frame."""
    for stretch in stretches:
        if fractions:
            stretch.boxes = stretch.boxes * np.array([width, height] * (stretch.boxes.shape[1] // 2))
        for row, line in zip(stretch.boxes, stretch.lines, strict=True):
            for start in range(0, len(row), 4):
                x1, y1, x2, y2 = _corners(row[start : start + 4].tolist())
                if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
                    raise ValueError(
                        f"{path}: line {line}: the box {x1}, {y1}, {x2}, {y2} lies outside the frame of {width}x{height} pixels"
                    )


def _inputs(
    crops: Mapping[str, list[Picture]],
    wave: NDArray[np.int16],
    piece: range,
    start: int,
    streams: Sequence[str],
    fps: float,
) -> dict[str, Tensor]:
    """The batch of one that a detector takes, of frames ``piece`` of the video; crops begin at frame ``start``."""
    inputs = {
        name: torch.from_numpy(np.stack(frames[piece.start - start : piece.stop - start])).float()[None] / 255
        for name, frames in crops.items()
    }
    if "audio" in streams:
        first, last = (round(edge / fps * 16000) for edge in (piece.start, piece.stop))
        heard = np.zeros(last - first, np.int16)  # where the sound ends before the picture: silence
        part = wave[first:last]
        heard[: len(part)] = part
        rows = mfcc(torch.from_numpy(heard), fps=fps)[: ROWS * len(piece)]
        inputs["audio"] = torch.cat([rows, rows[-1:].expand(ROWS * len(piece) - len(rows), -1)])[None]
    return {name: inputs[name] for name in streams}


def _explain(
    explainer: SEExplainer,
    one: _Found,
    wave: NDArray[np.int16],
    streams: Sequence[str],
    method: Method,
    select: Select | None,
    target: int,
    fps: float,
    window: int,
) -> None:
    pieces = max(1, math.ceil(len(one.span) / window))
    edges = np.linspace(one.span.start, one.span.stop, pieces + 1).round().astype(int)
    said: list[NDArray[Any]] = []
    maps: dict[str, list[NDArray[np.uint8]]] = {}
    for first, last in pairwise(edges):
        piece = range(int(first), int(last))
        ex = explainer(_inputs(one.crops, wave, piece, one.span.start, streams, fps))
        said.append(probability(ex.logits[0], target))
        blocks = ex.streams if isinstance(ex, Streams) else {}
        for name in ("face", "body"):
            if name in blocks and name in streams:
                heatmap = blocks[name].heatmap(method, target, select=select)[0]
                maps.setdefault(name, []).append(plot.pixels(heatmap))
        if "fusion" in blocks and hasattr(explainer.model, "modalities"):
            shares = ex.modalities(target)
            for name, share in zip(shares.names, shares.share[0].tolist(), strict=True):
                one.shares[name] = one.shares.get(name, 0.0) + share * len(piece) / len(one.span)
    one.probability = np.concatenate(said)
    one.maps = {name: np.concatenate(parts) for name, parts in maps.items()}


def _marks(found: list[_Found], length: int, fps: float) -> Iterator[list[Mark]]:
    for k in range(length):
        marks = []
        for one in found:
            if k in one.span:
                face, body = one.stretch.at(k / fps)
                t = k - one.span.start
                maps = {name: clip[t] for name, clip in one.maps.items()}
                seen = body if "body" in maps else None
                marks.append(
                    Mark(
                        face,
                        float(one.probability[t]),
                        maps.get("face"),
                        seen,
                        maps.get("body"),
                        one.stretch.entity,
                    )
                )
        yield marks


def _row(one: _Found, fps: float) -> dict[str, Any]:
    return {
        "entity": one.stretch.entity,
        "start": one.span.start / fps,
        "stop": one.span.stop / fps,
        "frames": len(one.span),
        "speaking": float((one.probability > 0.5).mean()),
        "probability": float(one.probability.mean()),
        "shares": one.shares,
        "seconds": [k / fps for k in one.span],
        "probabilities": one.probability.tolist(),
    }
