"""The explorer for JupyterLab: look at images, turn the knobs of an explanation, and see what each changes.

There is no ``Output`` widget, so its callbacks fire in plain Python and in tests, too. JupyterLab sends the
last of a burst of slider moves once the one before it is drawn: no stale picture queues up.
"""

from __future__ import annotations

import asyncio
import base64
import html
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor, nn

from selib import plot, views
from selib.atomic import replacing
from selib.explainer import explain
from selib.explanation import METHODS, Explanation
from selib.images import Transform, image_files, prepared
from selib.select import Channels, NormalQuantile, Select, Threshold, TopFraction, TopK
from selib.views import ImageSubject, Settings, Subject, encoded

try:
    import ipywidgets
    from IPython.display import display
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"selib.widgets needs {error.name}: pip install 'selib[widgets]'", name=error.name
    ) from None

RULES = ("top share", "k channels", "weight above", "paper's rule", "picked by hand")
SHARE, COUNT, ABOVE, PAPER, BY_HAND = RULES
COLORMAPS = ("inferno", "viridis", "cividis", "magma", "gray")  # readable with colour vision deficiencies
STRIP = 8  # channels whose maps are shown
THUMBNAILS = 16  # beside each other
MOST = 200  # images that one explorer holds
# The still picture is hidden while the widget beside it lives; where it does not, the error messages of dead
# widgets are, progress bars' too: texts without elements.
STILL = """<style>
.jp-OutputArea:has(.widget-vbox) .selib-still { display: none }
.jp-Notebook:has(.selib-still) .jp-OutputArea-output.jupyter-widgets:not(:has(*)) { display: none }
</style>"""


class ImageSet(Protocol):
    """A set of images uint8 (N, 3, H, W) that :func:`explorer` can show, with what is known of them."""

    name: str
    images: Tensor
    targets: Tensor  # class numbers (N,), or (N, K) of a multi-label set
    synthetic: bool  # rendered: the caption says so

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def multilabel(self) -> bool: ...

    def batch(self, indices: Any) -> Tensor: ...  # (B, 3, H, W) as the model takes it


def explorer(
    model: nn.Module,
    images: Any,
    *,
    classes: Sequence[str] | None = None,
    transform: Transform | None = None,
    rivals: Mapping[str, views.Rival] | None = None,
    seed: int | None = None,
) -> Explorer:
    """Look at what a model looks at, image by image.

    Args:
        model: with an SE block (``selib.attach_se``), or with one of its own.
        images: as :func:`selib.explain` takes them, at most 200 (else ValueError); or a set of images, see
            :class:`ImageSet`.
        classes: the names of the model's outputs, by default numbers; a set knows them.
        transform: of images, see :func:`selib.explain`; a set does it itself.
        rivals: {name: another method}, to compare with; see :data:`selib.views.Rival`.
        seed: the network's, for the caption of a saved picture.
    """
    origin = type(model).__name__ + (f", seed {seed}" if seed is not None else "")
    spell = partial(_spelled, sys._getframe(1))
    make = partial(ImageSubject, model, rivals=rivals or {}, called=spell(model, "model"))
    given = spell(images, "images")
    subjects = []
    if not hasattr(images, "targets"):
        images = image_files(Path(images)) if isinstance(images, (str, Path)) else images
        if not isinstance(images, Image.Image):
            check_count(len(images))
        found = prepared(model, images, transform)
        check_count(len(found.names))
        if classes is None:
            outputs = explain(model, found.batch[:1]).logits.shape[-1]
            classes = [f"class {k}" for k in range(outputs)]
        way = "" if transform is None else f", transform={spell(transform, 'transform')}"
        for i, (name, image) in enumerate(zip(found.names, found.pixels, strict=True)):
            code = found.sources[i] or f"{given}[{i}:{i + 1}]"
            subjects.append(make(image, found.batch[i : i + 1], code + way, name, classes, False))
    else:
        check_count(len(images.images))
        origin = f"{images.name}{' (synthetic)' if images.synthetic else ''}, {origin}"
        names = classes or images.classes
        for i, image in enumerate(images.images):
            title = f"image {i}" if images.multilabel else f"image {i}, {names[int(images.targets[i])]}"
            batch, code = images.batch([i]), f"{given}.batch([{i}])"
            subjects.append(make(image, batch, code, title, names, images.multilabel))
    return Explorer(subjects, origin)


