"""Object data sets: CIFAR-10/100, Tiny-ImageNet with boxes, any image folder, and the procedural twin."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from studies.data.cache import SHOWN, Listing, cached, cores, decoded, digest, resize
from studies.data.imageset import ImageSet
from studies.profiles import base
from studies.twins import objects as synth

SPLITS = ("train", "val")
NAMES = ("cifar10", "cifar100", "tiny-imagenet", "synth-objects")
FACES = ("celeba", "synth-faces")  # read by `studies.data.load_faces`
SPEAKERS = ("ava-asd", "wasd", "synth-speakers")  # read by `studies.data.load_speakers`
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
TINY_FOLDER = "tiny-imagenet-200"
AGAIN = "unpack the archive again"


class _Cifar(NamedTuple):
    """The binary version: label byte(s), then 3 x 32 x 32 pixels, record after record."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    records: tuple[int, int]  # in each file of train and of test
    label_bytes: int  # CIFAR-100 has the coarse label first; the fine one is the last
    names: str
    pickled: str


CIFAR = {
    "cifar10": _Cifar(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
        test=("test_batch.bin",),
        records=(10_000, 10_000),
        label_bytes=1,
        names="batches.meta.txt",
        pickled="cifar-10-batches-py",
    ),
    "cifar100": _Cifar(
        folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
        records=(50_000, 10_000),
        label_bytes=2,
        names="fine_label_names.txt",
        pickled="cifar-100-python",
    ),
}


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds the data sets: the argument, else SELIB_DATA, else `data` in the study's base folder."""
    return Path(root if root is not None else os.environ.get("SELIB_DATA") or base() / "data")


def available(name: str, root: str | Path | None = None) -> bool:
    """Whether `load`, `load_faces` or `load_speakers` would find this set; says nothing of its health.

    Raises ValueError for an unknown name.
    """
    # a twin is rendered when it is not on disk
    return find(name, data_root(root)) is not None or name in (
        "synth-objects",
        "synth-faces",
        "synth-speakers",
    )


