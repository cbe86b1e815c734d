"""The figures of the studies, in the style of :mod:`studies.style`: numbers in, a Figure out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from torch import Tensor

from selib import NormalQuantile
from selib.plot import COLORMAP, CONTROLS, OTHERS, OURS, rgb, tint
from studies.clip_figures import (  # the figures of clips belong to this module's names
    GREEN,
    PINK,
    Interval,
    agreement_plot,  # noqa: F401
    film_strip,  # noqa: F401
    modality_bars,  # noqa: F401
)
from studies.style import figure, hide_frame, styled

OPACITY = 0.75  # of a heatmap where it is 1: the picture stays visible beneath

# ---- images and their heatmaps ----------------------------------------------------------------------


@styled
def heatmap_grid(
    images: Tensor,
    heatmaps: Mapping[str, Tensor],
    *,
    titles: Sequence[str] = (),
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Samples beside methods; the longer of the two runs across the page. The pictures under maps are grey.

    Args:
        images: uint8 (B, 3, H, W).
        heatmaps: {method: (B, H, W) in [0, 1]}.
        titles: one for each image.
        boxes, masks: the truth, int (B, 4) or bool (B, H, W), outlined in white.
        notes: {method: a short text for each image}, written into the tiles, such as "AP .71".
    """
    across = len(images) > len(heatmaps) + 1
    shape = (len(heatmaps) + 1, len(images)) if across else (len(images), len(heatmaps) + 1)
    height, width = images.shape[2:]
    side = 1.25 if max(height, width) < 128 else 1.75
    tall = side * min(1.4, height / width)
    fig, axes = figure(side * shape[1] + 0.8, tall * shape[0] + 0.35, *shape)
    cells = axes.T if across else axes
    for row, image in enumerate(images):
        pictures = {"image": rgb(image)}
        pictures |= {name: heated(image, maps[row]) for name, maps in heatmaps.items()}
        for ax, (name, picture) in zip(cells[row], pictures.items(), strict=True):
            ax.imshow(picture, interpolation="nearest")
            hide_frame(ax)
            _outline(ax, None if boxes is None else boxes[row], None if masks is None else masks[row])
            if notes and name in notes:
                _note(ax, notes[name][row])
            if row == 0:
                _label(ax, name, tall if across else side, left=across)
        if titles:
            _label(cells[row][0], titles[row], side if across else tall, left=not across)
    _heat_bar(fig, axes)
    return fig


def heated(image: Tensor, heatmap: Tensor) -> NDArray[np.uint8]:
    """A heatmap (H, W) over the grey of an image uint8 (3, H, W), as opaque as it is hot."""
    grey = rgb(image).mean(2).round().astype(np.uint8)
    return tint(grey, heatmap.detach().cpu().numpy(), opacity=OPACITY)


def _heat_bar(fig: Figure, axes: NDArray[Any]) -> None:
    """A colour bar at the side: what the heat looks like over a middle grey."""
    ramp = np.linspace(0, 1, 256)[None]
    shades = tint(np.full(ramp.shape, 128, np.uint8), ramp, opacity=OPACITY)[0] / 255
    bar = fig.colorbar(
        ScalarMappable(cmap=ListedColormap(shades)), ax=axes, fraction=0.03, pad=0.01, aspect=25
    )
    bar.set_ticks([0, 1], labels=["0", "largest"], fontsize=7)
    bar.set_label("heat of each map", fontsize=7, labelpad=-14)
    bar.outline.set_visible(False)


def _outline(ax: Axes, box: Tensor | None, mask: Tensor | None) -> None:
    """The truth in white, in the pixels of the image."""
    if box is not None:
        x1, y1, x2, y2 = box.tolist()
        corner = (x1 - 0.5, y1 - 0.5)
        ax.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=1))
    if mask is not None and mask.any():
        ax.contour(mask.float().numpy(), levels=[0.5], colors="white", linewidths=0.8)


