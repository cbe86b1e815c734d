"""AVA-ActiveSpeaker from raw videos: crops and sound of every annotated face, in the layout of TalkNet."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from selib.video import frame_rate, read_audio, read_frames
from studies.audio import RATE
from studies.data import talknet
from studies.data.cache import shown
from studies.data.crops import body_box, crop
from studies.data.lists import read_lines, refuse
from studies.data.talknet import AVA_ADDRESS, COLUMNS, LABELS, SPLITS, ClipInfo, is_name

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg")
Edges = tuple[float, float, float, float]  # x1, y1, x2, y2 of a box


class _Box(NamedTuple):
    """One row of the official annotations; edges from 0 to 1 across and down the frame."""

    video: str
    time: float
    edges: Edges
    label: str
    entity: str
    row: tuple[str, ...]  # as it was written


def prepare(folder: Path, out: Path) -> None:
    """Cut raw annotated videos into TalkNet's layout, at `out`: there whole at the end, or not at all.

    folder: holds, in it or below, videos <video_id>.mp4, .mkv, .webm … and annotations: csv files with the
    official columns (video_id, frame_timestamp in seconds, entity_box_x1 … y2 from 0 to 1, label, entity_id;
    further ones are not read), with titles or without. The path of a csv names its split, "train", "val" or
    "test".

    A face is what lies in its box in the frame nearest to the timestamp. Nobody annotated AVA's bodies:
    `studies.data.crops.body_box` says where one is looked for. The sound runs from the first to one frame
    beyond the last timestamp (TalkNet stops at the last). The rate of a video's clips is that of its
    annotations, or its own where the two agree within 5 %.

    Raises FileNotFoundError for a missing video, ValueError for a damaged one and for a wrong row, with file
    and line, FileExistsError when `out` is there.
    """
    if out.exists():
        raise FileExistsError(f"{out}: already there; delete it to prepare it anew")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; it should hold the videos and their annotations")
    splits = _annotations(folder)
    files = _find_videos(folder, sorted({video for rows in splits.values() for video in rows}))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        made = Path(temporary) / out.name
        for split, by_video in splits.items():
            clips: list[tuple[ClipInfo, list[_Box]]] = []
            for video, lines in tqdm(sorted(by_video.items()), f"prepare {out.name} {split}", leave=False):
                boxes = [_box(line) for line in lines]
                clips += _cut(files[video], made, split, boxes, first=len(clips))
            rows = [[box.row for box in track] for _, track in clips]
            talknet.write_lists(made, split, [info for info, _ in clips], rows)
        os.replace(made, out)


def _annotations(folder: Path) -> dict[str, dict[str, list[str]]]:
    """{split: {video: its rows}}, all of them checked; as text, since AVA has 3.6 million of them."""
    files = sorted(folder.rglob("*.csv"))
    if not files:
        raise FileNotFoundError(
            f"{folder}: holds no csv file; put the official annotations there, from {AVA_ADDRESS}"
        )
    found: dict[str, dict[str, list[str]]] = {}
    known: dict[str, tuple[str, set[str]]] = {}  # of every entity the video and the names of its crops
    remedy = "mend the row or take it out"
    for file in files:
        named = [split for split in SPLITS if split in str(file.relative_to(folder)).lower()]
        if len(named) != 1:
            which = f"must say which of {', '.join(SPLITS)} it is"
            raise ValueError(f"{file}: its name {which}; rename it or take it out")
        rows = found.setdefault(named[0], {})
        for number, line in enumerate(read_lines(file, remedy), 1):
            if number == 1 and line.startswith("video_id,"):
                if tuple(line.split(",")[: len(COLUMNS)]) != COLUMNS:
                    refuse(file, 1, f"expected the columns {','.join(COLUMNS)}, found {line[:80]!r}", remedy)
                continue
            try:
                box = _box(line)
            except ValueError as why:
                refuse(file, number, str(why), remedy)
            video, names = known.setdefault(box.entity, (box.video, set()))
            name = f"{box.time:.2f}"
            if video != box.video:
                refuse(
                    file, number, f"{box.entity} is in video {box.video} here and in {video} before", remedy
                )
            if name in names:
                refuse(file, number, f"a second box of {box.entity} at {name} s", remedy)
            names.add(name)
            rows.setdefault(video, []).append(line)
    return found


def _box(line: str) -> _Box:
    row = tuple(field.strip() for field in line.split(",")[: len(COLUMNS)])
    try:
        video, *numbers, label, entity = row
        time, x1, y1, x2, y2 = map(float, numbers)
    except ValueError:
        raise ValueError(f"expected {','.join(COLUMNS)}, found {line[:80]!r}") from None
    if not is_name(video) or not is_name(entity):
        raise ValueError(f"{video!r} or {entity!r} cannot be the name of a file")
    if not 0 <= time < math.inf:
        raise ValueError(f"the timestamp {time} is not one")
    if not (max(x1, 0) < min(x2, 1) and max(y1, 0) < min(y2, 1)):
        raise ValueError(f"the box {', '.join(row[2:6])} has no area within 0 to 1")
    if label not in LABELS:
        raise ValueError(f"the label {label[:80]!r} is none of {', '.join(LABELS)}")
    return _Box(video, time, (x1, y1, x2, y2), label, entity, row)


def _find_videos(folder: Path, wanted: Sequence[str]) -> dict[str, Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    there: dict[str, Path] = {}
    for file in sorted(file for file in files if not file.name.startswith(".")):
        if (other := there.setdefault(file.stem, file)) != file:
            raise ValueError(f"{file}: {other} is a video of that name too; take one of them away")
    if absent := [name for name in wanted if name not in there]:
        count = f"{len(absent)} of the {len(wanted)} annotated videos are missing"
        remedy = f"fetch them from {AVA_ADDRESS} or take their rows out of the annotations"
        raise FileNotFoundError(f"{folder}: {count}: {shown(absent)}; {remedy}")
    return there


def _cut(
    file: Path, made: Path, split: str, boxes: list[_Box], first: int
) -> list[tuple[ClipInfo, list[_Box]]]:
    """Write the sound and the crops of every clip of a video; returns what the lists say of them."""
    boxes = sorted(boxes, key=lambda box: (box.entity, box.time))
    tracks = [list(track) for _, track in groupby(boxes, key=lambda box: box.entity)]
    fps = _rate(file, tracks)
    samples = read_audio(file)
    clips: dict[str, tuple[ClipInfo, list[_Box]]] = {}
    for row, track in enumerate(tracks, first):
        entity, last = track[0].entity, track[-1].time
        labels = np.array([box.label == LABELS[1] for box in track], np.uint8)
        info = ClipInfo(entity, track[0].video, fps, labels, row)
        start, stop = round(track[0].time * RATE), round((last + 1 / fps) * RATE)
        heard = samples[start:stop]
        if 2 * len(heard) < stop - start:
            ends = f"its sound ends at {len(samples) / RATE:.2f} s"
            raise ValueError(f"{file}: {ends}, and {entity} is annotated to {last:.2f} s")
        talknet.write_wave(talknet.clip_path(made, "audio", split, info), heard)
        clips[entity] = info, track
    for box, frame in _seen(file, sorted(boxes, key=lambda box: box.time), 1 / fps):
        info, _ = clips[box.entity]
        height, width = frame.shape[:2]
        x1, y1, x2, y2 = box.edges
        around = crop(frame, body_box((x1 * width, y1 * height, x2 * width, y2 * height)))
        for stream, picture in (("face", _inside(frame, box.edges)), ("body", around)):
            talknet.write_crop(talknet.clip_path(made, stream, split, info), box.time, picture)
    return list(clips.values())


def _rate(file: Path, tracks: Sequence[Sequence[_Box]]) -> float:
    own, steps = frame_rate(file), sum(len(track) - 1 for track in tracks)
    if not steps:
        return own
    annotated = steps / sum(track[-1].time - track[0].time for track in tracks)
    return own if abs(annotated / own - 1) < 0.05 else annotated


def _seen(file: Path, boxes: Sequence[_Box], step: float) -> Iterator[tuple[_Box, np.ndarray]]:
    """Each box, in order of time, with the frame nearest to it."""
    place, before, frame_before = 0, 0.0, None
    for time, frame in read_frames(file, start=max(0.0, boxes[0].time - 1)):
        while frame_before is not None and place < len(boxes) and boxes[place].time < (before + time) / 2:
            yield boxes[place], frame_before
            place += 1
        before, frame_before = time, frame
        if place == len(boxes):
            return
    for box in boxes[place:]:
        if frame_before is None or box.time > before + 1.5 * step:
            annotated = f"{box.entity} is annotated at {box.time:.2f} s"
            raise ValueError(f"{file}: ends at {before:.2f} s, and {annotated}")
        yield box, frame_before


def _inside(frame: np.ndarray, edges: Edges) -> np.ndarray:
    """The part of a frame (H, W, 3) in a box, as far as the frame goes; at least one pixel."""
    height, width = frame.shape[:2]
    left, right = (min(max(int(edge * width), 0), width) for edge in (edges[0], edges[2]))
    top, bottom = (min(max(int(edge * height), 0), height) for edge in (edges[1], edges[3]))
    left, top = min(left, width - 1), min(top, height - 1)
    return frame[top : max(bottom, top + 1), left : max(right, left + 1)]
