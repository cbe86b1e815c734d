"""Object data sets: CIFAR-10, Tiny-ImageNet with boxes, and the rendered twin with masks."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from studies.data.cache import decoded
from studies.data.imageset import ImageSet
from studies.data.lists import Table, compare, images_in, listing, read_lines, read_scenes, read_table, refuse
from studies.profiles import base
from studies.twins import objects as synth

SPLITS = ("train", "val")
NAMES = ("cifar10", "tiny-imagenet", "synth-objects")
FACES = ("celeba", "synth-faces")  # read by `studies.data.load_faces`
SPEAKERS = ("ava-asd", "wasd", "synth-speakers")  # read by `studies.data.load_speakers`
PHOTOS = ("imagenet-sample", "oxford-pets")  # read by `studies.data.photos`
WEIGHTS = ("weights",)  # read by `studies.networks`
# of CIFAR the lossless binary version goes before a tree of JPEGs
FOLDERS = {"cifar10": ("cifar-10-batches-bin", "cifar10"), "tiny-imagenet": ("tiny-imagenet-200",)}
PICKLED = "cifar-10-batches-py"
RECORDS = 10_000  # in each of CIFAR's binary files
RECORD = 1 + 3 * 32 * 32  # bytes: the class, then the pixels
AGAIN = "unpack the archive again"


def data_root(root: str | Path | None = None) -> Path:
    """The folder that holds the data sets: the argument, else SELIB_DATA, else `data` in the base folder."""
    return Path(root if root is not None else os.environ.get("SELIB_DATA") or base() / "data")


def find(name: str, root: Path) -> Path | None:
    """The folder that holds a set, or None. Raises ValueError for an unknown name."""
    known = NAMES + FACES + SPEAKERS + PHOTOS + WEIGHTS
    if name not in known:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(known)}")
    folders = [root / folder for folder in FOLDERS.get(name, (name,))]
    return next((folder for folder in folders if folder.is_dir()), None)


def available(name: str, root: str | Path | None = None) -> bool:
    """Whether the set is here, whole or not; a twin always is. Raises ValueError for an unknown name."""
    return find(name, data_root(root)) is not None or name.startswith("synth-")


def load(
    name: str,
    split: str = "train",
    *,
    root: str | Path | None = None,
    classes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """One split of cifar10, tiny-imagenet or synth-objects, fully checked.

    split: "train" or "val" (CIFAR's test images are its "val"). root: the folder that holds the data sets
    (else SELIB_DATA, else `data`). classes: keep the first so many in sorted order. limit: keep about that
    many images, balanced over the classes, chosen by the seed. Images are decoded once, into
    `<root>/.cache`.

    Raises FileNotFoundError when the data or a part of it is missing, ValueError when it is damaged or an
    argument is out of range.
    """
    readers = {"data.load_faces": FACES, "data.load_speakers": SPEAKERS}
    for reader, others in {**readers, "data.photos": PHOTOS, "networks": WEIGHTS}.items():
        if name in others:
            raise ValueError(f"{name} does not hold objects: studies.{reader} reads it")
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'val', not {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    base = data_root(root)
    place = find(name, base)
    if name == "synth-objects" and place is None:
        whole = _rendered(split, limit if classes is None else None, seed)
    elif place is None:
        raise FileNotFoundError(_missing(name, base))
    elif name == "synth-objects":
        whole = _load_twin(place, base, split)
    elif name == "tiny-imagenet":
        whole = _load_tiny(place, base, split)
    elif place.name == "cifar10":
        whole = _load_tree(place, base, split)
    else:
        whole = _load_binary(place, split)
    return choose(whole, classes, limit, seed)


def choose(data: ImageSet, classes: int | None, limit: int | None, seed: int) -> ImageSet:
    """Keep the first classes and about `limit` images, balanced, picked by the seed, in order."""
    count = len(data.classes) if classes is None else classes
    if not 1 <= count <= len(data.classes):
        raise ValueError(f"classes must be 1..{len(data.classes)} for {data.name}, not {classes}")
    targets = data.targets.numpy()
    keep = targets < count
    if limit is not None and limit < keep.sum():
        for label in range(count):
            quota = limit // count + (label < limit % count)
            rows = np.flatnonzero(targets == label)
            order = np.random.default_rng([seed, label]).permutation(rows)
            keep[order[quota:]] = False
    if keep.all():
        return data  # still memory-mapped
    return replace(data.subset(torch.from_numpy(np.flatnonzero(keep))), classes=data.classes[:count])


def _missing(name: str, root: Path) -> str:
    remedy = f"run `studies data get {name}`, or put its folder {FOLDERS[name][0]} in {root}"
    remedy += ", or point SELIB_DATA to where it is"
    if name == "cifar10" and (root / PICKLED).is_dir():
        why = "pickled data is not read, a pickle can run code"
        return f"{root / PICKLED}: {why}; for the binary version {remedy}"
    return f"{name}: not found in {root}; {remedy}"


def _load_tree(place: Path, root: Path, split: str) -> ImageSet:
    """<place>/{train,test}/<class>/*.{jpg,png}: the same classes in both, as many images in each class."""
    part = place / ("train" if split == "train" else "test")
    names = sorted({path.name for path in place.glob("*/[!.]*") if path.is_dir()})
    if not names:
        raise ValueError(f"{place}: holds no class folders; {AGAIN}")
    files = [listing(root, part / name, images_in(part / name, AGAIN)) for name in names]
    most = max(len(mine) for mine in files)
    for name, mine in zip(names, files, strict=True):
        if len(mine) < max(most, 1):
            what = f"{len(mine)} JPEG or PNG images, other classes have {most}"
            raise ValueError(f"{part / name}: {what}; {AGAIN}")
    images = decoded(root, f"cifar10-{split}", [file for mine in files for file in mine], AGAIN, (32, 32))
    targets = torch.arange(len(names)).repeat_interleave(most)
    return ImageSet("cifar10", split, torch.from_numpy(images), targets, names)


def _load_binary(place: Path, split: str) -> ImageSet:
    """The binary version: record after record, the class and then 3 x 32 x 32 pixels."""
    batches = [f"data_batch_{n}" for n in range(1, 6)] if split == "train" else ["test_batch"]
    names = read_lines(place / "batches.meta.txt", AGAIN)
    rows = []
    for file in (place / f"{batch}.bin" for batch in batches):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; {AGAIN}")
        if (length := file.stat().st_size) != RECORDS * RECORD:
            raise ValueError(f"{file}: {length} bytes are not {RECORDS} records of {RECORD} bytes; {AGAIN}")
        rows.append(np.fromfile(file, np.uint8).reshape(RECORDS, RECORD))
    records = np.concatenate(rows)
    targets = torch.from_numpy(records[:, 0].astype(np.int64))
    if int(targets.max()) >= len(names):
        what = f"label {targets.max()}, but batches.meta.txt names {len(names)} classes"
        raise ValueError(f"{place}: {what}; {AGAIN}")
    images = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)
    return ImageSet("cifar10", split, torch.from_numpy(images), targets, names)


