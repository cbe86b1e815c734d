"""A residual network small enough to train on two cores, with an 8x8 last map on 32x32 and on 64x64 images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock


class SmallResNet(nn.Module):
    """A stem and one basic residual block per stage (He et al., CVPR 2016), global average pooling, one linear layer.

    Args:
        num_classes: K.
        widths: channels of the stages; each stage after the first halves the resolution. The last is the C of the SE vector.
        stem_stride: 1 for 32x32 images, 2 for 64x64: both give a last map of 8x8 with three stages.
    """

    def __init__(
        self, num_classes: int, widths: tuple[int, ...] = (16, 48, 128), stem_stride: int = 1
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        stages: list[nn.Module] = [BasicBlock(widths[0], widths[0])]
        for before, width in pairwise(widths):
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            stages.append(BasicBlock(before, width, stride=2, downsample=shortcut))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K)."""
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of images, given as both or as the side of a square.

    Raises:
        ValueError: anything but one or two positive whole numbers.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            f"image_size={image_size!r}: it is the side of a square in pixels, or (height, width)"
        )
    return size


def small_resnet(
    num_classes: int = 10, *, image_size: int | Sequence[int] = 32, widths: tuple[int, ...] = (16, 48, 128)
) -> SmallResNet:
    """The network of this study for images of ``image_size``, a side or (height, width): the stem halves what is larger than 32."""
    return SmallResNet(num_classes, tuple(widths), stem_stride=2 if max(sides(image_size)) > 32 else 1)
