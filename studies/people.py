"""A film with its people marked: who speaks, and what the detector looked at."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selib import plot, video
from selib.atomic import write_text
from selib.attach import attach_se
from selib.checkpoint import load_checkpoint
from selib.explainer import SEExplainer
from selib.explanation import Method
from selib.forward import attached
from studies.audio import mfcc_of_frames
from studies.clips import Mark, annotate, probability
from studies.data.crops import body_box, check_box, crop
from studies.networks import ActiveSpeaker

FPS = 25  # frames a second that the detectors are trained at, and of the film that is written
GAP = 0.25  # seconds: boxes farther apart are not of one track, and what is between them is left alone
SHORTEST = 5  # frames of a track that can be explained
WINDOW = 250  # frames that the model sees at once
FACE = ["x1", "y1", "x2", "y2"]
BODY = ["body_x1", "body_y1", "body_x2", "body_y2"]


@dataclass
class Track:
    """One person's boxes without a gap, what they show, and what the model says of it."""

    entity: str
    seconds: NDArray[np.float64]  # (n,)
    boxes: NDArray[np.float64]  # (n, 4) in pixels, or (n, 8) with bodies
    lines: list[int]  # of the CSV
    crops: dict[str, list[video.Picture]] = field(default_factory=dict)
    probability: NDArray[Any] = field(default_factory=lambda: np.empty(0))  # of speaking, (T,)
    maps: dict[str, NDArray[np.uint8]] = field(default_factory=dict)  # (T, 112, 112)
    shares: dict[str, float] = field(default_factory=dict)  # of each modality

    def __post_init__(self) -> None:
        first, last = math.ceil(self.seconds[0] * FPS - 0.5), math.floor(self.seconds[-1] * FPS + 0.5)
        self.frames = range(max(0, first), last + 1)  # by less than half a frame around the boxes

    def boxes_at(self, frame: int) -> tuple[list[float], list[float]]:
        """Face and body, from one box to the next in a straight line."""
        box = [float(np.interp(frame / FPS, self.seconds, edge)) for edge in self.boxes.T]
        return box[:4], box[4:] or list(body_box(box))


def explain_film(path: Path, boxes: Path, checkpoint: Path | str, out: Path, *, method: Method) -> None:
    """Mark a film by the detector of a checkpoint: writes ``<name>.mp4``, and its tracks as JSON lines.

    Raises ValueError or OSError for a checkpoint of another network, and as :func:`explain_video`.
    """
    model, _ = load_checkpoint(checkpoint)
    if not isinstance(model, ActiveSpeaker):
        raise ValueError(  # noqa: TRY004 (the file is wrong, not its type)
            f"{checkpoint}: no detector of speakers; other networks go with `selib explain`"
        )
    if not attached(model):
        attach_se(model, model.example(), at=model.sites)
    name = f"{path.stem}.mp4"
    if path.resolve() == (out / name).resolve():
        raise ValueError(f"{path} would be overwritten by the marked film: name another --out")
    people = explain_video(model, path, boxes, out / name, method=method)
    lines = [json.dumps({"video": path.name, "overlay": name, **row}) + "\n" for row in people]
    write_text(out / "explanations.jsonl", "".join(lines))
    for row in people:
        print(f"{path}: {row['entity']} speaks in {row['speaking']:.0%} of {row['frames']} frames")


