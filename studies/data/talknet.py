"""Clips in TalkNet's layout (Tao et al., 2021), with bodies as BIAS and WASD have them: read strictly,
written.
"""

from __future__ import annotations

import csv
import json
import math
import os
import wave
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np

from studies.audio import RATE
from studies.data.cache import decode
from studies.data.crops import fit_square
from studies.data.lists import read_lines, read_scenes, refuse
from studies.twins.speakers import CONDITIONS, SIDE, Params

AVA_ADDRESS = "https://github.com/cvdfoundation/ava-dataset"
WASD_ADDRESS = "https://github.com/Tiago-Roxo/WASD"
SPLITS = ("train", "val", "test")
FOLDERS = {"audio": "clips_audios", "face": "clips_videos", "body": "clips_videos_body"}
MASKS = {"face": "clips_masks", "body": "clips_masks_body"}  # of the twin
LABELS = (
    "NOT_SPEAKING",
    "SPEAKING_AUDIBLE",
    "SPEAKING_NOT_AUDIBLE",
)  # at their label_id; the second is a yes
BOX = ("entity_box_x1", "entity_box_y1", "entity_box_x2", "entity_box_y2")
COLUMNS = ("video_id", "frame_timestamp", *BOX, "label", "entity_id")
KEPT = (
    2 * 2**30
)  # bytes of pictures and sound that a set keeps; what is beyond is decoded whenever it is read

Pictures = dict[str, np.ndarray]  # by stream, uint8 (T, 112, 112)


@dataclass(frozen=True, eq=False)
class ClipInfo:
    """What the lists say of a clip: one person over some time.

    labels: uint8 (T,), 1 where the person speaks and is heard; row: the clip's place in its list, from 0;
    condition: one of WASD's five, None where nothing says it.
    """

    entity: str
    video: str
    fps: float
    labels: np.ndarray
    row: int
    condition: str | None = None

    @property
    def frames(self) -> int:
        return len(self.labels)


def open_split(name: str, place: Path, split: str) -> tuple[list[ClipInfo], Files]:
    """The clips of a split, and where their pictures and sound are read.

    Raises FileNotFoundError without a list, ValueError with file and line for what is wrong in one.
    """
    if name != "synth-speakers":
        again = f"prepare {name} again"
        infos = _read_lists(place, split, again)
        infos = _with_conditions(place / "csv" / "wasd_metadata.csv", infos)
        return infos, Files(place, split, f"{again}, take the clip out of its list")
    again = f"delete {place} and run `studies data make synth-speakers`"
    infos, file = _read_lists(place, split, again), place / f"{split}.jsonl"
    scenes = read_scenes(file, ("entity", "params"), again)
    if [scene["entity"] for scene in scenes] != [info.entity for info in infos]:
        raise ValueError(f"{file}: does not name the clips of the list in their order; {again}")
    params = [scene["params"] for scene in scenes]
    infos = [replace(i, condition=p["condition"]) for i, p in zip(infos, params, strict=True)]
    return infos, Files(place, split, again, params)


def _read_lists(place: Path, split: str, remedy: str) -> list[ClipInfo]:
    """The clips of csv/<split>_loader.csv, each with its video from csv/<split>_orig.csv."""
    file = place / "csv" / f"{split}_loader.csv"
    lines = read_lines(file, remedy)
    if not lines:
        raise ValueError(f"{file}: is empty; {remedy}")
    videos = _two_columns(place / "csv" / f"{split}_orig.csv", "entity_id", "video_id", remedy)
    found: dict[str, ClipInfo] = {}
    for row, line in enumerate(lines):
        try:
            entity, fps, labels = _loader_line(line)
        except ValueError as why:
            refuse(file, row + 1, str(why), remedy)
        if entity in found:
            refuse(file, row + 1, f"names {entity} again, after line {found[entity].row + 1}", remedy)
        if entity not in videos:
            refuse(file, row + 1, f"{split}_orig.csv has no {entity}", remedy)
        for name in (entity, videos[entity]):
            if not is_name(name):
                refuse(file, row + 1, f"{name[:80]!r} cannot be the name of a file", remedy)
        found[entity] = ClipInfo(entity, videos[entity], fps, labels, row)
    return list(found.values())


def _loader_line(line: str) -> tuple[str, float, np.ndarray]:
    """Entity, frames a second and labels of `entity<TAB>frames<TAB>fps<TAB>[0, 1, …]<TAB>index`."""
    try:
        entity, frames, fps, listed, index = (field.strip() for field in line.split("\t"))
        count, rate, labels, _ = int(frames), float(fps), json.loads(listed), int(index)
    except ValueError:
        wanted = "entity, frames, fps, [labels] and index between tabs"
        raise ValueError(f"expected {wanted}, found {line[:80]!r}") from None
    if not 0 < rate < math.inf:
        raise ValueError(f"{entity} has {fps} frames a second, not a number above 0")
    if not isinstance(labels, list) or any(label not in (0, 1) for label in labels):
        raise ValueError(f"the labels of {entity} are not a list of 0 and 1")
    if not 0 < count == len(labels):
        raise ValueError(
            f"{entity} has {len(labels)} labels for {count} frames, not one for each of at least 1"
        )
    return entity, rate, np.array(labels, np.uint8)


