"""The study's figures: one style, drawn without pyplot, so that every function is pure: numbers in, Figure out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from io import BytesIO
from itertools import pairwise
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image as Picture
from torch import Tensor

COLORMAP = "inferno"  # perceptually uniform, readable with every colour vision deficiency and in grey
OURS, OTHERS, CONTROLS = "#0072B2", "#D55E00", "#999999"  # of Okabe & Ito's colour-blind-safe palette
MODALITIES = {"audio": "#E69F00", "face": "#0072B2", "body": "#009E73"}  # and for others in turn:
MORE = ("#CC79A7", "#56B4E9", "#D55E00", "#999999")
TRUTH = "#009E73"
STYLE = {
    **sns.axes_style("whitegrid"),
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
}


P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the study's style whatever the notebook has set; titles and legends take their size when they are made."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, NDArray[Any]]:
    """A Figure in inches and its axes (rows, columns)."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def overlay(
    image: Tensor, heatmap: Tensor, *, opacity: float = 0.55, colormap: str = COLORMAP
) -> NDArray[np.uint8]:
    """Blend a heatmap (H, W) in [0, 1] over an image uint8 (3, H, W) -> uint8 (H, W, 3).

    Raises:
        ValueError: sizes that differ, or an opacity outside [0, 1].
    """
    if image.shape[-2:] != heatmap.shape:
        raise ValueError(
            f"the heatmap {tuple(heatmap.shape)} does not lie on the image {tuple(image.shape[-2:])}: pass size="
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity} must lie in [0, 1]")
    colours = matplotlib.colormaps[colormap](heatmap.cpu().numpy())[..., :3] * 255
    pixels = image.cpu().permute(1, 2, 0).numpy()
    mixed = (1 - opacity) * pixels + opacity * colours
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def tint(
    image: NDArray[np.uint8], heatmap: NDArray[Any], *, opacity: float = 0.85, colormap: str = COLORMAP
) -> NDArray[np.uint8]:
    """Colour an image by a heatmap whose own value is its opacity: where it is low the picture stays as it was.

    Args:
        image: grey (…, H, W) or RGB (…, H, W, 3).
        heatmap: (…, H, W), in [0, 1], or uint8 from 0 to 255.
        opacity: at the map's maximum, in [0, 1].

    Returns:
        RGB uint8 (…, H, W, 3).

    Raises:
        ValueError: sizes that differ, or an opacity outside [0, 1].
    """
    grey = image.ndim == heatmap.ndim
    if image.shape[: heatmap.ndim] != heatmap.shape or not (grey or image.shape[heatmap.ndim :] == (3,)):
        raise ValueError(f"the heatmap {heatmap.shape} does not lie on the image {image.shape}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity} must lie in [0, 1]")
    level = heatmap if heatmap.dtype == np.uint8 else np.rint(np.clip(heatmap, 0, 1) * 255).astype(np.uint8)
    below, above = _tinting(opacity, colormap)
    pixels = image[..., None] if grey else image
    return np.rint(below[level] * pixels + above[level]).astype(np.uint8)