def _spelled(frame: FrameType, value: object, otherwise: str) -> str:
    """What the caller calls a value, so that copied lines run where they are pasted."""
    names = [name for name, own in frame.f_locals.items() if own is value and not name.startswith("_")]
    return otherwise if otherwise in names or not names else names[0]


def check_count(count: int) -> None:
    """ValueError unless an explorer can hold so many images or clips."""
    if not 0 < count <= MOST:
        raise ValueError(f"the explorer shows 1 to {MOST} images or clips, not {count}: choose some of them")


class Explorer(ipywidgets.VBox):  # type: ignore[misc]
    """The widget of :func:`explorer`. ``knobs`` are its controls by name, ``view`` the picture.

    In a page without widgets, such as an export, a still picture of its last state stands in its place.
    """

    def __init__(self, subjects: Sequence[Subject], origin: str) -> None:
        self._subjects, self._origin = subjects, origin
        self._busy = False  # True while knobs are set that follow from another
        self.knobs = _knobs(subjects)
        switch = partial(_sized, ipywidgets.ToggleButton, 90, value=True, icon="check")
        self.switches = {name: switch(description=name) for name in subjects[0].modalities}
        natural = {"align_self": "flex-start", "max_width": "100%"}
        self.view, self.thumbnails = (ipywidgets.Image(format="png", layout=natural) for _ in range(2))
        self.gates, self.answers, self.lines, self.saved = (ipywidgets.HTML() for _ in range(4))
        self.sound = ipywidgets.Audio(value=b"", format="wav", autoplay=False, loop=False)
        small = {"height": "64px", "width": "auto", "align_self": "center"}
        self.maps = [ipywidgets.Image(format="png", layout=small) for _ in range(STRIP)]
        self.picks = [_sized(ipywidgets.ToggleButton, 112) for _ in range(STRIP)]
        self._chosen: dict[str, set[int]] = {}  # channels picked by hand, by stream
        self._stills: list[Any] = []  # handles of the still pictures on the page
        self._due: asyncio.TimerHandle | None = None
        self._answer = lru_cache(1000)(self._run_head)
        self._connect()
        super().__init__(self._rows())
        self._moved("item")

    def _rows(self) -> list[Any]:
        """The controls and pictures from top to bottom; some only for clips."""
        knob, across = self.knobs, ipywidgets.HBox
        rows = [
            across([knob["item"], knob["previous"], knob["next"]]),
            self.thumbnails,
            across([knob["target"], knob["method"]]),
            across([knob["rule"], knob["share"], knob["k"], knob["threshold"]]),
            across([knob["colours"], knob["opacity"], knob["smooth"]]),
            across([knob["compare"]]),
        ]
        if self.subject.fps:
            rows.append(across([knob["stream"], ipywidgets.Label("modalities"), *self.switches.values()]))
            rows.append(across([knob["play"], knob["frame"], self.sound]))
        strip = [ipywidgets.VBox(pair) for pair in zip(self.maps, self.picks, strict=True)]
        drawn = across([self.gates, self.answers])
        return [*rows, self.view, drawn, across(strip), across([knob["save"], self.lines]), self.saved]

    def _connect(self) -> None:
        knob = self.knobs
        knob["previous"].on_click(lambda _: self._step(-1))
        knob["next"].on_click(lambda _: self._step(+1))
        knob["save"].on_click(lambda _: self.save())
        # In the browser: the kernel hears of the slider alone.
        ipywidgets.jslink((knob["play"], "value"), (knob["frame"], "value"))
        for name, control in knob.items():
            if name not in ("previous", "next", "save", "play"):
                control.observe(partial(self._moved, name), "value")
        for switch in self.switches.values():
            switch.observe(partial(self._moved, "switch"), "value")
        for pick in self.picks:
            pick.observe(partial(self._moved, "pick"), "value")

    def _at(self, name: str) -> Any:
        return self.knobs[name].value

    @property
    def subject(self) -> Subject:
        """The image or clip that is shown."""
        return self._subjects[self._at("item")]

    @property
    def _explanation(self) -> Explanation:
        return self.subject.explanation(self._at("stream"))

    @property
    def rule(self) -> Select:
        """The selection that is set."""
        return self._rule(self._at("stream"))

    def _rule(self, stream: str) -> Select:
        by_hand = self._chosen.get(stream)
        rules: dict[str, Select] = {
            SHARE: TopFraction(round(self._at("share"), 2)),
            COUNT: TopK(self._at("k")),
            ABOVE: Threshold(float(f"{self._at('threshold'):g}")),  # as it is written in the copied lines
            PAPER: NormalQuantile(),
            BY_HAND: TopFraction(1.0) if by_hand is None else Channels(tuple(sorted(by_hand))),
        }
        return rules[self._at("rule")]

    def _settings(self) -> Settings:
        names = ("method", "target", "compare", "colours", "opacity", "smooth")
        rules = tuple(self._rule(stream) for stream in self.subject.streams)
        off = frozenset(name for name, switch in self.switches.items() if not switch.value)
        return Settings(rules=rules, off=off, **{name: self._at(name) for name in names})

    def _step(self, by: int) -> None:
        self.knobs["item"].value = (self._at("item") + by) % len(self._subjects)

    def _moved(self, name: str, change: Any = None) -> None:
        """A control was moved: set the knobs that follow from it, then redraw, once."""
        if self._busy:
            return
        self._busy = True
        try:
            self._follow(name, change)
            self._redraw()
        finally:
            self._busy = False

    def _follow(self, name: str, change: Any) -> None:
        rule, stream = self.knobs["rule"], self._at("stream")
        if name == "item":
            self._show_item()
        elif name == "method":  # the paper's reading comes with the paper's rule, and takes it away again
            if change["new"] == "top-gate":
                rule.value = PAPER
            elif change["old"] == "top-gate" and rule.value == PAPER:
                rule.value = SHARE
        elif name == "rule" and rule.value == BY_HAND:  # picking starts with what is selected
            self._chosen.setdefault(stream, self._selected)
        elif name == "pick":  # channels out of sight stay as they are selected now
            on = {k for k, pick in zip(self._strip, self.picks, strict=False) if pick.value}
            self._chosen[stream] = self._selected - set(self._strip) | on
            rule.value = BY_HAND
        if name in ("item", "target", "stream", "method"):
            self._set_limits()

    def _show_item(self) -> None:
        """Another image or clip: its length, its answers, its sound."""
        knob, subject = self.knobs, self.subject
        knob["frame"].max = knob["play"].max = subject.frames - 1
        if subject.fps:
            knob["play"].interval = round(1000 / subject.fps)
        logits, names = subject.explanation(subject.streams[0]).logits[0].cpu(), subject.outputs
        if logits.shape[-1] != len(names):
            raise ValueError(f"{len(names)} class names do not fit {logits.shape[-1]} logits: pass classes=")
        average = "on average " if subject.fps else ""
        logits = logits.reshape(-1, len(names)).mean(0)
        order = logits.argsort(descending=True).tolist()
        titles = [f"{names[k]}  ({average}{float(logits[k]):.2f})" for k in order]
        knob["target"].options = list(zip(titles, order, strict=True))
        knob["target"].value = order[0]
        self.sound.value, self.sound.layout.display = subject.sound, "" if subject.sound else "none"
        page, place = divmod(self._at("item"), THUMBNAILS)
        shown = self._subjects[page * THUMBNAILS : (page + 1) * THUMBNAILS]
        small = [views.enlarged(one.thumbnail, 48) for one in shown]
        framed = small[place]
        framed[:3] = framed[-3:] = framed[:, :3] = framed[:, -3:] = (213, 94, 0)
        self.thumbnails.value = encoded(np.concatenate(small, 1))

    def _set_limits(self) -> None:
        """Other weights, so other limits of the sliders."""
        weights = self._explanation.channel_weights(self._at("method"), self._at("target"))[0]
        self.knobs["k"].max = len(weights)
        low, high = float(weights.min()), float(weights.max())  # of all frames
        slider, step = self.knobs["threshold"], (high - low) / 100 or 0.01
        slider.max = max(slider.max, high + step)  # first, for the limits must never cross
        slider.min, slider.max, slider.step = low, high + step, step

    @property
    def _selected(self) -> set[int]:
        return set(self._mask.nonzero().flatten().tolist())

    def _redraw(self) -> None:
        """Draw everything anew: picture, SE vector, answers, maps of the first channels."""
        subject, ex, settings, t = self.subject, self._explanation, self._settings(), self._at("frame")
        stream = self._at("stream")
        for name, title in (("share", SHARE), ("k", COUNT), ("threshold", ABOVE)):
            self.knobs[name].layout.display = "" if self._at("rule") == title else "none"
        for switch in self.switches.values():
            switch.icon = "check" if switch.value else "times"
        weights = ex.channel_weights(settings.method, settings.target)[0].cpu()
        weights = weights[:, t] if weights.ndim == 2 else weights
        self._mask = self.rule.mask(weights[None])[0]
        self._picture = subject.picture(settings, t)
        self.view.value = encoded(self._picture)
        label = "influence (logit)" if settings.method == "influence" else "gate s"
        said = f"{label}: {len(self._selected)} of {len(weights)} channels selected"
        self._chart = views.gates_chart(weights, self._mask, said)
        self.gates.value = views.shown(self._chart, said)
        alone = self._answer(self._at("item"), stream, tuple(sorted(self._selected)))
        at = (0, t) if ex.logits.ndim == 3 else (0,)
        before, after = ex.logits[at].cpu(), alone[at].cpu()
        self.answers.value = views.answers(subject, before, after, settings.target)
        self._draw_strip(weights, settings)
        self.lines.value = views.copied(subject.code(stream, settings))
        self._renew()

    def _draw_strip(self, weights: Tensor, settings: Settings) -> None:
        """The maps of the channels with the largest weights, each with its switch."""
        self._strip = weights.argsort(descending=True, stable=True)[:STRIP].tolist()
        ex, t, frames = self._explanation, self._at("frame"), self.subject.frames
        pictures = views.channel_maps(ex, self._strip, t, frames, settings)
        for k, picture, image, pick in zip(self._strip, pictures, self.maps, self.picks, strict=False):
            image.value = encoded(picture)
            pick.description = f"#{k} {float(weights[k]):.2f}"
            pick.value = bool(self._mask[k])
            pick.icon = "check" if pick.value else ""  # not by the shade alone

    def _run_head(self, item: int, stream: str, channels: tuple[int, ...]) -> Tensor:
        """The logits with these channels only."""
        ex = self._subjects[item].explanation(stream)
        keep = Channels(channels).mask(ex.gates)
        return ex.with_gates(lambda s: s * keep)

    @property
    def caption(self) -> str:
        """Data, model, item, method, target, channels and seed of what is shown."""
        subject, target = self.subject, self.subject.outputs[self._at("target")]
        at = f", frame {self._at('frame')}" if subject.fps else ""
        of = f" of the {self._at('stream')}" if subject.fps else ""
        chosen = views.spelled(self.rule).removeprefix("selib.")
        return f"{self._origin}: {subject.name}{at}; {self._at('method')} for {target}, channels{of} {chosen}"

    def still(self) -> bytes:
        """What is shown as one picture with its caption, for pages without widgets: PNG."""
        page = plot.row_of([self._picture, self._chart])
        page = plot.row_of([page], [textwrap.fill(self.caption, page.shape[1] // 7)])
        return encoded(page, small=True)

    def save(self, folder: str | Path = ".") -> Path:
        """Write the still picture into a folder, named after what it shows; returns the file."""
        words = "explorer " + self.caption.removeprefix(f"{self._origin}: ")
        words += "" if self._at("compare") == views.NOTHING else f" beside {self._at('compare')}"
        name = re.sub(r"[^\w.]+", "-", words)[:150].strip("-")
        path = Path(folder) / f"{name}.png"
        with replacing(path) as part:
            part.write_bytes(self.still())
        self.saved.value = f"<span style='color:{views.INK}'>saved {html.escape(str(path.resolve()))}</span>"
        return path

    def _ipython_display_(self) -> None:
        """Two outputs: the widget, and a still picture for pages where it cannot live.

        Such are exports, and a notebook that is reopened after its kernel has gone. The picture is renewed
        when the knobs rest, which the widget itself must not be.
        """
        bundle = {kind: view for kind, view in self._repr_mimebundle_().items() if kind != "text/plain"}
        display(bundle, raw=True)
        self._stills.append(display(self._placard(), raw=True, display_id=True))

    def _placard(self) -> dict[str, Any]:
        picture, said = base64.b64encode(self.still()).decode(), html.escape(self.caption)
        shown = f'{STILL}<img class="selib-still" alt="{said}" src="data:image/png;base64,{picture}">'
        return {"text/html": shown, "image/png": picture, "text/plain": self.caption}

    def _renew(self) -> None:
        """Let the still pictures follow once nothing has moved for a second."""
        if self._due is not None:
            self._due.cancel()
        with suppress(RuntimeError):  # plain Python has no event loop, and no page
            self._due = asyncio.get_running_loop().call_later(1.0, self._hang)

    def _hang(self) -> None:
        for still in self._stills:
            still.update(self._placard(), raw=True)


def _sized(kind: Any, width: int, **options: Any) -> Any:
    """A control of this width in pixels."""
    return kind(layout={"width": f"{width}px"}, **options)


def _knobs(subjects: Sequence[Subject]) -> dict[str, Any]:
    """The controls by name."""
    first = subjects[0]
    moving = first.fps > 0
    labelled = partial(_sized, width=330, style={"description_width": "86px"})
    select, count = partial(labelled, ipywidgets.Dropdown), partial(labelled, ipywidgets.IntSlider)
    slide = partial(labelled, ipywidgets.FloatSlider, min=0.0, max=1.0)
    button = partial(_sized, ipywidgets.Button, 110)
    items = [(subject.name, i) for i, subject in enumerate(subjects)]
    return {
        "item": select(options=items, description="clip" if moving else "image"),
        "previous": button(description="previous", icon="arrow-left"),
        "next": button(description="next", icon="arrow-right"),
        "target": select(description="target"),
        "stream": select(options=first.streams, description="stream"),
        "method": select(options=METHODS, value="influence", description="method"),
        "rule": select(options=RULES, value=SHARE, description="channels"),
        "share": slide(value=1.0, min=0.01, step=0.01, readout_format=".0%", description="top share"),
        "k": count(value=10, min=1, max=10, description="k"),
        "threshold": slide(value=0.0, readout_format=".3g", description="above"),
        "compare": select(options=(views.NOTHING, *first.rivals), description="compare"),
        "colours": select(options=COLORMAPS, description="colours"),
        "opacity": slide(value=0.85 if moving else 0.55, step=0.05, description="opacity"),
        "smooth": _sized(ipywidgets.Checkbox, 90, value=True, description="smooth", indent=False),
        "frame": count(value=0, min=0, description="frame"),
        "play": ipywidgets.Play(min=0),
        "save": button(description="save PNG", icon="download"),
    }
