"""A residual network that trains on two cores, with an 8x8 last map on 32x32 and on 64x64 images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from selib.pixels import sides


class SmallResNet(nn.Module):
    """A stem, one residual block per stage (He et al., CVPR 2016), average pooling, one linear layer."""

    def __init__(self, num_classes: int, widths: Sequence[int], stem_stride: int) -> None:
        super().__init__()
        stem = nn.Conv2d(3, widths[0], 3, stem_stride, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(BasicBlock(widths[0], widths[0]))
        for before, width in pairwise(widths):
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            self.stages.append(BasicBlock(before, width, stride=2, downsample=shortcut))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K)."""
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))


def small_resnet(
    num_classes: int = 10, *, image_size: int | Sequence[int] = 32, widths: Sequence[int] = (16, 48, 128)
) -> SmallResNet:
    """The network of this study; the stem halves images larger than 32, a side or (height, width)."""
    return SmallResNet(num_classes, widths, stem_stride=2 if max(sides(image_size)) > 32 else 1)
