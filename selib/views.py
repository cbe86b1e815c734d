"""What the explorer shows, as numbers, pictures and HTML; :mod:`selib.widgets` adds the knobs.

Everything comes from one forward pass for each image, made when it is first looked at and kept. Matplotlib
draws nothing here: a redraw has to keep up with the hand on a knob.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from typing import Protocol
from zlib import Z_RLE

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from selib import plot
from selib.explainer import explain
from selib.explanation import Explanation, Method
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

    def picture(self, settings: Settings, t: int) -> Picture:
        """Frame t with its heatmaps."""

    def code(self, stream: str, settings: Settings) -> str:
        """Two lines of Python that make the heatmap."""


Rival = Callable[[Tensor, Tensor], Tensor]
"""Another method: inputs (1, …) and targets int64 (1,) -> heatmaps (1, h, w) in [0, 1]."""


@dataclass(eq=False)
class ImageSubject(Subject):
    """An image and what a classifier makes of it."""

    model: nn.Module
    image: Tensor  # uint8 (3, H, W)
    inputs: Tensor  # (1, …) as the model takes it
    spelled: str  # the inputs in Python
    name: str
    outputs: Sequence[str]
    multilabel: bool
    rivals: Mapping[str, Rival]  # by name
    called: str = "model"  # in Python
    streams, frames, fps, modalities, sound = ("image",), 1, 0.0, (), b""

    def __post_init__(self) -> None:
        self.thumbnail = plot.rgb(self.image)
        self._shown = enlarged(self.thumbnail, HEIGHT)
        self._explain = lru_cache(1)(partial(explain, self.model, self.inputs))
        self._rival_map = lru_cache(None)(self._make_rival_map)

    def explanation(self, stream: str) -> Explanation:
        return self._explain()

    def picture(self, settings: Settings, t: int) -> Picture:
        """The image, the heatmap over it, and beside it that of the rival."""
        ours = heatmap(self._explain(), settings, settings.rules[0], self._shown.shape[:2])
        maps = {f"{settings.method}: {self.outputs[settings.target]}": ours}
        if settings.compare in self.rivals:
            maps[settings.compare] = self._rival_map(settings.compare, settings.target)
        image = torch.from_numpy(self._shown).permute(2, 0, 1)
        pictures = [self._shown]
        for one in maps.values():
            pictures.append(plot.overlay(image, one, opacity=settings.opacity, colormap=settings.colours))
        return plot.row_of(pictures, [self.name, *maps])

    def _make_rival_map(self, name: str, target: int) -> Tensor:
        device = next(self.model.parameters()).device
        inputs, targets = to_device(self.inputs, device), torch.tensor([target], device=device)
        found = resize(self.rivals[name](inputs, targets), self._shown.shape[:2])
        return found.clamp(0, 1)[0].cpu()

    def code(self, stream: str, settings: Settings) -> str:
        asked = f'"{settings.method}", target={settings.target}, select={spelled(settings.rules[0])}'
        named = self.outputs[settings.target]
        return f"ex = selib.explain({self.called}, {self.spelled})\nheatmap = ex.heatmap({asked})  # {named}"


def spelled(rule: Select) -> str:
    """A selection rule as it is written in Python."""
    values = [f"{value:g}" if isinstance(value, float) else str(value) for value in vars(rule).values()]
    return f"selib.{type(rule).__name__}({', '.join(values)})"


def heatmap(ex: Explanation, settings: Settings, rule: Select, size: Sequence[int]) -> Tensor:
    """The heatmap ``size`` in [0, 1] of a batch of one, interpolated or in squares."""
    cells = size if settings.smooth else ex.features.shape[2:]
    found = ex.heatmap(settings.method, settings.target, select=rule, size=cells)
    return F.interpolate(found[None], size, mode="nearest")[0, 0].cpu()


def encoded(picture: Picture, *, small: bool = False) -> bytes:
    """A picture as PNG bytes: made quickly, or small, with 256 colours."""
    file, image = BytesIO(), Image.fromarray(picture)
    if small:
        image.quantize().save(file, "PNG", optimize=True)
    else:
        image.save(file, "PNG", compress_level=1, compress_type=Z_RLE)
    return file.getvalue()


def enlarged(picture: Picture, height: int) -> Picture:
    """A picture brought to a height in pixels: averaged where it shrinks, in squares where it grows."""
    size = max(1, round(picture.shape[1] * height / picture.shape[0])), height
    way = Image.Resampling.BOX if height < picture.shape[0] else Image.Resampling.NEAREST
    return np.array(Image.fromarray(picture).resize(size, way))


def channel_maps(ex: Explanation, which: list[int], t: int, frames: int, settings: Settings) -> list[Picture]:
    """The maps of single channels in frame t of ``frames``, each on its own scale, 64 pixels high."""
    maps = ex.features[0, which]
    if maps.ndim == 4:  # of a clip: a map of fewer frames stands for several of the clip's
        maps = maps[:, t * maps.shape[1] // frames]
    size = 64, max(1, round(64 * maps.shape[2] / maps.shape[1]))
    maps = normalize(maps)
    maps = resize(maps, size) if settings.smooth else F.interpolate(maps[None], size, mode="nearest")[0]
    return list(np.rint(plot.coloured(maps.cpu().numpy(), settings.colours)).astype(np.uint8))


def gates_chart(weights: Tensor, chosen: Tensor, title: str) -> Picture:
    """Channel weights (C,) as bars in falling order: the chosen ones, bool (C,), blue; a line at the cut."""
    order = weights.argsort(descending=True, stable=True)
    values, picked = weights[order].tolist(), chosen[order].tolist()
    low, high = min(0.0, *values), max(0.0, *values)
    left, top, width, height = 46, 22, 360, 130
    x, y = _axis(0, len(values), left, width), _axis(high, low, top, height)
    page = Image.new("RGB", (left + width + 4, top + height + 22), "white")
    draw = ImageDraw.Draw(page)
    for place in np.argsort(picked, kind="stable"):  # the chosen ones last, so that none is hidden
        colour = plot.OURS if picked[place] else plot.CONTROLS
        start, end = sorted([y(0), y(values[place])])
        draw.rectangle((x(place), start, x(place + 0.8), end), fill=colour)
    if any(picked):
        cut = y(float(weights[chosen].min()))
        draw.line((left, cut, left + width, cut), fill=plot.OTHERS)
    draw.line((left, y(0), left + width, y(0)), fill=plot.INK)
    write = partial(draw.text, fill=plot.INK, font=plot.font(12))
    for tick in (low, high):
        write((left - 4, y(tick)), f"{tick:.2g}", anchor="rm")
    write((left, 2), title)
    write((left, top + height + 4), "channels, sorted")
    return np.asarray(page)


def _axis(low: float, high: float, start: float, length: float) -> Callable[[float], float]:
    """The axis from ``low`` at ``start`` to ``high``, ``length`` pixels further."""
    span = (high - low) or 1.0
    return lambda value: start + length * (value - low) / span


INK = "var(--jp-ui-font-color1, #333)"  # of JupyterLab's theme, light or dark


def shown(picture: Picture, said: str) -> str:
    """A picture as HTML, introduced to a screen reader by ``said``."""
    height, width = picture.shape[:2]
    data = base64.b64encode(encoded(picture)).decode()
    image = f'<image width="{width}" height="{height}" href="data:image/png;base64,{data}"/>'
    return f'<svg role="img" aria-label="{html.escape(said)}" width="{width}" height="{height}">{image}</svg>'


def answers(subject: Subject, before: Tensor, after: Tensor, target: int) -> str:
    """The largest logits (K,) and the target's as HTML: bars with all channels, rings with the chosen."""
    largest = before.argsort(descending=True)[:5].tolist()
    rows = largest if target in largest else [*largest, target]
    both = torch.stack([before[rows], after[rows]])
    x = _axis(min(0.0, float(both.min())), max(0.0, float(both.max())), 6, 170)
    table = ""
    for k, a, b in zip(rows, *both.tolist(), strict=True):
        start, end = sorted([x(0), x(a)])
        table += (
            f'<tr><td style="text-align:right;font-weight:{"bold" if k == target else "normal"}">'
            f'{html.escape(subject.outputs[k])}</td><td><svg width="182" height="18" style="display:block">'
            f'<rect x="{start:.1f}" y="2" width="{end - start:.1f}" height="13" fill="{plot.OURS}"/>'
            f'<circle cx="{x(b):.1f}" cy="8.5" r="4.5" fill="none" stroke="{plot.OTHERS}" stroke-width="2"/>'
            f"</svg></td><td>{a:.2f} → {b:.2f}</td></tr>"
        )
    share = [float((v.sigmoid() if subject.multilabel else v.softmax(0))[target]) for v in (before, after)]
    said = f"{subject.outputs[target]}: {share[0]:.0%} → {share[1]:.0%} with the selected channels only"
    return f'<div style="color:{INK};font:12px sans-serif">{html.escape(said)}<table>{table}</table></div>'


def copied(code: str) -> str:
    """Lines of Python as HTML, with a button that copies them."""
    escaped = html.escape(code)
    return (
        f'<button type="button" class="jupyter-button" title="copy these two lines" data-code="{escaped}" '
        'onclick="navigator.clipboard.writeText(this.dataset.code)">copy code</button>'
        f'<pre style="display:inline-block;margin:0 8px;color:{INK}">{escaped}</pre>'
    )
