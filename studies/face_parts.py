"""What becomes of an answer about a face when a part is not there: the twin can draw the face again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import explain, predict
from selib.heatmap import resize
from studies import metrics, tables
from studies.baselines import Explainer
from studies.data import FaceSet, landmark_region, rendered
from studies.data.regions import WHERE
from studies.explainers import SAME_AS_CAM
from studies.faces import PIXELS, Pairs, explainers_of, logits_of
from studies.metrics import bootstrap
from studies.twins.faces import ATTRACTIVE, NEUTRAL, PARTS, REGIONS

CAUSE, SHORTCUT = "Eyeglasses", "Wearing_Hat"  # what is asked for, and what goes with it in "spurious"
STRANGER = "another, without"
DELETED = (  # maps that are held against what the network misses
    "SE top-gate (paper)",
    "SE gate",
    "SE influence",
    "SE influence, top 10 %",
    SAME_AS_CAM,
    "Grad-CAM",  # of a head that is not pooling + linear
    "Grad-CAM++",
    "LayerCAM",
    "Eigen-CAM",
    "FEM",
    "mean of channels",
    "uniform noise",
    "centre prior",
)


@dataclass(frozen=True)
class Removals:
    """Faces of the twin as they are and drawn again, each without some of its parts, one at a time."""

    parts: dict[int, list[str]]  # by the face's row
    images: Tensor  # uint8 (R + Σ P, 3, H, W): all R faces, then what is drawn of the first, the second …

    @classmethod
    def draw(cls, faces: FaceSet, parts: dict[int, list[str]]) -> Removals:
        """Draw the faces ``{row: parts}``, by one process a core."""
        assert faces.params is not None
        removed = [(faces.params[row], (part,)) for row, names in parts.items() for part in names]
        drawn = torch.from_numpy(rendered(removed, faces.size)[:, :3])
        return cls(parts, torch.cat([faces.images[list(parts)], drawn]))

    def falls(self, model: nn.Module) -> dict[int, Tensor]:
        """By how much each logit falls without each part: {row: float32 (P, K)}."""
        logits = logits_of(model, self.images)
        whole = logits[: len(self.parts)]
        without = logits[len(self.parts) :].split([len(names) for names in self.parts.values()])
        return {row: one - rest for row, one, rest in zip(self.parts, whole, without, strict=True)}


def part_of(faces: FaceSet, rows: Any, part: str) -> Tensor:
    """Where a part shows on faces of the twin: bool, (H, W) for one row or (B, H, W)."""
    assert faces.parts is not None
    return faces.parts[rows] == 1 + PARTS.index(part)


def visible(faces: FaceSet, row: int) -> list[str]:
    """The parts of a face of the twin that can be removed and that show."""
    return [part for part in NEUTRAL if int(part_of(faces, row, part).sum()) >= PIXELS]


def zones(faces: FaceSet, row: int) -> dict[str, Tensor]:
    """The places of a face, bool (H, W): its visible parts on the twin, else boxes round its landmarks."""
    if faces.params is not None:
        return {part: part_of(faces, row, part) for part in visible(faces, row)}
    assert faces.landmarks is not None
    found = {}
    for attribute, place in WHERE.items():
        found[place] = landmark_region(attribute, faces.landmarks[row : row + 1], faces.size)[0]
    return {place: mask for place, mask in found.items() if mask.any()}


def part_deletion(
    model: nn.Module, pairs: Pairs, explainers: Mapping[str, Explainer], removals: Removals
) -> dict[str, NDArray[np.float64]]:
    """Does a map say what the network would miss? Spearman's correlation over the parts of a face, by pair.

    Between the energy that a map puts on a part and the fall of the attribute's logit when the face is drawn
    again without it. Returns (n,) for each map, and for the control "area of the part".
    """
    device = next(model.parameters()).device
    maps: dict[str, Tensor] = {}
    for name, make in explainers.items():
        parts = torch.arange(len(pairs)).split(64)
        made = [make(pairs.batch(part).to(device), pairs.targets[part].to(device)).cpu() for part in parts]
        maps[name] = torch.cat(made)
    maps["area of the part"] = torch.ones(len(pairs), *pairs.faces.size)
    found: dict[str, list[float]] = {name: [] for name in maps}
    falls = removals.falls(model)
    for index, (row, target) in enumerate(zip(pairs.rows.tolist(), pairs.targets.tolist(), strict=True)):
        masks = torch.stack([part_of(pairs.faces, row, part) for part in removals.parts[row]])
        fall = falls[row][None, :, target].double()
        for name, values in maps.items():
            energy = (values[index] * masks).sum((1, 2))
            found[name].append(float(metrics.spearman(energy[None].double(), fall)[0]))
    return {name: np.array(values) for name, values in found.items()}


def deletion_study(
    networks: Mapping[str, tuple[nn.Module, nn.Module]], pairs: Pairs, *, seed: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """:func:`part_deletion` for each network: {name: (explained, measured)}. The faces are drawn once."""
    parts = {row: visible(pairs.faces, row) for row in pairs.rows.unique().tolist()}
    removals = Removals.draw(pairs.faces, parts)
    found = {}
    for name, (model, measured) in networks.items():
        makers = explainers_of(model, measured, seed)
        chosen = {key: maker for key, maker in makers.items() if key in DELETED}
        chosen["SE influence, signed"] = signed_influence(model)
        found[name] = part_deletion(measured, pairs, chosen, removals)
    return found


def signed_influence(model: nn.Module) -> Explainer:
    """The influence map in units of the logit, (B, H, W): evidence against the target is negative energy."""
    return lambda images, targets: resize(explain(model, images).map("influence", targets), images.shape[2:])


def correlation_table(
    runs: Mapping[str, Mapping[str, NDArray[np.float64]]], *, resamples: int
) -> dict[str, Any]:
    """Mean rank correlation of every map in each network, with its interval over pairs."""
    rows = []
    for name in dict.fromkeys(name for run in runs.values() for name in run):
        known = [run.get(name) for run in runs.values()]
        rows.append([name, *(v if v is None else list(bootstrap(v, resamples=resamples)) for v in known)])
    table = tables.spec(
        "Rank correlation, over the parts of a face, of a map's energy on a part with the fall of the logit "
        "without it",
        " | ".join(["map", *runs]),
        rows,
        "Faces drawn again without the part, or with a mouth, nose, eyes, brows or skin that carry no "
        "attribute.",
    )
    return table | {"synthetic": True}


def with_and_without(
    model: nn.Module, faces: FaceSet, names: Sequence[str]
) -> tuple[Tensor, Tensor, list[str]]:
    """The same person with and without an attribute: a twin's face drawn again, or two pictures of a person.

    Where nobody is pictured both ways, another person stands in, and the title says so. Returns images uint8
    (2n, 3, H, W), with and without by turns; targets int64 (2n,); titles with the probability.
    """
    logits, _ = predict(model, faces.loader(500))
    images, targets, words = [], [], []
    for target in [faces.classes.index(name) for name in names]:
        there = faces.targets[:, target] > 0
        rows = (there & (logits[:, target] > 0)).nonzero().flatten().tolist()
        if not rows or bool(there.all()):
            continue
        row = next((r for r in rows if _other(faces, r, target)[1] != STRANGER), rows[0])
        other, word = _other(faces, row, target)
        images += [faces.images[row], other]
        targets += [target, target]
        words += ["with", word]
    if not images:
        raise ValueError(
            f"of no face the network says {' or '.join(names)}, or every face has it: name other attributes"
        )
    pictures, about = torch.stack(images), torch.tensor(targets)
    said = logits_of(model, pictures).sigmoid().gather(1, about[:, None])[:, 0].tolist()
    titles = [
        f"{word}\n{faces.classes[k]}\nsays {p:.0%}" for word, k, p in zip(words, targets, said, strict=True)
    ]
    return pictures, about, titles


def _other(faces: FaceSet, row: int, target: int) -> tuple[Tensor, str]:
    """The person without the attribute, uint8 (3, H, W), and where from; else the most alike without it."""
    if faces.params is not None:
        drawn = rendered([(faces.params[row], REGIONS[faces.classes[target]][:1])], faces.size)
        return torch.from_numpy(drawn[0, :3]), "drawn without"
    lacks = faces.targets[:, target] == 0
    if faces.identities is not None:
        same = ((faces.identities == faces.identities[row]) & lacks).nonzero().flatten()
        if len(same):
            return faces.images[int(same[0])], "without"
    differences = (faces.targets != faces.targets[row]).sum(1)
    differences[~lacks] = faces.targets.shape[1] + 1
    return faces.images[int(differences.argmin())], STRANGER


def audit(
    model: nn.Module, faces: FaceSet, attributes: Sequence[str], *, most: int, resamples: int
) -> tuple[dict[str, Any], dict[str, dict[str, tuple[float, float | None]]]]:
    """What attributes of the whole face rest on, over faces that have them and of which the network says so.

    That is the energy of the influence map on each part, over its area, and on the twin the fall of the logit
    without the part. Returns the table and {attribute: {part: (times its area, fall)}}.
    """
    logits, _ = predict(model, faces.loader(500))
    rows: list[list[Any]] = []
    found: dict[str, dict[str, tuple[float, float | None]]] = {}
    for name in [name for name in attributes if name in faces.classes]:
        target = faces.classes.index(name)
        chosen = ((logits[:, target] > 0) & (faces.targets[:, target] > 0)).nonzero().flatten()[:most]
        if not len(chosen):
            continue
        found[name] = {}
        some = []
        for part, values in _evidence(model, faces, chosen, target).items():
            if len(values) < min(5, len(chosen)):
                continue
            energy, area, fall = values.mean(0).tolist()
            found[name][part] = (energy / area, None if np.isnan(fall) else fall)
            known = len(values) > 1 and not np.isnan(fall)
            interval = list(bootstrap(values[:, 2], resamples=resamples)) if known else None
            some.append([name, part, str(len(values)), energy, energy / area, interval])
        rows += sorted(some, key=lambda row: -row[4])
    columns = "part | faces | energy of influence on it | times its area | fall of the logit without it"
    note = f"On the twin, Attractive is a planted rule: more than 1 point of {ATTRACTIVE}."
    notes = [note] if faces.synthetic else []
    caption = "What attributes of the whole face rest on"
    return tables.spec(caption, f"attribute | {columns}", rows, *notes), found


def _evidence(model: nn.Module, faces: FaceSet, rows: Tensor, target: int) -> dict[str, NDArray[np.float64]]:
    """By part (n, 3), over faces that show it: energy, area, fall of the logit (NaN where not the twin)."""
    maps = explain(model, faces.batch(rows)).heatmap("influence", target).cpu()
    places = {row: zones(faces, row) for row in rows.tolist()}
    falls = {}
    if faces.params is not None:
        falls = Removals.draw(faces, {row: list(masks) for row, masks in places.items()}).falls(model)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for heat, (row, masks) in zip(maps, places.items(), strict=True):
        total = float(heat.sum()) or 1.0
        for index, (part, mask) in enumerate(masks.items()):
            fall = float(falls[row][index, target]) if row in falls else np.nan
            values = (float(heat[mask].sum()) / total, float(mask.double().mean()), fall)
            found.setdefault(part, []).append(values)
    return {part: np.array(values) for part, values in found.items()}
