"""AVA-ActiveSpeaker from raw videos: the crops and the sound of every annotated face, in the layout that TalkNet reads."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from selib.video import frame_rate, read_audio, read_frames
from studies.data.cache import SHOWN
from studies.data.crops import body_box, crop
from studies.data.speakers import (
    AVA_ADDRESS,
    COLUMNS,
    LABELS,
    RATE,
    SPLITS,
    ClipInfo,
    Refused,
    is_name,
    place_of,
    read_lines,
    refusal,
    shortened,
    write_crop,
    write_lists,
    write_wave,
)

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg")
Edges = tuple[float, float, float, float]  # x1, y1, x2, y2 of a box


@dataclass(frozen=True, slots=True)
class _Box:
    """One row of the official annotations; edges from 0 to 1 across and down the frame."""

    time: float
    edges: Edges
    row: tuple[str, ...]  # as it was written

    @property
    def entity(self) -> str:
        return self.row[-1]


def prepare(videos: str | Path, boxes_csv: str | Path, out: str | Path) -> None:
    """Cut raw annotated videos into TalkNet's layout, at `out`: there whole at the end, or not at all.

    videos: a folder with <video_id>.mp4, .mkv, .webm …, in it or below; boxes_csv: a csv, or a folder with nothing but such
    csv files in it or below. Their columns are the official ones (video_id, frame_timestamp in seconds, entity_box_x1 … y2
    from 0 to 1, label, entity_id; any further are not read), with their titles or, as AVA ships one for each video, without.
    A csv belongs to the split that its path names, "train", "val" or "test".

    A face is what lies in its box in the frame nearest to the timestamp. Nobody annotated AVA's bodies:
    `studies.data.crops.body_box` says where one is looked for, and its crop is what `selib.video.crop` makes of that. The sound
    runs from the first to one frame beyond the last timestamp (TalkNet stops at the last). The rate of a video's clips is
    that of its annotations, or its own where the two agree within 5 %.

    Raises FileNotFoundError for a missing video, ValueError for a damaged one and for a row that is wrong, with file and
    line, FileExistsError when `out` is there.
    """
    videos, boxes_csv, out = Path(videos), Path(boxes_csv), Path(out)
    if out.exists():
        raise FileExistsError(f"{out}: already there; delete it to prepare it anew")
    if not videos.is_dir():
        raise FileNotFoundError(f"{videos}: no such folder; it should hold the videos")
    splits = _annotations(boxes_csv)
    files = _find_videos(videos, sorted({video for lines in splits.values() for video in lines}))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        made = Path(temporary) / out.name
        total = sum(len(lines) for lines in splits.values())
        with tqdm(total=total, desc=f"prepare {out.name}", unit="video", leave=False) as bar:
            for split, by_video in splits.items():
                infos: list[ClipInfo] = []
                rows: list[list[tuple[str, ...]]] = []
                for video, lines in sorted(by_video.items()):
                    for info, track in _cut(files[video], made, split, video, [_box(line) for line in lines]):
                        infos.append(replace(info, index=len(infos)))
                        rows.append([box.row for box in track])
                    bar.update()
                write_lists(made, split, infos, rows)
        os.replace(made, out)


def _annotations(place: Path) -> dict[str, dict[str, list[str]]]:
    """The rows of each video in each split, all of them checked; as text, since AVA has 3.6 million of them."""
    if not place.exists():
        raise FileNotFoundError(
            f"{place}: no such file or folder; it should hold the annotations, as csv files"
        )
    files = [place] if place.is_file() else sorted(place.rglob("*.csv"))
    if not files:
        raise FileNotFoundError(
            f"{place}: holds no csv file; put the official annotations there, from {AVA_ADDRESS}"
        )
    found: dict[str, dict[str, list[str]]] = {}
    known: dict[str, tuple[str, set[str]]] = {}  # of every entity the video and the names of its crops
    remedy = "mend the row or take it out"
    for file in files:
        named = file.name if place.is_file() else str(file.relative_to(place))
        splits = [split for split in SPLITS if split in named.lower()]
        if len(splits) != 1:
            raise ValueError(
                f"{file}: its name must say which of {', '.join(SPLITS)} it is; rename it or take it out"
            )
        for number, line in enumerate(read_lines(file, "take it out or fetch it again"), 1):
            if number == 1 and line.startswith("video_id,"):
                if tuple(line.split(",")[: len(COLUMNS)]) != COLUMNS:
                    raise refusal(
                        file, 1, f"expected the columns {','.join(COLUMNS)}, found {shortened(line)}", remedy
                    )
                continue
            try:
                box = _box(line)
            except Refused as why:
                raise refusal(file, number, str(why), remedy) from None
            video, name = box.row[0], f"{box.time:.2f}"
            of, names = known.setdefault(box.entity, (video, set()))
            if of != video:
                raise refusal(
                    file, number, f"{box.entity} is in video {video} here and in {of} before", remedy
                )
            if name in names:
                raise refusal(file, number, f"a second box of {box.entity} at {name} s", remedy)
            names.add(name)
            found.setdefault(splits[0], {}).setdefault(video, []).append(line)
    return {split: found[split] for split in SPLITS if split in found}


def _box(line: str) -> _Box:
    row = tuple(field.strip() for field in line.split(",")[: len(COLUMNS)])
    try:
        time, *edges = (float(field) for field in row[1:6])
        x1, y1, x2, y2 = edges
    except ValueError:
        raise Refused(f"expected {','.join(COLUMNS)}, found {shortened(line)}") from None
    if len(row) < len(COLUMNS) or not is_name(row[0]) or not is_name(row[-1]):
        raise Refused(f"expected {','.join(COLUMNS)}, found {shortened(line)}")
    if not 0 <= time < math.inf:
        raise Refused(f"the timestamp {row[1]} is none")
    if not (max(x1, 0) < min(x2, 1) and max(y1, 0) < min(y2, 1)):
        raise Refused(f"the box {', '.join(row[2:6])} has no area within 0 to 1")
    if row[6] not in LABELS:
        raise Refused(f"the label {row[6][:80]!r} is none of {', '.join(LABELS)}")
    return _Box(time, (x1, y1, x2, y2), row)


def _find_videos(folder: Path, wanted: Sequence[str]) -> dict[str, Path]:
    there: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in VIDEO_SUFFIXES or file.name.startswith("."):
            continue
        if (other := there.setdefault(file.stem, file)) != file:
            raise ValueError(f"{file}: {other} is a video of that name too; take one of them away")
    if absent := [name for name in wanted if name not in there]:
        first = ", ".join(absent[:SHOWN]) + (", ..." if len(absent) > SHOWN else "")
        raise FileNotFoundError(
            f"{folder}: {len(absent)} of the {len(wanted)} annotated videos are missing: {first}; fetch them from "
            f"{AVA_ADDRESS} or take their rows out of the annotations"
        )
    return {name: there[name] for name in wanted}


def _cut(
    file: Path, made: Path, split: str, video: str, boxes: list[_Box]
) -> list[tuple[ClipInfo, list[_Box]]]:
    """Write the sound and the crops of every clip of a video; returns what the lists say of them."""
    boxes = sorted(boxes, key=lambda box: (box.entity, box.time))
    tracks = {entity: list(track) for entity, track in groupby(boxes, key=lambda box: box.entity)}
    fps = _rate(file, list(tracks.values()))
    clips = []
    samples = read_audio(file)
    for entity, track in tracks.items():
        labels = np.array([LABELS.index(box.row[6]) == 1 for box in track], np.uint8)
        info = ClipInfo(entity, video, len(track), fps, labels, 0)
        start, stop = round(track[0].time * RATE), round((track[-1].time + 1 / fps) * RATE)
        heard = samples[start:stop]
        if 2 * len(heard) < stop - start:
            raise ValueError(
                f"{file}: its sound ends at {len(samples) / RATE:.2f} s, and {entity} is annotated to {track[-1].time:.2f} s"
            )
        write_wave(place_of(made, "audio", split, info, ".wav"), heard)
        clips.append((info, track))
    folders = {
        info.entity: [place_of(made, stream, split, info) for stream in ("face", "body")] for info, _ in clips
    }
    for box, frame in _seen(file, sorted(boxes, key=lambda box: box.time), 1 / fps):
        faces, bodies = folders[box.entity]
        height, width = frame.shape[:2]
        around = body_box([edge * size for edge, size in zip(box.edges, (width, height) * 2, strict=True)])
        write_crop(faces / f"{box.time:.2f}.jpg", _inside(frame, box.edges))
        write_crop(bodies / f"{box.time:.2f}.jpg", crop(frame, around))
    return clips


def _rate(file: Path, tracks: Sequence[Sequence[_Box]]) -> float:
    own, steps = frame_rate(file), sum(len(track) - 1 for track in tracks)
    if not steps:
        return own
    annotated = steps / sum(track[-1].time - track[0].time for track in tracks)
    return own if abs(annotated / own - 1) < 0.05 else annotated


def _seen(file: Path, boxes: Sequence[_Box], step: float) -> Iterator[tuple[_Box, np.ndarray]]:
    """Each box, in order of time, with the frame nearest to it."""
    place, before, shown = 0, 0.0, None
    for time, frame in read_frames(file, start=max(0.0, boxes[0].time - 1)):
        while shown is not None and place < len(boxes) and boxes[place].time < (before + time) / 2:
            yield boxes[place], shown
            place += 1
        before, shown = time, frame
        if place == len(boxes):
            return
    for box in boxes[place:]:
        if shown is None or box.time > before + 1.5 * step:
            raise ValueError(
                f"{file}: ends at {before:.2f} s, and {box.entity} is annotated at {box.time:.2f} s"
            )
        yield box, shown


def _inside(frame: np.ndarray, edges: Edges) -> np.ndarray:
    """The part of a frame (H, W, 3) in a box, as far as the frame goes; at least one pixel."""
    height, width = frame.shape[:2]
    left, right = (min(max(int(edge * width), 0), width) for edge in (edges[0], edges[2]))
    top, bottom = (min(max(int(edge * height), 0), height) for edge in (edges[1], edges[3]))
    left, top = min(left, width - 1), min(top, height - 1)
    return frame[top : max(bottom, top + 1), left : max(right, left + 1)]
