"""Videos by PyAV: frames and sound on one clock, and frames written as an MP4 with their sound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selib.atomic import replacing

try:
    import av
    from av.error import FFmpegError
except ImportError:
    raise ImportError("videos need PyAV: pip install 'selib[video]'") from None

Picture = NDArray[np.uint8]  # RGB (H, W, 3)
Frames = Iterator[tuple[float, Picture]]  # with their times in seconds

RATE = 16000  # samples of sound a second
ROUNDING = 1e-3  # seconds: Matroska and WebM keep times in whole milliseconds
HIGHEST = 300  # frames a second: a file that states more does not mean it, browser recorders write 1000


def read_frames(path: str | Path, *, fps: float | None = None, start: float = 0.0) -> Frames:
    """The frames of a video, each with its time in seconds and as RGB uint8 (H, W, 3), turned upright.

    Time 0 is where the file begins, with picture or sound, as for :func:`read_audio`. A damaged file, or one
    that ends early, is a ValueError after its last good frame.

    Args:
        fps: resample to this rate: frame k is what is seen at k / fps. Default: the frames as they are.
        start: begin at the last key frame before this time in seconds; not together with ``fps``.
    """
    if fps is None:
        return _frames(Path(path), start)
    if not 0 < fps < np.inf or start:
        raise ValueError(f"fps must be above 0, and start 0 beside it, not {fps} and {start}")
    return _resampled(_frames(Path(path), 0.0), fps)


def frame_rate(path: str | Path) -> float:
    """Frames a second of a video, on average. Errors as for :func:`read_frames`."""
    with _opened(Path(path), "video") as (container, stream, _):
        rate = _stated_rate(stream)
        if rate <= HIGHEST:
            return rate
        times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        seconds = float((times[-1] - times[0]) * stream.time_base)
        return (len(times) - 1) / seconds if seconds > 0 else 25.0


def _frames(path: Path, begin: float) -> Frames:
    with _opened(path, "video") as (container, stream, zero):
        stream.thread_type = "AUTO"
        end = 0.0
        if begin > 0:
            container.seek(int((zero + begin) * av.time_base), backward=True)
        for frame in container.decode(stream):
            # A raw stream has no clock: its frames follow each other in even steps.
            time = end if frame.time is None else frame.time - zero
            end = time + 1 / _stated_rate(stream)
            yield time, np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        if end == 0.0:
            raise ValueError(f"{path}: holds no frames from {begin:g} s on")
        _check_end(path, stream, end + zero)


def _resampled(frames: Frames, fps: float) -> Frames:
    """At each time k / fps, the last frame that has begun by then."""
    number, step = 0, 1 / fps
    before, shown = next(frames)
    for time, frame in frames:
        while number / fps < time - ROUNDING:
            yield number / fps, shown
            number += 1
        step, before, shown = time - before, time, frame
    # The last frame is shown as long as the one before it; less than half a step of it makes no frame.
    while (number + 0.5) / fps < before + step:
        yield number / fps, shown
        number += 1


def read_audio(path: str | Path) -> NDArray[np.int16]:
    """The sound of a video or audio file, mixed into one channel: int16 (N,), sample n at n / 16000 seconds.

    Errors as for :func:`read_frames`.
    """
    with _opened(Path(path), "audio") as (container, stream, zero):
        resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
        first, end = None, 0.0
        parts = []
        for frame in container.decode(stream):
            first = frame.time if first is None else first
            end = (frame.time or 0.0) + frame.samples / frame.sample_rate
            parts += resampler.resample(frame)
        if not parts:
            raise ValueError(f"{path}: its audio stream holds no samples")
        parts += resampler.resample(None)  # what the filter still holds
        _check_end(path, stream, end)
    wave = np.concatenate([part.to_ndarray()[0] for part in parts])
    late = 0 if first is None else round((first - zero) * RATE)
    return np.pad(wave, (late, 0)) if late > 0 else wave[-late:]


def write(
    path: str | Path, frames: Iterable[Picture], *, fps: float, audio: NDArray[np.int16] | None = None
) -> None:
    """Write frames, RGB uint8 (H, W, 3) all of one size, as an MP4 that browsers play, whole or not at all.

    An odd height or width is made even, as H.264 needs it, by repeating the last row or column. audio: the
    sound, int16 (N,), 16,000 samples a second. No frames, or a wrong shape or dtype, are a ValueError.
    """
    path, frames = Path(path), iter(frames)
    if path.suffix.lower() != ".mp4" or not fps > 0:
        raise ValueError(f"{path}: videos are written as .mp4, with fps above 0, not {fps}")
    if audio is not None and (audio.ndim != 1 or audio.dtype != np.int16):
        raise ValueError(f"audio must be int16 (N,), not {audio.dtype} {audio.shape}")
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: no frames to write")
    height, width = first.shape[:2]
    clock = Fraction(fps).limit_denominator(1001)
    # Sound is encoded first; FFmpeg keeps it back, however long, to lay each piece beside its frames.
    options = {"movflags": "faststart", "max_interleave_delta": "0"}
    with replacing(path) as part, av.open(str(part), "w", "mp4", options) as container:
        film: Any = container.add_stream("libx264", clock, {"crf": "18", "preset": "veryfast"})
        film.width, film.height, film.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        if audio is not None and len(audio):
            sound: Any = container.add_stream("aac", RATE, layout="mono")
            wave = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio[None]), format="s16", layout="mono")
            wave.rate, wave.pts, wave.time_base = RATE, 0, Fraction(1, RATE)
            container.mux([*sound.encode(wave), *sound.encode(None)])
        for number, frame in enumerate(chain([first], frames)):
            if frame.dtype != np.uint8 or frame.shape != (height, width, 3):
                wanted = f"uint8 ({height}, {width}, 3)"
                raise ValueError(f"frame {number} must be {wanted}, not {frame.dtype} {frame.shape}")
            even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            picture.pts, picture.time_base = number, 1 / clock
            container.mux(film.encode(picture))
        container.mux(film.encode(None))


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[Any, Any, float]]:
    """A file, its first stream of a kind, and the second it begins at; FFmpeg's errors as ValueErrors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    broken = f"{path}: not a video or audio file, or cut short or damaged: fetch it again or leave it out"
    try:
        with av.open(str(path)) as container:
            if not (container.streams.video or container.streams.audio):
                raise ValueError(broken)
            streams = getattr(container.streams, kind)
            if not streams:
                raise ValueError(f"{path}: has no {kind} stream")
            yield container, streams[0], (container.start_time or 0) / av.time_base
    except FFmpegError as error:
        raise ValueError(f"{broken} ({error.strerror})") from None


def _stated_rate(stream: Any) -> float:
    return float(stream.average_rate or stream.guessed_rate or 25)


def _check_end(path: str | Path, stream: Any, end: float) -> None:
    """ValueError when a stream ends, at ``end`` seconds, half a second or more before its header says."""
    declared = float(((stream.duration or 0) + (stream.start_time or 0)) * stream.time_base)
    if end < declared - 0.5:
        raise ValueError(f"{path}: cut short: ends after {end:.2f} s of {declared:.2f} s; fetch it again")
