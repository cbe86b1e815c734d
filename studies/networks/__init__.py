"""The study's own networks and a register of architectures by name, for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torchvision
from torch import nn

from studies.networks.detector import ActiveSpeaker, active_speaker, bias
from studies.networks.small_resnet import sides, small_resnet

__all__ = ["SHIPPED", "ActiveSpeaker", "active_speaker", "bias", "build", "sides", "small_resnet"]

OURS: dict[str, Callable[..., nn.Module]] = {"small_resnet": small_resnet}
SPEAKERS: dict[str, Callable[..., ActiveSpeaker]] = {"active_speaker": active_speaker, "bias": bias}


SHIPPED = {
    name: Path(__file__).parent / f"{name.replace('-', '_')}.safetensors"
    for name in ("synth-objects", "synth-faces", "synth-speakers")
}
"""A small network trained on each synthetic twin; ``selib.load_checkpoint`` reads it. ``studies.objects.make_shipped`` made them."""


def build(
    architecture: str, num_classes: int, *, image_size: int | Sequence[int] = 224, **options: object
) -> nn.Module:
    """A randomly initialised network by name: one of ours, ``resnet18_small_image``, or any torchvision classifier.

    Args:
        num_classes: of the detectors of speakers, ``active_speaker`` and ``bias``, 1: they name who speaks, and nothing else.
        image_size: side of square images, or (height, width); our own networks choose their stem by it, the detectors take crops of 112.

    Raises:
        ValueError: if the name is unknown, the size is none, or a detector is to have several classes.
    """
    image_size = sides(image_size)
    if architecture in SPEAKERS:
        if num_classes != 1:
            raise ValueError(f"architecture={architecture!r} has one output, speaking, not {num_classes}")
        return SPEAKERS[architecture](**options)
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
            f"architecture={architecture!r} is unknown: use {', '.join((*OURS, *SPEAKERS))}, resnet18_small_image or a torchvision classifier"
        )
    return torchvision.models.get_model(architecture, weights=None, num_classes=num_classes, **options)
