"""The study of facial attributes: data, networks, how well they name them, and where their maps lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selib import FeatureCache, GateReport, cache_features, fit_gates, predict
from selib.forward import evaluating
from selib.pixels import normalize
from studies import baselines, benchmark, metrics
from studies.baselines import Explainer
from studies.benchmark import Scores
from studies.data import FaceSet, available, load_faces
from studies.explainers import CHANCE, controls_of, last_map, others_of, se_explainers
from studies.profiles import Profile
from studies.recipes import Recipe
from studies.training import on_gpu, with_new_gates
from studies.twins.faces import REGIONS

LOCALISED = tuple(REGIONS)
PIXELS = 8  # on fewer a part does not count as visible

# ---- data and networks -------------------------------------------------------------------------------------


def faces_of(
    profile: Profile,
    root: str | Path | None = None,
    *,
    data: str | None = None,
    attributes: Sequence[str] | None = None,
    split: str = "train",
    architecture: str | None = None,
    device: str = "auto",
) -> Recipe:
    """The faces of a profile and how their networks are trained; all is reported on the test split.

    Args:
        data: "celeba" or "synth-faces"; by default CelebA where ``root`` holds it, else the twin.
        attributes: train for these alone, from nothing: one of them is the binary study of the paper.
        split: of the training images; "spurious" is the twin's.
        architecture: a name that :func:`studies.networks.build` knows, trained from nothing; by default the
            small network, or on a GPU ResNet-18 for small images where the profile says so.
    """
    name = data or ("celeba" if available("celeba", root) else "synth-faces")
    twin = name == "synth-faces"
    gpu_epochs = profile.face_gpu_epochs if on_gpu(device) else None
    size = (112, 92) if gpu_epochs else (88, 72)  # the maps of both networks have cells of eight pixels
    lone = attributes is not None and twin  # of CelebA all there is, for one attribute as for forty
    limits = (profile.celeba_limit, profile.celeba_limit)
    if twin:
        # The clean split is loaded as the forty attributes have it, and cut: it is rendered once for both.
        most = profile.lone_train if lone and split == "spurious" else profile.face_train
        limits = (most, profile.face_test)
    train = load_faces(name, split, root=root, size=size, limit=limits[0])
    test = load_faces(name, "test", root=root, size=size, limit=limits[1])
    if attributes is not None:
        train, test = pick(train, attributes), pick(test, attributes)
    if lone:
        train = train.subset(slice(0, profile.lone_train))
    special = [] if attributes is None else [split, *attributes]
    return Recipe(
        "-".join([name, *special, *([architecture] if architecture else [])]),
        train,
        test,
        profile.lone_epochs if lone else gpu_epochs or profile.face_epochs,
        architecture or ("resnet18_small_image" if gpu_epochs else "small_resnet"),
        from_shipped=profile.face_from_shipped and attributes is None and architecture is None,
    )


def pick(faces: FaceSet, attributes: Sequence[str]) -> FaceSet:
    """The same faces with these attributes only. ValueError for a name that CelebA does not have."""
    if unknown := [name for name in attributes if name not in faces.classes]:
        raise ValueError(f"attributes={unknown} are unknown: there are {', '.join(faces.classes)}")
    columns = [faces.classes.index(name) for name in attributes]
    return replace(faces, targets=faces.targets[:, columns], classes=list(attributes))


def gates_for(
    item: Recipe, model: nn.Module, *, per_target: bool, sparsity: float, epochs: int | None, seed: int
) -> tuple[nn.Module, GateReport, FeatureCache]:
    """Label-free gates on a copy of a network trained without SE: the copy, the report, the test features."""
    options = {"reduction": 4 if per_target else 1, "per_target": per_target}
    gated = with_new_gates(model, item.train.batch([0]), seed=seed, **options)
    train = cache_features(gated, item.train.loader(500))
    test = cache_features(gated, item.val.loader(500))
    report = fit_gates(gated, train, sparsity, task="multilabel", epochs=epochs, seed=seed)
    return gated, report, test


# ---- how well the attributes are named ---------------------------------------------------------------------


# ---- where the maps lie ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of a face and an attribute that is there, that every network names, and that has a place."""

    faces: FaceSet
    rows: Tensor  # int64 (n,), the faces
    targets: Tensor  # int64 (n,), the attributes

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Any) -> Tensor:
        """Float32 normalised images (B, 3, H, W)."""
        return self.faces.batch(self.rows[indices])

    def truth(self, indices: Any) -> Tensor:
        """Where the attribute is to be seen, bool (B, H, W)."""
        rows, targets = self.rows[indices], self.targets[indices]
        truth = torch.zeros(len(rows), *self.faces.size, dtype=torch.bool)
        for target in targets.unique().tolist():
            mine = targets == target
            truth[mine] = self.faces.region(self.faces.classes[target], rows[mine])
        return truth


