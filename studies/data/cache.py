"""Decode a split once: uint8 arrays in `.npy` files that later loads map into memory."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from studies.twins.apart import in_parts

Size = tuple[int, int]  # height, width
Listing = Sequence[tuple[str, int, int]]  # path below the root, bytes, modification time in ns
Produce = Callable[[int, int], tuple[np.ndarray, list[str]]]
Fit = Callable[[Image.Image, Size], np.ndarray]  # brings an image to a size, uint8 (C, H, W)


def shown(names: Sequence[str]) -> str:
    """The first three names, for an error line."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def digest(files: Listing) -> str:
    """Twelve hex digits that change when a path, a size or a modification time of the listing does."""
    lines = "\n".join(f"{path}\t{size}\t{mtime}" for path, size, mtime in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def frame(native: Size, size: Size) -> tuple[float, float, float, float]:
    """The part of an image that `fit` keeps, as left, top, right, bottom in pixels.

    It is the largest central one with the proportions of `size`; the whole image where less than a pixel
    would be lost.
    """
    (height, width), (rows, columns) = native, size
    kept_height = min(float(height), width / (columns / rows))
    kept_width = min(float(width), columns / rows * height)
    if width - kept_width < 1 and height - kept_height < 1:
        return 0.0, 0.0, float(width), float(height)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height


def fit(image: Image.Image, size: Size) -> np.ndarray:
    """The central part of an image (see `frame`) at another size, uint8 (C, H, W); label maps by nearest."""
    if image.size != size[::-1]:
        method = Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BICUBIC
        image = image.resize(size[::-1], method, frame((image.height, image.width), size))
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def decode(
    file: Path, native: Size | None, size: Size | None, mode: str = "RGB", fit: Fit = fit
) -> np.ndarray:
    """One JPEG or PNG file as uint8 (C, H, W).

    native: the size that it must have; size: the size to bring it to, by `fit`; mode: Pillow's, "P" for the
    numbers of a label map. Raises ValueError with the reason, but not the name, when the file is damaged or
    has another size.
    """
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as opened:
            image = opened.convert(mode)  # decodes all of it: a truncated file fails here
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError("truncated or not an image" if file.stat().st_size else "empty file") from None
    own = (image.height, image.width)
    if native is not None and own != native:
        raise ValueError(f"{own[1]}x{own[0]}, not {native[1]}x{native[0]}")
    return fit(image, size or own)


def decoded(
    root: Path,
    key: str,
    files: Listing,
    remedy: str,
    native: Size | None,
    size: Size | None = None,
    mode: str = "RGB",
    fit: Fit = fit,
) -> np.ndarray:
    """All images of a listing as uint8 (N, C, H, W), decoded once, then memory-mapped; see `decode`.

    native or size must be given. Raises ValueError that names the first damaged files, says how many there
    are, and ends with the remedy.
    """
    given = size or native
    assert given is not None
    height, width = given
    shape = (len(files), len(mode), height, width)

    def produce(start: int, stop: int) -> tuple[np.ndarray, list[str]]:
        out, bad = np.zeros((stop - start, *shape[1:]), np.uint8), []
        for row, (path, _, _) in enumerate(files[start:stop]):
            try:
                out[row] = decode(root / path, native, size, mode, fit)
            except ValueError as error:
                bad.append(f"{path} ({error})")
        return out, bad

    # Pillow opens files under the interpreter lock: a second thread makes 32x32 images 1.4 times slower
    threads = 1 if native and max(native) <= 64 else cores()
    return cached(root, f"{key}-{height}x{width}", digest(files), shape, produce, remedy, threads=threads)


def cores() -> int:
    """How many threads are worth starting. It changes how long things take, never what they give."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def cached(
    root: Path,
    key: str,
    version: str,
    shape: tuple[int, ...],
    produce: Produce,
    remedy: str = "",
    *,
    threads: int = 1,
    action: str = "decode",
) -> np.ndarray:
    """The uint8 array `<root>/.cache/<key>-<version>.npy`, made by `produce(start, stop)` if it is not there.

    produce also returns a line for every row it could not make: any line raises ValueError, and nothing is
    written. version: twelve hex digits. Where the root cannot be written to, the array goes to the user's
    cache folder. Raises OSError when there is no room.
    """
    places, name = _places(root), f"{key}-{version}.npy"
    for folder in places:
        if (array := _mapped(folder / name, shape)) is not None:
            return array
    writable = [folder for folder in places if _writable(folder)]
    if not writable:
        raise OSError(f"the image cache needs {places[0]} or {places[1]}, and neither can be written to")
    folder = writable[0]
    need, free = math.prod(shape), shutil.disk_usage(folder).free
    if need > 0.95 * free:  # a memory map is a sparse file: a disk that fills up would kill the process
        room = f"needs {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
        raise OSError(f"{folder}: the image cache {room}")

    temporary = folder / f".{key}-{uuid4().hex}.part"
    try:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        bad = _fill(out, produce, threads, f"{action} {key}")
        if bad:
            raise ValueError(
                f"{root}: {len(bad)} of {len(out)} images cannot be used: {shown(bad)}; {remedy}"
            )
        out.flush()
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    with suppress(OSError):  # what another user has cached may stay
        forget(root, key, keep=name)
    return np.load(folder / name, mmap_mode="c")


def _fill(out: np.ndarray, produce: Produce, threads: int, title: str) -> list[str]:
    """Fill the array chunk by chunk, with a progress bar; returns the lines about rows that failed."""
    chunk = max(1, min(256, math.ceil(len(out) / (4 * threads))))  # all threads are busy to the end
    parts = in_parts(lambda rows: produce(rows[0], rows[-1] + 1), range(len(out)), chunk, threads)
    bad: list[str] = []
    done = 0
    with tqdm(total=len(out), desc=title, unit="image", leave=False) as bar:
        for rows, lines in parts:
            out[done : done + len(rows)] = rows
            done += len(rows)
            bad += lines
            bar.update(len(rows))
    return bad


def forget(root: Path, key: str, keep: str = "") -> None:
    """Delete the cached arrays whose key is this one or continues it after a dash; not the file `keep`.

    Only files named as `cached` names them are deleted: others in `.cache` are not ours.
    """
    ours = re.compile(rf"{re.escape(key)}-(.+-)?[0-9a-f]{{12}}\.npy")
    for file in [file for folder in _places(root) for file in folder.glob("*.npy")]:
        if ours.fullmatch(file.name) and file.name != keep:
            file.unlink(missing_ok=True)


def _places(root: Path) -> tuple[Path, Path]:
    """Beside the data, and in the user's cache under a name for this root."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / ".cache", user / "selib" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]


def _mapped(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array, or None when the file is not there or not as it was written, so that it is made anew."""
    try:
        # copy-on-write: torch warns of read-only arrays, and a write must never reach the file
        array = np.load(file, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.dtype == np.uint8 and array.shape == shape else None


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
