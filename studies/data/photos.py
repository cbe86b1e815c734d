"""Photographs: from scikit-image's wheel, a sample of ImageNet, pets with trimaps, small images enlarged."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from studies.data.cache import Size, decode, decoded
from studies.data.imageset import Enlarged, ImageSet
from studies.data.lists import compare, images_in, listing, read_lines
from studies.data.objects import AGAIN, FOLDERS, data_root, find, load

MARGIN = 256 / 224  # ImageNet's networks are tested on the middle of images that are larger by so much
SHIPPED = {"chelsea.png": 281, "coffee.png": 967, "rocket.jpg": 657, "camera.png": 872}
SOURCES = {  # what is not fetched by `studies data get`
    "imagenet-sample": "https://image-net.org holds such images, to be named IIII_WNID_name.jpg",
    "oxford-pets": "https://www.robots.ox.ac.uk/~vgg/data/pets has its images and trimaps",
    "weights": "https://github.com/akamaster/pytorch_resnet_cifar10 has them, to be saved as safetensors",
}


@cache
def imagenet() -> tuple[list[str], list[str]]:
    """WordNet ids and English names of ImageNet's 1,000 classes, in the order of a network's outputs.

    A name is the first synonym, such as "tabby"; where two classes share it, the id follows.
    """
    from timm.data import ImageNetInfo  # takes seconds

    info = ImageNetInfo()
    wnids = info.label_names()
    first = [info.index_to_description(number).split(",")[0] for number in range(len(wnids))]
    names = [
        name if first.count(name) == 1 else f"{name} ({wnid})"
        for name, wnid in zip(first, wnids, strict=True)
    ]
    return wnids, names


def missing(name: str, root: Path) -> str:
    """The line that says where to get a set that no command fetches."""
    there = f"put its folder {name} in {root}, or point SELIB_DATA to where it is"
    return f"{name}: not found in {root}; {there}; {SOURCES[name]}"


def central(image: Image.Image, size: Size, margin: float = 1.0) -> np.ndarray:
    """The middle of an image, uint8 (C, H, W), once its shorter side is H times margin long; H = W.

    Pictures are resized bicubically, label maps (of mode "P") by nearest pixel.
    """
    scale = round(size[0] * margin) / min(image.size)
    method = Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BICUBIC
    image = image.resize((round(image.width * scale), round(image.height * scale)), method)
    left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
    pixels = np.array(image.crop((left, top, left + size[1], top + size[0])))
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def shipped(size: int = 224) -> ImageSet:
    """Four photographs that come with scikit-image, the middle of each; targets are ImageNet's classes.

    From the docstrings of `skimage.data`: chelsea, a tabby cat, CC0, Stefan van der Walt; coffee, an
    espresso, CC0, Rachel Michetti; rocket, a Falcon 9 (ImageNet's nearest class is missile), SpaceX, public
    domain; camera, a man with a tripod, in grey, CC0, Lav Varshney.
    """
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    images = np.stack([decode(folder / name, None, (size, size), fit=central) for name in SHIPPED])
    targets = torch.tensor(list(SHIPPED.values()))
    return ImageSet("scikit-image", "test", torch.from_numpy(images), targets, imagenet()[1])


def imagenet_sample(size: int = 224, root: str | Path | None = None) -> ImageSet:
    """The photographs in `<root>/imagenet-sample/IIII_WNID_name.jpg`; IIII is the target, 0000 to 0999.

    As is usual, the shorter side is brought to 256/224 of size and the middle cut out. Raises
    FileNotFoundError without the folder, ValueError for a file that is damaged or named otherwise.
    """
    base, place = _place("imagenet-sample", root)
    names = images_in(place, AGAIN)
    wnids, classes = imagenet()
    labels = {f"{number:04d}_{wnid}": number for number, wnid in enumerate(wnids)}
    for name in names:
        if name[:14] not in labels:
            raise ValueError(f"{place / name}: is not named as a class of ImageNet is; {AGAIN}")
    images = _read(base, place, "imagenet-sample", names, size, fit=partial(central, margin=MARGIN))
    targets = torch.tensor([labels[name[:14]] for name in names])
    return ImageSet("imagenet-sample", "test", torch.from_numpy(images), targets, classes)


def pets(size: int = 224, root: str | Path | None = None) -> ImageSet:
    """The middle of the photographs in `<root>/oxford-pets/images`, with masks from `trimaps`.

    The breed is in a file's name: `Abyssinian_1.jpg`. Of a trimap's values 1 is the animal, 2 the
    background and 3 the border between them: the mask is True on 1 and on 3, since fur ends in the border.
    Raises FileNotFoundError when a part is missing, ValueError when one is damaged.
    """
    base, place = _place("oxford-pets", root)
    names = images_in(place / "images", AGAIN)
    breeds = [re.sub(r"_\d+\.\w+$", "", name) for name in names]
    classes = sorted(set(breeds))
    maps = [f"{Path(name).stem}.png" for name in names]
    compare(place / "trimaps", maps, "images/", AGAIN)
    images = _read(base, place / "images", "oxford-pets-images", names, size)
    trimaps = _read(base, place / "trimaps", "oxford-pets-trimaps", maps, size, mode="P")[:, 0]
    odd = ~np.isin(trimaps, (1, 2, 3)).all((1, 2))
    if odd.any():
        raise ValueError(f"{place / 'trimaps' / maps[int(odd.argmax())]}: holds other than 1, 2, 3; {AGAIN}")
    targets = torch.tensor([classes.index(breed) for breed in breeds])
    masks = torch.from_numpy(trimaps != 2)
    return ImageSet("oxford-pets", "test", torch.from_numpy(images), targets, classes, masks=masks)


def _place(name: str, root: str | Path | None) -> tuple[Path, Path]:
    """The data root and the folder of a set in it; FileNotFoundError without that."""
    base = data_root(root)
    place = find(name, base)
    if place is None:
        raise FileNotFoundError(missing(name, base))
    return base, place


def _read(
    base: Path, folder: Path, key: str, names: list[str], size: int, fit: Any = central, mode: str = "RGB"
) -> np.ndarray:
    """Images of any size as uint8 (N, C, size, size), through the cache."""
    if not names:
        raise ValueError(f"{folder}: holds no JPEG or PNG images; {AGAIN}")
    return decoded(base, key, listing(base, folder, names), AGAIN, None, (size, size), mode, fit)


def enlarged(data: ImageSet, size: int) -> ImageSet:
    """The same set with size x size images: resized as they are asked for, so that memory holds few.

    A pixel belongs to a box or mask when its centre did. Raises ValueError unless images are square and no
    larger.
    """
    height, width = data.size
    if height != width or size < height:
        raise ValueError(f"{data.name}: images of {width}x{height} cannot be enlarged to {size}x{size}")
    # the first pixel whose centre, (i + 1/2) height / size, is not before the edge: in whole numbers
    boxes = None if data.boxes is None else -((height - 2 * size * data.boxes) // (2 * height))
    masks = None if data.masks is None else Enlarged(data.masks, size)
    # they index as tensors do, which is all that ImageSet asks of them
    return replace(data, images=cast(Any, Enlarged(data.images, size)), boxes=boxes, masks=cast(Any, masks))


def tiny_at(
    size: int,
    split: str = "val",
    root: str | Path | None = None,
    *,
    classes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Tiny-ImageNet with boxes, its 64x64 images enlarged; the other arguments are those of `load`."""
    return enlarged(load("tiny-imagenet", split, root=root, classes=classes, limit=limit, seed=seed), size)


def tiny_wnids(root: str | Path | None = None) -> list[str]:
    """WordNet ids of the classes of Tiny-ImageNet that are here, in the order of its targets."""
    return sorted(read_lines(data_root(root) / FOLDERS["tiny-imagenet"][0] / "wnids.txt", AGAIN))
