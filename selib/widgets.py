"""The explorer for JupyterLab: look at images or clips, turn the knobs of an explanation, and see what each of them changes.

``Image`` and ``HTML`` with ``observe``, and no ``Output`` widget: the callbacks fire in plain Python as well, so they run headless and in
tests. The network before the gates runs once for each image or clip (a method that is compared runs it once for each target), and
JupyterLab sends the last of a burst of slider moves when the one before it is drawn, so no stale picture queues up.
"""

from __future__ import annotations

import asyncio
import base64
import html
import re
import wave as wav
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import ipywidgets
import numpy as np
from IPython.display import display
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import plot, views
from selib.atomic import replacing
from selib.explanation import METHODS, Explanation, Method
from selib.pixels import normalize
from selib.select import Channels, NormalQuantile, Select, Threshold, TopFraction, TopK
from selib.views import Clip, ClipSubject, ImageSubject, Look, Prepare, Subject, Wanted, encoded
from studies.data import ImageSet, SpeakerSet

RULES = ("top share", "k channels", "weight above", "paper's rule", "picked by hand")
COLORMAPS = (
    "inferno",
    "viridis",
    "cividis",
    "magma",
    "gray",
)  # all of them readable with every colour vision deficiency
STRIP = 8  # channels whose maps are shown
THUMBNAILS = 16  # beside each other
MOST = 200  # images or clips that one explorer holds


def explorer(
    model: nn.Module,
    data: ImageSet | SpeakerSet | Tensor | Mapping[str, Clip],
    *,
    classes: Sequence[str] | None = None,
    prepare: Prepare = normalize,
    multilabel: bool = False,
    modalities: Sequence[str] | None = None,
    fps: float = 25.0,
    seed: int | None = None,
) -> Explorer:
    """Look at what a model looks at, image by image or clip by clip.

    Args:
        model: with an SE block (``selib.attach_se``) or one of its own; for clips, with blocks on visual streams and one on the fused
            streams, called "fusion".
        data: a set of images or of clips, a ``subset`` of it; or images uint8 (N, 3, H, W); or {name: clip}, see :data:`selib.views.Clip`.
        classes: the names of the outputs, where the set does not know them.
        prepare: what turns images uint8 (B, 3, H, W) into what the model takes; for images in a tensor.
        multilabel: every output is a yes or no of its own; a set knows it.
        modalities: the segments of the fused channels in order; ``model.modalities`` by default.
        fps: frames a second of the clips; a set knows it.
        seed: the network's, for the caption of a saved picture.

    Raises:
        ValueError: no images or clips, more than 200, or what does not fit the model.
    """
    if not len(data):
        raise ValueError("there is nothing to look at: data is empty")
    if len(data) > MOST:
        raise ValueError(
            f"data holds {len(data)} images or clips: choose up to {MOST}, for example data.subset(range(12))"
        )
    subjects: Sequence[Subject]
    if isinstance(data, ImageSet | Tensor):
        subjects = _images(model, data, classes, prepare, multilabel)
    else:
        subjects = _clips(
            model, data, list(classes or ("speaking",)), views.modalities_of(model, modalities), fps
        )
    origin = [data.name + " (synthetic)" * data.synthetic] if isinstance(data, ImageSet | SpeakerSet) else []
    return Explorer(
        subjects, ", ".join([*origin, type(model).__name__, *[f"seed {seed}"] * (seed is not None)])
    )


def _images(
    model: nn.Module,
    data: ImageSet | Tensor,
    classes: Sequence[str] | None,
    prepare: Prepare,
    multilabel: bool,
) -> list[ImageSubject]:
    if isinstance(data, ImageSet):
        names = classes or data.classes
        truths = [""] * len(data) if data.multilabel else [f", {names[k]}" for k in data.targets.tolist()]
        return [
            ImageSubject(
                model,
                data.images[i],
                data.batch([i]),
                f"image {i}{truth}",
                names,
                multilabel=data.multilabel,
                spelled=f"data.batch([{i}])",
            )
            for i, truth in enumerate(truths)
        ]
    if classes is None:
        raise ValueError("pass classes=, the names of the model's outputs")
    return [
        ImageSubject(
            model,
            image,
            prepare(image[None]),
            f"image {i}",
            classes,
            multilabel=multilabel,
            spelled=f"prepare(data[{i}:{i + 1}])",
        )
        for i, image in enumerate(data)
    ]


