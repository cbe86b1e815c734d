"""The study's own training runs on object images: which data, which network, how long. Notebooks share them by checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from selib.attach import attach_se
from selib.baselines import Explainer, generator_of
from selib.data import ImageSet, available, load
from selib.explanation import Method, explain
from selib.heatmap import normalize, resize
from selib.models import build
from selib.profiles import Profile, base
from selib.select import Select, TopFraction
from selib.train import accelerator, fit, predict


@dataclass(frozen=True)
class Recipe:
    """One data set of a profile and how its networks are trained."""

    name: str
    train: ImageSet
    val: ImageSet
    epochs: int
    architecture: str

    @property
    def image_size(self) -> int:
        return int(self.train.images.shape[-1])


def recipes(profile: Profile, root: str | Path | None = None, *, names: tuple[str, ...] | None = None) -> list[Recipe]:
    """The object sets of a profile: CIFAR-10 and Tiny-ImageNet where ``root`` holds them, else the synthetic twin.

    Args:
        names: ask for these sets by name instead.
    """
    if names is None:
        names = tuple(n for n in ("cifar10", "tiny-imagenet") if available(n, root)) or ("synth-objects",)
    on_gpu = profile.gpu_epochs is not None and torch.cuda.is_available()
    found = []
    for name in names:
        if name == "synth-objects":
            train = load(name, "train", root=root, limit=profile.twin_train)
            val = load(name, "val", root=root, limit=max(200, profile.twin_train // 4))
            epochs = profile.twin_epochs
        else:
            classes = profile.tiny_classes if name == "tiny-imagenet" else None
            train = load(name, "train", root=root, classes=classes, limit=profile.train_limit)
            val = load(name, "val", root=root, classes=classes, limit=profile.train_limit)
            epochs = profile.tiny_epochs if name == "tiny-imagenet" else profile.cifar_epochs
        found.append(
            Recipe(
                name,
                train,
                val,
                profile.gpu_epochs if on_gpu and profile.gpu_epochs else epochs,
                "resnet18_small_image" if on_gpu else "small_resnet",
            )
        )
    return found


def network(recipe: Recipe, *, se: bool, seed: int) -> nn.Module:
    """The untrained network; both forms start from the same weights at the same seed."""
    torch.manual_seed(seed)
    options = {"image_size": recipe.image_size} if recipe.architecture == "small_resnet" else {}
    model = build(recipe.architecture, len(recipe.train.classes), **options)
    if se:
        attach_se(model, recipe.train.batch([0]), start="paper")
    return model


def checkpoints(profile: Profile) -> Path:
    """Where the notebooks of a profile leave their trained networks for each other: SELIB_CHECKPOINTS, else ``runs/<profile>/checkpoints``."""
    return Path(os.environ.get("SELIB_CHECKPOINTS") or base() / "runs" / profile.name / "checkpoints")


def trained(
    recipe: Recipe, *, se: bool, seed: int, out: Path, device: str = "auto", progress: bool = True
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train the network of a recipe, or load it when another notebook has trained it into the folder ``out``.

    With ``se`` the block has the paper's form, F' = s·F, and is trained with the rest. Returns the model in evaluation mode and the
    history of :func:`selib.train.fit`.
    """
    model = network(recipe, se=se, seed=seed)
    folder = out / f"{recipe.name}-{'se' if se else 'plain'}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = accelerator(device).device.type == "cuda"
    with FileLock(
        folder / ".lock"
    ):  # a notebook that runs beside this one waits for the network instead of training it too
        history = fit(
            model,
            recipe.train.loader(512 if on_gpu else 64, train=True, seed=seed),
            recipe.val.loader(500),
            epochs=recipe.epochs,
            lr=0.4 if on_gpu else 0.2,
            seed=seed,
            device=device,
            out=folder,
            progress=progress,
        )
    return model.eval(), history


# ---- what is compared ----------------------------------------------------------------------------------------------------

OURS = ("SE top-gate (paper)", "SE gate", "SE influence", "SE influence, top 10 %")
SAME_COUNT = "as many random channels"


def se_explainers(model: nn.Module) -> dict[str, Explainer]:
    """The readings of a model's SE vector, and the mean of random channels, for each image as many as "top-gate" selects there."""

    def reading(method: Method, select: Select | None = None) -> Explainer:
        def heatmaps(images: Tensor, targets: Tensor) -> Tensor:
            maps: Tensor = explain(model, images).heatmap(method, targets, select=select)
            return maps

        return heatmaps

    def random(images: Tensor, targets: Tensor) -> Tensor:
        ex = explain(model, images)
        counts = ex.selected("top-gate").sum(1)
        orders = torch.stack([torch.rand(ex.gates.shape[1], generator=generator_of(0, image)) for image in images])
        chosen = orders.argsort(1).argsort(1) < counts[:, None].cpu()
        maps = ex.features.relu().mul(chosen.to(ex.gates)[:, :, None, None]).sum(1)
        return normalize(resize(maps, images.shape[2:]))

    readings = (reading("top-gate"), reading("gate"), reading("influence"), reading("influence", TopFraction(0.10)))
    return {**dict(zip(OURS, readings, strict=True)), SAME_COUNT: random}


def explained_images(recipe: Recipe, models: Sequence[nn.Module], count: int) -> tuple[list[int], list[int]]:
    """Which validation images to explain, and on which others to choose thresholds: two disjoint lists of at most ``count``.

    Images are those that every model classifies correctly and whose object covers less than half of them. Where fewer than 20 such
    are left (networks hardly trained, as in the smoke profile), correctness is not asked for.
    """
    truth = recipe.val.truth(slice(None))
    small = truth.flatten(1).double().mean(1) < 0.5
    right = small.clone()
    for model in models:
        logits, targets = predict(model, recipe.val.loader(500))
        right &= logits.argmax(1) == targets
    eligible = (right if int(right.sum()) >= 20 else small).nonzero().flatten()
    shuffled = eligible[torch.randperm(len(eligible), generator=torch.Generator().manual_seed(0))].tolist()
    cut = min(count, len(shuffled) // 2)
    return sorted(shuffled[:cut]), sorted(shuffled[cut : 2 * cut])