def _load_tiny(place: Path, root: Path, split: str) -> ImageSet:
    """The official tree, or any subset of its classes: `wnids.txt` says which."""
    wnids = sorted(read_lines(place / "wnids.txt", AGAIN))
    if not wnids:
        raise ValueError(f"{place / 'wnids.txt'}: names no class; {AGAIN}")
    folders = [place / "train" / wnid for wnid in wnids] if split == "train" else [place / "val"]
    files: list[tuple[str, int, int]] = []
    targets: list[int] = []
    boxes: list[np.ndarray] = []
    for folder in folders:
        list_name = f"{folder.name}_boxes.txt" if split == "train" else "val_annotations.txt"
        table = _read_boxes(folder / list_name, words=0 if split == "train" else 1)
        compare(folder / "images", table.names, list_name, AGAIN)
        owners = [words[0] if words else folder.name for words in table.words]
        rows = [row for row, wnid in enumerate(owners) if wnid in wnids]
        files += listing(root, folder / "images", [table.names[row] for row in rows])
        targets += [wnids.index(owners[row]) for row in rows]
        boxes.append(table.values[rows])
    if without := sorted(set(range(len(wnids))).difference(targets)):
        raise ValueError(f"{folders[0]}: has no image of class {wnids[without[0]]}; {AGAIN}")
    return ImageSet(
        "tiny-imagenet",
        split,
        torch.from_numpy(decoded(root, f"tiny-imagenet-{split}", files, AGAIN, (64, 64))),
        torch.tensor(targets),
        _readable(place / "words.txt", wnids),
        boxes=torch.from_numpy(np.concatenate(boxes)),
    )


