"""CelebA with its forty attributes and five landmarks, and its rendered twin in the same files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from studies.data.cache import Size, cached, cores, decoded, digest, fit, frame
from studies.data.imageset import ImageSet, Indices, rows_of
from studies.data.lists import compare, follow, listing, read_scenes, read_table
from studies.data.objects import FACES, data_root, find
from studies.data.regions import check_localised, landmark_region
from studies.twins import faces as synth
from studies.twins.apart import in_parts, version

SPLITS = {"train": 0, "val": 1, "test": 2, "spurious": 3}  # numbers in the list; only the twin has the last
SIZE = (88, 72)  # 178x218 in its own proportions, at two fifths
IMAGES = "img_align_celeba"
ATTRIBUTE_LIST = "list_attr_celeba.txt"
PARTITION_LIST = "list_eval_partition.txt"
LANDMARK_LIST = "list_landmarks_align_celeba.txt"
IDENTITY_LIST = "identity_CelebA.txt"
BOX_LIST = "list_bbox_celeba.txt"  # of the images before they were aligned: torchvision reads it, we do not
NEEDED = (IMAGES, ATTRIBUTE_LIST)
POINTS = tuple(
    f"{point}_{axis}" for point in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy"
)
# Of an aligned image: eyes, nose, corners of the mouth; where a face's own points are not known.
TEMPLATE = ((69.0, 111.0), (108.0, 111.0), (88.0, 135.0), (71.0, 152.0), (106.0, 152.0))
SHARES = (0.7, 0.1, 0.2)  # of the people in train, val and test, where no list says it
ADDRESS = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


@dataclass(eq=False, repr=False)
class FaceSet(ImageSet):
    """One split of CelebA or of its twin: targets (N, 40) are its attributes, and `classes` their names.

    parts uint8 (N, H, W): 1 + the index in part_names of the part that a pixel shows, 0 for none of them;
    landmarks float32 (N, 5, 2): x, y of the left eye, right eye, nose, left and right corner of the mouth
    ("left" in the image), in pixels, (0, 0) being the centre of the first; template: they are the
    alignment's, the same for every face; identities int64 (N,): who it
    is; files: the names of the images; params: how the twin drew each face, for
    `studies.twins.faces.render`.
    """

    parts: Tensor | None = None
    part_names: tuple[str, ...] = ()
    landmarks: Tensor | None = None
    identities: Tensor | None = None
    files: list[str] = field(kw_only=True)
    params: list[synth.Params] | None = None
    template: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect("parts", torch.uint8, len(self), *self.size)
        self._expect("landmarks", torch.float32, len(self), 5, 2)
        self._expect("identities", torch.int64, len(self))
        for name in ("files", "params"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self):
                raise ValueError(f"{self.name}: {len(self)} images, but {len(values)} {name}")

    @property
    def annotation(self) -> str:
        if self.parts is not None:
            return "label maps"
        return "the alignment" if self.template else "landmarks" if self.landmarks is not None else ""

    def _chosen(self, rows: Tensor | slice) -> dict[str, Any]:
        places = torch.arange(len(self))[rows].tolist()
        params = None if self.params is None else [self.params[place] for place in places]
        return super()._chosen(rows) | {"files": [self.files[place] for place in places], "params": params}

    def augmented(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Mirrored at random, not shifted: faces are aligned, and small parts are learned by their place."""
        images = self.images[rows]
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)

    def region(self, attribute: str, indices: Indices) -> Tensor:
        """Where an attribute is to be seen, bool (B, H, W).

        The visible pixels of the attribute's parts (`studies.twins.faces.REGIONS`) where the label maps
        tell these parts apart: nothing in an image that has none of them. Elsewhere `landmark_region`.
        Raises ValueError for an attribute of the whole face, and without label maps and landmarks.
        """
        check_localised(attribute)
        rows = rows_of(indices)
        known = [part for part in synth.REGIONS[attribute] if part in self.part_names]
        if self.parts is not None and known:
            labels = [1 + self.part_names.index(part) for part in known]
            return torch.isin(self.parts[rows], torch.tensor(labels, dtype=torch.uint8))
        if self.landmarks is None:
            what = f"the region of {attribute} is unknown"
            raise ValueError(f"{self.name} has neither label maps nor landmarks: {what}")
        return landmark_region(attribute, self.landmarks[rows], self.size)


