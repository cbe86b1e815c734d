"""The figures of clips and of modalities, in the style of :mod:`studies.style`: numbers in, a Figure out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from selib.plot import CONTROLS, OTHERS, OURS, pixels, tint
from studies.clips import RATE, Frames, check_clip, envelope, spans
from studies.style import figure, hide_frame, styled

FPS = 25  # of the clips in film strips
GREEN, PINK, SKY = "#009E73", "#CC79A7", "#56B4E9"  # more of Okabe & Ito's palette
TRUTH = GREEN
MODALITIES = {"audio": "#E69F00", "face": OURS, "body": GREEN}
HATCHES = ("", "///", "...", "xx", "\\\\")  # modalities are told apart without colours, too
Interval = tuple[float, float, float]  # mean, and the ends of its 95 % interval


def modality_colours(names: Iterable[str]) -> dict[str, str]:
    """A fixed colour for each of the usual modalities, and others for others."""
    rest = iter((PINK, SKY, OTHERS))
    return {name: MODALITIES.get(name) or next(rest, CONTROLS) for name in names}


@styled
def film_strip(
    frames: Mapping[str, Frames],
    maps: Mapping[str, Frames] | None = None,
    *,
    scores: Frames | None = None,
    labels: Frames | None = None,
    wave: NDArray[Any] | None = None,
    shares: Mapping[str, Frames] | None = None,
    shown: int = 10,
) -> Figure:
    """Crops of a clip in rows, with their heatmaps, over what was heard, said and true at the time.

    Args:
        frames: {row: grey (T, H, W)}, uint8 or in [0, 1].
        maps: {row: heatmaps in [0, 1] of the same shape}; a row without them is shown as it is. The colours
            of a row reach up to the largest value in the frames shown: a clip may peak between them.
        scores: probability of speaking (T,).
        labels: 0/1 (T,): the true speech is a shaded band.
        wave: the sound track (N,) at 16 kHz.
        shares: {modality: (T,)}, not negative: stacked areas, scaled to sum to 1 in each frame.
        shown: how many frames, evenly spread.
    """
    maps, length = maps or {}, len(next(iter(frames.values())))
    check_clip(frames, maps, {"scores": scores, "labels": labels, **(shares or {})})
    shown = min(shown, length)
    which = [int((i + 0.5) * length / shown) for i in range(shown)]
    panels: dict[str, tuple[float, Callable[[Axes], None]]] = {}  # height in inches, and what draws it
    if wave is not None:
        panels["sound"] = 0.45, partial(_draw_sound, wave=wave[: length * RATE // FPS])
    if scores is not None:
        panels["p(speaking)"] = 0.8, partial(_draw_scores, scores=scores, labelled=labels is not None)
    elif labels is not None and wave is None:
        panels["truth"] = 0.3, partial(_draw_scores, scores=None, labelled=True)
    if shares:
        panels["share"] = 0.8, partial(_draw_shares, shares=shares)

    heights = [tall for tall, _ in panels.values()]
    fig, crops, below = _strip_axes(len(frames), heights, shown, legend=scores is not None or bool(shares))
    for ax, (row, clip) in zip(crops, frames.items(), strict=True):
        _draw_crops(ax, pixels(clip)[which], maps[row][which] if row in maps else None)
        ax.set_ylabel(row, fontsize=8)
    above: dict[str, Any] = {"transform": crops[0].transAxes, "ha": "center", "va": "bottom", "fontsize": 7}
    for place, frame in enumerate(which):
        crops[0].text((place + 0.5) / shown, 1.02, f"{frame / FPS:.2f} s", **above)
    for ax, (name, (_, draw)) in zip(below, panels.items(), strict=True):
        for start, stop in spans(labels) if labels is not None and name != "share" else ():
            ax.axvspan(start / FPS, stop / FPS, color=TRUTH, alpha=0.2, linewidth=0)
        draw(ax)
        for frame in which:
            ax.axvline((frame + 0.5) / FPS, color="#666666", linewidth=0.5, linestyle=":", zorder=0.5)
        ax.grid(axis="x", visible=False)
        ax.set_ylabel(name, fontsize=8)
        ax.set_xlim(0, length / FPS)
        ax.tick_params(labelsize=7, labelbottom=ax is below[-1], pad=1)
    if panels:
        below[-1].set_xlabel("seconds", fontsize=8, labelpad=1)
    return fig


def _strip_axes(
    rows: int, heights: Sequence[float], shown: int, *, legend: bool
) -> tuple[Figure, list[Axes], list[Axes]]:
    """A page laid out in inches, so that the crops are square and stand over their time."""
    side, gap = min(8.0 / shown, 1.6), 0.07
    left, right, top, bottom = 0.6, 1.1 if legend else 0.1, 0.2, 0.4 if heights else 0.05
    tall = [side] * rows + list(heights)
    width, height = left + side * shown + right, top + sum(tall) + gap * (len(tall) - 1) + bottom
    fig = Figure(figsize=(width, height))
    edges = {"left": left / width, "right": 1 - right / width}
    edges |= {"bottom": bottom / height, "top": 1 - top / height, "hspace": gap * len(tall) / sum(tall)}
    axes = fig.subplots(len(tall), 1, squeeze=False, gridspec_kw={"height_ratios": tall, **edges})
    return fig, list(axes[:rows, 0]), list(axes[rows:, 0])


def _draw_crops(ax: Axes, crops: NDArray[np.uint8], maps: Frames | None) -> None:
    """The crops (n, H, W) side by side, with a white line between them."""
    between = max(2, crops.shape[2] // 28)
    edges = [(0, 0), (between // 2, between - between // 2), (0, 0)]
    if maps is None:
        colours = np.repeat(crops[..., None], 3, axis=3)
    else:
        heat = pixels(maps) / max(1, int(pixels(maps).max()))
        colours = np.stack([tint(crop, one) for crop, one in zip(crops, heat, strict=True)])
    strip = np.concatenate([np.pad(one, edges, constant_values=255) for one in colours], axis=1)
    ax.imshow(strip, interpolation="bilinear", aspect="auto")
    hide_frame(ax)


def _draw_sound(ax: Axes, wave: NDArray[Any]) -> None:
    seconds = np.linspace(0, len(wave) / RATE, 600)
    ax.fill_between(seconds, *envelope(wave, 600).T, color="#444444", linewidth=0.3)
    ax.set(ylim=(-1.05, 1.05), yticks=[])


def _draw_scores(ax: Axes, scores: Frames | None, labelled: bool) -> None:
    if scores is not None:
        values = np.asarray(scores, dtype=float)
        ax.plot((np.arange(len(values)) + 0.5) / FPS, values, color=OURS, linewidth=1.4, label="model")
    ax.axhline(0.5, color="#666666", linewidth=0.6, zorder=1)
    ax.set(ylim=(-0.04, 1.04), yticks=[0, 0.5, 1])
    if labelled:
        ax.fill_between([], [], color=TRUTH, alpha=0.2, linewidth=0, label="truth")
        _legend_beside(ax)


def _draw_shares(ax: Axes, shares: Mapping[str, Frames]) -> None:
    values = np.array([np.asarray(share, dtype=float) for share in shares.values()])
    if (values < 0).any():
        raise ValueError("shares must not be negative: pass the size of the influence")
    whole = values.sum(0)
    parts = np.divide(values, whole, out=np.full_like(values, np.nan), where=whole > 0)
    steps = np.concatenate([parts, parts[:, -1:]], axis=1)  # each frame lasts until the next
    seconds = np.arange(steps.shape[1]) / FPS
    colours = list(modality_colours(shares).values())
    areas = ax.stackplot(seconds, steps, step="post", labels=list(shares), colors=colours, alpha=0.85)
    for area, hatch in zip(areas, HATCHES, strict=False):
        area.set(hatch=hatch, edgecolor="white", linewidth=0)
    ax.set(ylim=(0, 1), yticks=[0, 0.5, 1])
    _legend_beside(ax)


def _legend_beside(ax: Axes) -> None:
    look = {"fontsize": 7, "frameon": False, "borderpad": 0.2, "handlelength": 1.6}
    ax.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), **look)


@styled
def modality_bars(
    values: Mapping[str, Mapping[str, Interval]], *, ylabel: str = "share of the influence"
) -> Figure:
    """What each modality counts for in each condition: {condition: {modality: (mean, low, high)}}."""
    names = list(next(iter(values.values())))
    fig, axes = figure(1.0 + 1.25 * len(values), 2.6)
    ax = axes[0][0]
    width = 0.8 / len(names)
    looks = zip(modality_colours(names).items(), HATCHES, strict=False)
    for i, ((name, colour), hatch) in enumerate(looks):
        places = np.arange(len(values)) + (i - (len(names) - 1) / 2) * width
        mean, low, high = np.array([row[name] for row in values.values()]).T
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        ax.bar(places, mean, 0.92 * width, label=name, **look)
        ax.vlines(places, low, high, color="black", linewidth=1.2)
    ax.set_xticks(range(len(values)), [condition.replace(" ", "\n", 1) for condition in values])
    lowest = min(low for row in values.values() for _, low, _ in row.values())
    ax.set(ylabel=ylabel, ylim=(0 if lowest >= 0 else None, None))
    ax.grid(axis="x", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return fig


@styled
def agreement_plot(values: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """What gates say a modality is worth against what it is worth, a point a clip.

    Args:
        values: {panel: {modality: (influence, fall of the logit when it is muted)}}.
    """
    fig, axes = figure(2.6 * len(values) + 1.2, 2.6, 1, len(values), sharex=True, sharey=True)
    for ax, (title, groups) in zip(axes[0], values.items(), strict=True):
        ax.axhline(0, color="black", linewidth=0.6)
        ax.axvline(0, color="black", linewidth=0.6)
        looks = zip(modality_colours(groups).values(), "os^Dv", strict=False)
        for (name, (said, true)), (colour, marker) in zip(groups.items(), looks, strict=False):
            ax.plot(said, true, marker, color=colour, markersize=4, alpha=0.75, markeredgewidth=0, label=name)
        ax.set(title=title, xlabel="influence of the modality")
    axes[0][0].set_ylabel("fall of the logit when muted")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return fig
