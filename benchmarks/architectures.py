"""Where the SE block goes in architectures of torchvision and timm, and how long it takes: a Markdown table.

    python benchmarks/architectures.py

Random weights, one image of the network's usual size, this machine's cores.
"""

from __future__ import annotations

import time

import timm
import torch
from torch import nn
from torchvision import models

import selib
from selib.images import preparation_of

TORCHVISION = (
    "resnet50", "resnext50_32x4d", "densenet121", "vgg16", "mobilenet_v2", "mobilenet_v3_large",
    "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t", "maxvit_t",
)  # fmt: skip
TIMM = (
    "efficientnet_lite0", "resnet50d", "vit_small_patch16_224", "deit_tiny_patch16_224", "convnextv2_nano",
    "efficientformerv2_s0", "mobilenetv4_conv_small", "mixer_s32_224", "eva02_tiny_patch14_224",
)  # fmt: skip
CLIPS = ("r3d_18", "mc3_18", "swin3d_t")


def row(library: str, name: str, model: nn.Module, x: torch.Tensor) -> str:
    """Attach a block, explain once, and say where it is."""
    model.eval()
    start = time.perf_counter()
    block = selib.attach_se(model, x)
    attached = time.perf_counter() - start
    ex = selib.explain(model, x)
    closed, grid = ex._head.linear is not None, ex.features.shape[2:]
    place = f"`{block.site}`, {block.channels} x {' x '.join(map(str, grid))}"
    return (
        f"| {library} `{name}` | {place} | {'closed form' if closed else 'runs the head'} | {attached:.1f} |"
    )


def main() -> None:
    torch.manual_seed(0)
    print("| network | the block's place, channels x grid | influence | found in s |")
    print("| --- | --- | --- | ---: |")
    for name in TORCHVISION:
        print(
            row("torchvision", name, models.get_model(name, weights=None), torch.randn(1, 3, 224, 224)),
            flush=True,
        )
    for name in TIMM:
        model = timm.create_model(name, pretrained=False)
        print(row("timm", name, model, torch.randn(1, 3, *preparation_of(model).size)), flush=True)
    for name in CLIPS:
        model = models.get_model(name, weights=None)
        print(row("torchvision", name, model, torch.randn(1, 3, 16, 112, 112)), flush=True)


if __name__ == "__main__":
    main()
