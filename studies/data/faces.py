"""CelebA with its forty attributes and five landmarks, its procedural twin in the same files, and CelebAMask-HQ's masks."""

from __future__ import annotations

import colorsys
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from studies.data.cache import (
    SHOWN,
    Listing,
    Size,
    cached,
    cores,
    decode,
    decoded,
    digest,
    fit,
    frame,
    planes,
    spelled,
)
from studies.data.imageset import ImageSet, Indices, rows_of
from studies.data.objects import FACES, data_root, find
from studies.twins import faces as synth

SPLITS = {
    "train": 0,
    "val": 1,
    "test": 2,
    "spurious": 3,
}  # their numbers in the list; only the twin has the last
SIZE = (88, 72)  # 178x218 in its own proportions, at two fifths
IMAGES = "img_align_celeba"
ATTRIBUTE_LIST = "list_attr_celeba.txt"
PARTITION_LIST = "list_eval_partition.txt"
LANDMARK_LIST = "list_landmarks_align_celeba.txt"
IDENTITY_LIST = "identity_CelebA.txt"
BOX_LIST = "list_bbox_celeba.txt"  # of the images before they were aligned: torchvision reads it, we do not
NEEDED = (ATTRIBUTE_LIST, PARTITION_LIST, LANDMARK_LIST)
POINTS = tuple(
    f"{point}_{axis}" for point in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy"
)
ADDRESS = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