@cache
def _tinting(opacity: float, colormap: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For each of 256 levels of a map: what remains of the image (256, 1), and the colour that is added (256, 3)."""
    value = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps[colormap](value)[:, :3] * 255
    mixed = opacity * value[:, None]
    return (1 - mixed).astype(np.float32), (mixed * colours).astype(np.float32)


def pixels(frames: Tensor | NDArray[Any]) -> NDArray[np.uint8]:
    """Frames in [0, 1], or uint8 already, as uint8 of the same shape."""
    values = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    return values if values.dtype == np.uint8 else np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def spans(truth: Tensor | NDArray[Any]) -> list[tuple[int, int]]:
    """The stretches [start, stop) in which 0/1 labels (T,) are 1."""
    edges = np.diff(np.asarray(truth).astype(bool).astype(np.int8), prepend=0, append=0)
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


def envelope(wave: NDArray[Any], columns: int) -> NDArray[np.float64]:
    """Lowest and highest sample in each of ``columns`` stretches of a track (N,): (columns, 2), scaled to at most ±1."""
    edges = np.linspace(0, len(wave), columns + 1).astype(int)
    parts = [wave[a : max(b, a + 1)] for a, b in pairwise(edges)]
    found = np.array([(part.min(), part.max()) if len(part) else (0, 0) for part in parts], dtype=np.float64)
    return found / max(1e-12, float(np.abs(found).max()))


def modality_colours(names: Iterable[str]) -> dict[str, str]:
    """A fixed colour for each of the usual modalities, and others for others."""
    rest = iter(MORE)
    return {name: MODALITIES.get(name) or next(rest, CONTROLS) for name in names}


@styled
def heatmap_grid(
    images: Tensor,
    heatmaps: Mapping[str, Tensor],
    *,
    titles: Sequence[str] = (),
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
) -> Figure:
    """Samples beside methods: images uint8 (B, 3, H, W), each method's heatmaps (B, H, W) in [0, 1].

    The longer of the two runs across the page. The truth, boxes int (B, 4) or masks bool (B, H, W), is drawn in white.
    """
    across = len(images) > len(heatmaps) + 1  # more samples than methods: one column a sample
    shape = (len(heatmaps) + 1, len(images)) if across else (len(images), len(heatmaps) + 1)
    fig, axes = figure(1.25 * shape[1] + 0.3, 1.25 * shape[0] + 0.25, *shape)
    cells = axes.T if across else axes
    names = ["image", *heatmaps]
    for row, image in enumerate(images):
        pictures = [
            image.permute(1, 2, 0).numpy(),
            *(overlay(image, maps[row]) for maps in heatmaps.values()),
        ]
        for column, (ax, picture) in enumerate(zip(cells[row], pictures, strict=True)):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            sns.despine(ax=ax, left=True, bottom=True)
            if boxes is not None:
                x1, y1, x2, y2 = boxes[row].tolist()
                ax.add_patch(
                    Rectangle(
                        (x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=1
                    )
                )
            if masks is not None:
                ax.contour(masks[row].float().numpy(), levels=[0.5], colors="white", linewidths=0.8)
            label, title = (ax.set_ylabel, ax.set_title) if across else (ax.set_title, ax.set_ylabel)
            if row == 0:
                label(names[column], fontsize=8)
            if titles and column == 0:
                title(titles[row], fontsize=8)
    return fig


@styled
def gate_histogram(gates: Mapping[str, Tensor], *, bins: int = 40) -> Figure:
    """How the gates (N, C) of each network are distributed over all samples and channels, one panel each."""
    fig, axes = figure(3.2 * len(gates), 2.4, 1, len(gates), sharey=True)
    for ax, (name, values) in zip(axes[0], gates.items(), strict=True):
        flat = values.flatten().numpy()
        sns.histplot(x=flat, bins=bins, binrange=(0, 1), stat="percent", ax=ax, color=OURS, edgecolor="none")
        ax.set(
            title=f"{name}: {100 * float((flat > 0.5).mean()):.0f} % of gates above ½",
            xlabel="gate s",
            ylabel="% of gates",
            xlim=(0, 1),
        )
    return fig


@styled
def channel_curves(
    curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, whole: float, ylabel: str
) -> Figure:
    """Accuracy against the share of channels kept or removed.

    Args:
        curves: {panel: {line: (shares in %, values)}}; a line whose name begins with "random" is drawn as a control.
        whole: the value with all channels, a dashed line in every panel.
    """
    fig, axes = figure(3.2 * len(curves) + 1.2, 2.6, 1, len(curves), sharey=True)
    for ax, (title, lines) in zip(axes[0], curves.items(), strict=True):
        palette = iter([OURS, OTHERS, "#009E73", "#CC79A7"])
        for name, (x, y) in lines.items():
            control = name.startswith("random")
            ax.plot(
                x,
                y,
                marker="o",
                markersize=3,
                label=name,
                color=CONTROLS if control else next(palette),
                linestyle=":" if control else "-",
            )
        ax.axhline(whole, color="black", linewidth=0.8, linestyle="--")
        ax.set(title=title, xscale="log", xlabel="% of channels", ylabel=ylabel, ylim=(0, None))
        ax.set_xticks(sorted({v for x, _ in lines.values() for v in x}))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return fig


@styled
def rank_plot(
    scores: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    ours: Sequence[str],
    controls: Sequence[str],
    lower_is_better: Sequence[str] = (),
) -> Figure:
    """Methods ranked on each metric: {metric: {method: (mean, low, high)}}, the best on top, the 95 % interval as a bar."""
    height = 0.19 * max(len(rows) for rows in scores.values()) + 0.6
    fig, axes = figure(3.3 * len(scores), height, 1, len(scores))
    for ax, (metric, rows) in zip(axes[0], scores.items(), strict=True):
        lower = metric in lower_is_better
        order = sorted(rows, key=lambda name: rows[name][0], reverse=not lower)
        for place, name in enumerate(order):
            mean, low, high = rows[name]
            colour = OURS if name in ours else CONTROLS if name in controls else OTHERS
            ax.plot([low, high], [place, place], color=colour, linewidth=1.5)
            ax.plot(mean, place, "o", color=colour, markersize=4)
        ax.set_yticks(range(len(order)), order, fontsize=7)
        for tick, name in zip(ax.get_yticklabels(), order, strict=True):
            tick.set_color(OURS if name in ours else "black")
        ax.invert_yaxis()
        ax.set_title(f"{metric} ({'lower' if lower else 'higher'} is better)")
    return fig


@styled
def channel_strip(image: Tensor, maps: Tensor, labels: Sequence[str]) -> Figure:
    """An image uint8 (3, H, W) and the maps (n, h, w) of single channels, each on its own scale, with a label each."""
    fig, axes = figure(1.1 * (len(maps) + 1), 1.45, 1, len(maps) + 1)
    axes[0][0].imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    for ax, one, label in zip(axes[0][1:], maps, labels, strict=True):
        ax.imshow(one.numpy(), cmap=COLORMAP, interpolation="nearest")
        ax.set_title(label, fontsize=7)
    for ax in axes[0]:
        ax.set_axis_off()
    return fig


@styled
def contact_sheet(images: Tensor, *, columns: int = 12, titles: Sequence[str] = ()) -> Figure:
    """Many images uint8 (N, 3, H, W) on one page."""
    rows = -(-len(images) // columns)
    fig, axes = figure(0.78 * columns, 0.95 * rows + (0.2 * rows if titles else 0), rows, columns)
    for ax in axes.flat:
        ax.set_axis_off()
    for place, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        if titles:
            ax.set_title(titles[place], fontsize=6)
    return fig


@styled
def attribute_grid(
    images: Tensor, heatmaps: Mapping[str, Tensor], said: Mapping[str, Tensor], *, titles: Sequence[str] = ()
) -> Figure:
    """Attributes down, persons across; a map only where the network says that the attribute is there.

    Args:
        images: uint8 (B, 3, H, W).
        heatmaps: {attribute: (B, H, W) in [0, 1]}.
        said: {attribute: probabilities (B,)}.
    """
    shape = (len(heatmaps) + 1, len(images))
    fig, axes = figure(1.0 * shape[1] + 0.9, 1.2 * shape[0], *shape)
    for column, image in enumerate(images):
        axes[0][column].imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        if titles:
            axes[0][column].set_title(titles[column], fontsize=7)
        for row, (name, maps) in enumerate(heatmaps.items(), 1):
            there = float(said[name][column]) > 0.5
            picture = overlay(image, maps[column]) if there else image.float().mean(0).div(255).numpy()
            options: dict[str, Any] = {} if there else {"cmap": "gray", "vmin": -0.6, "vmax": 1.4}
            axes[row][column].imshow(picture, interpolation="nearest", **options)
            axes[row][column].set_title(f"{float(said[name][column]):.0%}", fontsize=7, pad=2)
            if column == 0:
                axes[row][0].set_ylabel(name, fontsize=7)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        sns.despine(ax=ax, left=True, bottom=True)
    return fig


@styled
def side_by_side(values: Mapping[str, Sequence[float]], names: Sequence[str], *, xlabel: str) -> Figure:
    """One dot for every name and series, {series: (n,)}; the names sorted by the first series."""
    first = next(iter(values.values()))
    order = sorted(range(len(names)), key=lambda i: first[i])
    fig, axes = figure(5.6, 0.165 * len(names) + 0.7)
    ax = axes[0][0]
    for (label, series), colour, marker in zip(
        values.items(), (OTHERS, OURS, "#009E73", "#CC79A7"), "oDs^", strict=False
    ):
        ax.plot(
            [series[i] for i in order],
            range(len(order)),
            marker,
            color=colour,
            markersize=4,
            label=label,
            alpha=0.85,
        )
    ax.set_yticks(range(len(order)), [names[i] for i in order], fontsize=7)
    ax.set(xlabel=xlabel, ylim=(-0.7, len(order) - 0.3))
    ax.legend(loc="lower right")
    return fig


@styled
def part_grid(values: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> Figure:
    """{attribute: {part: (a, b)}} as two coloured tables, parts down and attributes across: a on the left, b on the right."""
    parts = sorted(
        {part for row in values.values() for part in row},
        key=lambda part: -max(row.get(part, (0,))[0] for row in values.values()),
    )
    titles = ("energy of influence, times the part's area", "fall of the logit without the part")
    fig, axes = figure(8.5, 0.23 * len(parts) + 0.8, 1, 2, sharey=True)
    for side, (ax, title) in enumerate(zip(axes[0], titles, strict=True)):
        cells = np.array([[_cell(row, part, side) for row in values.values()] for part in parts], float)
        options: dict[str, Any] = {"cmap": COLORMAP} if side == 0 else {"cmap": "vlag", "center": 0}
        sns.heatmap(
            cells,
            ax=ax,
            annot=True,
            fmt=".1f",
            xticklabels=list(values),
            yticklabels=parts,
            annot_kws={"size": 7},
            **options,
        )
        ax.set_title(title)
        ax.tick_params(axis="y", rotation=0)
    return fig


def _cell(row: Mapping[str, tuple[float, float | None]], part: str, side: int) -> float:
    value = row[part][side] if part in row else None
    return float("nan") if value is None else value


Frames = Tensor | NDArray[Any]
BESIDE: dict[str, Any] = {
    "loc": "center left",
    "bbox_to_anchor": (1.005, 0.5),
    "fontsize": 7,
    "frameon": False,
    "borderpad": 0.2,
    "handlelength": 1.6,
}


@styled
def film_strip(
    frames: Frames | Mapping[str, Frames],
    maps: Frames | Mapping[str, Frames] | None = None,
    *,
    scores: Frames | Mapping[str, Frames] | None = None,
    labels: Frames | None = None,
    wave: NDArray[Any] | None = None,
    shares: Mapping[str, Frames] | None = None,
    masks: Mapping[str, Frames] | None = None,
    shown: int | Sequence[int] = 10,
    fps: float = 25.0,
    rate: int = 16000,
    title: str = "",
) -> Figure:
    """Crops of a clip in a row, with their heatmaps, over what was heard, said and true at the time.

    Args:
        frames: grey (T, H, W), uint8 or in [0, 1]; or {row: frames} for several rows, such as face and body.
        maps: heatmaps in [0, 1] of the same shape, or {row: maps}; a row without one is shown as it is. The colours reach up to the
            largest value in the frames shown, in each row: in a clip that peaks between them all would be pale.
        scores: probability of speaking (T,), or {line: probabilities}.
        labels: 0/1 (T,): the true speech is a shaded band.
        wave: the sound track (N,), from the first frame on, ``rate`` samples a second.
        shares: {modality: (T,)}, not negative: stacked areas, scaled to sum to 1 in each frame.
        masks: {row: bool (T, H, W)}: the truth, outlined in white.
        shown: how many frames, evenly spread, or which.

    Raises:
        ValueError: rows of different lengths, maps or masks of a row that there is not, frames outside the clip, negative shares.
    """
    rows = dict(frames) if isinstance(frames, Mapping) else {"": frames}
    over = dict(maps) if isinstance(maps, Mapping) else {} if maps is None else {"": maps}
    lines = dict(scores) if isinstance(scores, Mapping) else {} if scores is None else {"model": scores}
    truth = dict(masks or {})
    length = len(next(iter(rows.values())))
    check_clip(
        rows,
        {**over, **{f"mask of {row}": mask for row, mask in truth.items()}},
        {"labels": labels, **lines, **(shares or {})},
    )
    if isinstance(shown, int):
        count = max(1, min(shown, length))
        which = [int((i + 0.5) * length / count) for i in range(count)]
    else:
        which = list(shown)
    if not which or min(which) < 0 or max(which) >= length:
        raise ValueError(f"shown={shown} is not within the {length} frames of the clip")

    panels = (
        [("sound", 0.45)] * (wave is not None)
        + [("p(speaking)", 0.8)] * bool(lines)
        + [("truth", 0.3)] * (labels is not None and not lines and wave is None)
        + [("share", 0.8)] * bool(shares)
    )
    # Laid out in inches, so that the crops are square and stand over their time.
    left, side, gap = 0.6, min(8.0 / len(which), 1.6), 0.08
    width, right = side * len(which), 1.1 if lines or shares else 0.1
    top, below = 0.42 if title else 0.2, 0.4 if panels else 0.05
    across, total = (
        left + width + right,
        top + sum(tall + gap for _, tall in panels) + (side + gap / 2) * len(rows) + below,
    )
    fig = Figure(figsize=(across, total))

    def axes(tall: float, space: float) -> Axes:
        nonlocal top
        top += tall + space
        return fig.add_axes((left / across, 1 - top / total, width / across, tall / total))

    for row, clip in rows.items():
        ax = axes(side, gap / 2)
        _strip_row(ax, pixels(clip)[which], over.get(row), truth.get(row), which)
        ax.set_ylabel(row, fontsize=8)
        if row == next(iter(rows)):
            for place, frame in enumerate(which):
                ax.text(
                    (place + 0.5) / len(which),
                    1.02,
                    f"{frame / fps:.2f} s",
                    transform=ax.transAxes,
                    ha="center",
                    va="bottom",
                    fontsize=7,
                )
    for name, tall in panels:
        ax = axes(tall, gap)
        for start, stop in spans(labels) if labels is not None and name != "share" else ():
            ax.axvspan(start / fps, stop / fps, color=TRUTH, alpha=0.2, linewidth=0)
        if name == "sound" and wave is not None:
            ends = envelope(wave[: round(length / fps * rate)], 600)
            ax.fill_between(
                np.linspace(0, min(len(wave) / rate, length / fps), 600),
                *ends.T,
                color="#444444",
                linewidth=0.3,
            )
            ax.set(ylim=(-1.05, 1.05), yticks=[])
        elif name == "share" and shares:
            _share_areas(ax, shares, np.arange(length + 1) / fps)
        else:
            _score_lines(ax, lines, labels is not None, (np.arange(length) + 0.5) / fps)
        for frame in which:
            ax.axvline((frame + 0.5) / fps, color="#666666", linewidth=0.5, linestyle=":", zorder=0.5)
        ax.grid(axis="x", visible=False)
        ax.set_ylabel(name, fontsize=8)
        ax.set_xlim(0, length / fps)
        ax.tick_params(labelsize=7, labelbottom=name == panels[-1][0], pad=1)
    if panels:
        ax.set_xlabel("seconds", fontsize=8, labelpad=1)
    if title:
        fig.text((left + width / 2) / across, 1 - 0.05 / total, title, ha="center", va="top", fontsize=9)
    return fig


def check_clip(rows: Mapping[str, Any], over: Mapping[str, Any], timed: Mapping[str, Any]) -> None:
    length = len(next(iter(rows.values())))
    for row, clip in rows.items():
        if clip.ndim != 3 or len(clip) != length:
            raise ValueError(
                f"the frames {row!r} have the shape {tuple(clip.shape)}: ({length}, H, W) is needed"
            )
    for name, maps in over.items():
        row = name.removeprefix("mask of ")
        if row not in rows:
            raise ValueError(
                f"there are maps or masks for {row!r}, but only the rows {', '.join(map(repr, rows))}"
            )
        if tuple(maps.shape) != tuple(rows[row].shape):
            raise ValueError(
                f"{name!r} has the shape {tuple(maps.shape)}, but its frames have {tuple(rows[row].shape)}: pass size="
            )
    for name, values in timed.items():
        if values is not None and tuple(values.shape) != (length,):
            raise ValueError(f"{name!r} has the shape {tuple(values.shape)}, but there are {length} frames")


def _strip_row(
    ax: Axes, crops: NDArray[np.uint8], maps: Frames | None, masks: Frames | None, which: list[int]
) -> None:
    """The crops (n, H, W) side by side, with a white line between them."""
    between = max(2, crops.shape[2] // 28)

    def joined(parts: NDArray[Any], blank: Any) -> NDArray[Any]:
        padding = [(0, 0), (0, 0), (between // 2, between - between // 2)] + [(0, 0)] * (parts.ndim - 3)
        return np.concatenate(list(np.pad(parts, padding, constant_values=blank)), axis=1)

    if maps is None:
        colours = np.repeat(crops[..., None], 3, axis=3)
    else:
        levels = np.asarray(pixels(maps[which]), dtype=float)
        colours = tint(crops, levels / max(levels.max(), 1))
    ax.imshow(joined(colours, 255), interpolation="bilinear", aspect="auto")
    if masks is not None and bool(masks[which].any()):
        ax.contour(joined(pixels(masks[which]) > 0, False), levels=[0.5], colors="white", linewidths=0.7)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    sns.despine(ax=ax, left=True, bottom=True)


def _score_lines(ax: Axes, lines: Mapping[str, Frames], banded: bool, seconds: NDArray[Any]) -> None:
    for (name, values), colour, style in zip(
        lines.items(), (OURS, OTHERS, "#CC79A7"), ("-", "--", ":"), strict=False
    ):
        ax.plot(
            seconds, np.asarray(values, dtype=float), color=colour, linestyle=style, linewidth=1.4, label=name
        )
    ax.axhline(0.5, color="#666666", linewidth=0.6, zorder=1)
    ax.set(ylim=(-0.04, 1.04), yticks=[0, 0.5, 1])
    if banded:
        ax.fill_between([], [], color=TRUTH, alpha=0.2, linewidth=0, label="truth")
    if len(lines) > 1 or banded:
        ax.legend(**BESIDE)


def _share_areas(ax: Axes, shares: Mapping[str, Frames], seconds: NDArray[Any]) -> None:
    values = np.array([np.asarray(share, dtype=float) for share in shares.values()])
    if (values < 0).any():
        raise ValueError("shares must not be negative: pass the size of the influence")
    whole = values.sum(0)
    parts = np.divide(values, whole, out=np.full_like(values, np.nan), where=whole > 0)
    colours = modality_colours(shares)
    steps = np.concatenate([parts, parts[:, -1:]], axis=1)  # each frame lasts until the next
    areas = ax.stackplot(
        seconds, steps, step="post", labels=list(shares), colors=list(colours.values()), alpha=0.85
    )
    for area, hatch in zip(areas, ("", "///", "...", "xx", "\\\\"), strict=False):
        area.set(hatch=hatch, edgecolor="white", linewidth=0)
    ax.set(ylim=(0, 1), yticks=[0, 0.5, 1])
    ax.legend(**BESIDE)


@styled
def modality_bars(
    values: Mapping[str, Mapping[str, tuple[float, float, float]]], *, ylabel: str = "share of the influence"
) -> Figure:
    """What each modality counts for in each condition: {condition: {modality: (mean, low, high)}}, the interval as a line.

    Raises:
        ValueError: conditions that do not name the same modalities.
    """
    names = list(next(iter(values.values())))
    for condition, row in values.items():
        if list(row) != names:
            raise ValueError(f"{condition!r} has the modalities {list(row)}, the first condition {names}")
    fig, axes = figure(1.0 + 1.25 * len(values), 2.6)
    ax = axes[0][0]
    width = 0.8 / len(names)
    for i, (name, colour, hatch) in enumerate(
        zip(names, modality_colours(names).values(), ("", "///", "...", "xx", "\\\\"), strict=False)
    ):
        places = np.arange(len(values)) + (i - (len(names) - 1) / 2) * width
        mean, low, high = np.array([row[name] for row in values.values()]).T
        ax.bar(
            places, mean, 0.92 * width, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=name
        )
        ax.vlines(places, low, high, color="black", linewidth=1.2)
    ax.set_xticks(range(len(values)), [condition.replace(" ", "\n", 1) for condition in values])
    ax.set(
        ylabel=ylabel,
        ylim=(None if min(v[1] for row in values.values() for v in row.values()) < 0 else 0, None),
    )
    ax.grid(axis="x", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return fig


@styled
def agreement_plot(values: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """What gates say a modality is worth against what it is worth: {panel: {modality: (influence, fall of the logit)}}, a point a clip."""
    fig, axes = figure(2.6 * len(values) + 1.2, 2.6, 1, len(values), sharex=True, sharey=True)
    for ax, (title, groups) in zip(axes[0], values.items(), strict=True):
        ax.axhline(0, color="black", linewidth=0.6)
        ax.axvline(0, color="black", linewidth=0.6)
        for (name, (said, true)), colour, marker in zip(
            groups.items(), modality_colours(groups).values(), "os^Dv", strict=False
        ):
            ax.plot(said, true, marker, color=colour, markersize=4, alpha=0.75, markeredgewidth=0, label=name)
        ax.set(
            title=title,
            xlabel="influence of the modality",
            ylabel="fall of the logit when muted" if ax is axes[0][0] else "",
        )
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return fig


def sorted_gates(ax: Axes, gates: Tensor, chosen: Tensor, *, label: str = "gate s") -> None:
    """Draw channel weights (C,) in falling order into ``ax``, the chosen ones, bool (C,), coloured."""
    order = gates.argsort(descending=True)
    colours = np.where(chosen[order].numpy(), OURS, "#cccccc")
    ax.vlines(np.arange(len(order)), 0, gates[order].numpy(), colors=list(colours), linewidth=2)
    ax.set(
        xlabel=f"{len(order)} channels, sorted",
        ylabel=label,
        title=f"{int(chosen.sum())} channels selected",
        xlim=(-0.5, len(order) - 0.5),
    )


@styled
def explored(
    picture: NDArray[np.uint8], weights: Tensor, chosen: Tensor, *, label: str, caption: str
) -> Figure:
    """What the explorer shows, as one figure: the picture (H, W, 3), the sorted channel weights (C,), and the caption under them."""
    height, width = picture.shape[:2]
    fig = Figure(figsize=(width / 96 + 3.2, height / 96 + 0.45), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(width / 96, 3.2))
    left.imshow(picture, interpolation="nearest")
    left.set_axis_off()
    sorted_gates(right, weights, chosen, label=label)
    fig.supxlabel(caption, fontsize=7)
    return fig


def screen(fig: Figure) -> bytes:
    """A figure as PNG bytes, at the size and in the colours of a screen.

    It has 256 colours of its own, which nobody sees and which keeps a notebook of many pictures small.
    """
    large = BytesIO()
    fig.savefig(large, format="png", dpi=192, bbox_inches="tight", metadata={"Software": None})
    with Picture.open(large) as drawn:
        small = drawn.convert("RGB").resize((drawn.width // 2, drawn.height // 2), Picture.Resampling.LANCZOS)
    shown = BytesIO()
    small.quantize(256, dither=Picture.Dither.NONE).save(shown, "PNG", optimize=True)
    return shown.getvalue()


def display_figure(fig: Figure, name: str, out: str | None = None, *, profile: str | None = None) -> None:
    """Save a figure for the report (PNG and PDF) and show it below the notebook cell."""
    from IPython.display import Image, display

    from studies.results import save_figure

    save_figure(fig, name, out, profile=profile)
    display(Image(data=screen(fig)))  # type: ignore[no-untyped-call]
