"""Who speaks, frame by frame: a compact audio-visual detector.

A detector takes a batch of equally long clips as keyword arguments, those that it was built for: ``audio``
(B, 4T, 13) MFCC, ``face`` and ``body`` (B, T, 112, 112) grey in [0, 1]. Logits (B, T, 1) above 0: "speaking".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

STREAMS = ("audio", "face", "body")
SIDE = 112
COEFFICIENTS = 13  # of an audio row; there are four rows to a video frame
Pool = Callable[[Tensor, tuple[int, ...]], Tensor]  # torch.mean or torch.amax, over h and w
MEAN, STD = 0.4161, 0.1688  # of grey face crops of AVA-ActiveSpeaker, as TalkNet uses them


class Factorised(nn.Module):
    """A 3-D convolution in two, as in Light-ASD: 1×k×k in space, then 3×1×1 in time, each with norm and ReLU.

    (B, C, T, H, W) -> (B, width, T, H/stride, W/stride); the ``first`` pools 2×2 and leaves time alone.
    Computed in 2-D with the channels last in memory, which is several times as fast on a CPU.
    """

    def __init__(self, before: int, width: int, kernel: int, stride: int, *, first: bool = False) -> None:
        super().__init__()
        in_space = nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False)
        self.space = nn.Sequential(in_space, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.time: nn.Module = nn.Identity()
        if first:
            self.space.append(nn.MaxPool2d(2))
        else:
            in_time = nn.Conv2d(width, width, (3, 1), 1, (1, 0), bias=False)
            self.time = nn.Sequential(in_time, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.space(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), x.shape[2]))
        x = frames.transpose(1, 2)
        return self.time(x.flatten(3)).unflatten(3, x.shape[3:])


class Temporal(nn.Module):
    """Residual 1-D convolutions over the frames: (B, C, T) -> (B, width, T), not negative."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        enter = nn.Conv1d(channels, width, 1, bias=False)
        self.enter = nn.Sequential(enter, nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            over_time = nn.Conv1d(width, width, 5, padding=2, groups=width, bias=False)
            over_channels = nn.Conv1d(width, width, 1, bias=False)
            norms = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
            self.blocks.append(nn.Sequential(over_time, norms[0], nn.ReLU(), over_channels, norms[1]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


class VisualEncoder(nn.Module):
    """Crops (B, T, 112, 112) -> (B, width, T). ``spatial`` makes the map that is explained."""

    def __init__(self, spatial: nn.Module, channels: int, width: int, depth: int, pool: Pool) -> None:
        super().__init__()
        self.spatial = spatial
        self.temporal = Temporal(channels, width, depth)
        self.pool = pool

    def forward(self, crops: Tensor) -> Tensor:
        x = self.spatial(((crops - MEAN) / STD)[:, None])
        return self.temporal(self.pool(x, (3, 4)))


class AudioEncoder(nn.Module):
    """MFCC (B, 4T, 13) -> (B, width, T): 1-D convolutions over time, halved twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(COEFFICIENTS)
        self.layers = nn.Sequential()
        widths = (COEFFICIENTS, width // 2, width, width)
        for (before, after), stride in zip(pairwise(widths), (1, 2, 2), strict=True):
            self.layers.append(nn.Conv1d(before, after, 5, stride, 2, bias=False))
            self.layers.append(nn.BatchNorm1d(after))
            self.layers.append(nn.ReLU(inplace=True))

    def forward(self, mfcc: Tensor) -> Tensor:
        return self.layers(self.norm(mfcc.transpose(1, 2)))


class Fuse(nn.Module):
    """The streams side by side: M times (B, C, T) -> (B, M·C, T)."""

    def forward(self, *streams: Tensor) -> Tensor:
        return torch.cat(streams, 1)


class ActiveSpeaker(nn.Module):
    """Encoders of the streams, their fusion, a temporal head over it, and one linear layer.

    Args:
        encoders: {stream: module that maps it to (B, width, T)}, in the order of the fused channels.
        head: (B, T, M·width) -> (B, T, hidden).
    """

    def __init__(self, encoders: Mapping[str, nn.Module], head: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        if not set(encoders) <= set(STREAMS):
            raise ValueError(f"streams={tuple(encoders)}: give some of {', '.join(STREAMS)}")
        self.modalities = tuple(encoders)
        for name, encoder in encoders.items():
            self.add_module(name, encoder)
        self.fuse = Fuse()
        self.head = head
        self.classifier = nn.Linear(hidden, 1)
        self.auxiliary = nn.ModuleDict({name: nn.Linear(width, 1) for name in encoders})

    @property
    def sites(self) -> dict[str, str]:
        """For ``attach_se(at=…)``: before the temporal part of each visual encoder, and the fused streams."""
        visual = {name: f"{name}.spatial" for name in self.modalities if name != "audio"}
        return visual | {"fusion": "fuse"}

    def forward(self, **streams: Tensor) -> Any:
        """Streams of a batch -> logits (B, T, 1).

        In training mode a dict with each stream's own logits beside them, as TalkNet (Tao et al., 2021) and
        Light-ASD (Liao et al., 2023) train theirs.
        """
        if set(streams) != set(self.modalities):
            given = ", ".join(streams) or "nothing"
            raise ValueError(f"the model takes {', '.join(self.modalities)}, but was given {given}")
        found = {name: self.get_submodule(name)(streams[name]) for name in self.modalities}
        logits = self.decide(self.fuse(*found.values()))
        if not self.training:
            return logits
        each = {name: self.auxiliary[name](x.transpose(1, 2)) for name, x in found.items()}
        return {"logits": logits, "auxiliary": each}

    def decide(self, fused: Tensor) -> Tensor:
        """What follows the fused streams: (B, M·C, T) -> logits (B, T, 1)."""
        return self.classifier(self.head(fused.transpose(1, 2)))

    def example(self, frames: int = 8, clips: int = 2) -> dict[str, Tensor]:
        """A batch of noise of the right shapes, the same every time."""
        noise = torch.Generator().manual_seed(0)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(STREAMS, (clips, frames, SIDE, SIDE))
        shapes["audio"] = (clips, 4 * frames, COEFFICIENTS)
        return {name: torch.rand(shapes[name], generator=noise) for name in self.modalities}


class Bidirectional(nn.Module):
    """A GRU in both directions, which are added, as in Light-ASD: (B, T, inputs) -> (B, T, hidden)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        forwards, backwards = self.gru(x)[0].chunk(2, dim=2)
        return forwards + backwards


def active_speaker(
    streams: Sequence[str] = STREAMS, widths: Sequence[int] = (12, 32, 64), width: int = 128
) -> ActiveSpeaker:
    """The compact detector, after Light-ASD (Liao et al., CVPR 2023): a 7×7 map, its maxima, a GRU.

    widths: channels of the three visual stages. width: of each stream on the fused map, and of the GRU.
    """

    def visual() -> nn.Module:
        # The first stage has two steps: a stride of 4 at once loses the lips, and the hands alone are learnt.
        first = Factorised(1, widths[0], 5, 2, first=True)
        second, third = Factorised(widths[0], widths[1], 3, 2), Factorised(widths[1], widths[2], 3, 2)
        return VisualEncoder(nn.Sequential(first, second, third), widths[2], width, 1, torch.amax)

    encoders = {name: AudioEncoder(width) if name == "audio" else visual() for name in streams}
    return ActiveSpeaker(encoders, Bidirectional(len(encoders) * width, width), width, width)
