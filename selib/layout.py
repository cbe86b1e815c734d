"""Read the shape of a tensor as a feature map: where its channels are, and what its positions are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from selib.heatmap import at_rate_of, time_axis
from selib.se import Layout

Space = tuple[int, ...]
NOT_POSITIONS = 5  # leading tokens at most: a class token, and a few registers


@dataclass(frozen=True)
class MapLayout:
    """How a module's output is a feature map: layout, C, leading tokens that are no positions, their grid."""

    layout: Layout
    channels: int
    prefix: int = 0
    grid: Space | None = None


def _stretch(space: Sequence[int], reference: Sequence[int]) -> float:
    """How far the strides of the two image axes differ: 1 for the same proportions."""
    strides = [r / s for r, s in zip(reference[-2:], space[-2:], strict=True)]
    return max(strides) / min(strides)


def same_shape(space: Sequence[int], reference: Sequence[int]) -> bool:
    """Whether ``space`` is ``reference`` at a coarser scale, the same in both image axes up to rounding."""
    finer = all(s <= r for s, r in zip(space, reference, strict=True))
    return finer and (len(space) < 2 or _stretch(space, reference) < 1.5)


def _proportional(n: int, space: Space) -> Space | None:
    """The (h, w) with h·w = n whose proportions are those of the input (H, W)."""
    h = round((n * space[-2] / space[-1]) ** 0.5)
    grid = (h, n // h) if h > 0 else (0, 0)
    return grid if prod(grid) == n and same_shape(grid, space[-2:]) else None


def token_grid(n: int, spaces: Iterable[Space]) -> tuple[int, Space] | None:
    """How n tokens of an image (H, W) lie: (leading tokens, grid), by the proportions of the image."""
    for space in spaces:
        if len(space) < 2:
            continue
        found = [(p, g) for p in range(min(NOT_POSITIONS + 1, n)) if (g := _proportional(n - p, space))]
        if found:  # 21 tokens of a square image: five and 4x4, not one and 4x5
            return min(found, key=lambda pair: _stretch(pair[1], space))
    return None


def grid_of(n: int, usual: Space, spaces: Sequence[Space]) -> Space:
    """How n tokens of other inputs than the example lie, which lay on the ``usual`` grid.

    Raises:
        ValueError: another number of tokens, on no grid of the input's proportions.
    """
    found = token_grid(n, spaces)
    if found and found[0] == 0 and len(usual) == 2:
        return found[1]
    if prod(usual) == n:
        return usual
    raise ValueError(f"{n} tokens lie on no grid of the input's proportions: attach the block with grid=")


def input_spaces(shapes: Iterable[Sequence[int]]) -> list[Space]:
    """The *space of inputs (B, C, *space), or of (B, N) without channels."""
    return [tuple(s[2:]) if len(s) > 2 else tuple(s[1:]) for s in shapes if len(s) > 1]


def map_layout(
    shape: Sequence[int],
    input_shapes: Sequence[Sequence[int]],
    frames: int | None = None,
    known: Layout | None = None,
    maps: Sequence[Space] = (),
) -> MapLayout | None:
    """Read a shape as a feature map of one of the inputs, or None where it cannot be one.

    Channels stand where the next layer reads them; where that is unknown they come first, unless only the
    other reading has the input's proportions. A (B, N, C) output is a token map when N, less a few leading
    tokens, is the grid of a map computed before, or of the input's proportions.

    Args:
        frames: T of a model that answers once a frame. The axis of T frames is time, and tokens are no grid.
        known: where a layer reads the channels, or has written them.
        maps: *space of the (B, C, *space) maps computed before.
    """
    if len(shape) not in (3, 4, 5):
        return None
    timed = _over_time(shape, input_shapes, frames)
    if timed and known and len(shape) == 3:
        return MapLayout(known, shape[1 if known == "BC*" else 2])
    if timed:
        return timed
    spaces = input_spaces(input_shapes)
    if len(shape) > 3:
        same = [s for s in spaces if len(s) == len(shape) - 2]
        first, last = tuple(shape[2:]), tuple(shape[1:-1])
        only_last = any(same_shape(last, s) for s in same) and not any(same_shape(first, s) for s in same)
        layout: Layout = known or ("B*C" if only_last else "BC*")
        return MapLayout(layout, shape[1 if layout == "BC*" else -1])
    return _tokens(shape[1], shape[2], spaces, known, maps)


def _over_time(
    shape: Sequence[int], input_shapes: Sequence[Sequence[int]], frames: int | None
) -> MapLayout | None:
    """The reading of a clip's map, whose axis of T moments is known by its length."""
    clips = {frames} if frames else {s[2] for s in input_shapes if len(s) == 5}
    if len(shape) == 3 and (frames or len(clips.intersection(shape[1:])) == 1):
        axes = [axis for axis in (1, 2) if shape[axis] in clips]
        axes = axes or [axis for axis in (1, 2) if frames and at_rate_of(shape[axis], frames)]
        return MapLayout("B*C", shape[2]) if axes == [1] else MapLayout("BC*", shape[1])
    if frames and len(shape) > 3:
        time = time_axis(shape[2:], frames) is not None if len(shape) == 4 else shape[2] == frames
        if time or shape[1] == frames:
            return MapLayout("BC*", shape[1]) if time else MapLayout("B*C", shape[-1])
    return None


def _tokens(
    a: int, b: int, spaces: Sequence[Space], known: Layout | None, maps: Sequence[Space]
) -> MapLayout | None:
    """The reading of a map (B, a, b): tokens on a grid, or positions of a series."""
    if known != "BC*":
        for space in reversed(maps):
            if 0 <= a - prod(space) <= NOT_POSITIONS:
                return MapLayout("B*C", b, a - prod(space), space)
    if known != "BC*" and (found := token_grid(a, spaces)):
        return MapLayout("B*C", b, *found)
    if known != "B*C" and (found := token_grid(b, spaces)) and found[0] == 0:
        return MapLayout("BC*", a, 0, found[1])
    if any(len(s) == 1 for s in spaces):
        as_long = any(a == s[0] != b for s in spaces)
        layout: Layout = known or ("B*C" if as_long else "BC*")
        return MapLayout(layout, b if layout == "B*C" else a)
    return None
