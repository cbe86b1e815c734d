"""Measures of a heatmap: does it lie on the object, does the network rely on what it shows, is it chance?

Localisation takes heatmaps (B, H, W), finite and ≥ 0, and masks bool (B, H, W), True on the object.
Faithfulness takes ``predict``, any callable from images (B, C, H, W) to logits (B, K). Both give one value
per image, (B,), whatever else is in the batch. Intervals are 95 % intervals over such values, by bootstrap,
or over training runs, by Student's t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from selib.forward import Task, check_task
from selib.scores import last_of_run, ranked_precision

Predict = Callable[[Tensor], Tensor]
BATCH = 256  # images that go through the model at a time, about

# ---- localisation ----------


def _flat(heatmaps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Check a pair and flatten it: heatmaps float64 (B, N), masks bool (B, N)."""
    if heatmaps.ndim != 3 or heatmaps.shape != masks.shape:
        raise ValueError(
            f"heatmaps and masks must both be (B, H, W), got {tuple(heatmaps.shape)} and {tuple(masks.shape)}"
        )
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be bool, not {masks.dtype}: compare them with a threshold first")
    if not heatmaps.isfinite().all() or (heatmaps < 0).any():
        raise ValueError("heatmaps must be finite and ≥ 0: pass them through selib.heatmap.normalize first")
    empty = (~masks.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"masks {empty[:5]} of this batch are empty: leave images without an object out")
    return heatmaps.flatten(1).double(), masks.to(heatmaps.device).flatten(1)


def dilate(masks: Tensor, margin: tuple[int, int]) -> Tensor:
    """Masks bool (B, H, W) grown by (rows, columns) pixels on every side.

    A map cannot be sharper than its cells: grown by one, a mask holds all that the map can have meant by it.
    """
    if masks.dtype != torch.bool or masks.ndim != 3:
        raise TypeError(f"dilate takes bool masks (B, H, W), not {masks.dtype} {tuple(masks.shape)}")
    rows, columns = margin
    # Down, then across: a tenth of the work of both at once.
    grown = F.max_pool2d(masks[:, None].float(), (2 * rows + 1, 1), 1, (rows, 0))
    grown = F.max_pool2d(grown, (1, 2 * columns + 1), 1, (0, columns))
    return grown[:, 0] > 0


