"""The data sets, and how to fetch, render and check them: behind `studies data list | get | make | check`."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm

from studies.data import faces, objects, photos, speakers
from studies.data.ava import prepare
from studies.data.cache import forget
from studies.data.imageset import ImageSet
from studies.data.objects import FACES, PHOTOS, SPEAKERS, WEIGHTS, data_root, find
from studies.data.speaker_twin import write_speakers
from studies.data.talknet import FOLDERS
from studies.twins import faces as synth_faces
from studies.twins import objects as synth_objects
from studies.twins import speakers as synth_speakers

ARCHIVES = {  # address and MD5
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "tiny-imagenet": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
}
# images of a whole set; of Tiny-ImageNet, which may hold any of its classes, for each class
WHOLE = {
    "cifar10": {"train": 50_000, "val": 10_000},
    "tiny-imagenet": {"train": 500, "val": 50},
    "celeba": {"train": 162_770, "val": 19_867, "test": 19_962},
}
TWINS = {  # counts, writer, and the least of a split: one for each class or condition
    "synth-objects": (synth_objects.COUNTS, objects.write_synth, len(synth_objects.CLASSES)),
    "synth-faces": (synth_faces.COUNTS, faces.write_faces, 1),
    "synth-speakers": (synth_speakers.COUNTS, write_speakers, len(synth_speakers.CONDITIONS)),
}
RESEARCH = "non-commercial research"
ABOUT = {
    "cifar10": (
        "50,000 + 10,000 images of 32x32",
        "Krizhevsky 2009, no licence stated",
        ARCHIVES["cifar10"][0],
    ),
    "tiny-imagenet": ("100,000 + 10,000 images of 64x64, boxes", RESEARCH, ARCHIVES["tiny-imagenet"][0]),
    "celeba": ("162,770 + 19,867 + 19,962 images of 178x218", RESEARCH, faces.ADDRESS),
    "ava-asd": ("39,000 face tracks", "annotations CC BY 4.0", speakers.AVA_ADDRESS),
    "wasd": ("30 hours of 164 videos", "no licence stated", speakers.WASD_ADDRESS),
    "imagenet-sample": ("photographs of ImageNet's classes", RESEARCH, "https://image-net.org"),
    "oxford-pets": ("cats and dogs, masks", "CC BY-SA 4.0", "https://www.robots.ox.ac.uk/~vgg/data/pets"),
    "weights": ("published networks", "BSD-2, MIT", "data/README.md"),
}
PARTIAL = ".selib-partial"  # our folder in the data root for downloads that have not arrived whole


def list_sets(root: str | Path | None = None) -> list[str]:
    """A line for every data set: its name, whether root holds it, what it holds, its terms and source."""
    about = dict(ABOUT)
    for name, (counts, _, _) in TWINS.items():
        held = " + ".join(f"{count:,}" for count in counts.values())
        about[name] = (f"{held}, masks", "as this project", f"studies data make {name}")
    lines = []
    for name, (held, terms, source) in about.items():
        absent = "on demand" if name in TWINS else "absent"
        state = "here" if find(name, data_root(root)) else absent
        lines.append(f"{name:15}  {state:9}  {held:43}  {source}  ({terms})")
    return lines


def get(name: str, root: str | Path | None = None) -> Path:
    """Download a data set, verify and unpack it; returns its folder, at once if it is there.

    Files that already lie in root are verified, used and kept. A download that broke off goes on where it
    stopped. Raises ValueError for a name without an address and for a file of the user's with the wrong
    checksum, ConnectionError, with what to do by hand, when a file cannot be fetched.
    """
    base = data_root(root)
    if name in TWINS:
        raise ValueError(f"{name} has no address to get it from, it is rendered: studies data make {name}")
    if name in SPEAKERS:
        raise ValueError(f"{name} is not fetched from one address: {speakers.missing(name, base)}")
    place = find(name, base)
    if place is None and name in PHOTOS + WEIGHTS:
        raise ValueError(f"{name} is not fetched from one address: {photos.missing(name, base)}")
    if place is not None and (name != "celeba" or all((place / file).exists() for file in faces.NEEDED)):
        return place
    if name == "celeba":
        place = base / "celeba"
        folder, files = place / faces.IMAGES, _celeba_files(place)
        page = f'the page "Large-scale CelebFaces Attributes (CelebA) Dataset", {faces.ADDRESS}'
    else:
        page, md5 = ARCHIVES[name]
        place = folder = base / objects.FOLDERS[name][0]
        files = [(base / page.rsplit("/", 1)[1], md5, page)]
    archive = files[-1][0]
    names = ", ".join(file.name for file, _, _ in files)
    by_hand = f"fetch {names} from {page}, put it in {archive.parent} and run `studies data get {name}`"
    fetched = set()
    # what is here is verified before anything is fetched
    for file, md5, url in sorted(files, key=lambda entry: not entry[0].exists()):
        if (file != archive or not folder.is_dir()) and _fetch(file, base, md5, by_hand, url):
            fetched.add(file)
    if not folder.is_dir():
        _unpack(archive, folder)
        if archive in fetched:
            archive.unlink()
    return place


def _celeba_files(place: Path) -> list[tuple[Path, str, str]]:
    """The files of CelebA that torchvision names, with MD5 and address: the lists, and last the images."""
    from torchvision.datasets import CelebA

    files = [
        (place / name, md5, f"https://drive.google.com/uc?id={key}") for key, md5, name in CelebA.file_list
    ]
    return sorted(files, key=lambda entry: entry[0].suffix == ".zip")


def _fetch(file: Path, base: Path, md5: str, by_hand: str, url: str) -> bool:
    """Verify a file, downloaded first unless it is there; returns whether it was downloaded.

    What has not arrived whole lies in our own folder: nothing else is deleted, and nothing is overwritten.
    """
    import gdown
    from gdown.exceptions import DownloadError
    from torchvision.datasets.utils import check_integrity

    if file.exists():
        if not check_integrity(file, md5):
            raise ValueError(f"{file}: its MD5 is not {md5}, it is damaged; delete it and run this again")
        return False
    partial = base / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    try:
        gdown.download(url, str(partial / file.name), resume=True)
        if not check_integrity(partial / file.name, md5):
            (partial / file.name).unlink()
            raise OSError(f"what came has another MD5 than {md5}")
        file.parent.mkdir(exist_ok=True)
        os.rename(partial / file.name, file)
    except (OSError, DownloadError) as error:
        why = " ".join(str(error).split())[:200]
        again = f"run this again to go on where it stopped (delete {partial} to begin anew)"
        raise ConnectionError(f"{file.name} cannot be fetched ({why}); {again}, or {by_hand}") from None
    finally:
        with suppress(OSError):  # while it holds the beginning of a file, it stays
            partial.rmdir()
    return True


def _unpack(archive: Path, place: Path) -> None:
    """Unpack into a temporary folder, then move the data set into place: it is there whole or not at all."""
    from torchvision.datasets.utils import extract_archive

    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as temporary:
        extract_archive(archive, temporary)
        if not (Path(temporary) / place.name).is_dir():
            raise ValueError(f"{archive}: holds no folder {place.name}")
        os.rename(Path(temporary) / place.name, place)


def make(
    name: str,
    root: str | Path | None = None,
    count: int | None = None,
    seed: int = 0,
    *,
    videos: str | Path | None = None,
) -> Path:
    """Render a twin into root: `count` training images or clips, a quarter as many to validate and test.

    videos: for "ava-asd", which is cut from raw videos (`studies.data.ava.prepare`): a folder with them and
    their annotations. Returns the folder. The same count and seed write the same files. Raises ValueError
    for another name, FileExistsError when it is there.
    """
    folder = data_root(root) / name
    if (name == "ava-asd") != (videos is not None) or (videos is not None and count is not None):
        how = "studies data make ava-asd --videos DIR; nothing else takes --videos"
        raise ValueError(f"ava-asd is cut from its videos: {how}")
    if videos is not None:
        prepare(Path(videos), folder)
        return folder
    if name not in TWINS:
        raise ValueError(f"{name!r} cannot be made; only {', '.join(TWINS)} are rendered")
    counts, write, least = TWINS[name]
    if count is not None:
        if count < least:
            raise ValueError(f"count must be at least {least}, not {count}")
        few = max(least, count // 4)
        counts = {split: few if split in ("val", "test") else count for split in counts}
    if folder.exists():
        raise FileExistsError(f"{folder}: already there; delete it to render it anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as temporary:
        write(Path(temporary) / name, counts, seed)
        os.rename(Path(temporary) / name, folder)
    return folder


def check(name: str, root: str | Path | None = None) -> str:
    """Read every file of a data set anew, compare with a whole one, and return a summary of a few lines.

    Raises FileNotFoundError when it is not there, ValueError with the first thing that is wrong.
    """
    base = data_root(root)
    place = find(name, base)
    if place is None and name in TWINS:
        how = f"it is rendered when asked for; `studies data make {name}` writes it"
        raise FileNotFoundError(f"{base / name}: not there, so {how}")
    forget(base, name)  # a damaged file can keep its size and time
    if name in SPEAKERS:
        return "\n".join([f"{name}: {place}", *_check_speakers(name, place, base)])
    if name in WEIGHTS:
        return "\n".join([f"{name}: {place}", *_check_weights(place, base)])
    if name in PHOTOS:
        read_photos = photos.pets if name == "oxford-pets" else photos.imagenet_sample
        return f"{name}: {place}\n{_summary(read_photos(root=base))}"
    lines = [f"{name}: {place}"]
    read = faces.load_faces if name in FACES else objects.load
    for split in WHOLE[name] if name in WHOLE else TWINS[name][0]:
        data = read(name, split, root=base)
        each = len(data.classes) if name == "tiny-imagenet" else 1
        if name in WHOLE and len(data) != each * WHOLE[name][split]:
            few = f"{split} has {len(data):,} images, not {each * WHOLE[name][split]:,}"
            raise ValueError(f"{place}: {few}: it is not the whole set")
        lines.append(_summary(data))
    return "\n".join(lines)


def _summary(data: ImageSet) -> str:
    kinds = f"{len(data.classes)} {'attributes' if data.multilabel else 'classes'}"
    held = f"{len(data):,} images of {data.size[1]}x{data.size[0]}, {kinds}"
    return f"  {data.split}: {held}, {data.annotation or 'no boxes'}, fingerprint {data.fingerprint}"


def _check_weights(place: Path | None, base: Path) -> list[str]:
    """Read every tensor of the files of weights."""
    files = sorted(place.glob("*.safetensors")) if place else []
    if not files:
        raise FileNotFoundError(photos.missing("weights", base))
    lines = []
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                source = (opened.metadata() or {}).get("source", "no source named")
            numbers = sum(tensor.numel() for tensor in load_file(file).values())
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}; {objects.AGAIN}") from None
        lines.append(f"  {file.name}: {numbers:,} numbers, {source}")
    return lines


def _check_speakers(name: str, place: Path | None, base: Path) -> list[str]:
    """Read every clip that the lists of a set name, with its bodies where it has them."""
    if place is None:
        raise FileNotFoundError(speakers.missing(name, base))
    splits = [split for split in speakers.SPLITS if (place / "csv" / f"{split}_loader.csv").is_file()]
    if not splits:
        raise FileNotFoundError(f"{place / 'csv'}: holds no list such as train_loader.csv")
    streams = [stream for stream in FOLDERS if stream != "body" or (place / FOLDERS["body"]).is_dir()]
    lines = []
    for split in splits:
        data = speakers.load_speakers(name, split, root=base, streams=streams)
        for row in tqdm(range(len(data)), f"check {name} {split}", leave=False, unit="clip"):
            data.wave(row)
            for stream in streams[1:]:
                data.pictures(row, stream)
            if data.synthetic:
                data.masks(row)
        frames = sum(clip.frames for clip in data.clips)
        spoken = sum(int(clip.labels.sum()) for clip in data.clips) / frames
        conditions = len({clip.condition for clip in data.clips} - {None})
        held = f"{len(data):,} clips of {frames:,} frames with {', '.join(streams)}, {spoken:.0%} speaking"
        told = f", {conditions} conditions" if conditions else ""
        lines.append(f"  {split}: {held}{told}, fingerprint {data.fingerprint}")
    return lines
