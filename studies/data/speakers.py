"""Clips of people who speak or do not: AVA-ActiveSpeaker and WASD in TalkNet's layout, and their twin in the same files."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import wave as riff
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol, Self, cast

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from studies.audio import mfcc_of_frames
from studies.data.cache import cached, cores, decode, digest
from studies.data.crops import fit_square
from studies.data.imageset import Indices, identity, rows_of
from studies.data.objects import SPEAKERS, data_root, find
from studies.twins import faces as synth_faces
from studies.twins import speakers as synth

SPLITS = ("train", "val", "test")
STREAMS = ("audio", "face", "body")
RATE = 16000  # of the sound, in Hz
SIDE = 112  # of a face or body, in pixels
FOLDERS = {"audio": "clips_audios", "face": "clips_videos", "body": "clips_videos_body"}
MASKS = {"face": "clips_masks", "body": "clips_masks_body"}  # of the twin
LABELS = (
    "NOT_SPEAKING",
    "SPEAKING_AUDIBLE",
    "SPEAKING_NOT_AUDIBLE",
)  # at their label_id; the second alone is a yes
COLUMNS = (
    "video_id",
    "frame_timestamp",
    "entity_box_x1",
    "entity_box_y1",
    "entity_box_x2",
    "entity_box_y2",
    "label",
    "entity_id",
)
KEPT = (
    2 * 2**30
)  # bytes of decoded pictures and sound that a set keeps; what is beyond is decoded whenever it is read
AVA_ADDRESS = "https://github.com/cvdfoundation/ava-dataset"
WASD_ADDRESS = "https://github.com/Tiago-Roxo/WASD"

Pictures = dict[str, np.ndarray]  # by stream, uint8 (T, 112, 112)
Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ClipInfo:
    """What the lists say of a clip: one person over some time.

    frames: how many, T; fps: at what rate; labels: uint8 (T,), 1 where he or she speaks and is heard; index: its number in
    the list; condition: one of WASD's five, or None where nothing says it; kinds: uint8 (T,), index into
    `studies.twins.speakers.KINDS` of what is to be seen in a frame, of the twin only.
    """

    entity: str
    video: str
    frames: int
    fps: float
    labels: np.ndarray
    index: int
    condition: str | None = None
    kinds: np.ndarray | None = None


class _Source(Protocol):
    """Where the streams of the clips come from; rows are those of the list it was made from."""

    def wave(self, row: int) -> np.ndarray: ...

    def pictures(self, row: int, stream: str) -> np.ndarray: ...

    def masks(self, row: int) -> Pictures: ...

    def params(self, row: int) -> synth.Params: ...

    def mark(self, row: int) -> str: ...


@dataclass(eq=False, repr=False)
class SpeakerSet:
    """One split of AVA-ActiveSpeaker, WASD or their twin. The lists are in memory; pictures and sound are read when used.

    streams: those that a clip is given with, of "audio", "face" and "body"; clips: what is known of each; task: which
    stream tells, of the twin ("all" elsewhere); synthetic: True for the twin.
    """

    name: str
    split: str
    streams: tuple[str, ...]
    clips: list[ClipInfo]
    synthetic: bool
    task: str
    _source: _Source
    _rows: list[int]  # of the clips in the source

    def __len__(self) -> int:
        return len(self.clips)

    def __repr__(self) -> str:
        frames = sum(clip.frames for clip in self.clips)
        return f"SpeakerSet({self.name} {self.split}: {len(self)} clips of {frames:,} frames, {', '.join(self.streams)})"

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the lists and, of clips on disk, the sizes of the sound files; of rendered ones, how they are drawn."""
        found = hashlib.sha256()
        for clip, row in zip(self.clips, self._rows, strict=True):
            known = (clip.entity, clip.fps, clip.labels.tolist(), clip.condition, self._source.mark(row))
            found.update(repr(known).encode())
        return found.hexdigest()[:16]

    def subset(self, indices: Indices) -> Self:
        """The chosen clips, in that order, as a set of their own; what has been decoded is shared."""
        places = torch.arange(len(self))[rows_of(indices)].tolist()
        clips, rows = [self.clips[place] for place in places], [self._rows[place] for place in places]
        return replace(self, clips=clips, _rows=rows)

    def clip(self, i: int, start: int = 0, stop: int | None = None) -> Batch:
        """Frames start to stop of a clip as a batch of one: the streams (see `inputs`) and labels float32 (1, T)."""
        info = self.clips[i]
        stop = info.frames if stop is None else stop
        if not 0 <= start < stop <= info.frames:
            raise ValueError(
                f"{info.entity} has frames 0 to {info.frames}: start={start}, stop={stop} is none of them"
            )
        pictures = {
            stream: self.pictures(i, stream)[start:stop] for stream in self.streams if stream != "audio"
        }
        wave = self._heard(i, start, stop) if "audio" in self.streams else None
        return inputs(wave, pictures, frames=stop - start, fps=info.fps), _labels(info, start, stop)

    def wave(self, i: int) -> np.ndarray:
        """The sound of a clip, int16 (N,) at 16 kHz: about T / fps seconds, as the file holds it."""
        return self._source.wave(self._rows[i])

    def pictures(self, i: int, stream: str = "face") -> np.ndarray:
        """The faces or bodies of a clip, grey uint8 (T, 112, 112)."""
        if stream not in self.streams or stream == "audio":
            raise ValueError(
                f"{self.name} was loaded with the streams {', '.join(self.streams)}, not with {stream!r}"
            )
        return self._source.pictures(self._rows[i], stream)

    def masks(self, i: int) -> Pictures:
        """Which part each pixel shows, {"face": uint8 (T, 112, 112), "body": …}; ValueError unless it is the twin.

        1 + the index in `studies.twins.speakers.FACE_PARTS` or `BODY_PARTS`, 0 for the background.
        """
        return self._source.masks(self._rows[i])

    def params(self, i: int) -> synth.Params:
        """How the twin drew a clip, for `draw_clips`; ValueError for another set."""
        return self._source.params(self._rows[i])

    def loader(
        self,
        frames: int,
        *,
        train: bool = False,
        seed: int = 0,
        window: int | None = None,
        augment: bool = True,
    ) -> ClipLoader:
        """Batches of clips of about the same length, with about `frames` video frames each: see `ClipLoader`.

        augment=False trains on pictures and sound as they are.
        """
        return ClipLoader(_Batches(self, frames, train, seed, window, augment))

    def _heard(self, i: int, start: int, stop: int) -> np.ndarray:
        """The samples under some frames, int16, and those that the last rows of their coefficients reach into."""
        info = self.clips[i]
        per_frame = RATE / info.fps
        return self.wave(i)[round(start * per_frame) : round((stop + 0.375) * per_frame)]  # 15 of 40 ms


def _labels(info: ClipInfo, start: int, stop: int) -> Tensor:
    return torch.from_numpy(info.labels[None, start:stop].astype(np.float32))


def inputs(
    wave: np.ndarray | None, pictures: Mapping[str, np.ndarray], *, frames: int, fps: float
) -> dict[str, Tensor]:
    """A clip of T `frames` as a network takes it, a batch of one.

    wave int16 (N,) at 16 kHz gives "audio", float32 (1, 4T, 13); pictures uint8 (T, 112, 112) by stream give
    "face" and "body", float32 (1, T, 112, 112) in [0, 1]. Sound beyond the frames is cut off. Where it ends before them
    the last row of the coefficients is repeated: TalkNet's own clips are cut one frame short, and TalkNet goes on with
    the rows of their beginning, which belong to other frames.
    """
    found = {} if wave is None else {"audio": mfcc_of_frames(wave, frames, fps=fps)[None]}
    for stream, grey in pictures.items():
        found[stream] = torch.from_numpy(np.ascontiguousarray(grey[None])).float().div_(255)
    return found


def inputs_of(clip: synth.Clip, streams: Sequence[str] = STREAMS) -> dict[str, Tensor]:
    """The same of a clip that the twin has drawn, by `draw_clips` or `studies.twins.speakers.render`."""
    pictures = {"face": clip.faces, "body": clip.bodies}
    return inputs(
        clip.audio if "audio" in streams else None,
        {stream: grey for stream, grey in pictures.items() if stream in streams},
        frames=len(clip.labels),
        fps=synth.FPS,
    )


def load_speakers(
    name: str,
    split: str,
    *,
    root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    streams: Sequence[str] = STREAMS,
    task: str = "all",
) -> SpeakerSet:
    """One split of "ava-asd", "wasd" or their twin "synth-speakers"; split is "train", "val" or "test".

    root: the folder that holds the data sets (else SELIB_DATA, else `data`). limit: only that many clips, chosen by the
    seed; of the twin the first ones. streams: which to read, of "audio", "face" and "body". task: of the twin, which
    stream tells (`studies.twins.speakers.TASKS`). The twin is read where `selib data make` wrote it (it writes task "all"),
    else rendered, from the seed, into `<root>/.cache`.

    The lists are checked whole, and that each clip has its sound and its crops; a damaged file shows when it is read.
    Raises FileNotFoundError when the data or a part of it is missing, ValueError when a list is wrong or an argument is
    out of range, with file and line.
    """
    if name not in SPEAKERS:
        raise ValueError(f"unknown set of speakers {name!r}; known are {', '.join(SPEAKERS)}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    wanted = tuple(stream for stream in STREAMS if stream in streams)
    if isinstance(streams, str) or not wanted or len(wanted) != len(streams):
        raise ValueError(f"streams must be some of {', '.join(STREAMS)}, each once, not {streams!r}")
    twin = name == "synth-speakers"
    if task not in (synth.TASKS if twin else ("all",)):
        raise ValueError(
            f"task must be one of {', '.join(synth.TASKS if twin else ('all',))} for {name}, not {task!r}"
        )
    base = data_root(root)
    place = find(name, base) if task == "all" else None
    source: _Source
    if place is not None:
        source, infos = _on_disk(name, place, split, wanted)
        rows = list(range(len(infos)))
        if limit is not None and limit < len(infos):
            rows = (
                rows[:limit]
                if twin
                else sorted(np.random.default_rng(seed).permutation(len(infos))[:limit].tolist())
            )
        source.present(rows, wanted)
    elif twin:
        source, infos = _rendered(base, split, limit or synth.COUNTS[split], seed, task)
        rows = list(range(len(infos)))
    else:
        raise FileNotFoundError(missing(name, base))
    return SpeakerSet(name, split, wanted, [infos[row] for row in rows], twin, task, source, rows)


def missing(name: str, root: Path) -> str:
    """What to do for a set that is not there."""
    if name == "ava-asd":
        return (
            f"ava-asd: not found in {root}; fetch the videos and the annotations ava_activespeaker_{{train,val}}_v1.0 from "
            f"{AVA_ADDRESS} into a folder DIR and run `selib data make ava-asd --videos DIR`, or put what TalkNet prepared there"
        )
    return (
        f"wasd: not found in {root}; its authors' scripts fetch and cut it ({WASD_ADDRESS}): put the folder WASD that they make "
        f"at {root / 'wasd'}, and their eval/wasd_metadata.csv into its csv/"
    )


# --- the lists --------------------------------------------------------------------------------------------------------


class Refused(ValueError):
    """Why a line is not accepted, without its place."""


def refusal(file: Path, line: int, why: str, remedy: str) -> ValueError:
    return ValueError(f"{file}:{line}: {why}; {remedy}")


def read_lines(file: Path, remedy: str) -> Iterator[str]:
    """The lines of a list, one after another (that of AVA's boxes has millions); blank ones at its end are passed over."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {remedy}")
    blank, found = 0, False
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        for line in opened:
            if not line.strip():
                blank += 1
                continue
            yield from [""] * blank
            yield line.rstrip("\n")
            blank, found = 0, True
    if not found:
        raise ValueError(f"{file}: is empty; {remedy}")


def _read_loader(file: Path, remedy: str) -> list[ClipInfo]:
    """`entity<TAB>frames<TAB>fps<TAB>[0, 1, …]<TAB>index` on every line; the videos are not known yet."""
    found: list[ClipInfo] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(read_lines(file, remedy), 1):
        try:
            info = _clip_info(line)
        except Refused as why:
            raise refusal(file, number, str(why), remedy) from None
        if seen.setdefault(info.entity, number) != number:
            raise refusal(file, number, f"names {info.entity} again, after line {seen[info.entity]}", remedy)
        found.append(info)
    return found


def _clip_info(line: str) -> ClipInfo:
    fields = line.split("\t")
    if len(fields) != 5:
        raise Refused(
            f"expected entity, frames, fps, [labels] and index between tabs, found {shortened(line)}"
        )
    entity, frames, fps, listed, index = (field.strip() for field in fields)
    if not is_name(entity):
        raise Refused(f"{entity[:80]!r} is no name of a clip")
    if not frames.isdecimal():
        raise Refused(f"the number of frames of {entity} is {frames[:80]!r}")
    if int(frames) == 0:
        raise Refused(f"{entity} is an empty clip, of 0 frames")
    try:
        rate = float(fps)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise Refused(f"the frames a second of {entity} are {fps[:80]!r}, not a number above 0")
    if not (listed.startswith("[") and listed.endswith("]")):
        raise Refused(f"expected labels in brackets for {entity}, found {shortened(listed)}")
    labels = [label.strip() for label in listed[1:-1].split(",")] if listed[1:-1].strip() else []
    if odd := [label for label in labels if label not in ("0", "1")]:
        raise Refused(f"{entity} has the label {odd[0][:80]!r}, not 0 or 1 ({len(odd)} such labels)")
    if len(labels) != int(frames):
        raise Refused(f"{entity} has {len(labels)} labels for {frames} frames")
    if not index.lstrip("-").isdecimal():
        raise Refused(f"the index of {entity} is {index[:80]!r}, not a whole number")
    return ClipInfo(entity, "", int(frames), rate, np.array(labels, np.uint8), int(index))


def shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")


def is_name(text: str) -> bool:
    """Whether it can be the name of a file, and of one that lies where it should."""
    return bool(text) and text not in (".", "..") and not set(text) & set("/\\\0")


def _read_videos(file: Path, remedy: str) -> dict[str, str]:
    """The video of every entity, from the official columns."""
    videos: dict[str, str] = {}
    titles: list[str] = []
    for number, line in enumerate(read_lines(file, remedy), 1):
        fields = line.split(",")
        if number == 1:
            titles = [field.strip() for field in fields]
            if absent := [title for title in ("video_id", "entity_id") if title not in titles]:
                raise refusal(file, 1, f"has no column {absent[0]}, but {shortened(line)}", remedy)
            video_at, entity_at = titles.index("video_id"), titles.index("entity_id")
            continue
        if len(fields) != len(titles):
            raise refusal(file, number, f"has {len(fields)} values for {len(titles)} columns", remedy)
        entity, video = fields[entity_at].strip(), fields[video_at].strip()
        if not is_name(video):
            raise refusal(file, number, f"{video[:80]!r} is no name of a video", remedy)
        if videos.setdefault(entity, video) != video:
            raise refusal(
                file, number, f"{entity} is in video {video} here and in {videos[entity]} before", remedy
            )
    return videos


def _table(file: Path, key: str, value: str, remedy: str) -> dict[str, tuple[int, str]]:
    """Two columns of a csv with titles: key -> line and value."""
    found = {}
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as opened:
        rows = csv.DictReader(opened)
        if absent := [title for title in (key, value) if title not in (rows.fieldnames or ())]:
            raise refusal(file, 1, f"has no column {absent[0]}", remedy)
        for row in rows:
            if row[key] is None or not row[value]:
                raise refusal(file, rows.line_num, f"expected {key} and {value}", remedy)
            found[row[key]] = rows.line_num, row[value]
    return found


def _with_conditions(place: Path, split: str, infos: list[ClipInfo]) -> list[ClipInfo]:
    """The clips with what csv/{split}_condition.csv says of each, or WASD's own metadata of its video; else as they are."""
    own = place / "csv" / f"{split}_condition.csv"
    if own.is_file():
        listed = _table(own, "entity_id", "condition", "mend or delete it")
        if absent := [info.entity for info in infos if info.entity not in listed]:
            raise ValueError(
                f"{own}: says nothing of {absent[0]} ({len(absent)} such clips); mend or delete it"
            )
        return [replace(info, condition=listed[info.entity][1]) for info in infos]
    for file in (place / "csv" / "wasd_metadata.csv", place / "wasd_metadata.csv"):
        if not file.is_file():
            continue
        listed = _table(file, "Video", "Category", f"take it from {WASD_ADDRESS} again or delete it")
        if absent := [info.video for info in infos if info.video not in listed]:
            raise ValueError(
                f"{file}: says nothing of video {absent[0]} ({len(absent)} such clips); delete it or mend it"
            )
        known = [str(number) for number in range(len(synth.CONDITIONS))]  # the twin's are in WASD's order
        for video, (line, category) in listed.items():
            if category not in known:
                raise refusal(
                    file, line, f"category {category!r} of {video} is not 0 to 4", "mend or delete it"
                )
        return [replace(info, condition=synth.CONDITIONS[int(listed[info.video][1])]) for info in infos]
    return infos


# --- on disk ----------------------------------------------------------------------------------------------------------


def _on_disk(name: str, place: Path, split: str, streams: Sequence[str]) -> tuple[_Files, list[ClipInfo]]:
    twin = name == "synth-speakers"
    remedy = (
        f"delete {place} and run `selib data make synth-speakers`"
        if twin
        else "prepare it again, or take its line out"
    )
    file = place / "csv" / f"{split}_loader.csv"
    infos = _read_loader(file, remedy if twin else f"prepare {name} again")
    original = file.with_name(f"{split}_orig.csv")
    videos = _read_videos(original, remedy if twin else f"prepare {name} again")
    if absent := [number for number, info in enumerate(infos, 1) if info.entity not in videos]:
        entity = infos[absent[0] - 1].entity
        raise refusal(file, absent[0], f"{original.name} has no {entity} ({len(absent)} such clips)", remedy)
    infos = [replace(info, video=videos[info.entity]) for info in infos]
    infos = _with_conditions(place, split, infos)
    params: list[synth.Params] | None = None
    if twin:
        infos, params = _drawn_as(place / f"{split}.jsonl", infos, remedy)
    return _Files(place, split, infos, params, file, remedy), infos


def _drawn_as(file: Path, infos: list[ClipInfo], remedy: str) -> tuple[list[ClipInfo], list[synth.Params]]:
    """The clips with their kinds, and how each was drawn: a line of <split>.jsonl for every line of the list."""
    params, found = [], []
    lines = list(read_lines(file, remedy))
    if len(lines) != len(infos):
        raise ValueError(f"{file}: {len(lines)} lines for {len(infos)} clips; {remedy}")
    for number, (line, info) in enumerate(zip(lines, infos, strict=True), 1):
        try:
            entry = json.loads(line)
            kinds = np.array(entry["kinds"], np.uint8)
            if (
                entry["entity"] != info.entity
                or kinds.shape != (info.frames,)
                or kinds.max() >= len(synth.KINDS)
            ):
                raise ValueError
            params.append(entry["params"])
        except (ValueError, KeyError, TypeError, OverflowError):
            raise refusal(file, number, f"not how {info.entity} was drawn", remedy) from None
        found.append(replace(info, kinds=kinds))
    return found, params


class _Files:
    """Clips in TalkNet's layout. What is read is kept, up to `KEPT` bytes."""

    def __init__(
        self,
        place: Path,
        split: str,
        infos: list[ClipInfo],
        params: list[synth.Params] | None,
        file: Path,
        remedy: str,
    ) -> None:
        self.place, self.split, self.infos, self.drawn, self.file, self.remedy = (
            place,
            split,
            infos,
            params,
            file,
            remedy,
        )
        self.kept: dict[tuple[int, str], np.ndarray] = {}
        self.room = KEPT

    def path(self, row: int, folder: str, suffix: str = "") -> Path:
        info = self.infos[row]
        return self.place / folder / self.split / info.video / f"{info.entity}{suffix}"

    def present(self, rows: Sequence[int], streams: Sequence[str]) -> None:
        """FileNotFoundError for the first clip without its sound, ValueError for the first with fewer crops than frames."""
        for stream in streams:
            if not (self.place / FOLDERS[stream] / self.split).is_dir():
                hint = 'prepare it or leave "body" out of streams=' if stream == "body" else self.remedy
                raise FileNotFoundError(
                    f"{self.place / FOLDERS[stream] / self.split}: no such folder; {hint}"
                )
        for row in rows:
            info = self.infos[row]
            if "audio" in streams and not (file := self.path(row, FOLDERS["audio"], ".wav")).is_file():
                raise FileNotFoundError(
                    f"{file}: no such file, though {self.file}:{row + 1} names it; {self.remedy}"
                )
            for stream in streams:
                if stream == "audio":
                    continue
                folder = self.path(row, FOLDERS[stream])
                if not folder.is_dir():
                    raise FileNotFoundError(
                        f"{folder}: no such folder, though {self.file}:{row + 1} names it; {self.remedy}"
                    )
                if (count := len(_crops(folder))) < info.frames:
                    raise ValueError(
                        f"{folder}: {count} crops, fewer than the {info.frames} frames of {self.file}:{row + 1}; {self.remedy}"
                    )

    def wave(self, row: int) -> np.ndarray:
        if (row, "audio") not in self.kept:
            info, file = self.infos[row], self.path(row, FOLDERS["audio"], ".wav")
            samples = _read_wave(file)
            least = (
                (info.frames - 1) / info.fps * RATE / 2
            )  # TalkNet cuts a frame too little; a film may end in silence
            if len(samples) < least:
                raise ValueError(
                    f"{file}: {len(samples) / RATE:.2f} s of sound for the {info.frames / info.fps:.2f} s of "
                    f"{self.file}:{row + 1}; {self.remedy}"
                )
            return self._keep(row, "audio", samples)
        return self.kept[row, "audio"]

    def pictures(self, row: int, stream: str) -> np.ndarray:
        if (row, stream) not in self.kept:
            folder, count = self.path(row, FOLDERS[stream]), self.infos[row].frames
            names = _crops(folder)
            try:
                names.sort(key=lambda name: float(name[:-4]))
            except ValueError:
                odd = next(name for name in names if not name[:-4].replace(".", "", 1).isdecimal())
                raise ValueError(
                    f"{folder / odd}: crops are named by their time in seconds; {self.remedy}"
                ) from None
            found = np.empty((count, SIDE, SIDE), np.uint8)
            for place, name in zip(found, names[:count], strict=True):
                try:
                    place[:] = fit_square(decode(folder / name, None, None, "L")[0], SIDE)
                except ValueError as why:
                    raise ValueError(f"{folder / name}: {why}; {self.remedy}") from None
            return self._keep(row, stream, found)
        return self.kept[row, stream]

    def masks(self, row: int) -> Pictures:
        self.params(row)
        found = {}
        for stream, folder in MASKS.items():
            file, count = self.path(row, folder, ".png"), self.infos[row].frames
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file; {self.remedy}")
            try:
                found[stream] = decode(file, (count * SIDE, SIDE), None, "P")[0].reshape(count, SIDE, SIDE)
            except ValueError as why:
                raise ValueError(f"{file}: {why}; {self.remedy}") from None
        return found

    def params(self, row: int) -> synth.Params:
        if self.drawn is None:
            raise ValueError(
                f"{self.place.name} was filmed, not drawn: only synth-speakers has masks and parameters"
            )
        return self.drawn[row]

    def mark(self, row: int) -> str:
        file = self.path(row, FOLDERS["audio"], ".wav")
        return f"{file.stat().st_size}" if file.is_file() else ""

    def _keep(self, row: int, stream: str, found: np.ndarray) -> np.ndarray:
        if found.nbytes <= self.room:
            self.room -= found.nbytes
            self.kept[row, stream] = found
        return found


def _crops(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [
            entry.name for entry in entries if entry.name.endswith(".jpg") and not entry.name.startswith(".")
        ]


def _read_wave(file: Path) -> np.ndarray:
    """A WAV file of one channel, 16 bits, 16 kHz: int16 (N,). ValueError names the file."""
    remedy = "convert it: ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le"
    try:
        with riff.open(str(file), "rb") as opened:
            channels, width, rate, count = opened.getparams()[:4]
            if (channels, width, rate) != (1, 2, RATE):
                raise ValueError(
                    f"{file}: {channels} channels, {8 * width} bits, {rate} Hz, not 1, 16 and {RATE}; {remedy}"
                )
            data = opened.readframes(count)
    except (riff.Error, EOFError) as error:
        raise ValueError(
            f"{file}: not a WAV file that can be read ({error or 'ends early'}); {remedy}"
        ) from None
    if len(data) < 2 * count:
        raise ValueError(f"{file}: cut short: {len(data) // 2} of {count} samples; prepare it again")
    return np.frombuffer(data, "<i2").astype(np.int16)


# --- batches ----------------------------------------------------------------------------------------------------------


class _Batches(Dataset):
    """Which clips share a batch, and what becomes of them; knows the epoch."""

    def __init__(
        self, base: SpeakerSet, frames: int, train: bool, seed: int, window: int | None, augment: bool
    ) -> None:
        for argument, value in (("frames", frames), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be at least 1, not {value}")
        self.base, self.frames, self.train, self.seed, self.window, self.epoch = (
            base,
            frames,
            train,
            seed,
            window,
            -1,
        )
        self.augment = train and augment
        self.lengths = [min(clip.frames, window or clip.frames) for clip in base.clips]
        self._made: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch - 1  # the sampler steps on as it starts

    def random(self, *key: int) -> np.random.Generator:
        """The same numbers for the same seed, epoch and key, whichever process or worker draws them."""
        return np.random.default_rng([self.seed, self.epoch + 1, *key])

    @property
    def batches(self) -> list[list[int]]:
        if self._made is None or self._made[0] != self.epoch:
            self._made = self.epoch, self._grouped()
        return self._made[1]

    def _grouped(self) -> list[list[int]]:
        count = len(self.base)
        ties = self.random(0).permutation(count).tolist() if self.train else list(range(count, 0, -1))
        order = sorted(range(count), key=lambda i: (self.lengths[i], ties[i]), reverse=True)
        found: list[list[int]] = []
        for _, alike in groupby(order, key=lambda i: 0 if self.train else self.lengths[i]):
            clips = list(alike)
            while clips:
                size = max(1, self.frames // self.lengths[clips[0]])
                found.append(clips[:size])
                clips = clips[size:]
        return found

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        (number,) = numbers
        clips = self.batches[number]
        length = min(self.lengths[i] for i in clips)
        base, random = self.base, self.random(1, number)
        visual = [stream for stream in base.streams if stream != "audio"]
        with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes without the interpreter's lock
            seen = list(
                pool.map(lambda key: base.pictures(*key), [(i, stream) for i in clips for stream in visual])
            )
        shown = {stream: np.empty((len(clips), length, SIDE, SIDE), np.uint8) for stream in visual}
        heard, labels = [], []
        for place, i in enumerate(clips):
            info = base.clips[i]
            free = info.frames - length if self.window is not None and self.train else 0
            start = int(random.integers(free + 1))
            for stream in visual:
                frames = seen[place * len(visual) + visual.index(stream)][start : start + length]
                shown[stream][place] = changed(frames, random) if self.augment else frames
            if "audio" in base.streams:
                wave = base._heard(i, start, start + length)
                if self.augment and base.task != "audio":  # there a voice is the answer, whosever it is
                    wave = self._overlaid(i, wave, random)
                heard.append(mfcc_of_frames(wave, length, fps=info.fps))
            labels.append(_labels(info, start, start + length))
        found = {"audio": torch.stack(heard)} if heard else {}
        found |= {stream: torch.from_numpy(grey).float().div_(255) for stream, grey in shown.items()}
        return found, torch.cat(labels)

    def _overlaid(self, i: int, wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """With probability ½ another clip's sound over this one's. Its person is not the one who is asked about."""
        if random.random() < 0.5 or len(self.base) == 1:
            return wave
        other, snr = int(random.integers(len(self.base) - 1)), random.uniform(-5, 5)
        return overlaid(wave, self.base.wave(other + (other >= i)), snr)


class _Order(Sampler[int]):
    """The batches in a new seeded order every epoch; steps the epoch on."""

    def __init__(self, view: _Batches) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)

    def __iter__(self) -> Iterator[int]:
        self.view.epoch += 1
        return iter(cast(list[int], self.view.random(2).permutation(len(self.view)).tolist()))


class ClipLoader(DataLoader):
    """Batches of (streams, labels float32 (B, T)) with about as many video frames as asked for; see `SpeakerSet.loader`.

    Clips of about the same length share a batch, as TalkNet sorts them, at least one in each: `batches` says which.
    With train=True they are cut to the shortest of the batch (to its beginning; with a window, at a random place), those
    of equal length are mixed anew and the batches shuffled every epoch, pictures are `changed`, faces and bodies each in
    its own way, and with probability ½ another clip's sound is laid over a clip's (`overlaid`, at -5 to 5 dB). Labels
    stay: whoever the other voice belongs to is not in the picture. Otherwise only clips of one length share a batch and
    nothing is cut off, but for a window, which keeps their beginning. All of it depends on seed and epoch alone;
    `set_epoch` resumes a run where it was.
    """

    def __init__(self, view: _Batches) -> None:
        super().__init__(view, 1, sampler=_Order(view) if view.train else None, collate_fn=identity)

    @property
    def batches(self) -> list[list[int]]:
        """The clips of each batch, before the batches are shuffled: without train, in the order in which they come."""
        return cast(_Batches, self.dataset).batches

    def set_epoch(self, epoch: int) -> None:
        cast(_Batches, self.dataset).set_epoch(epoch)


def changed(frames: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One of TalkNet's four augmentations, the same for all frames, uint8 (T, 112, 112): as it is, mirrored, a square of
    0.7 to 1 of the side brought to full size, or turned by up to 15° about its middle, corners black.
    """
    kind, side = int(random.integers(4)), int(SIDE * random.uniform(0.7, 1))
    left, top = (int(random.integers(SIDE - side + 1)) for _ in range(2))
    turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), random.uniform(-15, 15), 1)
    if kind == 0:
        return frames
    if kind == 1:
        return frames[:, :, ::-1]
    if kind == 2:
        return np.stack(
            [cv2.resize(frame[top : top + side, left : left + side], (SIDE, SIDE)) for frame in frames]
        )
    return np.stack([cv2.warpAffine(frame, turn, (SIDE, SIDE)) for frame in frames])


def overlaid(wave: np.ndarray, voice: np.ndarray, snr: float) -> np.ndarray:
    """A wave int16 (N,) with another one laid over it, `snr` dB below it in mean power; repeated where it is too short.

    Values that no longer fit are clipped. A silent wave has no power that the other could be measured by: it stays.
    """
    clean = wave.astype(np.float64)
    noise = np.resize(voice, len(wave)).astype(np.float64)
    powers = [float(np.mean(x**2)) if len(x) else 0.0 for x in (clean, noise)]
    if 0.0 in powers:
        return wave
    mixed = clean + noise * math.sqrt(powers[0] / powers[1] / 10 ** (snr / 10))
    return np.rint(mixed).clip(-(2**15), 2**15 - 1).astype(np.int16)


# --- the twin ---------------------------------------------------------------------------------------------------------

Drawable = tuple[synth.Params, Sequence[str]]  # a clip, and the streams to mute in it
TOGETHER = 32  # clips that one process draws


def draw_clips(clips: Sequence[Drawable]) -> list[synth.Clip]:
    """Clips of the twin drawn (again) from their parameters, by one process a core; each with the streams to mute.

    `inputs_of` makes of one what a network takes.
    """
    return list(tqdm(_drawn(clips), total=len(clips), desc="render", unit="clip", leave=False))


def _drawn(clips: Sequence[Drawable]) -> Iterator[synth.Clip]:
    parts = [clips[start : start + TOGETHER] for start in range(0, len(clips), TOGETHER)]
    if len(parts) == 1:  # spread them
        size = -(-len(clips) // cores())
        parts = [clips[start : start + size] for start in range(0, len(clips), size)]
    pool = ThreadPoolExecutor(cores())
    try:
        for part in pool.map(_draw, parts):
            yield from part
    finally:
        pool.shutdown(cancel_futures=True)


def _draw(clips: Sequence[Drawable]) -> list[synth.Clip]:
    """A few of them are drawn here: starting a process takes as long."""
    return [synth.render(*clip) for clip in clips] if len(clips) <= 3 else synth.draw_apart(clips)


class _Rendered:
    """Clips that were rendered into the cache: a row of bytes for each, mapped into memory.

    A row holds the sound, faces, bodies, one byte a pixel with the part of the face in its lower and that of the body in
    its upper half, labels and kinds; rows of clips shorter than the longest end in zeros, which take no room on disk.
    """

    def __init__(self, rows: np.ndarray, params: list[synth.Params], version: str) -> None:
        self.rows, self.drawn, self.version = rows, params, version

    @staticmethod
    def sizes(frames: int) -> list[int]:
        pixels = frames * SIDE * SIDE
        return [frames * 2 * RATE // synth.FPS, pixels, pixels, pixels, frames, frames]

    @staticmethod
    def pack(clip: synth.Clip) -> np.ndarray:
        parts = clip.face_parts | clip.body_parts << 4
        streams = (clip.audio.astype("<i2"), clip.faces, clip.bodies, parts, clip.labels, clip.kinds)
        return np.concatenate([stream.reshape(-1).view(np.uint8) for stream in streams])

    def part(self, row: int, number: int) -> np.ndarray:
        sizes = self.sizes(self.drawn[row]["frames"])
        start = sum(sizes[:number])
        return self.rows[row, start : start + sizes[number]]

    def wave(self, row: int) -> np.ndarray:
        return np.frombuffer(self.part(row, 0).tobytes(), "<i2").astype(np.int16)

    def pictures(self, row: int, stream: str) -> np.ndarray:
        return np.asarray(self.part(row, STREAMS.index(stream)).reshape(-1, SIDE, SIDE))

    def masks(self, row: int) -> Pictures:
        parts = np.asarray(self.part(row, 3).reshape(-1, SIDE, SIDE))
        return {"face": parts & 15, "body": parts >> 4}

    def labels(self, row: int) -> np.ndarray:
        return np.array(self.part(row, 4))

    def kinds(self, row: int) -> np.ndarray:
        return np.array(self.part(row, 5))

    def params(self, row: int) -> synth.Params:
        return self.drawn[row]

    def mark(self, row: int) -> str:
        return self.version


def _rendered(root: Path, split: str, count: int, seed: int, task: str) -> tuple[_Rendered, list[ClipInfo]]:
    """The first `count` clips of a split as `write_speakers` would write them, but for the JPEG."""
    params = synth.scenes(count, split, seed, task)
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in (synth, synth_faces))
    with_these = f"{hashlib.sha256(sources).hexdigest()} {cv2.__version__} {np.__version__}"
    version = digest([(with_these, count, seed)])  # rendered anew when what draws has changed
    width = max(sum(_Rendered.sizes(one["frames"])) for one in params)

    def produce(start: int, stop: int) -> tuple[np.ndarray, list[str]]:
        out = np.zeros((stop - start, width), np.uint8)
        for first in range(start, stop, TOGETHER):
            clips = _draw([(one, ()) for one in params[first : min(first + TOGETHER, stop)]])
            for row, clip in enumerate(clips, first - start):
                packed = _Rendered.pack(clip)
                out[row, : len(packed)] = packed
        return out, []

    key = f"synth-speakers-{task}-{split}-rendered-{count}-seed{seed}"
    rows = cached(root, key, version, (count, width), produce, threads=cores(), action="render")
    source = _Rendered(rows, params, version)
    infos = [
        ClipInfo(
            one["entity"],
            one["video"],
            one["frames"],
            float(synth.FPS),
            source.labels(row),
            row,
            one["condition"],
            source.kinds(row),
        )
        for row, one in enumerate(params)
    ]
    return source, infos


def write_speakers(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Render clips into a folder in TalkNet's and BIAS's layout, with what only the twin knows beside it.

    clips_masks/<split>/<video>/<entity>.png and clips_masks_body/ likewise: the frames' label images, one under another;
    csv/<split>_condition.csv: the condition of each clip; <split>.jsonl: its kinds and how it was drawn. The box of a face
    in csv/<split>_orig.csv is the whole picture.
    """
    for split, count in counts.items():
        params = synth.scenes(count, split, seed)
        clips = _drawn([(one, ()) for one in params])
        infos, lines = [], []
        with tqdm(
            zip(params, clips, strict=True), "synth-speakers " + split, count, leave=False, unit="clip"
        ) as bar:
            for index, (one, clip) in enumerate(bar):
                info = ClipInfo(
                    one["entity"],
                    one["video"],
                    len(clip.labels),
                    float(synth.FPS),
                    clip.labels,
                    index,
                    one["condition"],
                )
                infos.append(info)
                times = [frame / synth.FPS for frame in range(info.frames)]
                write_wave(place_of(folder, "audio", split, info, ".wav"), clip.audio)
                for stream, frames in (("face", clip.faces), ("body", clip.bodies)):
                    _write_crops(place_of(folder, stream, split, info), times, frames)
                for stream, parts in (("face", clip.face_parts), ("body", clip.body_parts)):
                    mask = Image.fromarray(parts.reshape(-1, SIDE)).convert("P")
                    mask.putpalette(_palette())
                    file = folder / MASKS[stream] / split / info.video / f"{info.entity}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    mask.save(file)
                lines.append(json.dumps({"entity": info.entity, "kinds": clip.kinds.tolist(), "params": one}))
        _write_lines(folder / f"{split}.jsonl", lines)
        write_lists(
            folder, split, infos, [[_row(info, frame) for frame in range(info.frames)] for info in infos]
        )
        conditions = [f"{info.entity},{info.condition}" for info in infos]
        _write_lines(folder / "csv" / f"{split}_condition.csv", ["entity_id,condition", *conditions])


def _row(info: ClipInfo, frame: int) -> tuple[str, ...]:
    label = LABELS[int(info.labels[frame])]
    return (info.video, f"{frame / info.fps:.2f}", "0", "0", "1", "1", label, info.entity)


def place_of(folder: Path, stream: str, split: str, info: ClipInfo, suffix: str = "") -> Path:
    path = folder / FOLDERS[stream] / split / info.video / f"{info.entity}{suffix}"
    (path.parent if suffix else path).mkdir(parents=True, exist_ok=True)
    return path


def write_wave(file: Path, samples: np.ndarray) -> None:
    with riff.open(str(file), "wb") as opened:
        opened.setparams((1, 2, RATE, 0, "NONE", ""))
        opened.writeframes(samples.astype("<i2").tobytes())


def _write_crops(folder: Path, times: Sequence[float], frames: Sequence[np.ndarray] | np.ndarray) -> None:
    for time, frame in zip(times, frames, strict=True):
        write_crop(folder / f"{time:.2f}.jpg", frame)


def write_crop(file: Path, frame: np.ndarray) -> None:
    """A crop, grey or RGB, as JPEG."""
    bgr = frame if frame.ndim == 2 else frame[:, :, ::-1]
    _, coded = cv2.imencode(".jpg", np.ascontiguousarray(bgr), [cv2.IMWRITE_JPEG_QUALITY, 95])
    file.write_bytes(coded.tobytes())


def write_lists(
    folder: Path, split: str, infos: Sequence[ClipInfo], rows: Sequence[Sequence[tuple[str, ...]]]
) -> None:
    """csv/<split>_loader.csv and csv/<split>_orig.csv, in the same order; rows: the official columns of each clip's frames."""
    listed = [
        "\t".join(
            [info.entity, str(info.frames), _plain(info.fps), str(info.labels.tolist()), str(info.index)]
        )
        for info in infos
    ]
    _write_lines(folder / "csv" / f"{split}_loader.csv", listed)
    lines = [",".join([*COLUMNS, "label_id", "instance_id"])]
    for clip in rows:
        instance = -1
        for label, run in groupby(clip, key=lambda row: row[COLUMNS.index("label")]):
            instance += 1
            lines += [",".join([*row, str(LABELS.index(label)), f"{row[-1]}:{instance}"]) for row in run]
    _write_lines(folder / "csv" / f"{split}_orig.csv", lines)


def _plain(fps: float) -> str:
    return f"{fps:.1f}" if fps == round(fps, 1) else f"{fps:.6f}"


def _write_lines(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _palette() -> list[int]:
    """Black, then colours that tell neighbours apart."""
    return [
        0,
        0,
        0,
        230,
        60,
        60,
        60,
        160,
        230,
        240,
        200,
        60,
        90,
        190,
        90,
        180,
        100,
        220,
        240,
        140,
        60,
        240,
        240,
        240,
    ]
