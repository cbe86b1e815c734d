"""The study of facial attributes: what networks look at when they name them, and whether that is true.

On CelebA, or on its rendered twin. What only a twin can answer (what becomes of the answer when a part is not there) is asked
of the twin alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import baselines, metrics
from selib.attach import attach_se, evaluating
from selib.baselines import Explainer
from selib.explanation import explain
from selib.gates import FeatureCache, GateReport, cache_features, channel_test, fit_gates
from selib.heatmap import resize
from selib.stats import Interval, bootstrap
from selib.train import accelerator, attribute_scores, predict
from studies import benchmark, tables
from studies.benchmark import Scores
from studies.data import FaceSet, available, landmark_region, load_faces, normalize, rendered
from studies.data.faces import WHERE
from studies.objects import CHANCE, Recipe, controls_of, last_map, others_of, se_explainers
from studies.profiles import Profile
from studies.twins.faces import ATTRACTIVE, NEUTRAL, PARTS, REGIONS

LOCALISED = tuple(REGIONS)
CAUSE, SHORTCUT = (
    "Eyeglasses",
    "Wearing_Hat",
)  # what the network is asked for, and what goes with it in the split "spurious"
RIVAL = "Grad-CAM"


# ---- data and networks -----------------------------------------------------------------------------------------------------


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
    """The faces of a profile and how their networks are trained; what is reported is measured on the test split.

    Args:
        data: "celeba" or "synth-faces"; by default CelebA where ``root`` holds it, else the twin.
        attributes: train for these alone, from nothing: one of them is the binary study of the paper.
        split: of the training images; "spurious" is the twin's.
        architecture: any name that :func:`studies.networks.build` knows, trained from nothing ("resnet50", "mobilenet_v3_large" …); by
            default the small network, or on a GPU ResNet-18 in its form for small images where the profile says so.
    """
    name = data or ("celeba" if available("celeba", root) else "synth-faces")
    twin = name == "synth-faces"
    large = profile.face_gpu_epochs is not None and accelerator(device).device.type == "cuda"
    size = (112, 92) if large else (88, 72)  # the maps of both networks have cells of eight pixels
    lone = attributes is not None and twin  # of the real CelebA all there is, for one attribute as for forty
    # The clean split is loaded as the forty attributes have it, and cut: it is rendered once for both.
    most = profile.lone_train if lone and split == "spurious" else profile.face_train
    limits = (most, profile.face_test) if twin else (profile.celeba_limit, profile.celeba_limit)
    train, test = (
        load_faces(name, part, root=root, size=size, limit=limit)
        for part, limit in zip((split, "test"), limits, strict=True)
    )
    if attributes is not None:
        train, test = (pick(faces, attributes) for faces in (train, test))
    if lone:
        train = train.subset(slice(0, profile.lone_train))
    epochs = profile.face_gpu_epochs if large and profile.face_gpu_epochs else profile.face_epochs
    tag = "-".join(
        [
            name,
            *([] if attributes is None else [split, *attributes]),
            *([] if architecture is None else [architecture]),
        ]
    )
    return Recipe(
        tag,
        train,
        test,
        profile.lone_epochs if lone else epochs,
        architecture or ("resnet18_small_image" if large else "small_resnet"),
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
    """Sparse label-free gates on a copy of a network trained without SE: the gated copy, the report, the test split's features."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        example = item.train.batch([0]).to(next(model.parameters()).device)
        attach_se(model, example, reduction=4 if per_target else 1, per_target=per_target)
    train = cache_features(model, item.train.loader(500))
    test = cache_features(model, item.val.loader(500), gated=False)
    report = fit_gates(model, train, sparsity, task="multilabel", epochs=epochs, seed=seed)
    return model, report, test


# ---- how well the attributes are named -------------------------------------------------------------------------------------


