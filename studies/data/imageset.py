"""Images and their targets as tensors, with boxes or masks where the data has them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selib.pixels import normalize

Indices = Sequence[int] | Tensor | slice


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop each image at random after padding it by an eighth (reflected), and flip it at random.

    images uint8 (B, 3, H, W) -> the same shape. An eighth of 32 is the 4 pixels usual for CIFAR.
    """
    count, _, height, width = images.shape
    py, px = height // 8, width // 8
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (py, py), (px, px)), mode="reflect")
    tops = torch.randint(2 * py + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(2 * px + 1, (count,), generator=generator).tolist()
    flips = (torch.rand(count, generator=generator) < 0.5).tolist()
    out = np.empty_like(images.numpy())
    for row, (top, left, flip) in enumerate(zip(tops, lefts, flips, strict=True)):
        crop = padded[row, :, top : top + height, left : left + width]
        out[row] = crop[:, :, ::-1] if flip else crop
    return torch.from_numpy(out)


class Enlarged:
    """Square images (N, 3, s, s) or masks (N, s, s), read at side x side: each is resized when it is indexed.

    It takes a tensor's place in an `ImageSet`, where all images at once would fill the memory. uint8 images
    are resized bicubically; of bool masks a pixel takes what lies at its centre.
    """

    def __init__(self, source: Tensor, side: int) -> None:
        self.source, self.side = source, side
        self.dtype, self.ndim, self.shape = source.dtype, source.ndim, (*source.shape[:-2], side, side)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: int | Tensor | slice | list[int]) -> Tensor:
        small, side = self.source[rows], self.side
        if self.dtype == torch.bool:
            # in whole numbers: floating point would put centres that lie on an edge on either side of it
            at = (2 * torch.arange(side) + 1) * small.shape[-1] // (2 * side)
            return small[..., at[:, None], at]
        planes = small.reshape(small.shape[:-2].numel(), 1, *small.shape[-2:])
        large = F.interpolate(planes, (side, side), mode="bicubic", antialias=True)  # as Pillow does it
        return large.view(*small.shape[:-2], side, side)

    def chosen(self, rows: Tensor | slice) -> Enlarged:
        """The same of some rows; nothing is resized yet."""
        return Enlarged(self.source[rows], self.side)