def _read_boxes(file: Path, words: int) -> Table:
    """Boxes x1, y1, x2, y2: both ends are inclusive in the file; in the table x2 and y2 are exclusive."""
    table = read_table(file, ("x1", "y1", "x2", "y2"), AGAIN, words=words)
    starts, stops = table.values[:, :2], table.values[:, 2:]
    bad = ((starts < 0) | (starts > stops) | (stops > 63)).any(1)
    if bad.any():
        row = int(bad.argmax())
        box = " ".join(map(str, table.values[row]))
        refuse(file, row + 1, f"box {box} is not within the 64x64 image", AGAIN)
    return table._replace(values=table.values + [0, 0, 1, 1])


def _readable(words: Path, wnids: list[str]) -> list[str]:
    """The first name of each class in words.txt, with its wnid where two share it; else the wnid."""
    lines = [line.partition("\t") for line in read_lines(words, AGAIN)] if words.is_file() else []
    meaning = {wnid: text.split(",")[0].strip() for wnid, _, text in lines}
    names = {wnid: meaning.get(wnid) or wnid for wnid in wnids}
    shared = Counter(names.values())
    return [name if shared[name] == 1 else f"{name} ({wnid})" for wnid, name in names.items()]


def _rendered(split: str, limit: int | None, seed: int) -> ImageSet:
    return _twin(split, *synth.render_set(limit or synth.COUNTS[split], split, seed))


def _twin(split: str, images: np.ndarray, targets: np.ndarray, masks: np.ndarray) -> ImageSet:
    pixels, labels, parts = (torch.from_numpy(array) for array in (images, targets, masks))
    return ImageSet("synth-objects", split, pixels, labels, list(synth.CLASSES), masks=parts, synthetic=True)


def _load_twin(place: Path, root: Path, split: str) -> ImageSet:
    """What `write_synth` wrote; the lines of <split>.jsonl say which images there are, and their order."""
    remedy = f"delete {place} and run `studies data make synth-objects`"
    index = place / f"{split}.jsonl"
    files = [scene["file"] for scene in read_scenes(index, ["file"], remedy)]
    arrays = []
    for above, key, mode in ((place, split, "RGB"), (place / "masks", f"{split}-masks", "P")):
        for name in synth.CLASSES:
            mine = [Path(file).name for file in files if file.startswith(f"{split}/{name}/")]
            compare(above / split / name, mine, index.name, remedy)
        paths, size = listing(root, above, files), (synth.SIZE, synth.SIZE)
        arrays.append(decoded(root, f"synth-objects-{key}", paths, remedy, size, mode=mode))
    targets = np.array([synth.CLASSES.index(Path(file).parent.name) for file in files])
    return _twin(split, arrays[0], targets, arrays[1][:, 0] > 0)


def write_synth(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Render scenes into a new folder: {train,val}/<class>/NNNNN.png, parameters in {train,val}.jsonl.

    masks/{train,val}/<class>/NNNNN.png: a pixel's value is 1 + the index of the part seen there
    (`synth.PARTS`), or 0.
    """
    folder.mkdir(parents=True)
    for split, count in counts.items():
        for above in (folder, folder / "masks"):
            for name in synth.CLASSES:
                (above / split / name).mkdir(parents=True)
        lines = []
        scenes = synth.scenes(count, split, seed)
        for number, scene in enumerate(tqdm(scenes, f"synth-objects {split}", unit="image", leave=False)):
            image, parts = synth.draw(scene)
            file = f"{split}/{scene['class']}/{number:05d}.png"
            Image.fromarray(image).save(folder / file)
            Image.fromarray(parts).save(folder / "masks" / file)
            lines.append(json.dumps({"file": file, "seed": seed, **scene}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
