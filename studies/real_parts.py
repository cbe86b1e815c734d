"""What networks miss when a part of a real face is blurred out by its hand-made mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from selib.pixels import normalize
from studies import metrics
from studies.baselines import Explainer
from studies.data import FaceSet
from studies.metrics import bootstrap
from studies.real_faces import PIXELS, logits_of
from studies.tables import spec

Agreement = Mapping[str, NDArray[np.float64]]  # of :func:`agreement`


def without_part(images: Tensor, mask: Tensor) -> Tensor:
    """uint8 (n, 3, H, W) with the pixels of masks bool (n, H, W), and one around, blurred out."""
    wide = metrics.dilate(mask, (1, 1))[:, None]
    outside = (~wide).float()
    blurred = metrics.blur(images.float() * outside, 6.0, 15) / metrics.blur(
        outside.expand(-1, 3, -1, -1), 6.0, 15
    ).clamp_min(1e-3)
    return torch.where(wide, blurred.round().clamp(0, 255), images.float()).to(torch.uint8)


def part_falls(
    faces: FaceSet, rows: Tensor, target: int, model: nn.Module, explainer: Explainer
) -> dict[str, NDArray[np.float64]]:
    """By part (n,) each: ``fall`` of the logit when it is blurred out, ``energy`` of the map on it over its
    area, NaN where the part is not visible. The keys are "part/fall", "part/energy" and "part/area".
    """
    images = faces.images[rows]
    targets = torch.full((len(rows),), target)
    maps = explainer(normalize(images), targets)
    before = logits_of(model, images)[:, target]
    assert faces.parts is not None
    found: dict[str, NDArray[np.float64]] = {}
    for number, part in enumerate(faces.part_names, 1):
        mask = faces.parts[rows] == number
        seen = mask.flatten(1).sum(1) >= PIXELS
        fall, energy, area = (np.full(len(rows), np.nan) for _ in range(3))
        if seen.any():
            changed = without_part(images[seen], mask[seen])
            fall[seen] = (before[seen] - logits_of(model, changed)[:, target]).numpy()
            inside = metrics.energy_in_mask(maps[seen], mask[seen])
            area[seen] = mask[seen].flatten(1).double().mean(1).numpy()
            energy[seen] = inside.numpy() / area[seen]
        found |= {f"{part}/fall": fall, f"{part}/energy": energy, f"{part}/area": area}
    return found


def agreement(
    faces: FaceSet,
    model: nn.Module,
    explainers: Mapping[str, Explainer],
    name: str,
    classes: Sequence[str],
    most: int,
) -> Agreement:
    """Does a map lie where the logit falls? Spearman's correlation, face by face, over the visible parts.

    Between a map's energy on a part and the fall of the logit when it is blurred out; and of the part's area
    as a control. On faces of which the network says yes.
    """
    target = classes.index(name)
    rows = _sample(logits_of(model, faces.images)[:, target] > 0, target, most)
    found: dict[str, NDArray[np.float64]] = {}
    for title, explainer in explainers.items():
        of_parts = part_falls(faces, rows, target, model, explainer)
        fall, energy, area = (
            np.stack([of_parts[f"{part}/{what}"] for part in faces.part_names], 1)
            for what in ("fall", "energy", "area")
        )
        found[title] = _correlations(fall, energy * area)
        found["area of the part"] = _correlations(fall, area)
    return found


def _correlations(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row of a and b (n, parts), over its parts that are visible; 0 where a row is constant."""
    values = []
    for x, y in zip(a, b, strict=True):
        there = ~np.isnan(x)
        value = spearmanr(x[there], y[there]).statistic if there.sum() >= 4 else np.nan
        values.append(float(value) if np.isfinite(value) else 0.0)
    return np.array(values)


def _sample(yes: Tensor, seed: int, most: int) -> Tensor:
    rows = yes.nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most]]


def agreement_table(
    found: Mapping[str, Mapping[str, NDArray[np.float64]]], *, resamples: int
) -> dict[str, Any]:
    """{attribute: :func:`agreement`} as a table of explainers by attributes."""
    rows: list[list[Any]] = []
    for name in next(iter(found.values())):
        rows.append([name, *(list(bootstrap(one[name], resamples=resamples)) for one in found.values())])
    rows.sort(key=lambda row: -np.mean([cell[0] for cell in row[1:]]))
    caption = "Does a map lie where the logit falls? Rank correlation over parts of a face, each blurred out"
    note = "95 % intervals over faces of which the network says yes."
    return spec(caption, " | ".join(["map", *found]), rows, note)


def audit_table(
    faces: FaceSet,
    model: nn.Module,
    explainer: Explainer,
    names: Sequence[str],
    classes: Sequence[str],
    *,
    most: int,
    resamples: int,
) -> tuple[dict[str, Any], dict[str, dict[str, tuple[float, float | None]]]]:
    """What carries an attribute of the whole face: energy over area, and the fall of the logit, by part."""
    said = logits_of(model, faces.images)
    rows: list[list[Any]] = []
    cells: dict[str, dict[str, tuple[float, float | None]]] = {}
    for name in names:
        target = classes.index(name)
        found = part_falls(faces, _sample(said[:, target] > 0, target, most), target, model, explainer)
        cells[name] = {}
        for part in faces.part_names:
            fall, energy = (found[f"{part}/{what}"] for what in ("fall", "energy"))
            there = ~np.isnan(fall)
            if there.sum() < 10:
                continue
            values = [bootstrap(one[there], resamples=resamples) for one in (energy, fall)]
            rows.append([name, part, *map(list, values), int(there.sum())])
            cells[name][part] = values[0].mean, values[1].mean
    caption = (
        "What three attributes rest on: energy of the influence map, and the fall when a part is blurred out"
    )
    columns = "attribute | part | energy over area | fall of the logit | faces"
    return spec(caption, columns, rows, "On faces of which the network says yes."), cells
