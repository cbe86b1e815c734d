"""What the explorer shows, as numbers, pictures and drawings; :mod:`selib.widgets` adds the knobs.

Everything comes from one forward pass for each image, made when it is first looked at and kept. Pictures are
composed with Pillow and drawings are SVG, not Matplotlib, so that a redraw keeps up with the hand on a knob.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from selib import plot
from selib.explanation import Explanation, Method, explain
from selib.forward import to_device
from selib.heatmap import normalize, resize
from selib.plot import Picture
from selib.select import Select

HEIGHT = 224  # of an image on the screen, in pixels
NOTHING = "nothing"


@dataclass(frozen=True)
class Settings:
    """What the knobs are set to, whatever the image and the frame."""

    method: Method
    target: int
    rules: tuple[Select, ...]  # which channels take part, a rule for each stream of the subject
    compare: str = NOTHING  # the rival
    off: frozenset[str] = frozenset()  # modalities of a clip whose gates are at zero
    colours: str = plot.COLORMAP
    opacity: float = 0.55
    smooth: bool = True  # interpolated, or cells as squares


class Subject(Protocol):
    """One image, or one clip, that can be looked at."""

    name: str  # in the menu
    thumbnail: Picture
    outputs: Sequence[str]  # the names of the logits
    multilabel: bool  # each of them is a yes or no of its own
    rivals: Collection[str]  # the other methods to compare with
    streams: tuple[str, ...]  # the inputs that have an SE block and a picture
    frames: int  # 1 for an image
    fps: float  # 0 for an image
    modalities: tuple[str, ...]  # what can be switched off; none of an image
    sound: bytes  # a WAV file; empty for an image

    def explanation(self, stream: str) -> Explanation:
        """The explanation of a batch of one."""
        ...

    def picture(self, settings: Settings, t: int) -> Picture:
        """Frame t with its heatmaps."""
        ...

    def code(self, stream: str, settings: Settings) -> str:
        """Two lines of Python that make the heatmap."""
        ...


Rival = Callable[[Tensor, Tensor], Tensor]
"""Another method: inputs (1, …) and targets int64 (1,) -> heatmaps (1, h, w) in [0, 1]."""


@dataclass(eq=False)
class ImageSubject(Subject):
    """An image and what a classifier makes of it.

    Attributes:
        image: uint8 (3, H, W).
        inputs: (1, …) as the model takes it; spelled: how that is written in Python.
        rivals: {method: what makes its heatmaps}.
    """

    model: nn.Module
    image: Tensor
    inputs: Tensor
    spelled: str
    name: str
    outputs: Sequence[str]
    multilabel: bool
    rivals: Mapping[str, Rival]
    streams, frames, fps, modalities, sound = ("image",), 1, 0.0, (), b""

    def __post_init__(self) -> None:
        self.thumbnail = plot.rgb(self.image)
        self._shown = enlarged(self.thumbnail, HEIGHT)
        self._rival_maps: dict[tuple[str, int], Tensor] = {}

    @cached_property
    def _explanation(self) -> Explanation:
        found = explain(self.model, self.inputs)
        if found.features.ndim != 4:
            raise ValueError("the SE block sits on a vector, without positions: attach it before the pooling")
        return found

    def explanation(self, stream: str) -> Explanation:
        return self._explanation

    def picture(self, settings: Settings, t: int) -> Picture:
        """The image, the heatmap over it, and beside it that of the rival."""
        ours = heatmap(self._explanation, settings, settings.rules[0], self._shown.shape[:2])
        maps = {f"{settings.method}: {self.outputs[settings.target]}": ours}
        if settings.compare in self.rivals:
            maps[settings.compare] = self._rival_map(settings.compare, settings.target)
        image = torch.from_numpy(self._shown).permute(2, 0, 1)
        pictures = [self._shown]
        for one in maps.values():
            pictures.append(plot.overlay(image, one, opacity=settings.opacity, colormap=settings.colours))
        return row_of(pictures, [self.name, *maps])

    def _rival_map(self, name: str, target: int) -> Tensor:
        key = name, target
        if key not in self._rival_maps:
            device = next(self.model.parameters()).device
            inputs, targets = to_device(self.inputs, device), torch.tensor([target], device=device)
            found = resize(self.rivals[name](inputs, targets), self._shown.shape[:2])
            self._rival_maps[key] = found.clamp(0, 1)[0].cpu()
        return self._rival_maps[key]

    def code(self, stream: str, settings: Settings) -> str:
        asked = f'"{settings.method}", target={settings.target}, select={spelled(settings.rules[0])}'
        named = self.outputs[settings.target]
        return f"ex = selib.explain(model, {self.spelled})\nheatmap = ex.heatmap({asked})  # {named}"


# ---- numbers ----------


def spelled(rule: Select) -> str:
    """A selection rule as it is written in Python."""
    values = [f"{value:g}" if isinstance(value, float) else str(value) for value in vars(rule).values()]
    return f"selib.{type(rule).__name__}({', '.join(values)})"


def heatmap(ex: Explanation, settings: Settings, rule: Select, size: Sequence[int]) -> Tensor:
    """The heatmap ``size`` in [0, 1] of a batch of one, interpolated or in squares."""
    method, target = settings.method, settings.target
    if settings.smooth:
        return ex.heatmap(method, target, select=rule, size=size)[0].cpu()
    raw = ex.map(method, target, rule)
    cells = normalize(raw.relu() if method == "influence" else raw)
    return F.interpolate(cells[None], size, mode="nearest")[0, 0].cpu()


# ---- pictures ----------


def encoded(picture: Picture) -> bytes:
    """A picture as PNG bytes, quickly rather than small."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def enlarged(picture: Picture, height: int) -> Picture:
    """A picture brought to a height in pixels: averaged where it shrinks, in squares where it grows."""
    size = max(1, round(picture.shape[1] * height / picture.shape[0])), height
    way = Image.Resampling.BOX if height < picture.shape[0] else Image.Resampling.NEAREST
    return np.array(Image.fromarray(picture).resize(size, way))


