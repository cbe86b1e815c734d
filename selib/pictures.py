"""Widgets that JupyterLab does not have: pictures that tell where the pointer is, a transport for clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

HERE = Path(__file__).parent
CSS = (HERE / "pictures.css").read_text(encoding="utf-8")

Heard = Callable[[str, int, float, float], None]
"""Called with what happened ("click", "move", "drag", "drop"), to which picture, and where: x and y from 0 to
1, from its upper left corner."""


class Pictures(anywidget.AnyWidget):  # type: ignore[misc]
    """A row of pictures, each below its label.

    Attributes:
        images: PNG or JPEG.
        labels, said: what stands above each, and what a screen reader says in its place.
        marks: which are pressed, of those that can be clicked.
        tip: {"text": …, "image": PNG}, shown beside the pointer; {} for none.
        kind: "view", "charts", "thumbnails" or "channels"; see pictures.css.
        scale: pixels on the screen for each of a picture.
        draggable: the picture that is dragged on, -1 for none.
    """

    _esm = (HERE / "pictures.js").read_text(encoding="utf-8")
    _css = CSS
    images = traitlets.List(traitlets.Bytes()).tag(sync=True)
    labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
    said = traitlets.List(traitlets.Unicode()).tag(sync=True)
    marks = traitlets.List(traitlets.Bool()).tag(sync=True)
    tip = traitlets.Dict().tag(sync=True)
    kind = traitlets.Unicode().tag(sync=True)
    scale = traitlets.Float(1.0).tag(sync=True)
    clickable = traitlets.Bool(False).tag(sync=True)
    draggable = traitlets.Int(-1).tag(sync=True)
    heard = traitlets.Int(0).tag(sync=True)

    def __init__(self, kind: str, on: Heard, **options: Any) -> None:
        super().__init__(kind=kind, layout={"min_width": "0", "overflow": "visible"}, **options)
        self._on = on
        self.on_msg(self._hear)

    def _hear(self, _: Any, content: dict[str, Any], __: Any) -> None:
        try:
            if content["index"] < len(self.images):  # there may be fewer since it was sent
                self._on(content["kind"], content["index"], content["x"], content["y"])
        finally:
            self.heard += 1  # the page waits for it


class Transport(anywidget.AnyWidget):  # type: ignore[misc]
    """Play, pause and a slider; ``value`` is the frame. ``sound``, a WAV file or empty, plays along."""

    _esm = (HERE / "transport.js").read_text(encoding="utf-8")
    _css = CSS
    value = traitlets.Int(0).tag(sync=True)
    max = traitlets.Int(0).tag(sync=True)
    fps = traitlets.Float(25.0).tag(sync=True)
    sound = traitlets.Bytes(b"").tag(sync=True)
