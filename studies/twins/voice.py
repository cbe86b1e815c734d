"""Speech for the speakers twin: syllables in time, and the sound of a voice that says them."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

RATE = 16000  # samples a second

# Formants in Hz (Peterson & Barney, 1952, averages of men), and how far the mouth opens for them.
VOWELS = {
    "a": ((730, 1090, 2440), 1.0),
    "e": ((530, 1840, 2480), 0.75),
    "i": ((270, 2290, 3010), 0.45),
    "o": ((570, 840, 2410), 0.85),
    "u": ((300, 870, 2240), 0.5),
}
WIDTHS = (80, 100, 140)  # of the formants, in Hz


@dataclass(frozen=True)
class Syllable:
    onset: float  # seconds
    length: float
    stress: float
    vowel: str
    hiss: float  # loudness of the consonant before the vowel


def speech(rng: np.random.Generator, start: float, stop: float, rate: float) -> list[Syllable]:
    """Syllables between two times in seconds, `rate` a second: phrases of two to five, then a pause."""
    found: list[Syllable] = []
    now = start + 0.12 * rng.random()
    while now < stop - 0.1:
        for beat in range(int(rng.integers(2, 6))):
            length = (0.75 + 0.5 * rng.random()) / rate
            if now + length > stop:
                break
            stress = 1.0 if beat == 0 else 0.55 + 0.45 * rng.random()
            vowel = str(rng.choice(list(VOWELS)))
            hiss = float(rng.random() < 0.6) * (0.3 + 0.5 * rng.random())
            found.append(Syllable(now, length, stress, vowel, hiss))
            now += length
        now += 0.22 + 0.35 * rng.random()
    return found


def resonant(source: np.ndarray, *poles: complex) -> np.ndarray:
    """A signal (N,) through resonators with these poles, each of gain 1 at zero frequency; float64 (N,)."""
    n = 2 * len(source)  # padded with silence, so that nothing comes round
    z = np.exp(-2j * np.pi * np.arange(n // 2 + 1) / n)
    spectrum = np.fft.rfft(source, n)
    for pole in poles:
        low, high = (1 - pole) * (1 - pole.conjugate()), (1 - pole * z) * (1 - pole.conjugate() * z)
        spectrum = spectrum * (low / high)
    return np.fft.irfft(spectrum, n)[: len(source)]


def sound(
    rng: np.random.Generator, syllables: Sequence[Syllable], voice: dict[str, Any], samples: int
) -> np.ndarray:
    """Formant synthesis (Klatt, 1980, in small): float64 (samples,), peak about 1."""
    track = np.zeros(samples)
    for s in syllables:
        n, first = int(s.length * RATE), int(s.onset * RATE)
        if n < 200 or first >= samples:
            continue
        t = np.arange(n) / RATE
        vibrato = 0.01 * np.sin(2 * np.pi * 5.5 * t)
        pitch = voice["pitch"] * (1 + 0.1 * (s.stress - 0.7) - 0.12 * t / s.length + vibrato)
        pulses = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0)
        source = pulses + voice["breath"] * rng.standard_normal(n)
        poles = [complex(0.8)]  # the glottis; then the vocal tract
        for formant, width in zip(VOWELS[s.vowel][0], WIDTHS, strict=True):
            turn = 2 * math.pi * formant / voice["tract"] / RATE
            poles.append(cmath.rect(math.exp(-math.pi * width / RATE), turn))
        source = resonant(source, *poles)
        source /= np.abs(source).max() + 1e-9
        shape = np.minimum(1, t / 0.04) * np.minimum(1, (s.length - t) / 0.07)
        burst = np.exp(-0.5 * ((t - 0.025) / 0.015) ** 2)
        hiss = np.diff(rng.standard_normal(n), prepend=0) * burst * 0.25 * s.hiss
        part = (s.stress * source * shape.clip(0) + hiss)[: samples - first]
        track[first : first + len(part)] += part
    return track


def bumps(syllables: Sequence[Syllable], times: np.ndarray, *, mouth: bool = False) -> np.ndarray:
    """A raised cosine in 0..1 for each syllable, at `times` in seconds: how a hand beats, or the mouth
    opens.
    """
    total = np.zeros(len(times))
    for s in syllables:
        place = (times - s.onset) / s.length
        bump = np.where((place > 0) & (place < 1), 0.5 - 0.5 * np.cos(2 * np.pi * place), 0.0)
        total = np.maximum(total, s.stress * (VOWELS[s.vowel][1] if mouth else 1.0) * bump)
    return total


def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """Values (N,) blurred by a Gaussian, float32."""
    row = values.astype(np.float32)[None]
    return cv2.GaussianBlur(row, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)[0]


def drift(rng: np.random.Generator, frames: int, size: float, sigma: float) -> np.ndarray:
    """Slow noise (T,) of a standard deviation of about `size`."""
    long = smooth(rng.standard_normal(frames + int(6 * sigma)), sigma)
    long = long * math.sqrt(2 * sigma * math.sqrt(math.pi))
    return size * long[int(3 * sigma) :][:frames]