def _note(ax: Axes, text: str) -> None:
    """A small text in the lower left corner of a tile, readable on any picture."""
    written = ax.text(0.03, 0.03, text, transform=ax.transAxes, va="bottom", color="white", fontsize=7)
    written.set_path_effects([withStroke(linewidth=1.8, foreground="black")])


def _label(ax: Axes, text: str, inches: float, *, left: bool) -> None:
    """A small label at the left of the axes, or above them, that stays within ``inches``."""
    write = ax.set_ylabel if left else ax.set_title
    write(fitted(text, inches), fontsize=8)


def fitted(text: str, inches: float, lines: int = 3) -> str:
    """Text of 8 points wrapped to a width, with an ellipsis where it takes more than ``lines`` lines."""
    letters = max(4, int(inches * 15))
    wrapped = [
        part for line in text.split("\n") for part in textwrap.wrap(line, letters, break_on_hyphens=False)
    ]
    if len(wrapped) > lines:
        wrapped[lines - 1] = wrapped[lines - 1][: letters - 1] + "…"
    return "\n".join(wrapped[:lines])


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
    """How gates (N, C) are distributed over all samples and channels, one panel for each network.

    The line is the cut of the paper's rule, mean + 1.2816·std of a sample's gates, averaged over samples:
    where it exceeds 1 the rule selects nothing.
    """
    cuts = {name: float((s.mean(1) + NormalQuantile().z * s.std(1)).mean()) for name, s in gates.items()}
    fig, axes = figure(3.2 * len(gates), 2.6, 1, len(gates), sharey=True)
    for ax, (name, values) in zip(axes[0], gates.items(), strict=True):
        flat, cut = values.flatten().numpy(), cuts[name]
        share = np.full(len(flat), 100 / len(flat))
        ax.hist(
            flat, bins=40, range=(0, 1), weights=share, color=OURS, alpha=0.75, edgecolor="none", log=True
        )
        ax.axvline(cut, color=OTHERS, linewidth=1.4, label=f"the paper's cut, {cut:.2f}")
        opened = f"{100 * float((flat > 0.5).mean()):.0f} % of gates above ½"
        ax.set_title(f"{fitted(name, 3)}\n{opened} (n = {len(values)})")
        ax.set(xlabel="gate s", xlim=(0, max(1.0, 1.05 * cut)))
        ax.legend(loc="upper center", fontsize=7)
    axes[0][0].set_ylabel("% of gates")
    return fig


@styled
def channel_strip(
    image: Tensor,
    maps: Tensor,
    labels: Sequence[str],
    *,
    box: Tensor | None = None,
    mask: Tensor | None = None,
) -> Figure:
    """An image uint8 (3, H, W) and the maps (n, h, w) of single channels, each on its own scale.

    Args:
        box, mask: where the object is, int (4,) or bool (H, W), outlined in white.
    """
    height, width = image.shape[1:]
    place = (-0.5, width - 0.5, height - 0.5, -0.5)  # maps lie over the image
    fig, axes = figure(1.1 * (len(maps) + 1), 0.4 + 1.05 * height / width, 1, len(maps) + 1)
    axes[0][0].imshow(rgb(image), interpolation="nearest")
    for ax, one, label in zip(axes[0][1:], maps, labels, strict=True):
        ax.imshow(one.numpy(), cmap=COLORMAP, interpolation="nearest", extent=place)
        ax.set_title(label, fontsize=7)
    for ax in axes[0]:
        _outline(ax, box, mask)
        ax.set_axis_off()
    return fig


# ---- methods and channels --------------------------------------------------------------------------


