"""Measures of a heatmap: does it lie on the object, and does the network rely on what it shows? One value per image.

Localisation takes heatmaps (B, H, W), finite and ≥ 0, and masks bool (B, H, W), True on the object, none of them empty.
Faithfulness takes ``predict``, any callable from images (B, C, H, W) to logits (B, K): a model in evaluation mode is
one. Heatmaps enter through their order only, except where a formula says otherwise. Every measure returns (B,), and the
value of one image does not depend on its batch mates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor], Tensor]

# ---- localisation ----------------------------------------------------------------------------------------------------


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

    A map cannot be sharper than its cells: grown by one cell, (H / h, W / w), a mask holds all that a map of (h, w) cells can
    have meant by it.
    """
    if masks.dtype != torch.bool or masks.ndim != 3:
        raise TypeError(f"dilate takes bool masks (B, H, W), not {masks.dtype} {tuple(masks.shape)}")
    rows, columns = margin
    grown = masks[:, None].float()
    for size in (
        (2 * rows + 1, 1),
        (1, 2 * columns + 1),
    ):  # first down, then across: a tenth of the work of both at once
        grown = F.max_pool2d(grown, size, 1, (size[0] // 2, size[1] // 2))
    return grown[:, 0] > 0


def pointing_game(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Whether the largest value lies inside the mask (Zhang et al., 2018), in [0, 1].

    Where several pixels share the maximum: the fraction of them that lies inside. A constant map gets the mask's share
    of the image.
    """
    h, m = _flat(heatmaps, masks)
    top = h == h.amax(1, keepdim=True)
    return (top & m).sum(1) / top.sum(1)


def energy_in_mask(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Σ_{p in mask} h[p] / Σ_p h[p], in [0, 1]: relevance mass accuracy (Arras et al., 2022). A zero map scores 0."""
    h, m = _flat(heatmaps, masks)
    total = h.sum(1)
    return (h * m).sum(1) / total.where(total > 0, torch.ones_like(total))


def relevance_rank_accuracy(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """|the K highest pixels ∩ mask| / K with K = |mask|, in [0, 1] (Arras et al., 2022).

    Pixels that tie at the K-th value count by the fraction of them inside: the average over random orders among them.
    """
    h, m = _flat(heatmaps, masks)
    k = m.sum(1)
    cut = h.sort(1, descending=True).values.gather(1, k[:, None] - 1)
    above, level = h > cut, h == cut
    share = (level & m).sum(1) / level.sum(1)
    return ((above & m).sum(1) + (k - above.sum(1)) * share) / k


def iou(heatmaps: Tensor, masks: Tensor, threshold: float) -> Tensor:
    """|{h ≥ threshold} ∩ mask| / |{h ≥ threshold} ∪ mask|, in [0, 1]; the threshold from :func:`best_threshold`."""
    h, m = _flat(heatmaps, masks)
    hot = h >= threshold
    return (hot & m).sum(1) / (hot | m).sum(1)


def best_threshold(heatmaps: Tensor, masks: Tensor) -> float:
    """The threshold among 1/40, 2/40, … 39/40 with the largest mean IoU; the smallest one among equals.

    Choose it once per method, on a validation split: chosen on the images that are scored, it would flatter the method.
    """
    h, m = _flat(heatmaps, masks)
    grid = torch.arange(1, 40, dtype=h.dtype, device=h.device) / 40
    # All thresholds in one pass: sort every pixel into the interval it falls in, then count from the top down.
    interval = torch.bucketize(h, grid, right=True)
    counts = torch.zeros(2, len(h), len(grid) + 1, dtype=h.dtype, device=h.device)
    hot, hit = counts.scatter_add_(2, interval.expand(2, -1, -1), torch.stack([torch.ones_like(h), m.to(h)]))
    hot, hit = (c.flip(1).cumsum(1).flip(1)[:, 1:] for c in (hot, hit))
    union = hot + m.sum(1, keepdim=True) - hit
    mean = (hit / union).mean(0)
    return float(grid[mean == mean.max()][0])


def average_precision(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """AP = Σ_n (R_n - R_{n-1}) P_n over the distinct values as thresholds, each pixel a detection; in (0, 1].

    Tied pixels share one threshold, so a constant map gets the mask's share of the image.
    """
    h, m = _flat(heatmaps, masks)
    values, order = h.sort(1, descending=True)
    hits = m.gather(1, order)
    precision = hits.cumsum(1) / torch.arange(1, h.shape[1] + 1, device=h.device)
    return (precision.gather(1, _ties(values)[1]) * hits).sum(1) / hits.sum(1)


def frame_average_precision(scores: Tensor, labels: Tensor) -> float:
    """Average precision over all labelled frames, in (0, 1]: the mAP that AVA-ActiveSpeaker and WASD report.

    As in ActivityNet's get_ava_active_speaker_performance: every frame is a detection, sorted by its score;

        AP = Σ_n (R_n - R_{n-1}) max_{m ≥ n} P_m

    with precision and recall over the first n detections, the precision made monotone from the right. Frames of equal score,
    which no threshold can separate, count as one step; the official script takes them in the order of its file, and is the
    same number where all scores differ. Scores in any unit, labels 0 or 1 (or bool), both of one shape.

    Raises ValueError for different shapes, scores that are not finite, labels other than 0 and 1, or none that is 1.
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
    hits = labels.flatten()[order].double().cumsum(0)
    last = F.pad(values[1:] != values[:-1], (0, 1), value=True)  # of each run of equal scores
    hits, seen = hits[last], torch.arange(1, len(values) + 1, device=hits.device)[last]
    precision = (hits / seen).flip(0).cummax(0).values.flip(0)
    return float((hits.diff(prepend=hits.new_zeros(1)) * precision).sum() / hits[-1])


def _ties(values: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position, in each sorted row (B, N), of the run of equal values that a position belongs to."""
    n = values.shape[1]
    position = torch.arange(n, device=values.device).expand_as(values)
    edge = values[:, 1:] != values[:, :-1]
    first = position.where(F.pad(edge, (1, 0), value=True), torch.zeros_like(position)).cummax(1).values
    last = position.where(F.pad(edge, (0, 1), value=True), torch.full_like(position, n - 1))
    return first, last.flip(1).cummin(1).values.flip(1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of a and b (B, ...), in [-1, 1].

    Ties share their mean rank. A constant row gives 0.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"spearman compares two tensors (B, ...) of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )

    def ranks(x: Tensor) -> Tensor:
        values, order = x.flatten(1).sort(1)
        first, last = _ties(values)
        rank = torch.empty_like(first, dtype=torch.float64).scatter_(1, order, (first + last).double() / 2)
        return rank - rank.mean(1, keepdim=True)

    ra, rb = ranks(a), ranks(b)
    norm = (ra.square().sum(1) * rb.square().sum(1)).sqrt()
    return ((ra * rb).sum(1) / norm.where(norm > 0, torch.ones_like(norm))).clamp(-1, 1)


# ---- faithfulness ----------------------------------------------------------------------------------------------------


def _confidence(predict: Predict, images: Tensor, targets: Tensor) -> Tensor:
    """The target's softmax probability, float32 (B,)."""
    with torch.no_grad():
        return predict(images).float().softmax(1).gather(1, targets.to(images.device)[:, None])[:, 0]


def _ranks(heatmaps: Tensor, images: Tensor) -> Tensor:
    """The place of each pixel in the order of the map, 0 the highest: (B, H, W). Equal pixels go in reading order."""
    if heatmaps.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"heatmaps {tuple(heatmaps.shape)} do not fit images {tuple(images.shape)}: resize them to the images' size"
        )
    order = heatmaps.to(images.device).flatten(1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(1).view_as(heatmaps)


def perturbation_curve(
    predict: Predict,
    start: Tensor,
    end: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    steps: int = 20,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """The target's probability while ``start`` (B, C, H, W) turns into ``end``, the highest pixels of the map first.

    ``steps`` equal portions; about ``batch_size`` mixtures go through the model at a time, those of an image together.

    Returns:
        the fraction of pixels exchanged (steps + 1,) from 0 to 1, and the probabilities (B, steps + 1).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    ranks, pixels = _ranks(heatmaps, start), heatmaps[0].numel()
    counts = torch.linspace(0, pixels, steps + 1, device=start.device).round().long()
    found = []
    for part in torch.arange(len(start), device=start.device).split(max(1, batch_size // (steps + 1))):
        exchanged = ranks[part, None] < counts[:, None, None]  # (images, steps + 1, H, W)
        mixed = torch.where(exchanged[:, :, None], end[part, None], start[part, None]).flatten(0, 1)
        found.append(_confidence(predict, mixed, targets.to(part.device)[part].repeat_interleave(steps + 1)))
    return counts / pixels, torch.cat(found).view(len(start), steps + 1)


def deletion(
    predict: Predict, images: Tensor, heatmaps: Tensor, targets: Tensor, *, steps: int = 20
) -> Tensor:
    """Area under the target's probability while pixels are deleted, the highest first; in [0, 1], lower is better.

    RISE (Petsiuk et al., 2018). A deleted pixel takes the image's own mean colour, the trapezoid rule gives the area.
    """
    mean = images.mean((2, 3), keepdim=True).expand_as(images)
    fractions, curve = perturbation_curve(predict, images, mean, heatmaps, targets, steps=steps)
    return torch.trapezoid(curve, fractions, dim=1)


def insertion(
    predict: Predict, images: Tensor, heatmaps: Tensor, targets: Tensor, *, steps: int = 20
) -> Tensor:
    """Area under the target's probability while pixels are inserted into a blurred image, the highest first; in [0, 1].

    Higher is better. RISE (Petsiuk et al., 2018), with its Gaussian blur: σ = 5 pixels, cut off at ±5.
    """
    fractions, curve = perturbation_curve(predict, blur(images), images, heatmaps, targets, steps=steps)
    return torch.trapezoid(curve, fractions, dim=1)


def blur(images: Tensor, *, sigma: float = 5.0, radius: int = 5) -> Tensor:
    """Gaussian blur of images (B, C, H, W); the border pixels are repeated outwards."""
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weights = (-0.5 * (offsets / sigma).square()).softmax(0)
    channels = images.shape[1]
    x = F.pad(images, (radius,) * 4, mode="replicate")
    x = F.conv2d(x, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _explained(predict: Predict, images: Tensor, heatmaps: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Y, the target's probability, and O, its probability when the image is multiplied by the heatmap."""
    shown = images * heatmaps.to(images)[:, None]
    return _confidence(predict, images, targets), _confidence(predict, shown, targets)


def average_drop(predict: Predict, images: Tensor, heatmaps: Tensor, targets: Tensor) -> Tensor:
    """max(0, Y - O) / Y, in [0, 1], lower is better (Grad-CAM++, Chattopadhay et al., 2018, section 4.1).

    Y is the target's probability for the image, O for the image times its heatmap in [0, 1]; 0 is the mean colour of
    normalised images.
    """
    full, shown = _explained(predict, images, heatmaps, targets)
    return (full - shown).relu() / full.clamp_min(torch.finfo(full.dtype).tiny)


def increase(predict: Predict, images: Tensor, heatmaps: Tensor, targets: Tensor) -> Tensor:
    """1 where O > Y, else 0, higher is better: increase in confidence (Grad-CAM++, section 4.1).

    Y and O as in :func:`average_drop`.
    """
    full, shown = _explained(predict, images, heatmaps, targets)
    return (shown > full).to(full.dtype)


def road(
    predict: Predict,
    images: Tensor,
    heatmaps: Tensor,
    targets: Tensor,
    *,
    fractions: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    noise: float = 0.01,
    seed: int = 0,
) -> Tensor:
    """Remove and debias (Rong et al., 2022): (P without the lowest pixels - P without the highest) / 2, in [-½, ½].

    Averaged over the ``fractions`` of pixels removed; higher is better. Removed pixels are imputed (:func:`impute`),
    plus ``noise`` × a standard normal field. The field comes from ``seed`` and is the same for every image, so that a
    value depends on nothing but its image.
    """
    ranks, pixels = _ranks(heatmaps, images), heatmaps[0].numel()
    field = noise * torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed)).to(images)
    total = torch.zeros(len(images), device=images.device)
    for fraction in fractions:
        count = round(fraction * pixels)
        for sign, removed in ((-1, ranks < count), (1, ranks >= pixels - count)):
            filled = torch.where(removed[:, None], impute(images, removed) + field, images)
            total += sign * _confidence(predict, filled, targets)
    return total / (2 * len(fractions))


def impute(images: Tensor, removed: Tensor, *, tolerance: float = 1e-5, iterations: int = 500) -> Tensor:
    """Fill the pixels ``removed`` (B, H, W) of images (B, C, H, W): each becomes the weighted mean of its neighbours.

    ROAD, section 4.2: weight 1/6 for the four nearest, 1/12 for the diagonals. The sparse linear system is symmetric
    and positive, so conjugate gradients solve it for the whole batch at once. An image with no pixel left becomes 0.
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
