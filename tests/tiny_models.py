"""Small networks for the tests: torchvision's architectures, shrunk, and models as users write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models as tv
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.video import resnet as video

from selib.attach import attach_se
from selib.forward import call, logits_of
from selib.se import SEBlock

K = 5


def resnet() -> nn.Module:
    return tv.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=K)


def vgg() -> nn.Module:
    with torch.device("meta"):  # its first linear layer alone has 100 million weights
        model = VGG(make_layers([8, "M", 8, "M", 12, 12, "M"], batch_norm=True), num_classes=K)
    model.classifier = nn.Sequential(
        nn.Linear(12 * 49, 32),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(32, 16),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(16, K),
    )
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def densenet() -> nn.Module:
    return DenseNet(growth_rate=8, block_config=(2, 2), num_init_features=16, bn_size=2, num_classes=K)


def squeezenet() -> nn.Module:
    return tv.squeezenet1_1(num_classes=K)


def mobilenet_v3() -> nn.Module:
    config = partial(InvertedResidualConfig, width_mult=1.0)
    rows = [config(8, 3, 8, 8, True, "RE", 2, 1), config(8, 5, 16, 16, True, "HS", 2, 1)]
    return tv.MobileNetV3(rows, last_channel=32, num_classes=K)


def efficientnet() -> nn.Module:
    rows = [MBConvConfig(1, 3, 1, 8, 8, 1, 1.0, 1.0), MBConvConfig(4, 3, 2, 8, 16, 2, 1.0, 1.0)]
    return tv.EfficientNet(rows, dropout=0.2, num_classes=K)


def convnext() -> nn.Module:
    return tv.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)], num_classes=K, layer_scale=1.0)


def vit() -> nn.Module:
    return tv.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=K
    )


def swin() -> nn.Module:
    return SwinTransformer(
        [4, 4], embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=[2, 2], num_classes=K
    )


def r3d() -> nn.Module:
    return video.VideoResNet(
        video.BasicBlock, [video.Conv3DSimple] * 4, [1, 1, 1, 1], video.BasicStem, num_classes=K
    )


def convolutions(channels: int = 6, inputs: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, channels, 3, 2, 1),
        nn.ReLU(),
    )


class Functional(nn.Module):
    """Activations and pooling as functions, one ReLU module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1), nn.Linear(6, K)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.act(F.max_pool2d(self.conv1(x), 2)))
        x = F.relu(self.conv2(x))
        return self.fc(F.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1), 0.5, self.training))


class TwoInputs(nn.Module):
    """An image and a vector that bypasses the map; the head is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.meta = convolutions(), nn.Linear(4, 6)
        self.head = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, K))

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        return self.head(torch.cat([self.body(image).mean((2, 3)), self.meta(meta).tanh()], 1))


class DictOutput(nn.Module):
    """Logits in a dict, behind another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = convolutions(), nn.Linear(6, K)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        pooled = self.body(pixel_values).mean((2, 3))
        return {"embedding": pooled, "logits": self.fc(pooled)}


class TwoStreams(nn.Module):
    """Two encoders side by side, fused by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.face_encoder, self.body_encoder = convolutions(6), convolutions(4, inputs=1)
        self.fuse = nn.Linear(10, 8)
        self.fc = nn.Linear(8, K)

    def forward(self, face: Tensor, body: Tensor) -> Tensor:
        both = torch.cat([self.face_encoder(face).mean((2, 3)), self.body_encoder(body).mean((2, 3))], 1)
        return self.fc(self.fuse(both).relu())


class GruHead(nn.Module):
    """Reads the positions one by one; vmap does not know the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gru, self.fc = convolutions(), nn.GRU(6, 8, batch_first=True), nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(self.body(x).flatten(2).mT)[0][:, -1])


class InPlaceHead(nn.Module):
    """A signed map, rectified in place, then a head that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3, 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(6 * 64, 12), nn.ReLU(inplace=True), nn.Linear(12, K)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))


class Audio(nn.Module):
    """A waveform (B, T) without a channel axis, 1-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 8, 5, 4, 2), nn.ReLU(), nn.Conv1d(8, 6, 5, 4, 2), nn.ReLU())
        self.fc = nn.Linear(6, K)

    def forward(self, wave: Tensor) -> Tensor:
        return self.fc(self.body(wave[:, None]).mean(2))


def sequential() -> nn.Module:
    return nn.Sequential(
        convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(nn.Linear(6, K))
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, K))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(size: int = 64, batch: int = 3) -> Tensor:
    return random(batch, 3, size, size)


