"""Many explainers × many measures over the images of a set, image by image so that comparisons are paired."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selib.forward import Task, check_task, evaluating, logits_of
from studies import metrics as m
from studies.baselines import Explainer

Batch = tuple[Tensor, Tensor, Tensor]  # images, targets, masks
Measure = Callable[[Tensor, Tensor], Tensor]
LOCALISATION: dict[str, Measure] = {
    "ap": m.average_precision,  # the primary one: it sees the order of the pixels alone
    "pointing": m.pointing_game,
    "energy": m.energy_in_mask,
}  # and "iou", which needs a threshold
FAITHFULNESS: dict[str, Callable[..., Tensor]] = {
    "deletion": m.deletion,
    "insertion": m.insertion,
    "road": m.road,
}
LOWER_IS_BETTER = frozenset({"deletion"})


class Images(Protocol):
    """What :func:`run` needs of a data set; :class:`studies.data.ImageSet` has it."""

    @property
    def targets(self) -> Tensor: ...
    def batch(self, indices: Any) -> Tensor: ...
    def truth(self, indices: Any) -> Tensor: ...


@dataclass
class Scores:
    """The measures of each explainer for each image; what was not measured is NaN.

    ``values[explainer][metric]`` is float64 (n,), in the order of ``indices`` (n,), the images' places in the
    set; ``seconds`` the explainer's time per image, without the measures.
    """

    indices: NDArray[np.int64]
    values: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def cell(self, explainer: str, metric: str) -> NDArray[np.float64]:
        """Values (n,) of one cell, NaN where not measured. ValueError for a name that is not in the table."""
        for name, known in ((explainer, self.values), (metric, self.values.get(explainer, {}))):
            if name not in known:
                raise ValueError(f"{name!r} was not measured; there are: {', '.join(known)}")
        return self.values[explainer][metric]

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """{explainer: {metric: {mean, low, high, n}}}; low and high are the bootstrap 95 % interval."""
        return {name: {k: _summary(v) for k, v in row.items()} for name, row in self.values.items()}


def _summary(values: NDArray[np.float64]) -> dict[str, float]:
    found = values[~np.isnan(values)]
    return m.bootstrap(found)._asdict() | {"n": len(found)}


def run(
    model: nn.Module,
    data: Images,
    explainers: Mapping[str, Explainer],
    indices: Sequence[int],
    *,
    metrics: Sequence[str],
    localisation: Mapping[str, Measure] = LOCALISATION,
    threshold_indices: Sequence[int] = (),
    faithfulness_images: int | None = None,
    limits: Mapping[str, int] | None = None,
    batch_size: int = 64,
    task: Task = "multiclass",
) -> Scores:
    """Score every explainer, for the targets of the set, on the images ``indices`` of it.

    Where only a part of the images is used, it is the head of one fixed shuffle: parts of different size
    overlap as far as they can, and indices sorted by class do not make them one-sided.

    Args:
        model: gives logits (B, K); it runs in evaluation mode on the device of its parameters.
        metrics: names from ``localisation``, ``FAITHFULNESS`` and "iou".
        localisation: measures (heatmaps (B, H, W), masks (B, H, W)) -> (B,) by name.
        threshold_indices: other images of the set, on which the threshold of "iou" is chosen.
        faithfulness_images: how many images the faithfulness measures get; None for all.
        limits: {explainer: how many images} for slow ones.
        task: ``"multilabel"`` where every output is a decision of its own.
    """
    check_task(task)
    limits, everything = limits or {}, len(indices)
    faithful = everything if faithfulness_images is None else faithfulness_images
    known = [*localisation, "iou", *FAITHFULNESS]
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"metrics={unknown} are unknown: choose from {', '.join(known)}")
    if min(everything, faithful, *limits.values()) < 2:
        raise ValueError("indices, limits and faithfulness_images must each leave two images for an interval")
    if ("iou" in metrics and not len(threshold_indices)) or set(threshold_indices) & set(indices):
        raise ValueError('"iou" needs threshold_indices=…, images that are not in indices, for its threshold')
    order = np.random.default_rng(0).permutation(everything)
    others = np.random.default_rng(0).permutation(np.asarray(threshold_indices, dtype=np.int64))
    masks = any(metric not in FAITHFULNESS for metric in metrics)
    scores = Scores(np.asarray(indices, dtype=np.int64))
    for name, explain in explainers.items():
        measures, size = dict(localisation), limits.get(name, everything)
        if "iou" in metrics:
            threshold = _threshold(explain, _batches(model, data, others[:size], batch_size, masks))
            measures["iou"] = partial(m.iou, threshold=threshold)
        places = order[:size]
        batches = _batches(model, data, scores.indices[places], batch_size, masks)
        found, seconds = _measure(model, explain, batches, metrics, measures, faithful, task)
        scores.values[name] = {metric: np.full(everything, np.nan) for metric in metrics}
        for metric, values in found.items():
            scores.values[name][metric][places[: len(values)]] = values
        scores.seconds[name] = seconds / len(places)
    return scores


def _batches(
    model: nn.Module, data: Images, rows: NDArray[np.int64], size: int, masks: bool
) -> Iterator[Batch]:
    device = next(model.parameters()).device
    for part in torch.from_numpy(rows).split(size):
        truth = data.truth(part).to(device) if masks else torch.empty(0)
        yield data.batch(part).to(device), data.targets[part].to(device), truth


def _threshold(explain: Explainer, batches: Iterator[Batch]) -> float:
    pairs = [(explain(images, targets), truth) for images, targets, truth in batches]
    return m.best_threshold(torch.cat([maps for maps, _ in pairs]), torch.cat([truth for _, truth in pairs]))


def _measure(
    model: nn.Module,
    explain: Explainer,
    batches: Iterator[Batch],
    metrics: Sequence[str],
    measures: Mapping[str, Measure],
    faithful: int,
    task: Task,
) -> tuple[dict[str, NDArray[np.float64]], float]:
    """Values of each metric, faithfulness of the first images only, and the explainer's seconds."""
    found: dict[str, list[Tensor]] = {metric: [] for metric in metrics}
    seconds, left = 0.0, faithful

    def predict(images: Tensor) -> Tensor:
        return logits_of(model(images))

    for images, targets, truth in batches:
        start = _now(images.device)
        maps = explain(images, targets)
        seconds += _now(images.device) - start
        for metric in metrics:
            if metric in measures:
                found[metric].append(measures[metric](maps, truth))
            elif left > 0:
                some = images[:left], maps[:left], targets[:left]
                with evaluating(model):
                    values = FAITHFULNESS[metric](predict, *some, task=task)
                found[metric].append(values)
        left -= len(images)
    return {metric: torch.cat(values).double().cpu().numpy() for metric, values in found.items()}, seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