def explained_pairs(item: Recipe, models: Sequence[nn.Module], per_attribute: int) -> Pairs:
    """Up to ``per_attribute`` faces for every attribute that has a place, from those that all models name.

    Faces that hide the part are left out. Where fewer than four remain (networks hardly trained), the models
    need not name the attribute.
    """
    faces = item.val
    assert isinstance(faces, FaceSet)
    named = torch.stack([predict(model, faces.loader(500))[0] > 0 for model in models]).all(0)
    rows, targets = [], []
    for target, name in enumerate(faces.classes):
        there = (faces.targets[:, target] > 0).nonzero().flatten()
        if name not in LOCALISED or not len(there):
            continue
        there = there[faces.region(name, there).flatten(1).sum(1) >= PIXELS]
        recognised = there[named[there, target]]
        chosen = recognised if len(recognised) >= 4 else there
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(target))
        rows.append(chosen[order[:per_attribute]].sort().values)
        targets.append(torch.full_like(rows[-1], target))
    if not sum(map(len, rows)):
        raise ValueError(
            f"none of {', '.join(faces.classes)} has a place in a face: choose an attribute that does"
        )
    return Pairs(faces, torch.cat(rows), torch.cat(targets))


def explainers_of(model: nn.Module, measured: nn.Module, seed: int) -> dict[str, Explainer]:
    """The readings of ``model``'s SE vector, and CAMs and controls on ``measured`` at the same layer."""
    found = se_explainers(model) | others_of(measured) | controls_of(measured, seed)
    del found["Integrated gradients"]
    return {**found, CHANCE: lambda images, targets: torch.ones_like(images[:, 0])}


def localise(model: nn.Module, measured: nn.Module, pairs: Pairs, *, slow: int, seed: int) -> Scores:
    """Score the maps of ``explainers_of`` on the pairs, Score-CAM and Ablation-CAM on ``slow`` of them."""
    probe = pairs.batch(torch.arange(1)).to(next(measured.parameters()).device)
    features, _ = baselines.features_of(measured, last_map(measured), probe)
    cell = (probe.shape[-2] // features.shape[-2], probe.shape[-1] // features.shape[-1])

    def near(maps: Tensor, truth: Tensor) -> Tensor:
        return metrics.energy_in_mask(maps, metrics.dilate(truth, cell))

    return benchmark.run(
        measured,
        pairs,
        explainers_of(model, measured, seed),
        range(len(pairs)),
        metrics=("near", "energy", "pointing", "ap"),
        localisation={"near": near, **benchmark.LOCALISATION},
        limits=dict.fromkeys(("Score-CAM", "Ablation-CAM"), min(slow, len(pairs))),
    )


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, K) of images uint8 (N, 3, H, W), on the CPU."""
    place = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        found = [model(normalize(part).to(place)).float().cpu() for part in images.split(500)]
    return torch.cat(found)


# ---- faces to look at --------------------------------------------------------------------------------------


def failures(model: nn.Module, faces: FaceSet, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """The surest wrong answers about attributes with a place, one a face: rows and targets (n,), titles."""
    logits, targets = predict(model, faces.loader(500))
    wrong = ((logits > 0) != (targets > 0)) & torch.tensor([name in LOCALISED for name in faces.classes])
    best, attribute = logits.abs().where(wrong, torch.zeros_like(logits)).max(1)
    rows = best.argsort(descending=True, stable=True)[:count]
    rows = rows[best[rows] > 0]
    about = attribute[rows]
    said = logits.sigmoid()[rows, about].tolist()
    titles = [f"{faces.classes[k]}\nsays {p:.0%}" for k, p in zip(about.tolist(), said, strict=True)]
    return rows, about, titles