def explain_video(
    model: ActiveSpeaker,
    path: str | Path,
    boxes: str | Path,
    out: str | Path,
    *,
    method: Method = "influence",
    window: int = WINDOW,
) -> list[dict[str, Any]]:
    """Who speaks in a video, and why: writes it as MP4 with boxes, probabilities, heatmaps and its sound.

    Args:
        model: a detector of :mod:`studies.networks.detector` with SE blocks "face", "body" and "fusion".
        path: a video with sound.
        boxes: a CSV whose first line names its columns: frame_timestamp (seconds), x1, y1, x2, y2, entity,
            and body_x1 to body_y2 where the bodies are known; or AVA's names, entity_box_x1 … and
            entity_id. The coordinates are fractions of the frame when none of the file exceeds 2, else
            pixels. Boxes may leave the frame, but not altogether. Unknown bodies are looked for around and
            below their faces. Between two boxes of a person the way is straight; where they are more than
            0.25 s apart, the frames between stay as they are.
        out: the MP4 to write, whole or not at all.
        window: frames that the model sees at once; longer tracks are cut evenly, heatmaps scaled over a cut.

    Returns:
        For every track {"entity", "start", "stop" (seconds), "frames", "speaking" (share of its frames),
        "probability" (mean), "shares" {modality: share of influence}, "seconds" [T], "probabilities" [T]}.

    Raises:
        ValueError: a box or time that the video does not have, a track of fewer than 5 frames, no sound, or a
            damaged file; it names the file, and the line.
    """
    path, boxes, out = Path(path), Path(boxes), Path(out)
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"{out}: the marked film is an .mp4")
    wave = video.read_audio(path)
    height, width = next(video.read_frames(path))[1].shape[:2]
    tracks = _read_tracks(boxes, width, height)
    length = _cut_out(path, boxes, tracks, [name for name in model.modalities if name != "audio"])
    heard = wave if "audio" in model.modalities else None
    with SEExplainer(model) as explainer:
        for track in tracks:
            _explain(explainer, track, heard, method, window)
            track.crops.clear()  # only the maps are needed from here on
    frames = (frame for _, frame in video.read_frames(path, fps=FPS))
    video.write(out, annotate(frames, (_marks(tracks, k) for k in range(length))), fps=FPS, audio=wave)
    return [_summary(track) for track in tracks]


def _read_tracks(path: Path, width: int, height: int) -> list[Track]:
    """The tracks of a CSV of boxes, in pixels of a frame of this size."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    people: dict[str, list[tuple[float, list[float], int]]] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = [_plain_name(name) for name in reader.fieldnames or []]
        reader.fieldnames = names
        wanted = [*FACE, *BODY] if set(BODY) & set(names) else FACE
        missing = [name for name in ("frame_timestamp", *wanted, "entity") if name not in names]
        if missing:
            raise ValueError(
                f"{path}: line 1: no column {', '.join(missing)}: the first line names the columns"
            )
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: other fields than the {len(names)} that the first line names")
            seconds, *box = [_number(row[name], name, where) for name in ("frame_timestamp", *wanted)]
            if seconds < 0:
                raise ValueError(f"{where}: frame_timestamp {seconds:g} is before the video")
            people.setdefault(row["entity"].strip(), []).append((seconds, box, reader.line_num))
    if not people:
        raise ValueError(f"{path}: holds no boxes")
    tracks = [track for name, rows in people.items() for track in _tracks(path, name, rows)]
    fractions = max(track.boxes.max() for track in tracks) <= 2
    for track in tracks:
        if fractions:
            track.boxes *= np.tile([width, height], track.boxes.shape[1] // 2)
        for line, box in zip(track.lines, track.boxes.tolist(), strict=True):
            try:
                for start in range(0, len(box), 4):
                    check_box(box[start : start + 4], width, height)
            except ValueError as error:
                raise ValueError(f"{path}: line {line}: {error}") from None
    return tracks


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


def _tracks(path: Path, entity: str, rows: list[tuple[float, list[float], int]]) -> Iterator[Track]:
    """One person's boxes (seconds, box, line), cut where there is a gap."""
    rows.sort(key=lambda row: row[0])
    cuts = [0]
    for place, ((before, _, first), (after, _, second)) in enumerate(pairwise(rows), 1):
        if before == after:
            line, other = max(first, second), min(first, second)
            raise ValueError(
                f"{path}: line {line}: a second box of {entity} at {after:g} s: see line {other}"
            )
        if after - before > GAP:
            cuts.append(place)
    for start, stop in pairwise([*cuts, len(rows)]):
        seconds, boxes, lines = zip(*rows[start:stop], strict=True)
        track = Track(entity, np.array(seconds), np.array(boxes), list(lines))
        if len(track.frames) < SHORTEST:
            said = f"only {len(track.frames)} frames of {entity} without a gap of more than {GAP} s"
            remedy = f"add boxes around {seconds[0]:g} s, or leave these out"
            raise ValueError(f"{path}: line {lines[0]}: {said}: {remedy}")
        yield track


def _cut_out(path: Path, boxes: Path, tracks: list[Track], streams: list[str]) -> int:
    """The crops of every track, in one pass over the video; returns how many frames it has."""
    length = 0
    for track in tracks:
        track.crops = {name: [] for name in streams}
    for k, (_, frame) in enumerate(video.read_frames(path, fps=FPS)):
        length = k + 1
        for track in tracks:
            if k in track.frames:
                face, body = track.boxes_at(k)
                for name, crops in track.crops.items():
                    crops.append(crop(frame, face if name == "face" else body))
    for track in tracks:
        for seconds, line in zip(track.seconds, track.lines, strict=True):
            if round(seconds * FPS) > length:
                said = f"is beyond the end of {path.name}, which lasts {length / FPS:.2f} s"
                raise ValueError(f"{boxes}: line {line}: frame_timestamp {seconds:g} {said}")
        track.frames = range(track.frames.start, min(track.frames.stop, length))
    return length


def _explain(
    explainer: SEExplainer, track: Track, wave: NDArray[np.int16] | None, method: Method, window: int
) -> None:
    """Probabilities, heatmaps and shares of a track, in even pieces that the model sees at once."""
    total = len(track.frames)
    said: list[NDArray[Any]] = []
    maps: dict[str, list[NDArray[np.uint8]]] = {}
    edges = np.linspace(0, total, max(1, math.ceil(total / window)) + 1).round().astype(int)
    for first, last in pairwise(edges.tolist()):
        ex = explainer(_inputs(track, wave, first, last))
        said.append(probability(ex.logits[0]))
        for name in track.crops:
            if name in ex.streams:
                maps.setdefault(name, []).append(plot.pixels(ex.streams[name].heatmap(method, 0)[0]))
        if "fusion" in ex.streams:
            found = ex.streams["fusion"].modalities(0)
            for name, share in zip(found.names, found.share[0].tolist(), strict=True):
                track.shares[name] = track.shares.get(name, 0.0) + share * (last - first) / total
    track.probability = np.concatenate(said)
    track.maps = {name: np.concatenate(parts) for name, parts in maps.items()}


def _inputs(track: Track, wave: NDArray[np.int16] | None, first: int, last: int) -> dict[str, Tensor]:
    """What the model takes, a batch of one: the frames of a track from ``first`` to ``last``."""
    inputs = {
        name: torch.from_numpy(np.stack(crops[first:last])).float()[None] / 255
        for name, crops in track.crops.items()
    }
    if wave is not None:
        start, stop = ((track.frames.start + place) * video.RATE // FPS for place in (first, last))
        heard = np.zeros(stop - start, np.int16)  # where the sound ends before the picture: silence
        part = wave[start:stop]
        heard[: len(part)] = part
        inputs["audio"] = mfcc_of_frames(heard, last - first)[None]
    return inputs


def _marks(tracks: list[Track], frame: int) -> list[Mark]:
    """What is drawn into a frame of the film."""
    marks = []
    for track in tracks:
        if frame in track.frames:
            face, body = track.boxes_at(frame)
            t = frame - track.frames.start
            maps = {name: clip[t] for name, clip in track.maps.items()}
            seen = body if "body" in maps else None
            said = float(track.probability[t])
            marks.append(Mark(face, said, maps.get("face"), seen, maps.get("body"), track.entity))
    return marks


def _summary(track: Track) -> dict[str, Any]:
    return {
        "entity": track.entity,
        "start": track.frames.start / FPS,
        "stop": track.frames.stop / FPS,
        "frames": len(track.frames),
        "speaking": float((track.probability > 0.5).mean()),
        "probability": float(track.probability.mean()),
        "shares": track.shares,
        "seconds": [frame / FPS for frame in track.frames],
        "probabilities": track.probability.tolist(),
    }
