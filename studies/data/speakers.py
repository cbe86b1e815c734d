"""Clips of people who speak or do not: AVA-ActiveSpeaker, WASD and their twin, as networks take them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from studies.audio import RATE, mfcc_of_frames
from studies.data.cache import cores
from studies.data.imageset import Indices, rows_of
from studies.data.objects import SPEAKERS, data_root, find
from studies.data.speaker_twin import Rendered, draw_clips, rendered
from studies.data.talknet import AVA_ADDRESS, SPLITS, WASD_ADDRESS, ClipInfo, Files, Pictures, open_split
from studies.twins import speakers as synth
from studies.twins.speakers import SIDE, STREAMS

__all__ = ["ClipInfo", "ClipLoader", "SpeakerSet", "draw_clips", "inputs", "inputs_of", "load_speakers"]

Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(eq=False, repr=False)
class SpeakerSet:
    """One split of AVA-ActiveSpeaker, WASD or their twin; pictures and sound are read when they are used.

    streams: those that a clip is given with, of "audio", "face" and "body"; clips: what the lists say of
    each;
    synthetic: True for the twin.
    """

    name: str
    split: str
    streams: tuple[str, ...]
    clips: list[ClipInfo]
    synthetic: bool
    source: Files | Rendered

    def __len__(self) -> int:
        return len(self.clips)

    def __repr__(self) -> str:
        size = f"{len(self)} clips of {sum(clip.frames for clip in self.clips):,} frames"
        return f"SpeakerSet({self.name} {self.split}: {size}, {', '.join(self.streams)})"

    @property
    def counts(self) -> dict[str, Any]:
        """How much it holds, as results files say it."""
        frames = sum(clip.frames for clip in self.clips)
        return {"clips": len(self), "frames": frames, "streams": list(self.streams)}

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the lists and the sizes of sound files, or how clips are rendered."""
        found = hashlib.sha256()
        for clip in self.clips:
            known = (clip.entity, clip.fps, clip.labels.tolist(), clip.condition, self.source.mark(clip))
            found.update(repr(known).encode())
        return found.hexdigest()[:16]

    def subset(self, indices: Indices) -> Self:
        """The chosen clips, in that order, as a set of their own; what has been decoded is shared."""
        chosen = torch.arange(len(self))[rows_of(indices)].tolist()
        return replace(self, clips=[self.clips[i] for i in chosen])

    def clip(self, i: int, start: int = 0, stop: int | None = None) -> Batch:
        """Frames start to stop of a clip as a batch of one: streams (see `inputs`), labels float32 (1, T)."""
        frames = self.clips[i].frames
        stop = frames if stop is None else stop
        if not 0 <= start < stop <= frames:
            asked = f"start={start}, stop={stop} is none of them"
            raise ValueError(f"{self.clips[i].entity} has frames 0 to {frames}: {asked}")
        return self._cut(i, start, stop, self._visual(i))

    def wave(self, i: int) -> np.ndarray:
        """The sound of a clip, int16 (N,) at 16 kHz: about T / fps seconds, as the file holds it."""
        return self.source.read(self.clips[i], "audio")

    def pictures(self, i: int, stream: str = "face") -> np.ndarray:
        """The faces or bodies of a clip, grey uint8 (T, 112, 112)."""
        if stream not in self.streams or stream == "audio":
            streams = ", ".join(self.streams)
            raise ValueError(f"{self.name} was loaded with the streams {streams}, not with {stream!r}")
        return self.source.read(self.clips[i], stream)

    def masks(self, i: int) -> Pictures:
        """Which part each pixel of the twin shows, {"face": uint8 (T, 112, 112), "body": …}.

        1 + the index in `studies.twins.speakers.FACE_PARTS` or `BODY_PARTS`, 0 for the background.
        ValueError for another set.
        """
        return self.source.masks(self.clips[i])

    def params(self, i: int) -> synth.Params:
        """How the twin drew a clip, for `draw_clips`; ValueError for another set."""
        return self.source.params(self.clips[i])

    def loader(
        self, frames: int, *, train: bool = False, seed: int = 0, window: int | None = None
    ) -> ClipLoader:
        """Batches of about `frames` video frames: see `ClipLoader`."""
        return ClipLoader(self, frames, train, seed, window)

    def _visual(self, i: int) -> Pictures:
        return {stream: self.pictures(i, stream) for stream in self.streams if stream != "audio"}

    def _cut(
        self, i: int, start: int, stop: int, visual: Pictures, random: np.random.Generator | None = None
    ) -> Batch:
        """Frames start to stop of a clip whose pictures are given; changed at random where random is
        given.
        """
        info, wave = self.clips[i], None
        pictures = {stream: frames[start:stop] for stream, frames in visual.items()}
        if random is not None:
            pictures = {stream: changed(frames, random) for stream, frames in pictures.items()}
        if "audio" in self.streams:
            # the window of the last row of coefficients reaches 15 ms (of 40) beyond its frame
            first, last = (round(at * RATE / info.fps) for at in (start, stop + 0.375))
            wave = self.wave(i)[first:last]
            if random is not None and random.random() >= 0.5 and len(self) > 1:
                other, snr = int(random.integers(len(self) - 1)), random.uniform(-5, 5)
                wave = overlaid(wave, self.wave(other + (other >= i)), snr)
        labels = torch.from_numpy(info.labels[None, start:stop].astype(np.float32))
        return inputs(wave, pictures, frames=stop - start, fps=info.fps), labels