@dataclass(eq=False, repr=False)
class ImageSet(Dataset):
    """One split of an image classification set; also a torch Dataset.

    images uint8 (N, 3, H, W), maybe memory-mapped: read, do not write; targets int64: class numbers (N,),
    or 0 and 1 for each of K attributes (N, K); classes: the names of the classes or attributes; boxes int64
    (N, 4) as x1, y1, x2, y2 in pixels, ends exclusive; masks bool (N, H, W), True on the object; synthetic:
    True for a rendered twin. Raises ValueError when shapes, dtypes or values do not fit together.
    """

    name: str
    split: str
    images: Tensor
    targets: Tensor
    classes: list[str]
    boxes: Tensor | None = None
    masks: Tensor | None = None
    synthetic: bool = False

    def __post_init__(self) -> None:
        if self.images.ndim != 4:
            raise ValueError(f"{self.name}: images must be (N, 3, H, W), not {tuple(self.images.shape)}")
        count, _, *space = self.images.shape
        self._expect("images", torch.uint8, count, 3, *space)
        self._expect("targets", torch.int64, count, *([len(self.classes)] if self.multilabel else []))
        self._expect("boxes", torch.int64, count, 4)
        self._expect("masks", torch.bool, count, *space)
        most = 1 if self.multilabel else len(self.classes) - 1
        if count and not 0 <= int(self.targets.min()) <= int(self.targets.max()) <= most:
            what = "be 0 or 1" if self.multilabel else f"lie in 0..{most}, one for each class name"
            raise ValueError(f"{self.name}: targets must {what}")

    def _expect(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        """Raise ValueError if this tensor is there with another dtype or shape."""
        tensor = getattr(self, name)
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{self.name}: {name} must be {dtype} {shape}, not {found}")

    @property
    def multilabel(self) -> bool:
        """Whether targets are (N, K), a yes or no for every attribute, and not (N,) class numbers."""
        return self.targets.ndim == 2

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return int(self.images.shape[-2]), int(self.images.shape[-1])

    @property
    def counts(self) -> dict[str, Any]:
        """How much it holds, as results files say it."""
        return {"images": len(self), "size": list(self.size), "classes": len(self.classes)}

    @property
    def annotation(self) -> str:
        """What says where things are, in words; empty when nothing does."""
        return "masks" if self.masks is not None else "boxes" if self.boxes is not None else ""

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 over image bytes and targets."""
        digest = hashlib.sha256()
        images: Any = self.images
        if isinstance(images, Enlarged):
            digest.update(str(images.side).encode())
            images = images.source
        for start in range(0, len(self), 4096):
            digest.update(images[start : start + 4096].contiguous().numpy().data)
        digest.update(self.targets.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        kinds = f"{len(self.classes)} {'attributes' if self.multilabel else 'classes'}"
        held = f"{len(self)} of {self.size[1]}x{self.size[0]}, {kinds}, {self.annotation or 'no boxes'}"
        return f"{type(self).__name__}({self.name} {self.split}: {held})"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        """Float32 normalised image (3, H, W) and its target: a class number, or int64 (K,) of attributes."""
        target = self.targets[index]
        return normalize(self.images[index]), target if self.multilabel else int(target)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch, float32 (B, 3, H, W), int64 (B,) or (B, K), for `DataLoader(..., collate_fn=identity)`."""
        rows = torch.as_tensor(indices)
        return self.batch(rows), self.targets[rows]

    def batch(self, indices: Indices) -> Tensor:
        """Float32 normalised images (B, 3, H, W), as the networks take them."""
        return normalize(self.images[rows_of(indices)])

    def truth(self, indices: Indices) -> Tensor:
        """Bool (B, H, W), True on the object: masks, else the boxes filled in; ValueError without both."""
        rows = rows_of(indices)
        if self.masks is not None:
            return self.masks[rows]
        if self.boxes is None:
            where = "localisation needs tiny-imagenet or synth-objects"
            raise ValueError(f"{self.name} has neither masks nor boxes: {where}")
        x1, y1, x2, y2 = (edge[:, None, None] for edge in self.boxes[rows].unbind(1))
        ys, xs = torch.arange(self.size[0])[:, None], torch.arange(self.size[1])
        return (ys >= y1) & (ys < y2) & (xs >= x1) & (xs < x2)

    def subset(self, indices: Indices) -> Self:
        """The chosen images, in that order, as a set of their own; all class names stay."""
        return replace(self, **self._chosen(rows_of(indices)))

    def _chosen(self, rows: Tensor | slice) -> dict[str, Any]:
        """What `subset` replaces: every field that holds a value for each image, which all tensors do."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value[rows] for name, value in values.items() if isinstance(value, Tensor)}
        views = {name: value.chosen(rows) for name, value in values.items() if isinstance(value, Enlarged)}
        return tensors | views

    def augmented(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Training images uint8 (B, 3, H, W), each changed at random: see `augment`."""
        return augment(self.images[rows], generator)

    def loader(self, batch_size: int = 128, *, train: bool = False, seed: int = 0) -> DataLoader:
        """Batches of float32 (B, 3, H, W) and int64 (B,), or (B, K) for attributes.

        train=True: shuffled, augmented, last short batch dropped. Order and augmentation depend on seed and
        epoch alone; `loader.dataset.set_epoch(e)` resumes a run where it was.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if not train:
            return DataLoader(self, batch_size, collate_fn=identity)
        if len(self) < batch_size:
            few = f"{len(self)} training images are fewer than one batch of {batch_size}"
            raise ValueError(f"{self.name}: {few}")
        view = _Training(self, seed)
        return DataLoader(view, batch_size, sampler=view, collate_fn=identity, drop_last=True)


def identity(batch: Any) -> Any:
    """The batch as it is: `__getitems__` has already put it together."""
    return batch


def rows_of(indices: Indices) -> Tensor | slice:
    """Indices as a tensor can be indexed by them."""
    return indices if isinstance(indices, slice) else torch.as_tensor(indices)


class _Training(Dataset):
    """Training view of a set and its own sampler: augmented images, in a new seeded order every epoch."""

    def __init__(self, base: ImageSet, seed: int) -> None:
        self.base, self.seed, self.epoch = base, seed, -1

    @property
    def fingerprint(self) -> str:
        return f"{self.base.fingerprint} from seed {self.seed}"

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch - 1  # __iter__ steps on

    def generator(self, *key: int) -> torch.Generator:
        digest = hashlib.sha256(repr((self.seed, self.epoch, *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(torch.randperm(len(self), generator=self.generator()).tolist())

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        # keyed by the first index, not by a count: the batch is the same whichever process draws it
        images = self.base.augmented(rows, self.generator(int(rows[0])))
        return normalize(images), self.base.targets[rows]
