"""Pictures of explanations in one style, drawn without pyplot: numbers in, a Figure or an RGB array out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from io import BytesIO
from typing import Any, ParamSpec

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image, ImageDraw, ImageFont
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"selib.plot needs {error.name}: pip install 'selib[widgets]'", name=error.name
    ) from None

Picture = NDArray[np.uint8]  # RGB (H, W, 3)

COLORMAP = "inferno"  # perceptually uniform, readable with every colour vision deficiency and in grey
OURS, OTHERS, CONTROLS = "#0072B2", "#D55E00", "#999999"  # of Okabe & Ito's colour-blind-safe palette
INK = (60, 60, 60)
STYLE: Any = {  # seaborn's "whitegrid", with small letters
    "font.family": ["sans-serif"],
    "font.sans-serif": ["Arial", "DejaVu Sans", "Liberation Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": ".8",
    "axes.labelcolor": ".15",
    "text.color": ".15",
    "xtick.color": ".15",
    "ytick.color": ".15",
    "xtick.bottom": False,
    "ytick.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": ".8",
    "grid.linestyle": "-",
    "lines.solid_capstyle": "round",
    "patch.edgecolor": "w",
    "patch.force_edgecolor": True,
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a function draw in :data:`STYLE`, whatever style the notebook has set."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """A Figure of this size in inches, and its axes (rows, columns)."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def hide_frame(ax: Axes) -> None:
    """Take away ticks, grid and frame, but leave the labels."""
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


# ---- pixels ----------


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

    Raises:
        ValueError: sizes that differ, or an opacity outside [0, 1].
    """
    if image.shape[-2:] != heatmap.shape:
        raise ValueError(
            f"the heatmap {tuple(heatmap.shape)} does not fit the image {tuple(image.shape[-2:])}: pass size="
        )
    _check_opacity(opacity)
    colours = coloured(heatmap.detach().cpu().numpy(), colormap)
    mixed = (1 - opacity) * rgb(image) + opacity * colours
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def tint(
    image: NDArray[np.uint8], heatmap: NDArray[Any], *, opacity: float = 0.85, colormap: str = COLORMAP
) -> Picture:
    """Blend a heatmap over an image with an opacity that grows with the heat: cold places keep the image.

    Args:
        image: grey (H, W) or RGB (H, W, 3), uint8.
        heatmap: (H, W), in [0, 1], or uint8 from 0 to 255.
        opacity: where the heatmap is 1.

    Raises:
        ValueError: sizes that differ, or an opacity outside [0, 1].
    """
    colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    if colour.shape != (*heatmap.shape, 3):
        raise ValueError(f"the heatmap {heatmap.shape} does not fit the image {image.shape}")
    _check_opacity(opacity)
    kept, added = _tints(opacity, colormap)
    level = pixels(heatmap)
    return np.rint(kept[level] * colour + added[level]).astype(np.uint8)


@cache
def _tints(opacity: float, colormap: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The share of the image that is kept (256, 1) and the colour added to it (256, 3), by level of heat."""
    heat = np.linspace(0, 1, 256)
    mixed = opacity * heat[:, None]
    return (1 - mixed).astype(np.float32), (mixed * coloured(heat, colormap)).astype(np.float32)


def _check_opacity(opacity: float) -> None:
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity} must lie in [0, 1]")


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of text inside pictures, its size in pixels."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def write_line(
    picture: Picture, text: str, x: int, y: int, *, size: int = 12, colour: tuple[int, int, int] = INK
) -> None:
    """Write text into a picture, its upper left corner at (x, y), cut at the edges."""
    page = Image.fromarray(picture)
    ImageDraw.Draw(page).text((x, y), text, fill=colour, font=font(size))
    picture[:] = np.asarray(page)


