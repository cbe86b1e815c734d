"""Who speaks, frame by frame: a compact audio-visual detector, and one of the size and shape of BIAS.

Both take a batch of clips, equally long, as keyword arguments: ``audio`` (B, 4T, 13) MFCC, ``face`` and ``body`` (B, T, 112, 112) grey in
[0, 1]; only the streams they were built for. Both return logits (B, T, 1), positive for "speaking"; in training mode a dict with the
logits of every stream by itself beside them, as TalkNet (Tao et al., 2021) and Light-ASD (Liao et al., 2023) train theirs.

Where the SE blocks go is the same in both: before the temporal part of each visual encoder, and on the fused streams. ``SITES`` names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

STREAMS = ("audio", "face", "body")
SIDE = 112
COEFFICIENTS = 13  # of an audio frame, of which there are four to a video frame
MEAN, STD = 0.4161, 0.1688  # of grey face crops of AVA-ActiveSpeaker, as TalkNet uses them


def _norm_relu(norm: nn.Module) -> list[nn.Module]:
    return [norm, nn.ReLU(inplace=True)]


class Factorised(nn.Module):
    """A 3-D convolution in two, as in Light-ASD: 1×k×k in space, then 3×1×1 in time, each with normalisation and ReLU.

    (B, C, T, H, W) -> (B, width, T, H/stride, W/stride), and half of that when ``pool`` takes the maxima of 2×2. All is computed in 2-D with
    the channels last in memory, which is several times as fast on a CPU.
    """

    def __init__(
        self, before: int, width: int, kernel: int, stride: int, *, time: bool = True, pool: bool = False
    ) -> None:
        super().__init__()
        layers = [
            nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False),
            *_norm_relu(nn.BatchNorm2d(width)),
        ]
        self.space = nn.Sequential(*layers, *[nn.MaxPool2d(2)] * pool)
        self.time = (
            nn.Sequential(
                nn.Conv2d(width, width, (3, 1), 1, (1, 0), bias=False), *_norm_relu(nn.BatchNorm2d(width))
            )
            if time
            else nn.Identity()
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.space(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), x.shape[2]))
        x = frames.transpose(1, 2)
        return self.time(x.flatten(3)).unflatten(3, x.shape[3:])


class Temporal(nn.Module):
    """Residual 1-D convolutions over the frames: (B, C, T) -> (B, width, T), not negative."""

    def __init__(self, channels: int, width: int, kernel: int = 5, depth: int = 1) -> None:
        super().__init__()
        self.enter = nn.Sequential(
            nn.Conv1d(channels, width, 1, bias=False), *_norm_relu(nn.BatchNorm1d(width))
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Conv1d(width, width, 1, bias=False),
                nn.BatchNorm1d(width),
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


class VisualEncoder(nn.Module):
    """Crops (B, T, 112, 112) -> (B, width, T). ``spatial`` gives the map (B, C, T, h, w) that is explained.

    Args:
        reads: what becomes of a frame's map: its mean over the image, or its maximum.
    """

    def __init__(
        self, spatial: nn.Module, channels: int, width: int, depth: int, *, reads: Literal["mean", "max"]
    ) -> None:
        super().__init__()
        self.spatial = spatial
        self.temporal = Temporal(channels, width, depth=depth)
        self.reads = reads

    def forward(self, crops: Tensor) -> Tensor:
        x = self.spatial(((crops - MEAN) / STD)[:, None])
        return self.temporal(x.mean((3, 4)) if self.reads == "mean" else x.amax((3, 4)))


class AudioEncoder(nn.Module):
    """MFCC (B, 4T, 13) -> (B, width, T): 1-D convolutions over time, halved twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(COEFFICIENTS)
        widths = (COEFFICIENTS, width // 2, width, width)
        layers: list[nn.Module] = []
        for (before, after), stride in zip(pairwise(widths), (1, 2, 2), strict=True):
            layers += [nn.Conv1d(before, after, 5, stride, 2, bias=False), *_norm_relu(nn.BatchNorm1d(after))]
        self.layers = nn.Sequential(*layers)

    def forward(self, mfcc: Tensor) -> Tensor:
        return self.layers(self.norm(mfcc.transpose(1, 2)))


class Fuse(nn.Module):
    """The streams side by side: M times (B, C, T) -> (B, M·C, T)."""

    def forward(self, *streams: Tensor) -> Tensor:
        return torch.cat(streams, 1)


class ActiveSpeaker(nn.Module):
    """Encoders of the streams, their fusion, a temporal head over it, and one linear layer.

    Args:
        encoders: {stream: module that maps it to (B, width, T)}, in the order of their segments on the fused channels.
        head: (B, T, M·width) -> (B, T, hidden).
        width: channels of a stream on the fused map.
        hidden: what the linear layer reads.

    Attributes:
        modalities: the streams, in the order of their segments.
    """

    def __init__(self, encoders: dict[str, nn.Module], head: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        self.modalities = tuple(encoders)
        for name, encoder in encoders.items():
            self.add_module(name, encoder)
        self.fuse = Fuse()
        self.head = head
        self.classifier = nn.Linear(hidden, 1)
        self.auxiliary = nn.ModuleDict({name: nn.Linear(width, 1) for name in encoders})

    @property
    def sites(self) -> dict[str, str]:
        """Where the study's SE blocks go, for ``attach_se(at=…)``."""
        visual = {name: f"{name}.spatial" for name in self.modalities if name != "audio"}
        return visual | {"fusion": "fuse"}

    def forward(self, **streams: Tensor) -> Any:
        """Streams of a batch -> logits (B, T, 1); in training mode a dict that holds them and each stream's own."""
        if set(streams) != set(self.modalities):
            raise ValueError(
                f"the model takes {', '.join(self.modalities)}, but was given {', '.join(streams) or 'nothing'}"
            )
        found = {name: self.get_submodule(name)(streams[name]) for name in self.modalities}
        logits = self.decide(self.fuse(*found.values()))
        if not self.training:
            return logits
        return {
            "logits": logits,
            "auxiliary": {n: self.auxiliary[n](x.transpose(1, 2)) for n, x in found.items()},
        }

    def decide(self, fused: Tensor) -> Tensor:
        """What follows the fused streams: (B, M·C, T) -> logits (B, T, 1)."""
        logits: Tensor = self.classifier(self.head(fused.transpose(1, 2)))
        return logits

    def example(self, frames: int = 8, clips: int = 2) -> dict[str, Tensor]:
        """A batch of noise of the right shapes, the same every time."""
        noise = torch.Generator().manual_seed(0)
        shapes = {name: (clips, frames, SIDE, SIDE) for name in self.modalities} | {
            "audio": (clips, 4 * frames, COEFFICIENTS)
        }
        return {name: torch.rand(shapes[name], generator=noise) for name in self.modalities}


class Bidirectional(nn.Module):
    """A bidirectional GRU whose two directions are added, as in Light-ASD: (B, T, inputs) -> (B, T, hidden)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        forwards, backwards = self.gru(x)[0].chunk(2, dim=2)
        return forwards + backwards


def active_speaker(
    streams: Sequence[str] = STREAMS,
    widths: tuple[int, int, int] = (12, 32, 64),
    width: int = 128,
    hidden: int = 128,
) -> ActiveSpeaker:
    """The compact detector: factorised 3-D convolutions to a 7×7 map, its maxima, then a bidirectional GRU (Light-ASD in spirit).

    Args:
        streams: some of "audio", "face", "body".
        widths: channels of the three visual stages.
        width: channels of a stream on the fused map.
        hidden: units of the GRU in each direction.
    """
    _check(streams)

    def visual() -> nn.Module:
        spatial = nn.Sequential(
            # In two steps: a stride of 4 at once loses the lips, and the network then learns from the hands alone.
            Factorised(1, widths[0], 5, 2, time=False, pool=True),
            Factorised(widths[0], widths[1], 3, 2),
            Factorised(widths[1], widths[2], 3, 2),
        )
        return VisualEncoder(spatial, widths[2], width, depth=1, reads="max")

    encoders: dict[str, nn.Module] = {
        name: AudioEncoder(width) if name == "audio" else visual() for name in streams
    }
    return ActiveSpeaker(encoders, Bidirectional(len(encoders) * width, hidden), width, hidden)


def _check(streams: Sequence[str]) -> None:
    if not streams or len(set(streams)) < len(streams) or not set(streams) <= set(STREAMS):
        raise ValueError(f"streams={tuple(streams)}: some of {', '.join(STREAMS)}, each once")


# ---- the size and shape of BIAS ------------------------------------------------------------------------------------------


class Frames(nn.Module):
    """A 2-D network run on every frame: (B, C, T, H, W) -> (B, C', T, h, w)."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Tensor:
        maps = self.trunk(x.transpose(1, 2).flatten(0, 1))
        return maps.unflatten(0, (len(x), x.shape[2])).transpose(1, 2)


def _stage(block: Any, before: int, width: int, count: int, stride: int, **options: Any) -> nn.Sequential:
    shortcut = None
    if stride != 1 or before != width:
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    first = block(before, width, stride=stride, downsample=shortcut, **options)
    return nn.Sequential(first, *(block(width, width, **options) for _ in range(count - 1)))


class SEBasicBlock(BasicBlock):
    """A basic residual block with squeeze-and-excitation of its own (Hu et al., 2018, SE-ResNet), ratio 8."""

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample)
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(planes, planes // 8, 1),
            nn.ReLU(),
            nn.Conv2d(planes // 8, planes, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out * self.excite(out) + shortcut)


class SEResNetAudio(nn.Module):
    """MFCC (B, 4T, 13) as an image -> (B, width, T): SE-ResNet-34 with stages (3, 4, 6, 3), time halved twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        stem = [nn.Conv2d(1, 16, 7, (2, 1), 3, bias=False), *_norm_relu(nn.BatchNorm2d(16))]
        stages = [
            _stage(SEBasicBlock, b, w, n, s)
            for b, w, n, s in ((16, 16, 3, 1), (16, 32, 4, 2), (32, 64, 6, 2), (64, width, 3, 1))
        ]
        self.layers = nn.Sequential(*stem, *stages)

    def forward(self, mfcc: Tensor) -> Tensor:
        return self.layers(mfcc.transpose(1, 2)[:, None]).mean(2)


class SelfAttention(nn.Module):
    """One layer of self-attention over the frames: (B, T, width) -> the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def bias(streams: Sequence[str] = STREAMS, width: int = 128) -> ActiveSpeaker:
    """A detector of the size and shape of BIAS (Roxo et al., arXiv 2412.05150).

    A 3-D stem, ResNet-18 on every frame and a temporal network for each visual stream, SE-ResNet-34 for the sound, self-attention over
    the fused M·128 channels. The SE blocks are attached where the paper has its own: on each visual map and on the fused channels.
    """
    _check(streams)

    def visual() -> nn.Module:
        stem = nn.Sequential(
            nn.Conv3d(1, 64, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
            *_norm_relu(nn.BatchNorm3d(64)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        trunk = nn.Sequential(
            *(
                _stage(BasicBlock, b, w, 2, s)
                for b, w, s in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
            )
        )
        return VisualEncoder(nn.Sequential(stem, Frames(trunk)), 512, width, depth=5, reads="mean")

    encoders: dict[str, nn.Module] = {
        name: SEResNetAudio(width) if name == "audio" else visual() for name in streams
    }
    fused = len(encoders) * width
    return ActiveSpeaker(encoders, SelfAttention(fused), width, fused)