def _clips(
    model: nn.Module,
    data: SpeakerSet | Mapping[str, Clip],
    outputs: Sequence[str],
    segments: Sequence[str],
    fps: float,
) -> list[ClipSubject]:
    if isinstance(data, SpeakerSet):
        return [
            ClipSubject(
                model,
                (*data.clip(i), data.wave(i)),
                f"clip {i}, {info.condition or info.entity}",
                segments,
                outputs,
                fps=info.fps,
                spelled=f"data.clip({i})[0]",
            )
            for i, info in enumerate(data.clips)
        ]
    return [
        ClipSubject(model, clip, name, segments, outputs, fps=fps, spelled=f"data[{name!r}][0]")
        for name, clip in data.items()
    ]


class Explorer(ipywidgets.VBox):  # type: ignore[misc]
    """The widget of :func:`explorer`. ``knobs`` are its controls by name, ``view`` the picture.

    In a page without widgets (an export, a site that renders notebooks) a still picture of its last state stands in its place.
    """

    def __init__(self, subjects: Sequence[Subject], origin: str = "") -> None:
        self._subjects, self._origin, self._quiet = subjects, origin, False
        self._small = [np.asarray(views.enlarged(s.thumbnail, 48), np.uint8) for s in subjects]
        first = subjects[0]
        clips = isinstance(first, ClipSubject)
        wide = {
            "style": {"description_width": "86px"},
            "layout": {"width": "330px"},
        }  # a dict: each makes a layout of its own
        self.knobs: dict[str, Any] = {
            "item": ipywidgets.Dropdown(
                options=[(s.name, i) for i, s in enumerate(subjects)],
                description="clip" if clips else "image",
                **wide,
            ),
            "previous": ipywidgets.Button(
                description="previous", icon="arrow-left", layout=ipywidgets.Layout(width="100px")
            ),
            "next": ipywidgets.Button(
                description="next", icon="arrow-right", layout=ipywidgets.Layout(width="100px")
            ),
            "target": ipywidgets.Dropdown(description="target", **wide),
            "stream": ipywidgets.Dropdown(options=first.streams, description="stream", **wide),
            "method": ipywidgets.Dropdown(options=METHODS, value="influence", description="method", **wide),
            "rule": ipywidgets.Dropdown(options=RULES, value=RULES[0], description="channels", **wide),
            "share": ipywidgets.FloatSlider(
                1.0, min=0.01, max=1.0, step=0.01, readout_format=".0%", description="top share", **wide
            ),
            "k": ipywidgets.IntSlider(10, 1, 10, description="k", **wide),
            "threshold": ipywidgets.FloatSlider(
                0.0, min=0.0, max=1.0, step=0.01, description="above", **wide
            ),
            "compare": ipywidgets.Dropdown(
                options=(views.NOTHING, *first.rivals), description="compare", **wide
            ),
            "colours": ipywidgets.Dropdown(options=COLORMAPS, description="colours", **wide),
            "opacity": ipywidgets.FloatSlider(
                0.85 if clips else 0.55, min=0.0, max=1.0, step=0.05, description="opacity", **wide
            ),
            "smooth": ipywidgets.Checkbox(
                True, description="smooth", indent=False, layout=ipywidgets.Layout(width="90px")
            ),
            "frame": ipywidgets.IntSlider(0, 0, first.frames - 1, description="frame", **wide),
            "play": ipywidgets.Play(min=0, max=first.frames - 1),
            "save": ipywidgets.Button(
                description="save PNG", icon="download", layout=ipywidgets.Layout(width="110px")
            ),
        }
        modalities = first.modalities if isinstance(first, ClipSubject) else ()
        self.switches = {
            name: ipywidgets.ToggleButton(
                True, description=name, icon="check", layout=ipywidgets.Layout(width="90px")
            )
            for name in modalities
        }
        natural = {"align_self": "flex-start", "max_width": "100%"}
        self.view, self.thumbnails = (ipywidgets.Image(format="png", layout=natural) for _ in range(2))
        self.gates, self.answers, self.lines, self.saved = (ipywidgets.HTML() for _ in range(4))
        self.sound = ipywidgets.Audio(value=b"", format="wav", autoplay=False, loop=False)
        self.maps = [
            ipywidgets.Image(format="png", layout={"height": "64px", "width": "auto", "align_self": "center"})
            for _ in range(STRIP)
        ]
        self.picks = [
            ipywidgets.ToggleButton(description="", layout=ipywidgets.Layout(width="112px"))
            for _ in range(STRIP)
        ]
        self._strip: list[int] = []  # the channels of the strip
        self._chosen: dict[str, set[int]] = {}  # picked by hand, by stream
        self._hidden = ipywidgets.HTML(layout={"display": "none"})
        self._stills: list[Any] = []  # handles of the still pictures on the page
        self._due: asyncio.TimerHandle | None = None
        self._effects: dict[tuple[int, str, bytes], Tensor] = {}
        if clips:  # in the browser: the kernel hears of the slider alone
            ipywidgets.jslink((self.knobs["play"], "value"), (self.knobs["frame"], "value"))
        self._observe()
        super().__init__(self._rows(clips))
        self._show_item()

    def _rows(self, clips: bool) -> list[Any]:
        knob, across = self.knobs, ipywidgets.HBox
        moving = [
            across(
                [
                    ipywidgets.Label("modalities", layout=ipywidgets.Layout(width="86px")),
                    *self.switches.values(),
                ]
            ),
            across([knob["play"], knob["frame"]]),
        ]
        strip = across(
            [ipywidgets.VBox([image, pick]) for image, pick in zip(self.maps, self.picks, strict=True)]
        )
        return [
            across([knob["item"], knob["previous"], knob["next"]]),
            self.thumbnails,
            across([knob["target"], knob["method"]]),
            across([knob["rule"], knob["share"], knob["k"], knob["threshold"]]),
            across([knob["compare"], *([knob["stream"]] if clips else [])]),
            across([knob["colours"], knob["opacity"], knob["smooth"]]),
            *(moving if clips else []),
            self.view,
            *([self.sound] if clips else []),
            across([self.gates, self.answers]),
            strip,
            across([knob["save"], self.lines]),
            self.saved,
        ]

    def _observe(self) -> None:
        knob = self.knobs
        knob["item"].observe(lambda _: self._show_item(), "value")
        knob["previous"].on_click(lambda _: self._step(-1))
        knob["next"].on_click(lambda _: self._step(+1))
        knob["save"].on_click(lambda _: self.save())
        knob["method"].observe(lambda change: self._show_method(change["old"], change["new"]), "value")
        for title in ("target", "stream"):
            knob[title].observe(lambda _: self._show_channels(), "value")
        knob["rule"].observe(lambda change: self._show_rule(change["old"], change["new"]), "value")
        for name in ("share", "k", "threshold", "compare", "colours", "opacity", "smooth", "frame"):
            knob[name].observe(lambda _: self.redraw(), "value")
        for switch in self.switches.values():
            switch.observe(lambda _: self.redraw(), "value")
        for place, pick in enumerate(self.picks):
            pick.observe(lambda change, place=place: self._pick(place, change["new"]), "value")

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Set knobs without a redraw for each of them."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    # ---- what is shown ---------------------------------------------------------------------------------------------------

    @property
    def subject(self) -> Subject:
        """The image or clip that is shown."""
        return self._subjects[self.knobs["item"].value]

    @property
    def rule(self) -> Select:
        """The selection that is set."""
        return self._rule(self.knobs["rule"].value, self._stream)

    def _rule(self, title: str, stream: str) -> Select:
        knob = self.knobs
        rules: dict[str, Select] = {
            RULES[0]: TopFraction(_written(knob["share"].value)),
            RULES[1]: TopK(knob["k"].value),
            RULES[2]: Threshold(_written(knob["threshold"].value)),
            RULES[3]: NormalQuantile(),
            RULES[4]: Channels(tuple(sorted(self._chosen[stream])))
            if stream in self._chosen
            else TopFraction(1.0),
        }
        return rules[title]

    def _picked(self, title: str) -> set[int]:
        """The channels that a rule selects here."""
        return set(
            self._rule(title, self._stream).mask(self._weights()[None])[0].nonzero().flatten().tolist()
        )

    def _step(self, by: int) -> None:
        item = self.knobs["item"]
        item.value = (item.value + by) % len(self._subjects)

    def _show_item(self) -> None:
        if self._quiet:
            return
        knob, subject = self.knobs, self.subject
        with self._silently():
            knob["frame"].value = min(knob["frame"].value, subject.frames - 1)
            knob["frame"].max = knob["play"].max = subject.frames - 1
            logits = subject.explanation(subject.streams[0]).logits[0].cpu()
            clip = logits.ndim == 2
            logits = logits.mean(0) if clip else logits
            order = logits.argsort(descending=True).tolist()
            knob["target"].options = [
                (f"{subject.outputs[k]}  ({'on average ' * clip}{float(logits[k]):.2f})", k) for k in order
            ]
            knob["target"].value = order[0]
            if isinstance(subject, ClipSubject):
                knob["play"].interval = round(1000 / subject.fps)
                self.sound.value = b"" if subject.wave is None else wav_bytes(subject.wave)
                self.sound.layout.display = "none" if subject.wave is None else ""
        page, place = divmod(knob["item"].value, THUMBNAILS)
        small = self._small[page * THUMBNAILS : (page + 1) * THUMBNAILS]
        small[place] = small[place].copy()
        small[place][:3] = small[place][-3:] = small[place][:, :3] = small[place][:, -3:] = (213, 94, 0)
        self.thumbnails.value = encoded(np.concatenate(small, 1))
        self._show_channels()

    def _show_channels(self) -> None:
        """Another item, target, stream or method: other weights, so other limits of the sliders."""
        if self._quiet:
            return
        with self._silently():
            weights = self._explained.channel_weights(self._method, self.knobs["target"].value)[
                0
            ]  # of all frames
            self.knobs["k"].max = len(weights)
            low, high = float(weights.min()), float(weights.max())
            slider, step = self.knobs["threshold"], (high - low) / 100 or 0.01
            slider.min, slider.max = (
                min(slider.min, low),
                max(slider.max, high + step),
            )  # never crossed on the way
            slider.step, slider.readout_format = step, ".3g"
            slider.value = min(max(slider.value, low), high)
            slider.min, slider.max = low, high + step
        self.redraw()

    def _show_method(self, old: str, new: str) -> None:
        """The paper's reading comes with the paper's rule, and takes it away again."""
        with self._silently():
            if new == "top-gate":
                self.knobs["rule"].value = RULES[3]
            elif old == "top-gate" and self.knobs["rule"].value == RULES[3]:
                self.knobs["rule"].value = RULES[0]
        self._show_channels()

    def _show_rule(self, old: str, new: str) -> None:
        """Picking by hand starts with what is selected."""
        if self._quiet:
            return
        if new == RULES[4] and self._stream not in self._chosen:
            self._chosen[self._stream] = self._picked(old)
        self.redraw()

    @property
    def _explained(self) -> Explanation:
        return self.subject.explanation(self._stream)

    @property
    def _method(self) -> Method:
        return cast(Method, self.knobs["method"].value)

    def _weights(self) -> Tensor:
        return views.weights_at(
            self._explained, self._method, self.knobs["target"].value, self.knobs["frame"].value
        )

    @property
    def _label(self) -> str:
        """What the channel weights are."""
        return "influence (logit)" if self._method == "influence" else "gate s"

    @property
    def _stream(self) -> str:
        chosen = self.knobs["stream"].value
        return str(chosen) if chosen in self.subject.streams else self.subject.streams[0]

    def _pick(self, place: int, on: bool) -> None:
        if self._quiet or place >= len(self._strip):
            return
        channels = self._picked(self.knobs["rule"].value)  # what is selected now, but for this channel
        self._chosen[self._stream] = (
            channels | {self._strip[place]} if on else channels - {self._strip[place]}
        )
        with self._silently():
            self.knobs["rule"].value = RULES[4]
        self.redraw()

    def redraw(self) -> None:
        """Draw everything anew from what is known: picture, SE vector, answers, maps of the first channels."""
        if self._quiet:
            return
        knob, subject, stream = self.knobs, self.subject, self._stream
        method, target, t = self._method, knob["target"].value, knob["frame"].value
        ex, weights = self._explained, self._weights()
        rule = self.rule
        chosen = rule.mask(weights[None])[0]
        for name, title in (("share", RULES[0]), ("k", RULES[1]), ("threshold", RULES[2])):
            knob[name].layout.display = "" if knob["rule"].value == title else "none"
        for switch in self.switches.values():
            switch.icon = "check" if switch.value else "times"
        self.view.value = encoded(self._picture())
        self.gates.value = views.gates_drawing(weights, chosen, self._label)
        before, after = views.at(ex.logits, t), views.at(self._alone(ex, stream, chosen), t)
        self.answers.value = views.answers_drawing(
            subject.outputs, before, after, target, multilabel=subject.multilabel
        )
        self._strip = weights.argsort(descending=True, stable=True)[:STRIP].tolist()
        with self._silently():
            pictures = views.channel_maps(ex, self._strip, t, self._look, frames=subject.frames)
            for place, (image, pick) in enumerate(zip(self.maps, self.picks, strict=True)):
                there = place < len(self._strip)
                image.layout.display = pick.layout.display = "" if there else "none"
                if there:
                    channel = self._strip[place]
                    image.value = encoded(pictures[place])
                    pick.description = f"#{channel} {float(weights[channel]):.2f}"
                    pick.value = bool(chosen[channel])
                    pick.icon = "check" if chosen[channel] else ""  # not by the shade alone
        code = subject.code(stream, method, target, rule)
        self.lines.value = (
            f'<button type="button" class="jupyter-button" title="copy these two lines" data-code="{html.escape(code)}" '
            f'onclick="navigator.clipboard.writeText(this.dataset.code)">copy code</button>'
            f'<pre style="display:inline-block;margin:0 8px;color:{views.INK}">{html.escape(code)}</pre>'
        )
        self._renew()

    def _alone(self, ex: Explanation, stream: str, chosen: Tensor) -> Tensor:
        """The logits with the chosen channels only, kept for the next frame or the way back."""
        key = self.knobs["item"].value, stream, chosen.numpy().tobytes()
        keep = chosen.to(ex.gates)
        return views.remembered(self._effects, key, lambda: ex.with_gates(lambda s: s * keep))

    @property
    def _look(self) -> Look:
        knob = self.knobs
        return Look(knob["colours"].value, knob["opacity"].value, knob["smooth"].value)

    def _picture(self) -> NDArray[np.uint8]:
        knob, subject = self.knobs, self.subject
        rules = {s: self._rule(knob["rule"].value, s) for s in subject.streams}
        off = frozenset(name for name, switch in self.switches.items() if not switch.value)
        wanted = Wanted(self._method, knob["target"].value, rules, self._look, knob["compare"].value, off)
        return subject.picture(wanted, knob["frame"].value)

    # ---- what remains of it ----------------------------------------------------------------------------------------------

    @property
    def caption(self) -> str:
        """Data, model, item, method, target, channels and seed of what is shown."""
        knob, subject = self.knobs, self.subject
        at = f", frame {knob['frame'].value}" if subject.frames > 1 else ""
        of = f" of the {self._stream}" if subject.frames > 1 else ""
        chosen = views.says(self.rule).removeprefix("selib.")
        what = f"{subject.name}{at}; {self._method} for {subject.outputs[knob['target'].value]}, channels{of} {chosen}"
        return f"{self._origin}: {what}" if self._origin else what

    def still(self) -> bytes:
        """What is shown as one picture with its caption, for pages without widgets: PNG."""
        weights = self._weights()
        chosen = self.rule.mask(weights[None])[0]
        return plot.screen(
            plot.explored(self._picture(), weights, chosen, label=self._label, caption=self.caption)
        )

    def save(self, folder: str | Path = ".") -> Path:
        """Write the still picture into a folder, named after what it shows; returns the file."""
        rival = self.knobs["compare"].value
        words = [
            "explorer",
            self.caption.removeprefix(f"{self._origin}: "),
            *[f"beside {rival}"] * (rival != views.NOTHING),
        ]
        name = re.sub(r"[^\w.]+", "-", " ".join(words))[:150].strip("-")
        path = Path(folder) / f"{name}.png"
        with replacing(path) as part:
            part.write_bytes(self.still())
        self.saved.value = f"<span style='color:{views.INK}'>saved {html.escape(str(path.resolve()))}</span>"
        return path

    def _ipython_display_(self) -> None:
        """Two outputs: the widget, and a still picture that JupyterLab hides behind an empty widget and other pages show.

        It is another output because it is renewed when the knobs have come to rest, and the widget under the hand must not be.
        """
        display(
            {kind: view for kind, view in self._repr_mimebundle_().items() if kind != "text/plain"}, raw=True
        )
        self._stills.append(display(self._placard(), raw=True, display_id=True))

    def _placard(self) -> dict[str, Any]:
        picture = base64.b64encode(self.still()).decode()
        return {**self._hidden._repr_mimebundle_(), "image/png": picture, "text/plain": self.caption}

    def _renew(self) -> None:
        """Have the still picture follow once nothing has moved for a second: it takes longer than a redraw."""
        if self._due is not None:
            self._due.cancel()
        try:
            self._due = asyncio.get_running_loop().call_later(1.0, self._hang) if self._stills else None
        except RuntimeError:  # plain Python, where nothing is displayed
            self._due = None

    def _hang(self) -> None:
        placard = self._placard()
        for still in self._stills:
            still.update(placard, raw=True)


def _written(value: float) -> float:
    """The value as :func:`selib.views.says` writes it, so that the copied lines select the same channels."""
    return float(f"{value:g}")


def wav_bytes(wave: NDArray[np.int16], rate: int = 16000) -> bytes:
    """A mono track as a WAV file."""
    buffer = BytesIO()
    with wav.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(wave.astype("<i2").tobytes())
    return buffer.getvalue()
