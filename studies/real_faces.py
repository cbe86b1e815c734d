"""What the networks of :mod:`studies.face_networks` look at on real faces with hand-made masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import explain
from selib.pixels import normalize
from studies import benchmark
from studies.baselines import Explainer
from studies.benchmark import Scores
from studies.data import FaceSet, available, data_root
from studies.data.hqmasks import ARCHIVE
from studies.explainers import controls_of, others_of
from studies.faces import PIXELS, logits_of
from studies.metrics import Interval, bootstrap, paired
from studies.mosaics import quadrant_energy
from studies.tables import UNDECIDED, signed, spec, verdict
from studies.twins.faces import REGIONS

LARGE = ("hair",)  # a part that is no small place
INFLUENCE, SPARSE, PAPER = "influence", "top-gate, sparse blocks", "top-gate (paper), labels alone"
TEMPLATES = ("centre prior", "mean map of other faces", "mean mask of other faces")  # do not look at the face


@dataclass(frozen=True)
class Pairs:
    """Pairs of a face and an attribute that all networks say it has, for :func:`studies.benchmark.run`.

    Attributes:
        images: uint8 (n, 3, H, W).
        targets: int64 (n,), outputs of the networks.
        masks: bool (n, H, W), where the attribute is to be seen.
        faces: int64 (n,), which face it is; several pairs may share one.
    """

    images: Tensor
    targets: Tensor
    masks: Tensor
    faces: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Any) -> Tensor:
        return normalize(self.images[indices])

    def truth(self, indices: Any) -> Tensor:
        return self.masks[indices]

    def of(self, rows: Tensor) -> Pairs:
        return Pairs(self.images[rows], self.targets[rows], self.masks[rows], self.faces[rows])


def placed(faces: FaceSet) -> list[str]:
    """The attributes whose part the masks tell apart."""
    return [name for name, parts in REGIONS.items() if set(parts) & set(faces.part_names)]


def pairs_of(
    faces: FaceSet, models: Sequence[nn.Module], classes: Sequence[str], most: int, seed: int = 0
) -> Pairs:
    """Up to ``most`` faces for each attribute that has a place, of those to which all models say yes."""
    yes = torch.stack([logits_of(model, faces.images) > 0 for model in models]).all(0)
    rows: list[Tensor] = []
    targets, masks = [], []
    for name in placed(faces):
        target = classes.index(name)
        there = yes[:, target].nonzero().flatten()
        truth = faces.region(name, there)
        there, truth = (part[truth.flatten(1).sum(1) >= PIXELS] for part in (there, truth))
        order = torch.randperm(len(there), generator=torch.Generator().manual_seed(seed + target))[:most]
        rows.append(there[order])
        masks.append(truth[order])
        targets.append(torch.full_like(rows[-1], target))
    found = torch.cat(rows)
    return Pairs(faces.images[found], torch.cat(targets), torch.cat(masks), found)


# ---- where the maps lie -----------------------------------------------------------------------------------


def most_named(
    model: nn.Module, faces: FaceSet, names: Sequence[str], classes: Sequence[str]
) -> tuple[int, list[str]]:
    """The face of which a model names most of these attributes, and those that it names."""
    columns = [classes.index(name) for name in names]
    yes = logits_of(model, faces.images)[:, columns] > 0
    row = int(yes.sum(1).argmax())
    return row, [name for name, said in zip(names, yes[row].tolist(), strict=True) if said]


def explainers_of(
    plain: nn.Module, sparse: nn.Module, published: nn.Module, seed: int
) -> dict[str, Explainer]:
    """Readings of three networks, and CAMs and controls on the one without a block."""

    def reading(model: nn.Module, method: Any) -> Explainer:
        return lambda images, targets: explain(model, images).heatmap(method, targets)

    ours = {INFLUENCE: reading(plain, "influence"), SPARSE: reading(sparse, "top-gate")}
    found = ours | {PAPER: reading(published, "top-gate")} | others_of(plain) | controls_of(plain, seed)
    for name in [name for name in found if name == "Integrated gradients" or name.startswith("CAM =")]:
        del found[name]  # hundreds of passes; and what is influence here
    return found


def templates(
    faces: FaceSet, others: FaceSet, plain: nn.Module, classes: Sequence[str], pairs: Pairs
) -> dict[str, Tensor]:
    """Maps (n, H, W) that do not look at the face: of each pair's attribute, from other faces.

    Args:
        faces: those of the pairs, with masks; each is shown the mean mask of the other half of them.
        others: faces without masks, of which the mean map is taken.
    """
    maps, masks = {}, {}
    said = logits_of(plain, others.images)
    halves = torch.arange(len(faces)) % 2 == 0
    yes = logits_of(plain, faces.images) > 0
    for target in pairs.targets.unique().tolist():
        best = said[:, target].argsort(descending=True)[:100]
        best = best[said[best, target] > 0]
        chosen = best if len(best) else said[:, target].argsort(descending=True)[:10]
        maps[target] = explain(plain, normalize(others.images[chosen])).heatmap("influence", target).mean(0)
        for half in (True, False):
            known = (yes[:, target] & (halves == half)).nonzero().flatten()
            region = faces.region(classes[target], known if len(known) else slice(None))
            masks[target, half] = region.float().mean(0)
    mine = [bool(halves[face]) for face in pairs.faces.tolist()]
    targets = pairs.targets.tolist()
    return {
        TEMPLATES[1]: torch.stack([maps[target] for target in targets]),
        TEMPLATES[2]: torch.stack([masks[t, not half] for t, half in zip(targets, mine, strict=True)]),
    }


def localise(
    pairs: Pairs,
    explainers: Mapping[str, Explainer],
    shown: Mapping[str, Tensor],
    model: nn.Module,
    *,
    slow: int,
) -> Scores:
    """AP, pointing and energy of every map on the pairs, of the slow ones on ``slow`` of them."""
    limits = dict.fromkeys([name for name in ("Score-CAM", "Ablation-CAM") if name in explainers], slow)
    scores = benchmark.run(
        model, pairs, explainers, range(len(pairs)), metrics=("ap", "pointing", "energy"), limits=limits
    )
    for name, maps in shown.items():
        found = {kind: measure(maps, pairs.masks) for kind, measure in benchmark.LOCALISATION.items()}
        scores.values[name] = {kind: values.double().numpy() for kind, values in found.items()}
        scores.seconds[name] = 0.0
    return scores


def by_face(values: NDArray[np.float64], pairs: Pairs, rows: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Means over the pairs of a face, so that an interval over faces is one over independent things."""
    kept = rows & ~np.isnan(values)
    faces = pairs.faces.numpy()[kept]
    return np.array([values[kept][faces == face].mean() for face in np.unique(faces)])


