"""What the explorer shows, as numbers and pictures; :mod:`selib.widgets` adds the knobs.

Everything comes from one forward pass for each image, made when it is first looked at and kept. Matplotlib
draws nothing here: a redraw has to keep up with the hand on a knob.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from io import BytesIO
from math import expm1, log1p
from typing import Any, Protocol
from zlib import Z_RLE

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from selib import plot
from selib.explainer import explain
from selib.explanation import Explanation, Method
from selib.forward import to_device
from selib.heatmap import normalize, resize
from selib.plot import Picture
from selib.scores import ranked_precision
from selib.select import NormalQuantile, Select

HEIGHT = 224  # of an image on the screen, in pixels
NOTHING = "nothing"
READINGS: dict[str, tuple[Method, bool]] = {  # as the menu calls them: method, contrast
    "influence": ("influence", False),
    "log-odds influence": ("influence", True),
    "gate": ("gate", False),
    "top-gate": ("top-gate", False),
    "gated influence": ("gated-influence", False),
}


@dataclass(frozen=True)
class Settings:
    """What the knobs are set to, whatever the image and the frame."""

    reading: str  # of READINGS
    target: int
    rules: tuple[Select, ...]  # which channels take part, a rule for each stream of the subject
    compare: str = NOTHING  # another reading, or a rival
    off: frozenset[str] = frozenset()  # modalities of a clip whose gates are at zero
    colours: str = plot.COLORMAP
    opacity: float = 0.55
    smooth: bool = True  # interpolated, or cells as squares
    outline: bool = True  # of the truth, where it is known


@dataclass(frozen=True)
class Panel:
    """A picture of the view, its title, and the heatmap in it, whose value is told under the pointer."""

    title: str
    picture: Picture
    heat: NDArray[Any] | None = None  # (H, W), in [0, 1]


class Subject(Protocol):
    """One image, or one clip, that can be looked at."""

    name: str  # in the menu
    thumbnail: Picture
    outputs: Sequence[str]  # the names of the logits
    multilabel: bool  # each of them is a yes or no of its own
    others: Sequence[str]  # what it can be compared with
    streams: tuple[str, ...]  # the inputs that have an SE block and a picture
    frames: int  # 1 for an image
    fps: float  # 0 for an image
    modalities: tuple[str, ...]  # what can be switched off; none of an image
    sound: bytes  # a WAV file; empty for an image
    label: int | None  # the true class, where it is known
    truth: Tensor | None  # bool (H, W), where the object is

    def explanation(self, stream: str) -> Explanation:
        """The explanation of a batch of one."""

    def panels(self, settings: Settings, t: int) -> list[Panel]:
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
    label: int | None = None
    truth: Tensor | None = None  # bool (H, W)
    streams, frames, fps, modalities, sound = ("image",), 1, 0.0, (), b""

    def __post_init__(self) -> None:
        self.others = (*READINGS, *self.rivals)
        self.thumbnail = plot.rgb(self.image)
        self._shown = enlarged(self.thumbnail, HEIGHT)
        self._explain = lru_cache(1)(partial(explain, self.model, self.inputs))
        self._rival_map = lru_cache(None)(self._make_rival_map)
        if self.truth is not None:
            size = self._shown.shape[:2]
            self.truth = F.interpolate(self.truth[None, None].float(), size, mode="nearest")[0, 0] > 0.5

    def explanation(self, stream: str) -> Explanation:
        return self._explain()

    def panels(self, settings: Settings, t: int) -> list[Panel]:
        """The image beside its heatmap, or the heatmap beside another."""
        named, size = self.outputs[settings.target], self._shown.shape[:2]
        ours = heatmap(self._explain(), settings, settings.rules[0], size)
        found = [self._panel(f"{settings.reading}: {named}", ours, settings)]
        if settings.compare == NOTHING:
            return [Panel(self.name, self._outlined(self._shown, settings)), *found]
        if settings.compare in self.rivals:
            other = self._rival_map(settings.compare, settings.target)
        else:
            rule = NormalQuantile() if settings.compare == "top-gate" else settings.rules[0]
            other = heatmap(self._explain(), replace(settings, reading=settings.compare), rule, size)
        return [*found, self._panel(f"{settings.compare}: {named}", other, settings)]

    def _panel(self, title: str, heat: Tensor, settings: Settings) -> Panel:
        image = torch.from_numpy(self._shown).permute(2, 0, 1)
        picture = plot.overlay(image, heat, opacity=settings.opacity, colormap=settings.colours)
        if self.truth is not None and bool(self.truth.any()):
            inside = float(heat[self.truth].sum() / heat.sum().clamp_min(1e-12))
            precision = float(ranked_precision(heat.flatten()[None].double(), self.truth.flatten()[None]))
            title += f"\nenergy inside {inside:.2f}, AP {precision:.2f}"
        return Panel(title, self._outlined(picture, settings), heat.numpy())

    def _outlined(self, picture: Picture, settings: Settings) -> Picture:
        """With the truth's edge, white beside black."""
        if self.truth is None or not settings.outline:
            return picture
        picture, inside = picture.copy(), self.truth[None].float()
        wide = F.max_pool2d(inside, 5, 1, 2)[0] > 0
        line = F.max_pool2d(inside, 3, 1, 1)[0] > 0
        picture[(wide & ~line).numpy()] = 0
        picture[(line & ~self.truth).numpy()] = 255
        return picture

    def _make_rival_map(self, name: str, target: int) -> Tensor:
        device = next(self.model.parameters()).device
        inputs, targets = to_device(self.inputs, device), torch.tensor([target], device=device)
        found = resize(self.rivals[name](inputs, targets), self._shown.shape[:2])
        return found.clamp(0, 1)[0].cpu()

    def code(self, stream: str, settings: Settings) -> str:
        named = self.outputs[settings.target]
        asked = f"ex = selib.explain({self.called}, {self.spelled})"
        return f"{asked}\nheatmap = ex.heatmap({arguments(settings, settings.rules[0])})  # {named}"


