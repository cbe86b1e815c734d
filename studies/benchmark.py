"""Many explainers × many measures over the images of a set, kept image by image so that every comparison is paired."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from selib import metrics as m
from selib.attach import evaluating, logits_of
from selib.baselines import Explainer
from selib.stats import Interval, bootstrap, paired

LOCALISATION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointing": m.pointing_game,
    "energy": m.energy_in_mask,
    "rank": m.relevance_rank_accuracy,
    "ap": m.average_precision,
}  # and "iou", which needs a threshold
FAITHFULNESS: dict[str, Callable[..., Tensor]] = {
    "deletion": m.deletion,
    "insertion": m.insertion,
    "drop": m.average_drop,
    "increase": m.increase,
    "road": m.road,
}
LOWER_IS_BETTER = frozenset({"deletion", "drop"})
DEFAULT = ("pointing", "energy", "rank", "iou", "ap", "deletion", "insertion", "drop", "increase")


class Images(Protocol):
    """What :func:`run` needs of a data set; :class:`studies.data.ImageSet` has it."""

    @property
    def targets(self) -> Tensor: ...
    def batch(self, indices: Any) -> Tensor: ...
    def truth(self, indices: Any) -> Tensor: ...


@dataclass
class Scores:
    """The measures of each explainer for each image; what was not measured is NaN.

    ``values[explainer][metric]`` is float64 (n,), in the order of ``indices`` (n,), the images' places in the set.
    ``thresholds`` are those of "iou", ``seconds`` the explainer's time per image, without the measures.
    """

    indices: NDArray[np.int64]
    values: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def cell(self, explainer: str, metric: str) -> NDArray[np.float64]:
        """Values (n,) of one cell, NaN where not measured. ValueError for a name that is not in the table."""
        for name, known in ((explainer, self.values), (metric, self.values.get(explainer, {}))):
            if name not in known:
                raise ValueError(f"{name!r} was not measured; there are: {', '.join(known)}")
        return self.values[explainer][metric]

    def compare(self, a: str, b: str, metric: str) -> Interval:
        """Interval of mean(a - b), paired over the images that both explainers were measured on."""
        x, y = self.cell(a, metric), self.cell(b, metric)
        both = ~np.isnan(x) & ~np.isnan(y)
        return paired(x[both], y[both])

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """{explainer: {metric: {mean, low, high, n}}}, ready for JSON; low and high are the bootstrap 95 % interval."""

        def cell(values: NDArray[np.float64]) -> dict[str, float]:
            found = values[~np.isnan(values)]
            return bootstrap(found)._asdict() | {"n": len(found)}

        return {name: {metric: cell(v) for metric, v in row.items()} for name, row in self.values.items()}

    def table(self) -> list[dict[str, str]]:
        """One row of text per explainer: means, n where it is not all images, and milliseconds per image."""
        rows = []
        for explainer, cells in self.summary().items():
            row = {"explainer": explainer}
            for metric, cell in cells.items():
                note = "" if cell["n"] == len(self.indices) else f" (n={cell['n']})"
                row[f"{metric} {'↓' if metric in LOWER_IS_BETTER else '↑'}"] = f"{cell['mean']:.3f}{note}"
            rows.append(row | {"ms": f"{1000 * self.seconds[explainer]:.1f}"})
        return rows


def run(
    model: nn.Module,
    data: Images,
    explainers: Mapping[str, Explainer],
    indices: Sequence[int],
    *,
    metrics: Sequence[str] = DEFAULT,
    localisation: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = LOCALISATION,
    threshold_indices: Sequence[int] = (),
    faithfulness_images: int | None = None,
    limits: Mapping[str, int] | None = None,
    steps: int = 20,
    batch_size: int = 64,
    progress: bool = True,
) -> Scores:
    """Score every explainer, for the targets of the set, on the images ``indices`` of it.

    Where only a part of the images is used, it is the head of one fixed shuffle: parts of different size overlap as far
    as they can, and indices sorted by class do not make them one-sided.

    Args:
        model: gives logits (B, K); it runs in evaluation mode on the device of its parameters and is left as it was.
        data: images, targets and, for localisation, masks or boxes.
        explainers: by name; controls are explainers like any other.
        metrics: columns of the table: names from ``localisation``, ``FAITHFULNESS`` and "iou".
        localisation: measures (heatmaps (B, H, W), masks (B, H, W)) -> (B,) by name.
        threshold_indices: other images of the set, a validation split, on which the threshold of "iou" is chosen.
        faithfulness_images: how many images the faithfulness measures get; None for all.
        limits: {explainer: how many images} for slow ones.
        steps: of deletion and insertion; they cost steps + 1 forward passes each.

    Raises:
        ValueError: an unknown metric or explainer, fewer than two images, "iou" without images for its threshold.
    """
    limits = limits or {}
    device, everything = next(model.parameters()).device, len(indices)
    faithful = everything if faithfulness_images is None else faithfulness_images
    known = [*localisation, "iou", *FAITHFULNESS]
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"metrics={unknown} are unknown: choose from {', '.join(known)}")
    if unknown := [name for name in limits if name not in explainers]:
        raise ValueError(f"limits={unknown} name no explainer: there are {', '.join(explainers)}")
    if min(everything, faithful, *limits.values()) < 2:
        raise ValueError(
            "indices, limits and faithfulness_images must each leave two images: one gives no interval"
        )
    if "iou" in metrics and not len(threshold_indices):
        raise ValueError(
            '"iou" needs threshold_indices=…, validation images on which its threshold is chosen'
        )
    if shared := set(map(int, threshold_indices)) & set(map(int, indices)):
        raise ValueError(
            f"threshold_indices share {len(shared)} images with indices: choose them from a validation split"
        )
    localised = any(metric not in FAITHFULNESS for metric in metrics)
    scores = Scores(np.asarray(indices, dtype=np.int64))
    order = np.random.default_rng(0).permutation(everything)
    validation = np.random.default_rng(0).permutation(np.asarray(threshold_indices, dtype=np.int64))
    validation = validation if "iou" in metrics else validation[:0]
    sizes = {name: limits.get(name, everything) for name in explainers}

    def load(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.from_numpy(rows)
        truth = data.truth(places).to(device) if localised else torch.empty(0)
        return data.batch(places).to(device), data.targets[places].to(device), truth

    def predict(images: Tensor) -> Tensor:
        return logits_of(model(images))

    total = sum(min(size, everything) + min(size, len(validation)) for size in sizes.values())
    with tqdm(total=total, desc="benchmark", unit="image", disable=not progress) as bar:
        for name, explain in explainers.items():
            bar.set_postfix_str(name)
            pairs = []
            for part in _parts(validation[: sizes[name]], batch_size):
                images, targets, truth = load(part)
                pairs.append((explain(images, targets), truth))
                bar.update(len(part))
            if pairs:
                maps, truths = (torch.cat(side) for side in zip(*pairs, strict=True))
                scores.thresholds[name] = m.best_threshold(maps, truths)
            row = scores.values[name] = {metric: np.full(everything, np.nan) for metric in metrics}
            seconds, done = 0.0, 0
            for places in _parts(order[: sizes[name]], batch_size):
                images, targets, truth = load(scores.indices[places])
                start = _now(device)
                heatmaps = explain(images, targets)
                seconds += _now(device) - start
                k = max(
                    0, min(faithful - done, len(places))
                )  # images of this batch that the faithfulness measures get
                for metric in metrics:
                    if metric == "iou":
                        row[metric][places] = m.iou(heatmaps, truth, scores.thresholds[name]).cpu()
                    elif metric in localisation:
                        row[metric][places] = localisation[metric](heatmaps, truth).cpu()
                    elif k:
                        options = {"steps": steps} if metric in ("deletion", "insertion") else {}
                        with evaluating(model):
                            found = FAITHFULNESS[metric](
                                predict, images[:k], heatmaps[:k], targets[:k], **options
                            )
                        row[metric][places[:k]] = found.cpu()
                done += len(places)
                bar.update(len(places))
            scores.seconds[name] = seconds / done
    return scores


def _parts(indices: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
