"""The twin of the speaker sets: rendered into the cache, or written to disk in TalkNet's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from studies.data import talknet
from studies.data.cache import cached, cores
from studies.data.talknet import ClipInfo, Pictures
from studies.twins import speakers as synth
from studies.twins.apart import in_parts, version

TOGETHER = 32  # clips that one process draws
PALETTE = bytes.fromhex("000000 e63c3c 3ca0e6 f0c83c 5abe5a b464dc f08c3c f0f0f0")  # black, then of each part

# A clip in the cache; shorter ones end in zeros, which take no room on disk. A byte of "parts" holds the
# part of the face in its lower and that of the body in its upper half.
_PICTURES = (np.uint8, (synth.MOST, synth.SIDE, synth.SIDE))
ROW = np.dtype(
    [
        ("audio", "<i2", synth.MOST * synth.PER_FRAME),
        ("face", *_PICTURES),
        ("body", *_PICTURES),
        ("parts", *_PICTURES),
        ("labels", np.uint8, synth.MOST),
    ]
)


def draw_clips(clips: Sequence[synth.Drawable]) -> list[synth.Clip]:
    """Clips of the twin drawn (again) from their parameters, each with the streams to mute, on all cores.

    `studies.data.speakers.inputs_of` makes of one what a network takes.
    """
    return list(tqdm(_drawn(clips), total=len(clips), desc="render", unit="clip", leave=False))


def _drawn(clips: Sequence[synth.Drawable]) -> Iterator[synth.Clip]:
    size = min(TOGETHER, len(clips) // cores() + 1)
    for part in in_parts(synth.draw, clips, size, cores()):
        yield from part


class Rendered:
    """Clips in the cache: rows of type `ROW`, mapped into memory, and the parameters they were drawn from."""

    def __init__(self, rows: np.ndarray, drawn: list[synth.Params]) -> None:
        self.rows, self.drawn = rows, drawn

    def infos(self) -> list[ClipInfo]:
        found = []
        for row, one in enumerate(self.drawn):
            labels = np.array(self.rows["labels"][row, : one["frames"]])
            fps = float(synth.FPS)
            found.append(ClipInfo(one["entity"], one["video"], fps, labels, row, one["condition"]))
        return found

    def read(self, info: ClipInfo, stream: str) -> np.ndarray:
        """The sound of a clip, int16 (N,) at 16 kHz, or its faces or bodies, grey uint8 (T, 112, 112)."""
        length = info.frames * (synth.PER_FRAME if stream == "audio" else 1)
        return np.asarray(self.rows[stream][info.row, :length])

    def masks(self, info: ClipInfo) -> Pictures:
        parts = self.read(info, "parts")
        return {"face": parts & 15, "body": parts >> 4}

    def params(self, info: ClipInfo) -> synth.Params:
        return self.drawn[info.row]

    def mark(self, info: ClipInfo) -> str:
        """For the fingerprint: how it was drawn."""
        return f"{version()} {self.drawn[info.row]['seed']}"


def rendered(root: Path, split: str, count: int, seed: int, task: str) -> Rendered:
    """The first `count` clips of a split as `write_speakers` would write them, but for the JPEG."""
    params = synth.scenes(count, split, seed, task)

    def produce(start: int, stop: int) -> tuple[np.ndarray, list[str]]:
        out = np.zeros(stop - start, ROW)
        for first in range(start, stop, TOGETHER):
            clips = synth.draw([(one, ()) for one in params[first : min(first + TOGETHER, stop)]])
            for row, clip in zip(out[first - start :], clips, strict=False):
                frames = len(clip.labels)
                row["audio"][: len(clip.audio)] = clip.audio
                row["face"][:frames], row["body"][:frames] = clip.faces, clip.bodies
                row["parts"][:frames] = clip.face_parts | clip.body_parts << 4
                row["labels"][:frames] = clip.labels
        return out.view(np.uint8).reshape(len(out), ROW.itemsize), []

    key = f"synth-speakers-{task}-{split}-rendered-{count}-seed{seed}"
    shape = (count, ROW.itemsize)
    rows = cached(root, key, version(), shape, produce, threads=cores(), action="render")
    return Rendered(rows.view(ROW)[:, 0], params)


def write_speakers(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Render clips into a folder in TalkNet's layout, with what only the twin knows beside it.

    clips_masks/<split>/<video>/<entity>.png and clips_masks_body/ likewise: the frames' label images, one
    under another; <split>.jsonl: how each clip was drawn. In csv/<split>_orig.csv the box of a face is the
    whole picture.
    """
    for split, count in counts.items():
        params = synth.scenes(count, split, seed)
        clips = tqdm(_drawn([(one, ()) for one in params]), f"synth-speakers {split}", count, leave=False)
        infos, scenes, rows = [], [], []
        for row, (one, clip) in enumerate(zip(params, clips, strict=True)):
            info = ClipInfo(one["entity"], one["video"], float(synth.FPS), clip.labels, row)
            _write_clip(folder, split, info, clip)
            infos.append(info)
            scenes.append(json.dumps({"entity": info.entity, "params": one}))
            rows.append([_official(info, frame) for frame in range(info.frames)])
        talknet.write_lists(folder, split, infos, rows)
        talknet.write_lines(folder / f"{split}.jsonl", scenes)


def _write_clip(folder: Path, split: str, info: ClipInfo, clip: synth.Clip) -> None:
    talknet.write_wave(talknet.clip_path(folder, "audio", split, info), clip.audio)
    shown = {"face": (clip.faces, clip.face_parts), "body": (clip.bodies, clip.body_parts)}
    for stream, (pictures, parts) in shown.items():
        crops = talknet.clip_path(folder, stream, split, info)
        for frame, picture in enumerate(pictures):
            talknet.write_crop(crops, frame / synth.FPS, picture)
        mask = Image.fromarray(parts.reshape(-1, synth.SIDE)).convert("P")
        mask.putpalette(PALETTE)
        file = talknet.mask_path(folder, stream, split, info)
        file.parent.mkdir(parents=True, exist_ok=True)
        mask.save(file)


def _official(info: ClipInfo, frame: int) -> tuple[str, ...]:
    """A frame's row in the official columns."""
    time, label = f"{frame / info.fps:.2f}", talknet.LABELS[int(info.labels[frame])]
    return (info.video, time, "0", "0", "1", "1", label, info.entity)
