"""Pretrained networks on photographs: their features, label-free gates, and maps against the truth.

A network runs over its images once. Gates, readings, CAMs and controls then need its last maps and its head
alone, :class:`studies.features.OnFeatures`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import NormalQuantile, attach_se, cache_features, channel_test, explain, fit_gates
from selib.explanation import Method
from selib.forward import attached
from selib.gates import GateReport
from selib.heatmap import normalize, resize, weighted_sum
from selib.se import Form
from studies import baselines, benchmark, channels
from studies.baselines import Explainer
from studies.data import ImageSet, available, enlarged, imagenet_sample, load, pets, tiny_wnids
from studies.explainers import COINCIDE, SAME_COUNT, random_channels_of
from studies.features import OnFeatures, head_of, kept_maps, pooled
from studies.metrics import bootstrap, paired
from studies.mosaics import Mosaics, mosaics
from studies.networks import pretrained
from studies.tables import signed, spec

TOP_GATE, ASKED, GATE = "SE top-gate (paper)", "SE top-gate, asked for the class", "SE gate"
CAM, CONTRAST = "influence = CAM = Grad-CAM = HiResCAM", "influence on the log-odds"
READINGS: dict[str, dict[str, Any]] = {
    GATE: {"method": "gate", "asked": False},
    TOP_GATE: {"method": "top-gate", "asked": False},
    ASKED: {"method": "top-gate"},
    CAM: {"method": "influence"},
    CONTRAST: {"method": "influence", "contrast": True},
    "gated influence": {"method": "gated-influence"},
}
MEAN = "mean of channels"
OF_GATES = (GATE, TOP_GATE, ASKED, "gated influence", SAME_COUNT)  # what other gates change


@dataclass(frozen=True)
class Photographs:
    """A pretrained network, the head for its classes, and what it saw.

    Attributes:
        unlabelled: (M, C) pooled features that gates are fitted on; ``labels`` (M,) are theirs, where known.
        held: (N, C) those of ``val``, which nothing is fitted on.
        truth: bool (N, H, W), where the objects of ``val`` are, at a resolution of its own.
    """

    name: str
    body: nn.Module
    head: OnFeatures
    unlabelled: Tensor
    held: Tensor
    val: ImageSet
    truth: Tensor | None = None
    labels: Tensor | None = None

    @property
    def right(self) -> Tensor:
        """Which images of ``val`` the network is right on: bool (N,)."""
        with torch.no_grad():
            return self.head(self.held[:, :, None, None]).argmax(1) == self.val.targets


def on_boxes(name: str, root: Path | None, work: Path, *, unlabelled: int, held: int) -> Photographs:
    """A pretrained network on Tiny-ImageNet's classes, with its own classifier; on the twin with a new one.

    The images have the size that the network was trained on; those of the twin 128 pixels.
    """
    tiny = available("tiny-imagenet", root)
    data = "tiny-imagenet" if tiny else "synth-objects"
    train, val = load(data, "train", root=root, limit=unlabelled), load(data, "val", root=root, limit=held)
    net = pretrained(name, tiny_wnids(root) if tiny else None)
    size = net.size if tiny else 128
    features = pooled(net.model, enlarged(train, size), work)
    head = head_of(net.model) if tiny else linear_head(features, train.targets, len(train.classes))
    shown = enlarged(val, size)
    known = pooled(net.model, shown, work)
    truth = val.truth(slice(None))
    return Photographs(name, net.model, head, features, known, shown, truth, train.targets)


def on_all_classes(name: str, root: Path | None, work: Path, tiny: Tensor) -> Photographs:
    """A pretrained network with its 1,000 classes on ImageNet's photographs: two in three unlabelled.

    Args:
        tiny: pooled features of Tiny-ImageNet's images, which follow the photographs as unlabelled ones.
    """
    net = pretrained(name)
    data = imagenet_sample(net.size, root)
    features = pooled(net.model, data, work)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    fit, held = order[: 2 * len(data) // 3], order[2 * len(data) // 3 :]
    unlabelled = torch.cat([features[fit], tiny])
    return Photographs(name, net.model, head_of(net.model), unlabelled, features[held], data.subset(held))


def on_pets(name: str, root: Path | None, work: Path) -> list[Photographs]:
    """A pretrained network with a linear layer for two breeds, learned on one half of the pets.

    Both ways round: every pet is explained by a head that has not seen it.
    """
    net = pretrained(name)
    data = pets(net.size, root)
    features = pooled(net.model, data, work)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    halves = order.chunk(2)
    found = []
    for learn, held in (halves, halves[::-1]):
        head = linear_head(features[learn], data.targets[learn], len(data.classes))
        shown = data.subset(held)
        truth = shown.truth(slice(None))[:, 1::2, 1::2]  # every other pixel: enough for maps of 7x7 cells
        found.append(Photographs(name, net.model, head, features[learn], features[held], shown, truth))
    return found


def linear_head(features: Tensor, targets: Tensor, classes: int, *, decay: float = 1e-3) -> OnFeatures:
    """A linear layer on pooled features (N, C), by logistic regression with weight decay (L-BFGS)."""
    head = OnFeatures(features.shape[1], classes)
    nn.init.zeros_(head.classifier.weight)
    nn.init.zeros_(head.classifier.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    x = features[:, :, None, None]

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(x), targets)
        value = value + decay * head.classifier.weight.square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    return head.eval().requires_grad_(False)


# ---- label-free gates ------------------------------------------------------------------------------------


def gates(
    head: OnFeatures, unlabelled: Tensor, held: Tensor, *, form: Form = "head", seed: int = 0, **options: Any
) -> tuple[OnFeatures, dict[str, float], GateReport]:
    """Label-free gates from pooled features (M, C): a gated copy of the head, and what it is worth on others.

    Args:
        held: (N, C), of images that had no part in it.
        form: of the block.
        options: of :func:`selib.fit_gates`.

    Returns:
        The copy, shares over ``held``, and the report of the fit.
    """
    gated = copy.deepcopy(head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        narrow = max(1, unlabelled.shape[1] // 256)
        block = attach_se(gated, unlabelled[:2, :, None, None], at="map", form=form, reduction=narrow)
    batches = unlabelled[:, :, None, None].split(512)
    report = fit_gates(gated, batches, seed=seed, progress=False, **options)
    cache = cache_features(gated, held[:, :, None, None].split(512))
    kinds = channel_test(block, cache, seed=seed)
    with torch.no_grad():
        s = block.excite(cache.squeezed)
    by_mean = channels.ablation(cache, s, fill="mean")
    shares = {
        "agreement": kinds["gated"],
        "open": s > 0.5,
        "only": kinds["original_only_top"],
        "without": kinds["original_without_top"],
        "only_mean": by_mean["only"],
        "without_mean": by_mean["without"],
        "only_another": kinds["another_only"],
        "without_another": kinds["another_without"],
        "only_random": kinds["random_only"],
        "without_random": kinds["random_without"],
        "rule_empty": NormalQuantile().selects_nothing(s),
    }
    return gated, {name: float(value.double().mean()) for name, value in shares.items()}, report


def whole(net: Photographs, gated: OnFeatures) -> nn.Module:
    """The network from image to logits, with the block of a gated head before its classifier."""
    model = copy.deepcopy(net.body)
    model.classifier = copy.deepcopy(gated.classifier)
    block = attach_se(model, net.val.batch([0]), form="head")
    block.load_state_dict(attached(gated)[""].state_dict())
    block.gain, block.transparent = attached(gated)[""].gain, True
    return model


# ---- maps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapSet:
    """The last maps of images in place of the images, for :func:`studies.benchmark.run`."""

    maps: Tensor  # (N, C, h, w), half precision
    targets: Tensor
    masks: Tensor  # bool (N, H, W)

    def batch(self, indices: Any) -> Tensor:
        return self.maps[indices].float()

    def truth(self, indices: Any) -> Tensor:
        return self.masks[indices]


def explained_images(networks: Sequence[Photographs], count: int, others: int) -> tuple[Tensor, Tensor]:
    """Images to explain, and others for thresholds: every network is right, and the object is not everything.

    Returns:
        Rows of ``val``, the same for all networks: at most ``count`` and ``others``.
    """
    truth = networks[0].truth
    assert truth is not None
    right = torch.stack([net.right for net in networks]).all(0)
    rows = (right & (truth.flatten(1).double().mean(1) < 0.5)).nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    others = min(others, len(rows) // 4)
    return rows[others : others + count].sort().values, rows[:others].sort().values


def map_set(net: Photographs, rows: Tensor, work: Path) -> MapSet:
    """The last maps of some images of ``val`` with their targets and truth."""
    assert net.truth is not None
    shown = net.val.subset(rows)
    return MapSet(kept_maps(net.body, shown, work), shown.targets, net.truth[rows])


def map_explainers(head: OnFeatures, size: Sequence[int], seed: int) -> dict[str, Explainer]:
    """Readings of a gated head, the CAM family and controls: last maps -> maps of the truth's size."""
    found: dict[str, Explainer] = {name: partial(reading, head, **how) for name, how in READINGS.items()}
    cams = baselines.cams(head, "map")
    left_out = (*COINCIDE, "Score-CAM", "Ablation-CAM")  # the first are influence, Score-CAM needs the images
    found |= {name: one for name, one in cams.items() if name not in left_out}
    found["Ablation-CAM"] = partial(ablation_cam, head)
    found[SAME_COUNT] = partial(random_channels_of, head)
    found[MEAN] = baselines.mean_of_channels(head, "map")
    found |= {"uniform noise": baselines.uniform_noise(seed), "centre prior": baselines.centre_prior}
    return {name: _at(size, one) for name, one in found.items()}


