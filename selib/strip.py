"""The channels of the explorer, some at a time: number, weight, map, and whether they take part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets
from torch import Tensor

from selib.pictures import Pictures
from selib.plot import Picture
from selib.views import INK, encoded

SHOWN = 8  # channels at a time


class Strip(ipywidgets.VBox):  # type: ignore[misc]
    """Channels by falling influence or gate.

    Args:
        knobs: the buttons "back" and "forward" and the menu "sort".
        pick: called with a channel that was clicked.
        tell: what the tip at the pointer says about a channel.
    """

    def __init__(
        self, knobs: Mapping[str, Any], pick: Callable[[int], None], tell: Callable[[int], dict[str, Any]]
    ) -> None:
        self.maps = Pictures("channels", self._heard, clickable=True)
        self.channels: list[int] = []  # that are shown
        self.place = ipywidgets.HTML()
        self._by, self._pick, self._tell, self._page = knobs["sort"], pick, tell, 0
        knobs["back"].on_click(lambda _: self._turn(-1))
        knobs["forward"].on_click(lambda _: self._turn(+1))
        pager = [knobs["back"], self.place, knobs["forward"], knobs["sort"]]
        super().__init__([ipywidgets.HBox(pager, layout={"flex_flow": "row wrap"}), self.maps])

    def first(self) -> None:
        """Back to the first page."""
        self._page = 0

    def draw(
        self, weights: Mapping[str, Tensor], mask: Tensor, maps: Callable[[list[int]], list[Picture]]
    ) -> None:
        """Show the channels.

        Args:
            weights: what they are sorted by, (C,) for each entry of the menu.
            mask: bool (C,), which take part.
            maps: makes their pictures.
        """
        self._given = weights, mask, maps
        values = weights[self._by.value]
        order = values.argsort(descending=True, stable=True).tolist()
        start = SHOWN * self._page
        self.channels = order[start : start + SHOWN]
        self.maps.images = [encoded(picture) for picture in maps(self.channels)]
        self.maps.labels = [f"#{k}\n{float(values[k]):.2f}" for k in self.channels]
        self.maps.said = [f"channel {k}: take it in or leave it out" for k in self.channels]
        self.maps.marks = [bool(mask[k]) for k in self.channels]
        last = start + len(self.channels)
        self.place.value = f"<span style='color:{INK}'>{start + 1}–{last} of {len(order)}</span>"

    def _turn(self, by: int) -> None:
        self._page = (self._page + by) % -(-len(self._given[1]) // SHOWN)
        self.draw(*self._given)

    def _heard(self, kind: str, index: int, x: float, y: float) -> None:
        if kind == "click":
            self._pick(self.channels[index])
        elif kind == "move":
            self.maps.tip = self._tell(self.channels[index])
