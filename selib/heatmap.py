"""Heatmap math: weighted channel sums, resizing, scaling to [0, 1]. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """Σ_c w[c]·F[c]: features (B, C, *space) and weights (B, C) -> map (B, *space), in float32."""
    return torch.einsum("bc,bc...->b...", weights.float(), features.float())


def at_maxima(features: Tensor, time: int | None = None) -> Tensor:
    """What a head reads that takes nothing of a channel's map but its maximum: that value where it stands,
    zero elsewhere.

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


def spread(maps: Tensor, influence: Tensor, time: int | None) -> Tensor:
    """Spread each frame's influence over that frame of the channels' maps.

    Args:
        maps: (B, C, *space), none negative.
        influence: (B, C, T); interpolated to the frames of the maps, averaged where they have no time axis.
        time: the axis of ``space`` that is time.

    Returns:
        (B, *space), whose mean over the other axes is, frame by frame, the sum of the influence of the
        channels that are not zero there.
    """
    if time is None:
        maps, influence = maps[:, :, None], influence.mean(2, keepdim=True)
    else:
        maps = maps.movedim(2 + time, 2)
        if influence.shape[2] != maps.shape[2]:
            influence = F.interpolate(influence, maps.shape[2], mode="linear", align_corners=False)
    flat = maps.flatten(3) if maps.ndim > 3 else maps[..., None]
    mean = flat.mean(3)
    weights = influence / mean.where(mean > 0, torch.ones_like(mean))
    found = torch.einsum("bct,bctp->btp", weights, flat).reshape(len(maps), *maps.shape[2:])
    return found[:, 0] if time is None else found.movedim(1, 1 + time)


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
    # high - low of two huge numbers would overflow.
    largest = torch.maximum(low.abs(), high.abs())
    quarter = torch.where(largest > torch.finfo(flat.dtype).max / 2, 0.25, 1.0)
    if bool((quarter < 1).any()):
        flat, low, high = (values * quarter for values in (flat, low, high))
    return unit(flat, low, high).unflatten(1, maps.shape[1:])


def unit(flat: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values (B, n) between finite low (B, 1) and high (B, 1) scaled to [0, 1], without a branch.

    Where they are the same up to rounding the result is zero: stretching would show noise as evidence.
    """
    largest = torch.maximum(low.abs(), high.abs())
    constant = (high / 2 - low / 2) <= 4 * torch.finfo(flat.dtype).eps * largest
    span = (high - low).where(~constant, torch.ones_like(high))
    # In place: a clip is a million numbers, and every copy of them takes longer than the head.
    return torch.sub(flat, low).div_(span).masked_fill_(constant, 0)


@cache
def _matrix(before: int, after: int, mode: Literal["linear", "bicubic"]) -> Tensor:
    """Interpolation of ``before`` values to ``after`` as a matrix (after, before)."""
    values = torch.eye(before)[None]
    if mode == "linear":
        return F.interpolate(values, after, mode=mode, align_corners=False)[0].T
    return F.interpolate(values[None], (after, before), mode=mode, align_corners=False)[0, 0]


def interpolation(space: Sequence[int], size: Sequence[int]) -> list[Tensor]:
    """A matrix (after, before) for each axis: bicubic for the two of an image, linear for time."""
    axes = len(size)
    return [
        _matrix(before, after, "linear" if axes == 1 or (axes == 3 and axis == 0) else "bicubic")
        for axis, (before, after) in enumerate(zip(space, size, strict=True))
    ]


def interpolated(maps: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Maps (B, *space) -> (B, *size), float32, by :func:`interpolation`.

    Bicubic interpolation overshoots; values are clamped to the range of each input map.
    """
    x = maps.float()
    low, high = (f(x.flatten(1), 1).reshape(-1, *[1] * len(matrices)) for f in (torch.amin, torch.amax))
    if len(matrices) != 2 and matrices[0].shape[0] != matrices[0].shape[1]:
        x = (x.movedim(1, -1) @ matrices[0].T).movedim(-1, 1)
    if len(matrices) > 1:
        x = matrices[-2] @ x @ matrices[-1].T
    return torch.maximum(torch.minimum(x, high), low)


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, *space) to ``size``: linear in 1-D, bicubic in 2-D, linear in time then bicubic in 3-D
    (B, T, H, W).

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
    return interpolated(maps, [m.to(maps.device) for m in interpolation(maps.shape[1:], size)])


# ---- the axes of maps and inputs ----


def time_axis(space: Sequence[int], frames: int) -> int | None:
    """Which axis of a map's *space is time, where the model answers once for each of ``frames`` frames.

    The first of three axes, the only one of one; None of none. Of two (a spectrogram) the one of T moments,
    or of a multiple or fraction of T; the last where both are, as torchaudio lays them out.
    """
    if len(space) != 2:
        return 0 if space else None
    for fits in (lambda n: n == frames, lambda n: at_rate_of(n, frames)):
        found = [axis for axis in (0, 1) if fits(space[axis])]
        if found:
            return found[-1]
    return None


def at_rate_of(n: int, frames: int) -> bool:
    """Whether n moments can be those of so many frames, at a multiple or fraction of their rate."""
    return n > 1 and (n % frames == 0 or frames % n == 0)


def input_space(
    shape: Sequence[int], axes: int, frames: int | None = None, time: int | None = None
) -> tuple[int, ...] | None:
    """The *space of an input of this shape that a map with so many spatial axes shows, or None.

    Args:
        frames, time: T and the axis of time, of a model that answers once a frame.
    """
    clip = len(shape) == 4 and axes == 3  # (B, T, H, W)
    if frames is None:
        space = tuple(shape[1:] if clip or len(shape) == 2 else shape[2:])
    elif axes == 1:
        space = (frames,)
    elif axes == 2 and len(shape) == 3:  # (B, moments, coefficients), shown as the map has them
        moments_first = time_axis(shape[1:], frames) == time
        space = tuple(shape[1:] if moments_first else shape[:0:-1])
    elif len(shape) == 5 and shape[1] == frames != shape[2]:  # (B, T, C, H, W)
        space = (shape[1], *shape[3:])
    elif len(shape) == 4 and (axes == 3) != (shape[1] % frames == 0):
        return None  # an image, or a clip to a map that is none
    else:
        space = tuple(shape[1:] if clip else shape[2:])
    return space if len(space) == axes > 0 else None