def load(
    name: str,
    split: str = "train",
    *,
    root: str | Path | None = None,
    size: int | None = None,
    classes: int | Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """One split of a data set, fully checked; `split` is "train" or "val" (CIFAR's test images are its "val").

    name: cifar10, cifar100, tiny-imagenet, synth-objects, or `folder:PATH` for {train,val}/<class>/*.{jpg,png}.
    root: the folder that holds the data sets (else SELIB_DATA, else `data`). size: side in pixels to resize to.
    classes: keep the first k in sorted order, or those named. limit: keep about that many images, balanced over the
    classes, chosen by the seed. Images are decoded once, into `<root>/.cache`.

    Raises FileNotFoundError when the data or a part of it is missing, ValueError when it is damaged or an argument is
    out of range.
    """
    _check_split(split)
    for argument, value in (("size", size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{argument} must be at least 1, not {value}")
    if name in FACES:
        raise ValueError(f"{name} is a set of faces with attributes: studies.data.load_faces reads it")
    if name in SPEAKERS:
        raise ValueError(f"{name} is a set of clips with sound: studies.data.load_speakers reads it")
    base = data_root(root)
    place = find(name, base)
    if name == "synth-objects" and place is None:
        whole = _render_synth(split, size, limit if classes is None else None, seed)
    elif name.startswith("folder:"):
        whole = load_folder(name.removeprefix("folder:"), split, size)
    elif place is None:
        raise FileNotFoundError(_missing(name, base))
    elif name == "synth-objects":
        whole = _load_synth(place, base, split, size)
    elif name == "tiny-imagenet":
        whole = _load_tiny(place, base, split, size)
    elif place.name == CIFAR[name].folder:
        whole = _load_cifar_binary(name, place, base, split, size)
    else:
        whole = _load_cifar_tree(name, place, base, split, size)
    return choose(whole, classes=classes, limit=limit, seed=seed)


def load_folder(path: str | Path, split: str = "train", size: int | None = None) -> ImageSet:
    """A folder as torchvision's ImageFolder reads it, <path>/{train,val}/<class>/*.{jpg,png}; `test` serves for `val`.

    size: the side to bring images to (shorter side, then the central square); needed when they differ in size.
    """
    _check_split(split)
    base = Path(path)
    part = base / split
    if split == "val" and not part.is_dir() and (base / "test").is_dir():
        part = base / "test"
    if not part.is_dir():
        raise FileNotFoundError(f"{part}: no such folder; images belong in {base}/{{train,val}}/<class>/")
    names, listing, targets = _tree(base, part)
    if split == "val" and (base / "train").is_dir():  # it may lack a class: the training folder numbers them
        known = _classes(base / "train")
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(
                f"{part / unknown[0]}: {base / 'train'} has no such class; remove it or add training images"
            )
        targets = [known.index(names[target]) for target in targets]
        names = known
    native = None if size is not None else _first_side(base, listing)
    remedy = "restore or remove them" + ("" if size else ", or give size= where only the size is wrong")
    images = decoded(base, split, listing, native=native, size=size, remedy=remedy)
    return ImageSet(
        f"folder:{base.resolve().name}", split, torch.from_numpy(images), torch.tensor(targets), names
    )


def choose(
    data: ImageSet, *, classes: int | Sequence[str] | None = None, limit: int | None = None, seed: int = 0
) -> ImageSet:
    """Keep the first k classes (or those named) and about `limit` images, balanced, picked by the seed, in order."""
    targets, names = data.targets.numpy(), data.classes
    keep = np.ones(len(data), bool)
    kept = range(len(names)) if classes is None else _class_indices(data, classes)
    if len(kept) < len(names):
        keep = np.isin(targets, kept)
        renumber = np.full(len(names), -1, np.int64)
        renumber[kept] = np.arange(len(kept))
        targets, names = renumber[targets], [names[label] for label in kept]
    if limit is not None and limit < keep.sum():
        for label in range(len(names)):
            quota = limit // len(names) + (label < limit % len(names))
            rows = np.flatnonzero(keep & (targets == label))
            order = np.random.default_rng([seed, label]).permutation(rows)
            keep[order[quota:]] = False
    if keep.all() and names is data.classes:
        return data  # still memory-mapped
    chosen = torch.from_numpy(np.flatnonzero(keep))
    return replace(data.subset(chosen), targets=torch.from_numpy(targets)[chosen], classes=names)


def find(name: str, root: Path) -> Path | None:
    """The folder that holds a set, or None; for CIFAR the lossless binary version goes before the tree of JPEGs."""
    if name.startswith("folder:"):
        folders = [Path(name.removeprefix("folder:"))]
    elif name in CIFAR:
        folders = [root / CIFAR[name].folder, root / name]
    elif name == "tiny-imagenet":
        folders = [root / TINY_FOLDER]
    elif name == "synth-objects" or name in FACES or name in SPEAKERS:
        folders = [root / name]
    else:
        raise ValueError(
            f"unknown data set {name!r}; known are {', '.join((*NAMES, *FACES, *SPEAKERS))} and folder:PATH"
        )
    return next((folder for folder in folders if folder.is_dir()), None)


def _missing(name: str, root: Path) -> str:
    folder = TINY_FOLDER if name == "tiny-imagenet" else CIFAR[name].folder
    remedy = f"run `selib data get {name}`, or put its folder {folder} in {root}, or point SELIB_DATA to where it is"
    if name in CIFAR and (pickled := root / CIFAR[name].pickled).is_dir():
        return f"{pickled}: pickled data is not read, a pickle can run code; for the binary version {remedy}"
    return f"{name}: not found in {root}; {remedy}"


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")


def _class_indices(data: ImageSet, classes: int | Sequence[str]) -> list[int]:
    if isinstance(classes, int):
        if not 1 <= classes <= len(data.classes):
            raise ValueError(f"classes must be 1..{len(data.classes)} for {data.name}, not {classes}")
        return list(range(classes))
    if unknown := [name for name in classes if name not in data.classes]:
        raise ValueError(
            f"{data.name} has no class {unknown[0]!r}; it has {', '.join(data.classes[:10])} ..."
        )
    return sorted({data.classes.index(name) for name in classes})


# --- folders of images ------------------------------------------------------------------------------------------------


def _files(folder: Path, root: Path) -> list[tuple[str, int, int]]:
    """The JPEG and PNG files of a folder, sorted by name."""
    found = []
    above = folder.relative_to(root).as_posix()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith("."):
                state = entry.stat()
                found.append((f"{above}/{entry.name}", state.st_size, state.st_mtime_ns))
    return sorted(found)


def _classes(part: Path) -> list[str]:
    with os.scandir(part) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{part}: holds no class folders; {AGAIN}")
    return names


def _tree(root: Path, part: Path) -> tuple[list[str], list[tuple[str, int, int]], list[int]]:
    """Class names, files and targets of <part>/<class>/*; an empty class folder is an error."""
    names = _classes(part)
    listing: list[tuple[str, int, int]] = []
    targets: list[int] = []
    for label, name in enumerate(names):
        files = _files(part / name, root)
        if not files:
            raise ValueError(
                f"{part / name}: class folder holds no JPEG or PNG images; {AGAIN} or remove the folder"
            )
        listing += files
        targets += [label] * len(files)
    return names, listing, targets


def _first_side(root: Path, listing: Listing) -> int:
    """Side of the first image, which all others must then have."""
    file = root / listing[0][0]
    try:
        with Image.open(file) as image:
            width, height = image.size
    except OSError:
        raise ValueError(f"{file}: truncated or not an image; restore or remove it") from None
    if width != height:
        raise ValueError(
            f"{file}: {width}x{height} is not square; give size=, the side in pixels to bring images to"
        )
    return int(width)


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def _load_cifar_tree(name: str, place: Path, root: Path, split: str, size: int | None) -> ImageSet:
    for folder in ("train", "test"):
        if not (place / folder).is_dir():
            raise FileNotFoundError(f"{place / folder}: no such folder; the tree is half unpacked, {AGAIN}")
    train, test = (set(_classes(place / folder)) for folder in ("train", "test"))
    if odd := sorted(train ^ test):
        raise ValueError(
            f"{place}: only one of train and test has class {odd[0]!r} ({len(odd)} such); {AGAIN}"
        )
    part = place / ("train" if split == "train" else "test")
    names, listing, targets = _tree(root, part)
    counts = Counter(targets)
    most = max(counts.values())
    if short := [label for label in counts if counts[label] < most]:
        file, held = part / names[short[0]], counts[short[0]]
        raise ValueError(
            f"{file}: {held} images, other classes have {most}; the tree is half unpacked, {AGAIN}"
        )
    images = decoded(root, f"{name}-{split}", listing, native=32, size=size, remedy=AGAIN)
    return ImageSet(name, split, torch.from_numpy(images), torch.tensor(targets), names)


def _load_cifar_binary(name: str, place: Path, root: Path, split: str, size: int | None) -> ImageSet:
    form = CIFAR[name]
    files = [place / file for file in (form.train if split == "train" else form.test)]
    for file in (place / form.names, *files):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; {AGAIN}")
    names = (place / form.names).read_text(encoding="utf-8").split()
    records, record = form.records[split == "val"], form.label_bytes + 3 * 32 * 32
    for file in files:
        if (length := file.stat().st_size) != records * record:
            raise ValueError(f"{file}: {length} bytes are not {records} records of {record} bytes; {AGAIN}")
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(records, record) for file in files])
    targets = rows[:, form.label_bytes - 1].astype(np.int64)
    if targets.max() >= len(names):
        raise ValueError(
            f"{place}: label {targets.max()}, but {form.names} names {len(names)} classes; {AGAIN}"
        )
    images = np.ascontiguousarray(rows[:, form.label_bytes :]).reshape(-1, 3, 32, 32)
    if size is not None:
        version = digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])

        def produce(start: int, stop: int) -> tuple[np.ndarray, list[str]]:
            return np.stack([resize(image, size) for image in images[start:stop]]), []

        key, shape = f"{name}-binary-{split}-{size}", (len(images), 3, size, size)
        return ImageSet(
            name,
            split,
            torch.from_numpy(cached(root, key, version, shape, produce, threads=cores() if size > 64 else 1)),
            torch.from_numpy(targets),
            names,
        )
    return ImageSet(name, split, torch.from_numpy(images), torch.from_numpy(targets), names)


