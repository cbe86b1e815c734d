"""The study's own networks, and a register of architectures by name for recipes and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from selib.pixels import sides
from studies.networks.bias import bias
from studies.networks.cifar_resnet import CifarResNet, cifar_resnet
from studies.networks.detector import ActiveSpeaker, active_speaker
from studies.networks.pretrained import SIZES, Pretrained, efficientnet_lite, pretrained
from studies.networks.small_resnet import small_resnet

__all__ = [
    "SHIPPED",
    "ActiveSpeaker",
    "CifarResNet",
    "Pretrained",
    "active_speaker",
    "bias",
    "build",
    "cifar_resnet",
    "efficientnet_lite",
    "pretrained",
    "small_resnet",
]

DETECTORS: dict[str, Callable[..., ActiveSpeaker]] = {"active_speaker": active_speaker, "bias": bias}
TWINS = ("synth-objects", "synth-faces", "synth-speakers")
SHIPPED = {name: Path(__file__).parent / f"{name.replace('-', '_')}.safetensors" for name in TWINS}
"""Checkpoints of small networks trained on the twins, for ``selib.load_checkpoint``."""


def build(
    architecture: str, num_classes: int, *, image_size: int | Sequence[int] = 224, **options: Any
) -> nn.Module:
    """A network with random weights: one of ours, ``resnet18_small_image``, or any torchvision classifier.

    Ours are small_resnet, the detectors, resnet20 and resnet56 of CIFAR-10, and lite0 to lite2 of timm.
    The detectors of speakers have one output. image_size, a side or (height, width), matters to small_resnet.
    """
    image_size = sides(image_size)
    if architecture == "small_resnet":
        return small_resnet(num_classes, image_size=image_size, **options)
    if architecture in ("resnet20", "resnet56"):
        return CifarResNet(int(architecture.removeprefix("resnet")), num_classes, **options)
    if architecture in SIZES:
        return efficientnet_lite(architecture, num_classes, **options)
    if architecture in DETECTORS:
        if num_classes != 1:
            raise ValueError(f"architecture={architecture!r} has one output, speaking, not {num_classes}")
        return DETECTORS[architecture](**options)
    if architecture == "resnet18_small_image":
        # The usual form for 32x32 and 64x64 images: a 3x3 stem of stride 1 and no max-pooling.
        model = torchvision.models.resnet18(num_classes=num_classes)
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
        return model
    return torchvision.models.get_model(architecture, weights=None, num_classes=num_classes, **options)
