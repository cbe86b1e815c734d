"""Which data sets there are, and how to fetch, render and check them: behind `selib data list | get | make | check`."""

from __future__ import annotations

import os
import tarfile
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from tqdm.auto import tqdm

from selib.data import objects
from selib.data.cache import forget
from selib.data.imageset import ImageSet
from selib.data.objects import data_root, find, load
from selib.synth import objects as synth


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and what a whole one holds."""

    address: str
    md5: str
    size: int  # bytes
    folder: str
    per_class: dict[str, int]  # images of a class in each split
    classes: int | None  # None: any subset of the classes is a set of its own
    images: str
    licence: str

    @property
    def archive(self) -> str:
        return self.address.rsplit("/", 1)[1]


TORONTO = "https://www.cs.toronto.edu/~kriz/"
SOURCES = {
    "cifar10": Source(
        address=TORONTO + "cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        size=170_052_171,
        folder="cifar-10-batches-bin",
        per_class={"train": 5000, "val": 1000},
        classes=10,
        images="50,000 + 10,000 of 32x32",
        licence="no licence stated; Krizhevsky 2009, research use",
    ),
    "cifar100": Source(
        address=TORONTO + "cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        size=168_513_733,
        folder="cifar-100-binary",
        per_class={"train": 500, "val": 100},
        classes=100,
        images="50,000 + 10,000 of 32x32",
        licence="no licence stated; Krizhevsky 2009, research use",
    ),
    "tiny-imagenet": Source(
        address="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        md5="90528d7ca1a48142e341f4ef8d21d0de",
        size=248_100_043,
        folder="tiny-imagenet-200",
        per_class={"train": 500, "val": 50},
        classes=None,
        images="100,000 + 10,000 of 64x64, boxes",
        licence="from ImageNet: non-commercial research",
    ),
}


@dataclass(frozen=True)
class Entry:
    """One line of `selib data list`."""

    name: str
    present: bool
    images: str
    licence: str
    source: str
    synthetic: bool

    def __str__(self) -> str:
        state = "here" if self.present else "on demand" if self.synthetic else "absent"
        return f"{self.name:13}  {state:9}  {self.images:32}  {self.source}  ({self.licence})"


def list_sets(root: str | Path | None = None) -> list[Entry]:
    """Every data set `load` knows by name, whether root holds it, what is in it and where it comes from."""
    base = data_root(root)
    entries = [
        Entry(name, find(name, base) is not None, source.images, source.licence, source.address, False)
        for name, source in SOURCES.items()
    ]
    twin = f"{synth.COUNTS['train']:,} + {synth.COUNTS['val']:,} of {synth.SIZE}x{synth.SIZE}, masks"
    place = find("synth-objects", base)
    return [*entries, Entry("synth-objects", place is not None, twin, "as this project", "selib data make", True)]


def get(name: str, root: str | Path | None = None) -> Path:
    """Download a data set from its official address, verify and unpack it; returns its folder, at once if it is there.

    An archive that already lies in root is used. A download that broke off goes on where it stopped.
    Raises ValueError for a name without an address and for an archive with the wrong checksum, ConnectionError, with
    what to do by hand, when the address cannot be reached.
    """
    from torchvision.datasets.utils import calculate_md5

    if name not in SOURCES:
        hint = (
            "it is rendered: selib data make synth-objects" if name == "synth-objects" else f"not {', '.join(SOURCES)}"
        )
        raise ValueError(f"{name!r} has no address to get it from, {hint}")
    base, source = data_root(root), SOURCES[name]
    place = find(name, base)
    if place is not None:
        return place
    base.mkdir(parents=True, exist_ok=True)
    archive = base / source.archive
    fetched = not archive.is_file()
    file = base / f".{source.archive}.part" if fetched else archive
    if fetched:
        try:
            _download(source.address, file, source.size)
        except (OSError, RuntimeError, HTTPException) as error:
            raise ConnectionError(
                f"{name}: {source.address} cannot be fetched ({error}); run this again to go on where it stopped, or "
                f"fetch {source.archive} by other means, put it in {base} and run `selib data get {name}`"
            ) from None
    if (found := calculate_md5(file)) != source.md5:
        if fetched:
            file.unlink()
        raise ValueError(
            f"{file}: its MD5 is {found}, not {source.md5}; it was damaged on its way"
            + (" and has been deleted: run this again" if fetched else ": delete it and run this again")
        )
    _unpack(file, base, source.folder, zipped=source.archive.endswith(".zip"))
    if fetched:
        file.unlink()
    return base / source.folder


def check(name: str, root: str | Path | None = None) -> str:
    """Read every file of a data set anew, compare with what a whole one holds, and return a summary of a few lines.

    Raises FileNotFoundError when it is not there, ValueError with the first thing that is wrong.
    """
    base = data_root(root)
    place = find(name, base)
    if place is None and name == "synth-objects":
        raise FileNotFoundError(
            f"{base / name}: not there, so it is rendered when asked for; `selib data make` writes it"
        )
    if place is not None:
        if name.startswith("folder:"):
            for split in objects.SPLITS:
                forget(place, split)
        forget(base, name)  # a damaged file can keep its size and time
    lines = [f"{name}: {place}"]
    for split in objects.SPLITS:
        data = load(name, split, root=root)
        counts = torch.bincount(data.targets, minlength=len(data.classes))
        if name in SOURCES:
            _compare(data, counts, SOURCES[name], place)
        low, high = int(counts.min()), int(counts.max())
        each = f"{low}" if low == high else f"{low} to {high}"
        truth = ", masks" if data.masks is not None else ", boxes" if data.boxes is not None else ""
        height, width = data.images.shape[2:]
        lines.append(
            f"  {split}: {len(data):,} images of {width}x{height}, {len(data.classes)} classes of {each}{truth}, "
            f"fingerprint {data.fingerprint}"
        )
    return "\n".join(lines)


def make(name: str, root: str | Path | None = None, count: int | None = None, seed: int = 0) -> Path:
    """Render `count` training images (and a quarter as many for validation) of a twin into root; returns the folder.

    The same count and seed write the same files. Raises ValueError for another name, FileExistsError when it is there.
    """
    if name != "synth-objects":
        raise ValueError(f"{name!r} cannot be made; only synth-objects is rendered")
    counts = dict(synth.COUNTS) if count is None else {"train": count, "val": max(len(synth.CLASSES), count // 4)}
    if counts["train"] < len(synth.CLASSES):
        raise ValueError(f"count must be at least {len(synth.CLASSES)}, one image a class, not {count}")
    folder = data_root(root) / name
    if folder.exists():
        raise FileExistsError(f"{folder}: already there; delete it to render it anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
        objects.write_synth(Path(temporary) / name, counts, seed)
        os.replace(Path(temporary) / name, folder)
    return folder


def _download(address: str, file: Path, size: int) -> None:
    """Into a file that may hold the beginning already; raises OSError when the connection ends early."""
    from torchvision.datasets.utils import USER_AGENT, download_url

    start = file.stat().st_size if file.is_file() else 0
    if start == 0:
        download_url(address, file.parent, file.name)
    elif start < size:  # torchvision would begin again
        request = urllib.request.Request(address, headers={"User-Agent": USER_AGENT, "Range": f"bytes={start}-"})
        with urllib.request.urlopen(request, timeout=60) as response:
            goes_on = response.status == 206
            with (
                open(file, "ab" if goes_on else "wb") as out,
                tqdm(total=size, initial=start if goes_on else 0, desc=file.name, unit="B", unit_scale=True) as bar,
            ):
                while block := response.read(1 << 16):
                    out.write(block)
                    bar.update(len(block))
    if (length := file.stat().st_size) < size:
        raise OSError(f"the connection ended after {length:,} of {size:,} bytes")


def _unpack(archive: Path, root: Path, folder: str, *, zipped: bool) -> None:
    """Unpack into a temporary folder, then move the data set's folder into place: it is there whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=f".{folder}-", dir=root) as temporary:
        if zipped:
            with zipfile.ZipFile(archive) as opened:
                for entry in tqdm(opened.infolist(), desc="unpack", unit="file", leave=False):
                    opened.extract(entry, temporary)
        else:
            with tarfile.open(archive) as opened:
                opened.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
                opened.extractall(temporary)
        inside = Path(temporary) / folder
        if not inside.is_dir():
            raise ValueError(f"{archive}: holds no folder {folder}")
        os.replace(inside, root / folder)


def _compare(data: ImageSet, counts: torch.Tensor, source: Source, place: Path | None) -> None:
    if source.classes is not None and len(data.classes) != source.classes:
        raise ValueError(f"{place}: {len(data.classes)} classes, not {source.classes}; unpack the archive again")
    each = source.per_class[data.split]
    if odd := torch.nonzero(counts != each).flatten().tolist():
        raise ValueError(
            f"{place}: {data.split} has {int(counts[odd[0]])} images of {data.classes[odd[0]]!r}, not {each} "
            f"({len(odd)} such classes); unpack the archive again"
        )