# name: how to build it, an example, the site that must be found, the shape of the map there
Row = tuple[Callable[[], nn.Module], Any, str, tuple[int, ...]]
ZOO: dict[str, Row] = {
    "resnet": (resnet, image(), "layer4", (512, 2, 2)),
    "vgg": (vgg, image(), "avgpool", (12, 7, 7)),
    "densenet": (densenet, image(), "features", (32, 8, 8)),
    "squeezenet": (squeezenet, image(), "classifier.0", (512, 3, 3)),
    "mobilenet_v3": (mobilenet_v3, image(), "features", (96, 8, 8)),
    "efficientnet": (efficientnet, image(), "features", (64, 16, 16)),
    "convnext": (convnext, image(), "features", (16, 8, 8)),
    "vit": (vit, image(32), "encoder.layers.encoder_layer_0", (17, 32)),
    "swin": (swin, image(32), "permute", (16, 4, 4)),
    "r3d": (r3d, random(2, 3, 2, 32, 32), "layer4", (512, 1, 2, 2)),
    "functional": (Functional, image(32), "conv2", (6, 4, 4)),
    "two inputs": (TwoInputs, (image(32), random(3, 4)), "body", (6, 8, 8)),
    "dict output": (DictOutput, {"pixel_values": image(32)}, "body", (6, 8, 8)),
    "sequential": (sequential, image(32), "0", (6, 8, 8)),
    "gru head": (GruHead, image(32), "body", (6, 8, 8)),
    "in-place head": (InPlaceHead, image(32), "act", (6, 8, 8)),
    "audio": (Audio, random(3, 256), "body", (6, 16)),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A model of the zoo in evaluation mode, and its example."""
    make, example, _, _ = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        liven(model)
    return model.eval(), example


def liven(model: nn.Module) -> None:
    """Weights and statistics under which the logits differ: torchvision's own start leaves some near zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.2, 0.2)


# ---- helpers ----------


@torch.no_grad()
def run(model: nn.Module, example: Any) -> Tensor:
    return logits_of(call(model, example))


@torch.no_grad()
def open_and_close(block: SEBlock, seed: int = 0) -> SEBlock:
    """Weights under which the gates differ between channels and samples, and none is saturated."""
    generator = torch.Generator().manual_seed(seed)
    for p in block.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 1))
    block.fc1.bias.abs_()
    return block


def hooks(model: nn.Module) -> list[int]:
    """How many hooks of every kind every module has."""
    kinds = [v for m in model.modules() for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)]
    return [len(v) for v in kinds]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All of a model that must be left alone, its own SE blocks aside."""
    own = [(n, m) for n, m in model.named_modules() if "selib_se" not in n]
    named = [(n, p) for n, p in model.named_parameters() if "selib_se" not in n]
    return {
        "modes": [(n, m.training) for n, m in own],
        "state": {k: v.clone() for k, v in model.state_dict().items() if "selib_se" not in k},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in named},
        "learns": {n: p.requires_grad for n, p in named},
    }


def same(one: Any, two: Any) -> bool:
    """Equality bit for bit of nested dicts of tensors."""
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[k], two[k]) for k in one)
    return torch.equal(one, two) if isinstance(one, Tensor) else bool(one == two)


def close(found: Tensor, expected: Tensor, like: Tensor | None = None) -> bool:
    """Equal to 1e-4, relative to the largest expected number, or to that of ``like``."""
    scale = (expected if like is None else like).abs().max()
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-4 * scale)


@contextmanager
def gradients_seen() -> Iterator[list[list[Tensor]]]:
    """The gradients of every step that AdamW takes."""
    seen: list[list[Tensor]] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any) -> Any:
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        yield seen


class Detector(nn.Module):
    """Says that who has a bright face speaks: the logit of a frame is 20 · brightness - 10, and no other
    stream counts.
    """

    modalities = ("audio", "face", "body")

    def __init__(self, others: float = 0.0) -> None:
        super().__init__()
        self.face, self.body = (nn.Conv3d(1, 2, (1, 1, 3), padding=(0, 0, 1), bias=False) for _ in range(2))
        self.fuse, self.head = nn.Identity(), nn.Conv1d(6, 1, 1)
        for eye in (self.face, self.body):
            # Two channels: the brightness, and where it rises to the right.
            eye.weight.data = torch.tensor([[0.0, 1, 0], [-1, 0, 1]]).view(2, 1, 1, 1, 3)
        nn.init.constant_(self.head.weight, others)
        self.head.weight.data[:, 2:4] = torch.tensor([[20.0], [0.0]])
        nn.init.constant_(self.head.bias, -10.0)
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, audio: Tensor, face: Tensor, body: Tensor) -> Tensor:
        self.seen.append({"audio": audio, "face": face, "body": body})
        heard = audio[:, ::4, :2].transpose(1, 2) / 100
        looks = [
            eye(nn.functional.avg_pool2d(x, 16)[:, None]).mean((3, 4))
            for eye, x in ((self.face, face), (self.body, body))
        ]
        return self.head(self.fuse(torch.cat([heard, *looks], 1))).transpose(1, 2)


def detector(others: float = 0.0) -> Detector:
    model = Detector(others).eval()
    example = {
        "audio": torch.rand(2, 32, 13),
        "face": torch.rand(2, 8, 112, 112),
        "body": torch.rand(2, 8, 112, 112),
    }
    attach_se(model, example, at={"face": "face", "body": "body", "fusion": "fuse"})
    model.seen.clear()
    return model