def reading(
    head: nn.Module,
    maps: Tensor,
    targets: Tensor,
    *,
    method: Method,
    asked: bool = True,
    contrast: bool = False,
) -> Tensor:
    """A reading of the SE vector, on last maps: for the targets, or as the network answers."""
    return explain(head, maps).heatmap(method, targets if asked else None, contrast=contrast)


def ablation_cam(head: nn.Module, maps: Tensor, targets: Tensor) -> Tensor:
    """Ablation-CAM without a pass for each channel: what the logit loses without it is its influence."""
    return weighted_sum(maps, explain(head, maps).influence(targets)).relu()


def _at(size: Sequence[int], explainer: Explainer) -> Explainer:
    return lambda maps, targets: normalize(resize(explainer(maps, targets), size))


def scores(
    head: OnFeatures, shown: MapSet, others: MapSet | None, *, seed: int, done: benchmark.Scores | None = None
) -> benchmark.Scores:
    """Every explainer on every image: AP, pointing, energy and, with other images for thresholds, IoU.

    Args:
        done: scores of the same head and images with other gates: what no gate decides is taken from there.
    """
    count, both = len(shown.maps), shown
    if others is not None:
        both = MapSet(
            torch.cat([shown.maps, others.maps]),
            torch.cat([shown.targets, others.targets]),
            torch.cat([shown.masks, others.masks]),
        )
    makers = map_explainers(head, both.masks.shape[1:], seed)
    if done is not None:
        makers = {name: makers[name] for name in OF_GATES}
    found = benchmark.run(
        head,
        both,
        makers,
        range(count),
        threshold_indices=range(count, len(both.maps)),
        metrics=("ap", "pointing", "energy", *(["iou"] if others is not None else [])),
    )
    if done is not None:
        found.values = done.values | found.values
    return found


