"""The study of object images: which data, which networks, how long they are trained, and what is compared."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from selib import attach_se, cache_features, channel_test, fit_gates, load_weights, predict
from selib.forward import attached
from studies import benchmark
from studies.benchmark import Scores
from studies.data import ImageSet, available, load
from studies.explainers import controls_of, others_of, se_explainers
from studies.networks import SHIPPED, build
from studies.profiles import Profile, base
from studies.training import History, on_gpu, train_once, with_new_gates

GATES: dict[str, dict[str, Any]] = {
    "promise 95 %": {"agreement": 0.95},
    "λ = 0.1": {"sparsity": 0.1},
    "λ = 1": {"sparsity": 1.0},
}


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


def recipes(
    profile: Profile, root: str | Path | None = None, *, names: Sequence[str] | None = None
) -> list[Recipe]:
    """The sets ``names``; by default CIFAR-10 and Tiny-ImageNet where ``root`` holds them, else the twin."""
    if names is None:
        names = [n for n in ("cifar10", "tiny-imagenet") if available(n, root)] or ["synth-objects"]
    gpu_epochs = profile.gpu_epochs if on_gpu() else None
    architecture = "resnet18_small_image" if gpu_epochs else "small_resnet"
    sizes = {  # passes, training images, validation images
        "cifar10": (profile.cifar_epochs, profile.train_limit, profile.train_limit),
        "tiny-imagenet": (profile.tiny_epochs, profile.train_limit, profile.train_limit),
        "synth-objects": (profile.twin_epochs, profile.twin_train, max(200, profile.twin_train // 4)),
    }
    found = []
    for name in names:
        epochs, *limits = sizes[name]
        classes = profile.tiny_classes if name == "tiny-imagenet" else None
        train = load(name, "train", root=root, classes=classes, limit=limits[0])
        val = load(name, "val", root=root, classes=classes, limit=limits[1])
        found.append(Recipe(name, train, val, gpu_epochs or epochs, architecture))
    return found


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


def checkpoints(profile: Profile) -> Path:
    """Where notebooks leave their networks: SELIB_CHECKPOINTS, else ``runs/<profile>/checkpoints``."""
    return Path(os.environ.get("SELIB_CHECKPOINTS") or base() / "runs" / profile.name / "checkpoints")


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


def correct(recipe: Recipe, model: nn.Module) -> NDArray[np.float64]:
    """Which validation images the model classifies correctly: (N,) of 0 and 1."""
    logits, targets = predict(model, recipe.val.loader(500))
    return (logits.argmax(1) == targets).double().numpy()


def explained_images(recipe: Recipe, models: Sequence[nn.Module], count: int) -> tuple[list[int], list[int]]:
    """Which validation images to explain, and on which others to choose thresholds, at most ``count`` each.

    Every model classifies them correctly, and the object covers less than half of them. Where fewer than 20
    such images are left (networks hardly trained, as in the smoke profile), they need not be correct.
    """
    small = recipe.val.truth(slice(None)).flatten(1).double().mean(1) < 0.5
    right = small.clone()
    for model in models:
        right &= torch.from_numpy(correct(recipe, model)) > 0
    eligible = (right if int(right.sum()) >= 20 else small).nonzero().flatten()
    shuffled = eligible[torch.randperm(len(eligible), generator=torch.Generator().manual_seed(0))].tolist()
    cut = min(count, len(shuffled) // 2)
    return sorted(shuffled[:cut]), sorted(shuffled[cut : 2 * cut])


def gate_study(
    recipe: Recipe, model: nn.Module, *, epochs: int | None, seed: int
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """Label-free gates in the settings ``GATES`` for a network trained without SE, and what they are worth.

    Returns:
        A gated copy of the model (the last setting, λ = 1), and for each setting ``right``: which validation
        images stay right, by the kinds of :func:`selib.channel_test`, "agrees" and "influence_…" (arrays of 0
        and 1); beside it ``open_gates``, the ``report`` and its ``cache_seconds``.
    """
    gated = with_new_gates(model, recipe.train.batch([0]), seed=seed, reduction=1)
    block = attached(gated)[""]
    train = cache_features(gated, recipe.train.loader(500))
    val = cache_features(gated, recipe.val.loader(500))
    ranked = channel_test(block, val, targets=val.targets, ranking=val.influence(), seed=seed)
    by_influence = {f"influence_{end}": ranked[f"original_{end}_top"] for end in ("only", "without")}
    found = {}
    for name, setting in GATES.items():
        report = fit_gates(gated, train, epochs=epochs, seed=seed, **setting)
        right = channel_test(block, val, targets=val.targets, seed=seed) | by_influence
        right["agrees"] = channel_test(block, val, seed=seed)["gated"]
        with torch.no_grad():
            open_gates = float((block.excite(val.squeezed) > 0.5).double().mean())
        found[name] = {
            "right": {kind: values.double().cpu().numpy() for kind, values in right.items()},
            "open_gates": open_gates,
            "report": report.as_dict(),
            "cache_seconds": train.seconds,
        }
    return gated, found


def gate_shares(study: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What :func:`gate_study` found as shares, for a results file."""
    return {
        setting: {"open_gates": cell["open_gates"]}
        | {kind: float(values.mean()) for kind, values in cell["right"].items()}
        for setting, cell in study.items()
    }


def map_study(
    recipe: Recipe,
    measured: nn.Module,
    explained: nn.Module,
    indices: Sequence[int],
    others: Sequence[int],
    *,
    faithfulness: int,
    seed: int,
) -> Scores:
    """Score the readings of ``explained`` beside CAMs, integrated gradients and controls on ``measured``.

    They are one network, or the first is the second with gates. Faithfulness is that of ``measured``.
    """
    slow = ("Score-CAM", "Ablation-CAM", "Integrated gradients")
    return benchmark.run(
        measured,
        recipe.val,
        se_explainers(explained) | others_of(measured) | controls_of(measured, seed),
        indices,
        threshold_indices=others,
        faithfulness_images=faithfulness,
        metrics=("pointing", "energy", "iou", "ap", "deletion", "insertion"),
        limits=dict.fromkeys(slow, max(2, faithfulness // 2)),
    )