def predicted(subject: Subject) -> int:
    """The largest logit, of a clip on average."""
    logits = subject.explanation(subject.streams[0]).logits[0]
    if logits.shape[-1] != len(subject.outputs):
        expected = f"{len(subject.outputs)} class names do not fit {logits.shape[-1]} logits"
        raise ValueError(f"{expected}: pass classes=")
    return int(logits.reshape(-1, logits.shape[-1]).mean(0).argmax())


def arguments(settings: Settings, rule: Select) -> str:
    """Of ``heatmap``, as they are written in Python."""
    method, contrast = READINGS[settings.reading]
    odds = ", contrast=True" if contrast else ""
    return f'"{method}", target={settings.target}{odds}, select={spelled(rule)}'


def spelled(rule: Select) -> str:
    """A selection rule as it is written in Python."""
    values = [f"{value:g}" if isinstance(value, float) else str(value) for value in vars(rule).values()]
    return f"selib.{type(rule).__name__}({', '.join(values)})"


def heatmap(ex: Explanation, settings: Settings, rule: Select, size: Sequence[int]) -> Tensor:
    """The heatmap ``size`` in [0, 1] of a batch of one, interpolated or in squares."""
    cells = size if settings.smooth else ex.features.shape[2:]
    method, contrast = READINGS[settings.reading]
    found = ex.heatmap(method, settings.target, contrast=contrast, select=rule, size=cells)
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


SCALE = 2  # pixels of a chart for each on the screen
WIDTH, LEFT, TOP, ACROSS, DOWN = 280, 38, 18, 236, 94  # of a chart and of its axes, on the screen


class Chart:
    """A white page to draw on, in pixels of the screen."""

    def __init__(self, height: int) -> None:
        self._page = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
        self._draw = ImageDraw.Draw(self._page)

    def bar(self, left: float, top: float, right: float, bottom: float, colour: Any) -> None:
        self._draw.rectangle([SCALE * value for value in (left, top, right, bottom)], fill=colour)

    def ring(self, x: float, y: float, colour: Any) -> None:
        at = [SCALE * value for value in (x - 4.5, y - 4.5, x + 4.5, y + 4.5)]
        self._draw.ellipse(at, outline=colour, width=2 * SCALE)

    def write(self, x: float, y: float, text: str, anchor: str = "la", *, bold: bool = False) -> None:
        at, font = (SCALE * x, SCALE * y), plot.font(11 * SCALE)
        self._draw.text(at, text, plot.INK, font, anchor, stroke_width=int(bold), stroke_fill=plot.INK)

    @property
    def picture(self) -> Picture:
        return np.asarray(self._page)


def edge(rank: float, count: int) -> float:
    """Where on its axis, from 0 to 1, the bar of this rank begins; many stand on a logarithmic axis."""
    return rank / count if count <= 32 else log1p(rank) / log1p(count)


def rank_at(x: float, count: int) -> float:
    """The rank at a place in the chart's picture, x from 0 to 1; the inverse of :func:`edge`."""
    place = min(1.0, max(0.0, (x * WIDTH - LEFT) / ACROSS))
    return place * count if count <= 32 else expm1(place * log1p(count))


