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
from selib.select import TopFraction

SIZE = 224  # side in pixels at which images are shown


@plot.styled
def draw(
    ex: Explanation, images: Tensor, classes: Sequence[str], sample: int, method: Any, target: int, share: float
) -> Figure:
    """The picker's view: the image, the heatmap of the selected channels, the sorted channel weights and the prediction.

    Args:
        images: uint8 (B, 3, H, W), as explained.
        target: class index.
        share: top share of channels that take part, in (0, 1].
    """
    rule = TopFraction(share)
    weights = ex.channel_weights(method, target)[sample]
    chosen = ex.selected(method, target, rule)[sample]
    heatmap = ex.heatmap(method, target, select=rule, size=(SIZE, SIZE))[sample]
    image = torch.nn.functional.interpolate(images[sample : sample + 1].float(), SIZE, mode="nearest")[0].to(
        torch.uint8
    )
    before = ex.logits[sample].softmax(0)
    after = ex.with_gates(lambda s: s * chosen)[sample].softmax(0)
    fig, axes = plot.figure(9, 2.6, 1, 3)
    axes[0][0].imshow(image.permute(1, 2, 0).numpy())
    axes[0][0].set_title(f"predicted: {classes[int(before.argmax())]} ({float(before.max()):.0%})")
    axes[0][1].imshow(plot.overlay(image, heatmap))
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


def channel_picker(ex: Explanation, images: Tensor, classes: Sequence[str]) -> ipywidgets.VBox:
    """Sliders and menus over an explanation of a few images: sample, method, class and share of channels.

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
    view = ipywidgets.Image(format="png")

    def redraw(_: Any = None) -> None:
        view.value = png(draw(ex, images, classes, sample.value, method.value, target.value, share.value))

    def follow_prediction(change: Any) -> None:
        predicted = int(ex.predicted[change["new"]])
        if target.value == predicted:
            redraw()
        else:
            target.value = predicted  # which redraws

    sample.observe(follow_prediction, "value")
    for control in (method, target, share):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([ipywidgets.HBox([sample, target]), ipywidgets.HBox([method, share]), view])
