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
from studies.faces import PIXELS, logits_of
from studies.metrics import bootstrap
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


def falls(faces: FaceSet, rows: Tensor, target: int, model: nn.Module) -> NDArray[np.float64]:
    """How far the target's logit falls when each part is blurred out: (n, parts), NaN where it is hidden."""
    images, parts = faces.images[rows], _parts(faces, rows)
    before = logits_of(model, images)[:, target]
    found = np.full((len(rows), len(faces.part_names)), np.nan)
    for column in range(found.shape[1]):
        seen = parts[:, column].flatten(1).sum(1) >= PIXELS
        if seen.any():
            changed = without_part(images[seen], parts[seen, column])
            found[seen, column] = (before[seen] - logits_of(model, changed)[:, target]).numpy()
    return found


def _parts(faces: FaceSet, rows: Tensor) -> Tensor:
    """Bool (n, parts, H, W)."""
    assert faces.parts is not None
    numbers = torch.arange(1, 1 + len(faces.part_names))[:, None, None]
    return faces.parts[rows][:, None] == numbers


def areas(faces: FaceSet, rows: Tensor) -> NDArray[np.float64]:
    """The share of the image that each part covers: (n, parts)."""
    return _parts(faces, rows).double().mean((2, 3)).numpy()


def energies(faces: FaceSet, rows: Tensor, target: int, explainer: Explainer) -> NDArray[np.float64]:
    """The share of a map's energy on each part: (n, parts)."""
    maps = explainer(normalize(faces.images[rows]), torch.full((len(rows),), target)).double()
    on = (maps[:, None] * _parts(faces, rows)).sum((2, 3))
    return (on / maps.sum((1, 2))[:, None].clamp_min(1e-12)).numpy()


def audited(
    faces: FaceSet, model: nn.Module, names: Sequence[str], classes: Sequence[str], most: int
) -> dict[str, tuple[Tensor, NDArray[np.float64]]]:
    """Of each attribute up to ``most`` faces of which the network says yes, and :func:`falls` on them."""
    said, found = logits_of(model, faces.images), {}
    for name in names:
        target = classes.index(name)
        yes = (said[:, target] > 0).nonzero().flatten()
        order = torch.randperm(len(yes), generator=torch.Generator().manual_seed(target))[:most]
        found[name] = yes[order], falls(faces, yes[order], target, model)
    return found


Audited = Mapping[str, tuple[Tensor, NDArray[np.float64]]]  # of :func:`audited`
Cells = dict[str, dict[str, tuple[float, float | None]]]  # for :func:`studies.figures.part_grid`


def audit_table(
    faces: FaceSet, found: Audited, explainer: Explainer, classes: Sequence[str], *, resamples: int
) -> tuple[dict[str, Any], Cells]:
    """What carries an attribute of the whole face: energy over area, and the fall of the logit, by part."""
    rows: list[list[Any]] = []
    cells: Cells = {}
    for name, (chosen, fall) in found.items():
        share, area = energies(faces, chosen, classes.index(name), explainer), areas(faces, chosen)
        cells[name] = {}
        for column, part in enumerate(faces.part_names):
            there = ~np.isnan(fall[:, column])
            if there.sum() < 10:
                continue
            over = share[there, column] / area[there, column]
            values = [bootstrap(one, resamples=resamples) for one in (over, fall[there, column])]
            rows.append([name, part, *map(list, values), int(there.sum())])
            cells[name][part] = values[0].mean, values[1].mean
    caption = "What they rest on: energy of the influence map over area, and the fall without the part"
    columns = "attribute | part | energy over area | fall of the logit | faces"
    return spec(caption, columns, rows, "On faces of which the network says yes."), cells


def agreement(
    faces: FaceSet, found: Audited, explainers: Mapping[str, Explainer], classes: Sequence[str]
) -> dict[str, Agreement]:
    """Does a map lie where the logit falls? Spearman's correlation, face by face, over the visible parts,
    between a map's energy on a part and the fall when it is blurred out; the part's area is a control.
    """
    agreed: dict[str, Agreement] = {}
    for name, (rows, fall) in found.items():
        shares = {t: energies(faces, rows, classes.index(name), one) for t, one in explainers.items()}
        shares["area of the part"] = areas(faces, rows)
        agreed[name] = {title: _correlations(fall, share) for title, share in shares.items()}
    return agreed


def _correlations(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row of a and b (n, parts), over its parts that are visible; 0 where a row is constant."""
    values = []
    for x, y in zip(a, b, strict=True):
        there = ~np.isnan(x)
        varies = there.sum() >= 4 and np.ptp(x[there]) > 0 and np.ptp(y[there]) > 0
        values.append(float(spearmanr(x[there], y[there]).statistic) if varies else 0.0)
    return np.array(values)


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