def small_places(pairs: Pairs, classes: Sequence[str]) -> NDArray[np.bool_]:
    large = {
        classes.index(name) for name, parts in REGIONS.items() if set(parts) & set(LARGE) and name in classes
    }
    return np.array([target not in large for target in pairs.targets.tolist()])


def place_table(
    caption: str, scores: Scores, pairs: Pairs, classes: Sequence[str], *, resamples: int
) -> dict[str, Any]:
    """Explainers by AP, pointing and energy over the attributes with a small place, clustered by face."""
    small = small_places(pairs, classes)
    rows: list[list[Any]] = []
    for name in scores.values:
        cells = [by_face(scores.cell(name, kind), pairs, small) for kind in ("ap", "pointing", "energy")]
        rows.append([name, *(list(bootstrap(cell, resamples=resamples)) for cell in cells), len(cells[0])])
    rows.sort(key=lambda row: -row[1][0])
    return spec(
        caption,
        "map | AP ↑ | pointing ↑ | energy inside ↑ | faces",
        rows,
        f"{int(small.sum())} pairs of face and attribute with a small place; means over the pairs of a face, "
        "95 % intervals over faces. Rows of fewer faces are slow maps: compare them by paired gains. "
        f"{', '.join(TEMPLATES)}: do not look at the face.",
    )


