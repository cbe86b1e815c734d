"""What a network still answers when channels are taken away, or held at their usual level."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selib import FeatureCache, TopFraction
from selib.se import scaled


@torch.no_grad()
def ablation(
    cache: FeatureCache,
    ranking: Tensor,
    fill: Literal["zero", "mean"] = "zero",
    q: float = 0.10,
    targets: Tensor | None = None,
) -> dict[str, Tensor]:
    """Which images stay right with the top channels only, and without them: global pooling + linear heads.

    Zero is what label-free gates are trained with and no usual value of a channel; its mean is one.

    Args:
        ranking: (N, C), what each image's channels are ranked by.
        fill: what a removed channel's pooled value becomes: 0, or its mean over the cache's other images.
        q: the share of channels that counts as the top.
        targets: classes (N,), what counts as right; the network's own decisions by default.

    Returns:
        ``only`` and ``without``, bool (N,).

    Raises:
        ValueError: another head, scales of each output, an unknown ``fill``, or a single image.
    """
    linear = cache.head.linear
    if linear is None or cache.scales.ndim != 2:
        raise ValueError("ablation needs global average pooling + linear, with one scale a channel")
    pooled = scaled(cache.maps, cache.scales, 1.0, cache.head.layout).flatten(1)
    others = len(pooled) - 1
    if fill not in ("zero", "mean") or others < 1:
        raise ValueError(
            f'fill={fill!r} of {others + 1} images: use "zero" or "mean", and two images or more'
        )
    away = torch.zeros_like(pooled) if fill == "zero" else (pooled.sum(0) - pooled) / others
    top = TopFraction(q).mask(ranking)
    right = cache.logits.argmax(1) if targets is None else targets
    kept = {"only": top, "without": ~top}
    return {name: linear(torch.where(keep, pooled, away)).argmax(1) == right for name, keep in kept.items()}
