"""Pictures as RGB arrays: heatmaps over images, lines of text, and several pictures on one page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

try:
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"selib.plot needs {error.name}: pip install 'selib[widgets]'", name=error.name
    ) from None

Picture = NDArray[np.uint8]  # RGB (H, W, 3)

COLORMAP = "inferno"  # perceptually uniform, readable with every colour vision deficiency and in grey
OURS, OTHERS, CONTROLS = "#0072B2", "#D55E00", "#999999"  # of Okabe & Ito's colour-blind-safe palette
Colour = tuple[int, int, int]
INK: Colour = (60, 60, 60)


def rgb(image: Tensor) -> Picture:
    """An image uint8 (3, H, W) as an array (H, W, 3)."""
    return np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())


def pixels(frames: Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    """Frames in [0, 1], or uint8 already, as uint8 of the same shape."""
    values = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    return values if values.dtype == np.uint8 else np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def coloured(heatmap: NDArray[Any], colormap: str = COLORMAP) -> NDArray[Any]:
    """A heatmap (…) in [0, 1] in the colours of a Matplotlib colormap: (…, 3) from 0 to 255, not rounded."""
    return np.asarray(matplotlib.colormaps[colormap](heatmap)[..., :3] * 255)


def overlay(image: Tensor, heatmap: Tensor, *, opacity: float = 0.55, colormap: str = COLORMAP) -> Picture:
    """Blend a heatmap (H, W) in [0, 1] over an image uint8 (3, H, W) -> uint8 (H, W, 3).

    Sizes that differ, and an opacity outside [0, 1], are a ValueError.
    """
    return _blend(rgb(image), heatmap.detach().cpu().numpy(), colormap, opacity, by_heat=False)


def tint(
    image: NDArray[np.uint8], heatmap: NDArray[Any], *, opacity: float = 0.85, colormap: str = COLORMAP
) -> Picture:
    """Blend a heatmap over an image with an opacity that grows with the heat: cold places keep the image.

    Args:
        image: grey (H, W) or RGB (H, W, 3), uint8.
        heatmap: (H, W), in [0, 1], or uint8 from 0 to 255.
        opacity: where the heatmap is 1. Outside of [0, 1] it is a ValueError, and so are sizes that differ.
    """
    colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    return _blend(colour, pixels(heatmap) / np.float32(255), colormap, opacity, by_heat=True)


def _blend(image: Picture, heat: NDArray[Any], colormap: str, opacity: float, *, by_heat: bool) -> Picture:
    if image.shape[:2] != heat.shape:
        raise ValueError(f"the heatmap {heat.shape} does not fit the image {image.shape[:2]}: pass size=")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity} must lie in [0, 1]")
    share = opacity * heat[..., None] if by_heat else opacity
    mixed = (1 - share) * image + share * coloured(heat, colormap)
    return np.rint(mixed).astype(np.uint8)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of text inside pictures, its size in pixels."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def elided(text: str, width: int, size: int = 12) -> str:
    """A text that is wider than ``width`` pixels without its middle."""
    if font(size).getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if font(size).getlength(short) <= width:
            return short
    return "…"


def write_line(picture: Picture, text: str, x: int, y: int, *, size: int = 12, colour: Colour = INK) -> None:
    """Write text into a picture, its upper left corner at (x, y), cut at the edges."""
    page = Image.fromarray(picture)
    ImageDraw.Draw(page).text((x, y), text, fill=colour, font=font(size))
    picture[:] = np.asarray(page)


def row_of(pictures: Sequence[Picture], titles: Sequence[str] = ()) -> Picture:
    """Pictures side by side on white, each below its title, which may have several lines."""
    gap, head = 8, 0
    if titles:
        head = 6 + 14 * max(1 + title.count("\n") for title in titles)
    height = max(len(picture) for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    page = np.full((head + height, width, 3), 255, np.uint8)
    left = 0
    for place, picture in enumerate(pictures):
        right = left + picture.shape[1]
        page[head : head + len(picture), left:right] = picture
        if titles:
            write_line(page[:head, left:right], titles[place], 0, 2)
        left = right + gap
    return page


def column_of(pictures: Sequence[Picture]) -> Picture:
    """Pictures below each other on white."""
    width = max(picture.shape[1] for picture in pictures)
    rows = [
        np.pad(picture, ((0, 8), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
        for picture in pictures
    ]
    return np.concatenate(rows)
