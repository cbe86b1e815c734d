"""Coefficients of sound: four rows to a frame, finite, and whole windows at every frame rate."""

from __future__ import annotations

import numpy as np
import pytest
import python_speech_features
import torch

from studies.audio import mfcc, mfcc_of_frames


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3000, samples).astype(np.int16)


@pytest.mark.parametrize("fps", [25, 24, 30, 23.976, 50])
def test_coefficients_are_those_that_talknet_takes(fps: float) -> None:
    wave = noise(32000)
    window, step = 0.025 * 25 / fps, 0.010 * 25 / fps
    theirs = python_speech_features.mfcc(wave, 16000, numcep=13, winlen=window, winstep=step)
    ours = mfcc(torch.from_numpy(wave), fps=fps)
    assert ours.dtype == torch.float32 and torch.equal(ours, torch.from_numpy(theirs).float())


def test_four_rows_fall_on_a_frame_and_silence_is_finite() -> None:
    silence = mfcc(torch.zeros(16000))
    assert silence.isfinite().all()
    assert torch.allclose(silence[:, 0], torch.tensor(-52 * np.log(2), dtype=torch.float32))
    assert silence[:, 1:].abs().max() < 1e-6
    wave = torch.zeros(40 * 640 + 240)
    wave[6400 + 400 : 6400 + 470] = 9000.0  # in the windows that begin 160 and 320 samples after frame 10
    rows = mfcc(wave)[:, 0] > -30
    assert len(rows) == 160 and rows.nonzero().flatten().tolist() == [41, 42]


def test_long_windows_are_not_cut_off() -> None:
    wave = noise(8000)
    theirs = python_speech_features.mfcc(wave, 16000, numcep=13, winlen=0.05, winstep=0.02, nfft=1024)
    assert torch.equal(mfcc(wave, fps=12.5), torch.from_numpy(theirs).float())


@pytest.mark.parametrize("samples", [0, 100, 6400, 9000])
def test_a_clip_gets_four_rows_for_each_frame(samples: int) -> None:
    rows = mfcc_of_frames(noise(samples), 10)
    assert rows.shape == (40, 13) and rows.isfinite().all()
    if samples < 6400:
        assert torch.equal(rows[-1], rows[-2])  # the sound is short: its last row goes on


def test_no_sound_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        mfcc(torch.zeros(0))