def attribute_accuracy(
    item: Recipe, networks: Mapping[str, Sequence[nn.Module]]
) -> dict[str, list[dict[str, Tensor]]]:
    """For each form and seed what :func:`selib.train.attribute_scores` measures, and ``right`` (N, K), decision by decision."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for form, models in networks.items():
        for model in models:
            logits, targets = predict(model, item.val.loader(500))
            right = ((logits > 0) == (targets > 0)).double()
            found.setdefault(form, []).append({**attribute_scores(logits, targets), "right": right})
    return found


def accuracy_tables(
    item: Recipe, scores: Mapping[str, Sequence[Mapping[str, Tensor]]], *, resamples: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Interval]]:
    """Means over the attributes with the paired difference to the network without SE, every attribute by itself, and the differences."""
    rows: list[list[Any]] = []
    points = {}
    plain = scores["without"]
    for form, runs in scores.items():
        pairs = [
            (a["right"].mean(1).numpy(), b["right"].mean(1).numpy())
            for a, b in zip(runs, plain, strict=False)
        ]
        means = [
            float(torch.stack([r[k].nanmean() for r in runs]).mean())
            for k in ("accuracy", "balanced_accuracy", "ap")
        ]
        if form == "without":
            rows.append([form, *means, None, str(len(runs))])
            continue
        points[form] = Interval(*(100 * v for v in tables.difference(pairs, resamples=resamples)))
        rows.append([form, *means, list(points[form]), str(len(runs))])
    overall = {
        "caption": "Attributes with and without the SE block, means over all of them",
        "columns": [
            "network",
            "accuracy",
            "balanced accuracy",
            "AP",
            "accuracy against without, points, paired",
            "seeds",
        ],
        "rows": rows,
        "notes": [
            "Not harmed means: the interval lies above -0.5 points. It is over images, and over seeds where there are several."
        ],
    }
    forms = list(scores)
    single = [
        [
            name,
            float(item.val.targets[:, k].double().mean()),
            *(float(torch.stack([r["accuracy"][k] for r in scores[f]]).mean()) for f in forms),
            *(_or_none(torch.stack([r["ap"][k] for r in scores[f]]).mean()) for f in forms),
        ]
        for k, name in enumerate(item.val.classes)
    ]
    each = {
        "caption": "Every attribute",
        "columns": ["attribute", "share", *(f"accuracy {f}" for f in forms), *(f"AP {f}" for f in forms)],
        "rows": single,
    }
    return overall, each, points


def _or_none(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


# ---- where the maps lie ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Pairs of a face and an attribute that is there, that every network says is there, and that has a place."""

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
        truth = torch.zeros(len(rows), *self.faces.images.shape[-2:], dtype=torch.bool)
        for target in targets.unique().tolist():
            mine = targets == target
            truth[mine] = self.faces.region(self.faces.classes[target], rows[mine])
        return truth


def explained_pairs(
    item: Recipe, models: Sequence[nn.Module], per_attribute: int, *, pixels: int = 8
) -> Pairs:
    """Up to ``per_attribute`` faces for every attribute that has a place, drawn by a fixed seed from those that all models name.

    Faces where the attribute shows on fewer than ``pixels`` pixels, being hidden, are left out. Where fewer than four faces are left
    (networks hardly trained), it is not asked that the models name the attribute.
    """
    assert isinstance(item.val, FaceSet)
    named = torch.stack([predict(model, item.val.loader(500))[0] > 0 for model in models]).all(0)
    rows, targets = [], []
    for target, name in enumerate(item.val.classes):
        if name not in LOCALISED:
            continue
        there = (item.val.targets[:, target] > 0).nonzero().flatten()
        there = there[item.val.region(name, there).flatten(1).sum(1) >= pixels] if len(there) else there
        recognised = there[named[there, target]]
        chosen = recognised if len(recognised) >= 4 else there
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(target))
        chosen = chosen[order[:per_attribute]].sort().values
        rows.append(chosen)
        targets.append(torch.full_like(chosen, target))
    if not sum(map(len, rows)):
        raise ValueError(
            f"none of {', '.join(item.val.classes)} has a place in a face: choose an attribute that does"
        )
    return Pairs(item.val, torch.cat(rows), torch.cat(targets))


