"""The explorer for JupyterLab: look at images, turn the knobs of an explanation, and see what each changes.

It is made of ``Image`` and ``HTML`` widgets and ``observe``, without an ``Output`` widget, so its callbacks also fire
in plain Python and in tests. The network before the gates runs once for each image. JupyterLab sends the last of a
burst of slider moves once the one before it is drawn, so no stale picture queues up.
"""

from __future__ import annotations

import asyncio
import base64
import html
import re
import wave as wav
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import plot, views
from selib.atomic import replacing
from selib.explanation import METHODS, Explanation, Method
from selib.pixels import normalize
from selib.select import Channels, NormalQuantile, Select, Threshold, TopFraction, TopK
from selib.views import ImageSubject, Settings, Subject, encoded

try:
    import ipywidgets
    from IPython.display import display
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"selib.widgets needs {error.name}: pip install 'selib[widgets]'", name=error.name
    ) from None

SHARE, COUNT, ABOVE, PAPER, BY_HAND = RULES = (
    "top share",
    "k channels",
    "weight above",
    "paper's rule",
    "picked by hand",
)
COLORMAPS = ("inferno", "viridis", "cividis", "magma", "gray")  # readable with colour vision deficiencies
STRIP = 8  # channels whose maps are shown
THUMBNAILS = 16  # beside each other
MOST = 200  # images that one explorer holds


class ImageSet(Protocol):
    """A data set that :func:`explorer` can show: images uint8 (N, 3, H, W) and what is known of them.

    Attributes:
        targets: class numbers (N,), or (N, K) of a multi-label set.
        synthetic: the images are rendered: the caption says so.
    """

    name: str
    images: Tensor
    classes: Sequence[str]
    targets: Tensor
    multilabel: bool
    synthetic: bool

    def batch(self, indices: Any) -> Tensor:
        """The images as the model takes them, (B, 3, H, W)."""
        ...


def explorer(
    model: nn.Module,
    images: Tensor | ImageSet,
    *,
    classes: Sequence[str] | None = None,
    prepare: Callable[[Tensor], Tensor] = normalize,
    seed: int | None = None,
) -> Explorer:
    """Look at what a model looks at, image by image.

    Args:
        model: with an SE block (``selib.attach_se``), or with one of its own.
        images: uint8 (N, 3, H, W), at most 200; or a set of images, see :class:`ImageSet`.
        classes: the names of the model's outputs; a set knows them.
        prepare: what turns images uint8 (B, 3, H, W) into what the model takes; a set does it itself.
        seed: the network's, for the caption of a saved picture.

    Raises:
        ValueError: no images, more than 200, or names that do not fit the model.
    """
    origin = type(model).__name__ + (f", seed {seed}" if seed is not None else "")
    if isinstance(images, Tensor):
        if classes is None:
            raise ValueError("pass classes=, the names of the model's outputs")
        check_count(len(images))
        way = "selib.pixels.normalize" if prepare is normalize else "prepare"
        make = partial(ImageSubject, model, outputs=classes, multilabel=False)
        subjects = [
            make(image, prepare(image[None]), f"image {i}", spelled=f"{way}(images[{i}:{i + 1}])")
            for i, image in enumerate(images)
        ]
        return Explorer(subjects, origin)
    check_count(len(images.images))
    make = partial(ImageSubject, model, outputs=classes or images.classes, multilabel=images.multilabel)
    subjects = []
    for i, image in enumerate(images.images):
        truth = "" if images.multilabel else f", {images.classes[int(images.targets[i])]}"
        batch = images.batch([i])
        subjects.append(make(image, batch, f"image {i}{truth}", spelled=f"images.batch([{i}])"))
    return Explorer(subjects, f"{images.name}{' (synthetic)' if images.synthetic else ''}, {origin}")


def check_count(count: int) -> None:
    """ValueError unless an explorer can hold so many images or clips."""
    if not 0 < count <= MOST:
        raise ValueError(
            f"the explorer shows 1 to {MOST} images or clips, not {count}: choose some, images[:12]"
        )


