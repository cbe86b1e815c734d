"""The study's own networks and a register of architectures by name, for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torchvision
from torch import nn

from selib.models.small_resnet import sides, small_resnet

OURS: dict[str, Callable[..., nn.Module]] = {"small_resnet": small_resnet}


SHIPPED = {
    name: Path(__file__).parent / f"{name.replace('-', '_')}.safetensors" for name in ("synth-objects", "synth-faces")
}
"""A small network trained on each synthetic twin; ``selib.load_checkpoint`` reads it. ``selib.recipe.make_shipped`` made them."""


def build(
    architecture: str, num_classes: int, *, image_size: int | Sequence[int] = 224, **options: object
) -> nn.Module:
    """A randomly initialised network by name: one of ours, ``resnet18_small_image``, or any torchvision classifier.

    Args:
        image_size: side of square images, or (height, width); our own networks choose their stem by it.

    Raises:
        ValueError: if the name is unknown, or the size is none.
    """
    image_size = sides(image_size)
    if architecture in OURS:
        return OURS[architecture](num_classes=num_classes, image_size=image_size, **options)
    if architecture == "resnet18_small_image":
        # The usual form for 32x32 and 64x64 images: a 3x3 stem of stride 1 and no max-pooling.
        model = torchvision.models.resnet18(num_classes=num_classes)
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
        return model
    if architecture not in torchvision.models.list_models(torchvision.models):
        raise ValueError(
            f"architecture={architecture!r} is unknown: use {', '.join(OURS)}, resnet18_small_image or a torchvision classifier"
        )
    return torchvision.models.get_model(architecture, weights=None, num_classes=num_classes, **options)