def joined(parts: Sequence[benchmark.Scores]) -> benchmark.Scores:
    """Scores on parts of a set, each by a head of its own, as one."""
    offsets = np.cumsum([0, *(len(part.indices) for part in parts)])
    places = [part.indices + offset for part, offset in zip(parts, offsets, strict=False)]
    found = benchmark.Scores(np.concatenate(places))
    for name, row in parts[0].values.items():
        found.values[name] = {k: np.concatenate([part.values[name][k] for part in parts]) for k in row}
    return found


def grids(net: Photographs, count: int, work: Path, *, sure: float = 0.5) -> Mosaics:
    """Last maps of mosaics of four images that the network is right and sure about, and their classes."""
    with torch.no_grad():
        p = net.head(net.held[:, :, None, None]).softmax(1).amax(1)
    rows = (net.right & (p > sure)).nonzero().flatten()
    made = mosaics(net.val.images[rows], net.val.targets[rows], count)
    data = ImageSet(
        f"{net.val.name}-mosaics", net.val.split, made.images, made.targets[:, 0], net.val.classes
    )
    return Mosaics(kept_maps(net.body, data, work, batch_size=8).float(), made.targets)


# ---- tables -----------------------------------------------------------------------------------------------

FORMS = {"head": "through the classifier", "bottleneck": "ordinary block"}