def explainers_of(model: nn.Module, measured: nn.Module, seed: int) -> dict[str, Explainer]:
    """The readings of ``model``'s SE vector, the CAM family on ``measured`` at the same layer, and the controls."""
    cams = {
        name: explainer for name, explainer in others_of(measured).items() if name != "Integrated gradients"
    }
    return (
        se_explainers(model)
        | cams
        | controls_of(measured, seed)
        | {CHANCE: lambda images, targets: torch.ones_like(images[:, 0])}
    )


def localise(model: nn.Module, measured: nn.Module, pairs: Pairs, *, slow: int, seed: int) -> Scores:
    """Score the maps of :func:`explainers_of` on the pairs; Score-CAM and Ablation-CAM, being slow, on ``slow`` of them."""
    probe = pairs.batch(torch.arange(1)).to(next(measured.parameters()).device)
    features, _ = baselines.features_of(measured, last_map(measured), probe)
    cell = (probe.shape[-2] // features.shape[-2], probe.shape[-1] // features.shape[-1])
    return benchmark.run(
        measured,
        pairs,
        explainers_of(model, measured, seed),
        range(len(pairs)),
        metrics=("near", "energy", "pointing", "ap"),
        localisation={
            "near": lambda maps, truth: metrics.energy_in_mask(maps, metrics.dilate(truth, cell)),
            **benchmark.LOCALISATION,
        },
        limits={name: min(slow, len(pairs)) for name in ("Score-CAM", "Ablation-CAM")},
        progress=False,
    )


def by_attribute(pairs: Pairs, scores: Sequence[Scores], explainers: Sequence[str]) -> dict[str, Any]:
    """For every attribute how much of each map's energy lies on its part, within one cell of it, and what chance would put there."""
    rows = []
    for target in pairs.targets.unique().tolist():
        mine = (pairs.targets == target).numpy()
        near = [
            float(np.mean([run.cell(name, "near")[mine].mean() for run in scores])) for name in explainers
        ]
        area = float(scores[0].cell(CHANCE, "energy")[mine].mean())
        on = float(np.mean([run.cell(explainers[0], "energy")[mine].mean() for run in scores]))
        rows.append([pairs.faces.classes[target], str(int(mine.sum())), area, on, on / area, *near])
    numbers = np.array([row[2:] for row in rows])
    mean = numbers.mean(0)
    mean[2] = mean[1] / mean[0]
    rows.append(["mean of attributes", str(len(pairs)), *mean.tolist()])
    return {
        "caption": "Energy of the maps on the part that carries the attribute",
        "columns": [
            "attribute",
            "faces",
            "area of the part",
            f"{explainers[0]}: on the part",
            "times chance",
            *(f"{name}: within one cell" for name in explainers),
        ],
        "rows": rows,
        "notes": ["Times chance: energy on the part, not grown, over the part's area."],
    }


# ---- what only a twin can answer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removals:
    """Faces of the twin as they are and drawn again, each without some of its parts, one at a time."""

    parts: dict[int, list[str]]  # by the face's row
    images: (
        Tensor  # uint8 (R + Σ P, 3, H, W): first all R faces, then what is drawn of the first, the second …
    )

    @classmethod
    def draw(cls, faces: FaceSet, parts: dict[int, list[str]]) -> Removals:
        """Draw the faces ``{row: parts}``, by one process a core."""
        assert faces.params is not None
        drawn = rendered(
            [(faces.params[row], (part,)) for row, names in parts.items() for part in names], faces.size
        )
        return cls(parts, torch.cat([faces.images[list(parts)], torch.from_numpy(drawn[:, :3])]))

    def falls(self, model: nn.Module) -> dict[int, Tensor]:
        """By how much each logit falls without each part: {row: float32 (P, K)}."""
        device = next(model.parameters()).device
        with evaluating(model), torch.no_grad():
            logits = torch.cat(
                [model(normalize(part).to(device)).float().cpu() for part in self.images.split(500)]
            )
        whole = logits[: len(self.parts)]
        without = logits[len(self.parts) :].split([len(names) for names in self.parts.values()])
        return {row: one - rest for row, one, rest in zip(self.parts, whole, without, strict=True)}


def zones(faces: FaceSet, row: int) -> dict[str, Tensor]:
    """The places of one face, bool (H, W) each: its visible parts on the twin, elsewhere the boxes round its landmarks."""
    if faces.params is not None and faces.parts is not None:
        return {part: faces.parts[row] == 1 + PARTS.index(part) for part in visible(faces, row)}
    assert faces.landmarks is not None
    example = {place: attribute for attribute, place in WHERE.items()}
    found = {
        place: landmark_region(name, faces.landmarks[row : row + 1], faces.size)[0]
        for place, name in example.items()
    }
    return {place: mask for place, mask in found.items() if mask.any()}


def visible(faces: FaceSet, row: int, *, pixels: int = 8) -> list[str]:
    """The parts of a face that can be removed and that show on at least ``pixels`` pixels."""
    assert faces.parts is not None
    counts = torch.bincount(faces.parts[row].flatten().long(), minlength=len(PARTS) + 1)
    return [part for part in NEUTRAL if counts[1 + PARTS.index(part)] >= pixels]


def part_deletion(
    model: nn.Module, pairs: Pairs, explainers: Mapping[str, Explainer], removals: Removals
) -> dict[str, NDArray[np.float64]]:
    """Does a map say what the network would miss? Spearman's correlation over the parts of a face, for each pair (n,).

    Between the energy that a map puts on a part and the fall of the attribute's logit when the face is drawn again without it. Besides
    the maps: "area of the part", as a control.

    Args:
        removals: of at least the pairs' faces.
    """
    faces, device = pairs.faces, next(model.parameters()).device
    assert faces.parts is not None
    everything = torch.arange(len(pairs))
    maps = {
        name: torch.cat(
            [
                make(pairs.batch(part).to(device), pairs.targets[part].to(device)).cpu()
                for part in everything.split(64)
            ]
        )
        for name, make in explainers.items()
    }
    found: dict[str, list[float]] = {name: [] for name in (*maps, "area of the part")}
    falls = removals.falls(model)
    for index, (row, target) in enumerate(zip(pairs.rows.tolist(), pairs.targets.tolist(), strict=True)):
        masks = torch.stack([faces.parts[row] == 1 + PARTS.index(part) for part in removals.parts[row]])
        energies = {name: (m[index] * masks).sum((1, 2)) for name, m in maps.items()}
        for name, energy in {**energies, "area of the part": masks.sum((1, 2))}.items():
            found[name].append(
                float(metrics.spearman(energy[None].double(), falls[row][None, :, target].double())[0])
            )
    return {name: np.array(values) for name, values in found.items()}


def signed_influence(model: nn.Module) -> Explainer:
    """The influence map as it is, (B, H, W) in units of the logit: evidence against the target counts as negative energy."""

    def maps(images: Tensor, targets: Tensor) -> Tensor:
        raw: Tensor = explain(model, images).map("influence", targets)
        return resize(raw, images.shape[2:])

    return maps


def correlation_table(
    runs: Mapping[str, Mapping[str, NDArray[np.float64]]], *, resamples: int
) -> dict[str, Any]:
    """Mean rank correlation of every map in each network, with its interval over pairs."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run))
    return {
        "caption": "Rank correlation, over the parts of a face, of a map's energy on a part with the fall of the logit without it",
        "columns": ["map", *runs],
        "rows": [
            [
                n,
                *(
                    list(bootstrap(run[n], resamples=resamples)) if n in run else None
                    for run in runs.values()
                ),
            ]
            for n in names
        ],
        "notes": [
            "Faces drawn again without the part, or with a mouth, nose, eyes, brows or skin that carry no attribute."
        ],
    }


def most_named(model: nn.Module, faces: FaceSet, names: Sequence[str], count: int) -> Tensor:
    """Of the first hundred faces those of which the model names most of these attributes: rows (count,), the first among equals."""
    columns = [faces.classes.index(name) for name in names]
    logits, _ = predict(model, faces.subset(slice(0, 100)).loader(100))
    return (logits[:, columns] > 0).sum(1).argsort(descending=True, stable=True)[:count]


def named(model: nn.Module, faces: FaceSet, row: int, names: Sequence[str]) -> list[str]:
    """Those of the attributes that the model names on a face; the first one where it names none."""
    logits, _ = predict(model, faces.subset([row]).loader(1))
    return [name for name in names if logits[0, faces.classes.index(name)] > 0] or list(names[:1])


def with_and_without(
    model: nn.Module, faces: FaceSet, names: Sequence[str]
) -> tuple[Tensor, Tensor, list[str]]:
    """The same person with an attribute and without it: a twin's face drawn again, or two pictures of one identity.

    Where nobody is pictured both with and without, another person stands in, and the title says so.

    Returns:
        images uint8 (2n, 3, H, W), with and without by turns; targets int64 (2n,); titles with the attribute's probability.
    """
    logits, _ = predict(model, faces.loader(500))
    images, targets, words = [], [], []
    for name in names:
        target = faces.classes.index(name)
        found = ((faces.targets[:, target] > 0) & (logits[:, target] > 0)).nonzero().flatten().tolist()
        if not found or bool((faces.targets[:, target] > 0).all()):
            continue
        tried = []
        for row in found:
            tried.append((row, *_other(faces, row, target)))
            if tried[-1][2] != STRANGER:
                break
        row, other, word = tried[-1] if tried[-1][2] != STRANGER else tried[0]
        images += [faces.images[row], other]
        targets += [target, target]
        words += ["with", word]
    if not images:
        raise ValueError(
            f"of no face the network says {' or '.join(names)}, or every face has it: name other attributes"
        )
    pictures = torch.stack(images)
    with evaluating(model), torch.no_grad():
        said = model(normalize(pictures).to(next(model.parameters()).device)).float().cpu().sigmoid()
    titles = [
        f"{word}\n{faces.classes[k]}\nsays {float(p[k]):.0%}"
        for word, k, p in zip(words, targets, said, strict=True)
    ]
    return pictures, torch.tensor(targets), titles


STRANGER = "another, without"


def _other(faces: FaceSet, row: int, target: int) -> tuple[Tensor, str]:
    """The person of a row without the attribute, uint8 (3, H, W), and how it was come by; else the person most alike in attributes."""
    if faces.params is not None:
        drawn = rendered([(faces.params[row], REGIONS[faces.classes[target]][:1])], faces.size)
        return torch.from_numpy(drawn[0, :3]), "drawn without"
    lacks = faces.targets[:, target] == 0
    if faces.identities is not None:
        same = ((faces.identities == faces.identities[row]) & lacks).nonzero().flatten()
        if len(same):
            return faces.images[int(same[0])], "without"
    unlike = (
        (faces.targets != faces.targets[row]).sum(1).where(lacks, torch.tensor(faces.targets.shape[1] + 1))
    )
    return faces.images[int(unlike.argmin())], STRANGER


def failures(model: nn.Module, faces: FaceSet, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """The surest wrong answers about attributes that have a place, one face each: rows (n,), targets (n,) and titles."""
    logits, targets = predict(model, faces.loader(500))
    wrong = ((logits > 0) != (targets > 0)) & torch.tensor([name in LOCALISED for name in faces.classes])
    sure = logits.abs().where(wrong, torch.zeros_like(logits))
    best, attribute = sure.max(1)
    rows = best.argsort(descending=True, stable=True)[:count]
    rows = rows[best[rows] > 0]
    said = logits.sigmoid()[rows, attribute[rows]]
    titles = [
        f"{faces.classes[int(k)]}\nsays {float(p):.0%}" for k, p in zip(attribute[rows], said, strict=True)
    ]
    return rows, attribute[rows], titles


def shortcut_study(
    networks: Mapping[str, nn.Module], faces: FaceSet, *, resamples: int, most: int = 200
) -> dict[str, Any]:
    """Is a planted shortcut found? Networks asked for glasses alone, trained where hats go with glasses ("spurious") and where not.

    Args:
        networks: {"clean": …, "spurious": …}, each with one output.
        faces: clean ones, with the attribute Eyeglasses alone.

    Returns:
        ``energy``: for each map and network the share of its energy on the hat (faces with both, n); ``factor`` of each map with its
        interval over faces; ``falls``: the logit's fall when the hat, or the glasses, are taken off; ``fooled``: how often a hat
        without glasses is called glasses.
    """
    assert faces.params is not None and faces.parts is not None
    hat, glasses = (torch.tensor([bool(p[name]) for p in faces.params]) for name in (SHORTCUT, CAUSE))
    both = (hat & glasses).nonzero().flatten()[:most]
    only_hat = (hat & ~glasses).nonzero().flatten()[:most]
    neither = (~hat & ~glasses).nonzero().flatten()[:most]
    on_hat = faces.parts[both] == 1 + PARTS.index("hat")
    energy: dict[str, dict[str, NDArray[np.float64]]] = {}
    falls: dict[str, dict[str, NDArray[np.float64]]] = {}
    fooled = {}
    removals = Removals.draw(faces, {row: ["hat", "glasses"] for row in both.tolist()})
    for name, model in networks.items():
        device = next(model.parameters()).device
        target = torch.zeros(len(both), dtype=torch.long, device=device)
        makers = {
            k: v
            for k, v in explainers_of(model, model, 0).items()
            if k in (*SHOWN, RIVAL, "mean of channels", CHANCE)
        }
        for maker, make in makers.items():
            maps = make(faces.batch(both).to(device), target).cpu()
            energy.setdefault(maker, {})[name] = metrics.energy_in_mask(maps, on_hat).numpy()
        fall = torch.stack(list(removals.falls(model).values()))[:, :, 0].double().numpy()
        falls[name] = {"hat": fall[:, 0], "glasses": fall[:, 1]}
        with torch.no_grad():
            fooled[name] = {
                "hat": float((model(faces.batch(only_hat).to(device)) > 0).double().mean()),
                "bare head": float((model(faces.batch(neither).to(device)) > 0).double().mean()),
            }
    factor = {maker: _ratio(runs["spurious"], runs["clean"], resamples) for maker, runs in energy.items()}
    return {
        "energy": energy,
        "factor": factor,
        "falls": falls,
        "fooled": fooled,
        "faces": len(both),
        "rows": both,
    }


SHOWN = ("SE top-gate (paper)", "SE influence")


def _ratio(a: NDArray[np.float64], b: NDArray[np.float64], resamples: int, least: float = 1e-3) -> Interval:
    """mean(a) / mean(b) with its bootstrap interval, a and b (n,) drawn together; a mean of b below ``least`` counts as that."""
    drawn = np.random.default_rng(0).integers(len(a), size=(resamples, len(a)))
    low, high = np.quantile(a[drawn].mean(1) / b[drawn].mean(1).clip(least), [0.025, 0.975])
    return Interval(float(a.mean() / max(b.mean(), least)), float(low), float(high))


def shortcut_table(study: Mapping[str, Any], *, resamples: int) -> dict[str, Any]:
    """The shortcut, map by map: energy on the hat in the clean and in the spurious network, and how much it rises."""
    rows = [
        [
            maker,
            *(list(bootstrap(runs[name], resamples=resamples)) for name in ("clean", "spurious")),
            list(study["factor"][maker]),
        ]
        for maker, runs in study["energy"].items()
    ]
    for part in ("hat", "glasses"):
        falls = [study["falls"][name][part] for name in ("clean", "spurious")]
        rows.append(
            [
                f"truth: fall of the logit without the {part}",
                *(list(bootstrap(f, resamples=resamples)) for f in falls),
                None,
            ]
        )
    return {
        "caption": "Eyeglasses: energy on the hat, in a network trained where hats go with glasses (ρ = 0.9) and in one trained where they do not",
        "columns": ["map", "clean", "spurious", "factor"],
        "rows": rows,
        "notes": [
            f"{study['faces']} test faces with both; one network each, trained for Eyeglasses alone, with SE."
        ],
    }


def audit(
    model: nn.Module, faces: FaceSet, attributes: Sequence[str], *, most: int, resamples: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What attributes of the whole face rest on: the energy of the influence map on each part, over the part's area, and the fall of
    the logit without the part (twin only), over faces of which the network says that they have the attribute.

    Returns:
        The table, and {attribute: {part: (times chance, fall)}}.
    """
    device = next(model.parameters()).device
    logits, _ = predict(model, faces.loader(500))
    rows, found = [], {}
    for name in [name for name in attributes if name in faces.classes]:
        target = faces.classes.index(name)
        chosen = ((logits[:, target] > 0) & (faces.targets[:, target] > 0)).nonzero().flatten()[:most]
        if not len(chosen):
            continue
        maps = explain(model, faces.batch(chosen).to(device)).heatmap("influence", target).cpu()
        falls: dict[str, list[float]] = {}
        energy: dict[str, list[float]] = {}
        area: dict[str, list[float]] = {}
        places = {row: zones(faces, row) for row in chosen.tolist()}
        drawn = {row: list(masks) for row, masks in places.items()} if faces.params is not None else {}
        lost = Removals.draw(faces, drawn).falls(model) if drawn else {}
        for place, (row, masks) in enumerate(places.items()):
            total = float(maps[place].sum()) or 1.0
            for index, (part, mask) in enumerate(masks.items()):
                energy.setdefault(part, []).append(float(maps[place][mask].sum()) / total)
                area.setdefault(part, []).append(float(mask.double().mean()))
                if row in lost:
                    falls.setdefault(part, []).append(float(lost[row][index, target]))
        found[name] = {
            part: (
                float(np.mean(energy[part]) / np.mean(area[part])),
                float(np.mean(falls[part])) if part in falls else None,
            )
            for part in energy
            if len(energy[part]) >= min(5, len(chosen))
        }
        for part, (times, _) in sorted(found[name].items(), key=lambda item: -item[1][0]):
            interval = (
                list(bootstrap(falls[part], resamples=resamples)) if len(falls.get(part, [])) > 1 else None
            )
            rows.append([name, part, str(len(energy[part])), float(np.mean(energy[part])), times, interval])
    table = {
        "caption": "What attributes of the whole face rest on",
        "columns": [
            "attribute",
            "part",
            "faces",
            "energy of influence on it",
            "times its area",
            "fall of the logit without it",
        ],
        "rows": rows,
        "notes": [f"On the twin, Attractive is a planted rule: more than 1 point of {ATTRACTIVE}."]
        if faces.synthetic
        else [],
    }
    return table, found


def gate_worth(
    item: Recipe, gated: Mapping[str, tuple[nn.Module, GateReport, FeatureCache]], *, seed: int
) -> dict[str, Any]:
    """Sufficient and necessary? The share of the original's yes that only the top decile of channels keeps, and that is left without it."""
    rows = []
    for name, (model, report, test) in gated.items():
        yes = test.logits > 0
        kinds = channel_test(model.selib_se, test, task="multilabel", seed=seed)  # type: ignore[arg-type]
        kept = {kind: float(right[yes].double().mean()) for kind, right in kinds.items()}
        names = ("gated", "original_only_top", "original_without_top", "random_only", "random_without")
        rows.append(
            [name, report.sparsity, report.open_gates, report.agreement, *(kept[kind] for kind in names)]
        )
    return {
        "caption": "Label-free gates: the share of the original network's decisions that they keep",
        "columns": [
            "gates",
            "λ",
            "gates open",
            "all decisions",
            "gated: each yes",
            "original, only the top decile",
            "original, without it",
            "random decile: only",
            "random decile: without",
        ],
        "rows": rows,
        "notes": [
            "From the fifth column on: of the decisions that an attribute is there. All on test images, against the network's own decisions, no labels."
        ],
    }
