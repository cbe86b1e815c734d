"""People who speak, or only seem to: face and body crops at 25 fps and a 16 kHz track, with the truth about all of it.

Procedural, after FunnyBirds (Hesse et al., ICCV 2023): a clip is rendered from parameters, so it comes with a label for every frame
and pixel, and can be rendered again with one stream muted. A syllable is one event for all three streams: the voice sounds, the mouth
opens, the hands beat. The conditions are the five of WASD (Roxo et al., 2024).
"""

from __future__ import annotations

import cmath
import io
import json
import math
import struct
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Any

import cv2
import numpy as np

from studies.twins import faces
from studies.twins.apart import drawn_by

Params = dict[str, Any]

FPS = 25
RATE = 16000
SIDE = 112
COUNTS = {"train": 320, "val": 60, "test": 240}  # clips
CONDITIONS = ("optimal", "speech impairment", "face occlusion", "human voice noise", "surveillance")
KINDS = (
    "speaking",
    "off-sync",
    "silent",
    "listening",
    "jaw",
)  # what the person in the picture does in a frame
TASKS = ("all", "audio", "face", "body")  # which stream tells
STREAMS = ("audio", "face", "body")
FACE_PARTS = ("skin", "mouth", "eyes", "hair", "cloth", "occluder")
BODY_PARTS = ("torso", "arms", "hands", "head", "occluder")

# What mouth, voice and body do in a turn of each kind: "own" follows the person's own syllables, "other" another person's.
_DOES = {
    "speaking": ("own", "own", "own"),
    "off-sync": ("own", "other", "own"),
    "silent": ("rest", "rest", "rest"),
    "listening": ("rest", "other", "rest"),
    "jaw": ("chew", "rest", "rest"),
}
_GAPS = (
    0.0,
    4.0,
    8.0,
    12.0,
)  # mouth openings that are drawn, in pixels of the face's own frame; others are mixed from them


@dataclass(frozen=True)
class Clip:
    """A rendered clip of T frames.

    Attributes:
        faces, bodies: uint8 (T, 112, 112), grey.
        audio: int16 (640·T,), 16 kHz.
        labels: uint8 (T,), 1 where the person speaks and is heard.
        kinds: uint8 (T,), index into :data:`KINDS`.
        face_parts, body_parts: uint8 (T, 112, 112), 1 + index into :data:`FACE_PARTS` and :data:`BODY_PARTS`, 0 for the background.
    """

    faces: np.ndarray
    bodies: np.ndarray
    audio: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    face_parts: np.ndarray
    body_parts: np.ndarray


# --- parameters -------------------------------------------------------------------------------------------------------


