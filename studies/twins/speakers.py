"""People who speak, or only seem to: face and body crops at 25 fps, a 16 kHz track, and the truth.

After FunnyBirds (Hesse et al., ICCV 2023): a clip is rendered from parameters, so it comes with a label for
every frame and pixel, and can be rendered again with one stream muted. A syllable is one event for all
streams: the voice sounds, the mouth opens, the hands beat. The conditions are WASD's five (Roxo et al. 2024).
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import cv2
import numpy as np

from studies.twins import faces, sampling
from studies.twins.apart import drawn_by
from studies.twins.face_canvas import noise
from studies.twins.voice import RATE, bumps, drift, resonant, smooth, sound, speech

Params = dict[str, Any]
Drawable = tuple[Params, Sequence[str]]  # a clip, and the streams to mute in it

FPS = 25
PER_FRAME = RATE // FPS  # samples of sound
MOST = 60  # frames of a clip
SIDE = 112
COUNTS = {"train": 320, "val": 60, "test": 240}  # clips
CONDITIONS = ("optimal", "speech impairment", "face occlusion", "human voice noise", "surveillance")
TASKS = ("all", "audio", "face", "body")  # which stream tells
STREAMS = ("audio", "face", "body")
FACE_PARTS = ("skin", "mouth", "eyes", "hair", "cloth", "occluder")
BODY_PARTS = ("torso", "arms", "hands", "head", "occluder")

# What mouth, voice and body do in a turn of each kind: "own" follows the person's syllables, "other"
# another's.
DOES = {
    "speaking": ("own", "own", "own"),
    "off-sync": ("own", "other", "own"),
    "silent": ("rest", "rest", "rest"),
    "listening": ("rest", "other", "rest"),
    "jaw": ("chew", "rest", "rest"),
}
# Mouth openings that are drawn, in pixels of the face's own frame; others are mixed from them.
GAPS = (0.0, 4.0, 8.0, 12.0)


@dataclass(frozen=True)
class Clip:
    """A rendered clip of T frames.

    faces, bodies: grey uint8 (T, 112, 112); audio: int16 (640·T,) at 16 kHz; labels: uint8 (T,), 1 where the
    person speaks and is heard; face_parts, body_parts: uint8 (T, 112, 112), 1 + the index in `FACE_PARTS` or
    `BODY_PARTS` of what a pixel shows, 0 for the background.
    """

    faces: np.ndarray
    bodies: np.ndarray
    audio: np.ndarray
    labels: np.ndarray
    face_parts: np.ndarray
    body_parts: np.ndarray


def sample(rng: np.random.Generator, condition: str, task: str = "all") -> Params:
    """Parameters of one clip: who, under which condition, what he or she does when.

    In a single-stream task the three streams are busy or at rest independently of each other, and the label
    is what that one does.
    """
    between = partial(sampling.between, rng)
    person = faces.sample(rng)
    # What hides a mouth, or has one drawn into it, would decide by itself.
    person.update(Smiling=False, Mouth_Slightly_Open=False, Wearing_Hat=False, Blurry=False)
    person.update(angle=0.0, shift=[0.0, 0.0], yaw=0.5 * person["yaw"])
    frames = int(rng.integers(40, MOST + 1))
    turns = _turns(rng, frames, task)
    other_male = bool(rng.random() < 0.5)
    impaired, far = condition == "speech impairment", condition == "surveillance"
    occluded = condition == "face occlusion"
    # Where nothing else tells, nobody keeps still hands.
    hands = [0.5, 0.25, 0.25, 0.0] if occluded or task == "body" else [0.25, 0.12, 0.13, 0.5]
    return {
        "condition": condition,
        "task": task,
        "frames": frames,
        "turns": turns,
        "person": person,
        "voice": _voice(rng, person["Male"]),
        "other": _voice(rng, other_male),
        "babble": [_voice(rng, bool(rng.random() < 0.5)) for _ in range(2)],
        "rate": between(3.2, 4.4) * (0.75 if impaired else 1.0),  # syllables a second
        "opening": between(0.8, 1.15) * (0.55 if impaired else 1.0),
        "level": between(0.10, 0.22) * (0.5 if impaired else 1.0),
        "lag": between(0.04, 0.12) if impaired else 0.0,  # seconds that the voice is behind the mouth
        "snr": between(1, 8) if far else between(22, 34),  # dB
        "gesture": between(0.7, 1.2),
        "hands": str(rng.choice(["both", "left", "right", "still"], p=hands)),
        "fidget": bool(rng.random() < 0.25),
        "occluder": str(rng.choice(["mask", "hand", "microphone"])) if occluded else "none",
        "pixels": int(rng.integers(20, 30)) if far else 0,  # side of the crop that the camera saw
        "dark": between(0.35, 0.8) if far else 1.0,
        "seed": int(rng.integers(2**31)),
    }


def _turns(rng: np.random.Generator, frames: int, task: str) -> list[Params]:
    """One turn or two: from which frame to which, of what kind, and what mouth, voice and body do."""
    cuts = [0, frames] if rng.random() < 0.4 else [0, int(frames * (0.35 + 0.3 * rng.random())), frames]
    turns: list[Params] = []
    for start, stop in pairwise(cuts):
        if task == "all":
            negative = str(rng.choice(["off-sync", "silent", "listening", "jaw"], p=[0.3, 0.2, 0.3, 0.2]))
            speaks = turns[-1]["kind"] != "speaking" if turns else rng.random() < 0.45
            kind = "speaking" if speaks else negative
            mouth, voice, body = DOES[kind]
        else:
            busy = dict(zip(STREAMS, rng.random(3) < 0.5, strict=True))
            kind = "speaking" if busy[task] else "silent"
            mouth = "own" if busy["face"] else "rest"
            voice = "other" if busy["audio"] else "rest"
            body = "own" if busy["body"] else "rest"
        turns.append(
            {"start": start, "stop": stop, "kind": kind, "mouth": mouth, "voice": voice, "body": body}
        )
    return turns


def _voice(rng: np.random.Generator, male: bool) -> Params:
    """Pitch in Hz, length of the vocal tract (formants move with its inverse), breath."""
    between = partial(sampling.between, rng)
    return {
        "pitch": between(90, 145) if male else between(165, 245),
        "tract": between(0.95, 1.08) * (1.0 if male else 0.86),
        "breath": between(0.02, 0.08),
    }


def scenes(count: int, split: str, seed: int = 0, task: str = "all") -> list[Params]:
    """Parameters of the first clips of a split, the conditions in turn; a larger count only adds clips."""
    key = [seed, list(COUNTS).index(split), TASKS.index(task)]
    found = []
    for n in range(count):
        # A task that one stream solves is asked where every stream can be seen and heard.
        condition = CONDITIONS[n % len(CONDITIONS)] if task == "all" else "optimal"
        # Eleven characters and two fields: what TalkNet and BIAS take to be the video of an entity.
        video = f"{split[:2]}{task[:2]}{seed % 100:02d}{n:05d}"
        scene = sample(np.random.default_rng([*key, n]), condition, task)
        found.append({"video": video, "entity": f"{video}_0000_{-(-scene['frames'] // FPS):04d}:1", **scene})
    return found


@dataclass(frozen=True)
class _Course:
    """What goes on in a clip, frame by frame: one source for all streams, so that they are in time."""

    opening: np.ndarray  # (T,) of the mouth, 0..1.2
    raised: np.ndarray  # (T,) how far the hands have left their rest, 0..1
    beat: np.ndarray  # (T,) of the hands, 0..1
    audio: np.ndarray  # int16 (640·T,)


def _course(p: Params, muted: Collection[str]) -> _Course:
    """Every stream has random numbers of its own, so that muting one leaves the others as they are."""
    frames, seed = p["frames"], p["seed"]
    times = (np.arange(frames) + 0.5) / FPS
    opening, raised, beat = np.zeros(frames), np.zeros(frames), np.zeros(frames)
    track = np.zeros(frames * PER_FRAME)
    for index, turn in enumerate(p["turns"]):
        start, stop = turn["start"] / FPS, turn["stop"] / FPS
        own = speech(np.random.default_rng([seed, 1, index]), start, stop, p["rate"])
        inside = (times >= start) & (times < stop)
        if turn["mouth"] == "own" and "face" not in muted:
            opening = np.maximum(opening, p["opening"] * bumps(own, times, mouth=True))
        if turn["mouth"] == "chew" and "face" not in muted:
            rng = np.random.default_rng([seed, 2, index])
            phase = 2 * np.pi * (1.1 + 0.7 * rng.random()) * (times - start) + 6 * rng.random()
            rhythm = 0.5 - 0.5 * np.cos(phase)
            chewed = inside * (0.35 + 0.3 * rng.random()) * rhythm * smooth(inside, 2.0)
            opening = np.maximum(opening, chewed)
        if turn["body"] == "own" and "body" not in muted:
            beat = np.maximum(beat, bumps([s for s in own if s.stress > 0.7], times))
            raised = np.maximum(raised, inside * (smooth(bumps(own, times) > 0.05, 3.0) > 0.15))
        if turn["voice"] != "rest" and "audio" not in muted:
            rng = np.random.default_rng([seed, 3, index])
            if turn["voice"] == "own":
                said, voice = [replace(s, onset=s.onset + p["lag"]) for s in own], p["voice"]
            else:
                said, voice = speech(rng, start, stop, 3.2 + 1.2 * rng.random()), p["other"]
            track += p["level"] * sound(rng, said, voice, len(track))
    return _Course(opening.clip(0, 1.2), smooth(raised, 2.5), beat, _recorded(p, track))


def _recorded(p: Params, track: np.ndarray) -> np.ndarray:
    """What the microphone hears of a voice, float64 (N,): with other people, noise and echoes; int16 (N,)."""
    seed = p["seed"]
    rng = np.random.default_rng([seed, 4])
    if p["condition"] == "human voice noise":
        for n, (voice, level) in enumerate(zip(p["babble"], (0.11, 0.07), strict=True)):
            words = speech(np.random.default_rng([seed, 5, n]), 0, p["frames"] / FPS, 3.8)
            track += level * sound(rng, words, voice, len(track))
    noise = resonant(rng.standard_normal(len(track)), complex(0.6))
    track += p["level"] * 0.25 / 10 ** (p["snr"] / 20) * noise / noise.std()
    if p["condition"] == "surveillance":  # a hall: a few late echoes
        for delay, gain in ((0.031, 0.4), (0.057, 0.3), (0.089, 0.2)):
            track[int(delay * RATE) :] += gain * track[: -int(delay * RATE)]
    return np.rint(track.clip(-1, 1) * 32767).astype(np.int16)


_OF_FACE = {"mouth": "mouth"}
_OF_FACE |= dict.fromkeys(("eyes", "brows", "glasses"), "eyes")
_OF_FACE |= dict.fromkeys(("hair", "bangs", "hat"), "hair")
_OF_FACE |= dict.fromkeys(("cloth", "necktie", "necklace"), "cloth")
# From the labels of studies.twins.faces to those of FACE_PARTS.
_FACE_LABELS = np.array(
    [0, *(1 + FACE_PARTS.index(_OF_FACE.get(part, "skin")) for part in faces.PARTS)], np.uint8
)

Portrait = tuple[np.ndarray, np.ndarray]  # grey float32 and labels uint8, (218, 178) each


def _portrait(p: Params, gap: float) -> Portrait:
    """The person with the mouth open by so many pixels."""
    image, parts = faces.draw(p["person"] | {"gap": gap})
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    labels = _FACE_LABELS[parts]
    if p["occluder"] != "none":
        _hide(grey, labels, p)
    return grey, labels


def _hide(grey: np.ndarray, labels: np.ndarray, p: Params) -> None:
    """Put what hides the mouth before a face, in place."""
    rng = np.random.default_rng([p["seed"], 6])
    cover = np.zeros(labels.shape, np.uint8)
    if p["occluder"] == "mask":
        outline = [(44, 126), (89, 112), (134, 126), (130, 166), (110, 188), (89, 194), (68, 188), (48, 166)]
        cv2.fillPoly(cover, [np.array(outline)], 255, cv2.LINE_AA)
        colour, lines = 150 + 90 * rng.random(), [((50, y), (128, y)) for y in (140, 152, 164)]
    elif p["occluder"] == "hand":
        side = 1 if rng.random() < 0.5 else -1
        cv2.ellipse(cover, (89 + 14 * side, 172), (40, 30), 0, 0, 360, 255, -1, cv2.LINE_AA)
        for finger in range(4):
            tip = (89 - side * (26 - 3 * finger), 138 + 12 * finger)
            cv2.line(cover, (89 + 30 * side, 176), tip, 255, 13, cv2.LINE_AA)
        colour = float(faces.skin_tone(p["person"]).mean()) * 0.9
        lines = [((89 + 12 * side, 146 + 12 * k), (89 - side * (22 - 3 * k), 144 + 12 * k)) for k in range(3)]
    else:  # a microphone
        cv2.circle(cover, (89, 160), 30, 255, -1, cv2.LINE_AA)
        cv2.rectangle(cover, (80, 186), (98, 217), 255, -1)
        colour, lines = 30 + 40 * rng.random(), [((64, y), (114, y)) for y in (148, 160, 172)]
    amount = cover.astype(np.float32) / 255
    shade = np.float32(colour) * (1.08 - 0.25 * (np.arange(178, dtype=np.float32) / 178))
    grey += amount * (shade - grey)
    for a, b in lines:
        cv2.line(grey, a, b, float(colour) * 0.72, 1, cv2.LINE_AA)
    labels[amount > 0.5] = 1 + FACE_PARTS.index("occluder")


def _face_frames(p: Params, course: _Course) -> tuple[np.ndarray, np.ndarray, Portrait]:
    """Crops float32 and labels uint8 (T, 112, 112) of the face; the portrait with a shut mouth."""
    gaps = course.opening * GAPS[-1]
    used = [gap for gap in GAPS if (np.abs(gaps - gap) < 4.0).any() or gap == 0]
    portraits = [_portrait(p, gap) for gap in used]
    frames = p["frames"]
    rng = np.random.default_rng([p["seed"], 7])
    turn, zoom = np.radians(drift(rng, frames, 2.0, 9)), 1 + drift(rng, frames, 0.02, 9)
    across, down = drift(rng, frames, 1.5, 6), drift(rng, frames, 1.5, 6)
    lean, size = np.radians(6 * rng.standard_normal()), 112 / (118 + 12 * rng.random())  # the detector's box
    warp = partial(cv2.warpAffine, dsize=(SIDE, SIDE))
    pictures, labels = [], []
    for t in range(frames):
        high = min(int(np.searchsorted(used, gaps[t])), len(used) - 1)
        low = max(0, high - 1)
        part = float(np.clip((gaps[t] - used[low]) / (used[high] - used[low]), 0, 1)) if high > low else 0.0
        picture = portraits[low][0] * (1 - part) + portraits[high][0] * part
        nearest = portraits[high if part > 0.5 else low][1]
        angle, scale = lean + turn[t], size * zoom[t]
        a, b = math.cos(angle) * scale, math.sin(angle) * scale
        matrix = np.array(
            [[a, b, 56 - a * 89 - b * 122 + across[t]], [-b, a, 56 + b * 89 - a * 122 + down[t]]]
        )
        pictures.append(warp(picture, matrix, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE))
        labels.append(warp(nearest, matrix, flags=cv2.INTER_NEAREST))
    return np.stack(pictures), np.stack(labels), portraits[0]


_TORSO, _ARMS, _HANDS, _HEAD, _HIDDEN = range(1, 6)  # the labels of BODY_PARTS
_ON_BODY = np.array(
    [0, _HEAD, _HEAD, _HEAD, _HEAD, 0, _HIDDEN], np.uint8
)  # of a face's labels; its cloth is left out
_SMALL = 0.19  # the head on a body beside its portrait


class _Figure:
    """A body drawn twice at double size, as light and as labels; coordinates are pixels of the crop."""

    def __init__(self, back: np.ndarray) -> None:
        self.image, self.parts = back.copy(), np.zeros(back.shape, np.uint8)

    def polygon(self, label: int, colour: float, *points: tuple[float, float]) -> None:
        corners = [np.rint(32 * np.array(points)).astype(np.int32)]  # the last four bits are a fraction
        cv2.fillPoly(self.image, corners, colour, cv2.LINE_AA, 4)
        cv2.fillPoly(self.parts, corners, label, cv2.LINE_8, 4)

    def limb(self, label: int, colour: float, a: np.ndarray, b: np.ndarray, width: int) -> None:
        first, last = (np.rint(32 * point).astype(int).tolist() for point in (a, b))
        cv2.line(self.image, first, last, colour, width, cv2.LINE_AA, 4)
        cv2.line(self.parts, first, last, label, width, cv2.LINE_8, 4)

    def head(self, portrait: Portrait, x: float, y: float) -> None:
        """A small portrait with its upper left corner at (x, y)."""
        place = 2 * np.array([x, y])
        corner = np.floor(place).astype(int)  # a whole pixel; the rest of its place goes into the warp
        matrix = np.array([[2 * _SMALL, 0, place[0] - corner[0]], [0, 2 * _SMALL, place[1] - corner[1]]])
        rows, columns = slice(max(0, corner[1]), corner[1] + 84), slice(corner[0], corner[0] + 70)
        cut = slice(max(0, -corner[1]), None)
        head = cv2.warpAffine(portrait[0], matrix, (70, 84), flags=cv2.INTER_LINEAR)[cut]
        labels = _ON_BODY[cv2.warpAffine(portrait[1], matrix, (70, 84), flags=cv2.INTER_NEAREST)][cut]
        below = self.image[rows, columns]
        below += cv2.GaussianBlur((labels > 0).astype(np.float32), (0, 0), 0.8) * (head - below)
        np.copyto(self.parts[rows, columns], labels, where=labels > 0)


def _hands(p: Params, course: _Course) -> dict[int, np.ndarray]:
    """Where the hands are, {-1: left, 1: right}: (T, 2) in pixels from the middle of the shoulders."""
    rng = np.random.default_rng([p["seed"], 8])
    frames = p["frames"]
    at: dict[int, np.ndarray] = {}
    for side in (-1, 1):
        rest = np.array([side * (13 + 3 * rng.random()), 47 + 3 * rng.random()])
        up = np.array([side * (18 + 8 * rng.random()), 22 + 8 * rng.random()])
        noise = np.stack([drift(rng, frames, 0.8, 4), drift(rng, frames, 0.8, 4)], 1)
        moves = p["hands"] in ("both", {-1: "left", 1: "right"}[side])
        raised = (course.raised * p["gesture"] * moves)[:, None]
        stroke = (course.beat * course.raised * p["gesture"] * moves)[:, None] * np.array([side * 4.0, 11.0])
        at[side] = rest + raised * (up - rest) + stroke + noise
        if p["fidget"] and side == 1:  # a slow movement that is no gesture: it rubs the other arm, say
            when = frames * (0.2 + 0.6 * rng.random())
            slow = np.exp(-0.5 * ((np.arange(frames) - when) / 9) ** 2)[:, None]
            at[side] = at[side] + slow * (1 - course.raised[:, None]) * (np.array([-10.0, 24.0]) - rest) * 0.7
    return at


def _room(p: Params, rng: np.random.Generator) -> np.ndarray:
    """The wall and some furniture, grey float32 (224, 224)."""
    wall = np.array(p["person"]["wall"], np.float32).mean(1)
    corners = rng.permutation(np.r_[wall, wall[:1]]).reshape(2, 2)
    back = cv2.resize(corners, (2 * SIDE, 2 * SIDE), interpolation=cv2.INTER_LINEAR)
    for _ in range(int(rng.integers(1, 4))):
        left, top = (int(rng.integers(0, 180)) for _ in range(2))
        right, bottom = left + int(rng.integers(14, 60)), top + int(rng.integers(14, 90))
        cv2.rectangle(back, (left, top), (right, bottom), float(rng.integers(30, 220)), -1)
    return back


def _body_frames(p: Params, course: _Course, portrait: Portrait) -> tuple[np.ndarray, np.ndarray]:
    """Crops and labels (T, 112, 112) of the body, whose head is too small to show lips."""
    rng = np.random.default_rng([p["seed"], 9])
    frames, person = p["frames"], p["person"]
    hands = _hands(p, course)
    back = _room(p, rng)
    cloth = float(np.mean(person["cloth"]))
    if abs(cloth - back.mean()) < 25:
        cloth = cloth + 60 if cloth < 150 else cloth - 60
    tone = float(faces.skin_tone(person).mean())
    wide = (23 if person["Male"] else 20) + 3 * person["Chubby"]
    sway, nod = drift(rng, frames, 1.2, 8), drift(rng, frames, 0.7, 5)
    middle = 56 + 4 * (rng.random() - 0.5)
    pictures, labels = [], []
    for t in range(frames):
        figure = _Figure(back)
        x, y = middle + sway[t], 44.0
        left, right = x - wide, x + wide
        shoulders = [(left, y + 5), (x - 8, y - 3), (x + 8, y - 3), (right, y + 5)]
        figure.polygon(_TORSO, cloth, *shoulders, (right + 2, 113), (left - 2, 113))
        figure.head(portrait, x - _SMALL * 89 + 0.3 * sway[t], 27 - _SMALL * 122 + nod[t])
        for side, path in hands.items():
            shoulder, hand = np.array([x + side * (wide - 3), y + 8]), np.array([x, y]) + path[t]
            reach = hand - shoulder
            bend = np.array([side * abs(reach[1]), 0]) * 0.25 + np.array([side * 5.0, 4.0])
            elbow = shoulder + 0.55 * reach + bend
            fingers = hand + reach / (np.linalg.norm(reach) + 1e-6) * 4
            figure.limb(_ARMS, cloth * 0.74, shoulder, elbow, 17)
            figure.limb(_ARMS, cloth * 0.66, elbow, hand, 14)
            figure.limb(_HANDS, tone, hand, fingers, 18)
        pictures.append(cv2.resize(figure.image, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
        labels.append(figure.parts[::2, ::2])
    return np.stack(pictures), np.stack(labels)


def _camera(pictures: np.ndarray, p: Params, stream: int) -> np.ndarray:
    """Light, resolution and grain of the camera: float32 (T, 112, 112) -> uint8."""
    rng = np.random.default_rng([p["seed"], 10, stream])
    taken = []
    for picture in pictures:
        if p["pixels"]:
            coarse = cv2.resize(picture, (p["pixels"], p["pixels"]), interpolation=cv2.INTER_AREA)
            picture = cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
        grain = noise(rng, SIDE, SIDE)[0] * (6.0 if p["pixels"] else 2.0)
        taken.append(picture * p["dark"] + grain)
    return np.rint(np.stack(taken)).clip(0, 255).astype(np.uint8)


def render(params: Params, muted: Collection[str] = ()) -> Clip:
    """A clip. A muted stream, "audio", "face" or "body", has no voice, a closed mouth or hands at rest.

    The labels stay those of the whole clip. Raises ValueError for another stream.
    """
    if unknown := [stream for stream in muted if stream not in STREAMS]:
        raise ValueError(f"muted={unknown}: the streams are {', '.join(STREAMS)}")
    course = _course(params, muted)
    face, face_parts, portrait = _face_frames(params, course)
    body, body_parts = _body_frames(params, course, portrait)
    labels = np.zeros(params["frames"], np.uint8)
    for turn in params["turns"]:
        labels[turn["start"] : turn["stop"]] = turn["kind"] == "speaking"
    seen, around = _camera(face, params, 0), _camera(body, params, 1)
    return Clip(seen, around, course.audio, labels, face_parts, body_parts)


def draw(clips: Sequence[Drawable]) -> list[Clip]:
    """Many clips, each with the streams to mute, by a process of their own: call it from several threads.

    A few are drawn right here: starting a process takes as long. Raises OSError when the process fails.
    """
    if len(clips) <= 3:
        return [render(*clip) for clip in clips]
    stream = io.BytesIO(drawn_by("studies.twins.speakers", "clips", clips))
    return [Clip(*(np.load(stream, allow_pickle=False) for _ in fields(Clip))) for _ in clips]


def _main() -> None:
    cv2.setNumThreads(1)  # one process a core
    for line in sys.stdin:
        clip, packed = render(*json.loads(line)), io.BytesIO()
        for field in fields(Clip):
            np.save(packed, getattr(clip, field.name))
        sys.stdout.buffer.write(packed.getvalue())


if __name__ == "__main__":
    _main()
