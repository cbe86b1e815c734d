"""A detector of speakers of the size and shape of BIAS (Roxo et al., arXiv 2412.05150)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import SqueezeExcitation

from studies.networks.detector import STREAMS, ActiveSpeaker, VisualEncoder


class SEBasicBlock(BasicBlock):
    """A residual block with squeeze-and-excitation before the sum (Hu et al., CVPR 2018), ratio 8."""

    def __init__(self, before: int, width: int, stride: int = 1, shortcut: nn.Module | None = None) -> None:
        super().__init__(before, width, stride, shortcut)
        self.bn2: nn.Module = nn.Sequential(nn.BatchNorm2d(width), SqueezeExcitation(width, width // 8))


def _stages(block: type[BasicBlock], *stages: tuple[int, int, int, int]) -> nn.Sequential:
    """Residual blocks; a stage is (channels before, channels, blocks, stride of the first)."""
    blocks = nn.Sequential()
    for before, width, count, stride in stages:
        shortcut = None
        if stride != 1 or before != width:
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        blocks.append(block(before, width, stride, shortcut))
        for _ in range(count - 1):
            blocks.append(block(width, width))
    return blocks


class SEResNetAudio(nn.Module):
    """MFCC (B, 4T, 13) as an image -> (B, width, T): SE-ResNet-34, time halved twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        stem = nn.Conv2d(1, 16, 7, (2, 1), 3, bias=False)
        stages = (16, 16, 3, 1), (16, 32, 4, 2), (32, 64, 6, 2), (64, width, 3, 1)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.stages = _stages(SEBasicBlock, *stages)

    def forward(self, mfcc: Tensor) -> Tensor:
        return self.stages(self.stem(mfcc.transpose(1, 2)[:, None])).mean(2)


class FramesResNet(nn.Module):
    """Clips (B, 1, T, H, W) -> (B, 512, T, H/32, W/32): a 3-D stem, then ResNet-18 on every frame."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv3d(1, 64, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False)
        pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        stages = (64, 64, 2, 1), (64, 128, 2, 2), (128, 256, 2, 2), (256, 512, 2, 2)
        self.stem = nn.Sequential(stem, nn.BatchNorm3d(64), nn.ReLU(inplace=True), pool)
        self.stages = _stages(BasicBlock, *stages)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.stem(x).transpose(1, 2)
        return self.stages(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


def bias(streams: Sequence[str] = STREAMS, width: int = 128) -> ActiveSpeaker:
    """The streams through residual networks, and self-attention over their M·128 fused channels."""
    encoders: dict[str, nn.Module] = {}
    for name in streams:
        audio = name == "audio"
        encoders[name] = (
            SEResNetAudio(width) if audio else VisualEncoder(FramesResNet(), 512, width, 5, torch.mean)
        )
    fused = len(encoders) * width
    attention = nn.TransformerEncoderLayer(fused, 8, 4 * fused, batch_first=True)
    return ActiveSpeaker(encoders, attention, width, fused)