def sample(rng: np.random.Generator, condition: str, task: str = "all") -> Params:
    """Parameters of one clip: who, under which condition, what he or she does when.

    In a single-stream task the three streams are busy or at rest independently of each other, and the label is what that one does.
    """
    person = faces.sample(rng)
    # What hides a mouth, or has one drawn into it, would decide by itself.
    person |= {
        "Smiling": False,
        "Mouth_Slightly_Open": False,
        "Wearing_Hat": False,
        "Blurry": False,
        "angle": 0.0,
        "shift": [0.0, 0.0],
    }
    person["yaw"] *= 0.5
    frames = int(rng.integers(40, 61))
    cuts = [0, frames] if rng.random() < 0.4 else [0, int(frames * (0.35 + 0.3 * rng.random())), frames]
    turns: list[Params] = []
    for start, stop in pairwise(cuts):
        before = turns[-1]["kind"] if turns else None
        if task == "all":
            negative = str(rng.choice(["off-sync", "silent", "listening", "jaw"], p=[0.3, 0.2, 0.3, 0.2]))
            speaks = before != "speaking" if before else rng.random() < 0.45
            kind = "speaking" if speaks else negative
            mouth, voice, body = _DOES[kind]
        else:
            busy = dict(zip(STREAMS, rng.random(3) < 0.5, strict=True))
            kind = "speaking" if busy[task] else "silent"
            mouth, voice, body = (
                "own" if busy["face"] else "rest",
                "other" if busy["audio"] else "rest",
                "own" if busy["body"] else "rest",
            )
        turns.append(
            {"start": start, "stop": stop, "kind": kind, "mouth": mouth, "voice": voice, "body": body}
        )
    male = person["Male"]
    impaired = condition == "speech impairment"
    other_male = bool(rng.random() < 0.5)
    seen = (
        condition != "face occlusion" and task != "body"
    )  # where nothing else tells, nobody keeps still hands
    return {
        "condition": condition,
        "task": task,
        "frames": frames,
        "turns": turns,
        "person": person,
        "voice": _voice(rng, male),
        "other": _voice(rng, other_male),
        "babble": [_voice(rng, bool(rng.random() < 0.5)) for _ in range(2)],
        "rate": faces._between(rng, 3.2, 4.4) * (0.75 if impaired else 1.0),  # syllables a second
        "opening": faces._between(rng, 0.8, 1.15) * (0.55 if impaired else 1.0),
        "level": faces._between(rng, 0.10, 0.22) * (0.5 if impaired else 1.0),
        "lag": faces._between(rng, 0.04, 0.12)
        if impaired
        else 0.0,  # seconds that the voice is behind the mouth
        "snr": faces._between(rng, 1, 8)
        if condition == "surveillance"
        else faces._between(rng, 22, 34),  # dB
        "gesture": faces._between(rng, 0.7, 1.2),
        "hands": str(
            rng.choice(
                ["both", "left", "right", "still"],
                p=[0.25, 0.12, 0.13, 0.5] if seen else [0.5, 0.25, 0.25, 0.0],
            )
        ),
        "fidget": bool(rng.random() < 0.25),
        "occluder": str(rng.choice(["mask", "hand", "microphone"]))
        if condition == "face occlusion"
        else "none",
        "pixels": int(rng.integers(20, 30))
        if condition == "surveillance"
        else 0,  # side of the crop that the camera saw
        "dark": faces._between(rng, 0.35, 0.8) if condition == "surveillance" else 1.0,
        "seed": int(rng.integers(2**31)),
    }


def _voice(rng: np.random.Generator, male: bool) -> Params:
    """Pitch in Hz, length of the vocal tract (formants move with its inverse), breath."""
    pitch = faces._between(rng, 90, 145) if male else faces._between(rng, 165, 245)
    return {
        "pitch": pitch,
        "tract": faces._between(rng, 0.95, 1.08) * (1.0 if male else 0.86),
        "breath": faces._between(rng, 0.02, 0.08),
    }


def scenes(count: int, split: str, seed: int = 0, task: str = "all") -> list[Params]:
    """Parameters of the first `count` clips of a split, the conditions in turn; a larger count only adds clips.

    Raises ValueError for an unknown split or task.
    """
    if split not in COUNTS:
        raise ValueError(f"split must be one of {', '.join(COUNTS)}, not {split!r}")
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    key = [seed, list(COUNTS).index(split), TASKS.index(task)]
    found = []
    for n in range(count):
        # A task that one stream solves is asked where every stream can be seen and heard.
        condition = CONDITIONS[n % len(CONDITIONS)] if task == "all" else "optimal"
        # Eleven characters and two fields: what TalkNet's and BIAS's readers take to be the video of an entity.
        video = f"{split[:2]}{task[:2]}{seed % 100:02d}{n:05d}"
        scene = sample(np.random.default_rng([*key, n]), condition, task)
        found.append({"video": video, "entity": f"{video}_0000_{-(-scene['frames'] // FPS):04d}:1", **scene})
    return found


# --- speech -----------------------------------------------------------------------------------------------------------

# Formants in Hz (Peterson & Barney, 1952, averages of men), and how far the mouth opens for them.
_VOWELS = {
    "a": ((730, 1090, 2440), 1.0),
    "e": ((530, 1840, 2480), 0.75),
    "i": ((270, 2290, 3010), 0.45),
    "o": ((570, 840, 2410), 0.85),
    "u": ((300, 870, 2240), 0.5),
}
_WIDTHS = (80, 100, 140)  # of the formants, in Hz


@dataclass(frozen=True)
class _Syllable:
    onset: float  # seconds
    length: float
    stress: float
    vowel: str
    hiss: float  # loudness of the consonant before the vowel