class Explorer(ipywidgets.VBox):  # type: ignore[misc]
    """The widget of :func:`explorer`. ``knobs`` are its controls by name, ``view`` the picture.

    In a page without widgets (an export, a site that renders notebooks) a still picture of its last state stands
    in its place.
    """

    def __init__(self, subjects: Sequence[Subject], origin: str) -> None:
        self._subjects, self._origin, self._quiet = subjects, origin, False
        self._small = [views.enlarged(subject.thumbnail, 48) for subject in subjects]
        self.knobs = _knobs(subjects)
        self.switches = {
            name: _sized(ipywidgets.ToggleButton, 90, value=True, description=name, icon="check")
            for name in subjects[0].modalities
        }
        natural = {"align_self": "flex-start", "max_width": "100%"}
        self.view, self.thumbnails = (ipywidgets.Image(format="png", layout=natural) for _ in range(2))
        self.gates, self.answers, self.lines, self.saved = (ipywidgets.HTML() for _ in range(4))
        self.sound = ipywidgets.Audio(value=b"", format="wav", autoplay=False, loop=False)
        small = {"height": "64px", "width": "auto", "align_self": "center"}
        self.maps = [ipywidgets.Image(format="png", layout=small) for _ in range(STRIP)]
        self.picks = [_sized(ipywidgets.ToggleButton, 112) for _ in range(STRIP)]
        self._strip: list[int] = []  # the channels of the strip
        self._chosen: dict[str, set[int]] = {}  # picked by hand, by stream
        self._hidden = ipywidgets.HTML(layout={"display": "none"})
        self._stills: list[Any] = []  # handles of the still pictures on the page
        self._due: asyncio.TimerHandle | None = None
        self._answer = lru_cache(1000)(self._run_head)
        self._observe()
        super().__init__(self._rows(moving=subjects[0].fps > 0))
        self._show_item()

    def _rows(self, *, moving: bool) -> list[Any]:
        """The controls and pictures from top to bottom; some only for clips."""
        knob, across = self.knobs, ipywidgets.HBox
        label = _sized(ipywidgets.Label, 86, value="modalities")
        strip = [ipywidgets.VBox(pair) for pair in zip(self.maps, self.picks, strict=True)]
        return [
            across([knob["item"], knob["previous"], knob["next"]]),
            self.thumbnails,
            across([knob["target"], knob["method"]]),
            across([knob["rule"], knob["share"], knob["k"], knob["threshold"]]),
            across([knob["compare"], *([knob["stream"]] if moving else [])]),
            across([knob["colours"], knob["opacity"], knob["smooth"]]),
            *([across([label, *self.switches.values()])] if moving else []),
            *([across([knob["play"], knob["frame"]])] if moving else []),
            self.view,
            *([self.sound] if moving else []),
            across([self.gates, self.answers]),
            across(strip),
            across([knob["save"], self.lines]),
            self.saved,
        ]

    def _observe(self) -> None:
        knob = self.knobs
        knob["previous"].on_click(lambda _: self._step(-1))
        knob["next"].on_click(lambda _: self._step(+1))
        knob["save"].on_click(lambda _: self.save())
        knob["item"].observe(lambda _: self._show_item(), "value")
        for name in ("target", "stream"):
            knob[name].observe(lambda _: self._show_channels(), "value")
        knob["method"].observe(lambda change: self._show_method(change["old"], change["new"]), "value")
        knob["rule"].observe(lambda change: self._show_rule(change["old"], change["new"]), "value")
        for name in ("share", "k", "threshold", "compare", "colours", "opacity", "smooth", "frame"):
            knob[name].observe(lambda _: self.redraw(), "value")
        for switch in self.switches.values():
            switch.observe(lambda _: self.redraw(), "value")
        for place, pick in enumerate(self.picks):
            pick.observe(lambda change, place=place: self._pick(place, change["new"]), "value")
        # In the browser: the kernel hears of the slider alone.
        ipywidgets.jslink((knob["play"], "value"), (knob["frame"], "value"))

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Set knobs without a redraw for each of them."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    # ---- what is set -------------------------------------------------------------------------------

    @property
    def subject(self) -> Subject:
        """The image or clip that is shown."""
        return self._subjects[self.knobs["item"].value]

    @property
    def rule(self) -> Select:
        """The selection that is set."""
        return self._rule(self.knobs["rule"].value, self._stream)

    def _rule(self, title: str, stream: str) -> Select:
        if title == SHARE:
            return TopFraction(_as_written(self.knobs["share"].value))
        if title == COUNT:
            return TopK(self.knobs["k"].value)
        if title == ABOVE:
            return Threshold(_as_written(self.knobs["threshold"].value))
        if title == PAPER:
            return NormalQuantile()
        chosen = self._chosen.get(stream)
        return TopFraction(1.0) if chosen is None else Channels(tuple(sorted(chosen)))

    @property
    def _settings(self) -> Settings:
        knob = self.knobs
        return Settings(
            method=self._method,
            target=knob["target"].value,
            rules=tuple(self._rule(knob["rule"].value, stream) for stream in self.subject.streams),
            rival=knob["compare"].value,
            off=frozenset(name for name, switch in self.switches.items() if not switch.value),
            colormap=knob["colours"].value,
            opacity=knob["opacity"].value,
            smooth=knob["smooth"].value,
        )

    @property
    def _method(self) -> Method:
        return cast(Method, self.knobs["method"].value)

    @property
    def _stream(self) -> str:
        chosen = self.knobs["stream"].value
        return str(chosen) if chosen in self.subject.streams else self.subject.streams[0]

    @property
    def _explanation(self) -> Explanation:
        return self.subject.explanation(self._stream)

    def _weights(self) -> Tensor:
        """What the channels are ranked by, (C,)."""
        target, t = self.knobs["target"].value, self.knobs["frame"].value
        return views.weights_at(self._explanation, self._method, target, t)

    @property
    def _label(self) -> str:
        """What the channel weights are."""
        return "influence (logit)" if self._method == "influence" else "gate s"

    def _selected(self, title: str) -> set[int]:
        """The channels that a rule selects here."""
        mask = self._rule(title, self._stream).mask(self._weights()[None])[0]
        return set(mask.nonzero().flatten().tolist())

    # ---- what follows from a move ------------------------------------------------------------------

    def _step(self, by: int) -> None:
        item = self.knobs["item"]
        item.value = (item.value + by) % len(self._subjects)

    def _show_item(self) -> None:
        """Another image or clip: its length, its answers, its sound."""
        if self._quiet:
            return
        knob, subject = self.knobs, self.subject
        with self._silently():
            knob["frame"].value = min(knob["frame"].value, subject.frames - 1)
            knob["frame"].max = knob["play"].max = subject.frames - 1
            logits = subject.explanation(subject.streams[0]).logits[0].cpu()
            average = "on average " if logits.ndim == 2 else ""
            logits = logits.mean(0) if logits.ndim == 2 else logits
            order = logits.argsort(descending=True).tolist()
            titles = [f"{subject.outputs[k]}  ({average}{float(logits[k]):.2f})" for k in order]
            knob["target"].options = list(zip(titles, order, strict=True))
            knob["target"].value = order[0]
            if subject.fps:
                knob["play"].interval = round(1000 / subject.fps)
            self.sound.value = b"" if subject.wave is None else wav_bytes(subject.wave)
            self.sound.layout.display = "none" if subject.wave is None else ""
        page, place = divmod(knob["item"].value, THUMBNAILS)
        small = self._small[page * THUMBNAILS : (page + 1) * THUMBNAILS]
        small[place] = framed = small[place].copy()
        framed[:3] = framed[-3:] = framed[:, :3] = framed[:, -3:] = (213, 94, 0)
        self.thumbnails.value = encoded(np.concatenate(small, 1))
        self._show_channels()

    def _show_channels(self) -> None:
        """Another item, target, stream or method: other weights, so other limits of the sliders."""
        if self._quiet:
            return
        with self._silently():
            target = self.knobs["target"].value
            weights = self._explanation.channel_weights(self._method, target)[0]  # of all frames
            self.knobs["k"].max = len(weights)
            low, high = float(weights.min()), float(weights.max())
            slider, step = self.knobs["threshold"], (high - low) / 100 or 0.01
            # The old and the new limits first, so that they never cross.
            slider.min, slider.max = min(slider.min, low), max(slider.max, high + step)
            slider.step, slider.readout_format = step, ".3g"
            slider.value = min(max(slider.value, low), high)
            slider.min, slider.max = low, high + step
        self.redraw()

    def _show_method(self, old: str, new: str) -> None:
        """The paper's reading comes with the paper's rule, and takes it away again."""
        with self._silently():
            if new == "top-gate":
                self.knobs["rule"].value = PAPER
            elif old == "top-gate" and self.knobs["rule"].value == PAPER:
                self.knobs["rule"].value = SHARE
        self._show_channels()

    def _show_rule(self, old: str, new: str) -> None:
        """Picking by hand starts with what is selected."""
        if self._quiet:
            return
        if new == BY_HAND and self._stream not in self._chosen:
            self._chosen[self._stream] = self._selected(old)
        self.redraw()

    def _pick(self, place: int, on: bool) -> None:
        """A channel of the strip was switched on or off: the others stay as they are selected now."""
        if self._quiet or place >= len(self._strip):
            return
        channel = {self._strip[place]}
        selected = self._selected(self.knobs["rule"].value)
        self._chosen[self._stream] = selected | channel if on else selected - channel
        with self._silently():
            self.knobs["rule"].value = BY_HAND
        self.redraw()

    # ---- what is drawn -----------------------------------------------------------------------------

    def redraw(self) -> None:
        """Draw everything anew from what is known: picture, SE vector, answers, maps of the first channels."""
        if self._quiet:
            return
        knob, subject, settings, stream = self.knobs, self.subject, self._settings, self._stream
        weights, rule, t = self._weights(), self.rule, knob["frame"].value
        chosen = rule.mask(weights[None])[0]
        for name, title in (("share", SHARE), ("k", COUNT), ("threshold", ABOVE)):
            knob[name].layout.display = "" if knob["rule"].value == title else "none"
        for switch in self.switches.values():
            switch.icon = "check" if switch.value else "times"
        self.view.value = encoded(subject.picture(settings, t))
        self.gates.value = views.gates_drawing(weights, chosen, self._label)
        alone = self._answer(knob["item"].value, stream, tuple(chosen.nonzero().flatten().tolist()))
        before, after = (views.logits_at(logits, t) for logits in (self._explanation.logits, alone))
        self.answers.value = views.answers_drawing(
            subject.outputs, before, after, settings.target, multilabel=subject.multilabel
        )
        self._draw_strip(weights, chosen)
        code = html.escape(subject.code(stream, settings.method, settings.target, rule))
        self.lines.value = (
            f'<button type="button" class="jupyter-button" title="copy these two lines" data-code="{code}" '
            'onclick="navigator.clipboard.writeText(this.dataset.code)">copy code</button>'
            f'<pre style="display:inline-block;margin:0 8px;color:{views.INK}">{code}</pre>'
        )
        self._renew()

    def _draw_strip(self, weights: Tensor, chosen: Tensor) -> None:
        """The maps of the channels with the largest weights, each with its switch."""
        self._strip = weights.argsort(descending=True, stable=True)[:STRIP].tolist()
        t, frames = self.knobs["frame"].value, self.subject.frames
        pictures = views.channel_maps(self._explanation, self._strip, t, self._settings, frames=frames)
        for image, pick in zip(self.maps, self.picks, strict=True):
            image.layout.display = pick.layout.display = "none"  # of those beyond the last channel
        with self._silently():
            for channel, picture, image, pick in zip(
                self._strip, pictures, self.maps, self.picks, strict=False
            ):
                image.layout.display = pick.layout.display = ""
                image.value = encoded(picture)
                pick.description = f"#{channel} {float(weights[channel]):.2f}"
                pick.value = bool(chosen[channel])
                pick.icon = "check" if chosen[channel] else ""  # not by the shade alone

    def _run_head(self, item: int, stream: str, channels: tuple[int, ...]) -> Tensor:
        """The logits with these channels only."""
        ex = self._subjects[item].explanation(stream)
        keep = Channels(channels).mask(ex.gates)
        return ex.with_gates(lambda s: s * keep)

    # ---- what remains ------------------------------------------------------------------------------

    @property
    def caption(self) -> str:
        """Data, model, item, method, target, channels and seed of what is shown."""
        return f"{self._origin}: {self._what}"

    @property
    def _what(self) -> str:
        subject, target = self.subject, self.subject.outputs[self.knobs["target"].value]
        at, of = "", ""
        if subject.fps:
            at, of = f", frame {self.knobs['frame'].value}", f" of the {self._stream}"
        chosen = views.spelled(self.rule).removeprefix("selib.")
        return f"{subject.name}{at}; {self._method} for {target}, channels{of} {chosen}"

    def still(self) -> bytes:
        """What is shown as one picture with its caption, for pages without widgets: PNG."""
        picture = self.subject.picture(self._settings, self.knobs["frame"].value)
        weights = self._weights()
        chosen = self.rule.mask(weights[None])[0]
        return plot.screen(plot.explored(picture, weights, chosen, label=self._label, caption=self.caption))

    def save(self, folder: str | Path = ".") -> Path:
        """Write the still picture into a folder, named after what it shows; returns the file."""
        rival = self.knobs["compare"].value
        beside = f" beside {rival}" if rival != views.NOTHING else ""
        name = re.sub(r"[^\w.]+", "-", f"explorer {self._what}{beside}")[:150].strip("-")
        path = Path(folder) / f"{name}.png"
        with replacing(path) as part:
            part.write_bytes(self.still())
        self.saved.value = f"<span style='color:{views.INK}'>saved {html.escape(str(path.resolve()))}</span>"
        return path

    def _ipython_display_(self) -> None:
        """Two outputs: the widget, and a still picture that JupyterLab hides behind an empty widget.

        Other pages show the picture. It is renewed when the knobs rest, which the widget itself must not be.
        """
        bundle = {kind: view for kind, view in self._repr_mimebundle_().items() if kind != "text/plain"}
        display(bundle, raw=True)
        self._stills.append(display(self._placard(), raw=True, display_id=True))

    def _placard(self) -> dict[str, Any]:
        picture = base64.b64encode(self.still()).decode()
        return {**self._hidden._repr_mimebundle_(), "image/png": picture, "text/plain": self.caption}

    def _renew(self) -> None:
        """Let the still picture follow once nothing has moved for a second: it takes longer than a redraw."""
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


