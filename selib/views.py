"""What the explorer shows of an image or a clip, as numbers, pictures and drawings; :mod:`selib.widgets` puts the knobs to it.

Everything comes from one forward pass for each image or clip, made when it is first looked at and kept. Pictures are composed with
OpenCV and drawings are SVG, not Matplotlib, so that a knob can be moved as fast as a hand moves it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import cv2
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import baselines, plot
from selib.attach import attached, bare, to_device
from selib.explanation import Explanation, Method, Streams, explain
from selib.heatmap import normalize, resize
from selib.select import Select, TopFraction
from studies.clips import Film, Picture, probability, write_line

HEIGHT = 224  # in pixels, at which an image is shown
MAPS = 32  # that are kept of a clip, of about a megabyte each
NOTHING = "nothing"
SLOW = ("Score-CAM", "Ablation-CAM")  # once for every channel: not while somebody waits

K = TypeVar("K")
V = TypeVar("V")

Clip = tuple[Mapping[str, Tensor], Tensor | None, NDArray[np.int16] | None]
"""Inputs of one clip with B = 1, its labels (1, T), and its sound track int16 (N,); ``None`` where there is none."""


@dataclass(frozen=True)
class Look:
    """How a heatmap is laid over its picture: Matplotlib's name of the colours, opacity in [0, 1], interpolated or in squares."""

    colormap: str = plot.COLORMAP
    opacity: float = 0.55
    smooth: bool = True


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn of a subject, whatever the frame.

    Attributes:
        rules: {stream: which channels take part}.
        rival: the method to compare with, or ``NOTHING``.
        off: the modalities of a clip whose gates are at zero.
    """

    method: Method
    target: int
    rules: Mapping[str, Select]
    look: Look = Look()
    rival: str = NOTHING
    off: frozenset[str] = frozenset()


class Subject(Protocol):
    """One image, or one clip, that can be looked at.

    Attributes:
        name: in the menu; outputs: the names of the logits; multilabel: whether each of them is a yes or no of its own.
        streams: what has an SE block and a picture; rivals: the other methods that it can be compared with.
        frames: how many, 1 for an image; thumbnail: uint8 (h, w, 3).
    """

    name: str
    outputs: Sequence[str]
    multilabel: bool

    @property
    def frames(self) -> int: ...

    @property
    def streams(self) -> tuple[str, ...]: ...

    @property
    def rivals(self) -> tuple[str, ...]: ...

    @property
    def thumbnail(self) -> Picture: ...

    def explanation(self, stream: str) -> Explanation: ...

    def picture(self, wanted: Wanted, t: int) -> Picture: ...

    def code(self, stream: str, method: Method, target: int, rule: Select) -> str: ...


def remembered(kept: dict[K, V], key: K, make: Callable[[], V], most: int = 1000) -> V:
    """What is kept under a key, made if it is not there; of too many the one that was not asked for the longest makes room."""
    value = kept.pop(key) if key in kept else make()
    if len(kept) >= most:
        del kept[next(iter(kept))]
    kept[key] = value
    return value


def at(logits: Tensor, t: int) -> Tensor:
    """The logits (K,) of the one sample, in frame t if it is a clip."""
    return (logits[0, t] if logits.ndim == 3 else logits[0]).cpu()


def weights_at(ex: Explanation, method: Method, target: int, t: int) -> Tensor:
    """What a method ranks the channels of the one sample by, (C,), in frame t if it is a clip."""
    weights = ex.channel_weights(method, target)[0]
    return (weights[:, t] if weights.ndim == 2 else weights).cpu()


def _cells(ex: Explanation, method: Method, target: int, rule: Select) -> Tensor:
    """A heatmap (B, *space) that was not brought to the size of a picture, in [0, 1]."""
    raw = ex.map(method, target, rule)
    return normalize(raw.relu() if method == "influence" else raw)


def _check_names(outputs: Sequence[str], logits: Tensor) -> None:
    if logits.shape[-1] != len(outputs):
        raise ValueError(f"{len(outputs)} class names do not fit {logits.shape[-1]} logits: pass classes=")


def says(rule: Select) -> str:
    """A selection rule as it is written in Python."""
    inside = ", ".join(
        f"{value:g}" if isinstance(value, float) else str(value) for value in vars(rule).values()
    )
    return f"selib.{type(rule).__name__}({inside})"


# ---- pictures ------------------------------------------------------------------------------------------------------------


def _coloured(values: NDArray[Any], colormap: str) -> Picture:
    """Values in [0, 1] in the 256 colours of a map, as Matplotlib chooses them."""
    level = (values * 256).clip(0, 255).astype(np.uint8)
    return np.asarray(
        (matplotlib.colormaps[colormap](np.arange(256))[:, :3] * 255).round().astype(np.uint8)[level]
    )


def laid_over(picture: Picture, heatmap: NDArray[Any], look: Look) -> Picture:
    """A heatmap (H, W) in [0, 1] over a picture of that size, as :func:`selib.plot.overlay` blends them."""
    mixed = cv2.addWeighted(picture, 1 - look.opacity, _coloured(heatmap, look.colormap), look.opacity, 0)
    return np.asarray(mixed, np.uint8)


def encoded(picture: Picture) -> bytes:
    """A picture as PNG bytes, quickly rather than small."""
    return cv2.imencode(".png", picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def enlarged(picture: NDArray[Any], height: int, *, smooth: bool = True) -> NDArray[Any]:
    """Brought to a height in pixels, in its proportions."""
    size = max(1, round(picture.shape[1] * height / picture.shape[0])), height
    way = cv2.INTER_AREA if height < picture.shape[0] else cv2.INTER_CUBIC if smooth else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, size, interpolation=way))


def row_of(pictures: Sequence[Picture], titles: Sequence[str]) -> Picture:
    """Pictures of one height side by side, on white, each with a title over it."""
    gap, head = 8, 20
    wide = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    page = np.full((head + pictures[0].shape[0], wide, 3), 255, np.uint8)
    left = 0
    for picture, title in zip(pictures, titles, strict=True):
        page[head:, left : left + picture.shape[1]] = picture
        write_line(page[:, : left + picture.shape[1]], title, left, 2)
        left += picture.shape[1] + gap
    return page


def channel_maps(
    ex: Explanation, channels: Sequence[int], t: int, look: Look, *, frames: int = 1
) -> list[Picture]:
    """The maps of single channels, each on its own scale, 64 pixels high; of a clip of so many ``frames`` in frame t."""
    maps = ex.features[0, list(channels)]
    if maps.ndim == 4:  # maps of fewer frames than the clip's stand for several of them
        maps = maps[:, t * maps.shape[1] // frames]
    return [
        _coloured(enlarged(one.numpy(), 64, smooth=look.smooth), look.colormap)
        for one in normalize(maps).cpu()
    ]


# ---- drawings ------------------------------------------------------------------------------------------------------------

INK = "var(--jp-ui-font-color1, #333)"  # of JupyterLab's theme, light or dark


def gates_drawing(weights: Tensor, chosen: Tensor, label: str) -> str:
    """Channel weights (C,) in falling order as SVG, the chosen ones, bool (C,), in blue, and a line at the smallest of them."""
    order = weights.argsort(descending=True, stable=True)
    values, picked = weights[order].double().numpy(), chosen[order].numpy()
    wide, tall, left, top = 360, 130, 46, 22
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    span = (high - low) or 1.0

    def y(value: float) -> float:
        return top + tall * (high - value) / span

    step = wide / len(values)
    bars = ["", ""]
    for place, value in enumerate(values):
        bars[int(picked[place])] += f"M{left + (place + 0.5) * step:.1f} {y(0):.1f}V{y(float(value)):.1f}"
    lines = [
        f'<path d="{path}" stroke="{colour}" stroke-width="{max(1.0, 0.8 * step):.2f}"/>'
        for path, colour in zip(bars, ("#999999", plot.OURS), strict=True)
        if path
    ]
    if picked.any():
        edge = y(float(values[picked].min()))
        lines.append(
            f'<path d="M{left} {edge:.1f}h{wide}" stroke="{plot.OTHERS}" stroke-dasharray="5 3" stroke-width="1.5"/>'
        )
    marks = [value for value in (low, high) if abs(y(value) - y(0)) > 12] + [0.0]
    ticks = "".join(
        f'<text x="{left - 4}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.2g}</text>' for v in marks
    )
    said = f"{int(picked.sum())} of {len(values)} channels selected"
    return (
        f'<svg role="img" aria-label="{label} of each channel: {said}" width="{left + wide + 4}" height="{top + tall + 20}" '
        f'style="color:{INK};font:12px sans-serif" fill="currentColor"><text x="{left}" y="14">{html.escape(label)}: {said}</text>'
        f'{"".join(lines)}<path d="M{left} {y(0):.1f}h{wide}" stroke="currentColor" stroke-width="1"/>{ticks}'
        f'<text x="{left}" y="{top + tall + 16}">channels, sorted</text></svg>'
    )


def answers_drawing(
    names: Sequence[str], before: Tensor, after: Tensor, target: int, *, multilabel: bool, count: int = 5
) -> str:
    """Logits (K,) as SVG bars, the largest and the target: blue with the whole SE vector, a ring with the selection alone."""
    order = before.argsort(descending=True).tolist()
    shown = order[:count] + [target] * (target not in order[:count])
    low = min(0.0, float(torch.stack([before[shown], after[shown]]).min()))
    high = max(0.0, float(torch.stack([before[shown], after[shown]]).max()))
    span = (high - low) or 1.0
    left, wide, line = 128, 170, 22

    def x(value: float) -> float:
        return left + wide * (value - low) / span

    rows = []
    for place, k in enumerate(shown):
        a, b, y = float(before[k]), float(after[k]), 24 + place * line
        name = names[k] if len(names[k]) <= 18 else names[k][:17] + "…"
        strong = ' font-weight="bold"' if k == target else ""
        rows.append(
            f'<text x="{left - 6}" y="{y + 12}" text-anchor="end"{strong}>{html.escape(name)}</text>'
            f'<rect x="{min(x(0), x(a)):.1f}" y="{y + 2}" width="{abs(x(a) - x(0)):.1f}" height="13" fill="{plot.OURS}"/>'
            f'<circle cx="{x(b):.1f}" cy="{y + 8.5}" r="4.5" fill="none" stroke="{plot.OTHERS}" stroke-width="2"/>'
            f'<text x="{left + wide + 10}" y="{y + 12}">{a:.2f} → {b:.2f}</text>'
        )
    share = [float(_probabilities(v, multilabel)[target]) for v in (before, after)]
    said = f"{names[target]}: {share[0]:.0%} → {share[1]:.0%} with the selected channels only"
    return (
        f'<svg role="img" aria-label="{html.escape(said)}" width="{left + wide + 100}" height="{28 + line * len(shown)}" '
        f'style="color:{INK};font:12px sans-serif" fill="currentColor"><text x="0" y="14">{html.escape(said)}</text>{"".join(rows)}</svg>'
    )


def _probabilities(logits: Tensor, multilabel: bool) -> Tensor:
    return logits.sigmoid() if multilabel else logits.softmax(0)


# ---- an image ------------------------------------------------------------------------------------------------------------


class ImageSubject:
    """An image uint8 (3, H, W) and what a classifier makes of it.

    Args:
        inputs: (1, …) as the model takes it.
        spelled: how the inputs are written in Python, for the two lines that reproduce a view.
    """

    streams, frames = ("image",), 1

    def __init__(
        self,
        model: nn.Module,
        image: Tensor,
        inputs: Tensor,
        name: str,
        outputs: Sequence[str],
        *,
        multilabel: bool,
        spelled: str,
    ) -> None:
        self.name, self.outputs, self.multilabel = name, outputs, multilabel
        self._model, self._inputs, self._spelled = model, inputs, spelled
        self._image = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
        self._compared: dict[tuple[str, int], NDArray[Any]] = {}

    @cached_property
    def whole(self) -> Explanation:
        """The explanation, one forward pass."""
        found = explain(self._model, self._inputs)
        if not isinstance(found, Explanation):
            raise TypeError("the model has several SE blocks: the explorer shows images of models with one")
        _check_names(self.outputs, found.logits)
        if found.features.ndim != 4:
            raise ValueError(
                "the SE block sits on a vector, which has no positions: attach it before the pooling, at="
            )
        return found

    def explanation(self, stream: str) -> Explanation:
        return self.whole

    @cached_property
    def _explainers(self) -> dict[str, baselines.Explainer]:
        blocks = list(attached(self._model).values())
        # A network with blocks of its own has no module whose output is the map before the gates; the CAMs read (B, C, h, w).
        if not blocks or blocks[0].layout != "BC*" or blocks[0].grid:
            return {}
        layer = blocks[0].features
        everything = baselines.cams(self._model, layer) | {
            "mean of channels": baselines.mean_of_channels(self._model, layer)
        }
        return {name: explainer for name, explainer in everything.items() if name not in SLOW}

    @property
    def rivals(self) -> tuple[str, ...]:
        return tuple(self._explainers)

    @property
    def thumbnail(self) -> Picture:
        return self._image

    @cached_property
    def _shown(self) -> Picture:
        return np.asarray(enlarged(self._image, HEIGHT, smooth=False), np.uint8)

    def picture(self, wanted: Wanted, t: int) -> Picture:
        """The image, the heatmap over it, and beside it that of the rival."""
        maps = [self.heatmap(wanted.method, wanted.target, wanted.rules["image"], wanted.look.smooth)]
        titles = [self.name, f"{wanted.method}: {self.outputs[wanted.target]}"]
        if wanted.rival in self._explainers:
            maps.append(self._rival(wanted.rival, wanted.target))
            titles.append(wanted.rival)
        return row_of([self._shown, *(laid_over(self._shown, one, wanted.look) for one in maps)], titles)

    def heatmap(self, method: Method, target: int, rule: Select, smooth: bool) -> NDArray[Any]:
        """The heatmap at the size at which the image is shown; in squares it is that of the map's own cells."""
        size = self._shown.shape[:2]
        if smooth:
            return self.whole.heatmap(method, target, select=rule, size=size)[0].cpu().numpy()
        cells = _cells(self.whole, method, target, rule)[0].cpu().numpy()
        return np.asarray(cv2.resize(cells, size[::-1], interpolation=cv2.INTER_NEAREST))

    def _rival(self, name: str, target: int) -> NDArray[Any]:
        if (name, target) not in self._compared:
            place = next(self._model.parameters()).device
            found = self._explainers[name](
                to_device(self._inputs, place), torch.tensor([target], device=place)
            )
            self._compared[name, target] = resize(found, self._shown.shape[:2]).clamp(0, 1)[0].cpu().numpy()
        return self._compared[name, target]

    def code(self, stream: str, method: Method, target: int, rule: Select) -> str:
        return (
            f"ex = selib.explain(model, {self._spelled})\n"
            f'heatmap = ex.heatmap("{method}", target={target}, select={says(rule)})  # {self.outputs[target]}'
        )


