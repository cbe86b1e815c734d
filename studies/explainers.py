"""What every study compares, by name: the readings of an SE vector, the CAM family, and the controls."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from selib import TopFraction, explain
from selib.explanation import Method
from selib.forward import attached
from selib.heatmap import normalize, resize
from selib.select import Select
from studies import baselines
from studies.baselines import Explainer, generator_of

READINGS: dict[str, tuple[Method, Select | None]] = {
    "SE top-gate (paper)": ("top-gate", None),
    "SE gate": ("gate", None),
    "SE influence": ("influence", None),
    "SE influence, top 10 %": ("influence", TopFraction(0.10)),
}
OURS = tuple(READINGS)
SAME_COUNT = "as many random channels"
CHANCE = "area (knows nothing)"


def se_explainers(model: nn.Module) -> dict[str, Explainer]:
    """The readings of a model's SE vector, and as many random channels as "top-gate" selects in the image."""
    readings = {name: partial(_reading, model, *how) for name, how in READINGS.items()}
    return {**readings, SAME_COUNT: partial(_random_channels, model)}


def _reading(
    model: nn.Module, method: Method, select: Select | None, images: Tensor, targets: Tensor
) -> Tensor:
    return explain(model, images).heatmap(method, targets, select=select)


def _random_channels(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    ex = explain(model, images)
    counts = ex.selected("top-gate", targets).sum(1).cpu()
    channels = ex.features.shape[1]
    orders = torch.stack([torch.rand(channels, generator=generator_of(0, image)) for image in images])
    chosen = (orders.argsort(1).argsort(1) < counts[:, None]).to(ex.features)
    maps = ex.features.relu().mul(chosen[:, :, None, None]).sum(1)
    return normalize(resize(maps, images.shape[2:]))


def last_map(model: nn.Module) -> str:
    """The module that gives the feature map before any gates: where CAMs and controls look."""
    if attached(model):
        return "selib_se.features"
    return next(name for name in ("stages", "layer4", "features") if hasattr(model, name))


def classifier(model: nn.Module) -> nn.Linear:
    """The linear layer that reads the averaged map."""
    head = model.get_submodule("classifier" if hasattr(model, "classifier") else "fc")
    return next(layer for layer in head.modules() if isinstance(layer, nn.Linear))


def others_of(model: nn.Module) -> dict[str, Explainer]:
    """The CAM family and integrated gradients on a model."""
    gradients = {"Integrated gradients": baselines.integrated_gradients(model)}
    return baselines.cams(model, last_map(model)) | gradients


def controls_of(model: nn.Module, seed: int) -> dict[str, Explainer]:
    """The controls on a model, with a decile of its channels drawn at random."""
    count = TopFraction(0.10).count(classifier(model).in_features)
    return baselines.controls(model, last_map(model), count=count, seed=seed)
