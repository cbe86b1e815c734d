"""What every study compares, by name: the readings of an SE vector, the CAM family, and the controls."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from selib import TopFraction, explain
from selib.explanation import Method
from selib.forward import agrees, attached, evaluating, hooked, logits_of, reads_mean
from selib.heatmap import normalize, resize
from selib.select import Select
from selib.site import find_site
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
COINCIDE = ("Grad-CAM", "HiResCAM", "XGrad-CAM")  # one map, and that of CAM, on pooling + linear
SAME_AS_CAM = "CAM = Grad-CAM = HiResCAM = XGrad-CAM"


def se_explainers(model: nn.Module) -> dict[str, Explainer]:
    """The readings of a model's SE vector, and as many random channels as "top-gate" selects in the image."""
    readings = {name: partial(_reading, model, *how) for name, how in READINGS.items()}
    return {**readings, SAME_COUNT: partial(random_channels_of, model)}


def _reading(
    model: nn.Module, method: Method, select: Select | None, images: Tensor, targets: Tensor
) -> Tensor:
    return explain(model, images).heatmap(method, targets, select=select)


def random_channels_of(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    ex = explain(model, images)
    counts = ex.selected("top-gate", targets).sum(1).cpu()
    channels = ex.features.shape[1]
    orders = torch.stack([torch.rand(channels, generator=generator_of(0, image)) for image in images])
    chosen = (orders.argsort(1).argsort(1) < counts[:, None]).to(ex.features)
    maps = ex.features.relu().mul(chosen[:, :, None, None]).sum(1)
    return normalize(resize(maps, images.shape[2:]))


def last_map(model: nn.Module) -> str:
    """The module whose output feeds the classifier: F' where a block is attached, its hook came first."""
    blocks = attached(model)
    return blocks[""].site if blocks else find_site(model, _example(model)).name


def _example(model: nn.Module) -> Tensor:
    """Images on which a network shows how it is built, whatever size it was trained for."""
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    return images.to(next(model.parameters()))


def classifier(model: nn.Module) -> nn.Linear:
    """The linear layer that reads the averaged map."""
    head = model.get_submodule("classifier" if hasattr(model, "classifier") else "fc")
    return next(layer for layer in head.modules() if isinstance(layer, nn.Linear))


def averages(model: nn.Module) -> bool:
    """Whether the logits are global average pooling + linear of the last map: there four CAMs coincide."""
    layer, site = classifier(model), model.get_submodule(last_map(model))
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = args[0] if module is layer else output.clone()  # an in-place layer may follow

    with evaluating(model), hooked((layer, keep), (site, keep)):
        logits = logits_of(model(_example(model)))
    # Called as a module the layer would show what gates of each target have made of it.
    same = agrees(nn.functional.linear(seen[layer], layer.weight, layer.bias), logits)
    return same and reads_mean(seen[site], "BC*", seen[layer]) is False


def others_of(model: nn.Module) -> dict[str, Explainer]:
    """The CAM family and integrated gradients on a model; what coincides there is computed once."""
    found = baselines.cams(model, last_map(model))
    if averages(model):
        found = {SAME_AS_CAM: found[COINCIDE[0]]} | {k: v for k, v in found.items() if k not in COINCIDE}
    return found | {"Integrated gradients": baselines.integrated_gradients(model)}


def controls_of(model: nn.Module, seed: int) -> dict[str, Explainer]:
    """The controls on a model, with a decile of its channels drawn at random.

    They look at the map before any gates: the mean of the gated channels is the reading "gate".
    """
    count = TopFraction(0.10).count(classifier(model).in_features)
    blocks = attached(model)
    layer = blocks[""].features if blocks else last_map(model)
    return baselines.controls(model, layer, count=count, seed=seed)