# --- Tiny-ImageNet ----------------------------------------------------------------------------------------------------


class _Box(NamedTuple):
    file: str
    wnid: str
    corners: tuple[int, int, int, int]  # ends exclusive


def _load_tiny(place: Path, root: Path, split: str, size: int | None) -> ImageSet:
    """The official tree; `wnids.txt` says which classes count, so that a tree of any subset is complete in itself."""
    wnids = sorted(_text(place / "wnids.txt").split())
    if not wnids:
        raise ValueError(f"{place / 'wnids.txt'}: names no class; {AGAIN}")
    files: list[tuple[str, int, int]] = []
    boxes: list[_Box] = []
    if split == "train":
        for wnid in wnids:
            folder = place / "train" / wnid
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder, though wnids.txt names it; {AGAIN}")
            mine = _boxes(folder / f"{wnid}_boxes.txt", wnid)
            files += _match(root, folder / "images", folder / f"{wnid}_boxes.txt", mine, mine)
            boxes += mine
    else:
        annotations = place / "val" / "val_annotations.txt"
        everything = _boxes(annotations, None)
        boxes = [box for box in everything if box.wnid in set(wnids)]
        if without := sorted(set(wnids) - {box.wnid for box in boxes}):
            raise ValueError(
                f"{annotations}: names no image of class {without[0]} ({len(without)} such); {AGAIN}"
            )
        files += _match(root, place / "val" / "images", annotations, everything, boxes)
    images = decoded(root, f"tiny-imagenet-{split}", files, native=64, size=size, remedy=AGAIN)
    corners = torch.tensor([box.corners for box in boxes])
    if size is not None:  # rounded outwards, so that no part of the object is lost
        corners = torch.cat([corners[:, :2] * size // 64, (corners[:, 2:] * size + 63) // 64], 1)
    label = {wnid: index for index, wnid in enumerate(wnids)}
    return ImageSet(
        "tiny-imagenet",
        split,
        torch.from_numpy(images),
        torch.tensor([label[box.wnid] for box in boxes]),
        _readable(place / "words.txt", wnids),
        boxes=corners,
    )


def _text(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; the tree is half unpacked, {AGAIN}")
    return file.read_text(encoding="utf-8")


def _boxes(file: Path, wnid: str | None) -> list[_Box]:
    """Lines `image [wnid] x1 y1 x2 y2`, both ends inclusive in 0..63; wnid None: the line names it."""
    layout = "image x1 y1 x2 y2" if wnid is not None else "image class x1 y1 x2 y2"
    found: list[_Box] = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        try:
            name, *rest = line.split()
            owner = wnid if wnid is not None else rest.pop(0)
            x1, y1, x2, y2 = map(int, rest)
        except (ValueError, IndexError):
            raise ValueError(f"{file}:{number}: expected `{layout}`, found {line!r}; {AGAIN}") from None
        if not (0 <= x1 <= x2 < 64 and 0 <= y1 <= y2 < 64):
            raise ValueError(
                f"{file}:{number}: box {x1} {y1} {x2} {y2} is not within the 64x64 image; {AGAIN}"
            )
        found.append(_Box(name, owner, (x1, y1, x2 + 1, y2 + 1)))
    if not found:
        raise ValueError(f"{file}: is empty; {AGAIN}")
    return found


def _match(root: Path, folder: Path, file: Path, boxes: list[_Box], wanted: list[_Box]) -> Listing:
    """Listing of the wanted boxes' images, in the order of the box file; images and boxes must agree both ways."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; the tree is half unpacked, {AGAIN}")
    present = {path.rsplit("/", 1)[1]: (path, size, mtime) for path, size, mtime in _files(folder, root)}
    named = Counter(box.file for box in boxes)
    if twice := [name for name, count in named.items() if count > 1]:
        raise ValueError(f"{file}: names {twice[0]} more than once ({len(twice)} such images); {AGAIN}")
    if absent := [box.file for box in wanted if box.file not in present]:
        first = ", ".join(absent[:SHOWN])
        raise FileNotFoundError(
            f"{folder}: {len(absent)} of the images that {file} names are missing: {first}; {AGAIN}"
        )
    if unnamed := sorted(set(present) - set(named)):
        first = ", ".join(unnamed[:SHOWN])
        raise ValueError(f"{folder}: {len(unnamed)} images have no line in {file}: {first}; {AGAIN}")
    return [present[box.file] for box in wanted]


def _readable(words: Path, wnids: list[str]) -> list[str]:
    """The first name of every class in words.txt; with its wnid where two share one, the wnid alone where none."""
    meaning = {}
    if words.is_file():
        for line in words.read_text(encoding="utf-8").splitlines():
            wnid, _, text = line.partition("\t")
            meaning[wnid] = text.split(",")[0].strip()
    names = [meaning.get(wnid) or wnid for wnid in wnids]
    shared = Counter(names)
    return [
        name if shared[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)
    ]


# --- synth-objects ----------------------------------------------------------------------------------------------------


def _render_synth(split: str, size: int | None, limit: int | None, seed: int) -> ImageSet:
    images, targets, masks = synth.render_set(limit or synth.COUNTS[split], split, seed, size or synth.SIZE)
    return ImageSet(
        "synth-objects",
        split,
        torch.from_numpy(images),
        torch.from_numpy(targets),
        list(synth.CLASSES),
        masks=torch.from_numpy(masks),
        synthetic=True,
    )


def _load_synth(place: Path, root: Path, split: str, size: int | None) -> ImageSet:
    """What `write_synth` wrote; the lines of <split>.jsonl say which images there are, and their order."""
    remedy = f"delete {place} and run `selib data make synth-objects`"
    index = place / f"{split}.jsonl"
    for needed in (index, place / split, place / "masks" / split):
        if not needed.exists():
            raise FileNotFoundError(f"{needed}: not there; {remedy}")
    files = []
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
        try:
            files.append((str(json.loads(line)["file"]), synth.CLASSES.index(json.loads(line)["class"])))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{index}:{number}: not a scene with its file and class; {remedy}") from None
    listings = []
    for folder in (place, place / "masks"):
        found = {f"{path}": (path, size_, time) for path, size_, time in _tree(root, folder / split)[1]}
        order = [f"{folder.relative_to(root).as_posix()}/{file}" for file, _ in files]
        if odd := sorted(set(order) ^ set(found)):
            raise ValueError(
                f"{root / odd[0]}: only one of {index.name} and the folder has it ({len(odd)} such); {remedy}"
            )
        listings.append([found[path] for path in order])
    images = decoded(root, f"synth-objects-{split}", listings[0], native=synth.SIZE, size=size, remedy=remedy)
    masks = decoded(
        root,
        f"synth-objects-{split}-masks",
        listings[1],
        native=synth.SIZE,
        size=size,
        remedy=remedy,
        mode="P",
    )
    return ImageSet(
        "synth-objects",
        split,
        torch.from_numpy(images),
        torch.tensor([target for _, target in files]),
        list(synth.CLASSES),
        masks=torch.from_numpy(masks[:, 0] > 0),
        synthetic=True,
    )


def write_synth(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Render scenes into <folder>/{train,val}/<class>/NNNNN.png and their parameters into {train,val}.jsonl.

    masks/{train,val}/<class>/NNNNN.png: a pixel's value is 1 + the index of the part seen there (`synth.PARTS`), or 0.
    """
    for split, count in counts.items():
        for part in (folder / split, folder / "masks" / split):
            for name in synth.CLASSES:
                (part / name).mkdir(parents=True)
        lines = []
        scenes = synth.scenes(count, split, seed)
        for number, scene in enumerate(
            tqdm(scenes, desc=f"synth-objects {split}", unit="image", leave=False)
        ):
            image, owners = synth.draw(scene)
            file = f"{split}/{scene['class']}/{number:05d}.png"
            Image.fromarray(image).save(folder / file)
            mask = Image.fromarray(owners).convert("P")
            mask.putpalette(MASK_COLOURS)
            mask.save(folder / "masks" / file)
            lines.append(json.dumps({"file": file, "seed": seed, **scene}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# off the object black, then a colour a part
MASK_COLOURS = bytes.fromhex("000000 e63c3c 3ca0e6 f0c83c 5abe5a b464dc f08c3c f0f0f0")
