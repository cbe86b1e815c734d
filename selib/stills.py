"""A still picture beside a widget, for pages where it cannot live."""

from __future__ import annotations

import asyncio
import base64
import html
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from IPython.display import display

# The still picture is hidden while the widget beside it lives; where it does not, the error messages of dead
# widgets are, progress bars' too: texts without elements.
STYLE = """<style>
.jp-OutputArea:has(.widget-vbox) .selib-still { display: none }
.jp-Notebook:has(.selib-still) .jp-OutputArea-output.jupyter-widgets:not(:has(*)) { display: none }
</style>"""


class Stills:
    """The still pictures of one widget. ``make`` returns the picture, a PNG, and what it shows."""

    def __init__(self, make: Callable[[], tuple[bytes, str]]) -> None:
        self._make = make
        self._hung: list[Any] = []  # handles of the pictures on the page
        self._due: asyncio.TimerHandle | None = None

    def hang(self, widget: Any) -> None:
        """Two outputs: the widget, and a still picture for pages where it cannot live.

        Such are exports, and a notebook that is reopened after its kernel has gone. The picture is renewed
        when the knobs rest, which the widget itself must not be.
        """
        bundle = {kind: view for kind, view in widget._repr_mimebundle_().items() if kind != "text/plain"}
        display(bundle, raw=True)
        self._hung.append(display(self._placard(), raw=True, display_id=True))

    def renew(self) -> None:
        """Let the pictures follow once nothing has moved for a second."""
        if self._due is not None:
            self._due.cancel()
        with suppress(RuntimeError):  # plain Python has no event loop, and no page
            self._due = asyncio.get_running_loop().call_later(1.0, self._update)

    def _update(self) -> None:
        for still in self._hung:
            still.update(self._placard(), raw=True)

    def _placard(self) -> dict[str, Any]:
        picture, caption = self._make()
        data, said = base64.b64encode(picture).decode(), html.escape(caption)
        shown = f'{STYLE}<img class="selib-still" alt="{said}" src="data:image/png;base64,{data}">'
        return {"text/html": shown, "image/png": data, "text/plain": caption}
