"""The study's own training runs on object images: which data, which network, how long. Notebooks share them by checkpoint."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import baselines
from selib.attach import attach_se, attached
from selib.baselines import Explainer, generator_of
from selib.explanation import Method, explain
from selib.gates import cache_features, channel_test, fit_gates
from selib.heatmap import normalize, resize
from selib.select import Select, TopFraction
from selib.train import Task, accelerator, fit, load_weights, predict, save_checkpoint
from studies import benchmark
from studies.benchmark import Scores
from studies.data import ImageSet, available, load, load_faces
from studies.networks import SHIPPED, build
from studies.profiles import Profile, base


@dataclass(frozen=True)
class Recipe:
    """One data set of a profile and how its networks are trained."""

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
    def multilabel(self) -> bool:
        """Whether an image has many answers, each yes or no, and not one."""
        return self.train.multilabel

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.train.size


def recipes(
    profile: Profile, root: str | Path | None = None, *, names: tuple[str, ...] | None = None
) -> list[Recipe]:
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


def network(recipe: Recipe, *, se: bool, seed: int, per_target: bool = False) -> nn.Module:
    """The network before training; all forms start from the same weights at the same seed.

    On a twin they start from the shipped network, which has seen such images: a minute on two cores is too short to learn them from
    nothing. The block starts in its published form, F' = s·F with s near ½: what was trained before has to settle again.
    """
    torch.manual_seed(seed)
    model = build(recipe.architecture, len(recipe.train.classes), image_size=recipe.image_size)
    if recipe.shipped:
        load_weights(model, recipe.shipped)
    if se:
        attach_se(model, recipe.train.batch([0]), start="paper", per_target=per_target)
    return model


def make_shipped(name: str, path: Path | None = None) -> None:
    """Train a network that comes with the package, from nothing, on rendered images: some minutes on two cores.

    "synth-objects": 14 passes over 4,000 images; "synth-faces": 20 over 8,000 faces of another seed than the study's.
    """
    faces = name == "synth-faces"
    root = base() / "runs" / "shipped"  # no set lies there: images are rendered
    train: ImageSet
    val: ImageSet
    if faces:
        train, val = (
            load_faces(name, split, root=root, limit=n, seed=1)
            for split, n in (("train", 8000), ("val", 1000))
        )
    else:
        train, val = (load(name, split, root=root) for split in ("train", "val"))
    torch.manual_seed(0)
    model = build("small_resnet", len(train.classes), image_size=train.size)
    task: Task = "multilabel" if faces else "multiclass"
    history = fit(
        model,
        train.loader(64, train=True),
        val.loader(500),
        epochs=20 if faces else 14,
        optimizer="adamw",
        lr=4e-3 if faces else None,
        task=task,
        progress=False,
    )
    print(history[-1])
    save_checkpoint(
        model,
        path or SHIPPED[name],
        architecture="small_resnet",
        classes=train.classes,
        image_size=train.size,
        task=task,
    )


def checkpoints(profile: Profile) -> Path:
    """Where the notebooks of a profile leave their trained networks for each other: SELIB_CHECKPOINTS, else ``runs/<profile>/checkpoints``."""
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
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train the network of a recipe, or load it when another notebook has trained it into the folder ``out``.

    With ``se`` the block is trained with the rest; with ``per_target`` too there is one block for each target. Returns the model in evaluation mode and the
    history of :func:`selib.train.fit`.
    """
    model = network(recipe, se=se, seed=seed, per_target=per_target)
    form = ("se-per-target" if per_target else "se") if se else "plain"
    folder = out / f"{recipe.name}-{form}-seed{seed}"
    adaptive = recipe.train.synthetic or recipe.multilabel
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = accelerator(device).device.type == "cuda"
    with FileLock(
        folder / ".lock"
    ):  # a notebook that runs beside this one waits for the network instead of training it too
        history = fit(
            model,
            recipe.train.loader(512 if on_gpu else 64, train=True, seed=seed),
            None
            if recipe.multilabel
            else recipe.val.loader(500),  # of faces that is the test split: not looked at meanwhile
            epochs=recipe.epochs,
            optimizer="adamw" if adaptive else "sgd",
            lr=2e-3 if adaptive else 0.4 if on_gpu else 0.2,
            task="multilabel" if recipe.multilabel else "multiclass",
            seed=seed,
            device=device,
            out=folder,
            progress=progress,
        )
    return model.eval(), history


def describe(recipe: Recipe) -> str:
    """Data, network and training in a line, for captions."""
    answers = "attributes" if recipe.multilabel else "classes"
    data = f"{recipe.name}{' (synthetic)' if recipe.train.synthetic else ''}, {len(recipe.train.classes)} {answers}"
    start = " from the shipped weights" if recipe.shipped else ""
    held = "validation" if recipe.val.split == "val" else recipe.val.split
    images = f"{len(recipe.train)} training and {len(recipe.val)} {held} images"
    return f"{data}, {images}, {recipe.architecture}, {recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''}{start}"


def correct(recipe: Recipe, model: nn.Module) -> NDArray[np.float64]:
    """Which validation images the model classifies correctly: (N,) of 0 and 1."""
    logits, targets = predict(model, recipe.val.loader(500))
    return (logits.argmax(1) == targets).double().numpy()


# ---- what is compared ----------------------------------------------------------------------------------------------------

