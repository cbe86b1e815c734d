"""Decode a split once: uint8 arrays in `.npy` files that later loads map into memory."""

from __future__ import annotations

import glob
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

Size = tuple[int, int]  # height, width
Listing = Sequence[tuple[str, int, int]]  # path below the root, bytes, modification time in ns
Produce = Callable[[int, int], tuple[np.ndarray, list[str]]]
CHUNK = 256
SHOWN = 3  # offenders named in one error line


def digest(files: Listing) -> str:
    """Twelve hex digits that change when a path, a size or a modification time (ns) of the listing does."""
    lines = "\n".join(f"{path}\t{size}\t{mtime}" for path, size, mtime in files)
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def both(side: int | Size) -> Size:
    """Height and width; a single number is the side of a square."""
    return (side, side) if isinstance(side, int) else side


def frame(native: Size, size: Size) -> tuple[float, float, float, float]:
    """The part of an image that `fit` keeps, as left, top, right, bottom: the largest central one of size's proportions.

    It is the whole image when less than a pixel would be lost.
    """
    (height, width), (rows, columns) = native, size
    if width / height >= columns / rows:
        kept_width, kept_height = columns / rows * height, float(height)
    else:
        kept_width, kept_height = float(width), width / (columns / rows)
    if width - kept_width < 1 and height - kept_height < 1:
        return 0.0, 0.0, float(width), float(height)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height


def fit(image: Image.Image, size: Size) -> Image.Image:
    """The central part of size's proportions (see `frame`), brought to that size: bicubic, antialiased."""
    if image.size == size[::-1]:
        return image
    method = (
        Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BICUBIC
    )  # between indices is nothing
    return image.resize(size[::-1], method, frame((image.height, image.width), size))


def planes(image: Image.Image) -> np.ndarray:
    """An image as uint8 (C, H, W)."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def decode(file: Path, native: int | Size | None, size: int | Size | None, mode: str = "RGB") -> np.ndarray:
    """One JPEG or PNG file as uint8 (3, H, W); native: the size its pixels must have; size: the size to make.

    A size is (height, width), or the side of a square. mode "P" reads an indexed image as its indices, (1, H, W). Raises
    ValueError with the reason (not the name) when the file is damaged or of another size.
    """
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as opened:
            image = opened.convert(mode)  # decodes all of it: a truncated file fails here
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError("truncated or not an image" if file.stat().st_size else "empty file") from None
    if native is not None and image.size != (wanted := both(native)[::-1]):
        raise ValueError(f"{image.width}x{image.height}, not {wanted[0]}x{wanted[1]}")
    return planes(image if size is None else fit(image, both(size)))


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Uint8 (3, H, W) -> (3, size, size), as `fit` does it."""
    return planes(fit(Image.fromarray(image.transpose(1, 2, 0)), both(size)))


def decoded(
    root: Path,
    key: str,
    listing: Listing,
    *,
    native: int | Size | None,
    size: int | Size | None,
    remedy: str,
    mode: str = "RGB",
) -> np.ndarray:
    """All images of a listing as uint8 (N, C, H, W), decoded once, then memory-mapped; arguments as for `decode`.

    Raises ValueError that names the first damaged files, says how many there are, and ends with the remedy.
    """
    side = size or native
    if side is None:
        raise TypeError("decoded needs native= or size=")
    shape = (len(listing), len(mode), *both(side))

    def produce(start: int, stop: int) -> tuple[np.ndarray, list[str]]:
        out, bad = np.zeros((stop - start, *shape[1:]), np.uint8), []
        for row, (path, _, _) in enumerate(listing[start:stop]):
            try:
                out[row] = decode(root / path, native, size, mode)
            except ValueError as error:
                bad.append(f"{path} ({error})")
        return out, bad

    # Pillow decodes and resizes without the interpreter lock, but opens files with it: for small images a second thread
    # only gets in the way (measured: 1.4 times slower on 32x32)
    threads = 1 if max(both(native or side)) <= 64 else cores()
    return cached(root, f"{key}-{spelled(side)}", digest(listing), shape, produce, remedy, threads=threads)


def spelled(side: int | Size) -> str:
    """A size in the name of a cache file: 32 for a square, else 88x72, height first."""
    height, width = both(side)
    return f"{height}" if height == width else f"{height}x{width}"


def cores() -> int:
    """How many threads are worth starting."""
    return min(8, os.cpu_count() or 1)


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
    """The uint8 array `<root>/.cache/<key>-<version>.npy`, made in chunks by `produce(start, stop)` if it is not there.

    produce also returns one line for every row it could not make: any such line raises ValueError, nothing is written.
    Where the root cannot be written to, the file goes to the user's cache folder. Raises OSError when there is no room.
    """
    places = _places(root)
    name = f"{key}-{version}.npy"
    for folder in places:
        if (array := _mapped(folder / name, shape)) is not None:
            return array
    writable = [folder for folder in places if _writable(folder)]
    if not writable:
        raise OSError(
            f"neither {places[0]} nor {places[1]} can be written to: the image cache needs one of them"
        )
    folder = writable[0]
    need, free = math.prod(shape), shutil.disk_usage(folder).free
    if need > 0.95 * free:
        raise OSError(
            f"{folder}: the image cache needs {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
        )

    temporary = folder / f".{key}-{uuid4().hex}.part"
    try:
        if bad := _fill(temporary, shape, produce, threads, f"{action} {key}"):
            first = ", ".join(bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
            raise ValueError(f"{root}: {len(bad)} of {shape[0]} images cannot be used: {first}; {remedy}")
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    forget(root, key, keep=name)  # of a tree that has changed since
    array = _mapped(folder / name, shape)
    if array is None:
        raise OSError(f"{folder / name}: was written and cannot be read back; is the disk full or failing?")
    return array


def forget(root: Path, key: str, keep: str = "") -> None:
    """Delete the cached arrays of a key, all versions but `keep`, so that the next load decodes anew."""
    for folder in _places(root):
        for file in folder.glob(f"{glob.escape(key)}-*.npy"):
            if file.name != keep:
                file.unlink(missing_ok=True)


def _fill(file: Path, shape: tuple[int, ...], produce: Produce, threads: int, title: str) -> list[str]:
    """Write the array chunk by chunk, with a progress bar; returns the lines about rows that could not be made."""
    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    bad: list[str] = []
    chunk = max(
        1, min(CHUNK, math.ceil(shape[0] / (4 * threads)))
    )  # enough of them to keep all threads busy to the end
    starts = range(0, shape[0], chunk)
    pool = ThreadPoolExecutor(threads)
    try:
        made = pool.map(lambda start: produce(start, min(start + chunk, shape[0])), starts)
        with tqdm(total=shape[0], desc=title, unit="image", leave=False) as bar:
            for start, (rows, lines) in zip(starts, made, strict=True):
                out[start : start + len(rows)] = rows
                bad += lines
                bar.update(len(rows))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt need not wait for what has not begun
    out.flush()
    return bad


def _places(root: Path) -> tuple[Path, Path]:
    """Beside the data, and for data that cannot be written to in the user's cache, under a name for this root."""
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
