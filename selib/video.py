"""Videos by PyAV: frames and sound on one clock, frames written back with their sound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

from selib.atomic import replacing

ROUNDING = 1e-3  # seconds: Matroska and WebM keep times in whole milliseconds


def read_frames(
    path: str | Path, *, fps: float | None = None, start: float = 0.0
) -> Iterator[tuple[float, np.ndarray]]:
    """The frames of a video, each with its time in seconds and as RGB uint8 (H, W, 3), turned upright.

    Time 0 is where the file begins, with picture or sound, as for `read_audio`. fps: resampled to that rate, so that frame
    k is what is seen at k / fps: the last one that has begun by then; a GIF or a phone's variable rate can be read so.
    start: seconds to pass over: with fps frame by frame, without it as far as to the last key frame before.

    Raises FileNotFoundError when it is not there, ValueError when it is no video, is damaged or ends early (what comes
    before the damage has been yielded by then), or fps is not above 0.
    """
    if fps is not None and not 0 < fps < np.inf:
        raise ValueError(f"fps must be above 0, not {fps}")
    frames = _frames(Path(path), start)
    return frames if fps is None else _resampled(frames, fps, max(start, 0.0))


def frame_rate(path: str | Path) -> float:
    """Frames a second of a video, on average; errors as for `read_frames`."""
    path = Path(path)
    with _opened(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path}: has no video stream")
        return 1 / _step(container.streams.video[0])


def _frames(path: Path, begin: float) -> Iterator[tuple[float, np.ndarray]]:
    with _opened(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path}: has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        start, end = _start(container), 0.0
        if begin > 0:
            container.seek(int((start + begin) * av.time_base), backward=True)
        for frame in container.decode(stream):
            if frame.pts is None:  # a raw stream without a clock: frames in even steps
                time = end
            else:
                time = float(frame.pts * frame.time_base) - start
            end = time + _step(stream)
            yield time, np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        if end == 0.0:
            raise ValueError(f"{path}: holds no frames" + (f" from {begin:.2f} s on" if begin > 0 else ""))
        _complete(path, stream, end + start)


def _resampled(
    frames: Iterator[tuple[float, np.ndarray]], fps: float, start: float
) -> Iterator[tuple[float, np.ndarray]]:
    number, shown, before, step = max(0, int(np.ceil((start - ROUNDING) * fps))), None, start, 1 / fps
    for time, frame in frames:
        while shown is not None and number / fps < time - ROUNDING:
            yield number / fps, shown
            number += 1
        if shown is not None:
            step = time - before
        shown, before = frame, time
    # the last one is shown as long as the one before, and half a frame of that is none
    while shown is not None and (number + 0.5) / fps < before + step:
        yield number / fps, shown
        number += 1


def read_audio(path: str | Path, *, rate: int = 16000) -> np.ndarray:
    """The sound of a video or audio file: int16 (N,), all channels mixed into one, sample n at n / rate seconds.

    Raises FileNotFoundError when it is not there, ValueError when it has no sound, is damaged or ends early.
    """
    path = Path(path)
    if rate < 1:
        raise ValueError(f"rate must be at least 1, not {rate}")
    with _opened(path) as container:
        if not container.streams.audio:
            raise ValueError(f"{path}: has no audio stream")
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
        start, first, end = _start(container), None, 0.0
        parts = []
        for frame in container.decode(stream):
            if frame.pts is not None:
                time = float(frame.pts * frame.time_base)
                first, end = time if first is None else first, time + frame.samples / frame.sample_rate
            parts += resampler.resample(frame)
        if not parts:
            raise ValueError(f"{path}: its audio stream holds no samples")
        parts += resampler.resample(None)  # what the filter still holds
        _complete(path, stream, end)
    wave = np.concatenate([part.to_ndarray()[0] for part in parts])
    late = 0 if first is None else round((first - start) * rate)
    return np.concatenate([np.zeros(late, np.int16), wave]) if late > 0 else wave[-late:]


def write(
    path: str | Path,
    frames: Iterable[np.ndarray],
    *,
    fps: float,
    audio: np.ndarray | None = None,
    rate: int = 16000,
) -> None:
    """Write frames, uint8 (H, W, 3) all of one size, as .mp4 with a sound track or as .gif without one.

    The MP4 is what browsers play: H.264 (MPEG-4 where this FFmpeg has no libx264) in 4:2:0, an odd height or width made
    even by repeating the last row or column, and AAC from audio, int16 (N,) mono at `rate`. A GIF has no sound, so audio
    is refused; its frames last whole hundredths of a second that add up to the right time.

    Raises ValueError for another suffix, no frames, a wrong shape or dtype, or fps not above 0; then nothing is written.
    """
    path = Path(path)
    if not 0 < fps < np.inf:
        raise ValueError(f"fps must be above 0, not {fps}")
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise ValueError(f"{path}: videos are written as .mp4 or .gif")
    if audio is not None and (path.suffix.lower() == ".gif" or audio.ndim != 1 or audio.dtype != np.int16):
        raise ValueError(
            f"{path}: a GIF has no sound: leave audio out or write an .mp4"
            if path.suffix.lower() == ".gif"
            else f"audio must be int16 (N,), not {audio.dtype} {audio.shape}"
        )
    with replacing(path) as part:
        if path.suffix.lower() == ".gif":
            _write_gif(part, _checked(frames), fps)
        else:
            _write_mp4(part, _checked(frames), Fraction(fps).limit_denominator(1001), audio, rate)


def _checked(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    size = None
    for number, frame in enumerate(frames):
        size = size or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != size:
            wanted = size if number else "(H, W, 3)"
            raise ValueError(f"frame {number} must be uint8 {wanted}, not {frame.dtype} {frame.shape}")
        yield frame
    if size is None:
        raise ValueError("no frames to write")


def _write_gif(part: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    ends = [round(100 * number / fps) for number in range(len(images) + 1)]
    lasting = [10 * (after - before) for before, after in pairwise(ends)]
    images[0].save(part, format="GIF", save_all=True, append_images=images[1:], duration=lasting, loop=0)


def _write_mp4(
    part: Path, frames: Iterator[np.ndarray], fps: Fraction, audio: np.ndarray | None, rate: int
) -> None:
    with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as container:
        first = next(frames)
        height, width, _ = first.shape
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        video: Any = container.add_stream(codec, rate=fps)
        video.width, video.height, video.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        video.options = {"crf": "18", "preset": "veryfast"} if codec == "libx264" else {"qscale": "3"}
        sound: Any = None if audio is None else container.add_stream("aac", rate=rate, layout="mono")
        said = 0

        def speak(until: int) -> None:
            """Sound up to that sample goes to the file beside its frames, so that a player need not seek."""
            nonlocal said
            if audio is not None and sound is not None and said < min(until, len(audio)):
                piece = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(audio[None, said:until]), format="s16", layout="mono"
                )
                piece.rate, piece.pts, piece.time_base = rate, said, Fraction(1, rate)
                container.mux(sound.encode(piece))
                said = min(until, len(audio))

        for number, frame in enumerate(chain([first], frames)):
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            shown = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            shown.pts, shown.time_base = number, 1 / fps
            container.mux(video.encode(shown))
            speak(int((number + 1) / fps * rate))
        speak(0 if audio is None else len(audio))
        for stream in (video, sound):
            if stream is not None:
                container.mux(stream.encode(None))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The container; what FFmpeg says while it is open becomes a ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        container = av.open(str(path))
        if not (
            container.streams.video or container.streams.audio
        ):  # a film that ends within its head has none
            raise ValueError("it holds neither pictures nor sound")
    except (FFmpegError, ValueError) as error:
        raise ValueError(
            f"{path}: not a video or audio file, or cut short ({_said(error)}): fetch it again or leave it out"
        ) from None
    try:
        with container:
            yield container
    except FFmpegError as error:
        raise ValueError(
            f"{path}: damaged or cut short ({_said(error)}): fetch it again or leave it out"
        ) from None


def _said(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _start(container: Any) -> float:
    """The time in seconds that counts as 0."""
    return (container.start_time or 0) / av.time_base


def _step(stream: Any) -> float:
    """Seconds from a frame to the next, about."""
    rate = stream.average_rate or stream.guessed_rate
    return float(1 / rate) if rate else 0.04


def _complete(path: Path, stream: Any, end: float) -> None:
    """ValueError when a stream ends, at `end` seconds, half a second or more before the time that its header states."""
    declared = None
    if stream.duration is not None:
        declared = float(stream.duration * stream.time_base) + float(
            (stream.start_time or 0) * stream.time_base
        )
    if declared is not None and end < declared - 0.5:
        raise ValueError(
            f"{path}: cut short: ends after {end:.2f} s of {declared:.2f} s; fetch it again or leave it out"
        )
