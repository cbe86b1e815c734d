"""A data set, a network and a training, as one recipe; what is trained is kept and found again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selib import attach_se, load_weights
from studies.data import ImageSet
from studies.networks import SHIPPED, build
from studies.training import History, on_gpu, train_once


@dataclass(frozen=True)
class Recipe:
    """A data set of a profile and how its networks are trained."""

    name: str
    train: ImageSet
    val: ImageSet
    epochs: int
    architecture: str
    from_shipped: bool = True  # where the package comes with a network for this set

    @property
    def shipped(self) -> Path | None:
        """The network that comes with the package for this set, from which training then starts."""
        own = self.from_shipped and self.train.synthetic and self.architecture == "small_resnet"
        return SHIPPED.get(self.train.name) if own else None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.train.size


def network(recipe: Recipe, *, se: bool, seed: int, per_target: bool = False) -> nn.Module:
    """The network before training; all forms start from the same weights at the same seed.

    On a twin they start from the shipped network: two cores do not learn its images from nothing in a minute.
    The block starts in its published form, F' = s·F with s near ½: what was trained before settles again.
    """
    torch.manual_seed(seed)
    model = build(recipe.architecture, len(recipe.train.classes), image_size=recipe.image_size)
    if recipe.shipped:
        load_weights(model, recipe.shipped)
    if se:
        attach_se(model, recipe.train.batch([0]), start="paper", per_target=per_target)
    return model


def trained(
    recipe: Recipe,
    *,
    se: bool,
    seed: int,
    out: Path,
    per_target: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> tuple[nn.Module, History]:
    """Train the network of a recipe, or load it from the folder ``out``: the network and its history.

    With ``se`` the block is trained with the rest; ``per_target``: there is one for each attribute.
    """
    form = "se-per-target" if per_target else "se" if se else "plain"
    gpu, attributes = on_gpu(device), recipe.train.multilabel
    adaptive = attributes or recipe.train.synthetic
    val = None if attributes else recipe.val  # of faces that is the test split: not looked at meanwhile
    return train_once(
        network(recipe, se=se, seed=seed, per_target=per_target),
        recipe.train.loader(512 if gpu else 64, train=True, seed=seed),
        val.loader(500) if val else None,
        out=out,
        name=f"{recipe.name}-{form}-seed{seed}",
        device=device,
        progress=progress,
        epochs=recipe.epochs,
        optimizer="adamw" if adaptive else "sgd",
        lr=2e-3 if adaptive else 0.4 if gpu else 0.2,
        task="multilabel" if attributes else "multiclass",
        seed=seed,
    )


def describe(recipe: Recipe) -> str:
    """Data, network and training in a line, for captions."""
    synthetic = " (synthetic)" if recipe.train.synthetic else ""
    outputs = f"{len(recipe.train.classes)} {'attributes' if recipe.train.multilabel else 'classes'}"
    held = "validation" if recipe.val.split == "val" else recipe.val.split
    images = f"{len(recipe.train)} training and {len(recipe.val)} {held} images"
    epochs = f"{recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}"
    start = " from the shipped weights" if recipe.shipped else ""
    return f"{recipe.name}{synthetic}, {outputs}, {images}, {recipe.architecture}, {epochs}{start}"