def gates_chart(weights: Tensor, chosen: Tensor, title: str) -> Picture:
    """Channel weights (C,) as bars in falling order, the chosen ones, bool (C,), blue; a line at the cut."""
    order = weights.argsort(descending=True, stable=True)
    values, picked = weights[order].tolist(), chosen[order].tolist()
    low, high, count = min(0.0, *values), max(0.0, *values), len(values)
    page, y = Chart(TOP + DOWN + 20), _axis(high, low, TOP, DOWN)
    gap = 0.8 if count <= 32 else 1.0
    for rank in np.argsort(picked, kind="stable").tolist():  # the chosen ones last, so that none is hidden
        left, right = edge(rank, count), edge(rank + gap, count)
        top, bottom = sorted([y(0), y(values[rank])])
        colour = plot.OURS if picked[rank] else plot.CONTROLS
        page.bar(LEFT + ACROSS * left, top, LEFT + ACROSS * right, bottom, colour)
    page.bar(LEFT, y(0), LEFT + ACROSS, y(0), plot.INK)
    k = sum(picked)
    if all(picked[:k]):  # a cut, which can be dragged; picked by hand there is none
        cut = LEFT + ACROSS * edge(k, count)
        page.bar(cut - 0.5, TOP - 4, cut + 0.5, TOP + DOWN, plot.OTHERS)
        page.bar(cut - 3, TOP - 4, cut + 3, TOP + 6, plot.OTHERS)
    for value in (low, high):
        page.write(LEFT - 4, y(value), f"{value:.2g}", "rm")
    page.write(LEFT, 2, title)
    for rank in [1, 10, 100, 1000]:
        if 32 < count and 2 * rank < count:
            page.write(LEFT + ACROSS * edge(rank, count), TOP + DOWN + 4, str(rank), "ma")
    page.write(LEFT + ACROSS, TOP + DOWN + 4, f"{count}", "ra")
    return page.picture


def _axis(low: float, high: float, start: float, length: float) -> Callable[[float], float]:
    """The axis from ``low`` at ``start`` to ``high``, ``length`` pixels further."""
    span = (high - low) or 1.0
    return lambda value: start + length * (value - low) / span


ROW, HEAD = 18, 20  # of the answers, on the screen


def answers(subject: Subject, before: Tensor, after: Tensor, target: int) -> tuple[Picture, list[int], str]:
    """The largest logits (K,) and the target's: bars with all channels, rings with the chosen ones.

    Returns:
        The chart, the output of each of its rows, and its title.
    """
    largest = before.argsort(descending=True)[:5].tolist()
    rows = largest if target in largest else [*largest, target]
    both = torch.stack([before[rows], after[rows]])
    page, middle = Chart(HEAD + 6 * ROW), 104
    x = _axis(min(0.0, float(both.min())), max(0.0, float(both.max())), middle, 90)
    share = [float((v.sigmoid() if subject.multilabel else v.softmax(0))[target]) for v in (before, after)]
    title = f"{share[0]:.0%} → {share[1]:.0%} with the selected channels only"
    page.write(2, 2, title)
    for place, (k, a, b) in enumerate(zip(rows, *both.tolist(), strict=True)):
        y = HEAD + ROW * (place + 0.5)
        start, end = sorted([x(0), x(a)])
        page.write(middle - 4, y, plot.elided(subject.outputs[k], middle - 6, 11), "rm", bold=k == target)
        page.bar(start, y - 6, end, y + 6, plot.OURS)
        page.ring(x(b), y, plot.OTHERS)
        page.write(WIDTH - 2, y, f"{a:.2f} → {b:.2f}", "rm")
    return page.picture, rows, f"{subject.outputs[target]}: {title}"


def colour_bar(colours: str, height: int) -> Picture:
    """The scale of a heatmap from 1 at the top to 0, as high as the view."""
    page = np.full((height, 30, 3), 255, np.uint8)
    page[:, :12] = plot.coloured(np.linspace(1, 0, height), colours)[:, None]
    for text, y in (("1", 0), (".5", height // 2 - 7), ("0", height - 14)):
        plot.write_line(page, text, 15, y)
    return page


INK = "var(--jp-ui-font-color1, #333)"  # of JupyterLab's theme, light or dark
COPY = """const code = this.dataset.code, page = document.createElement('textarea');
page.value = code; document.body.append(page); page.select();
if (!navigator.clipboard) document.execCommand('copy');
page.remove();
navigator.clipboard?.writeText(code)"""  # the clipboard is only there in pages of this machine, or with https


def note(said: str) -> str:
    """A message as HTML."""
    style = f"color:{INK};font-size:11px;line-height:1.3;overflow-wrap:anywhere"
    return f'<div style="{style}">{html.escape(said)}</div>'


def copied(code: str) -> str:
    """Lines of Python as HTML, with a button that copies them."""
    escaped = html.escape(code)
    return (
        f'<button type="button" class="jupyter-button" title="copy these two lines" data-code="{escaped}" '
        f'onclick="{COPY}">copy code</button>'
        f'<pre style="margin:4px 0;color:{INK};font-size:11px;line-height:1.3;white-space:pre-wrap">'
        f"{escaped}</pre>"
    )
