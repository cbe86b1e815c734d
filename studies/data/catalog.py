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

from studies.data import faces as celeba
from studies.data import objects, speakers
from studies.data.ava import prepare
from studies.data.cache import forget
from studies.data.imageset import ImageSet
from studies.data.objects import FACES, SPEAKERS, data_root, find, load
from studies.twins import faces as synth_faces
from studies.twins import objects as synth
from studies.twins import speakers as synth_speakers


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


CELEBA = {"train": 162_770, "val": 19_867, "test": 19_962}
TWINS = {
    "synth-objects": synth.COUNTS,
    "synth-faces": synth_faces.COUNTS,
    "synth-speakers": synth_speakers.COUNTS,
}
WRITE = {
    "synth-objects": objects.write_synth,
    "synth-faces": celeba.write_faces,
    "synth-speakers": speakers.write_speakers,
}
# the least that `make` renders of a split, so that it has an example of each
LEAST = {
    "synth-objects": (len(synth.CLASSES), "class"),
    "synth-speakers": (len(synth_speakers.CONDITIONS), "condition"),
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
        return f"{self.name:14}  {state:9}  {self.images:47}  {self.source}  ({self.licence})"


def list_sets(root: str | Path | None = None) -> list[Entry]:
    """Every data set `load` knows by name, whether root holds it, what is in it and where it comes from."""
    base = data_root(root)
    entries = [
        Entry(name, find(name, base) is not None, source.images, source.licence, source.address, False)
        for name, source in SOURCES.items()
    ]
    height, width = synth_faces.SIZE
    shape = {
        "synth-objects": f"{synth.SIZE}x{synth.SIZE}",
        "synth-faces": f"{width}x{height}",
        "synth-speakers": "two seconds",
    }
    images = f"{' + '.join(f'{count:,}' for count in CELEBA.values())} of {width}x{height}"
    licence = "non-commercial research"
    entries.append(Entry("celeba", find("celeba", base) is not None, images, licence, celeba.ADDRESS, False))
    for name, clips, licence, address in (
        ("ava-asd", "39,000 face tracks, 3.65 million frames", "annotations CC BY 4.0", speakers.AVA_ADDRESS),
        (
            "wasd",
            "30 hours of 164 videos, 5 conditions, bodies",
            "no licence stated; research",
            speakers.WASD_ADDRESS,
        ),
    ):
        entries.append(Entry(name, find(name, base) is not None, clips, licence, address, False))
    for name, counts in TWINS.items():
        images = f"{' + '.join(f'{count:,}' for count in counts.values())} of {shape[name]}, masks"
        entries.append(
            Entry(
                name, find(name, base) is not None, images, "as this project", f"selib data make {name}", True
            )
        )
    return entries


def get(name: str, root: str | Path | None = None) -> Path:
    """Download a data set from its official address, verify and unpack it; returns its folder, at once if it is there.

    An archive that already lies in root is used. A download that broke off goes on where it stopped; of CelebA, which
    torchvision's downloader fetches from Google Drive, the files that are whole are kept.
    Raises ValueError for a name without an address and for an archive with the wrong checksum, ConnectionError, with
    what to do by hand, when the address cannot be reached.
    """
    base = data_root(root)
    if name == "celeba":
        return _get_celeba(base)
    if name in SPEAKERS and name not in TWINS:
        raise ValueError(f"{name} is not fetched from one address: {speakers.missing(name, base)}")
    if name not in SOURCES:
        hint = (
            f"it is rendered: selib data make {name}"
            if name in TWINS
            else f"not {', '.join(SOURCES)}, celeba"
        )
        raise ValueError(f"{name!r} has no address to get it from, {hint}")
    source = SOURCES[name]
    place = find(name, base)
    if place is not None:
        return place
    from torchvision.datasets.utils import calculate_md5

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
    if place is None and name in TWINS:
        raise FileNotFoundError(
            f"{base / name}: not there, so it is rendered when asked for; `selib data make {name}` writes it"
        )
    if place is not None:
        if name.startswith("folder:"):
            for split in objects.SPLITS:
                forget(place, split)
        forget(base, name)  # a damaged file can keep its size and time
    if name in SPEAKERS:
        return _check_speakers(name, place, base)
    lines = [f"{name}: {place}"]
    splits = tuple(CELEBA) if name == "celeba" else tuple(TWINS.get(name, objects.SPLITS))
    for split in splits:
        data: ImageSet
        if name in FACES:
            data = celeba.load_faces(name, split, root=root)
            if name == "celeba" and len(data) != CELEBA[split]:
                raise ValueError(
                    f"{place}: {split} has {len(data):,} images, not {CELEBA[split]:,}: it is not the whole set"
                )
            kinds = f"{len(data.classes)} attributes"
        else:
            data = load(name, split, root=root)
            counts = torch.bincount(data.targets, minlength=len(data.classes))
            if name in SOURCES:
                _compare(data, counts, SOURCES[name], place)
            low, high = int(counts.min()), int(counts.max())
            kinds = f"{len(data.classes)} classes of {low}" + ("" if low == high else f" to {high}")
        height, width = data.images.shape[2:]
        truth = f", {data.annotation}" if data.annotation else ""
        lines.append(
            f"  {split}: {len(data):,} images of {width}x{height}, {kinds}{truth}, fingerprint {data.fingerprint}"
        )
    return "\n".join(lines)


def make(
    name: str,
    root: str | Path | None = None,
    count: int | None = None,
    seed: int = 0,
    *,
    videos: str | Path | None = None,
) -> Path:
    """Render `count` training images or clips (and a quarter as many for validation and for testing) of a twin into root.

    videos: for "ava-asd", which is cut from raw videos (`studies.data.ava.prepare`): a folder with them and their annotations.
    Returns the folder. The same count and seed write the same files. Raises ValueError for another name, FileExistsError
    when it is there.
    """
    if (name == "ava-asd") != (videos is not None) or (videos is not None and count is not None):
        raise ValueError(
            "ava-asd is cut from its videos: selib data make ava-asd --videos DIR; nothing else takes --videos"
        )
    if videos is not None:
        prepare(videos, videos, data_root(root) / name)
        return data_root(root) / name
    if name not in TWINS:
        *first, last = TWINS
        raise ValueError(f"{name!r} cannot be made; only {', '.join(first)} and {last} are rendered")
    least, each = LEAST.get(name, (1, ""))
    why = f", one for each {each}" if each else ""
    counts = dict(TWINS[name])
    if count is not None:
        if count < least:
            raise ValueError(f"count must be at least {least}{why}, not {count}")
        counts = {split: max(least, count // 4) if split in ("val", "test") else count for split in counts}
    folder = data_root(root) / name
    if folder.exists():
        raise FileExistsError(f"{folder}: already there; delete it to render it anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
        WRITE[name](Path(temporary) / name, counts, seed)
        os.replace(Path(temporary) / name, folder)
    return folder


def _check_speakers(name: str, place: Path | None, base: Path) -> str:
    """Read every clip that the lists of a set name, with its bodies where it has them."""
    if place is None:
        raise FileNotFoundError(speakers.missing(name, base))
    streams = [
        stream for stream, folder in speakers.FOLDERS.items() if (place / folder).is_dir() or stream != "body"
    ]
    splits = [split for split in speakers.SPLITS if (place / "csv" / f"{split}_loader.csv").is_file()]
    if not splits:
        raise FileNotFoundError(
            f"{place / 'csv'}: holds no train_loader.csv, val_loader.csv or test_loader.csv"
        )
    lines = [f"{name}: {place}"]
    for split in splits:
        data = speakers.load_speakers(name, split, root=base, streams=streams)
        for row in tqdm(range(len(data)), f"check {name} {split}", leave=False, unit="clip"):
            data.wave(row)
            for stream in streams:
                if stream != "audio":
                    data.pictures(row, stream)
            if data.synthetic:
                data.masks(row)
        frames, spoken = (
            sum(clip.frames for clip in data.clips),
            sum(int(clip.labels.sum()) for clip in data.clips),
        )
        conditions = {clip.condition for clip in data.clips} - {None}
        told = f", {len(conditions)} conditions" if conditions else ""
        lines.append(
            f"  {split}: {len(data):,} clips of {frames:,} frames with {', '.join(streams)}, {spoken / frames:.0%} speaking{told}, "
            f"fingerprint {data.fingerprint}"
        )
    return "\n".join(lines)


def _get_celeba(base: Path) -> Path:
    """CelebA into <base>/celeba: its files with torchvision's downloader, checksums verified, the images unpacked.

    Files that are there already, from another run or put there by hand, are verified and used.
    """
    from gdown.exceptions import DownloadError
    from torchvision.datasets import CelebA
    from torchvision.datasets.utils import calculate_md5, download_file_from_google_drive

    place = base / "celeba"
    if (place / celeba.IMAGES).is_dir() and all((place / file).is_file() for file in celeba.NEEDED):
        return place
    wanted = sorted(
        CelebA.file_list, key=lambda entry: entry[2].endswith(".zip")
    )  # the lists first, being small
    for _, md5, name in wanted:
        if (place / name).is_file() and (found := calculate_md5(place / name)) != md5:
            raise ValueError(f"{place / name}: its MD5 is {found}, not {md5}; delete it and run this again")
    archive, fetched = place / f"{celeba.IMAGES}.zip", []
    for file_id, md5, name in wanted:
        if (place / name).is_file() or (place / name == archive and (place / celeba.IMAGES).is_dir()):
            continue
        try:
            download_file_from_google_drive(file_id, place, name, md5)
            fetched.append(place / name)
        except (OSError, RuntimeError, DownloadError) as error:
            why = (
                "cannot be reached"
                if isinstance(error, OSError)
                else "sent a page instead, its daily quota may be spent"
            )
            files = ", ".join(file for _, _, file in wanted)
            raise ConnectionError(
                f"celeba: {name}: Google Drive {why} ({_first_sentence(error)}); run this again later, or fetch {files} by "
                f'hand from the page "Large-scale CelebFaces Attributes (CelebA) Dataset", {celeba.ADDRESS}, put them in '
                f"{place} and run `selib data get celeba`: it verifies them and unpacks the images"
            ) from None
        finally:
            if place / name not in fetched:
                _clear(place, name)
    if not (place / celeba.IMAGES).is_dir():
        _unpack(archive, place, celeba.IMAGES, zipped=True)
    if archive in fetched:
        archive.unlink()
    return place


def _clear(place: Path, name: str) -> None:
    """Remove what a failed download left: a page that came for the file, or its beginning; and the folder if empty."""
    for file in place.glob(f"{name}*"):
        file.unlink()
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def _first_sentence(error: Exception) -> str:
    """What an error says, without the advice that follows: gdown's runs over many lines."""
    words = " ".join(str(error).split())
    return words.removeprefix("Failed to retrieve file url: ").split(". ")[0].rstrip(".")[:200]


def _download(address: str, file: Path, size: int) -> None:
    """Into a file that may hold the beginning already; raises OSError when the connection ends early."""
    from torchvision.datasets.utils import USER_AGENT, download_url

    start = file.stat().st_size if file.is_file() else 0
    if start == 0:
        download_url(address, file.parent, file.name)
    elif start < size:  # torchvision would begin again
        request = urllib.request.Request(
            address, headers={"User-Agent": USER_AGENT, "Range": f"bytes={start}-"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            goes_on = response.status == 206
            with (
                open(file, "ab" if goes_on else "wb") as out,
                tqdm(
                    total=size, initial=start if goes_on else 0, desc=file.name, unit="B", unit_scale=True
                ) as bar,
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
                opened.extraction_filter = getattr(
                    tarfile, "data_filter", None
                )  # Python before 3.11.4 has none
                opened.extractall(temporary)
        inside = Path(temporary) / folder
        if not inside.is_dir():
            raise ValueError(f"{archive}: holds no folder {folder}")
        os.replace(inside, root / folder)


def _compare(data: ImageSet, counts: torch.Tensor, source: Source, place: Path | None) -> None:
    if source.classes is not None and len(data.classes) != source.classes:
        raise ValueError(
            f"{place}: {len(data.classes)} classes, not {source.classes}; unpack the archive again"
        )
    each = source.per_class[data.split]
    if odd := torch.nonzero(counts != each).flatten().tolist():
        raise ValueError(
            f"{place}: {data.split} has {int(counts[odd[0]])} images of {data.classes[odd[0]]!r}, not {each} "
            f"({len(odd)} such classes); unpack the archive again"
        )