def load_faces(
    name: str,
    split: str = "train",
    *,
    root: str | Path | None = None,
    size: Size = SIZE,
    limit: int | None = None,
    seed: int = 0,
) -> FaceSet:
    """One split of "celeba" or of its twin "synth-faces", fully checked.

    split: "train", "val" or "test"; the twin also has "spurious". root: the folder that holds the data sets
    (else SELIB_DATA, else `data`). size: height and width to bring the images to; where its proportions are
    others than CelebA's, the central part is kept. CelebA's files may have any size, all the same one, in
    these proportions; landmarks, identities and the partition may be missing. limit: read only that many
    images, chosen by the seed; of the twin the first ones. A twin that is not on disk is rendered, from the
    seed. Images are decoded or rendered once, into `<root>/.cache`.

    Raises FileNotFoundError when the data or a part of it is missing, ValueError when it is damaged or an
    argument is out of range.
    """
    known = list(SPLITS) if name == "synth-faces" else ["train", "val", "test"]
    if name not in FACES:
        raise ValueError(f"unknown set of faces {name!r}; known are {', '.join(FACES)}")
    if split not in known:
        raise ValueError(f"split must be one of {', '.join(known)} for {name}, not {split!r}")
    if min(*size, limit or 1) < 1 or limit == 0:
        raise ValueError(f"size (height, width) and limit must be at least 1, not {size} and {limit}")
    base = data_root(root)
    place = find(name, base)
    if place is not None:
        return _load(name, place, base, split, size, limit, seed)
    if name == "synth-faces":
        return _render(base, split, size, limit or synth.COUNTS[split], seed)
    remedy = "run `studies data get celeba`, or put torchvision's folder celeba there"
    raise FileNotFoundError(f"celeba: not found in {base}; {remedy}, or point SELIB_DATA to where it is")


def resized(landmarks: np.ndarray, size: Size, *, back: bool = False) -> np.ndarray:
    """Points (..., 2) of the 218x178 image, in pixels of what `fit` makes of it; back: the reverse."""
    left, top, right, bottom = frame(synth.SIZE, size)
    corner, scale = np.array([left, top]), np.array([size[1] / (right - left), size[0] / (bottom - top)])
    if back:
        return (landmarks + 0.5) / scale + corner - 0.5
    return (landmarks + 0.5 - corner) * scale - 0.5


def _load(
    name: str, place: Path, root: Path, split: str, size: Size, limit: int | None, seed: int
) -> FaceSet:
    """All lists are checked whole. The attribute list says which images there are, and the partition list
    where they belong; where there is none, people are dealt out. Landmarks and identities may be missing.
    """
    twin = name == "synth-faces"
    folder = place / "celeba" if twin else place
    remedy = "put the official one there; `studies data get celeba` fetches and unpacks what is missing"
    if twin:
        remedy = f"delete {place} and run `studies data make synth-faces`"
    file = folder / ATTRIBUTE_LIST
    names, _, signs = read_table(file, synth.ATTRIBUTES, remedy, titled=True, legal=(-1, 1))
    compare(folder / IMAGES, names, ATTRIBUTE_LIST, remedy)
    people, partition = _people(folder, names, range(3 + twin), remedy)
    rows = np.flatnonzero(partition == SPLITS[split])
    if not len(rows):
        raise ValueError(f"{folder / PARTITION_LIST}: no image is in {split} ({SPLITS[split]}); {remedy}")
    key = f"{name}-{split}"
    if limit is not None and limit < len(rows):
        rows = rows[:limit] if twin else np.sort(np.random.default_rng(seed).permutation(rows)[:limit])
        key += f"-{limit}" if twin else f"-{limit}-seed{seed}"
    files = [names[row] for row in rows]

    template = not (folder / LANDMARK_LIST).is_file()
    if template:
        points = np.broadcast_to(np.ravel(TEMPLATE), (len(rows), 10))
    else:
        points = read_table(folder / LANDMARK_LIST, POINTS, remedy, titled=True, names=names).values[rows]
    parts = params = None
    native = synth.SIZE if twin else _native(folder / IMAGES / files[0])
    images = decoded(root, key, listing(root, folder / IMAGES, files), remedy, native, size)
    if twin:
        masks = [_mask_name(file) for file in names]
        compare(place / "masks", masks, PARTITION_LIST, remedy)
        paths = listing(root, place / "masks", [masks[row] for row in rows])
        parts = torch.from_numpy(decoded(root, f"{key}-masks", paths, remedy, synth.SIZE, size, "P")[:, 0])
        scenes = read_scenes(place / "params.jsonl", ("file", "params"), remedy)
        follow(place / "params.jsonl", 1, [scene["file"] for scene in scenes], names, remedy, rows=True)
        params = [scenes[row]["params"] for row in rows]
    return FaceSet(
        name,
        split,
        torch.from_numpy(images),
        torch.from_numpy((signs[rows] + 1) // 2),
        list(synth.ATTRIBUTES),
        synthetic=twin,
        parts=parts,
        part_names=synth.PARTS if twin else (),
        landmarks=torch.from_numpy(resized(points.reshape(-1, 5, 2), size)).float(),
        identities=None if people is None else torch.from_numpy(people[rows]),
        files=files,
        params=params,
        template=template,
    )


def _people(
    folder: Path, names: Sequence[str], legal: range, remedy: str
) -> tuple[np.ndarray | None, np.ndarray]:
    """Who is on each image, where that is known, and its split: by the list, else dealt out."""
    people = None
    if (folder / IDENTITY_LIST).is_file():
        people = read_table(folder / IDENTITY_LIST, ["identity"], remedy, names=names).values[:, 0]
    if (folder / PARTITION_LIST).is_file():
        lines = read_table(folder / PARTITION_LIST, ["split"], remedy, legal=legal, names=names)
        return people, lines.values[:, 0]
    return people, dealt(people if people is not None else np.arange(len(names)))


def dealt(people: np.ndarray) -> np.ndarray:
    """A split of images (N,) by who is on them, so that nobody is in two: 0 train, 1 val, 2 test."""
    everybody, who = np.unique(people, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(everybody))
    train, val, _ = (np.cumsum(SHARES) * len(everybody)).round().astype(int)
    return ((order >= train).astype(int) + (order >= val))[who]


def _native(file: Path) -> Size:
    """The size of the first image, which all must have. CelebA's proportions are 178 to 218."""
    try:
        with Image.open(file) as image:
            width, height = image.size
    except OSError:
        return synth.SIZE  # the decoder says what is wrong
    if abs(width / height - synth.SIZE[1] / synth.SIZE[0]) > 0.02:
        return synth.SIZE
    return height, width


Drawable = tuple[synth.Params, Sequence[str]]  # a face, and the parts to leave out of it
ALONE = 32  # so few faces are drawn here: starting a process takes as long as drawing some twenty


def rendered(faces: Sequence[Drawable], size: Size) -> np.ndarray:
    """Faces of the twin as `load_faces` holds them, uint8 (N, 4, H, W): red, green, blue and the label map.

    faces: parameters, and what to leave out (`studies.twins.faces.draw`). One process a core draws them.
    """
    out = np.empty((len(faces), 4, *size), np.uint8)
    for row, drawn in enumerate(_drawings(faces)):
        colours = Image.open(io.BytesIO(_jpeg(drawn))).convert("RGB")  # as it would be read from disk
        labels = Image.fromarray(drawn[..., 3]).convert("P")
        out[row] = np.concatenate([fit(colours, size), fit(labels, size)])
    return out


def _drawings(faces: Sequence[Drawable]) -> Iterator[np.ndarray]:
    """Drawings uint8 (218, 178, 4), colours and label map, by one process a core."""
    together = max(ALONE, min(256, -(-len(faces) // cores())))
    for part in in_parts(_drawn, faces, together, cores()):
        yield from part


def _drawn(faces: Sequence[Drawable]) -> np.ndarray:
    if len(faces) > ALONE:
        return synth.draw_apart(faces)
    return np.stack([np.dstack(synth.draw(*face)) for face in faces])


def _jpeg(drawn: np.ndarray) -> bytes:
    """The file that holds a drawing's colours."""
    stream = io.BytesIO()
    Image.fromarray(drawn[..., :3]).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def _mask_name(file: str) -> str:
    return f"{Path(file).stem}.png"


def _render(root: Path, split: str, size: Size, count: int, seed: int) -> FaceSet:
    """The first `count` faces of a split, as `write_faces` writes them and `_load` reads them back."""
    params = synth.scenes(count, split, seed)
    drawing = digest([(version(), 0, 0), (PIL.__version__, 0, 0)])  # drawn anew when what draws has changed
    key = f"synth-faces-{split}-rendered-{count}-seed{seed}-{size[0]}x{size[1]}"

    def produce(start: int, stop: int) -> tuple[np.ndarray, list[str]]:
        return rendered([(one, ()) for one in params[start:stop]], size), []

    drawn = cached(root, key, drawing, (count, 4, *size), produce, action="render")
    before = sum(synth.COUNTS[other] for other in list(SPLITS)[: SPLITS[split]])
    landmarks = np.stack([synth.landmarks(one) for one in params])
    return FaceSet(
        "synth-faces",
        split,
        torch.from_numpy(drawn[:, :3]),
        torch.from_numpy(np.stack([synth.attributes(one) for one in params])),
        list(synth.ATTRIBUTES),
        synthetic=True,
        parts=torch.from_numpy(drawn[:, 3]),
        part_names=synth.PARTS,
        landmarks=torch.from_numpy(resized(landmarks, size)).float(),
        identities=before + 1 + torch.arange(count),
        files=[f"{before + number:06d}.jpg" for number in range(1, count + 1)],
        params=params,
    )


def write_faces(folder: Path, counts: dict[str, int], seed: int) -> None:
    """Render faces into a new folder: CelebA's own files in celeba/, label maps in masks/, and params.jsonl.

    masks/NNNNNN.png: a pixel's value is 1 + the index of the part seen there (`synth.PARTS`), or 0 off the
    person. Each face is a person of its own, and the box in list_bbox_celeba.txt the whole image.
    """
    celeba, masks = folder / "celeba", folder / "masks"
    folder.mkdir(parents=True)
    (celeba / IMAGES).mkdir(parents=True)
    masks.mkdir()
    faces = [(split, one) for split, count in counts.items() for one in synth.scenes(count, split, seed)]
    names = [f"{number:06d}.jpg" for number in range(1, len(faces) + 1)]
    drawings = _drawings([(one, ()) for _, one in faces])
    for name, drawn in zip(names, tqdm(drawings, "synth-faces", len(faces), leave=False), strict=True):
        (celeba / IMAGES / name).write_bytes(_jpeg(drawn))
        Image.fromarray(drawn[..., 3]).save(masks / _mask_name(name))

    head = [str(len(faces))]
    tables: dict[str, list[str]] = {
        PARTITION_LIST: [],
        ATTRIBUTE_LIST: [*head, " ".join(synth.ATTRIBUTES) + " "],  # the official header ends in a blank
        LANDMARK_LIST: [*head, " ".join(POINTS)],
        IDENTITY_LIST: [],
        BOX_LIST: [*head, "image_id x_1 y_1 width height"],
    }
    scenes = []
    for number, (name, (split, one)) in enumerate(zip(names, faces, strict=True), 1):
        signs = [f"{2 * value - 1:2d}" for value in synth.attributes(one).tolist()]
        tables[PARTITION_LIST].append(f"{name} {SPLITS[split]}")
        tables[ATTRIBUTE_LIST].append(" ".join([name, *signs]))
        tables[LANDMARK_LIST].append(" ".join([name, *map(str, synth.landmarks(one).ravel().tolist())]))
        tables[IDENTITY_LIST].append(f"{name} {number}")
        tables[BOX_LIST].append(f"{name} 0 0 {synth.SIZE[1]} {synth.SIZE[0]}")
        scenes.append(json.dumps({"file": name, "split": split, "params": one}))
    for file, lines in tables.items():
        (celeba / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "params.jsonl").write_text("\n".join(scenes) + "\n", encoding="utf-8")
