"""The grid pointing game: of four photographs in one picture, does the map of a class find its own?

Böhle, Fritz and Schiele, "Convolutional Dynamic Alignment Networks for Interpretable Classifications", CVPR
2021. Quadrants are numbered in reading order, 0 to 3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from studies.baselines import Explainer
from studies.metrics import energy_in_mask


class Mosaics(NamedTuple):
    """Pictures of four classes each: images (M, 3, 2H, 2W), and the classes by quadrant, targets (M, 4)."""

    images: Tensor
    targets: Tensor


def mosaics(images: Tensor, targets: Tensor, count: int, seed: int = 0) -> Mosaics:
    """``count`` mosaics of images (N, 3, H, W), of any type, each of four different classes ``targets`` (N,).

    Pass images that the network classifies with confidence: of others no map can find the class. They keep
    their size, so the network must be convolutional up to its pooling. An image may be in several mosaics.
    """
    labels = targets.cpu().numpy()
    classes = np.unique(labels)
    if len(classes) < 4:
        raise ValueError(f"a mosaic needs images of four classes, these are of {len(classes)}")
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(classes, 4, replace=False) for _ in range(count)]
    rows = torch.tensor([[rng.choice(np.flatnonzero(labels == k)) for k in four] for four in drawn])
    quarters = images[rows]  # (M, 4, 3, H, W)
    halves = [torch.cat([quarters[:, i], quarters[:, i + 1]], 3) for i in (0, 2)]
    return Mosaics(torch.cat(halves, 2), targets[rows])


def quadrant_energy(heatmaps: Tensor, quadrant: Tensor) -> Tensor:
    """The share of the energy of heatmaps (B, H, W) that lies in a quadrant (B,): float64 (B,), chance 0.25.

    0 for a zero map; with odd sides the lower and right quadrants have the line more.
    """
    height, width = heatmaps.shape[1:]
    lower, right = torch.arange(height) >= height // 2, torch.arange(width) >= width // 2
    places = 2 * lower[:, None].long() + right.long()
    return energy_in_mask(heatmaps, places == quadrant.cpu()[:, None, None])


def grid_pointing(explain: Explainer, grids: Mosaics, *, batch_size: int = 16) -> Tensor:
    """Energy in the right quadrant when each of a mosaic's four classes is asked for: float64 (M, 4)."""
    found = []
    for images, targets in zip(*(part.split(batch_size) for part in grids), strict=True):
        shares = []
        for quadrant in range(4):
            maps = explain(images, targets[:, quadrant])
            shares.append(quadrant_energy(maps, torch.full((len(maps),), quadrant)))
        found.append(torch.stack(shares, 1))
    return torch.cat(found).cpu()