def is_name(text: str) -> bool:
    """Whether it can be the name of a file, and of one that lies where it should."""
    return text not in ("", ".", "..") and not set(text) & set("/\\\0")


def _two_columns(file: Path, key: str, value: str, remedy: str) -> dict[str, str]:
    """Two columns of a csv with titles, {key: value}. A key that comes again must have the same value."""
    rows = csv.reader(read_lines(file, remedy))
    titles = [title.strip(" \ufeff") for title in next(rows, [])]
    if absent := [title for title in (key, value) if title not in titles]:
        refuse(file, 1, f"has no column {absent[0]}, but {', '.join(titles)[:80]}", remedy)
    key_at, value_at = titles.index(key), titles.index(value)
    found: dict[str, str] = {}
    for row in rows:
        if len(row) != len(titles):
            refuse(file, rows.line_num, f"has {len(row)} values for {len(titles)} columns", remedy)
        name, told = row[key_at].strip(), row[value_at].strip()
        if found.setdefault(name, told) != told:
            refuse(file, rows.line_num, f"{value} of {name} is {told} here and {found[name]} before", remedy)
    return found


def _with_conditions(file: Path, infos: list[ClipInfo]) -> list[ClipInfo]:
    """The clips with the conditions that WASD's metadata give their videos; as they are without that file."""
    if not file.is_file():
        return infos
    remedy = f"take it from {WASD_ADDRESS} again or delete it"
    listed = _two_columns(file, "Video", "Category", remedy)
    conditions = {str(number): name for number, name in enumerate(CONDITIONS)}  # in WASD's order
    for video in {info.video for info in infos}:
        if listed.get(video) not in conditions:
            raise ValueError(
                f"{file}: video {video} has the category {listed.get(video)}, not 0 to 4; {remedy}"
            )
    return [replace(info, condition=conditions[listed[info.video]]) for info in infos]


class Files:
    """Pictures and sound of the clips of a list. What is read is kept, up to `KEPT` bytes.

    drawn: of the twin, the parameters of each clip.
    """

    def __init__(self, place: Path, split: str, remedy: str, drawn: list[Params] | None = None) -> None:
        self.place, self.split, self.remedy, self.drawn = place, split, remedy, drawn
        self.kept: dict[tuple[int, str], np.ndarray] = {}
        self.room = KEPT

    def read(self, info: ClipInfo, stream: str) -> np.ndarray:
        """The sound of a clip, int16 (N,) at 16 kHz, or its faces or bodies, grey uint8 (T, 112, 112)."""
        key = info.row, stream
        if key in self.kept:
            return self.kept[key]
        found = self._sound(info) if stream == "audio" else self._pictures(info, stream)
        if found.nbytes <= self.room:
            self.room -= found.nbytes
            self.kept[key] = found
        return found

    def check(self, info: ClipInfo, streams: Sequence[str]) -> None:
        """Raise where a clip has no sound file, or fewer crops than frames."""
        for stream in streams:
            self._path(info, stream) if stream == "audio" else self._crops(info, stream)

    def masks(self, info: ClipInfo) -> Pictures:
        self.params(info)  # refuses what was filmed
        found = {}
        for stream in MASKS:
            file = mask_path(self.place, stream, self.split, info)
            try:
                parts = decode(file, (info.frames * SIDE, SIDE), None, "P")
            except FileNotFoundError:
                raise FileNotFoundError(f"{file}: no such file; {self.remedy}") from None
            except ValueError as why:
                raise ValueError(f"{file}: {why}; {self.remedy}") from None
            found[stream] = parts.reshape(info.frames, SIDE, SIDE)
        return found

    def params(self, info: ClipInfo) -> Params:
        if self.drawn is None:
            raise ValueError(f"{self.place.name} was filmed: only synth-speakers has masks and parameters")
        return self.drawn[info.row]

    def mark(self, info: ClipInfo) -> str:
        """For the fingerprint: the size of the sound file."""
        file = clip_path(self.place, "audio", self.split, info)
        return str(file.stat().st_size) if file.is_file() else ""

    def _path(self, info: ClipInfo, stream: str) -> Path:
        path = clip_path(self.place, stream, self.split, info)
        if not path.exists():
            remedy = f"{self.remedy}, or leave {stream!r} out of streams="
            raise FileNotFoundError(f"{path}: not there, though {self._line(info)} names it; {remedy}")
        return path

    def _line(self, info: ClipInfo) -> str:
        return f"{self.place / 'csv' / self.split}_loader.csv:{info.row + 1}"

    def _crops(self, info: ClipInfo, stream: str) -> list[str]:
        """The names of a clip's crops by time, one for each frame; further ones are not used."""
        folder = self._path(info, stream)
        times = {}
        for name in os.listdir(folder):
            if name.endswith(".jpg") and not name.startswith("."):
                try:
                    times[name] = float(name.removesuffix(".jpg"))
                except ValueError:
                    why = "crops are named by their time in seconds"
                    raise ValueError(f"{folder / name}: {why}; {self.remedy}") from None
        if len(times) < info.frames:
            fewer = f"{len(times)} crops, fewer than the {info.frames} frames of {self._line(info)}"
            raise ValueError(f"{folder}: {fewer}; {self.remedy}")
        return sorted(times, key=times.__getitem__)[: info.frames]

    def _sound(self, info: ClipInfo) -> np.ndarray:
        file = self._path(info, "audio")
        samples = _read_wave(file)
        lasts, wanted = len(samples) / RATE, (info.frames - 1) / info.fps
        if lasts < wanted / 2:  # a film may end in silence, and TalkNet cuts a frame too little
            fewer = f"{lasts:.2f} s of sound for {wanted:.2f} s of pictures ({self._line(info)})"
            raise ValueError(f"{file}: {fewer}; {self.remedy}")
        return samples

    def _pictures(self, info: ClipInfo, stream: str) -> np.ndarray:
        found = []
        for name in self._crops(info, stream):
            file = clip_path(self.place, stream, self.split, info) / name
            try:
                found.append(fit_square(decode(file, None, None, "L")[0], SIDE))
            except ValueError as why:
                raise ValueError(f"{file}: {why}; {self.remedy}") from None
        return np.stack(found)