def _sized(kind: Any, width: int, **options: Any) -> Any:
    """A control of this width in pixels."""
    return kind(layout={"width": f"{width}px"}, **options)


def _knobs(subjects: Sequence[Subject]) -> dict[str, Any]:
    """The controls by name."""
    first = subjects[0]
    moving = first.fps > 0
    select = partial(_sized, ipywidgets.Dropdown, 330, style={"description_width": "86px"})
    slide = partial(
        _sized, ipywidgets.FloatSlider, 330, style={"description_width": "86px"}, min=0.0, max=1.0
    )
    count = partial(_sized, ipywidgets.IntSlider, 330, style={"description_width": "86px"})
    press = partial(_sized, ipywidgets.Button)
    items = [(subject.name, i) for i, subject in enumerate(subjects)]
    rivals = (views.NOTHING, *first.rivals)
    last = first.frames - 1
    return {
        "item": select(options=items, description="clip" if moving else "image"),
        "previous": press(100, description="previous", icon="arrow-left"),
        "next": press(100, description="next", icon="arrow-right"),
        "target": select(description="target"),
        "stream": select(options=first.streams, description="stream"),
        "method": select(options=METHODS, value="influence", description="method"),
        "rule": select(options=RULES, value=SHARE, description="channels"),
        "share": slide(value=1.0, min=0.01, step=0.01, readout_format=".0%", description="top share"),
        "k": count(value=10, min=1, max=10, description="k"),
        "threshold": slide(value=0.0, step=0.01, description="above"),
        "compare": select(options=rivals, description="compare"),
        "colours": select(options=COLORMAPS, description="colours"),
        "opacity": slide(value=0.85 if moving else 0.55, step=0.05, description="opacity"),
        "smooth": _sized(ipywidgets.Checkbox, 90, value=True, description="smooth", indent=False),
        "frame": count(value=0, min=0, max=last, description="frame"),
        "play": ipywidgets.Play(min=0, max=last),
        "save": press(110, description="save PNG", icon="download"),
    }


def _as_written(value: float) -> float:
    """The value as :func:`selib.views.spelled` writes it: the copied lines select the same channels."""
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
