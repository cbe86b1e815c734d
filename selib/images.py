"""Images of every kind as a network takes them: files, folders, PIL, NumPy, uint8."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selib.forward import bare
from selib.pixels import MEAN, STD, normalize

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SIZE, SHORTER = 224, 256  # what ImageNet's classifiers are measured with
ACCEPTED = (
    "a float tensor, tuple or dict as the model takes it, uint8 images (N, 3, H, W) or NumPy (N, H, W, 3), "
    "PIL images, file names, a folder, or a list of images"
)

Transform = Callable[[Any], Tensor]
"""A PIL image -> float (3, h, w) as the model takes it, such as ``weights.transforms()`` of torchvision."""


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes what a network takes.

    Attributes:
        size: (height, width).
        shorter: the shorter side, in pixels, before the centre is cropped to ``size``; None: the whole
            picture is stretched.
        mean, std: of the RGB channels in [0, 1].
    """

    size: tuple[int, int] = (SIZE, SIZE)
    shorter: int | None = SHORTER
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def seen(self, picture: Any) -> Any:
        """The part of a PIL image that the network sees, at its own resolution."""
        if self.shorter is None:
            return picture
        scale = min(picture.size) / self.shorter
        height, width = min(self.size[0] * scale, picture.height), min(self.size[1] * scale, picture.width)
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        return picture.crop(tuple(round(edge) for edge in (left, top, left + width, top + height)))

    def __str__(self) -> str:
        height, width = self.size
        how = "stretched to" if self.shorter is None else f"shorter side to {self.shorter}, the central"
        return f"{how} {height} x {width} pixels, mean {self.mean}, std {self.std}"

    def __call__(self, picture: Any) -> Tensor:
        """A PIL image as the network takes it, float32 (3, h, w)."""
        return self.normalize(self.pixels(picture))

    def pixels(self, picture: Any) -> Tensor:
        """What the network sees of a PIL image: uint8 (3, h, w)."""
        from PIL import Image

        small = self.seen(picture).convert("RGB").resize(self.size[::-1], Image.Resampling.BILINEAR)
        return as_tensor(small)

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (..., 3, h, w) -> float32 of that shape."""
        return normalize(pixels, self.mean, self.std)


def preparation_of(model: nn.Module) -> Preparation:
    """A timm network's own configuration; for others that of ImageNet's classifiers."""
    config: Mapping[str, Any] = getattr(bare(model), "pretrained_cfg", None) or {}
    if "input_size" not in config:
        return Preparation()
    height, width = config["input_size"][1:]
    whole = config.get("crop_mode") == "squash"
    shorter = None if whole else int(min(height, width) / config.get("crop_pct", SIZE / SHORTER))
    return Preparation((height, width), shorter, tuple(config["mean"]), tuple(config["std"]))


@dataclass(frozen=True)
class Images:
    """A batch of images.

    Attributes:
        batch: (N, 3, h, w) as the model takes it.
        pixels: what is shown of each, uint8 (3, h, w).
        names: of each.
        sources: the file of each as a string in Python, "" where there is none.
    """

    batch: Tensor
    pixels: list[Tensor]
    names: list[str]
    sources: list[str]


def read_image(path: str | Path) -> Tensor:
    """An image file, turned upright: RGB uint8 (3, H, W). ValueError for a damaged file, or no image."""
    return as_tensor(_opened(Path(path)))


def decoded(name: str, content: bytes) -> Any:
    """The bytes of an image file as an RGB PIL image. ValueError for a damaged file, or no image."""
    return _opened(name, BytesIO(content))


def _opened(path: str | Path, file: BytesIO | None = None) -> Any:
    """An image file as an RGB PIL image."""
    from PIL import Image, ImageOps

    try:
        picture = ImageOps.exif_transpose(Image.open(file or path))
        if picture.mode.startswith("I"):  # 16 bits, as X-rays have; Pillow would cut them off at 255
            grey = np.asarray(picture, dtype=np.float64) / 257
            picture = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
        return picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"{path} is not a readable image ({error}): replace it or leave it out") from None


def are_images(given: object) -> bool:
    """Whether these are images to prepare, not a batch as the model takes it."""
    if isinstance(given, Tensor):
        return given.dtype == torch.uint8
    return not isinstance(given, (tuple, Mapping))


def prepared(model: nn.Module, given: Any, transform: Transform | None = None) -> Images:
    """Images of whatever kind as a batch; see :data:`ACCEPTED`.

    Raises:
        TypeError: of something else.
        ValueError: a file that is no readable image, a folder without any, or sizes that differ after
            ``transform``.
    """
    how = transform if isinstance(transform, Preparation) else preparation_of(model)
    if isinstance(given, Tensor) and given.dtype != torch.uint8:
        names = [f"image {number}" for number in range(len(given))]
        return Images(given, [shown(image, how) for image in given], names, [""] * len(given))
    found = _pictures(given)
    pictures = [picture for picture, _, _ in found]
    arrays = isinstance(given, (Tensor, np.ndarray))
    if transform is None or transform is how:
        # An array is taken as it is: whoever has one has chosen its size.
        pixels = [as_tensor(picture) if arrays else how.pixels(picture) for picture in pictures]
        batch = how.normalize(torch.stack(pixels))
    else:
        ready = [transform(picture) for picture in pictures]
        if len({tuple(one.shape) for one in ready}) > 1:
            raise ValueError("transform= makes images of several sizes: add a crop or a resize to it")
        batch, inverse = torch.stack(ready), _of_transform(transform)
        pixels = [shown(one, inverse) for one in ready]
    return Images(batch, pixels, [name for _, name, _ in found], [source for _, _, source in found])


class Batches:
    """Images of whatever kind, in batches as the model takes them; files are read when their turn comes."""

    def __init__(
        self, model: nn.Module, given: Any, transform: Transform | None = None, size: int = 16
    ) -> None:
        self._model, self._transform, self._size = model, transform, size
        self._images = image_files(Path(given)) if isinstance(given, (str, Path)) else given

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._size)

    def __getitem__(self, number: int) -> Tensor:
        if number >= len(self):
            raise IndexError(number)
        some = self._images[number * self._size : (number + 1) * self._size]
        return prepared(self._model, some, self._transform).batch


def batches(model: nn.Module, given: Any, transform: Transform | None = None) -> Any:
    """A loader as it is; images (files, a folder, PIL, NumPy, a tensor) as :class:`Batches`."""
    first = given[0] if isinstance(given, Sequence) and not isinstance(given, str) and len(given) else given
    if isinstance(first, (str, Path)) or hasattr(first, "convert") or isinstance(given, (Tensor, np.ndarray)):
        return Batches(model, given, transform)
    return given


def image_files(path: Path) -> list[Path]:
    """An image file, or those of a folder at any depth."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{path} holds no images ({', '.join(SUFFIXES)})")
    return found


