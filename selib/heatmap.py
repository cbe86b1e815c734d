"""Heatmap math: weighted channel sums, resizing, scaling to [0, 1]. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """Σ_c w[c]·F[c]: features (B, C, *space) and weights (B, C) -> map (B, *space), in float32."""
    return torch.einsum("bc,bc...->b...", weights.float(), features.float())


def at_maxima(features: Tensor, time: int | None = None) -> Tensor:
    """What a head reads that takes nothing of a channel's map but its maximum: that value where it stands, zero elsewhere.

    Args:
        features: (B, C, *space).
        time: the axis of ``space`` that is time: every frame has a maximum of its own.

    Returns:
        The magnitude of each maximum in its place, (B, C, *space); positions that are equal share it.
    """
    axes = [2 + axis for axis in range(features.ndim - 2) if axis != time]
    tops = features.amax(axes, keepdim=True)
    at = (features == tops).to(features.dtype)
    return at * tops.abs() / at.sum(axes, keepdim=True)


def normalize(maps: Tensor) -> Tensor:
    """Scale each sample's map (B, *space) to [0, 1] by its minimum and maximum; a constant map becomes zeros.

    Anything not finite counts as the map's smallest finite value, so the result is always finite.
    """
    flat = maps.flatten(1).float()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)  # aminmax takes twenty times as long
    if not bool((low.isfinite() & high.isfinite()).all()):
        finite = flat.isfinite()
        low = flat.where(finite, torch.full_like(flat, torch.inf)).amin(1, keepdim=True)
        low = low.where(low.isfinite(), torch.zeros_like(low))
        flat = flat.where(finite, low)
        high = flat.amax(1, keepdim=True)
    size = torch.maximum(low.abs(), high.abs())
    # A span at the level of rounding is a constant map: stretching it would show noise as evidence.
    constant = (high / 2 - low / 2) <= 4 * torch.finfo(flat.dtype).eps * size
    if bool((size > torch.finfo(flat.dtype).max / 2).any()):  # high - low of two huge numbers would overflow
        flat, low, high = (values / 4 for values in (flat, low, high))
    span = high - low
    # Few passes, and in place: a clip is a million numbers, and every copy of them takes longer than the head.
    scaled = torch.sub(flat, low).div_(span.where(~constant, torch.ones_like(span)))
    if bool(constant.any()):
        scaled.masked_fill_(constant, 0)
    return scaled.unflatten(1, maps.shape[1:])


@cache
def _bicubic(before: int, after: int) -> Tensor:
    """Bicubic interpolation of ``before`` values to ``after`` as a matrix (after, before)."""
    return F.interpolate(torch.eye(before)[None, None], (after, before), mode="bicubic", align_corners=False)[
        0, 0
    ]


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, *space) to ``size``: linear in 1-D, bicubic in 2-D, linear in time then bicubic in 3-D (B, T, H, W).

    Bicubic interpolation overshoots; values are clamped to the range of each input map.

    Raises:
        ValueError: if ``size`` has another number of axes than the map's space.
    """
    size = tuple(int(n) for n in size)
    if maps.ndim not in (2, 3, 4):
        raise ValueError(f"maps with {maps.ndim - 1} spatial axes cannot be resized: 1, 2 or 3 are supported")
    if len(size) != maps.ndim - 1 or any(n < 1 for n in size):
        raise ValueError(
            f"size={size} does not fit a map with {maps.ndim - 1} spatial axes {tuple(maps.shape[1:])}"
        )
    x = maps.float()
    low, high = (f(x.flatten(1), 1).reshape(-1, *[1] * len(size)) for f in (torch.amin, torch.amax))
    if len(size) == 1:
        x = F.interpolate(x[:, None], size, mode="linear", align_corners=False)[:, 0]
    elif len(size) == 2:
        x = F.interpolate(x[:, None], size, mode="bicubic", align_corners=False)[:, 0]
    else:
        if size[0] != x.shape[1]:
            x = (
                F.interpolate(x.flatten(2).movedim(1, 2), size[0], mode="linear", align_corners=False)
                .movedim(2, 1)
                .unflatten(2, maps.shape[2:])
            )
        # Both image axes as matrices: for the many small maps of a clip several times as fast as F.interpolate.
        down, across = (_bicubic(n, m).to(x.device) for n, m in zip(maps.shape[2:], size[1:], strict=True))
        x = down @ x @ across.T
    return x.clamp_(low, high)
