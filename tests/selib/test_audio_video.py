"""Coefficients as python_speech_features computes them; videos written, read back and cut, with their sound in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import python_speech_features
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import wavfile
from scipy.signal import lfilter

from selib.video import body_box, crop, frame_rate, read_audio, read_frames, write
from studies.audio import mfcc

RATE = 16000


# --- coefficients -----------------------------------------------------------------------------------------------------


def reference(wave: np.ndarray, fps: float) -> np.ndarray:
    """What TalkNet computes."""
    return np.asarray(
        python_speech_features.mfcc(wave, RATE, numcep=13, winlen=0.025 * 25 / fps, winstep=0.010 * 25 / fps)
    )


def voiced(samples: int, pitch: float = 120) -> np.ndarray:
    """A pulse train through two resonances, with pauses: int16."""
    source = (np.arange(samples) % round(RATE / pitch) == 0) * 1.0
    for hertz, width in ((700, 80), (1200, 90)):
        r = np.exp(-np.pi * width / RATE)
        source = lfilter([1], [1, -2 * r * np.cos(2 * np.pi * hertz / RATE), r * r], source)
    source *= np.sin(np.arange(samples) * 2 * np.pi * 2 / RATE) > -0.5
    return (source / abs(source).max() * 12000).astype(np.int16)


@pytest.mark.parametrize("fps", [25, 24, 30, 23.976, 29.97, 50])
def test_coefficients_are_those_of_python_speech_features(fps: float) -> None:
    rng = np.random.default_rng(0)
    waves = [
        rng.normal(0, 3000, 32000),
        rng.normal(0, 3, 12345),
        voiced(32000),
        voiced(20000) // 8000,
        np.ones(100),
    ]
    for wave in (one.astype(np.int16) for one in waves):
        theirs, ours = reference(wave, fps), mfcc(torch.from_numpy(wave), fps=fps)
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        assert np.abs(ours.numpy() - theirs).max() < 1e-3


@given(st.integers(1, 3000), st.sampled_from([25.0, 24.0, 30.0]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_any_length_gives_as_many_rows_as_theirs(samples: int, fps: float, seed: int) -> None:
    wave = np.random.default_rng(seed).integers(-(2**15), 2**15, samples).astype(np.int16)
    theirs = reference(wave, fps)
    ours = mfcc(torch.from_numpy(wave), fps=fps).numpy()
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-3


def test_four_rows_fall_on_a_frame_and_silence_is_finite() -> None:
    silence = mfcc(torch.zeros(16000))
    assert silence.isfinite().all()
    assert torch.allclose(silence[:, 0], torch.tensor(-52 * np.log(2), dtype=torch.float32))
    assert silence[:, 1:].abs().max() < 1e-6
    wave = torch.zeros(40 * 640 + 240)
    wave[6400 + 400 : 6400 + 470] = 9000.0  # in the windows that begin 160 and 320 samples after frame 10
    rows = mfcc(wave)[:, 0] > -30
    assert len(rows) == 160 and rows.nonzero().flatten().tolist() == [41, 42]


def test_a_batch_is_its_waves_and_units_do_not_depend_on_the_type() -> None:
    waves = torch.from_numpy(np.stack([voiced(4000), voiced(4000, 200)]))
    both = mfcc(waves)
    assert both.shape == (2, 24, 13)
    assert torch.equal(both[1], mfcc(waves[1])) and torch.equal(both, mfcc(waves.float()))


def test_long_windows_are_not_cut_off() -> None:
    wave = np.random.default_rng(0).normal(0, 3000, 8000).astype(np.int16)
    theirs = python_speech_features.mfcc(wave, RATE, numcep=13, winlen=0.05, winstep=0.02, nfft=1024)
    assert np.abs(mfcc(torch.from_numpy(wave), fps=12.5).numpy() - theirs).max() < 1e-3


@pytest.mark.parametrize(
    ("wave", "options", "message"),
    [
        (torch.zeros(0), {}, r"N of at least 1, not \(0,\)"),
        (torch.zeros(1, 1, 9), {}, r"not \(1, 1, 9\)"),
        (torch.zeros(9), {"fps": 0}, "fps and rate must be above 0, not 0"),
        (torch.zeros(9), {"rate": -1}, "must be above 0, not 25 and -1"),
    ],
)
def test_mfcc_refuses(wave: torch.Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mfcc(wave, **options)  # type: ignore[arg-type]


# --- videos -----------------------------------------------------------------------------------------------------------


def levels(count: int, size: tuple[int, int] = (64, 80)) -> list[np.ndarray]:
    """Plain frames that say which they are: 4 n + 20."""
    return [np.full((*size, 3), 20 + 4 * n, np.uint8) for n in range(count)]


def numbers(frames: Sequence[tuple[float, np.ndarray]]) -> list[int]:
    return [round((float(frame.mean()) - 20) / 4) for _, frame in frames]


def clicking(seconds: float, at: float) -> np.ndarray:
    wave = np.zeros(round(seconds * RATE), np.int16)
    wave[round(at * RATE) : round(at * RATE) + 80] = 25000
    return wave


@pytest.mark.parametrize("fps", [25, 30, 23.976])
def test_frames_and_sound_come_back_in_time(tmp_path: Path, fps: float) -> None:
    file = tmp_path / "deep" / "film.mp4"
    write(file, iter(levels(40)), fps=fps, audio=clicking(40 / fps, 1.0))
    found = list(read_frames(file))
    assert numbers(found) == list(range(40)) and found[0][1].shape == (64, 80, 3)
    assert [time for time, _ in found] == pytest.approx([n / fps for n in range(40)], abs=1e-3)
    assert frame_rate(file) == pytest.approx(fps, rel=1e-3)
    sound = read_audio(file)
    assert sound.dtype == np.int16 and len(sound) == pytest.approx(40 / fps * RATE, abs=2 * 1024)
    loud = np.flatnonzero(abs(sound.astype(int)) > 8000)
    assert 16000 - 64 <= loud[0] and loud[-1] <= 16080 + 64
    assert [path.name for path in file.parent.iterdir()] == ["film.mp4"]


def test_resampling_shows_what_is_to_be_seen_then(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", levels(10), fps=25)
    assert numbers(list(read_frames(tmp_path / "a.mp4", fps=50))) == [n // 2 for n in range(20)]
    assert numbers(list(read_frames(tmp_path / "a.mp4", fps=12.5))) == [0, 2, 4, 6, 8]
    assert numbers(list(read_frames(tmp_path / "a.mp4", fps=25))) == list(range(10))
    thirty = list(read_frames(tmp_path / "a.mp4", fps=30))
    assert numbers(thirty) == [int(n / 30 * 25 + 1e-9) for n in range(12)]
    assert [time for time, _ in thirty] == pytest.approx([n / 30 for n in range(12)])
    assert numbers(list(read_frames(tmp_path / "a.mp4", fps=25, start=0.2))) == [5, 6, 7, 8, 9]


def test_a_rate_is_kept_although_matroska_rounds_its_times(tmp_path: Path) -> None:
    file = tmp_path / "a.mkv"
    encode(file, levels(30), 30)
    times = [time for time, _ in read_frames(file)]
    assert times[1] == 0.033 and numbers(list(read_frames(file, fps=30))) == list(range(30))


def encode(
    file: Path, frames: Sequence[np.ndarray], fps: int, setup: Callable[[av.VideoStream], None] | None = None
) -> None:
    """A video without sound, by PyAV alone."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", 10, 8_000_000
        if setup is not None:
            setup(stream)
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def test_reading_can_begin_in_the_middle(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    encode(file, levels(50), 25)
    found = list(read_frames(file, start=1.3))
    first = numbers(found)[0]
    assert 10 < first <= 32  # the last key frame before it
    assert numbers(found) == list(range(first, 50)) and found[0][0] == pytest.approx(first / 25)


def test_a_film_taken_upright_is_turned(tmp_path: Path) -> None:
    frame = np.zeros((64, 96, 3), np.uint8)
    frame[:, :16, 0] = 255  # red to the left
    encode(tmp_path / "a.mp4", [frame] * 3, 25, lambda stream: stream.set_display_rotation(-90))
    _, shown = next(read_frames(tmp_path / "a.mp4"))
    assert shown.shape == (96, 64, 3)
    assert shown[:8, :, 0].min() > 150 and shown[32:, :, 0].max() < 80  # clockwise: red is above


def test_odd_sizes_are_made_even(tmp_path: Path) -> None:
    frame = np.zeros((65, 81, 3), np.uint8)
    frame[-1], frame[:, -1] = 200, 200
    write(tmp_path / "a.mp4", [frame] * 2, fps=25)
    _, shown = next(read_frames(tmp_path / "a.mp4"))
    assert shown.shape == (66, 82, 3) and shown[-1, 10].min() > 120 and shown[10, -1].min() > 120


def test_a_gif_lasts_as_long_as_it_should(tmp_path: Path) -> None:
    write(tmp_path / "a.gif", levels(30), fps=30)
    with Image.open(tmp_path / "a.gif") as opened:
        lasting = []
        for number in range(opened.n_frames):
            opened.seek(number)
            lasting.append(opened.info["duration"])
    assert len(lasting) == 30 and set(lasting) == {30, 40} and sum(lasting) == 1000
    found = list(read_frames(tmp_path / "a.gif"))
    assert numbers(found) == list(range(30)) and [time for time, _ in found[:4]] == pytest.approx(
        [0, 0.03, 0.07, 0.1]
    )
    assert len(list(read_frames(tmp_path / "a.gif", fps=30))) == 30
    write(tmp_path / "b.gif", levels(30), fps=25)
    assert numbers(list(read_frames(tmp_path / "b.gif", fps=25))) == list(range(30))


def test_sound_of_any_file_becomes_one_channel_at_the_rate_asked_for(tmp_path: Path) -> None:
    time = np.arange(44100) / 44100
    left = (8000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
    wavfile.write(tmp_path / "a.wav", 44100, np.stack([left, left], 1))
    sound = read_audio(tmp_path / "a.wav")
    assert abs(len(sound) - RATE) <= 2
    wanted = 8000 * np.sin(2 * np.pi * 440 * np.arange(len(sound)) / RATE)
    assert np.abs(sound - wanted)[200:-200].max() < 200
    assert abs(len(read_audio(tmp_path / "a.wav", rate=8000)) - 8000) <= 2


def test_sound_that_begins_late_is_put_at_its_time(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for number in range(25):
            picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 25)
            container.mux(video.encode(picture))
        piece = av.AudioFrame.from_ndarray(np.full((1, 8000), 5000, np.int16), format="s16", layout="mono")
        piece.rate, piece.pts, piece.time_base = RATE, 8000, Fraction(1, RATE)
        container.mux(sound.encode(piece))
        for stream in (video, sound):
            container.mux(stream.encode(None))
    wave = read_audio(tmp_path / "a.mkv")
    assert len(wave) == RATE and not wave[:8000].any() and (wave[8000:] == 5000).all()


NOISE = [np.random.default_rng(n).integers(0, 256, (96, 96, 3)).astype(np.uint8) for n in range(75)]


@pytest.mark.parametrize("read", [lambda file: list(read_frames(file)), read_audio], ids=["frames", "sound"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "cut short: ends after 1"),
        (lambda content: content[:200], "not a video or audio file, or cut short"),
        (lambda content: b"<html>not found</html>" * 9, "not a video or audio file"),
        (lambda content: b"", "not a video or audio file"),
    ],
    ids=["half", "head", "page", "empty"],
)
def test_damaged_files_are_refused_by_name(
    tmp_path: Path, read: Callable[[Path], object], change: Callable[[bytes], bytes], message: str
) -> None:
    file = tmp_path / "film.mp4"
    sound = np.random.default_rng(0).normal(0, 3000, 3 * RATE).astype(np.int16)
    write(file, NOISE, fps=25, audio=sound)
    read(file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"film.mp4: {message}") as caught:
        read(file)
    assert "\n" not in str(caught.value)


def test_missing_files_and_streams_are_told_apart(tmp_path: Path) -> None:
    for read in (lambda file: list(read_frames(file)), read_audio, frame_rate):
        with pytest.raises(FileNotFoundError, match="none.mp4: no such file"):
            read(tmp_path / "none.mp4")
    write(tmp_path / "mute.mp4", levels(3), fps=25)
    with pytest.raises(ValueError, match="mute.mp4: has no audio stream"):
        read_audio(tmp_path / "mute.mp4")
    wavfile.write(tmp_path / "a.wav", RATE, clicking(1, 0.5))
    for read in (lambda file: list(read_frames(file)), frame_rate):
        with pytest.raises(ValueError, match="a.wav: has no video stream"):
            read(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="fps must be above 0, not 0"):
        read_frames(tmp_path / "mute.mp4", fps=0)
    with pytest.raises(ValueError, match="rate must be at least 1, not 0"):
        read_audio(tmp_path / "a.wav", rate=0)


@pytest.mark.parametrize(
    ("name", "frames", "options", "message"),
    [
        ("a.avi", levels(2), {"fps": 25}, "a.avi: videos are written as .mp4 or .gif"),
        ("a.mp4", [], {"fps": 25}, "no frames to write"),
        ("a.gif", [], {"fps": 25}, "no frames to write"),
        ("a.mp4", levels(2), {"fps": 0}, "fps must be above 0, not 0"),
        (
            "a.mp4",
            [*levels(1), *levels(1, (64, 82))],
            {"fps": 25},
            r"frame 1 must be uint8 \(64, 80, 3\), not uint8 \(64, 82, 3\)",
        ),
        ("a.mp4", [np.zeros((64, 80), np.uint8)], {"fps": 25}, r"frame 0 must be uint8 \(H, W, 3\)"),
        ("a.mp4", [np.zeros((64, 80, 3))], {"fps": 25}, "frame 0 must be uint8 .* not float64"),
        ("a.mp4", levels(2), {"fps": 25, "audio": np.zeros(9)}, r"audio must be int16 \(N,\), not float64"),
        ("a.gif", levels(2), {"fps": 25, "audio": np.zeros(9, np.int16)}, "a GIF has no sound"),
    ],
)
def test_write_refuses_and_leaves_nothing(
    tmp_path: Path, name: str, frames: list[np.ndarray], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / name, frames, **options)
    assert list(tmp_path.iterdir()) == []


# --- crops ------------------------------------------------------------------------------------------------------------


def test_a_crop_is_its_box_in_grey() -> None:
    frame = np.zeros((100, 120, 3), np.uint8)
    frame[20:60, 30:90] = (200, 100, 50)
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert (abs(crop(frame, (30, 20, 90, 60)).astype(int) - grey) <= 1).all()
    wide = crop(
        frame, (30, 20, 90, 60), side=80, margin=0.5
    )  # 120x80 pixels: a quarter more on every side is black
    assert wide.shape == (80, 80) and (wide[:18] == 0).all() and (wide[:, :18] == 0).all()
    assert (abs(wide[22:58, 22:58].astype(int) - grey) <= 1).all()
    assert np.array_equal(crop(frame, (30, 20, 90, 60)), crop(frame, (30.4, 19.6, 89.7, 60.4)))


def test_beyond_the_frame_a_crop_is_grey() -> None:
    frame = np.full((50, 50, 3), 255, np.uint8)
    found = crop(frame, (-25, 0, 25, 50), side=50)
    assert (found[:, :24] == 110).all() and (found[:, 26:] == 255).all()
    assert (crop(frame[..., 0], (40, 40, 60, 60), side=20)[:9, :9] == 255).all()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 10, 20), "x1 < x2"),
        ((0, 20, 10, 10), "y1 < y2"),
        ((0, 0, float("nan"), 5), "finite"),
        ((50, 0, 60, 10), "outside the frame of 50x40 pixels"),
        ((0, -9, 9, -1), "outside"),
    ],
)
def test_crop_refuses(box: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        crop(np.zeros((40, 50, 3), np.uint8), box)


def test_a_body_lies_around_and_below_its_face() -> None:
    assert body_box((100, 100, 120, 140)) == (75, 80, 145, 240)
