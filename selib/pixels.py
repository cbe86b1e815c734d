"""Images as pixels and as a network takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB channels in [0, 1]
STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Images uint8 (..., 3, H, W) in 0..255 -> float32 of the same shape.

    ``mean`` and ``std`` of the RGB channels in [0, 1], by default ImageNet's, become 0 and 1.
    """
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise TypeError(
            f"normalize takes uint8 images (..., 3, H, W), not {images.dtype} {tuple(images.shape)}"
        )
    middle, spread = torch.tensor([mean, std], dtype=torch.float32, device=images.device)[..., None, None]
    # (x / 255 - mean) / std as one multiplication and one subtraction, in place
    return images.float().mul_(1 / (255 * spread)).sub_(middle / spread)


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of images, given as both or as the side of a square; else a ValueError."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            f"image_size={image_size!r}: pass the side of a square in pixels, or (height, width)"
        )
    return size
