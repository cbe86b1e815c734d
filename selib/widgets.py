"""A channel picker for JupyterLab: move a slider, and the heatmap and the prediction follow.

``Image`` + ``observe`` and no ``Output`` widget: the callbacks fire in plain Python as well, so they run headless and in tests. The
network before the gates is never run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import ipywidgets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from selib import plot
from selib.explanation import METHODS, Explanation
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
