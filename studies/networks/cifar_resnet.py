"""He et al.'s residual networks for CIFAR-10 (CVPR 2016, section 4.2), and published weights for them."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from studies.data.objects import data_root
from studies.data.photos import missing

PUBLISHED = (20, 56)


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every other pixel and adds zero channels (option A)."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.stride, self.added = (1 if before == width else 2), (width - before) // 2
        self.conv1 = nn.Conv2d(before, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, width, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return self.relu(y + shortcut)


class CifarResNet(nn.Module):
    """A stem, three stages of (depth - 2) / 6 blocks, average pooling, one linear layer."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        more = (depth - 2) // 6 - 1
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(Block(16, 16), *[Block(16, 16) for _ in range(more)])
        self.layer2 = nn.Sequential(Block(16, 32), *[Block(32, 32) for _ in range(more)])
        self.layer3 = nn.Sequential(Block(32, 64), *[Block(64, 64) for _ in range(more)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, K); the last map is H/4 x W/4."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.linear(self.pool(self.layer3(self.layer2(self.layer1(x)))).flatten(1))


def cifar_resnet(depth: int, root: str | Path | None = None) -> CifarResNet:
    """ResNet-20 or ResNet-56 with the weights in `<root>/weights`, in evaluation mode.

    The weights (Yerlan Idelbayev's, BSD-2) were trained on images as `selib.pixels.normalize` gives them.
    Raises ValueError for another depth, FileNotFoundError, with where to get them, without the weights.
    """
    if depth not in PUBLISHED:
        raise ValueError(f"there are weights for depth {' and '.join(map(str, PUBLISHED))}, not for {depth}")
    base = data_root(root)
    file = base / "weights" / f"cifar10_resnet{depth}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(missing("weights", base))
    model = CifarResNet(depth)
    model.load_state_dict(load_file(file))
    return model.eval()