def gains(
    scores: Scores,
    pairs: Pairs,
    rivals: Sequence[tuple[str, str]],
    rows: NDArray[np.bool_],
    *,
    resamples: int,
) -> Gains:
    """Paired gains in AP of one map over another, on the faces that both have."""
    found = {}
    for name, rival in rivals:
        both = rows & ~np.isnan(scores.cell(rival, "ap")) & ~np.isnan(scores.cell(name, "ap"))
        a, b = (by_face(scores.cell(one, "ap"), pairs, both) for one in (name, rival))
        found[name, rival] = paired(a, b, resamples=resamples), len(a)
    return found


RIVALS = [  # the first four are primary on aligned faces, those against templates on moved ones
    (INFLUENCE, "mean of channels"),
    (INFLUENCE, "13 random channels"),
    (SPARSE, "mean of channels"),
    (SPARSE, "13 random channels"),
    (PAPER, "mean of channels"),
    (SPARSE, INFLUENCE),
    (INFLUENCE, "LayerCAM"),
    (INFLUENCE, "Score-CAM"),
    *((ours, template) for ours in (INFLUENCE, SPARSE) for template in TEMPLATES[1:]),
]
Gains = dict[tuple[str, str], tuple[Interval, int]]


def all_gains(
    places: Mapping[str, tuple[Pairs, Scores]], classes: Sequence[str], *, resamples: int
) -> dict[str, Gains]:
    """:func:`gains` of all comparisons, on aligned and on moved faces."""
    found = {}
    for where, (pairs, scores) in places.items():
        rivals = [pair for pair in RIVALS if pair[1] in scores.values]
        found[where] = gains(scores, pairs, rivals, small_places(pairs, classes), resamples=resamples)
    return found


def gain_table(
    caption: str, found: Mapping[str, Mapping[tuple[str, str], tuple[Interval, int]]]
) -> dict[str, Any]:
    """{faces: :func:`gains`} as a table."""
    rows = []
    for where, entries in found.items():
        for (name, rival), (gain, count) in entries.items():
            rows.append([where, name, rival, list(gain), count, verdict(gain)])
    return spec(caption, "faces | map | against | gain in AP | n | verdict", rows, "Paired by face.")


# ---- faces that are not where faces always are -----------------------------------------------------------


