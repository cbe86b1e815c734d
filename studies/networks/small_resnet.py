"""A residual network that trains on two cores, with an 8x8 last map on 32x32 and on 64x64 images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from selib.pixels import sides


class SmallResNet(nn.Module):
    """A stem, one residual block per stage (He et al., CVPR 2016), average pooling, one linear layer."""

    def __init__(
        self, num_classes: int, widths: Sequence[int], stem_stride: int, *, fine: bool = False
    ) -> None:
        super().__init__()
        stem = nn.Conv2d(3, widths[0], 3, stem_stride, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(BasicBlock(widths[0], widths[0]))
        for before, width in pairwise(widths):
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            self.stages.append(BasicBlock(before, width, stride=2, downsample=shortcut))
        if fine:
            self._keep_last_size()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def _keep_last_size(self) -> None:
        """The last stage does not halve the map; its second convolution looks as far through a dilation."""
        last = self.stages[-1]
        assert isinstance(last, BasicBlock) and last.downsample is not None
        for layer in (last.conv1, last.downsample[0]):
            layer.stride = (1, 1)  # type: ignore[assignment]
        last.conv2.dilation = last.conv2.padding = (2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K)."""
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))


def small_resnet(
    num_classes: int = 10,
    *,
    image_size: int | Sequence[int] = 32,
    widths: Sequence[int] = (16, 48, 128),
    fine: bool = False,
) -> SmallResNet:
    """The network of this study; the stem halves images larger than 32, a side or (height, width).

    fine: the last map is as large as that of the stage before: 22x18 of a face of 88x72, not 11x9.
    """
    return SmallResNet(num_classes, widths, 2 if max(sides(image_size)) > 32 else 1, fine=fine)
