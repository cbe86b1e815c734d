"""Widgets for JupyterLab: a channel picker for images, and a player for clips of people who may be speaking.

``Image`` + ``observe`` and no ``Output`` widget: the callbacks fire in plain Python as well, so they run headless and in tests. The
network before the gates is never run again.
"""

from __future__ import annotations

import html
import wave as wav
from collections.abc import Mapping, Sequence
from functools import cached_property
from io import BytesIO
from typing import Any

import cv2
import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import plot
from selib.attach import bare, to_device
from selib.clips import Film, Picture, probability
from selib.explanation import METHODS, Explanation, Streams, explain
from selib.select import NormalQuantile, Select, Threshold, TopFraction

HEIGHT = 224  # in pixels, at which images are shown
RULES = ("top share", "paper's rule", "weight above share")


def rule_of(name: str, share: float) -> Select:
    """A selection rule by its name in the menu; ``share`` is the slider's value in (0, 1]."""
    rules: dict[str, Select] = {RULES[0]: TopFraction(share), RULES[1]: NormalQuantile(), RULES[2]: Threshold(share)}
    return rules[name]


@plot.styled
def draw(
    ex: Explanation,
    images: Tensor,
    classes: Sequence[str],
    sample: int,
    method: Any,
    target: int,
    share: float,
    *,
    rule: str = RULES[0],
    opacity: float = 0.55,
    multilabel: bool = False,
) -> Figure:
    """The picker's view: the image, the heatmap of the selected channels, the sorted channel weights and the prediction.

    Args:
        images: uint8 (B, 3, H, W), as explained.
        target: class index.
        share: of the rule, in (0, 1]: the top share of channels that take part, or the weight that they must exceed.
        rule: one of ``RULES``.
        opacity: of the heatmap over the image, in [0, 1].
        multilabel: every output is a yes or no of its own (sigmoid), and not one class of many (softmax).
    """
    select = rule_of(rule, share)
    weights = ex.channel_weights(method, target)[sample]
    chosen = ex.selected(method, target, select)[sample]
    size = HEIGHT, round(HEIGHT * images.shape[3] / images.shape[2])
    heatmap = ex.heatmap(method, target, select=select, size=size)[sample]
    image = torch.nn.functional.interpolate(images[sample : sample + 1].float(), size, mode="nearest")[0].to(
        torch.uint8
    )
    logits = torch.stack([ex.logits[sample], ex.with_gates(lambda s: s * chosen)[sample]])
    before, after = logits.sigmoid() if multilabel else logits.softmax(1)
    fig, axes = plot.figure(9, 2.6, 1, 3)
    axes[0][0].imshow(image.permute(1, 2, 0).numpy())
    axes[0][0].set_title(
        f"says yes to {int((before > 0.5).sum())} of {len(classes)}"
        if multilabel
        else f"predicted: {classes[int(before.argmax())]} ({float(before.max()):.0%})"
    )
    axes[0][1].imshow(plot.overlay(image, heatmap, opacity=opacity))
    axes[0][1].set_title(
        f"{classes[target]}: {float(before[target]):.0%} → {float(after[target]):.0%} with these channels only"
    )
    for ax in axes[0][:2]:
        ax.set_axis_off()
    plot.sorted_gates(axes[0][2], weights, chosen, label="influence (logit)" if method == "influence" else "gate s")
    return fig


