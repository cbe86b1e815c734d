"""Sound as the networks take it: mel-frequency cepstral coefficients, four rows to a video frame."""

from __future__ import annotations

import math

import numpy as np
import python_speech_features
import torch
from numpy.typing import NDArray
from torch import Tensor

RATE = 16000  # samples of sound a second
ROWS = 4  # of coefficients to a video frame


def mfcc(wave: Tensor | NDArray[np.int16], *, fps: float = 25) -> Tensor:
    """Mel-frequency cepstral coefficients as TalkNet (Tao et al., 2021) takes them: float32 (rows, 13).

    Windows of 0.025 · 25/fps s begin every 0.010 · 25/fps s, so that four rows fall on a video frame. The
    first coefficient is the logarithm of the window's energy. Digital silence stays finite.

    Args:
        wave: (N,) in units of int16, 16,000 samples a second.
        fps: frames a second of the video.

    Raises:
        ValueError: a wave without samples.
    """
    if len(wave) == 0:
        raise ValueError("mfcc needs at least one sample of sound")
    window, step = 0.025 * 25 / fps, 0.010 * 25 / fps
    # 512 points, as TalkNet; more for a slow video, whose longer windows the package would cut off.
    points = max(512, 2 ** math.ceil(math.log2(window * RATE)))
    samples = np.asarray(wave, dtype=np.float64)
    rows = python_speech_features.mfcc(samples, RATE, winlen=window, winstep=step, numcep=13, nfft=points)
    return torch.from_numpy(rows).float()


def mfcc_of_frames(wave: Tensor | NDArray[np.int16], frames: int, *, fps: float = 25) -> Tensor:
    """Exactly four rows for each video frame: (4 · frames, 13). Of short sound the last row is repeated."""
    rows = mfcc(wave if len(wave) else np.zeros(1, np.int16), fps=fps)[: ROWS * frames]
    return torch.cat([rows, rows[-1:].expand(ROWS * frames - len(rows), -1)])
