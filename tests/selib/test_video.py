"""Videos written and read back, with their sound in time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from selib.video import frame_rate, read_audio, read_frames, write

RATE = 16000


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


def test_a_rate_is_kept_although_matroska_rounds_its_times(tmp_path: Path) -> None:
    file = tmp_path / "a.mkv"
    encode(file, levels(30), 30)
    times = [time for time, _ in read_frames(file)]
    assert times[1] == 0.033 and numbers(list(read_frames(file, fps=30))) == list(range(30))


def encode(
    file: Path,
    frames: Sequence[np.ndarray],
    fps: int,
    setup: Callable[[av.VideoStream], None] | None = None,
    every: int = 1,
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
            picture.pts, picture.time_base = number * every, Fraction(1, fps)
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


def test_a_gif_is_read_at_the_times_of_its_frames(tmp_path: Path) -> None:
    pictures = [Image.fromarray(frame) for frame in levels(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[30, 40, 30, 30])
    found = list(read_frames(tmp_path / "a.gif"))
    assert numbers(found) == list(range(4)) and [time for time, _ in found] == pytest.approx(
        [0, 0.03, 0.07, 0.1]
    )


def test_a_recording_that_states_1000_frames_a_second_is_counted(tmp_path: Path) -> None:
    encode(tmp_path / "a.mkv", levels(8), 1000, every=33)
    assert frame_rate(tmp_path / "a.mkv") == pytest.approx(1000 / 33, rel=0.01)


def test_sound_of_any_file_becomes_one_channel_at_16_khz(tmp_path: Path) -> None:
    time = np.arange(44100) / 44100
    left = (8000 * np.sin(2 * np.pi * 440 * time)).astype(np.int16)
    wavfile.write(tmp_path / "a.wav", 44100, np.stack([left, left], 1))
    sound = read_audio(tmp_path / "a.wav")
    assert abs(len(sound) - RATE) <= 2
    wanted = 8000 * np.sin(2 * np.pi * 440 * np.arange(len(sound)) / RATE)
    assert np.abs(sound - wanted)[200:-200].max() < 200


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
    with pytest.raises(ValueError, match="fps must be above 0.*not 0"):
        read_frames(tmp_path / "mute.mp4", fps=0)


@pytest.mark.parametrize(
    ("name", "frames", "options", "message"),
    [
        ("a.avi", levels(2), {"fps": 25}, "a.avi: videos are written as .mp4"),
        ("a.mp4", [], {"fps": 25}, "no frames to write"),
        ("a.mp4", levels(2), {"fps": 0}, "fps above 0, not 0"),
        (
            "a.mp4",
            [*levels(1), *levels(1, (64, 82))],
            {"fps": 25},
            r"frame 1 must be uint8 \(64, 80, 3\), not uint8 \(64, 82, 3\)",
        ),
        ("a.mp4", [np.zeros((64, 80), np.uint8)], {"fps": 25}, r"frame 0 must be uint8 \(64, 80, 3\)"),
        ("a.mp4", [np.zeros((64, 80, 3))], {"fps": 25}, "frame 0 must be uint8 .* not float64"),
        ("a.mp4", levels(2), {"fps": 25, "audio": np.zeros(9)}, r"audio must be int16 \(N,\), not float64"),
    ],
)
def test_write_refuses_and_leaves_nothing(
    tmp_path: Path, name: str, frames: list[np.ndarray], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / name, frames, **options)
    assert list(tmp_path.iterdir()) == []
