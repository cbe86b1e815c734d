"""Sound as the networks take it: mel-frequency cepstral coefficients, four to a video frame."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

COEFFICIENTS = 13
FILTERS = 26
EMPHASIS = 0.97
LIFTER = 22
ROWS = 4  # audio frames to a video frame


def mfcc(wave: Tensor, *, fps: float = 25, rate: int = 16000) -> Tensor:
    """Mel-frequency cepstral coefficients of a wave (N,) or (B, N), in units of int16: float32 (frames, 13) or (B, frames, 13).

    As TalkNet computes them, and python_speech_features for it: windows of 0.025 · 25/fps s every 0.010 · 25/fps s (both
    rounded to samples), so that four rows fall on a video frame; pre-emphasis x[n] - 0.97 x[n-1], no taper, the power
    spectrum |X|² / nfft, 26 triangular filters even on the mel scale, the logarithm, an orthonormal DCT-II, and lifter
    1 + 11 sin(π n / 22). Row k begins at sample k · step; the last is filled up with zeros. The first coefficient is the
    logarithm of the window's energy. What is 0 counts as 2⁻⁵² there, so digital silence is finite.

    nfft is 512, or the next power of two where a window is longer (below about 20 frames a second, where
    python_speech_features 0.6 cuts the window off).

    Raises ValueError for a wave without samples, or fps or rate not above 0.
    """
    if wave.ndim not in (1, 2) or wave.shape[-1] == 0:
        raise ValueError(f"mfcc takes a wave (N,) or (B, N) with N of at least 1, not {tuple(wave.shape)}")
    if not 0 < fps < math.inf or rate <= 0:
        raise ValueError(f"fps and rate must be above 0, not {fps} and {rate}")
    window, step = (max(1, math.floor(seconds * 25 / fps * rate + 0.5)) for seconds in (0.025, 0.010))
    nfft = max(512, 1 << (window - 1).bit_length())
    x = wave.double()  # filters span many orders of magnitude: float32 would show in the weak ones
    x = torch.cat([x[..., :1], x[..., 1:] - EMPHASIS * x[..., :-1]], -1)
    rows = 1 + max(0, math.ceil((x.shape[-1] - window) / step))
    x = torch.nn.functional.pad(x, (0, (rows - 1) * step + window - x.shape[-1]))
    power = torch.fft.rfft(x.unfold(-1, window, step), nfft).abs().square() / nfft
    filters, transform = _tables(nfft, rate)
    tiny = torch.finfo(torch.float64).eps
    energy, bands = power.sum(-1), power @ filters.to(power.device)
    bands, energy = (values.where(values > 0, torch.full_like(values, tiny)) for values in (bands, energy))
    found = bands.log() @ transform.to(power.device)
    found[..., 0] = energy.log()
    return found.float()


@cache
def _tables(nfft: int, rate: int) -> tuple[Tensor, Tensor]:
    """The filters (nfft / 2 + 1, 26), and DCT-II with the lifter in one matrix (26, 13)."""
    mels = torch.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), FILTERS + 2, dtype=torch.float64)
    edges = torch.floor((nfft + 1) * 700 * (10 ** (mels / 2595) - 1) / rate)
    bins = torch.arange(nfft // 2 + 1, dtype=torch.float64)[:, None]
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
    filters = torch.where(bins < middle, rising, falling)
    filters = filters.where((bins >= left) & (bins < right), torch.zeros_like(filters))
    n, k = (
        torch.arange(FILTERS, dtype=torch.float64)[:, None],
        torch.arange(COEFFICIENTS, dtype=torch.float64),
    )
    transform = (2 / FILTERS) ** 0.5 * torch.cos(math.pi * k * (2 * n + 1) / (2 * FILTERS))
    transform[:, 0] /= 2**0.5
    return filters, transform * (1 + LIFTER / 2 * torch.sin(math.pi * k / LIFTER))