def screen(fig: Figure) -> bytes:
    """A figure as PNG bytes at the size of a screen, in 256 colours of its own: they keep notebooks small."""
    large = BytesIO()
    fig.savefig(large, format="png", dpi=192, bbox_inches="tight", metadata={"Software": None})
    with Image.open(large) as drawn:
        small = drawn.convert("RGB").resize((drawn.width // 2, drawn.height // 2), Image.Resampling.LANCZOS)
    shown = BytesIO()
    small.quantize(256, dither=Image.Dither.NONE).save(shown, "PNG", optimize=True)
    return shown.getvalue()


# ---- figures ----------


@styled
def heatmap_grid(
    images: Tensor,
    heatmaps: Mapping[str, Tensor],
    *,
    titles: Sequence[str] = (),
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
) -> Figure:
    """Samples beside methods; the longer of the two runs across the page.

    Args:
        images: uint8 (B, 3, H, W).
        heatmaps: {method: (B, H, W) in [0, 1]}.
        titles: one for each image.
        boxes, masks: the truth, int (B, 4) or bool (B, H, W), outlined in white.
    """
    across = len(images) > len(heatmaps) + 1
    shape = (len(heatmaps) + 1, len(images)) if across else (len(images), len(heatmaps) + 1)
    fig, axes = figure(1.25 * shape[1] + 0.3, 1.25 * shape[0] + 0.25, *shape)
    cells = axes.T if across else axes
    for row, image in enumerate(images):
        pictures = {"image": rgb(image)}
        pictures |= {name: overlay(image, maps[row]) for name, maps in heatmaps.items()}
        for ax, (name, picture) in zip(cells[row], pictures.items(), strict=True):
            ax.imshow(picture, interpolation="nearest")
            hide_frame(ax)
            if boxes is not None:
                x1, y1, x2, y2 = boxes[row].tolist()
                corner = (x1 - 0.5, y1 - 0.5)
                ax.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=1))
            if masks is not None:
                ax.contour(masks[row].float().numpy(), levels=[0.5], colors="white", linewidths=0.8)
            if row == 0:
                _label(ax, name, left=across)
        if titles:
            _label(cells[row][0], titles[row], left=not across)
    return fig


def _label(ax: Axes, text: str, *, left: bool) -> None:
    """A small label at the left of the axes, or above them."""
    write = ax.set_ylabel if left else ax.set_title
    write(text, fontsize=8)


@styled
def contact_sheet(images: Tensor, *, columns: int = 12, titles: Sequence[str] = ()) -> Figure:
    """Many images uint8 (N, 3, H, W) on one page."""
    rows = -(-len(images) // columns)
    fig, axes = figure(0.78 * columns, 0.95 * rows + (0.2 * rows if titles else 0), rows, columns)
    for ax in axes.flat:
        ax.set_axis_off()
    for place, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        ax.imshow(rgb(image), interpolation="nearest")
        if titles:
            ax.set_title(titles[place], fontsize=6)
    return fig


@styled
def gate_histogram(gates: Mapping[str, Tensor]) -> Figure:
    """How gates (N, C) are distributed over all samples and channels, one panel for each network."""
    fig, axes = figure(3.2 * len(gates), 2.4, 1, len(gates), sharey=True)
    for ax, (name, values) in zip(axes[0], gates.items(), strict=True):
        flat = values.flatten().numpy()
        share = np.full(len(flat), 100 / len(flat))
        ax.hist(flat, bins=40, range=(0, 1), weights=share, color=OURS, alpha=0.75, edgecolor="none")
        ax.set_title(f"{name}: {100 * float((flat > 0.5).mean()):.0f} % of gates above ½")
        ax.set(xlabel="gate s", xlim=(0, 1))
    axes[0][0].set_ylabel("% of gates")
    return fig


@styled
def channel_strip(image: Tensor, maps: Tensor, labels: Sequence[str]) -> Figure:
    """An image uint8 (3, H, W) and the maps (n, h, w) of single channels, each on its own scale."""
    fig, axes = figure(1.1 * (len(maps) + 1), 1.45, 1, len(maps) + 1)
    axes[0][0].imshow(rgb(image), interpolation="nearest")
    for ax, one, label in zip(axes[0][1:], maps, labels, strict=True):
        ax.imshow(one.numpy(), cmap=COLORMAP, interpolation="nearest")
        ax.set_title(label, fontsize=7)
    for ax in axes[0]:
        ax.set_axis_off()
    return fig


def sorted_gates(ax: Axes, gates: Tensor, chosen: Tensor, *, label: str = "gate s") -> None:
    """Draw channel weights (C,) into ``ax`` in falling order, the chosen ones, bool (C,), in colour."""
    order = gates.argsort(descending=True)
    colours = np.where(chosen[order].numpy(), OURS, "#cccccc")
    ax.vlines(np.arange(len(order)), 0, gates[order].numpy(), colors=list(colours), linewidth=2)
    ax.set(xlabel=f"{len(order)} channels, sorted", ylabel=label, xlim=(-0.5, len(order) - 0.5))
    ax.set_title(f"{int(chosen.sum())} channels selected")


@styled
def explored(picture: Picture, weights: Tensor, chosen: Tensor, *, label: str, caption: str) -> Figure:
    """The explorer's view as one figure: the picture, the sorted channel weights (C,), and a caption."""
    height, width = picture.shape[:2]
    fig = Figure(figsize=(width / 96 + 3.2, height / 96 + 0.45), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(width / 96, 3.2))
    left.imshow(picture, interpolation="nearest")
    left.set_axis_off()
    sorted_gates(right, weights, chosen, label=label)
    fig.supxlabel(caption, fontsize=7)
    return fig