@styled
def channel_curves(
    curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, whole: float, ylabel: str
) -> Figure:
    """Accuracy against the share of channels that are kept or removed.

    Args:
        curves: {panel: {line: (shares in %, values)}}; lines whose names begin with "random" are controls.
        whole: the value with all channels, a dashed line in every panel.
    """
    fig, axes = figure(3.2 * len(curves) + 1.2, 2.6, 1, len(curves), sharey=True)
    for ax, (title, lines) in zip(axes[0], curves.items(), strict=True):
        palette = iter([OURS, OTHERS, GREEN, PINK])
        for name, (x, y) in lines.items():
            control = name.startswith("random")
            colour = CONTROLS if control else next(palette)
            ax.plot(x, y, ":o" if control else "-o", color=colour, markersize=3, label=name)
        ax.axhline(whole, color="black", linewidth=0.8, linestyle="--")
        ax.set(title=title, xscale="log", xlabel="% of channels", ylabel=ylabel, ylim=(0, None))
        ax.set_xticks(sorted({v for x, _ in lines.values() for v in x}))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return fig


@styled
def difference_plot(
    differences: Mapping[str, Mapping[str, tuple[Interval, int]]],
    *,
    ours: Sequence[str],
    controls: Sequence[str],
    reference: str = "mean of channels",
) -> Figure:
    """Paired gains over ``reference`` with their intervals, one panel a measure, sorted by the first.

    Args:
        differences: {measure: {method: ((mean, low, high), n)}}; a label has the n of every measure.
    """
    first = next(iter(differences.values()))
    order = sorted(first, key=lambda name: first[name][0][0], reverse=True)
    colours = {n: OURS if n in ours else CONTROLS if n in controls else OTHERS for n in order}
    size = 2.3 * len(differences) + 2.8, 0.19 * len(order) + 1.1
    fig, axes = figure(*size, 1, len(differences), sharey=True)
    for ax, (measure, rows) in zip(axes[0], differences.items(), strict=True):
        ax.axvline(0, color="black", linewidth=0.8)
        for place, name in enumerate(order):
            (mean, low, high), _ = rows[name]
            ax.plot([low, high], [place, place], color=colours[name], linewidth=1.5)
            ax.plot(mean, place, "o", color=colours[name], markersize=4)
        ax.set(title=measure)
    counts = [dict.fromkeys(str(rows[name][1]) for rows in differences.values()) for name in order]
    labels = [f"{name} (n = {', '.join(n)})" for name, n in zip(order, counts, strict=True)]
    axes[0][0].set_yticks(range(len(order)), labels, fontsize=7)
    for tick, name in zip(axes[0][0].get_yticklabels(), order, strict=True):
        tick.set_color(OURS if name in ours else "black")
    axes[0][0].invert_yaxis()
    kinds = (("SE vector", OURS), ("others", OTHERS), ("controls", CONTROLS))
    handles = [axes[0][0].plot([], [], "o-", color=c, markersize=4, label=kind)[0] for kind, c in kinds]
    fig.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
    fig.supxlabel(f"gain over {reference}, paired, 95 % interval", fontsize=8, x=1, ha="right")
    return fig


@styled
def frontier_plot(
    points: Mapping[str, Mapping[str, tuple[Interval, int, float, float]]], margin: float
) -> Figure:
    """What sparse gates say, above, and what they cost, below, by λ: one column for each network.

    Args:
        points: {network: {λ: (accuracy minus that without gates, in points; over how many seeds; the share of
            the predictions that the top decile of gates keeps alone, and without it)}}, in the order of λ.
        margin: points of accuracy that a block may cost. Two seeds give no interval worth drawing.
    """
    fig, axes = figure(2.6 * len(points) + 1.3, 4.0, 2, len(points), sharex="col", sharey="row")
    for (above, below), (network, rows) in zip(axes.T, points.items(), strict=True):
        gains, seeds, only, without = zip(*rows.values(), strict=True)
        places = np.arange(len(rows))
        above.plot(places, only, "o-", color=OURS, markersize=5, label="top decile only")
        above.plot(places, without, "s-", color=OTHERS, markersize=5, label="without it")
        below.axhline(0, color="black", linewidth=0.8)
        below.axhline(-margin, color="black", linewidth=0.8, linestyle=":", label="margin")
        below.plot(places, [gain.mean for gain in gains], "o", color=OURS, markersize=5)
        for place, gain, count in zip(places, gains, seeds, strict=True):
            if count > 2:
                below.vlines(place, gain.low, gain.high, color=OURS, linewidth=1.6)
        above.set(title=fitted(network, 2.4), ylim=(-0.03, 1.05))
        below.set(xlabel="λ", xticks=places, xticklabels=list(rows))
    axes[0][0].set_ylabel("predictions kept")
    axes[1][0].set_ylabel("accuracy gained, points")
    for row in axes:
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return fig