def _syllables(rng: np.random.Generator, start: float, stop: float, rate: float) -> list[_Syllable]:
    """Speech between two times in seconds: phrases of two to five syllables with pauses between them."""
    found: list[_Syllable] = []
    now = start + 0.12 * rng.random()
    while now < stop - 0.1:
        for beat in range(int(rng.integers(2, 6))):
            length = (0.75 + 0.5 * rng.random()) / rate
            if now + length > stop:
                break
            stress = 1.0 if beat == 0 else 0.55 + 0.45 * rng.random()
            found.append(
                _Syllable(
                    now,
                    length,
                    stress,
                    str(rng.choice(list(_VOWELS))),
                    float(rng.random() < 0.6) * (0.3 + 0.5 * rng.random()),
                )
            )
            now += length
        now += 0.22 + 0.35 * rng.random()
    return found


def _resonant(source: np.ndarray, *poles: complex) -> np.ndarray:
    """Through resonators with these poles, each of gain 1 at zero frequency: float64 (n,), by way of its spectrum."""
    n = 2 * len(source)  # as much silence behind it: nothing comes round
    z = np.exp(-2j * np.pi * np.arange(n // 2 + 1) / n)
    spectrum = np.fft.rfft(source, n)
    for pole in poles:
        low, high = (1 - pole) * (1 - pole.conjugate()), (1 - pole * z) * (1 - pole.conjugate() * z)
        spectrum = spectrum * (low / high)
    return np.fft.irfft(spectrum, n)[: len(source)]


def _sound(
    rng: np.random.Generator, syllables: Sequence[_Syllable], voice: Params, samples: int
) -> np.ndarray:
    """Formant synthesis (Klatt, 1980, in small): a pulse train and some breath through resonators, hiss for consonants. float64, peak about 1."""
    track = np.zeros(samples)
    for s in syllables:
        n = int(s.length * RATE)
        first = int(s.onset * RATE)
        if n < 200 or first >= samples:
            continue
        t = np.arange(n) / RATE
        pitch = voice["pitch"] * (
            1 + 0.1 * (s.stress - 0.7) - 0.12 * t / s.length + 0.01 * np.sin(2 * np.pi * 5.5 * t)
        )
        phase = np.cumsum(pitch) / RATE
        source = np.diff(np.floor(phase), prepend=0) + voice["breath"] * rng.standard_normal(n)
        turns = (2 * math.pi * formant / voice["tract"] / RATE for formant in _VOWELS[s.vowel][0])
        tract = [
            cmath.rect(math.exp(-math.pi * width / RATE), turn)
            for turn, width in zip(turns, _WIDTHS, strict=True)
        ]
        source = _resonant(source, complex(0.8), *tract)  # the first is the glottis
        source /= np.abs(source).max() + 1e-9
        shape = np.minimum(1, t / 0.04) * np.minimum(1, (s.length - t) / 0.07)
        hiss = (
            np.diff(rng.standard_normal(n), prepend=0)
            * np.exp(-0.5 * ((t - 0.025) / 0.015) ** 2)
            * 0.25
            * s.hiss
        )
        part = (s.stress * source * shape.clip(0) + hiss)[: samples - first]
        track[first : first + len(part)] += part
    return track


def _bumps(
    syllables: Sequence[_Syllable], times: np.ndarray, height: dict[str, float] | None = None
) -> np.ndarray:
    """A raised cosine for each syllable, in 0..1 at `times` in seconds: how far the mouth is open, or the beat of a hand."""
    total = np.zeros(len(times))
    for s in syllables:
        place = (times - s.onset) / s.length
        bump = np.where((place > 0) & (place < 1), 0.5 - 0.5 * np.cos(2 * np.pi * place), 0.0)
        total = np.maximum(total, s.stress * (height[s.vowel] if height else 1.0) * bump)
    return total


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(values.astype(np.float32)[None], (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)[
        0
    ]


def _drift(rng: np.random.Generator, frames: int, size: float, sigma: float) -> np.ndarray:
    """Slow noise (T,) of a standard deviation of about `size`."""
    long = _smooth(rng.standard_normal(frames + int(6 * sigma)), sigma) * math.sqrt(
        2 * sigma * math.sqrt(math.pi)
    )
    return size * long[int(3 * sigma) :][:frames]


@dataclass(frozen=True)
class _Course:
    """What goes on in a clip, frame by frame; one source for all streams, so that they are in time with each other."""

    opening: np.ndarray  # (T,) in 0..1
    raised: np.ndarray  # (T,) how far the hands have left their rest, 0..1
    beat: np.ndarray  # (T,) 0..1
    audio: np.ndarray  # int16


def _course(p: Params, muted: Collection[str]) -> _Course:
    """Every stream has random numbers of its own, so that muting one leaves the others as they are."""
    frames, seed = p["frames"], p["seed"]
    times = (np.arange(frames) + 0.5) / FPS
    samples = frames * RATE // FPS
    opening, raised, beat = np.zeros(frames), np.zeros(frames), np.zeros(frames)
    track = np.zeros(samples)
    heights = {vowel: height for vowel, (_, height) in _VOWELS.items()}
    for index, turn in enumerate(p["turns"]):
        start, stop = turn["start"] / FPS, turn["stop"] / FPS
        own = _syllables(np.random.default_rng([seed, 1, index]), start, stop, p["rate"])
        inside = (times >= start) & (times < stop)
        if turn["mouth"] == "own" and "face" not in muted:
            opening = np.maximum(opening, p["opening"] * _bumps(own, times, heights))
        if turn["mouth"] == "chew" and "face" not in muted:
            rng = np.random.default_rng([seed, 2, index])
            rhythm = 0.5 - 0.5 * np.cos(
                2 * np.pi * (1.1 + 0.7 * rng.random()) * (times - start) + 6 * rng.random()
            )
            opening = np.maximum(
                opening, inside * (0.35 + 0.3 * rng.random()) * rhythm * _smooth(inside, 2.0)
            )
        if turn["body"] == "own" and "body" not in muted:
            strokes = _bumps([s for s in own if s.stress > 0.7], times)
            beat = np.maximum(beat, strokes)
            raised = np.maximum(raised, inside * (_smooth(_bumps(own, times) > 0.05, 3.0) > 0.15))
        if turn["voice"] != "rest" and "audio" not in muted:
            rng = np.random.default_rng([seed, 3, index])
            if turn["voice"] == "own":
                late = [_Syllable(s.onset + p["lag"], s.length, s.stress, s.vowel, s.hiss) for s in own]
                track += p["level"] * _sound(rng, late, p["voice"], samples)
            else:
                others = _syllables(rng, start, stop, 3.2 + 1.2 * rng.random())
                track += p["level"] * _sound(rng, others, p["other"], samples)
    rng = np.random.default_rng([seed, 4])
    if p["condition"] == "human voice noise":
        for n, voice in enumerate(p["babble"]):
            words = _syllables(np.random.default_rng([seed, 5, n]), 0, frames / FPS, 3.8)
            track += (0.11, 0.07)[n] * _sound(rng, words, voice, samples)
    noise = _resonant(rng.standard_normal(samples), complex(0.6))
    track += p["level"] * 0.25 / 10 ** (p["snr"] / 20) * noise / noise.std()
    if p["condition"] == "surveillance":  # a hall: a few late echoes
        for delay, gain in ((0.031, 0.4), (0.057, 0.3), (0.089, 0.2)):
            track[int(delay * RATE) :] += gain * track[: -int(delay * RATE)]
    audio = np.rint(track.clip(-1, 1) * 32767).astype(np.int16)
    return _Course(opening.clip(0, 1.2), _smooth(raised, 2.5), beat, audio)


# --- faces --------------------------------------------------------------------------------------------------------------

_OF_FACE = {
    "mouth": "mouth",
    "eyes": "eyes",
    "brows": "eyes",
    "glasses": "eyes",
    "hair": "hair",
    "bangs": "hair",
    "hat": "hair",
    "cloth": "cloth",
    "necktie": "cloth",
    "necklace": "cloth",
}


@cache
def _face_labels() -> np.ndarray:
    """From the parts of studies.twins.faces to FACE_PARTS, uint8 (1 + parts,)."""
    return np.array(
        [0, *(1 + FACE_PARTS.index(_OF_FACE.get(part, "skin")) for part in faces.PARTS)], np.uint8
    )


@dataclass(frozen=True)
class _Person:
    """One person, drawn with every opening of the mouth: grey float32 (218, 178) and labels uint8 (218, 178) each."""

    pictures: list[np.ndarray]
    labels: list[np.ndarray]

    @classmethod
    def drawn(cls, p: Params, gaps: Sequence[float]) -> _Person:
        pictures, labels = [], []
        for gap in gaps:
            image, parts = faces.draw(p["person"] | {"gap": gap})
            grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
            label = _face_labels()[parts]
            _hide(grey, label, p)
            pictures.append(grey)
            labels.append(label)
        return cls(pictures, labels)


def _hide(grey: np.ndarray, label: np.ndarray, p: Params) -> None:
    """Put what hides the mouth before a face, in place."""
    rng = np.random.default_rng([p["seed"], 6])
    tone = float(faces.skin_tone(p["person"]).mean())
    cover = np.zeros(label.shape, np.uint8)
    if p["occluder"] == "mask":
        points = np.array(
            [(44, 126), (89, 112), (134, 126), (130, 166), (110, 188), (89, 194), (68, 188), (48, 166)]
        )
        cv2.fillPoly(cover, [points], 255, cv2.LINE_AA)
        colour, lines = 150 + 90 * rng.random(), [((50, y), (128, y)) for y in (140, 152, 164)]
    elif p["occluder"] == "hand":
        side = 1 if rng.random() < 0.5 else -1
        cv2.ellipse(cover, (89 + 14 * side, 172), (40, 30), 0, 0, 360, 255, -1, cv2.LINE_AA)
        for finger in range(4):
            cv2.line(
                cover,
                (89 + 30 * side, 176),
                (89 - side * (26 - 3 * finger), 138 + 12 * finger),
                255,
                13,
                cv2.LINE_AA,
            )
        colour = tone * 0.9
        lines = [((89 + 12 * side, 146 + 12 * k), (89 - side * (22 - 3 * k), 144 + 12 * k)) for k in range(3)]
    elif p["occluder"] == "microphone":
        cv2.circle(cover, (89, 160), 30, 255, -1, cv2.LINE_AA)
        cv2.rectangle(cover, (80, 186), (98, 217), 255, -1)
        colour, lines = 30 + 40 * rng.random(), [((64, y), (114, y)) for y in (148, 160, 172)]
    else:
        return
    amount = cover.astype(np.float32) / 255
    shade = np.float32(colour) * (1.08 - 0.25 * (np.arange(178, dtype=np.float32) / 178))
    grey += amount * (shade - grey)
    for a, b in lines:
        cv2.line(grey, a, b, float(colour) * 0.72, 1, cv2.LINE_AA)
    label[amount > 0.5] = 1 + FACE_PARTS.index("occluder")


def _face_frames(p: Params, course: _Course) -> tuple[np.ndarray, np.ndarray, _Person]:
    """Crops and labels (T, 112, 112) of the face, and the person with the mouth shut for the body."""
    gaps = course.opening * _GAPS[-1]
    used = [gap for gap in _GAPS if (np.abs(gaps - gap) < 4.0).any() or gap == 0]
    person = _Person.drawn(p, used)
    frames = p["frames"]
    rng = np.random.default_rng([p["seed"], 7])
    turn, zoom = np.radians(_drift(rng, frames, 2.0, 9)), 1 + _drift(rng, frames, 0.02, 9)
    across, down = _drift(rng, frames, 1.5, 6), _drift(rng, frames, 1.5, 6)
    lean, size = np.radians(6 * rng.standard_normal()), 112 / (118 + 12 * rng.random())  # the detector's box
    pictures, labels = [], []
    for t in range(frames):
        high = min(int(np.searchsorted(used, gaps[t])), len(used) - 1)
        low = max(0, high - 1)
        part = float(np.clip((gaps[t] - used[low]) / (used[high] - used[low]), 0, 1)) if high > low else 0.0
        picture = person.pictures[low] * (1 - part) + person.pictures[high] * part
        angle, scale = lean + turn[t], size * zoom[t]
        a, b = math.cos(angle) * scale, math.sin(angle) * scale
        matrix = np.array(
            [[a, b, 56 - a * 89 - b * 122 + across[t]], [-b, a, 56 + b * 89 - a * 122 + down[t]]]
        )
        pictures.append(
            cv2.warpAffine(
                picture, matrix, (SIDE, SIDE), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE
            )
        )
        nearest = person.labels[high if part > 0.5 else low]
        labels.append(cv2.warpAffine(nearest, matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST))
    return np.stack(pictures), np.stack(labels), person


# --- bodies -------------------------------------------------------------------------------------------------------------


def _hands(p: Params, course: _Course) -> dict[int, np.ndarray]:
    """Where the hands are: {-1: left, 1: right} -> (T, 2) in pixels of the crop from the middle of the shoulders."""
    rng = np.random.default_rng([p["seed"], 8])
    frames = p["frames"]
    at: dict[int, np.ndarray] = {}
    for side in (-1, 1):
        rest = np.array([side * (13 + 3 * rng.random()), 47 + 3 * rng.random()])
        up = np.array([side * (18 + 8 * rng.random()), 22 + 8 * rng.random()])
        noise = np.stack([_drift(rng, frames, 0.8, 4), _drift(rng, frames, 0.8, 4)], 1)
        moves = p["hands"] in ("both", {-1: "left", 1: "right"}[side])
        raised = (course.raised * p["gesture"] * moves)[:, None]
        stroke = (course.beat * course.raised * p["gesture"] * moves)[:, None] * np.array([side * 4.0, 11.0])
        at[side] = rest + raised * (up - rest) + stroke + noise
        if p["fidget"] and side == 1:  # a slow movement that is no gesture: it rubs the other arm, say
            when = frames * (0.2 + 0.6 * rng.random())
            slow = np.exp(-0.5 * ((np.arange(frames) - when) / 9) ** 2)[:, None]
            at[side] = at[side] + slow * (1 - course.raised[:, None]) * (np.array([-10.0, 24.0]) - rest) * 0.7
    return at


def _body_frames(p: Params, course: _Course, person: _Person) -> tuple[np.ndarray, np.ndarray]:
    """Crops and labels (T, 112, 112) of the body; its head is too small for lips to show, and keeps its mouth shut."""
    rng = np.random.default_rng([p["seed"], 9])
    frames = p["frames"]
    hands = _hands(p, course)
    wall = np.array(p["person"]["wall"], np.float32).mean(1)
    back = cv2.resize(
        rng.permutation(np.r_[wall, wall[:1]]).reshape(2, 2),
        (2 * SIDE, 2 * SIDE),
        interpolation=cv2.INTER_LINEAR,
    )
    for _ in range(int(rng.integers(1, 4))):  # furniture
        left, top, long, high = (
            int(rng.integers(*span)) for span in ((0, 180), (0, 180), (14, 60), (14, 90))
        )
        cv2.rectangle(back, (left, top), (left + long, top + high), float(rng.integers(30, 220)), -1)
    cloth = float(np.mean(p["person"]["cloth"]))
    if abs(cloth - back.mean()) < 25:
        cloth = cloth + 60 if cloth < 150 else cloth - 60
    tone = float(faces.skin_tone(p["person"]).mean())
    wide = (23 if p["person"]["Male"] else 20) + 3 * p["person"]["Chubby"]
    sway, nod = _drift(rng, frames, 1.2, 8), _drift(rng, frames, 0.7, 5)
    middle = 56 + 4 * (rng.random() - 0.5)
    number = {part: 1 + BODY_PARTS.index(part) for part in BODY_PARTS}
    head_of = np.array(
        [
            0,
            *(
                0 if part == "cloth" else number["occluder" if part == "occluder" else "head"]
                for part in FACE_PARTS
            ),
        ],
        np.uint8,
    )
    small = 0.19  # of the head beside its portrait
    pictures, labels = [], []
    for t in range(frames):
        image, parts = back.copy(), np.zeros((2 * SIDE, 2 * SIDE), np.uint8)
        x, y = middle + sway[t], 44.0

        def paint(
            kind: str, draw: Any, colour: float, image: np.ndarray = image, parts: np.ndarray = parts
        ) -> None:
            """Draw twice: as light and as label."""
            draw(image, colour, cv2.LINE_AA)
            draw(parts, number[kind], cv2.LINE_8)

        def polygon(*points: tuple[float, float]) -> Any:
            corners = np.rint(np.array(points) * 2 * 16).astype(np.int32)
            return lambda on, colour, line: cv2.fillPoly(on, [corners], colour, line, 4)

        def limb(a: np.ndarray, b: np.ndarray, width: int) -> Any:
            ends: list[Any] = [tuple(np.rint(2 * 16 * point).astype(int).tolist()) for point in (a, b)]
            return lambda on, colour, line: cv2.line(on, ends[0], ends[1], colour, width, line, 4)

        paint(
            "torso",
            polygon(
                (x - wide, y + 5),
                (x - 8, y - 3),
                (x + 8, y - 3),
                (x + wide, y + 5),
                (x + wide + 2, 113),
                (x - wide - 2, 113),
            ),
            cloth,
        )
        # The head's own window: its corner is a whole pixel, the rest of its place goes into the warp.
        place = 2 * np.array([x - small * 89 + 0.3 * sway[t], 27 - small * 122 + nod[t]])
        corner = np.floor(place).astype(int)
        matrix = np.array([[2 * small, 0, place[0] - corner[0]], [0, 2 * small, place[1] - corner[1]]])
        rows, columns = slice(max(0, corner[1]), corner[1] + 84), slice(corner[0], corner[0] + 70)
        cut = slice(max(0, -corner[1]), None)
        head = cv2.warpAffine(person.pictures[0], matrix, (70, 84), flags=cv2.INTER_LINEAR)[cut]
        shown = head_of[cv2.warpAffine(person.labels[0], matrix, (70, 84), flags=cv2.INTER_NEAREST)][cut]
        below = image[rows, columns]
        below += cv2.GaussianBlur((shown > 0).astype(np.float32), (0, 0), 0.8) * (head - below)
        np.copyto(parts[rows, columns], shown, where=shown > 0)
        for side, path in hands.items():
            shoulder, hand = np.array([x + side * (wide - 3), y + 8]), np.array([x, y]) + path[t]
            reach = hand - shoulder
            bend = np.array([side * abs(reach[1]), 0]) * 0.25 + np.array([side * 5.0, 4.0])
            elbow = shoulder + 0.55 * reach + bend
            paint("arms", limb(shoulder, elbow, 17), cloth * 0.74)
            paint("arms", limb(elbow, hand, 14), cloth * 0.66)
            paint("hands", limb(hand, hand + reach / (np.linalg.norm(reach) + 1e-6) * 4, 18), tone)
        pictures.append(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        labels.append(parts[::2, ::2])
    return np.stack(pictures), np.stack(labels)


# --- clips --------------------------------------------------------------------------------------------------------------


def _camera(pictures: np.ndarray, p: Params, stream: int) -> np.ndarray:
    """Light, resolution and grain of the camera: float32 (T, 112, 112) -> uint8."""
    rng = np.random.default_rng([p["seed"], 10, stream])
    shaken = []
    for picture in pictures:
        if p["pixels"]:
            coarse = cv2.resize(picture, (p["pixels"], p["pixels"]), interpolation=cv2.INTER_AREA)
            picture = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
        grain = faces._window(rng, SIDE, SIDE)[0] * (6.0 if p["pixels"] else 2.0)
        shaken.append(picture * p["dark"] + grain)
    return np.rint(np.stack(shaken)).clip(0, 255).astype(np.uint8)


def render(params: Params, muted: Collection[str] = ()) -> Clip:
    """A clip; a muted stream ("audio", "face" or "body") shows nobody speaking: no voice, a closed mouth, hands at rest.

    The labels stay those of the whole clip. Raises ValueError for another stream.
    """
    if unknown := [stream for stream in muted if stream not in STREAMS]:
        raise ValueError(f"muted={unknown}: the streams are {', '.join(STREAMS)}")
    p = params
    course = _course(p, muted)
    face, face_parts, person = _face_frames(p, course)
    body, body_parts = _body_frames(p, course, person)
    kinds = np.zeros(p["frames"], np.uint8)
    for turn in p["turns"]:
        kinds[turn["start"] : turn["stop"]] = KINDS.index(turn["kind"])
    return Clip(
        _camera(face, p, 0),
        _camera(body, p, 1),
        course.audio,
        (kinds == KINDS.index("speaking")).astype(np.uint8),
        kinds,
        face_parts,
        body_parts,
    )


def draw_apart(clips: Sequence[tuple[Params, Sequence[str]]]) -> list[Clip]:
    """Many clips, each with the streams to mute, drawn by a process of its own: call it from several threads.

    Raises OSError when that process fails.
    """
    drawn = drawn_by("studies.twins.speakers", "clips", clips)
    stream, found = io.BytesIO(drawn), []
    for _ in clips:
        (size,) = struct.unpack("<q", stream.read(8))
        with np.load(io.BytesIO(stream.read(size)), allow_pickle=False) as arrays:
            found.append(Clip(**{field.name: arrays[field.name] for field in fields(Clip)}))
    return found


def _main() -> None:
    cv2.setNumThreads(1)  # one process a core
    for line in sys.stdin:
        clip, packed = render(*json.loads(line)), io.BytesIO()
        np.savez(packed, **{field.name: getattr(clip, field.name) for field in fields(Clip)})
        sys.stdout.buffer.write(struct.pack("<q", packed.tell()) + packed.getvalue())


if __name__ == "__main__":
    _main()
