"""The widget of :func:`selib.widgets.explorer`: knobs, pictures, and what follows from what.

There is no ``Output`` widget, so its callbacks fire in plain Python and in tests, too. JupyterLab sends the
last of a burst of moves once the one before it is drawn: no stale picture queues up.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import ipywidgets
import torch
from torch import Tensor

from selib import knobs, plot, views
from selib.atomic import replacing
from selib.explanation import Explanation
from selib.images import decoded
from selib.knobs import ABOVE, BY_HAND, COUNT, EVERY, PAPER, SHARE
from selib.pictures import Pictures
from selib.select import Channels, NormalQuantile, Select, Threshold, TopFraction, TopK
from selib.stills import Stills
from selib.strip import Strip
from selib.views import READINGS, Settings, Subject, encoded

MOST = 200  # images that one explorer holds
# After these knobs the same channels come first.
LOOKS = ("frame", "opacity", "colours", "smooth", "outline", "compare", "random")


def check_count(count: int) -> None:
    """ValueError unless an explorer can hold so many images or clips."""
    if not 0 < count <= MOST:
        raise ValueError(f"the explorer shows 1 to {MOST} images or clips, not {count}: choose some of them")


class Explorer(ipywidgets.VBox):  # type: ignore[misc]
    """The widget of :func:`explorer`. ``knobs`` are its controls by name, ``view`` the pictures.

    In a page without widgets, such as an export, a still picture of its last state stands in its place.

    Args:
        more: makes subjects of images that are added and their names; ``None`` where none can be.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        origin: str,
        more: Callable[[Any, Sequence[str]], list[Subject]] | None = None,
    ) -> None:
        self._subjects, self._origin, self._more = list(subjects), origin, more
        self._busy = False  # True while knobs are set that follow from another
        self.knobs = knobs.make(subjects, more=more is not None)
        switch = partial(ipywidgets.ToggleButton, value=True, icon="check", layout={"width": "auto"})
        self.switches = {name: switch(description=name) for name in subjects[0].modalities}
        self.thumbnails = Pictures("thumbnails", self._on_thumbnail, clickable=True)
        self.view = Pictures("view", self._on_view)
        self.charts = Pictures("charts", self._on_chart, scale=1 / views.SCALE, draggable=0)
        self.strip = Strip(self.knobs, self._pick, self._told)
        self.lines, self.message = ipywidgets.HTML(), ipywidgets.HTML()
        self._visible = list(range(len(subjects)))
        self._hung: list[int] = []  # of these, among the thumbnails
        self._rows: list[int] = []  # the outputs in the chart of answers
        self._chosen: dict[str, set[int]] = {}  # channels picked by hand, by stream
        self._stills = Stills(lambda: (self.still(), self.caption))
        self._answer = lru_cache(1000)(self._run_head)
        kept = ("item", "target", "path", "upload")
        self._start = {name: knob.value for name, knob in self._settable() if name not in kept}
        self._connect()
        self.thumbnails.layout.display = "" if len(subjects) > 1 else "none"
        below = [ipywidgets.HBox(list(self.switches.values())), self.lines, self.message]
        right = [self.thumbnails, self.knobs["frame"], self.view, self.charts, self.strip]
        super().__init__([knobs.columns(self.knobs, below, right)])
        self._moved("item")

    def _settable(self) -> list[tuple[str, Any]]:
        """The knobs that have a value of their own."""
        return [(name, knob) for name, knob in self.knobs.items() if hasattr(knob, "value")]

    def _connect(self) -> None:
        knob = self.knobs
        knob["previous"].on_click(lambda _: self._step(-1))
        knob["next"].on_click(lambda _: self._step(+1))
        knob["random"].on_click(lambda _: self._moved("random"))
        knob["reset"].on_click(lambda _: self.reset())
        knob["save"].on_click(lambda _: self.save())
        for name, control in self._settable():
            if name not in ("path", "upload"):
                control.observe(partial(self._moved, name), "value")
        knob["path"].observe(self._named, "value")
        knob["upload"].observe(self._uploaded, "value")
        for switch in self.switches.values():
            switch.observe(partial(self._moved, "switch"), "value")

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
            SHARE: TopFraction(float(f"{self._at('share'):.3g}")),  # as it is written in the copied lines
            COUNT: TopK(self._at("k")),
            ABOVE: Threshold(float(f"{self._at('threshold'):g}")),
            PAPER: NormalQuantile(),
            BY_HAND: TopFraction(1.0) if by_hand is None else Channels(tuple(sorted(by_hand))),
        }
        return rules[self._at("rule")]

    def _settings(self) -> Settings:
        names = ("target", "compare", "colours", "opacity", "smooth", "outline")
        rules = tuple(self._rule(stream) for stream in self.subject.streams)
        off = frozenset(name for name, switch in self.switches.items() if not switch.value)
        named = {name: self._at(name) for name in names}
        return Settings(self._at("method"), rules=rules, off=off, **named)

    # ---- what follows from what ----------

    def _moved(self, name: str, change: Any = None) -> None:
        """A control was moved: set the knobs that follow from it, then redraw, once."""
        if not self._busy:
            self.message.value = ""
            with self._quiet():
                self._follow(name, change)
                self._redraw()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Knobs that are set in here start nothing."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _follow(self, name: str, change: Any) -> None:
        rule, stream = self.knobs["rule"], self._at("stream")
        if name in ("wrong", "only"):
            self._filter(name)
        if name in ("item", "wrong", "only"):
            self._show_item()
        if name == "target":
            self.knobs["follow"].value = False
        elif name == "search":
            self._search()
        elif name == "method":  # the paper's reading comes with the paper's rule, and takes it away again
            if change["new"] == "top-gate":
                rule.value = PAPER
            elif change["old"] == "top-gate" and rule.value == PAPER:
                rule.value = SHARE
            self.knobs["sort"].value = "influence" if "influence" in change["new"] else "gate"
        elif name == "rule" and rule.value == BY_HAND:  # picking starts with what is selected
            self._chosen.setdefault(stream, self._selected)
        elif name == "random":
            count, among = len(self._selected), self._explanation.gates.shape[-1]
            self._chosen[stream] = set(torch.randperm(among)[:count].tolist())
            rule.value = BY_HAND
        if self._at("follow") and name in ("item", "follow", "wrong", "only"):
            self._offer_targets(views.predicted(self.subject))
        if name not in LOOKS:
            self.strip.first()
        if name in ("item", "wrong", "only", "target", "search", "follow", "stream", "method"):
            self._set_limits()

    def _offer_targets(self, wanted: int) -> None:
        """The classes that are searched for, in their own order, and the one that is wanted."""
        search, names = self._at("search").strip().lower(), self.subject.outputs
        found = [(name, k) for k, name in enumerate(names) if search in name.lower() or k == wanted]
        self.knobs["target"].options = found
        self.knobs["target"].value = wanted

    def _search(self) -> None:
        """Explain the first class that is searched for, unless the present one is among them."""
        search, names, target = self._at("search").strip().lower(), self.subject.outputs, self._at("target")
        found = [k for k, name in enumerate(names) if search in name.lower()]
        if not found:
            self._say(f"no class has {search!r} in its name")
        elif target not in found:
            self.knobs["follow"].value, target = False, found[0]
        self._offer_targets(target)

    def _filter(self, moved: str) -> None:
        """Which images are offered."""
        asked, only = self._at("wrong"), self._at("only")
        visible = []
        for number, subject in enumerate(self._subjects):
            if only in (EVERY, subject.label) and not (asked and views.predicted(subject) == subject.label):
                visible.append(number)
        if not visible:
            self._say("no image is left: the filter is taken back")
            self.knobs[moved].value = False if moved == "wrong" else EVERY
            return
        self._visible = visible
        item, before = self.knobs["item"], self._at("item")
        item.options = [(self._subjects[i].name, i) for i in visible]
        item.value = before if before in visible else visible[0]

    def _show_item(self) -> None:
        """Another image or clip: its length, its answers, its sound."""
        frame, subject = self.knobs["frame"], self.subject
        if self._at("target") is None:
            self._offer_targets(views.predicted(subject))
        frame.max = subject.frames - 1
        frame.value = min(frame.value, frame.max)
        frame.fps, frame.sound = subject.fps or 1.0, subject.sound
        if self._visible != self._hung:
            self._hung = list(self._visible)
            some = [self._subjects[i] for i in self._visible]
            self.thumbnails.images = [
                encoded(views.enlarged(one.thumbnail, 64), small=len(some) > 16) for one in some
            ]
            self.thumbnails.said = [one.name for one in some]
        self.thumbnails.marks = [i == self._at("item") for i in self._visible]

    def _set_limits(self) -> None:
        """Other weights, so other limits of the sliders."""
        weights = self._weights(self._at("method"))
        self.knobs["k"].max = len(weights)
        low, high = float(weights.min()), float(weights.max())  # of all frames
        slider, step = self.knobs["threshold"], (high - low) / 100 or 0.01
        slider.max = max(slider.max, high + step)  # first, for the limits must never cross
        slider.min, slider.max, slider.step = low, high + step, step

    def _weights(self, reading: str, frame: int | None = None) -> Tensor:
        """What a reading ranks channels by: (C,), or (C, T) of a clip."""
        method, contrast = READINGS[reading]
        weights = self._explanation.channel_weights(method, self._at("target"), contrast=contrast)[0].cpu()
        return weights if frame is None or weights.ndim == 1 else weights[:, frame]

    @property
    def _selected(self) -> set[int]:
        return set(self._mask.nonzero().flatten().tolist())

    # ---- the pointer ----------

    def _step(self, by: int) -> None:
        place = self._visible.index(self._at("item")) + by
        self.knobs["item"].value = self._visible[place % len(self._visible)]

    def _on_thumbnail(self, kind: str, index: int, x: float, y: float) -> None:
        if kind == "click":
            self.knobs["item"].value = self._visible[index]

    def _on_view(self, kind: str, index: int, x: float, y: float) -> None:
        heat = self._panels[index].heat if kind == "move" and index < len(self._panels) else None
        text = ""
        if heat is not None:
            row, column = int(y * len(heat)), int(x * heat.shape[1])
            text = f"{heat[min(max(row, 0), len(heat) - 1), min(max(column, 0), heat.shape[1] - 1)]:.2f}"
        self.view.tip = {"text": text}

    def _on_chart(self, kind: str, index: int, x: float, y: float) -> None:
        """The gates: a channel under the pointer, or a cut that is dragged. The answers: another target."""
        if index == 1:
            row = int((y * len(self._answers) / views.SCALE - views.HEAD) // views.ROW)
            if kind == "click" and 0 <= row < len(self._rows):
                with self._quiet():  # it may not be among the classes that are searched for
                    self._offer_targets(self._rows[row])
                self._moved("target")
            self.charts.tip = {}
            return
        rank, count = views.rank_at(x, len(self._sorted)), len(self._sorted)
        if kind == "move":
            self.charts.tip = self._told(self._sorted[min(int(rank), count - 1)])
        elif kind in ("drag", "drop"):
            self._cut(min(max(1, round(rank)), count))

    def _cut(self, k: int) -> None:
        """Let the first k channels take part, in the words of the rule that is set."""
        rule, weights = self.knobs["rule"], self._weights(self._at("method"), self._at("frame"))
        self.charts.tip = {"text": f"{k} of {len(weights)}"}
        if rule.value == SHARE:
            self.knobs["share"].value = k / len(weights)
        elif rule.value == ABOVE:
            ranked = weights.sort(descending=True).values
            below = float(ranked[k]) if k < len(ranked) else float(ranked[-1]) - 1.0
            self.knobs["threshold"].value = (float(ranked[k - 1]) + below) / 2
        else:
            self.knobs["k"].value = k
            rule.value = COUNT

    def _pick(self, channel: int) -> None:
        """Take a channel in, or leave it out; the others stay as they are selected now."""
        self._chosen[self._at("stream")] = self._selected ^ {channel}
        if self._at("rule") == BY_HAND:
            self._redraw()
        else:
            self.knobs["rule"].value = BY_HAND

    def _told(self, channel: int) -> dict[str, Any]:
        """Number, gate, influence and map of a channel, for the tip at the pointer."""
        frame, settings = self._at("frame"), self._settings()
        gate, influence = (float(self._weights(name, frame)[channel]) for name in ("gate", "influence"))
        (drawn,) = self._maps(settings, [channel])
        text = f"channel {channel}: gate {gate:.2f}, influence {influence:.2f}"
        return {"text": text, "image": encoded(drawn)}

    # ---- more images ----------

    def _named(self, change: Any) -> None:
        if change["new"]:
            self._add([change["new"]])

    def _uploaded(self, change: Any) -> None:
        files = [(one["name"], bytes(one["content"])) for one in change["new"]]
        if files:
            self._add(files, [name for name, _ in files])
            self.knobs["upload"].value = ()

    def _add(self, given: list[Any], names: Sequence[str] = ()) -> None:
        """Take images in and show the last; what cannot be read is said in a line."""
        assert self._more is not None
        try:
            found = self._more([decoded(*one) if isinstance(one, tuple) else one for one in given], names)
            check_count(len(self._subjects) + len(found))
        except (ValueError, TypeError, OSError) as error:
            self._say(str(error))
            return
        self._subjects += found
        self._visible = list(range(len(self._subjects)))
        self.thumbnails.layout.display = ""
        item = self.knobs["item"]
        with self._quiet():  # new options choose the first of them
            item.options = [(subject.name, i) for i, subject in enumerate(self._subjects)]
            item.value = self._visible[-1]
        self._moved("item")

    def _say(self, text: str) -> None:
        self.message.value = views.note(text)

    def reset(self) -> None:
        """All knobs as they were at the start; the image stays, and so do images that were added."""
        self._chosen.clear()
        with self._quiet():
            for name, value in self._start.items():
                self.knobs[name].value = value
            for switch in self.switches.values():
                switch.value = True
        self._moved("only")

    # ---- drawing ----------

    def _redraw(self) -> None:
        """Draw everything anew: pictures, SE vector, answers, maps of channels."""
        subject, ex, settings, t = self.subject, self._explanation, self._settings(), self._at("frame")
        for name, title in (("share", SHARE), ("k", COUNT), ("threshold", ABOVE)):
            self.knobs[name].layout.display = "" if self._at("rule") == title else "none"
        for switch in self.switches.values():
            switch.icon = "check" if switch.value else "times"
        weights = self._weights(settings.reading, t)
        self._sorted = weights.argsort(descending=True, stable=True).tolist()
        self._mask = self.rule.mask(weights[None])[0]
        self._panels = subject.panels(settings, t)
        bar = views.colour_bar(settings.colours, max(len(panel.picture) for panel in self._panels))
        self.view.images = [*(encoded(panel.picture) for panel in self._panels), encoded(bar)]
        self.view.labels = [panel.title for panel in self._panels]
        label = "influence on the logit" if "influence" in settings.reading else "gate s"
        label = "influence on the log-odds" if "log-odds" in settings.reading else label
        said = f"{label}: {len(self._selected)} of {len(weights)} selected"
        alone = self._answer(self._at("item"), self._at("stream"), tuple(sorted(self._selected)))
        at = (0, t) if ex.logits.ndim == 3 else (0,)
        before, after = ex.logits[at].cpu(), alone[at].cpu()
        self._chart = views.gates_chart(weights, self._mask, said)
        self._answers, self._rows, answered = views.answers(subject, before, after, settings.target)
        self.charts.images = [encoded(self._chart), encoded(self._answers)]
        self.charts.said = [said, answered]
        weighed = {name: self._weights(name, t) for name in ("gate", "influence")}
        if "log-odds" in settings.reading:
            weighed["influence"] = weights
        self.strip.draw(weighed, self._mask, partial(self._maps, settings))
        self.lines.value = views.copied(subject.code(self._at("stream"), settings))
        self._stills.renew()

    def _maps(self, settings: Settings, channels: list[int]) -> list[plot.Picture]:
        frame, frames = self._at("frame"), self.subject.frames
        return views.channel_maps(self._explanation, channels, frame, frames, settings)

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
        pictures = [panel.picture for panel in self._panels]
        high = max(len(picture) for picture in pictures)
        pictures.append(views.colour_bar(self._at("colours"), high))
        page = plot.row_of(pictures, [*(panel.title for panel in self._panels), ""])
        charts = [views.enlarged(one, len(one) // views.SCALE) for one in (self._chart, self._answers)]
        page = plot.column_of([page, plot.row_of(charts)])
        page = plot.row_of([page], [textwrap.fill(self.caption, page.shape[1] // 7)])
        return encoded(page, small=True)

    def save(self, folder: str | Path = "runs") -> Path:
        """Write the still picture into a folder, named after what it shows; returns the file."""
        words = "explorer " + self.caption.removeprefix(f"{self._origin}: ")
        words += "" if self._at("compare") == views.NOTHING else f" beside {self._at('compare')}"
        name = re.sub(r"[^\w.]+", "-", words)[:150].strip("-")
        path = Path(folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(self.still())
        self._say(f"saved {path}")
        return path

    def _ipython_display_(self) -> None:
        self._stills.hang(self)