# ---- attributes of faces ---------------------------------------------------------------------------


@styled
def attribute_grid(images: Tensor, heatmaps: Mapping[str, Tensor], said: Mapping[str, Tensor]) -> Figure:
    """Attributes down, persons across; a map only where the network says that the attribute is there.

    Args:
        images: uint8 (B, 3, H, W).
        heatmaps: {attribute: (B, H, W) in [0, 1]}.
        said: {attribute: probabilities (B,)}.
    """
    rows, columns = len(heatmaps) + 1, len(images)
    fig, axes = figure(1.0 * columns + 0.9, 1.2 * rows, rows, columns)
    for column, image in enumerate(images):
        axes[0][column].imshow(rgb(image), interpolation="nearest")
        for ax, (name, maps) in zip(axes[1:, column], heatmaps.items(), strict=True):
            if said[name][column] > 0.5:
                ax.imshow(heated(image, maps[column]), interpolation="nearest")
            else:
                faint = image.float().mean(0).div(255).numpy()
                ax.imshow(faint, interpolation="nearest", cmap="gray", vmin=-0.6, vmax=1.4)
            ax.set_title(f"{float(said[name][column]):.0%}", fontsize=7, pad=2)
    for ax, name in zip(axes[1:, 0], heatmaps, strict=True):
        ax.set_ylabel(name, fontsize=7)
    for ax in axes.flat:
        hide_frame(ax)
    return fig


@styled
def dot_plot(intervals: Sequence[Interval], names: Sequence[str], *, xlabel: str) -> Figure:
    """A mean and its interval for every name, sorted; those that leave out zero are coloured."""
    order = sorted(range(len(names)), key=lambda i: intervals[i][0])
    fig, axes = figure(5.6, 0.165 * len(names) + 0.7)
    ax = axes[0][0]
    ax.axvline(0, color=CONTROLS, linewidth=0.8)
    for place, i in enumerate(order):
        mean, low, high = intervals[i]
        colour = CONTROLS if low <= 0 <= high else OURS if mean > 0 else OTHERS
        ax.plot([low, high], [place, place], color=colour, linewidth=1.2)
        ax.plot(mean, place, "o", color=colour, markersize=4)
    ax.set_yticks(range(len(order)), [names[i] for i in order], fontsize=7)
    ax.set(xlabel=xlabel, ylim=(-0.7, len(order) - 0.3))
    return fig


@styled
def part_grid(values: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> Figure:
    """{attribute: {part: (energy, fall or None)}} as two coloured tables, the parts down."""
    import seaborn  # with pandas and SciPy: seconds that no other figure has to wait for

    largest: dict[str, float] = {}
    for row in values.values():
        for part, (energy, _) in row.items():
            largest[part] = max(energy, largest.get(part, 0))
    parts = sorted(largest, key=lambda part: -largest[part])
    missing = (np.nan, np.nan)
    cells = np.array([[row.get(part, missing) for row in values.values()] for part in parts], dtype=float)
    fig, axes = figure(8.5, 0.23 * len(parts) + 0.8, 1, 2, sharey=True)
    names = {"xticklabels": list(values), "yticklabels": parts}
    numbers = {"annot": True, "fmt": ".1f", "annot_kws": {"size": 7}}
    left, right = axes[0]
    seaborn.heatmap(cells[..., 0], ax=left, cmap=COLORMAP, **names, **numbers)
    seaborn.heatmap(cells[..., 1], ax=right, cmap="vlag", center=0, **names, **numbers)
    left.set_title("energy of influence, times the part's area")
    right.set_title("fall of the logit without the part")
    for ax in (left, right):
        ax.tick_params(axis="y", rotation=0)
    return fig