OURS = ("SE top-gate (paper)", "SE gate", "SE influence", "SE influence, top 10 %")
SAME_COUNT = "as many random channels"
CHANCE = "area (knows nothing)"


def se_explainers(model: nn.Module) -> dict[str, Explainer]:
    """The readings of a model's SE vector, and the mean of random channels, for each image as many as "top-gate" selects there."""

    def reading(method: Method, select: Select | None = None) -> Explainer:
        def heatmaps(images: Tensor, targets: Tensor) -> Tensor:
            maps: Tensor = explain(model, images).heatmap(method, targets, select=select)
            return maps

        return heatmaps

    def random(images: Tensor, targets: Tensor) -> Tensor:
        ex = explain(model, images)
        counts = ex.selected("top-gate", targets).sum(1)
        channels = ex.features.shape[1]
        orders = torch.stack([torch.rand(channels, generator=generator_of(0, image)) for image in images])
        chosen = orders.argsort(1).argsort(1) < counts[:, None].cpu()
        maps = ex.features.relu().mul(chosen.to(ex.features)[:, :, None, None]).sum(1)
        return normalize(resize(maps, images.shape[2:]))

    readings = (
        reading("top-gate"),
        reading("gate"),
        reading("influence"),
        reading("influence", TopFraction(0.10)),
    )
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
        right &= torch.from_numpy(correct(recipe, model)) > 0
    eligible = (right if int(right.sum()) >= 20 else small).nonzero().flatten()
    shuffled = eligible[torch.randperm(len(eligible), generator=torch.Generator().manual_seed(0))].tolist()
    cut = min(count, len(shuffled) // 2)
    return sorted(shuffled[:cut]), sorted(shuffled[cut : 2 * cut])


GATES: dict[str, dict[str, float]] = {
    "promise 95 %": {"agreement": 0.95},
    "λ = 0.1": {"sparsity": 0.1},
    "λ = 1": {"sparsity": 1.0},
}


def gate_study(
    recipe: Recipe, model: nn.Module, *, epochs: int | None, seed: int
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """Label-free gates for a network trained without SE, in several settings, and what their channels are worth.

    Returns:
        A gated copy of the model (the last setting, λ = 1), and per setting: ``right``, which validation images stay right, by the kinds of
        :func:`selib.channel_test`, "agrees" and "influence_…" (float arrays of 0 and 1); ``open_gates``, the report and its seconds.
    """
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        block = attach_se(model, recipe.train.batch([0]).to(next(model.parameters()).device), reduction=1)
    train = cache_features(model, recipe.train.loader(500))
    val = cache_features(model, recipe.val.loader(500), gated=False)
    by_influence = {}
    if val.head.linear is not None:  # in the original network, so the same whatever the gates become
        ranked = channel_test(block, val, targets=val.targets, ranking=val.influence(), seed=seed)
        by_influence = {f"influence_{end}": ranked[f"original_{end}_top"] for end in ("only", "without")}
    found = {}
    for name, setting in GATES.items():
        report = fit_gates(model, train, epochs=epochs, seed=seed, **setting)  # type: ignore[arg-type]
        right = channel_test(block, val, targets=val.targets, seed=seed)
        right["agrees"] = channel_test(block, val, seed=seed)["gated"]
        right |= by_influence
        with torch.no_grad():
            share = float((block.excite(val.squeezed) > 0.5).double().mean())
        arrays = {kind: values.double().cpu().numpy() for kind, values in right.items()}
        found[name] = {
            "right": arrays,
            "open_gates": share,
            "report": report.as_dict(),
            "cache_seconds": train.seconds,
        }
    return model, found


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
    """Score the maps of ``explained``'s SE vector beside the CAM family, integrated gradients and the controls on ``measured``.

    The two are one network, or the second is the first with gates: deletion and insertion are always measured on ``measured``.
    """
    return benchmark.run(
        measured,
        recipe.val,
        se_explainers(explained) | others_of(measured) | controls_of(measured, seed),
        indices,
        threshold_indices=others,
        faithfulness_images=faithfulness,
        metrics=("pointing", "energy", "iou", "ap", "deletion", "insertion"),
        limits={
            name: max(2, faithfulness // 2) for name in ("Score-CAM", "Ablation-CAM", "Integrated gradients")
        },
        progress=False,
    )


def last_map(model: nn.Module) -> str:
    """The module that gives the feature map before any gates: what CAMs are asked to look at."""
    if attached(model):
        return "selib_se.features"
    return next(name for name in ("stages", "layer4", "features") if hasattr(model, name))


def classifier(model: nn.Module) -> nn.Linear:
    """The linear layer that reads the averaged map."""
    head = model.get_submodule("classifier" if hasattr(model, "classifier") else "fc")
    return next(layer for layer in head.modules() if isinstance(layer, nn.Linear))


def others_of(model: nn.Module) -> dict[str, Explainer]:
    """The CAM family and integrated gradients on a model."""
    return baselines.cams(model, last_map(model)) | {
        "Integrated gradients": baselines.integrated_gradients(model)
    }


def controls_of(model: nn.Module, seed: int) -> dict[str, Explainer]:
    """The controls on a model, with a decile of its channels drawn at random."""
    count = TopFraction(0.10).count(classifier(model).in_features)
    return baselines.controls(model, last_map(model), count=count, seed=seed)