@dataclass(eq=False, repr=False)
class FaceSet(ImageSet):
    """One split of CelebA or of its twin: targets (N, 40) are its attributes, and `classes` their names.

    parts uint8 (N, H, W): 1 + the index in part_names of the part that a pixel shows, 0 for none of them; landmarks
    float32 (N, 5, 2): x, y of the left eye, right eye, nose, left and right corner of the mouth ("left" in the image),
    in pixels, (0, 0) being the centre of the first; identities int64 (N,): who it is; files: the names of the images;
    params: how the twin drew each face, for `studies.twins.faces.render`.
    """

    parts: Tensor | None = None
    part_names: tuple[str, ...] = ()
    landmarks: Tensor | None = None
    identities: Tensor | None = None
    files: list[str] = field(kw_only=True)
    params: list[synth.Params] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        count, _, *space = self.images.shape
        self._expect(parts=(torch.uint8, (count, *space)), landmarks=(torch.float32, (count, 5, 2)))
        self._expect(identities=(torch.int64, (count,)))
        for name in ("files", "params"):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(f"{self.name}: {count} images, but {len(values)} {name}")

    @property
    def annotation(self) -> str:
        return "label maps" if self.parts is not None else "landmarks" if self.landmarks is not None else ""

    def _chosen(self, rows: Tensor | slice) -> dict[str, Any]:
        places = torch.arange(len(self))[rows].tolist()
        params = None if self.params is None else [self.params[place] for place in places]
        return super()._chosen(rows) | {"files": [self.files[place] for place in places], "params": params}

    def augmented(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mirrored at random, and not shifted: the faces are aligned, and what is small is learned by its place."""
        images = self.images[rows]
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)

    def region(self, attribute: str, indices: Indices) -> Tensor:
        """Where an attribute is to be seen, bool (B, H, W).

        It is the visible pixels of the attribute's parts (`studies.twins.faces.REGIONS`) where the label maps tell these
        parts apart: nothing in an image that has none of them. Elsewhere it is `landmark_region`. Raises ValueError for an
        attribute of the whole face, and without label maps and landmarks.
        """
        _localised(attribute)
        rows = rows_of(indices)
        labels = [
            1 + self.part_names.index(part) for part in synth.REGIONS[attribute] if part in self.part_names
        ]
        if self.parts is not None and labels:
            return torch.isin(self.parts[rows], torch.tensor(labels, dtype=torch.uint8))
        if self.landmarks is None:
            raise ValueError(
                f"{self.name} has neither label maps nor landmarks: the region of {attribute} is unknown"
            )
        return landmark_region(
            attribute, self.landmarks[rows], (self.images.shape[-2], self.images.shape[-1])
        )


def load_faces(
    name: str,
    split: str = "train",
    *,
    root: str | Path | None = None,
    size: Size = SIZE,
    limit: int | None = None,
    seed: int = 0,
    masks: bool = True,
) -> FaceSet:
    """One split of "celeba" or of its twin "synth-faces", fully checked.

    split: "train", "val" or "test"; the twin also has "spurious". root: the folder that holds the data sets (else SELIB_DATA,
    else `data`). size: height and width to bring the 218x178 images to; where its proportions are others, the central part
    of the image is kept. limit: read only that many images, chosen by the seed; of the twin the first ones. masks: the
    twin's label maps too (for CelebA see `with_masks`). A twin that is not on disk is rendered, from the seed. Images are
    decoded or rendered once, into `<root>/.cache`.

    Raises FileNotFoundError when the data or a part of it is missing, ValueError when it is damaged or an argument is out
    of range.
    """
    if name not in FACES:
        raise ValueError(f"unknown set of faces {name!r}; known are {', '.join(FACES)}")
    known = [known for known in SPLITS if name == "synth-faces" or known != "spurious"]
    if split not in known:
        raise ValueError(f"split must be one of {', '.join(known)} for {name}, not {split!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    if min(size) < 1:
        raise ValueError(f"size must be height and width, each at least 1, not {size}")
    base = data_root(root)
    place = find(name, base)
    if place is not None:
        return _load(name, place, base, split, size, limit, seed, masks)
    if name == "synth-faces":
        return _render(base, split, size, limit or synth.COUNTS[split], seed, masks)
    raise FileNotFoundError(
        f"celeba: not found in {base}; run `selib data get celeba`, or put torchvision's folder celeba in {base}, or point "
        "SELIB_DATA to where it is"
    )


def _resized(landmarks: np.ndarray, size: Size, *, back: bool = False) -> np.ndarray:
    """Points (..., 2) of the 218x178 image in pixels of the one that `fit` makes of it; back: the other way."""
    left, top, right, bottom = frame(synth.SIZE, size)
    corner, scale = np.array([left, top]), np.array([size[1] / (right - left), size[0] / (bottom - top)])
    if back:
        return (landmarks + 0.5) / scale + corner - 0.5
    return (landmarks + 0.5 - corner) * scale - 0.5


# --- CelebA's lists ---------------------------------------------------------------------------------------------------


class _Lists(NamedTuple):
    files: list[str]
    partition: np.ndarray  # int64 (N,)
    attributes: np.ndarray  # int64 (N, 40) of -1 and 1
    landmarks: np.ndarray  # int64 (N, 10)
    identities: np.ndarray | None  # int64 (N,)


class _List:
    """One of CelebA's lists: image names and int64 values (N, K); with titles, a line with the count and one with them.

    Raises ValueError, naming file and line, for whatever else it holds.
    """

    def __init__(self, file: Path, columns: int, remedy: str, titles: Sequence[str] | None = None) -> None:
        self.file, self.remedy = file, remedy
        self.titles = titles or ("its value",)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; {remedy}")
        lines = file.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        self.first = 1 if titles is None else 3  # number of the first row's line
        if titles is not None:
            self._head(lines, titles)
        rows = lines[self.first - 1 :]
        if not rows:
            self.refuse(0, "holds no images")
        split = [(*line.split(None, 1), "", "")[:2] for line in rows]
        self.names = [name for name, _ in split]
        try:  # 8 million numbers in a third of a second
            self.values = np.loadtxt([rest for _, rest in split], np.int64, comments=None, ndmin=2)
        except ValueError:
            self.values = np.empty((0, 0), np.int64)
        if self.values.shape != (len(rows), columns):
            bad = next((row for row, line in enumerate(rows) if not _whole(line.split()[1:], columns)), 0)
            found = rows[bad] if len(rows[bad]) <= 80 else rows[bad][:80] + "..."
            self.refuse(bad, f"expected an image and {columns} whole numbers, found {found!r}")
        if titles is not None and int(lines[0]) != len(rows):
            self.refuse(1 - self.first, f"says {int(lines[0])} rows, and {len(rows)} follow")

    def _head(self, lines: list[str], titles: Sequence[str]) -> None:
        count = lines[0].strip() if lines else ""
        if not count.isdecimal():
            self.refuse(1 - self.first, f"expected the number of rows, found {count[:80]!r}")
        found = lines[1].split() if len(lines) > 1 else []
        for place, (mine, wanted) in enumerate(zip_longest(found, titles, fillvalue="nothing"), 1):
            if mine != wanted:
                self.refuse(2 - self.first, f"column {place} is {mine}, where CelebA has {wanted}")

    def allow(self, *legal: int) -> None:
        """ValueError for the first value that is none of these."""
        if len(bad := np.argwhere(~np.isin(self.values, legal))):
            row, column = bad[0]
            told = f"{self.values[row, column]} for {self.titles[column]}, not {' or '.join(map(str, legal))}"
            self.refuse(int(row), f"{self.names[row]} has {told} ({len(bad)} such values)")

    def follow(self, other: _List) -> None:
        """ValueError unless it names the same images in the same order as the other list."""
        if self.names == other.names:
            return
        for row, (mine, its) in enumerate(zip_longest(self.names, other.names, fillvalue="nothing")):
            if mine != its:
                self.refuse(
                    row, f"names {mine}, where {other.file.name} names {its} (line {other.first + row})"
                )

    def refuse(self, row: int, why: str) -> None:
        raise ValueError(f"{self.file}:{self.first + row}: {why}; {self.remedy}")


def _whole(words: list[str], count: int) -> bool:
    """Whether these are `count` whole numbers."""
    return len(words) == count and all(
        word.removeprefix("-").isdecimal() and len(word) < 19 for word in words
    )


def _read_lists(folder: Path, remedy: str, partitions: int) -> _Lists:
    """All lists of a folder, each checked and all of them compared; the partition list says which images there are."""
    if not (folder / IMAGES).is_dir():
        archive = (
            ": unpack the archive that lies beside it"
            if (folder / f"{IMAGES}.zip").is_file()
            else f"; {remedy}"
        )
        raise FileNotFoundError(f"{folder / IMAGES}: no such folder{archive}")
    partition = _List(folder / PARTITION_LIST, 1, remedy)
    partition.allow(*range(partitions))
    if twice := [name for name, count in Counter(partition.names).items() if count > 1]:
        second = partition.names.index(twice[0], 1 + partition.names.index(twice[0]))
        partition.refuse(second, f"names {twice[0]} for the second time ({len(twice)} such images)")
    attributes = _List(folder / ATTRIBUTE_LIST, len(synth.ATTRIBUTES), remedy, synth.ATTRIBUTES)
    attributes.allow(-1, 1)
    landmarks = _List(folder / LANDMARK_LIST, len(POINTS), remedy, POINTS)
    others = [attributes, landmarks]
    if (folder / IDENTITY_LIST).is_file():
        others.append(_List(folder / IDENTITY_LIST, 1, remedy))
    for other in others:
        other.follow(partition)
    identities = others[2].values[:, 0] if len(others) > 2 else None
    return _Lists(partition.names, partition.values[:, 0], attributes.values, landmarks.values, identities)


def _present(folder: Path, files: Sequence[str], named_by: str, remedy: str) -> None:
    """FileNotFoundError for images that are named and not there, ValueError for those that are there and not named."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {remedy}")
    there = {file for file in os.listdir(folder) if not file.startswith(".")}
    if absent := [file for file in files if file not in there]:
        first = ", ".join(absent[:SHOWN]) + (", ..." if len(absent) > SHOWN else "")
        raise FileNotFoundError(
            f"{folder}: {len(absent)} of the {len(files)} files that {named_by} names are missing: {first}; {remedy}"
        )
    if unnamed := sorted(there - set(files)):
        first = ", ".join(unnamed[:SHOWN]) + (", ..." if len(unnamed) > SHOWN else "")
        raise ValueError(f"{folder}: {named_by} does not name {len(unnamed)} of the files: {first}; {remedy}")


