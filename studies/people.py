"""A whole video with its people marked: who speaks, and what the detector looked at."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import plot, video
from selib.attach import bare
from selib.explanation import Method, SEExplainer, Streams
from selib.select import Select
from studies.audio import ROWS, mfcc
from studies.clips import Mark, Picture, annotate, probability
from studies.data.crops import body_box, corners, crop

GAP = 0.25  # seconds: boxes farther apart are not of one stretch, and what is between them is left alone
SHORTEST = 5  # frames of a stretch that can be explained
COORDINATES = ("x1", "y1", "x2", "y2")


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
        return row[:4], row[4:] or body_box(row)


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
                    crops.append(crop(frame, face if name == "face" else body))
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
                x1, y1, x2, y2 = corners(row[start : start + 4].tolist())
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
