"""A planted shortcut: five pairs of networks asked for glasses, trained where hats go with them or not.

``python -m studies.shortcut FOLDER`` trains them on faces of the twin and writes ``shortcut.safetensors``;
the committed file lies in ``studies/networks/premise``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from selib import attach_se, fit
from selib.checkpoint import write
from studies import metrics, tables
from studies.data import FaceSet
from studies.explainers import CHANCE, SAME_AS_CAM
from studies.face_parts import CAUSE, SHORTCUT, Removals, part_of
from studies.faces import explainers_of, faces_of, logits_of
from studies.metrics import Interval, bootstrap
from studies.networks import build
from studies.premise import SHIPPED, halved
from studies.profiles import Profile

SPLITS = {"clean": "train", "spurious": "spurious"}
PAIRS = 5
MEAN = "mean of channels"
MAPS = ("SE influence", "SE top-gate (paper)", "LayerCAM", SAME_AS_CAM, MEAN, CHANCE)
Energies = dict[str, dict[str, list[NDArray[np.float64]]]]
Pair = Mapping[str, nn.Module]  # "clean" and "spurious"


def _untrained(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build("small_resnet", 1, image_size=(88, 72))
    attach_se(model, torch.randn(2, 3, 88, 72), start="paper")
    return model


def train_all(folder: Path) -> None:
    """Both networks of a pair start from the same weights and see as many faces."""
    found: dict[str, Tensor] = {}
    for name, split in SPLITS.items():
        faces = faces_of(Profile(), folder, data="synth-faces", attributes=[CAUSE], split=split).train
        for seed in range(PAIRS):
            model, loader = _untrained(seed), faces.loader(64, train=True, seed=seed)
            history = fit(model, loader, epochs=10, optimizer="adamw", lr=4e-3, task="multilabel", seed=seed)
            print(name, seed, len(faces), history[-1], flush=True)
            found |= {f"{name}/{seed}/{key}": value.cpu() for key, value in halved(model).items()}
    write(folder / "shortcut.safetensors", found, {})


def pairs(folder: Path = SHIPPED) -> list[dict[str, nn.Module]]:
    """The shipped networks, in evaluation mode."""
    kept = load_file(folder / "shortcut.safetensors")
    found = []
    for seed in range(PAIRS):
        pair = {}
        for name in SPLITS:
            model, begin = _untrained(seed), f"{name}/{seed}/"
            state = {key.removeprefix(begin): v.float() for key, v in kept.items() if key.startswith(begin)}
            model.load_state_dict(state)
            pair[name] = model.eval()
        found.append(pair)
    return found


def study(networks: Sequence[Pair], faces: FaceSet, *, resamples: int) -> dict[str, Any]:
    """Is the shortcut found? On faces with hat and glasses, of which all networks say glasses.

    Args:
        faces: clean ones, with the attribute Eyeglasses alone.

    Returns:
        ``energy``: the share of a map's energy on the hat, by map and network, (pairs, n). ``rise``: spurious
        minus clean. ``beyond``: by how much more it rises than in the mean of channels, which knows of no
        class (difference in differences). ``falls`` of the logit when hat or glasses are taken off.
        ``fooled``: how often a hat, or a bare head, without glasses is called glasses.
    """
    assert faces.params is not None
    hat, glasses = (torch.tensor([bool(p[name]) for p in faces.params]) for name in (SHORTCUT, CAUSE))
    every = [model for pair in networks for model in pair.values()]
    said = torch.stack([logits_of(model, faces.images)[:, 0] > 0 for model in every])
    both = (hat & glasses & said.all(0)).nonzero().flatten()
    both = both if len(both) > 1 else (hat & glasses).nonzero().flatten()  # networks hardly trained
    on_hat, targets = part_of(faces, both, "hat"), torch.zeros(len(both), dtype=torch.long)
    removals = Removals.draw(faces, {row: ["hat", "glasses"] for row in both.tolist()})
    energy: Energies = {maker: {name: [] for name in SPLITS} for maker in MAPS}
    falls: Energies = {name: {"hat": [], "glasses": []} for name in SPLITS}
    fooled: dict[str, dict[str, float]] = {}
    for name in SPLITS:
        rates = {"hat": hat & ~glasses, "bare head": ~hat & ~glasses}
        mine = said[list(SPLITS).index(name) :: len(SPLITS)].double()
        fooled[name] = {title: float(mine[:, rows].mean()) for title, rows in rates.items()}
        for model in (pair[name] for pair in networks):
            makers = explainers_of(model, model, 0)
            for maker in MAPS:
                maps = makers[maker](faces.batch(both), targets)
                energy[maker][name].append(metrics.energy_in_mask(maps, on_hat).numpy())
            fall = torch.stack(list(removals.falls(model).values()))[:, :, 0].double().numpy()
            falls[name]["hat"].append(fall[:, 0])
            falls[name]["glasses"].append(fall[:, 1])
    rises = {maker: np.stack(runs["spurious"]) - np.stack(runs["clean"]) for maker, runs in energy.items()}
    return {
        "energy": energy,
        "rise": {maker: bootstrap(rise, resamples=resamples) for maker, rise in rises.items()},
        "beyond": {maker: bootstrap(rises[maker] - rises[MEAN], resamples=resamples) for maker in MAPS[:-2]},
        "falls": falls,
        "fooled": fooled,
        "rows": both,
    }


def table(found: Mapping[str, Any], *, resamples: int) -> dict[str, Any]:
    """Map by map: energy on the hat in clean and in spurious networks, its rise, and beyond the mean."""

    def intervals(values: Mapping[str, Sequence[NDArray[np.float64]]]) -> list[Interval]:
        return [bootstrap(np.stack(values[name]), resamples=resamples) for name in SPLITS]

    rows: list[list[Any]] = []
    for maker, runs in found["energy"].items():
        beyond = found["beyond"].get(maker)
        more = [list(found["rise"][maker]), None if beyond is None else list(beyond)]
        rows.append([maker, *map(list, intervals(runs)), *more])
    for part in ("hat", "glasses"):
        fall = {name: falls[part] for name, falls in found["falls"].items()}
        rise = bootstrap(np.stack(fall["spurious"]) - np.stack(fall["clean"]), resamples=resamples)
        title = f"truth: fall of the logit without the {part}"
        rows.append([title, *map(list, intervals(fall)), list(rise), None])
    spec = tables.spec(
        "Eyeglasses: energy on the hat, in networks trained where hats go with them (ρ = 0.9) and where not",
        "map | clean | spurious | rise | beyond that of the mean of channels",
        rows,
        f"{PAIRS} pairs of networks, {len(found['rows'])} test faces with both, of which all networks say "
        "glasses. Intervals over pairs and faces.",
    )
    return spec | {"synthetic": True}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m studies.shortcut FOLDER")
    train_all(Path(sys.argv[1]))