def moved(pairs: Pairs, models: Sequence[nn.Module], seed: int = 0) -> Pairs:
    """Each face shrunk, shifted and mirrored at random, four times, of those to which all still say yes."""
    generator = torch.Generator().manual_seed(seed)
    pairs = pairs.of(torch.arange(len(pairs)).repeat(4))
    count = len(pairs)
    scale = 0.5 + 0.4 * torch.rand(count, generator=generator)  # of its size
    shift = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - scale)[:, None]
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < 0.5).float()
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = mirror / scale, 1 / scale
    theta[:, :, 2] = -shift / scale[:, None]
    theta[:, 0, 2] *= mirror
    grid = F.affine_grid(theta, [count, 1, *pairs.images.shape[2:]], align_corners=False)
    images = F.grid_sample(pairs.images.float(), grid, padding_mode="border", align_corners=False)
    masks = F.grid_sample(pairs.masks[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0] > 0.5
    found = Pairs(images.round().clamp(0, 255).to(torch.uint8), pairs.targets, masks, pairs.faces)
    rows = torch.arange(count)
    still = torch.stack([logits_of(model, found.images)[rows, pairs.targets] > 0 for model in models]).all(0)
    return found.of((still & (masks.flatten(1).sum(1) >= PIXELS)).nonzero().flatten())


def four_faces(
    faces: FaceSet, models: Sequence[nn.Module], names: Sequence[str], count: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Four faces in one picture, of which one has the attribute, by its label and by all networks.

    Returns:
        uint8 (M, 3, 2H, 2W); targets (M,); which quadrant, in reading order, (M,).
    """
    logits = torch.stack([logits_of(model, faces.images) for model in models])
    rng = np.random.default_rng(seed)
    images, targets, places = [], [], []
    for name in names:
        target = faces.classes.index(name)
        label = faces.targets[:, target] > 0
        has = (label & (logits[:, :, target] > 0).all(0)).nonzero().flatten().numpy()
        lacks = (~label & (logits[:, :, target] < 0).all(0)).nonzero().flatten().numpy()
        for _ in range(count if len(has) > 4 else 0):
            place = int(rng.integers(4))
            four = rng.choice(lacks, 4, replace=False)
            four[place] = rng.choice(has)
            quarters = faces.images[torch.from_numpy(four)]
            halves = [torch.cat([quarters[i], quarters[i + 1]], 2) for i in (0, 2)]
            images.append(torch.cat(halves, 1))
            targets.append(target)
            places.append(place)
    return torch.stack(images), torch.tensor(targets), torch.tensor(places)


def quadrant_table(
    explainers: Mapping[str, Explainer], grids: tuple[Tensor, Tensor, Tensor], *, resamples: int
) -> tuple[dict[str, Any], dict[str, Interval]]:
    """How much of a map's energy lies on the face that has what is asked for; chance is a quarter."""
    images, targets, places = grids
    found: dict[str, Interval] = {}
    rows: list[list[Any]] = []
    for name, explainer in explainers.items():
        parts = zip(images.split(32), targets.split(32), places.split(32), strict=True)
        shares = torch.cat([quadrant_energy(explainer(normalize(x), k), place) for x, k, place in parts])
        found[name] = bootstrap(shares.numpy(), resamples=resamples)
        right = bootstrap((shares > 0.5).double().numpy(), resamples=resamples)
        rows.append([name, list(found[name]), list(right)])
    rows.sort(key=lambda row: -row[1][0])
    caption = f"Which of four faces? {len(targets)} pictures, one of the four has the attribute"
    columns = "map | energy on the right face (chance .25) | more than half of it"
    return spec(caption, columns, rows, "95 % intervals over pictures."), found


def slices(
    faces: FaceSet, models: Sequence[nn.Module], names: Sequence[str], *, resamples: int
) -> dict[str, Any]:
    """Accuracy over the attributes by who is seen: means over networks, intervals over faces."""
    yes = faces.targets > 0
    right = torch.stack([(logits_of(model, faces.images) > 0) == yes for model in models]).double().mean(0)
    rows: list[list[Any]] = []
    for name in names:
        column = faces.classes.index(name)
        other = [k for k in range(len(faces.classes)) if k != column]
        each = right[:, other].mean(1).numpy()
        mine = yes[:, column].numpy()
        for title, rows_of in ((name, mine), (f"not {name}", ~mine)):
            rows.append([title, int(rows_of.sum()), list(bootstrap(each[rows_of], resamples=resamples))])
    caption = "Accuracy over the other 39 attributes, by who is seen"
    return spec(caption, "faces | n | accuracy", rows, f"Mean of {len(models)} networks.")


def at_hand(root: Any = None) -> bool:
    """Whether CelebA and the faces with masks are there."""
    return available("celeba", root) and (data_root(root) / ARCHIVE).is_dir()


def findings(
    compared: Mapping[str, Gains],
    on_face: Mapping[str, Interval],
    agreed: Mapping[str, Mapping[str, NDArray[np.float64]]],
) -> list[str]:
    """What the maps on real faces say, in sentences."""
    said = []
    for where, found in compared.items():
        for (name, rival), (gain, count) in found.items():
            word = verdict(gain)
            what = f"{word} between {name} and {rival}" if word == UNDECIDED else f"{name} is {word} {rival}"
            said.append(
                f"Real {where} faces, hand-made masks, AP: {what}, {signed(gain)} (n = {count} faces)."
            )
    best = ", ".join(
        f"{name} {on_face[name].mean:.2f}" for name in (INFLUENCE, "LayerCAM", SPARSE, "mean of channels")
    )
    said.append(f"Which of four real faces has the attribute? Energy on the right one (chance .25): {best}.")
    for name, found_of in agreed.items():
        ours, area = found_of[INFLUENCE].mean(), found_of["area of the part"].mean()
        said.append(
            f"{name}, real faces: over the parts of a face, energy of influence and the fall of the logit "
            f"when the part is blurred out correlate at {ours:.2f} (the part's area alone {area:.2f})."
        )
    return said
