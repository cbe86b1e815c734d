"""Pooled features of a frozen network, computed once and kept on disk; a network that starts at them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from selib.checkpoint import write
from selib.forward import evaluating
from studies.data import ImageSet


class OnFeatures(nn.Module):
    """What follows a frozen body: average pooling and one linear layer, on maps (B, C, h, w).

    With pooled features (B, C, 1, 1) in place of maps it gives the same logits, and so do SE blocks at
    ``map``.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.map = nn.Identity()
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> logits (B, K)."""
        return self.classifier(self.map(x).mean((2, 3)))


def head_of(model: nn.Module) -> OnFeatures:
    """The head of a network whose linear layer is named ``classifier``, with its weights."""
    layer = model.get_submodule("classifier")
    assert isinstance(layer, nn.Linear)
    head = OnFeatures(layer.in_features, layer.out_features)
    head.classifier.load_state_dict(layer.state_dict())
    return head.to(layer.weight.device).eval()


def pooled(model: nn.Module, data: ImageSet, folder: Path, *, batch_size: int = 64) -> Tensor:
    """What the linear layer ``classifier`` of a frozen network reads of every image: (N, C) float32.

    Kept in ``folder`` under a fingerprint of the body and the images.
    """

    def compute() -> Tensor:
        return read_inputs(model, model.get_submodule("classifier"), data, batch_size, torch.float32)

    return _kept("features", model, data, folder, compute)


def kept_maps(model: nn.Module, data: ImageSet, folder: Path, *, batch_size: int = 64) -> Tensor:
    """The last maps of every image, (N, C, h, w) in half precision: what ``global_pool`` of timm reads."""

    def compute() -> Tensor:
        return read_inputs(model, model.get_submodule("global_pool"), data, batch_size, torch.float16)

    return _kept("maps", model, data, folder, compute)


def _kept(what: str, model: nn.Module, data: ImageSet, folder: Path, compute: Callable[[], Tensor]) -> Tensor:
    digest = hashlib.sha256(data.fingerprint.encode())
    for name, weight in model.state_dict().items():
        if not name.startswith(("classifier.", "selib_se.")):
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    file = folder / f"{what}-{data.name}-{data.split}-{digest.hexdigest()[:16]}.safetensors"
    if not file.is_file():
        write(file, {what: compute()}, {})
    return load_file(file)[what]


def read_inputs(
    model: nn.Module, reader: nn.Module, data: ImageSet, batch_size: int, dtype: torch.dtype
) -> Tensor:
    """What a module of a network reads of every image."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        found.append(args[0].to("cpu", dtype).contiguous())

    place = next(model.parameters()).device
    handle = reader.register_forward_pre_hook(keep)
    try:
        with evaluating(model):
            for images, _ in tqdm(data.loader(batch_size), desc=data.name, leave=False):
                model(images.to(place, memory_format=torch.channels_last))
    finally:
        handle.remove()
    return torch.cat(found)


def feature_loader(
    features: Tensor, targets: Tensor, batch_size: int, *, seed: int | None = None
) -> DataLoader:
    """Batches of (B, C, 1, 1) and targets; shuffled if there is a seed."""
    data = TensorDataset(features[:, :, None, None], targets)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=seed is not None, generator=generator)