# ---- a clip --------------------------------------------------------------------------------------------------------------


class ClipSubject:
    """A clip of several streams and what a detector makes of it, frame by frame.

    Args:
        model: with SE blocks on visual streams, and one on the fused streams, called "fusion".
        modalities: the names of the equal segments of the fused channels.
    """

    rivals = ("Grad-CAM", "mean of channels")

    def __init__(
        self,
        model: nn.Module,
        clip: Clip,
        name: str,
        modalities: Sequence[str],
        outputs: Sequence[str],
        *,
        fps: float,
        spelled: str,
    ) -> None:
        self.name, self.outputs, self.multilabel = name, outputs, len(outputs) == 1
        self.inputs, self.labels, self.wave = clip
        self.pictures = {stream: plot.pixels(x[0]) for stream, x in self.inputs.items() if x.ndim == 4}
        if not self.pictures:
            raise ValueError(
                f"{name}: there is no stream of grey pictures (1, T, H, W) among {', '.join(self.inputs)}"
            )
        self.frames = len(next(iter(self.pictures.values())))
        self.modalities, self.fps = tuple(modalities), fps
        self._model, self._spelled = model, spelled
        self._maps: dict[Any, NDArray[np.uint8]] = {}
        self._scores: dict[tuple[frozenset[str], int], NDArray[Any]] = {}
        self._film: tuple[Wanted, Film] | None = None

    @cached_property
    def whole(self) -> Streams:
        """The explanation, one forward pass."""
        found = explain(self._model, self.inputs)
        if not isinstance(found, Streams) or "fusion" not in found.streams:
            raise ValueError(
                'modalities are switched at an SE block called "fusion": attach_se(…, at={"face": …, "fusion": …})'
            )
        channels = found.streams["fusion"].gates.shape[1]
        if channels % len(self.modalities):
            raise ValueError(
                f"{channels} fused channels are no {len(self.modalities)} equal segments: {', '.join(self.modalities)}"
            )
        _check_names(self.outputs, found.logits)
        if not any(stream in found.streams for stream in self.pictures):
            raise ValueError(f"no SE block on a stream of pictures: {', '.join(self.pictures)} have none")
        return found

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(stream for stream in self.pictures if stream in self.whole.streams)

    @property
    def thumbnail(self) -> Picture:
        grey = next(iter(self.pictures.values()))[self.frames // 2]
        return np.repeat(grey[..., None], 3, 2)

    def explanation(self, stream: str) -> Explanation:
        return self.whole.streams[stream]

    def scores(self, off: frozenset[str] = frozenset(), target: int = 0) -> NDArray[Any]:
        """Probability of the target (T,) with the gates of some modalities at zero."""
        if (off, target) not in self._scores:
            fusion = self.whole.streams["fusion"]
            logits = fusion.logits
            if off:
                keep = torch.tensor(
                    [float(name not in off) for name in self.modalities], device=fusion.gates.device
                )
                keep = keep.repeat_interleave(fusion.gates.shape[1] // len(keep))
                logits = fusion.with_gates(lambda s: s * keep)
            self._scores[off, target] = probability(logits[0], target)
        return self._scores[off, target]

    def maps(self, stream: str, method: str, target: int, rule: Select, smooth: bool) -> NDArray[np.uint8]:
        """A stream's heatmaps (T, H, W), 0 to 255, by one of our methods or a rival."""
        key = stream, method, target, says(rule), smooth
        return remembered(
            self._maps, key, lambda: plot.pixels(self._made(stream, method, target, rule, smooth)), MAPS
        )

    def _made(self, stream: str, method: Any, target: int, rule: Select, smooth: bool) -> Tensor:
        ex, size = self.whole.streams[stream], self.pictures[stream].shape
        if method == "Grad-CAM":
            inputs = to_device(dict(self.inputs), ex.features.device)
            return baselines.clip_grad_cam(self._model, inputs, stream, target)
        if method == "mean of channels":
            return normalize(resize(ex.features.relu().mean(1), size))[0]
        if smooth:
            return ex.heatmap(method, target, select=rule)[0]
        return torch.nn.functional.interpolate(_cells(ex, method, target, rule)[None], size, mode="nearest")[
            0, 0
        ]

    def picture(self, wanted: Wanted, t: int) -> Picture:
        """Frame t with the maps on its streams, over the sound and the score with everything and without what is off."""
        if self._film is None or self._film[0] != wanted:
            self._film = wanted, self._composed(wanted)
        return self._film[1][t]

    def _composed(self, wanted: Wanted) -> Film:
        target, look, off = wanted.target, wanted.look, wanted.off
        frames, shown = dict(self.pictures), {}
        for stream in self.streams:
            if stream in off:
                continue
            shown[stream] = self.maps(stream, wanted.method, target, wanted.rules[stream], look.smooth)
            if wanted.rival in self.rivals:
                beside = f"{stream}: {wanted.rival}"
                frames[beside] = self.pictures[stream]
                shown[beside] = self.maps(stream, wanted.rival, target, TopFraction(1.0), True)
        scores = {"all": self.scores(target=target)}
        scores |= {f"without {', '.join(sorted(off))}": self.scores(off, target)} if off else {}
        labels = None if self.labels is None else self.labels[0].cpu()
        return Film(
            frames,
            shown,
            scores=scores,
            labels=labels,
            wave=self.wave,
            off=off,
            fps=self.fps,
            opacity=look.opacity,
            colormap=look.colormap,
            scale=1 if len(frames) > 2 else 2,
        )

    def code(self, stream: str, method: Method, target: int, rule: Select) -> str:
        return (
            f"ex = selib.explain(model, {self._spelled})\n"
            f'heatmap = ex.streams["{stream}"].heatmap("{method}", target={target}, select={says(rule)})'
        )


def modalities_of(model: nn.Module, modalities: Sequence[str] | None) -> tuple[str, ...]:
    """The segments of the fused channels: as given, or as the model names them."""
    names = tuple(getattr(bare(model), "modalities", ()) if modalities is None else modalities)
    if not names:
        raise ValueError("pass modalities=, the segments of the fused channels")
    return names


Prepare = Callable[[Tensor], Tensor]