def _listing(folder: Path, files: Sequence[str], root: Path) -> Listing:
    above, below = f"{folder}{os.sep}", folder.relative_to(root).as_posix()
    states = [os.stat(above + file) for file in files]
    return [
        (f"{below}/{file}", state.st_size, state.st_mtime_ns)
        for file, state in zip(files, states, strict=True)
    ]


def _load(
    name: str, place: Path, root: Path, split: str, size: Size, limit: int | None, seed: int, masks: bool
) -> FaceSet:
    twin = name == "synth-faces"
    folder = place / "celeba" if twin else place
    remedy = (
        f"delete {place} and run `selib data make synth-faces`"
        if twin
        else "put the official one in its place"
    )
    lists = _read_lists(folder, remedy, len(SPLITS) if twin else len(SPLITS) - 1)
    _present(folder / IMAGES, lists.files, PARTITION_LIST, remedy)
    rows = np.flatnonzero(lists.partition == SPLITS[split])
    if not len(rows):
        raise ValueError(
            f"{folder / PARTITION_LIST}: no image is in split {split} ({SPLITS[split]}); {remedy}"
        )
    key = f"{name}-{split}"
    if limit is not None and limit < len(rows):
        rows = rows[:limit] if twin else np.sort(np.random.default_rng(seed).permutation(rows)[:limit])
        key += f"-{limit}" if twin else f"-{limit}-seed{seed}"
    files = [lists.files[row] for row in rows]
    listing = _listing(folder / IMAGES, files, root)
    images = decoded(root, key, listing, native=synth.SIZE, size=size, remedy=remedy)
    faces = FaceSet(
        name,
        split,
        torch.from_numpy(images),
        torch.from_numpy((lists.attributes[rows] + 1) // 2),
        list(synth.ATTRIBUTES),
        synthetic=twin,
        landmarks=torch.from_numpy(_resized(lists.landmarks[rows].reshape(-1, 5, 2), size)).float(),
        identities=None if lists.identities is None else torch.from_numpy(lists.identities[rows]),
        files=files,
    )
    if not twin:
        return faces
    params = _params(place / "params.jsonl", lists.files, remedy)
    faces = replace(faces, params=[params[row] for row in rows])
    if not masks:
        return faces
    _present(place / "masks", [_mask_name(file) for file in lists.files], PARTITION_LIST, remedy)
    listing = _listing(place / "masks", [_mask_name(file) for file in files], root)
    parts = decoded(root, f"{key}-masks", listing, native=synth.SIZE, size=size, remedy=remedy, mode="P")
    return replace(faces, parts=torch.from_numpy(parts[:, 0]), part_names=synth.PARTS)


# --- the twin ---------------------------------------------------------------------------------------------------------


def _mask_name(file: str) -> str:
    return f"{Path(file).stem}.png"


Drawable = tuple[synth.Params, Sequence[str]]  # a face, and the parts to leave out of it


def rendered(faces: Sequence[Drawable], size: Size) -> np.ndarray:
    """Faces of the twin as `load_faces` holds them, uint8 (N, 4, H, W): red, green, blue and the label map.

    faces: parameters, and what to leave out (`studies.twins.faces.draw`). One process a core draws them.
    """
    return np.concatenate([_stored(drawn, size) for _, drawn in _parallel(faces)])


def _stored(drawn: np.ndarray, size: Size) -> np.ndarray:
    """Drawings (n, 218, 178, 4) brought to size, uint8 (n, 4, H, W), through the JPEG that would lie on disk."""
    out = np.empty((len(drawn), 4, *size), np.uint8)
    for row, one in enumerate(drawn):
        colours = fit(Image.open(_jpeg(one[..., :3])).convert("RGB"), size)
        out[row] = np.concatenate(
            [planes(colours), planes(fit(Image.fromarray(one[..., 3]).convert("P"), size))]
        )
    return out


def _drawn(faces: Sequence[Drawable]) -> np.ndarray:
    """Drawings uint8 (n, 218, 178, 4), a few of them made here: starting a process takes as long as drawing some twenty."""
    return (
        np.stack([np.dstack(synth.draw(*face)) for face in faces])
        if len(faces) <= 32
        else synth.draw_apart(faces)
    )


def _parallel(faces: Sequence[Drawable]) -> Iterator[tuple[int, np.ndarray]]:
    """Drawings part by part, each with the number of its first, by one process a core."""
    size = max(32, min(256, -(-len(faces) // cores())))
    parts = range(0, len(faces), size)
    pool = ThreadPoolExecutor(cores())
    try:
        yield from zip(parts, pool.map(lambda start: _drawn(faces[start : start + size]), parts), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _jpeg(image: np.ndarray) -> io.BytesIO:
    """An image (H, W, 3) as the file that holds it."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95)
    return stream


def _params(file: Path, files: list[str], remedy: str) -> list[synth.Params]:
    """What each line of params.jsonl says of the image that it must name."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; {remedy}")
    found = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, (line, name) in enumerate(zip_longest(lines, files, fillvalue=""), 1):
        try:
            entry = json.loads(line)
            if entry["file"] != name:
                raise ValueError
            found.append(entry["params"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: not how {name or 'an image'} was drawn; {remedy}") from None
    return found


def _render(root: Path, split: str, size: Size, count: int, seed: int, masks: bool) -> FaceSet:
    """The first `count` faces of a split as `write_faces` would write them, and as `_load` would read them back."""
    params = synth.scenes(count, split, seed)
    faces: list[Drawable] = [(one, ()) for one in params]
    # rendered anew when what draws has changed
    source = hashlib.sha256(Path(synth.__file__).read_bytes()).hexdigest()
    version = digest([(f"{source} {cv2.__version__} {PIL.__version__}", count, seed)])
    key = f"synth-faces-{split}-rendered-{count}-seed{seed}-{spelled(size)}"
    shape = (count, 4, *size)

    def produce(start: int, stop: int) -> tuple[np.ndarray, list[str]]:
        return _stored(_drawn(faces[start:stop]), size), []

    drawn = cached(root, key, version, shape, produce, threads=cores(), action="render")
    before = sum(synth.COUNTS[other] for other in list(SPLITS)[: SPLITS[split]])
    landmarks = np.stack([synth.landmarks(one) for one in params])
    return FaceSet(
        "synth-faces",
        split,
        torch.from_numpy(drawn[:, :3]),
        torch.from_numpy(np.stack([synth.attributes(one) for one in params])),
        list(synth.ATTRIBUTES),
        synthetic=True,
        parts=torch.from_numpy(drawn[:, 3]) if masks else None,
        part_names=synth.PARTS if masks else (),
        landmarks=torch.from_numpy(_resized(landmarks, size)).float(),
        identities=before + 1 + torch.arange(count),
        files=[f"{before + number:06d}.jpg" for number in range(1, count + 1)],
        params=params,
    )


def write_faces(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Render faces into <folder>/celeba, in CelebA's own files, their label maps into masks/ and params.jsonl beside it.

    masks/NNNNNN.png: a pixel's value is 1 + the index of the part seen there (`synth.PARTS`), or 0 off the person. Each
    face is a person of its own, and the box in list_bbox_celeba.txt the whole image.
    """
    images, masks = folder / "celeba" / IMAGES, folder / "masks"
    for part in (images, masks):
        part.mkdir(parents=True)
    faces = [(split, one) for split, count in counts.items() for one in synth.scenes(count, split, seed)]
    names = [f"{number:06d}.jpg" for number in range(1, len(faces) + 1)]

    with tqdm(total=len(faces), desc="synth-faces", unit="image", leave=False) as bar:
        for start, drawn in _parallel([(one, ()) for _, one in faces]):
            for name, one in zip(names[start : start + len(drawn)], drawn, strict=True):
                (images / name).write_bytes(_jpeg(one[..., :3]).getvalue())
                mask = Image.fromarray(one[..., 3]).convert("P")
                mask.putpalette(_palette(len(synth.PARTS)))
                mask.save(masks / _mask_name(name))
            bar.update(len(drawn))

    height, width = synth.SIZE
    rows: dict[str, Callable[[int], str]] = {
        PARTITION_LIST: lambda n: f" {SPLITS[faces[n][0]]}",
        ATTRIBUTE_LIST: lambda n: "".join(
            f" {2 * value - 1:2d}" for value in synth.attributes(faces[n][1]).tolist()
        ),
        LANDMARK_LIST: lambda n: (
            " " + " ".join(f"{v:4d}" for v in synth.landmarks(faces[n][1]).ravel().tolist()).lstrip()
        ),
        IDENTITY_LIST: lambda n: f" {n + 1}",
        BOX_LIST: lambda n: f" 0 0 {width} {height}",
    }
    heads = {
        ATTRIBUTE_LIST: " ".join(synth.ATTRIBUTES) + " ",  # the official header ends in a blank
        LANDMARK_LIST: " ".join(POINTS),
        BOX_LIST: "image_id x_1 y_1 width height",
    }
    for file, row in rows.items():
        head = [str(len(faces)), heads[file]] if file in heads else []
        _write_lines(
            folder / "celeba" / file, [*head, *(name + row(number) for number, name in enumerate(names))]
        )
    lines = [
        json.dumps({"file": name, "split": split, "params": one})
        for name, (split, one) in zip(names, faces, strict=True)
    ]
    _write_lines(folder / "params.jsonl", lines)


def _write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _palette(count: int) -> list[int]:
    """Black, then `count` colours that tell neighbours apart."""
    colours = [colorsys.hsv_to_rgb(0.618 * n % 1, 0.6, 0.6 + 0.4 * (n % 2)) for n in range(count)]
    return [0, 0, 0, *(round(255 * channel) for colour in colours for channel in colour)]


# --- regions from landmarks -------------------------------------------------------------------------------------------

# Places on both halves of a face: from, to, top, bottom. Across, 1 is the distance of the eyes, counted from the middle
# between them to either side; down, 1 is the way from that middle to the middle of the mouth. The edges were set by hand
# round the parts of rendered faces, with a margin; tests/test_celeba.py measures how much of each part they hold.
PLACES: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "eyes": ((0.15, 0.85, -0.3, 0.2),),
    "under the eyes": ((0.2, 0.8, 0.12, 0.45),),
    "brows": ((0.1, 0.95, -0.7, -0.25),),
    "glasses": ((0.0, 1.15, -0.35, 0.4),),
    "nose": ((0.0, 0.42, -0.1, 0.85),),
    "mouth": ((0.0, 0.58, 0.82, 1.55),),
    "upper lip": ((0.0, 0.55, 0.65, 1.05),),
    "chin": ((0.0, 0.6, 1.2, 2.1),),
    "jaw": ((0.0, 1.15, 0.65, 1.9),),
    "cheeks": ((0.45, 1.05, 0.3, 0.9),),
    "sides of the face": ((0.6, 1.25, -0.35, 1.6),),
    "forehead": ((0.0, 0.95, -1.45, -0.45),),
    "top of the head": ((0.0, 1.2, -2.05, -0.5),),
    "fringe": ((0.0, 1.0, -1.65, -0.5),),
    "hair": ((0.0, 1.65, -2.15, -1.0), (1.0, 1.65, -1.0, 2.0)),
    "hat": ((0.0, 1.6, -2.7, -0.6),),
    "earlobes": ((0.95, 1.55, 0.45, 1.2),),
    "neck": ((0.0, 0.9, 1.85, 2.95),),
    "collar": ((0.0, 0.55, 2.05, 3.2),),
}
WHERE = {
    "5_o_Clock_Shadow": "jaw",
    "Arched_Eyebrows": "brows",
    "Bags_Under_Eyes": "under the eyes",
    "Bald": "top of the head",
    "Bangs": "fringe",
    "Big_Lips": "mouth",
    "Big_Nose": "nose",
    "Black_Hair": "hair",
    "Blond_Hair": "hair",
    "Brown_Hair": "hair",
    "Bushy_Eyebrows": "brows",
    "Double_Chin": "chin",
    "Eyeglasses": "glasses",
    "Goatee": "chin",
    "Gray_Hair": "hair",
    "High_Cheekbones": "cheeks",
    "Mouth_Slightly_Open": "mouth",
    "Mustache": "upper lip",
    "Narrow_Eyes": "eyes",
    "Pointy_Nose": "nose",
    "Receding_Hairline": "forehead",
    "Rosy_Cheeks": "cheeks",
    "Sideburns": "sides of the face",
    "Smiling": "mouth",
    "Straight_Hair": "hair",
    "Wavy_Hair": "hair",
    "Wearing_Earrings": "earlobes",
    "Wearing_Hat": "hat",
    "Wearing_Lipstick": "mouth",
    "Wearing_Necklace": "neck",
    "Wearing_Necktie": "collar",
}


def landmark_region(attribute: str, landmarks: Tensor, size: Size) -> Tensor:
    """Where an attribute is looked for, given the five landmarks alone: bool (B, H, W).

    landmarks float (B, 5, 2) as in `FaceSet`; size: H, W. The region is one or two boxes of `PLACES`, turned, scaled and
    sheared with the face: a pixel belongs to it when its centre does. It says where the part would be, not that it is
    there. Raises ValueError for an attribute of the whole face.
    """
    _localised(attribute)
    points = landmarks.double()
    middle = (points[:, 0] + points[:, 1]) / 2
    across, down = points[:, 1] - points[:, 0], (points[:, 3] + points[:, 4]) / 2 - middle
    ys, xs = torch.meshgrid(torch.arange(size[0]).double(), torch.arange(size[1]).double(), indexing="ij")
    x, y = xs - middle[:, 0, None, None], ys - middle[:, 1, None, None]
    # (x, y) = a * across + b * down, solved by Cramer's rule
    (ax, ay), (dx, dy) = (axis[:, :, None, None].unbind(1) for axis in (across, down))
    area = ax * dy - ay * dx
    a, b = ((x * dy - y * dx) / area).abs(), (ax * y - ay * x) / area
    region = torch.zeros(a.shape, dtype=torch.bool)
    for start, stop, top, bottom in PLACES[WHERE[attribute]]:
        region |= (a >= start) & (a <= stop) & (b >= top) & (b <= bottom)
    return region


def _localised(attribute: str) -> None:
    if attribute not in synth.ATTRIBUTES:
        raise ValueError(f"CelebA has no attribute {attribute!r}; it has {', '.join(synth.ATTRIBUTES)}")
    if attribute not in synth.REGIONS:
        raise ValueError(
            f"{attribute} belongs to the whole face, not to a region; these have one: {', '.join(synth.REGIONS)}"
        )


# --- CelebAMask-HQ ----------------------------------------------------------------------------------------------------

HQ_FOLDER, HQ_SIDE = "CelebAMask-HQ", 512
HQ_ADDRESS = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA/CelebAMask_HQ.html"
HQ_TITLES = ("idx", "orig_idx", "orig_file")
# its parts, in the order in which they are laid over each other, and what the twin calls them
HQ_PARTS = {
    "skin": "skin",
    "l_ear": "ears",
    "r_ear": "ears",
    "neck": "neck",
    "cloth": "cloth",
    "neck_l": "necklace",
    "nose": "nose",
    "mouth": "mouth",
    "u_lip": "mouth",
    "l_lip": "mouth",
    "l_eye": "eyes",
    "r_eye": "eyes",
    "l_brow": "brows",
    "r_brow": "brows",
    "hair": "hair",
    "ear_r": "earrings",
    "eye_g": "glasses",
    "hat": "hat",
}
HQ_NAMES = tuple(part for part in synth.PARTS if part in HQ_PARTS.values())
HQ_EYES, HQ_MOUTH = ("l_eye", "r_eye"), ("mouth", "u_lip", "l_lip")


def with_masks(faces: FaceSet, root: str | Path | None = None) -> FaceSet:
    """Those faces of CelebA that CelebAMask-HQ has masks for, with their label maps.

    The masks were drawn on crops framed otherwise; each is brought to its image by the similarity that takes both eyes and
    the middle of the mouth's ends in the masks to the landmarks, so faces whose masks lack an eye or the mouth are left
    out. `part_names` are the parts that the masks tell apart: `FaceSet.region` takes other attributes from the landmarks.
    What the crop does not show counts as background.

    Raises FileNotFoundError when CelebAMask-HQ is not in root, ValueError when it is damaged or has none of the faces.
    """
    if faces.name != "celeba" or faces.landmarks is None:
        raise ValueError(f"CelebAMask-HQ has masks for celeba with its landmarks, not for {faces.name}")
    base = data_root(root)
    place = base / HQ_FOLDER
    numbers = _hq_numbers(place / "CelebA-HQ-to-CelebA-mapping.txt")
    wanted = {numbers[file]: row for row, file in enumerate(faces.files) if file in numbers}
    found = _hq_files(place / "CelebAMask-HQ-mask-anno", base, set(wanted))
    complete = {
        number: masks
        for number, masks in found.items()
        if masks.keys() >= set(HQ_EYES) and masks.keys() & set(HQ_MOUTH)
    }
    if not complete:
        raise ValueError(
            f"{place}: has masks with both eyes and a mouth for none of the {len(faces)} images of {faces.split}"
        )
    order = sorted(complete, key=wanted.__getitem__)
    chosen = faces.subset([wanted[number] for number in order])
    assert chosen.landmarks is not None
    size = (faces.images.shape[-2], faces.images.shape[-1])
    points = _resized(chosen.landmarks.double().numpy(), size, back=True)

    def produce(start: int, stop: int) -> tuple[np.ndarray, list[str]]:
        out, bad = np.zeros((stop - start, 1, *size), np.uint8), []
        for row in range(start, stop):
            files = {part: path for part, (path, _, _) in complete[order[row]].items()}
            try:
                out[row - start] = planes(fit(_hq_label_map(base, files, points[row]), size))
            except ValueError as error:
                bad.append(str(error))
        return out, bad

    listing = [masks[part] for number in order for masks in [complete[number]] for part in sorted(masks)]
    version = digest([*listing, (hashlib.sha256(points.round(3).tobytes()).hexdigest(), 0, 0)])
    key = f"celebamask-{faces.split}-{len(order)}-{spelled(size)}"
    remedy = f"unpack {HQ_FOLDER} again"
    parts = cached(base, key, version, (len(order), 1, *size), produce, remedy, threads=cores())
    return replace(chosen, parts=torch.from_numpy(parts[:, 0]), part_names=HQ_NAMES)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift (2, 3) that take points (K, 2) closest to others, in the sense of least squares.

    No reflection. In the plane Umeyama's solution (1991) is a line fitted in complex numbers: w = m z + c.
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    from_middle = z - z.mean()
    m = (from_middle.conj() * (w - w.mean())).sum() / (abs(from_middle) ** 2).sum()
    c = w.mean() - m * z.mean()
    return np.array([[m.real, -m.imag, c.real], [m.imag, m.real, c.imag]])


def _hq_numbers(file: Path) -> dict[str, int]:
    """CelebAMask-HQ's number of every image of CelebA that it has; columns after the first three are not read."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; put the folder {HQ_FOLDER} there, from {HQ_ADDRESS}")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    if tuple((lines or [""])[0].split()[:3]) != HQ_TITLES:
        raise ValueError(
            f"{file}:1: expected the columns {' '.join(HQ_TITLES)}, found {(lines or [''])[0][:80]!r}"
        )
    numbers: dict[str, int] = {}
    for line_number, line in enumerate(lines[1:], 2):
        if line.strip():
            try:
                number, _, image, *_ = line.split()
                numbers[image] = int(number)
            except ValueError:
                raise ValueError(
                    f"{file}:{line_number}: expected `{' '.join(HQ_TITLES)}`, found {line[:80]!r}"
                ) from None
    return numbers


def _hq_files(folder: Path, root: Path, wanted: set[int]) -> dict[int, dict[str, tuple[str, int, int]]]:
    """The mask of every part of the wanted images, as <folder>/*/NNNNN_<part>.png holds them."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; put the folder {HQ_FOLDER} there, from {HQ_ADDRESS}"
        )
    found: dict[int, dict[str, tuple[str, int, int]]] = {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        for entry in os.scandir(inner):
            number, _, part = entry.name.removesuffix(".png").partition("_")
            if part in HQ_PARTS and number.isdecimal() and int(number) in wanted:
                state = entry.stat()
                path = Path(entry.path).relative_to(root).as_posix()
                found.setdefault(int(number), {})[part] = (path, state.st_size, state.st_mtime_ns)
    return found


def _hq_label_map(root: Path, files: dict[str, str], landmarks: np.ndarray) -> Image.Image:
    """Masks of one face laid over each other and brought to its 218x178 image, indexed; ValueError names a bad file."""
    masks = {}
    for part, path in files.items():
        try:
            masks[part] = decode(root / path, HQ_SIDE, None, "L")[0] > 127
            if not masks[part].any():
                raise ValueError("empty mask")
        except ValueError as error:
            raise ValueError(f"{path} ({error})") from None
    labels = np.zeros((HQ_SIDE, HQ_SIDE), np.uint8)
    for part, name in HQ_PARTS.items():
        if part in masks:
            labels[masks[part]] = 1 + HQ_NAMES.index(name)
    eyes = sorted(_middle(masks[part]) for part in HQ_EYES)  # by x: whose left is meant does not matter
    mouth = _ends(np.logical_or.reduce([masks[part] for part in HQ_MOUTH if part in masks]))
    source = np.array([*eyes, mouth])
    target = np.array([*landmarks[:2], landmarks[3:].mean(0)]) + 0.5
    onto = np.vstack([similarity(source, target), [0, 0, 1]])
    back = np.linalg.inv(onto)[:2].ravel().tolist()  # Pillow asks where a pixel comes from
    whole = Image.fromarray(labels).convert("P")
    return whole.transform(synth.SIZE[::-1], Image.Transform.AFFINE, back, Image.Resampling.NEAREST)


def _middle(mask: np.ndarray) -> tuple[float, float]:
    """The centroid, as x, y."""
    ys, xs = np.nonzero(mask)
    return float(xs.mean()) + 0.5, float(ys.mean()) + 0.5


def _ends(mask: np.ndarray) -> tuple[float, float]:
    """Halfway between the leftmost and the rightmost pixels: an open or smiling mouth does not move it as it does the centroid."""
    ys, xs = np.nonzero(mask)
    left, right = ys[xs == xs.min()].mean(), ys[xs == xs.max()].mean()
    return float(xs.min() + xs.max() + 1) / 2, float(left + right + 1) / 2
