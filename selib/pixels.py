"""Images as pixels and as a network takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB channels in [0, 1]
STD = (0.229, 0.224, 0.225)


def _channelwise(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(3, 1, 1)


def normalize(images: Tensor) -> Tensor:
    """Images uint8 (..., 3, H, W) in 0..255 -> float32 of the same shape, ImageNet mean 0 and deviation 1."""
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise TypeError(
            f"normalize takes uint8 images (..., 3, H, W), not {images.dtype} {tuple(images.shape)}"
        )
    # one multiplication and one addition: (x / 255 - mean) / std
    scale = 1 / (255 * _channelwise(STD, images))
    return images.float().mul_(scale).sub_(_channelwise(MEAN, images) / _channelwise(STD, images))


def denormalize(images: Tensor) -> Tensor:
    """Float (..., 3, H, W) as `normalize` makes them -> uint8 of the same shape; values out of range are clipped."""
    if not images.is_floating_point() or images.ndim < 3 or images.shape[-3] != 3:
        raise TypeError(
            f"denormalize takes float images (..., 3, H, W), not {images.dtype} {tuple(images.shape)}"
        )
    pixels = (images.float() * _channelwise(STD, images) + _channelwise(MEAN, images)) * 255
    return pixels.round_().clamp_(0, 255).to(torch.uint8)
