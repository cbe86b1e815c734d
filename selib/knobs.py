"""The controls of the explorer, by name, each with what it means."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import ipywidgets

from selib.pictures import Transport
from selib.views import NOTHING, READINGS, Subject

RULES = ("top share", "k channels", "weight above", "paper's rule", "picked by hand")
SHARE, COUNT, ABOVE, PAPER, BY_HAND = RULES
COLORMAPS = ("inferno", "viridis", "cividis", "magma", "gray")  # readable with colour vision deficiencies
EVERY = -1  # class, in the filter

HELP = {
    "rule": "Which channels take part: a share or a number with the largest weights, those above a weight, "
    "the paper's rule (mean + 1.28 standard deviations of the gates), or those you pick",
    "share": "The share of channels with the largest weights; the scale is logarithmic",
    "k": "How many channels with the largest weights",
    "threshold": "Channels whose weight is above this",
    "random": "As many channels, drawn at random: does the choice matter? Press again for another draw",
    "method": "How channels are weighted. influence: the fall of the class's logit without the channel; "
    "log-odds influence: of its odds against the others; gate: the SE vector; top-gate: the paper's reading",
    "compare": "A second map beside the first: another reading, or another method",
    "target": "The class that is explained; a click on an answer chooses it, too",
    "search": "Only classes with this in their names are in the menu",
    "follow": "Explain what is predicted for each image; else the class stays when the image changes",
    "sort": "Which channels come first below",
    "item": "What is looked at; a click on a small picture chooses it, too",
    "wrong": "Only images on which the network is wrong",
    "only": "Only images of one class",
    "colours": "Of the heatmap; all can be read with colour vision deficiencies",
    "opacity": "Of the heatmap over the image: 0 shows the image alone",
    "smooth": "Interpolated; else the cells of the map as squares",
    "outline": "The edge of the true object",
    "path": "An image file of this machine; Enter adds it",
    "upload": "Add photographs from the computer you sit at",
    "stream": "Whose channels are below",
    "save": "Write what is shown, with its caption, into the folder runs/",
    "reset": "All controls as they were at the start",
    "previous": "The image before",
    "next": "The image after",
    "back": "Channels before these",
    "forward": "Channels after these",
}


def make(subjects: Sequence[Subject], *, more: bool) -> dict[str, Any]:
    """The controls for these images or clips; those that say nothing here are hidden.

    Args:
        more: whether images can be added.
    """
    first = subjects[0]
    classes = sorted({subject.label for subject in subjects if subject.label is not None})
    knobs = _of_channels(first) | _of_pictures(first, subjects, classes)
    shown = {
        "search": len(first.outputs) > 10,
        "target": len(first.outputs) > 1,
        "follow": len(first.outputs) > 1,
        "wrong": len(classes) > 0,
        "only": len(classes) > 1,
        "outline": any(subject.truth is not None for subject in subjects),
        "path": more,
        "upload": more,
        "stream": len(first.streams) > 1,
        "frame": first.fps > 0,
    }
    for name, there in shown.items():
        knobs[name].layout.display = "" if there else "none"
    return knobs


def columns(knob: dict[str, Any], below: list[Any], right: list[Any]) -> Any:
    """Knobs left, and what stands below them; pictures right; below each other where there is no room."""
    across = partial(ipywidgets.HBox, layout={"flex_flow": "row wrap"})
    left = [
        *(knob[name] for name in ("rule", "share", "k", "threshold")),
        across([knob["random"], knob["reset"], knob["save"]]),
        *(knob[name] for name in ("method", "compare", "target", "search")),
        across([knob["follow"], knob["smooth"], knob["outline"]]),
        *(knob[name] for name in ("stream", "item")),
        across([knob["previous"], knob["next"]]),
        across([knob["wrong"], knob["only"]]),
        *(knob[name] for name in ("colours", "opacity", "path", "upload")),
    ]
    sides = [
        ipywidgets.VBox(
            [*left, *below], layout={"flex": "1 1 180px", "min_width": "0", "max_width": "310px"}
        ),
        ipywidgets.VBox(right, layout={"flex": "3 1 265px", "min_width": "0", "overflow": "visible"}),
    ]
    return across(sides)


def _of_channels(first: Subject) -> dict[str, Any]:
    """Which channels, how they are weighted, for which class."""
    share: dict[str, Any] = {"value": 0.1, "min": -3, "max": 0, "step": 0.02, "readout_format": ".1%"}
    return {
        "rule": _menu("rule", "channels", options=RULES, value=SHARE),
        "share": _labelled(ipywidgets.FloatLogSlider, "share", "share", **share),
        "k": _labelled(ipywidgets.BoundedIntText, "k", "k", value=10, min=1, max=10),
        "threshold": _labelled(ipywidgets.FloatSlider, "threshold", "above", readout_format=".3g"),
        "random": _button("random", "random"),
        "method": _menu("method", "method", options=list(READINGS), value="influence"),
        "compare": _menu("compare", "beside", options=(NOTHING, *first.others)),
        "target": _menu("target", "target"),
        "search": _labelled(ipywidgets.Text, "search", "search", placeholder="name of a class"),
        "follow": _tick("follow", value=True),
        "stream": _menu("stream", "stream", options=first.streams),
        "sort": _menu("sort", "sort by", flex="0 1 170px", options=("influence", "gate")),
        "back": _button("back", icon="chevron-left", flex="0 0 34px"),
        "forward": _button("forward", icon="chevron-right", flex="0 0 34px"),
        "reset": _button("reset", "reset"),
    }


def _of_pictures(first: Subject, subjects: Sequence[Subject], classes: list[int]) -> dict[str, Any]:
    """Which image, and how it is drawn."""
    items = [(subject.name, i) for i, subject in enumerate(subjects)]
    every = [("every class", EVERY), *((first.outputs[k], k) for k in classes)]
    opacity: dict[str, Any] = {"min": 0, "max": 1, "step": 0.05, "value": 0.85 if first.fps else 0.55}
    files: dict[str, Any] = {"accept": "image/*", "multiple": True, "layout": {"width": "auto"}}
    return {
        "item": _menu("item", "clip" if first.fps else "image", options=items),
        "previous": _button("previous", icon="arrow-left"),
        "next": _button("next", icon="arrow-right"),
        "wrong": _tick("wrong", value=False),
        "only": _menu("only", "", flex="1 1 90px", options=every, value=EVERY),
        "colours": _menu("colours", "colours", options=COLORMAPS),
        "opacity": _labelled(ipywidgets.FloatSlider, "opacity", "opacity", **opacity),
        "smooth": _tick("smooth", value=True),
        "outline": _tick("outline", value=True),
        "path": _labelled(
            ipywidgets.Text, "path", "file", placeholder="path of a photograph", continuous_update=False
        ),
        "upload": ipywidgets.FileUpload(tooltip=HELP["upload"], **files),
        "frame": Transport(fps=first.fps or 1.0),
        "save": _button("save", "save PNG"),
    }


def _labelled(kind: Any, name: str, label: str, *, flex: str = "0 0 auto", **options: Any) -> Any:
    """A control with its label on the left."""
    layout, style = {"width": "auto", "min_width": "0", "flex": flex}, {"description_width": "64px"}
    return kind(description=label, tooltip=HELP[name], layout=layout, style=style, **options)


_menu = partial(_labelled, ipywidgets.Dropdown)


def _button(name: str, label: str = "", *, icon: str = "", flex: str = "1 1 auto") -> Any:
    layout = {"width": "auto", "flex": flex, "margin": "2px"}
    return ipywidgets.Button(description=label, icon=icon, tooltip=HELP[name], layout=layout)


def _tick(name: str, *, value: bool) -> Any:
    layout = {"width": "auto", "flex": "0 0 auto"}
    return ipywidgets.Checkbox(value, description=name, indent=False, tooltip=HELP[name], layout=layout)