def _read_wave(file: Path) -> np.ndarray:
    """A WAV file of one channel, 16 bits, 16 kHz: int16 (N,). ValueError names the file."""
    try:
        with wave.open(str(file), "rb") as opened:
            channels, width, rate, count = opened.getparams()[:4]
            data = opened.readframes(count)
        found = f"{channels} channels, {8 * width} bits, {rate} Hz"
    except (wave.Error, EOFError) as error:
        found = str(error) or "ends early"
    if found != f"1 channels, 16 bits, {RATE} Hz":
        remedy = "convert it: ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le"
        raise ValueError(f"{file}: not a WAV file of one channel, 16 bits, {RATE} Hz ({found}); {remedy}")
    if len(data) < 2 * count:
        raise ValueError(f"{file}: cut short: {len(data) // 2} of {count} samples; prepare it again")
    return np.frombuffer(data, "<i2").astype(np.int16)


def clip_path(place: Path, stream: str, split: str, info: ClipInfo) -> Path:
    """Where the sound of a clip lies, or the folder of its crops."""
    suffix = ".wav" if stream == "audio" else ""
    return place / FOLDERS[stream] / split / info.video / f"{info.entity}{suffix}"


def mask_path(place: Path, stream: str, split: str, info: ClipInfo) -> Path:
    return place / MASKS[stream] / split / info.video / f"{info.entity}.png"


def write_wave(file: Path, samples: np.ndarray) -> None:
    """Sound int16 (N,) at 16 kHz; folders are made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as opened:
        opened.setparams((1, 2, RATE, 0, "NONE", ""))
        opened.writeframes(samples.astype("<i2").tobytes())


def write_crop(folder: Path, time: float, frame: np.ndarray) -> None:
    """A crop, grey or RGB, as the JPEG <time>.jpg; folders are made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    bgr = frame if frame.ndim == 2 else frame[:, :, ::-1]
    _, coded = cv2.imencode(".jpg", np.ascontiguousarray(bgr), [cv2.IMWRITE_JPEG_QUALITY, 95])
    (folder / f"{time:.2f}.jpg").write_bytes(coded.tobytes())


def write_lists(
    place: Path, split: str, infos: Sequence[ClipInfo], rows: Sequence[Sequence[tuple[str, ...]]]
) -> None:
    """csv/<split>_loader.csv and csv/<split>_orig.csv; rows: the official columns of each clip's frames."""
    listed = []
    for info in infos:
        fields = (info.entity, info.frames, info.fps, info.labels.tolist(), info.row)
        listed.append("\t".join(str(field) for field in fields))
    write_lines(place / "csv" / f"{split}_loader.csv", listed)
    lines = [",".join([*COLUMNS, "label_id", "instance_id"])]
    for clip in rows:
        runs = groupby(clip, key=lambda row: row[COLUMNS.index("label")])
        for instance, (label, run) in enumerate(runs):
            lines += [",".join([*row, str(LABELS.index(label)), f"{row[-1]}:{instance}"]) for row in run]
    write_lines(place / "csv" / f"{split}_orig.csv", lines)


def write_lines(file: Path, lines: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