def png(fig: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = BytesIO()
    fig.savefig(buffer, format="png", dpi=96, metadata={"Software": None})
    return buffer.getvalue()


def channel_picker(
    ex: Explanation, images: Tensor, classes: Sequence[str], *, multilabel: bool = False
) -> ipywidgets.VBox:
    """Sliders and menus over an explanation of a few images: image, class, method, selection of channels, opacity.

    Raises:
        ValueError: if images and explanation differ in number, or the class names do not match the logits.
    """
    if len(images) != len(ex.logits) or len(classes) != ex.logits.shape[1]:
        raise ValueError(
            f"{len(images)} images and {len(classes)} class names do not fit an explanation of {len(ex.logits)} samples and "
            f"{ex.logits.shape[1]} classes"
        )
    wide = {"style": {"description_width": "110px"}, "layout": ipywidgets.Layout(width="420px")}
    sample = ipywidgets.IntSlider(0, 0, len(images) - 1, description="image", **wide)
    method = ipywidgets.Dropdown(options=METHODS, value="influence", description="method", **wide)
    options = [(name, index) for index, name in enumerate(classes)]
    target = ipywidgets.Dropdown(options=options, value=int(ex.predicted[0]), description="class", **wide)
    share = ipywidgets.FloatSlider(
        0.10, min=0.01, max=1.0, step=0.01, readout_format=".0%", description="top channels", **wide
    )
    rule = ipywidgets.Dropdown(options=RULES, value=RULES[0], description="selection", **wide)
    opacity = ipywidgets.FloatSlider(0.55, min=0.0, max=1.0, step=0.05, description="opacity", **wide)
    view = ipywidgets.Image(format="png")

    def redraw(_: Any = None) -> None:
        knobs = (sample.value, method.value, target.value, share.value)
        looks = {"rule": rule.value, "opacity": opacity.value, "multilabel": multilabel}
        view.value = png(draw(ex, images, classes, *knobs, **looks))

    def follow_prediction(change: Any) -> None:
        predicted = int(ex.predicted[change["new"]])
        if target.value == predicted:
            redraw()
        else:
            target.value = predicted  # which redraws

    sample.observe(follow_prediction, "value")
    for control in (method, target, share, rule, opacity):
        control.observe(redraw, "value")
    redraw()
    rows = ((sample, target), (method, share), (rule, opacity))
    return ipywidgets.VBox([*(ipywidgets.HBox(list(row)) for row in rows), view])


# ---- clips ---------------------------------------------------------------------------------------------------------------

Clip = tuple[Mapping[str, Tensor], Tensor | None, NDArray[np.int16] | None]
"""Inputs of one clip with B = 1, its labels (1, T), and its sound track int16 (N,); ``None`` where there is none."""


KEPT = 32  # heatmaps of a clip, of about a megabyte each


class Seen:
    """One clip with everything that is known of it, each part computed when it is first asked for, and kept.

    Args:
        model: a detector with SE blocks for its visual streams and one on the fused streams, called "fusion".
        modalities: the names of the equal segments of the fused channels.
        target: the logit that stands for speaking.
    """

    def __init__(self, model: nn.Module, clip: Clip, modalities: Sequence[str], target: int) -> None:
        self.inputs, self.labels, self.wave = clip
        self.frames = {name: plot.pixels(x[0]) for name, x in self.inputs.items() if x.ndim == 4}
        self._model, self._modalities, self._target = model, modalities, target
        self._maps: dict[tuple[str, str, float], NDArray[np.uint8]] = {}
        self._scores: dict[frozenset[str], NDArray[Any]] = {}

    @cached_property
    def explained(self) -> Streams:
        """The explanation, one forward pass."""
        found = explain(self._model, to_device(dict(self.inputs), next(self._model.parameters()).device))
        if not isinstance(found, Streams) or "fusion" not in found.streams:
            raise ValueError(
                'the player switches modalities at an SE block called "fusion": attach_se(…, at={"face": …, "fusion": …})'
            )
        channels = found.streams["fusion"].gates.shape[1]
        if channels % len(self._modalities):
            raise ValueError(f"{channels} fused channels are no {len(self._modalities)} equal segments: {', '.join(self._modalities)}")  # fmt: skip
        return found

    def scores(self, off: frozenset[str] = frozenset()) -> NDArray[Any]:
        """Probability of speaking (T,) with the gates of some modalities at zero."""
        if off not in self._scores:
            fusion = self.explained.streams["fusion"]
            logits = fusion.logits
            if off:
                keep = torch.tensor([float(name not in off) for name in self._modalities], device=fusion.gates.device)
                keep = keep.repeat_interleave(fusion.gates.shape[1] // len(keep))
                logits = fusion.with_gates(lambda s: s * keep)
            self._scores[off] = probability(logits[0], self._target)
        return self._scores[off]

    def map(self, stream: str, method: Any, share: float) -> NDArray[np.uint8]:
        """A stream's heatmaps (T, H, W) from its top share of channels, 0 to 255."""
        key = stream, str(method), share
        if key not in self._maps:
            ex = self.explained.streams[stream]
            found = ex.heatmap(method, self._target, select=TopFraction(share))[0]
            if len(self._maps) >= KEPT:
                self._maps.pop(next(iter(self._maps)))  # the oldest
            self._maps[key] = plot.pixels(found)
        return self._maps[key]

    def film(self, streams: Sequence[str], method: Any, share: float, off: frozenset[str], fps: float) -> Film:
        """The clip with maps on some streams: the score with everything, and beside it that without what is off."""
        scores = {"all": self.scores()} | ({f"without {', '.join(sorted(off))}": self.scores(off)} if off else {})
        maps = {name: self.map(name, method, share) for name in streams if name not in off}
        labels = None if self.labels is None else self.labels[0].cpu()
        return Film(self.frames, maps, scores=scores, labels=labels, wave=self.wave, off=off, fps=fps)


def encoded(picture: Picture) -> bytes:
    """A picture as PNG bytes, quickly rather than small."""
    return cv2.imencode(".png", picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def wav_bytes(wave: NDArray[np.int16], rate: int = 16000) -> bytes:
    """A mono track as a WAV file."""
    buffer = BytesIO()
    with wav.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(wave.astype("<i2").tobytes())
    return buffer.getvalue()


def clip_player(
    model: nn.Module,
    clips: Mapping[str, Clip],
    *,
    target: int = 0,
    modalities: Sequence[str] | None = None,
    fps: float = 25.0,
) -> ipywidgets.VBox:
    """Play clips and see what a detector goes by: a time slider, switches for the modalities, and which heatmap is shown.

    Switching a modality off sets its gates at the fusion to zero. The score with everything stays as a solid line, the score without is
    dashed. Maps and scores are computed when they are first shown and kept, so moving through time only draws.

    Args:
        model: with SE blocks on its visual streams, and one called "fusion" on the fused ones.
        clips: {name in the menu: (inputs, labels, sound)}, see :data:`Clip`.
        target: the logit that stands for speaking.
        modalities: the segments of the fused channels in order; ``model.modalities`` by default.

    Raises:
        ValueError: no clips, no block "fusion", no block on any stream of pictures, or unknown modalities.
    """
    names = tuple(getattr(bare(model), "modalities", ()) if modalities is None else modalities)
    if not clips or not names:
        raise ValueError("no clips to play" if not clips else "pass modalities=, the segments of the fused channels")
    seen = {name: Seen(model, clip, names, target) for name, clip in clips.items()}
    first = next(iter(seen.values()))
    visual = [name for name in first.frames if name in first.explained.streams]
    if not visual:
        raise ValueError(f"no SE block on a stream of pictures: {', '.join(first.frames)} have none")

    wide = {"style": {"description_width": "80px"}, "layout": ipywidgets.Layout(width="330px")}
    chosen = ipywidgets.Dropdown(options=list(clips), description="clip", **wide)
    shown = [(" and ".join(visual), tuple(visual))] * (len(visual) > 1) + [(name, (name,)) for name in visual]
    stream = ipywidgets.Dropdown(options=shown, description="map on", **wide)
    method = ipywidgets.Dropdown(options=METHODS, value="influence", description="method", **wide)
    share = ipywidgets.FloatSlider(1.0, min=0.01, max=1.0, step=0.01, readout_format=".0%", description="top channels", continuous_update=False, **wide)  # fmt: skip
    switches = {name: ipywidgets.ToggleButton(True, description=name, icon="check", layout=ipywidgets.Layout(width="90px")) for name in names}  # fmt: skip
    time = ipywidgets.IntSlider(0, 0, _last(first), description="frame", **wide)
    play = ipywidgets.Play(min=0, max=_last(first), interval=round(1000 / fps))
    ipywidgets.jslink((play, "value"), (time, "value"))  # in the browser: the kernel hears of the slider alone
    sound = ipywidgets.Audio(value=b"", format="wav", autoplay=False, loop=False)
    view, said = ipywidgets.Image(format="png"), ipywidgets.HTML()
    film: Film | None = None

    def redraw(_: Any = None) -> None:
        if film is not None:
            t = min(time.value, len(film) - 1)
            view.value = encoded(film[t])
            lines = (f"{name} {line[t]:.2f}" for name, line in film.scores.items())
            said.value = html.escape(f"{t / fps:.2f} s: probability of speaking " + ", ".join(lines))

    def prepare(_: Any = None) -> None:
        nonlocal film
        off = frozenset(name for name, switch in switches.items() if not switch.value)
        for switch in switches.values():
            switch.icon = "check" if switch.value else "times"
        film = seen[chosen.value].film(stream.value, method.value, share.value, off, fps)
        redraw()

    def another(_: Any = None) -> None:
        clip = seen[chosen.value]
        play.max = _last(clip)
        sound.value = b"" if clip.wave is None else wav_bytes(clip.wave)
        sound.layout.display = "none" if clip.wave is None else ""
        prepare()
        time.max = _last(clip)  # a shorter clip moves the slider back, which redraws

    time.observe(redraw, "value")
    chosen.observe(another, "value")
    for control in (stream, method, share, *switches.values()):
        control.observe(prepare, "value")
    another()
    label = ipywidgets.Label("modalities", layout=ipywidgets.Layout(width="80px"))
    rows = [[chosen, stream], [method, share], [label, *switches.values()], [play, time]]
    return ipywidgets.VBox([*(ipywidgets.HBox(row) for row in rows), view, said, sound])


def _last(clip: Seen) -> int:
    return len(next(iter(clip.frames.values()))) - 1