Named = tuple[Any, str, str]  # an RGB PIL image, its name, and its file as a string in Python


def _pictures(given: Any, number: int = 0) -> list[Named]:
    """The images that are given, the first of them with this number."""
    from PIL import Image

    if isinstance(given, (str, Path)):
        return [(_opened(file), file.name, repr(str(file))) for file in image_files(Path(given))]
    if isinstance(given, (list, tuple)) and given:
        found: list[Named] = []
        for one in given:
            if isinstance(one, (list, tuple)):
                raise TypeError(f"image {len(found)} is a {type(one).__name__}: pass {ACCEPTED}")
            found += _pictures(one, len(found))
        return found
    pictures = [given] if isinstance(given, Image.Image) else [Image.fromarray(one) for one in _arrays(given)]
    return [(one.convert("RGB"), f"image {number + i}", "") for i, one in enumerate(pictures)]


def _arrays(given: Any) -> NDArray[np.uint8]:
    """Images uint8 (N, 3, H, W), or NumPy (N, H, W, 3) or grey (N, H, W), or one of them: channels last."""
    if isinstance(given, Tensor) and given.ndim in (3, 4) and given.shape[-3] == 3:
        values: Any = given.detach().cpu().movedim(-3, -1).numpy()
    else:
        values = given
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8:
        shape = f" {given.dtype} {tuple(given.shape)}" if isinstance(given, (Tensor, np.ndarray)) else ""
        raise TypeError(f"images are {type(given).__name__}{shape}: pass {ACCEPTED}")
    if values.ndim == 2 or (values.ndim == 3 and values.shape[-1] == 3):
        values = values[None]
    if values.ndim not in (3, 4) or (values.ndim == 4 and values.shape[-1] != 3):
        raise TypeError(f"images are {type(given).__name__} {tuple(given.shape)}: pass {ACCEPTED}")
    return np.ascontiguousarray(values)


def as_tensor(picture: Any) -> Tensor:
    """An RGB PIL image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def shown(image: Tensor, how: Preparation | None) -> Tensor:
    """An image (3, h, w) as the model takes it -> uint8, to be looked at.

    Args:
        how: its mean and deviation are put back. Where it is None or does not fit, the image's own range is
            shown.
    """
    rgb = image.detach().float().cpu()
    if len(rgb) != 3:
        rgb = rgb.mean(0, keepdim=True).expand(3, *rgb.shape[1:])
    in_range = 0 <= float(rgb.min()) and float(rgb.max()) <= 1
    if how is not None and not in_range:
        mean, std = torch.tensor([how.mean, how.std])[..., None, None]
        rgb = rgb * std + mean
    low, high = float(rgb.min()), float(rgb.max())
    if low < -0.01 or high > 1.01:
        rgb = (rgb - low) / ((high - low) or 1.0)
    return (rgb.clamp(0, 1) * 255).round().to(torch.uint8)


def _of_transform(transform: Any) -> Preparation | None:
    """The mean and deviation of torchvision's transforms, where they can be read."""
    for step in (transform, *getattr(transform, "transforms", ())):
        mean, std = getattr(step, "mean", None), getattr(step, "std", None)
        if mean is not None and std is not None and len(mean) == len(std) == 3:
            return Preparation(mean=tuple(map(float, mean)), std=tuple(map(float, std)))
    return None
