"""Pooled features of a frozen network, computed once and kept on disk; a network that starts at them."""

from __future__ import annotations

import hashlib
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
    digest = hashlib.sha256(data.fingerprint.encode())
    for name, weight in model.state_dict().items():
        if not name.startswith(("classifier.", "selib_se.")):
            digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    file = folder / f"features-{data.name}-{data.split}-{digest.hexdigest()[:16]}.safetensors"
    if file.is_file():
        return load_file(file)["features"]
    found: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Tensor]) -> None:
        found.append(args[0].float().cpu())

    place = next(model.parameters()).device
    handle = model.get_submodule("classifier").register_forward_pre_hook(keep)
    try:
        with evaluating(model):
            for images, _ in tqdm(data.loader(batch_size), desc=f"features of {data.name}", leave=False):
                model(images.to(place, memory_format=torch.channels_last))
    finally:
        handle.remove()
    features = torch.cat(found)
    write(file, {"features": features}, {})
    return features


def feature_loader(
    features: Tensor, targets: Tensor, batch_size: int, *, seed: int | None = None
) -> DataLoader:
    """Batches of (B, C, 1, 1) and targets; shuffled if there is a seed."""
    data = TensorDataset(features[:, :, None, None], targets)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle=seed is not None, generator=generator)