def inputs(
    wave: np.ndarray | None, pictures: Mapping[str, np.ndarray], *, frames: int, fps: float
) -> dict[str, Tensor]:
    """A clip of T `frames` as a network takes it, a batch of one.

    wave int16 (N,) at 16 kHz gives "audio", float32 (1, 4T, 13); pictures uint8 (T, 112, 112) by stream give
    "face" and "body", float32 (1, T, 112, 112) in [0, 1]. Sound beyond the frames is cut off. Where it ends
    before them the
    last row is repeated: TalkNet's own clips are cut one frame short, and TalkNet goes on with the rows of
    their beginning, which belong to other frames.
    """
    found = {} if wave is None else {"audio": mfcc_of_frames(wave, frames, fps=fps)[None]}
    for stream, grey in pictures.items():
        found[stream] = torch.from_numpy(np.ascontiguousarray(grey[None])).float().div_(255)
    return found


def inputs_of(clip: synth.Clip, streams: Sequence[str] = STREAMS) -> dict[str, Tensor]:
    """The same of a clip that the twin has drawn, by `draw_clips` or `studies.twins.speakers.render`."""
    pictures = {"face": clip.faces, "body": clip.bodies}
    chosen = {stream: grey for stream, grey in pictures.items() if stream in streams}
    wave = clip.audio if "audio" in streams else None
    return inputs(wave, chosen, frames=len(clip.labels), fps=synth.FPS)


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

    root: the folder that holds the data sets (else SELIB_DATA, else `data`). limit: only that many clips,
    chosen by the seed; of the twin the first ones. streams: which to read, of "audio", "face" and "body".
    task: of the twin, which stream tells (`studies.twins.speakers.TASKS`). The twin is read where `studies
    data make` wrote it, with task "all", else rendered from the seed into `<root>/.cache`.

    The lists are checked whole, and that each clip has its sound and its crops; a damaged file shows when it
    is read. Raises FileNotFoundError when the data or a part of it is missing, ValueError, with file and
    line, when a list is wrong, or when an argument is out of range.
    """
    twin = name == "synth-speakers"
    _one_of("name", name, SPEAKERS)
    _one_of("split", split, SPLITS)
    _one_of(f"task for {name}", task, synth.TASKS if twin else ("all",))
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    wanted = tuple(stream for stream in STREAMS if stream in streams)
    if isinstance(streams, str) or not wanted or len(wanted) != len(streams):
        raise ValueError(f"streams must be some of {', '.join(STREAMS)}, each once, not {streams!r}")
    base = data_root(root)
    place = find(name, base) if task == "all" else None
    if place is None and not twin:
        raise FileNotFoundError(missing(name, base))
    if place is None:
        drawn = rendered(base, split, limit or synth.COUNTS[split], seed, task)
        return SpeakerSet(name, split, wanted, drawn.infos(), twin, drawn)
    infos, files = open_split(name, place, split)
    if limit is not None and limit < len(infos):
        order = range(len(infos)) if twin else np.random.default_rng(seed).permutation(len(infos))
        infos = [infos[row] for row in sorted(order[:limit])]
    for info in infos:
        files.check(info, wanted)
    return SpeakerSet(name, split, wanted, infos, twin, files)


def _one_of(argument: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, not {value!r}")


def missing(name: str, root: Path) -> str:
    """What to do for a set that is not there."""
    if name == "wasd":
        scripts = f"its authors' scripts fetch and cut it ({WASD_ADDRESS})"
        return (
            f"wasd: not found in {root}; {scripts}: put the folder WASD that they make at {root / 'wasd'}, "
            "and their eval/wasd_metadata.csv into its csv/"
        )
    wanted = f"the videos and the annotations ava_activespeaker_{{train,val}}_v1.0 from {AVA_ADDRESS}"
    return (
        f"ava-asd: not found in {root}; fetch {wanted} into a folder DIR and run "
        "`studies data make ava-asd --videos DIR`, or put what TalkNet prepared there"
    )


class ClipLoader:
    """Batches of (streams, labels float32 (B, T)) with about as many video frames as asked for.

    Clips of about the same length share a batch, as TalkNet sorts them, at least one in each. With
    train=True they are cut to the shortest of the batch (to its beginning; with a window, at a random
    place), those of equal length are mixed anew and the batches shuffled in every pass. Real clips are
    changed too: pictures as `changed` does, faces and bodies each in its own way, and with probability ½
    another clip's sound is laid over a clip's, at -5 to 5 dB. Labels stay: whoever the other voice belongs
    to is not in the picture. The twin's clips stay as they are: they have all the variety of its test clips.
    Without train only clips of one length share a batch and nothing is cut off, but for a window, which
    keeps their beginning.

    All of it depends on seed and epoch alone. Every pass is an epoch; `set_epoch` says which comes next.
    """

    def __init__(self, data: SpeakerSet, frames: int, train: bool, seed: int, window: int | None) -> None:
        for argument, value in (("frames", frames), ("window", window)):
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be at least 1, not {value}")
        self.data, self.frames, self.train, self.seed, self.window = data, frames, train, seed, window
        self.lengths = [min(clip.frames, window or clip.frames) for clip in data.clips]
        self.epoch = 0  # of the next pass

    @property
    def fingerprint(self) -> str:
        """Of the clips, and how they are made into batches."""
        return repr((self.data.fingerprint, self.frames, self.train, self.seed, self.window))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def batches(self) -> list[list[int]]:
        """The clips of each batch of the next pass; in training the batches then come in another order."""
        count = len(self.data)
        ties = self._random(self.epoch, 0).permutation(count) if self.train else range(count, 0, -1)
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

    def __iter__(self) -> Iterator[Batch]:
        batches, epoch = self.batches, self.epoch
        self.epoch += 1
        order = self._random(epoch, 2).permutation(len(batches)) if self.train else range(len(batches))
        for number in order:
            yield self._batch(batches[number], self._random(epoch, 1, number))

    def _batch(self, clips: list[int], random: np.random.Generator) -> Batch:
        length = min(self.lengths[i] for i in clips)
        with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes without the interpreter's lock
            visual = list(pool.map(self.data._visual, clips))
        cut = []
        for i, pictures in zip(clips, visual, strict=True):
            free = self.data.clips[i].frames - length if self.window and self.train else 0
            start = int(random.integers(free + 1))
            change = random if self.train and not self.data.synthetic else None
            cut.append(self.data._cut(i, start, start + length, pictures, change))
        streams = {name: torch.cat([one[name] for one, _ in cut]) for name in cut[0][0]}
        return streams, torch.cat([labels for _, labels in cut])

    def _random(self, epoch: int, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch + 1, *key])


def changed(frames: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One of TalkNet's four augmentations, the same for all frames, uint8 (T, 112, 112).

    As they are, mirrored, a square of 0.7 to 1 of the side brought to full size, or turned by up to 15° with
    black corners.
    """
    kind, side = int(random.integers(4)), int(SIDE * random.uniform(0.7, 1))
    left, top = (int(random.integers(SIDE - side + 1)) for _ in range(2))
    turn = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), random.uniform(-15, 15), 1)
    if kind == 0:
        return frames
    if kind == 1:
        return frames[:, :, ::-1]
    if kind == 2:
        cut = frames[:, top : top + side, left : left + side]
        return np.stack([cv2.resize(frame, (SIDE, SIDE)) for frame in cut])
    return np.stack([cv2.warpAffine(frame, turn, (SIDE, SIDE)) for frame in frames])


def overlaid(wave: np.ndarray, voice: np.ndarray, snr: float) -> np.ndarray:
    """A wave int16 (N,) with another one, repeated if need be, laid over it `snr` dB below it in mean power.

    Values that no longer fit are clipped. Where one of them is silent the wave stays as it is.
    """
    clean = wave.astype(np.float64)
    noise = np.resize(voice, len(wave)).astype(np.float64)
    powers = [float(np.mean(x**2)) if len(x) else 0.0 for x in (clean, noise)]
    if 0.0 in powers:
        return wave
    mixed = clean + noise * math.sqrt(powers[0] / powers[1] / 10 ** (snr / 10))
    return np.rint(mixed).clip(-(2**15), 2**15 - 1).astype(np.int16)