def pointing_game(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Whether the largest value lies inside the mask (Zhang et al., 2018), in [0, 1].

    Where several pixels share the maximum: the fraction of them that lies inside.
    """
    h, m = _flat(heatmaps, masks)
    top = h == h.amax(1, keepdim=True)
    return (top & m).sum(1) / top.sum(1)


def energy_in_mask(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Relevance mass accuracy (Arras et al., 2022): Σ_{p in mask} h[p] / Σ_p h[p], 0 for a zero map."""
    h, m = _flat(heatmaps, masks)
    total = h.sum(1)
    return (h * m).sum(1) / total.where(total > 0, torch.ones_like(total))


def iou(heatmaps: Tensor, masks: Tensor, threshold: float) -> Tensor:
    """|{h ≥ threshold} ∩ mask| / |{h ≥ threshold} ∪ mask|, in [0, 1]."""
    return _overlap(*_flat(heatmaps, masks), threshold)


def _overlap(h: Tensor, m: Tensor, threshold: float) -> Tensor:
    hot = h >= threshold
    return (hot & m).sum(1).double() / (hot | m).sum(1)


def best_threshold(heatmaps: Tensor, masks: Tensor) -> float:
    """The threshold among 1/40, 2/40, … 39/40 with the largest mean IoU; the smallest one among equals.

    Choose it on a validation split: chosen on the images that are scored, it would flatter the map.
    """
    h, m = _flat(heatmaps, masks)
    grid = [step / 40 for step in range(1, 40)]
    means = [float(_overlap(h, m, threshold).mean()) for threshold in grid]
    return grid[means.index(max(means))]


def average_precision(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Average precision of the pixels as detections, ranked by the map, in (0, 1]; see `ranked_precision`.

    A constant map gets the mask's share of the image.
    """
    return ranked_precision(*_flat(heatmaps, masks))


def frame_average_precision(scores: Tensor, labels: Tensor) -> float:
    """The mAP of AVA-ActiveSpeaker and WASD over all frames: Σ_n (R_n - R_{n-1}) max_{m ≥ n} P_m, in (0, 1].

    As ActivityNet's get_ava_active_speaker_performance, but frames of equal score count as one step; there
    they go in the order of the file. Scores are finite, in any unit, labels 0 or 1, of the same shape.
    """
    if scores.shape != labels.shape:
        raise ValueError(
            f"scores and labels must have one shape, got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if not scores.isfinite().all():
        raise ValueError("scores must be finite: the model gave NaN or infinity")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be 0 or 1, 1 for speaking and audible")
    if not labels.any():
        raise ValueError("no frame is labelled 1: average precision is not defined")
    values, order = scores.flatten().sort(descending=True)
    steps = last_of_run(values).nonzero().flatten()
    hits = labels.flatten()[order].double().cumsum(0)[steps]
    precision = (hits / (steps + 1)).flip(0).cummax(0).values.flip(0)
    return float((hits.diff(prepend=hits.new_zeros(1)) * precision).sum() / hits[-1])


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of a and b (B, ...), in [-1, 1]; 0 for a constant row."""
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"spearman compares (B, ...) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    pairs = zip(a.flatten(1), b.flatten(1), strict=True)
    found = [torch.corrcoef(torch.stack([_mean_ranks(x), _mean_ranks(y)]))[0, 1] for x, y in pairs]
    return torch.stack(found).nan_to_num(0)


def _mean_ranks(x: Tensor) -> Tensor:
    """Ranks of values (N,), those of equal values averaged: float64 (N,)."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[place]


# ---- faithfulness ----------


def _confidence(predict: Predict, images: Tensor, targets: Tensor, task: Task) -> Tensor:
    """The target's probability, float32 (B,): softmax of classes, sigmoid of decisions of their own."""
    check_task(task)
    with torch.no_grad():
        logits = predict(images).float()
    probabilities = logits.sigmoid() if task == "multilabel" else logits.softmax(1)
    return probabilities.gather(1, targets.to(images.device)[:, None])[:, 0]


def _ranks(heatmaps: Tensor, images: Tensor) -> Tensor:
    """The rank of each pixel in its map, 0 the highest, equal ones in reading order: (B, H, W)."""
    if heatmaps.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"heatmaps {tuple(heatmaps.shape)} do not fit images {tuple(images.shape)}: resize them"
        )
    order = heatmaps.to(images.device).flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(1).view_as(heatmaps)


def perturbation_curve(
    predict: Predict,
    start: Tensor,
    end: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    steps: int = 20,
    task: Task = "multiclass",
) -> tuple[Tensor, Tensor]:
    """The target's probability while ``start`` (B, C, H, W) turns into ``end``, the highest pixels first.

    Args:
        task: ``"multilabel"`` where every output is a decision of its own.

    Returns:
        the fraction of pixels exchanged (steps + 1,) from 0 to 1, and the probabilities (B, steps + 1).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    ranks, pixels = _ranks(heatmaps, start), heatmaps[0].numel()
    counts = torch.linspace(0, pixels, steps + 1, device=start.device).round().long()
    found = []
    for part in torch.arange(len(start), device=start.device).split(max(1, BATCH // (steps + 1))):
        exchanged = ranks[part, None] < counts[:, None, None]  # (images, steps + 1, H, W)
        mixed = torch.where(exchanged[:, :, None], end[part, None], start[part, None]).flatten(0, 1)
        asked = targets.to(part.device)[part].repeat_interleave(steps + 1)
        found.append(_confidence(predict, mixed, asked, task))
    return counts / pixels, torch.cat(found).view(len(start), steps + 1)


def deletion(
    predict: Predict,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    steps: int = 20,
    task: Task = "multiclass",
) -> Tensor:
    """Area under the target's probability while the highest pixels are deleted; in [0, 1], lower is better.

    RISE (Petsiuk et al., 2018). A deleted pixel takes the image's mean colour.
    """
    mean = images.mean((2, 3), keepdim=True).expand_as(images)
    fractions, curve = perturbation_curve(predict, images, mean, heatmaps, targets, steps, task)
    return torch.trapezoid(curve, fractions, dim=1)


def insertion(
    predict: Predict,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    steps: int = 20,
    task: Task = "multiclass",
) -> Tensor:
    """The same while the highest pixels are put into a blurred image; in [0, 1], higher is better.

    RISE (Petsiuk et al., 2018), with its Gaussian blur: σ = 5 pixels, cut off at ±5.
    """
    fractions, curve = perturbation_curve(predict, blur(images), images, heatmaps, targets, steps, task)
    return torch.trapezoid(curve, fractions, dim=1)


def blur(images: Tensor, sigma: float = 5.0, radius: int = 5) -> Tensor:
    """Gaussian blur of images (B, C, H, W); the border pixels are repeated outwards."""
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = (-0.5 * (offsets / sigma).square()).softmax(0).expand(images.shape[1], 1, 1, -1)
    x = F.pad(images, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, weights, groups=images.shape[1])
    return F.conv2d(x, weights.mT, groups=images.shape[1])


def road(
    predict: Predict, images: Tensor, heatmaps: Tensor, targets: Tensor, task: Task = "multiclass"
) -> Tensor:
    """Remove and debias (Rong et al., 2022): (P without the lowest pixels - P without the highest) / 2.

    In [-½, ½], higher is better; the mean over 20, 40, 60 and 80 % of the pixels removed. They are imputed
    (:func:`fill`), plus 0.01 × a normal field, the same for every image.
    """
    ranks, pixels = _ranks(heatmaps, images), heatmaps[0].numel()
    field = 0.01 * torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0)).to(images)
    total = torch.zeros(len(images), device=images.device)
    for fraction in (0.2, 0.4, 0.6, 0.8):
        count = round(fraction * pixels)
        for sign, removed in ((-1, ranks < count), (1, ranks >= pixels - count)):
            filled = torch.where(removed[:, None], fill(images, removed) + field, images)
            total += sign * _confidence(predict, filled, targets, task)
    return total / 8


def fill(images: Tensor, removed: Tensor) -> Tensor:
    """:func:`impute` at a quarter of the resolution where images are large: what it fills is smooth anyway.

    A block of 4 × 4 pixels has the mean of those that are left of it; where none is, it is imputed.
    """
    if min(images.shape[2:]) < 64:
        return impute(images, removed)
    left = (~removed)[:, None].to(images)
    share = F.avg_pool2d(left, 4, ceil_mode=True)
    small = F.avg_pool2d(images * left, 4, ceil_mode=True) / share.clamp_min(1e-6)
    small = impute(small, share[:, 0] == 0, tolerance=1e-3)
    return F.interpolate(small, images.shape[2:], mode="bilinear", align_corners=False)


def impute(images: Tensor, removed: Tensor, *, tolerance: float = 1e-5, iterations: int = 500) -> Tensor:
    """Fill the pixels ``removed`` (B, H, W) of images (B, C, H, W) with weighted means of their neighbours.

    ROAD, section 4.2: weight 1/6 for the four nearest, 1/12 for the diagonals. Conjugate gradients solve the
    symmetric positive system for the whole batch. An image with no pixel left becomes 0.
    """
    channels = images.shape[1]
    kernel = images.new_tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]]).div(12).expand(channels, 1, 3, 3)

    def spread(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, padding=1, groups=channels)

    hole = removed[:, None].to(images)
    degree = spread(torch.ones_like(images[:1]))  # below 1 at the border, where neighbours are missing
    x = torch.zeros_like(images)
    residual = hole * spread(images * (1 - hole))
    direction, size = residual, residual.square().sum((2, 3), keepdim=True)
    goal = tolerance**2 * size
    for _ in range(iterations):
        if (size <= goal).all():
            break
        image = hole * (degree * direction - spread(direction))
        curvature = (direction * image).sum((2, 3), keepdim=True)
        step = size / curvature.where(curvature > 0, torch.inf)  # a solved channel stands still
        x, residual = x + step * direction, residual - step * image
        before, size = size, residual.square().sum((2, 3), keepdim=True)
        direction = residual + size / before.where(before > 0, torch.inf) * direction
    return images.where(hole == 0, x)


# ---- intervals and tests ----------


class Interval(NamedTuple):
    """A mean, or another statistic, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def percentile(
    value: float, draw: Callable[[np.random.Generator], float], *, resamples: int = 2000
) -> Interval:
    """Percentile bootstrap interval (Efron, 1979) of any statistic, from one seed.

    Args:
        value: the statistic of the data as they are.
        draw: the statistic of one resample.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(0)
    low, high = np.quantile([draw(rng) for _ in range(resamples)], [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def bootstrap(values: ArrayLike, *, resamples: int = 2000) -> Interval:
    """Interval of the mean of values (n,), or of several training runs on the same images, (runs, n).

    With runs, each resample draws runs, then images. Three runs are few: the bootstrap takes their spread for
    the whole spread, and where runs vary more than images a nominal 95 % interval covers about 75 %.

    Raises:
        ValueError: fewer than two images, or values that are not finite.
    """
    x = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if x.ndim != 2 or x.shape[1] < 2 or not np.isfinite(x).all():
        found = f"shape {x.shape}, {int(np.isfinite(x).sum())} of them finite"
        raise ValueError(f"an interval needs at least two finite values, (n,) or (runs, n), got {found}")
    runs, images = x.shape

    def draw(rng: np.random.Generator) -> float:
        drawn = x[rng.integers(runs, size=runs)].mean(0)
        return float(drawn[rng.integers(images, size=images)].mean())

    return percentile(x.mean(), draw, resamples=resamples)


def paired(a: ArrayLike, b: ArrayLike, *, resamples: int = 2000) -> Interval:
    """Interval of mean(a - b), a and b measured on the same images, (n,) or (runs, n): see `bootstrap`."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"paired values are of one shape, got {x.shape} and {y.shape}")
    return bootstrap(x - y, resamples=resamples)


def t_interval(values: ArrayLike) -> Interval:
    """Student's t interval of the mean of values (n,), one per training run.

    Few runs need it: their spread is itself uncertain, which the bootstrap does not see.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"a t interval needs at least two finite values (n,), got {x}")
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def non_inferiority(interval: Interval, margin: float) -> str:
    """What the interval of a gain says about a loss as large as ``margin``, which was fixed beforehand.

    "non-inferior": such a loss is excluded. "harmed": there is a loss, and it may be that large. Else
    "undecided".
    """
    if margin <= 0:
        raise ValueError(f"margin={margin} must be positive: the largest loss that does not matter")
    if interval.low > -margin:
        return "non-inferior"
    return "harmed" if interval.high < 0 else "undecided"


def p_value(a: ArrayLike, b: ArrayLike, *, resamples: int = 9999) -> float:
    """Two-sided p-value of mean(a - b) by sign flips (Fisher, 1935); runs (runs, n) are averaged first.

    Not the t-test: differences of heatmap scores are skewed and full of ties, sometimes all equal. Exact
    where the 2ⁿ flips are fewer than ``resamples``, else drawn from one seed, at least 1 / resamples.
    """
    x, y = (np.atleast_2d(np.asarray(side, dtype=np.float64)).mean(0) for side in (a, b))
    if x.shape != y.shape or len(x) < 2 or not np.isfinite(x - y).all():
        raise ValueError(f"a paired test needs at least two finite pairs, got {x.shape} and {y.shape}")
    flips = {"permutation_type": "samples", "n_resamples": resamples, "batch": 1000, "rng": 0}
    return float(stats.permutation_test((x - y,), np.mean, vectorized=True, **flips).pvalue)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's (1979) step-down adjusted p-values (n,): the k-th smallest times n - k + 1, never falling."""
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values are numbers (n,) in [0, 1], got {p}")
    order = p.argsort(kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted
