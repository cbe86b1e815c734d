"""CelebAMask-HQ's masks of parts, brought onto CelebA's aligned images."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from studies.data.cache import Size, cached, cores, decode, decoded, digest, fit
from studies.data.faces import SIZE, FaceSet, resized
from studies.data.lists import compare, listing, read_lines
from studies.data.objects import data_root
from studies.twins import faces as synth

FOLDER, SIDE = "CelebAMask-HQ", 512
ADDRESS = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA/CelebAMask_HQ.html"
ELSEWHERE = f"put the folder {FOLDER} there, from {ADDRESS}"
TITLES = ["idx", "orig_idx", "orig_file"]
# the twin's name of each part and the masks that make it up; later ones are laid over earlier ones
PARTS = {
    "skin": ("skin",),
    "ears": ("l_ear", "r_ear"),
    "neck": ("neck",),
    "cloth": ("cloth",),
    "necklace": ("neck_l",),
    "nose": ("nose",),
    "mouth": ("mouth", "u_lip", "l_lip"),
    "eyes": ("l_eye", "r_eye"),
    "brows": ("l_brow", "r_brow"),
    "hair": ("hair",),
    "earrings": ("ear_r",),
    "glasses": ("eye_g",),
    "hat": ("hat",),
}
NAMES = tuple(part for part in synth.PARTS if part in PARTS)
ARCHIVE = "celebamask-hq"  # the form of some of its faces that are warped to CelebA's alignment already
# The archive's numbers of the masks, in their order from 1, as parts.
FIRST = ("skin", "nose", "glasses", *2 * ("eyes",), *2 * ("brows",), *2 * ("ears",), *3 * ("mouth",))
LATER = ("hair", "hat", "earrings", "necklace", "neck", "cloth")
WORN = {"Eyeglasses": "glasses", "Wearing_Hat": "hat", "Wearing_Earrings": "earrings"}
WORN["Wearing_Necklace"] = "necklace"
Files = dict[str, tuple[str, int, int]]  # path, bytes and time of one face's masks, by part


def with_masks(faces: FaceSet, root: str | Path | None = None) -> FaceSet:
    """Those faces of CelebA that CelebAMask-HQ has masks for, with their label maps.

    The masks were drawn on crops framed otherwise; each is brought to its image by the similarity that
    takes both eyes and the middle of the mouth's ends in the masks to the landmarks, so faces whose masks
    lack an eye or the mouth are left out. `part_names` are the parts that the masks tell apart:
    `FaceSet.region` takes other attributes from the landmarks. What the crop does not show counts as
    background.

    Raises FileNotFoundError when CelebAMask-HQ is not in root, ValueError when it is damaged or has none of
    the faces.
    """
    if faces.name != "celeba" or faces.landmarks is None:
        raise ValueError(f"{FOLDER} has masks for celeba with its landmarks, not for {faces.name}")
    base = data_root(root)
    numbers = _numbers(base / FOLDER / "CelebA-HQ-to-CelebA-mapping.txt")
    wanted = {numbers[file]: row for row, file in enumerate(faces.files) if file in numbers}
    masks = _files(base / FOLDER / "CelebAMask-HQ-mask-anno", base, set(wanted))
    order = sorted(masks, key=wanted.__getitem__)
    if not order:
        what = f"has masks with both eyes and a mouth for none of the {len(faces)} images of {faces.split}"
        raise ValueError(f"{base / FOLDER}: {what}")
    chosen = faces.subset([wanted[number] for number in order])
    assert chosen.landmarks is not None
    size = faces.size
    points = resized(chosen.landmarks.double().numpy(), size, back=True)

    def produce(start: int, stop: int) -> tuple[np.ndarray, list[str]]:
        out, bad = np.zeros((stop - start, 1, *size), np.uint8), []
        for row in range(start, stop):
            try:
                out[row - start] = fit(_label_map(base, masks[order[row]], points[row]), size)
            except ValueError as error:
                bad.append(str(error))
        return out, bad

    files = [masks[number][part] for number in order for part in sorted(masks[number])]
    version = digest([*files, (hashlib.sha256(points.round(3).tobytes()).hexdigest(), 0, 0)])
    key = f"celebamask-{faces.split}-{len(order)}-{size[0]}x{size[1]}"
    remedy = f"unpack {FOLDER} again"
    parts = cached(base, key, version, (len(order), 1, *size), produce, remedy, threads=cores())
    return replace(chosen, parts=torch.from_numpy(parts[:, 0]), part_names=NAMES)


def masked_faces(root: str | Path | None = None, *, size: Size = SIZE) -> FaceSet:
    """The faces of the archive with their label maps; their attributes are what their masks show.

    Raises FileNotFoundError when it is not in root, ValueError when it is damaged.
    """
    base = data_root(root)
    folder, remedy = base / ARCHIVE, f"unpack {ARCHIVE} again"
    _, *lines = read_lines(folder / "areas.csv", f"put the folder {ARCHIVE} there")
    names = [line.partition(",")[0] for line in lines]
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        compare(folder / kind, [f"{name}.{suffix}" for name in names], "areas.csv", remedy)
    native = (109, 89)
    paths = listing(base, folder / "images", [f"{name}.jpg" for name in names])
    images = decoded(base, "celebamask-hq", paths, remedy, native, size)
    paths = listing(base, folder / "masks", [f"{name}.png" for name in names])
    labels = torch.from_numpy(decoded(base, "celebamask-hq-masks", paths, remedy, native, size, "P")[:, 0])
    numbers = torch.tensor([0, *(1 + NAMES.index(part) for part in FIRST + LATER)], dtype=torch.uint8)
    if int(labels.max()) >= len(numbers):
        raise ValueError(f"{folder / 'masks'}: a mask has the class {int(labels.max())}; {remedy}")
    parts = numbers[labels.long()]
    there = [(parts == 1 + NAMES.index(part)).flatten(1).any(1) for part in WORN.values()]
    return FaceSet(
        "celebamask-hq",
        "test",
        torch.from_numpy(images),
        torch.stack(there, 1).long(),
        list(WORN),
        parts=parts,
        part_names=NAMES,
        files=[f"{name}.jpg" for name in names],
    )


def also_masked(root: str | Path | None = None) -> set[str]:
    """The images of CelebA that the archive has, too: none to train on where its masks are the test."""
    file = data_root(root) / ARCHIVE / "celeba_match.csv"
    if not file.is_file():
        return set()
    return {line.split(",")[1] for line in read_lines(file, "")[1:]}


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift (2, 3) that take points (K, 2) to others with the least squared error.

    No reflection. In the plane Umeyama's solution (1991) is a line fitted in complex numbers: w = m z + c.
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    from_middle = z - z.mean()
    m = (from_middle.conj() * (w - w.mean())).sum() / (abs(from_middle) ** 2).sum()
    c = w.mean() - m * z.mean()
    return np.array([[m.real, -m.imag, c.real], [m.imag, m.real, c.imag]])


def _numbers(file: Path) -> dict[str, int]:
    """CelebAMask-HQ's number of every image of CelebA that it has."""
    titles, *lines = read_lines(file, ELSEWHERE) or [""]
    try:
        if titles.split()[:3] != TITLES:
            raise ValueError
        return {image: int(number) for number, _, image, *_ in map(str.split, lines)}
    except ValueError:
        expected = f"expected columns {', '.join(TITLES)}, the first in whole numbers"
        raise ValueError(f"{file}: {expected}; unpack {FOLDER} again") from None