def gate_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What :func:`gates` found: one row for each task, form and number of images."""
    pairs = {"": "only / without", "_mean": "by mean", "_another": "another image's", "_random": "random"}
    cells = []
    for row in rows:
        shares = [f"{100 * row[key]:.1f} %" for key in ("agreement", "open", "rule_empty")]
        both = [f"{row[f'only{end}']:.3f} / {row[f'without{end}']:.3f}" for end in pairs]
        cells.append([row["task"], FORMS[row["form"]], row["count"], *shares, *both])
    columns = "network | block | unlabelled images | agreement | gates open | rule selects nothing"
    return spec(
        "Label-free gates on held-out photographs, λ = 1",
        " | ".join([columns, *pairs.values()]),
        cells,
        "Agreement: of the network's predictions that stay when the gates act. Only / without: that stay in "
        "the network as it is with the top decile of channels alone, and without it; by mean: a removed "
        "channel keeps its mean over other images.",
    )


def grid_table(
    game: Mapping[str, Mapping[str, NDArray[np.float64]]], *, resamples: int = 2000
) -> dict[str, Any]:
    """Energy in the right quadrant: {network: {map: (M, 4)}}; intervals over mosaics."""
    rows: list[list[Any]] = []
    for network, found in game.items():
        for name, shares in found.items():
            gain = paired(shares.mean(1), found[CAM].mean(1), resamples=resamples)
            share = bootstrap(shares.mean(1), resamples=resamples)
            rows.append([network, name, list(share), None if name == CAM else list(gain), len(shares)])
    return spec(
        "The grid pointing game: energy of the map in the quadrant of the class that is asked for",
        "network | map | energy | against CAM, paired | mosaics",
        rows,
        "Chance 0.25. Every mosaic is asked for its four classes; intervals are over mosaics.",
    )


def findings(
    rows: Sequence[Mapping[str, Any]],
    game: Mapping[str, Mapping[str, NDArray[np.float64]]],
    *,
    resamples: int = 2000,
) -> list[str]:
    """What the tables of gates and of the grid pointing game say, in sentences."""
    most = max(row["count"] for row in rows)
    said = []
    for row in rows:
        if row["count"] in (most, min(r["count"] for r in rows)) and row["form"] == "head":
            said.append(
                f"{row['task']}, gates through the classifier from {row['count']} unlabelled images: "
                f"agreement {row['agreement']:.1%}; the top decile alone keeps {row['only']:.1%} of the "
                f"predictions, {row['without']:.1%} are left without it (another image's: "
                f"{row['only_another']:.1%} and {row['without_another']:.1%})."
            )
    for network, found in game.items():
        gain = paired(found[CONTRAST].mean(1), found[CAM].mean(1), resamples=resamples)
        said.append(
            f"{network}, grid pointing game: influence on the log-odds {found[CONTRAST].mean():.3f}, CAM "
            f"{found[CAM].mean():.3f}, a gain of {signed(gain)} (n = {len(found[CAM])} mosaics)."
        )
    return said