def row_of(pictures: Sequence[Picture], titles: Sequence[str]) -> Picture:
    """Pictures of one height side by side, on white, each with a title over it."""
    gap, head = 8, 20
    width = sum(picture.shape[1] for picture in pictures) + gap * (len(pictures) - 1)
    page = np.full((head + pictures[0].shape[0], width, 3), 255, np.uint8)
    left = 0
    for picture, title in zip(pictures, titles, strict=True):
        right = left + picture.shape[1]
        page[head:, left:right] = picture
        plot.write_line(page[:head, left:right], title, 0, 2)
        left = right + gap
    return page


def channel_maps(
    ex: Explanation, channels: Sequence[int], t: int, settings: Settings, *, frames: int
) -> list[Picture]:
    """The maps of single channels in frame t of ``frames``, each on its own scale, 64 pixels high."""
    maps = ex.features[0, list(channels)]
    if maps.ndim == 4:  # of a clip: a map of fewer frames stands for several of the clip's
        maps = maps[:, t * maps.shape[1] // frames]
    size = 64, max(1, round(64 * maps.shape[2] / maps.shape[1]))
    maps = normalize(maps)
    maps = resize(maps, size) if settings.smooth else F.interpolate(maps[None], size, mode="nearest")[0]
    return list(np.rint(plot.coloured(maps.cpu().numpy(), settings.colours)).astype(np.uint8))


# ---- drawings ----------

INK = "var(--jp-ui-font-color1, #333)"  # of JupyterLab's theme, light or dark


def _svg(said: str, width: float, height: float, inside: str) -> str:
    """An SVG drawing that a screen reader introduces by ``said``."""
    return (
        f'<svg role="img" aria-label="{html.escape(said)}" width="{width}" height="{height}" '
        f'style="color:{INK};font:12px sans-serif" fill="currentColor">{inside}</svg>'
    )


def _scale(low: float, high: float, start: float, length: float) -> Callable[[float], float]:
    """The axis from ``low`` at ``start`` to ``high``, ``length`` pixels further."""
    span = (high - low) or 1.0
    return lambda value: start + length * (value - low) / span


def gates_drawing(weights: Tensor, chosen: Tensor, label: str) -> str:
    """Channel weights (C,) in falling order as SVG: the chosen ones, bool (C,), blue; a line at the cut."""
    order = weights.argsort(descending=True, stable=True)
    values, picked = weights[order].tolist(), chosen[order].tolist()
    width, height, left, top = 360, 130, 46, 22
    low, high = min(0.0, *values), max(0.0, *values)
    y = _scale(high, low, top, height)
    step = width / len(values)
    paths = {False: "", True: ""}
    for place, value in enumerate(values):
        paths[picked[place]] += f"M{left + (place + 0.5) * step:.1f} {y(0):.1f}V{y(value):.1f}"
    stroke = f'stroke-width="{max(1.0, 0.8 * step):.2f}"'
    inside = f'<path d="{paths[False]}" stroke="{plot.CONTROLS}" {stroke}/>'
    inside += f'<path d="{paths[True]}" stroke="{plot.OURS}" {stroke}/>'
    if any(picked):
        edge = y(min(value for value, take in zip(values, picked, strict=True) if take))
        inside += f'<path d="M{left} {edge:.1f}h{width}" stroke="{plot.OTHERS}" stroke-width="1.5" '
        inside += 'stroke-dasharray="5 3"/>'
    inside += f'<path d="M{left} {y(0):.1f}h{width}" stroke="currentColor" stroke-width="1"/>'
    for tick in sorted({low, high, 0.0}):
        if tick == 0 or abs(y(tick) - y(0)) > 12:
            inside += f'<text x="{left - 4}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.2g}</text>'
    said = f"{label}: {sum(picked)} of {len(values)} channels selected"
    inside += f'<text x="{left}" y="14">{html.escape(said)}</text>'
    inside += f'<text x="{left}" y="{top + height + 16}">channels, sorted</text>'
    return _svg(said, left + width + 4, top + height + 20, inside)


def answers_drawing(
    names: Sequence[str], before: Tensor, after: Tensor, target: int, *, multilabel: bool
) -> str:
    """The largest logits (K,) and the target's as SVG: bars with all channels, rings with the chosen ones."""
    shown = before.argsort(descending=True)[:5].tolist()
    shown += [target] * (target not in shown)
    both = torch.stack([before[shown], after[shown]])
    left, width, line = 128, 170, 22
    x = _scale(min(0.0, float(both.min())), max(0.0, float(both.max())), left, width)
    inside = ""
    for place, k in enumerate(shown):
        a, b, y = float(before[k]), float(after[k]), 24 + place * line
        name = names[k] if len(names[k]) <= 18 else names[k][:17] + "…"
        strong = ' font-weight="bold"' if k == target else ""
        inside += (
            f'<text x="{left - 6}" y="{y + 12}" text-anchor="end"{strong}>{html.escape(name)}</text>'
            f'<rect x="{min(x(0), x(a)):.1f}" y="{y + 2}" width="{abs(x(a) - x(0)):.1f}" height="13" '
            f'fill="{plot.OURS}"/>'
            f'<circle cx="{x(b):.1f}" cy="{y + 8.5}" r="4.5" fill="none" stroke="{plot.OTHERS}" '
            f'stroke-width="2"/><text x="{left + width + 10}" y="{y + 12}">{a:.2f} → {b:.2f}</text>'
        )
    share = [float((v.sigmoid() if multilabel else v.softmax(0))[target]) for v in (before, after)]
    said = f"{names[target]}: {share[0]:.0%} → {share[1]:.0%} with the selected channels only"
    inside += f'<text x="0" y="14">{html.escape(said)}</text>'
    return _svg(said, left + width + 100, 28 + line * len(shown), inside)