def _files(folder: Path, root: Path, wanted: set[int]) -> dict[int, Files]:
    """Mask files <folder>/*/NNNNN_<part>.png of the wanted images that have both eyes and a mouth."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {ELSEWHERE}")
    known = {file for files in PARTS.values() for file in files}
    found: dict[int, Files] = {}
    for path in sorted(folder.glob("*/*_*.png")):
        number, _, part = path.stem.partition("_")
        if part in known and number.isdecimal() and int(number) in wanted:
            found.setdefault(int(number), {})[part] = listing(root, path.parent, [path.name])[0]
    eyes, mouth = set(PARTS["eyes"]), set(PARTS["mouth"])
    return {number: files for number, files in found.items() if eyes <= files.keys() and mouth & files.keys()}


def _label_map(root: Path, files: Files, landmarks: np.ndarray) -> Image.Image:
    """The masks of one face as a label map of its 218x178 image; ValueError names a bad file."""
    masks = {}
    for part, (path, _, _) in files.items():
        try:
            masks[part] = decode(root / path, (SIDE, SIDE), None, "L")[0] > 127
        except ValueError as error:
            raise ValueError(f"{path} ({error})") from None
        if not masks[part].any():
            raise ValueError(f"{path} (empty mask)")
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for number, part in [(1 + NAMES.index(name), part) for name, parts in PARTS.items() for part in parts]:
        if part in masks:
            labels[masks[part]] = number
    eyes = sorted(_middle(masks[part]) for part in PARTS["eyes"])  # by x: whose left is meant does not matter
    mouth = np.logical_or.reduce([masks[part] for part in PARTS["mouth"] if part in masks])
    ys, xs = np.nonzero(mouth)
    # halfway between its ends: an open or smiling mouth does not move them as it moves the centroid
    left, right = ys[xs == xs.min()].mean(), ys[xs == xs.max()].mean()
    ends = ((xs.min() + xs.max() + 1) / 2, (left + right + 1) / 2)
    target = np.array([*landmarks[:2], landmarks[3:].mean(0)]) + 0.5
    onto = np.vstack([similarity(np.array([*eyes, ends]), target), [0, 0, 1]])
    back = np.linalg.inv(onto)[:2].ravel().tolist()  # Pillow asks where a pixel comes from
    whole = Image.fromarray(labels).convert("P")
    return whole.transform(synth.SIZE[::-1], Image.Transform.AFFINE, back, Image.Resampling.NEAREST)


def _middle(mask: np.ndarray) -> tuple[float, float]:
    """The centroid, as x, y."""
    ys, xs = np.nonzero(mask)
    return float(xs.mean()) + 0.5, float(ys.mean()) + 0.5
