"""Networks that name the attributes of real faces, with an SE block and without: how each was trained.

``python -m studies.face_networks NETWORK FOLDER --data DATA`` trains every arm of a network on CelebA's
training faces and writes what was measured to ``faces-NETWORK.json`` and the networks to
``faces-NETWORK.safetensors``. The committed ones lie in ``studies/networks/premise``. Faces that
CelebAMask-HQ has, too, train nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selib import NormalQuantile, attach_se, attribute_scores, cache_features, channel_test, detach_se, fit
from selib.atomic import write_text
from selib.checkpoint import write
from selib.forward import attached, to_device
from selib.se import SEBlock
from selib.train import accelerator
from studies.data import FaceSet, also_masked, load_faces
from studies.features import feature_loader, head_of, read_inputs
from studies.networks import build, pretrained
from studies.premise import PUBLISHED, SHIPPED, WITHOUT, halved
from studies.results import machine, versions


@dataclass(frozen=True)
class Arm:
    """A block, by the arguments of :func:`selib.attach_se`, or none, and when the gates are asked to close.

    Attributes:
        sparsity: λ of λ·mean(s), added to the loss.
        when: "first": from the first step; "late": in a last third, after two thirds without it; "standing":
            block and classifier alone learn, on the features of the network without a block.
    """

    block: Mapping[str, Any] | None
    sparsity: float = 0.0
    when: str = "first"


PAPER: Mapping[str, Any] = {"start": "paper"}
EACH: Mapping[str, Any] = {"start": "paper", "per_target": True, "reduction": 4}
ARMS = {
    WITHOUT: Arm(None),
    PUBLISHED: Arm(PAPER),
    "λ = 0.03": Arm(PAPER, 0.03),
    "λ = 0.1": Arm(PAPER, 0.1),
    "λ = 0.3": Arm(PAPER, 0.3),
    "λ = 0.3, late": Arm(PAPER, 0.3, "late"),
    "standing, no block": Arm(None, 0.0, "standing"),
    "standing, λ = 0": Arm(PAPER, 0.0, "standing"),
    "standing, λ = 0.1": Arm(PAPER, 0.1, "standing"),
    "standing, λ = 0.3": Arm(PAPER, 0.3, "standing"),
    "standing, a block each, λ = 0": Arm(EACH, 0.0, "standing"),
    "standing, a block each, λ = 0.1": Arm(EACH, 0.1, "standing"),
    "standing, a block each, λ = 0.3": Arm(EACH, 0.3, "standing"),
    "standing, a block each, λ = 1": Arm(EACH, 1.0, "standing"),
}


@dataclass(frozen=True)
class Family:
    """A network and how every arm of it is trained.

    Attributes:
        size: height and width of the faces.
        site: the module whose output the block gates.
        arms: the titles of those that are trained; each is stored, unless ``stored`` names some.
        standing_epochs: of block and classifier on standing features.
    """

    about: str
    architecture: str
    options: Mapping[str, Any]
    size: tuple[int, int]
    site: str
    epochs: int
    lr: float
    arms: Sequence[str] = tuple(ARMS)
    stored: Sequence[str] = tuple(ARMS)
    seeds: int = 3
    batch: int = 64
    standing_epochs: int = 20
    standing_lr: float = 2e-3


def _small(cells: str, *, fine: bool) -> Family:
    about = f"small_resnet with a last map of {cells}, from nothing"
    return Family(about, "small_resnet", {"fine": fine}, (88, 72), "stages", 14, 4e-3)


STANDING = [title for title, arm in ARMS.items() if arm.when == "standing" and arm.block is not EACH]
FAMILIES = {
    "fine": _small("22x18", fine=True),
    "coarse": replace(_small("11x9", fine=False), arms=(WITHOUT, PUBLISHED, "λ = 0.1")),
    "lite0": Family(
        "EfficientNet-Lite0 from its ImageNet weights",
        "lite0",
        {},
        (112, 92),
        "bn2",
        4,
        1e-3,
        arms=(WITHOUT, PUBLISHED, "λ = 0.1", *STANDING, "standing, a block each, λ = 0.3"),
        stored=(WITHOUT,),  # it has 7 MB
        standing_epochs=6,  # its features fit the training faces closely: longer, and they overfit
        standing_lr=5e-4,
    ),
}


def sets(family: Family, root: Path | None) -> dict[str, FaceSet]:
    """The faces by split; those that the masks' archive has, too, are left out of training."""
    found = {
        split: load_faces("celeba", split, root=root, size=family.size) for split in ("train", "val", "test")
    }
    masked = also_masked(root)
    train = found["train"]
    found["train"] = train.subset([row for row, file in enumerate(train.files) if file not in masked])
    return found


def start(family: Family, classes: int, seed: int) -> nn.Module:
    """The network of a seed before training, without a block."""
    torch.manual_seed(seed)
    if family.architecture == "lite0":
        model = pretrained("lite0").model
        model.classifier = nn.Linear(model.get_submodule("classifier").in_features, classes)  # type: ignore[arg-type]
        return model.train()
    return build(family.architecture, classes, image_size=family.size, **family.options)


def untrained(family: Family, arm: Arm, classes: int, seed: int) -> nn.Module:
    """The network of an arm before training: all arms of a seed have the same weights beside the block."""
    return gated(start(family, classes, seed), family, arm)


def gated(model: nn.Module, family: Family, arm: Arm) -> nn.Module:
    """The network with the block of an arm, if it has one."""
    if arm.block is not None:
        attach_se(model, torch.randn(2, 3, *family.size), at=family.site, **arm.block)
    return model


def train(family: Family, arm: Arm, data: Mapping[str, FaceSet], seed: int) -> nn.Module:
    """An arm that learns from images, in evaluation mode."""
    model = untrained(family, arm, len(data["train"].classes), seed)
    loader = data["train"].loader(family.batch, train=True, seed=seed)
    last = family.epochs // 3 if arm.when == "late" else 0
    for epochs, lr, sparsity in (
        (family.epochs - last, family.lr, 0 if last else arm.sparsity),
        (last, family.lr / 3, arm.sparsity),
    ):
        if epochs:
            fit(
                model,
                loader,
                epochs=epochs,
                optimizer="adamw",
                lr=lr,
                task="multilabel",
                gate_sparsity=sparsity,
                seed=seed,
                progress=False,
            )
    return model.eval()


def train_standing(
    family: Family, arm: Arm, body: nn.Module, features: Tensor, data: Mapping[str, FaceSet], seed: int
) -> nn.Module:
    """Block and classifier, learned on the features of a trained network; the whole network, gated.

    Args:
        features: of :func:`pooled`.
    """
    model = untrained(family, arm, len(data["train"].classes), seed)
    learned = {name: weight for name, weight in body.state_dict().items() if "selib_se" not in name}
    model.load_state_dict(model.state_dict() | learned)
    head = head_of(body)
    if arm.block is not None:
        torch.manual_seed(seed)
        one = torch.zeros(2, head.classifier.in_features, 1, 1).to(head.classifier.weight)
        attach_se(head, one, at="map", **arm.block)
    fit(
        head,
        feature_loader(features, data["train"].targets.repeat(2, 1), 256, seed=seed),
        epochs=family.standing_epochs,
        lr=family.standing_lr,
        optimizer="adamw",
        task="multilabel",
        gate_sparsity=arm.sparsity,
        seed=seed,
        progress=False,
    )
    model.get_submodule("classifier").load_state_dict(
        {k: v for k, v in head.classifier.state_dict().items() if "selib_se" not in k}, strict=False
    )
    for name, block in attached(head).items():
        attached(model)[name].load_state_dict(block.state_dict())
    return model.to(next(head.parameters()).device).eval()


def pooled(body: nn.Module, faces: FaceSet, batch: int) -> Tensor:
    """What the classifier reads of every training face, then of their mirror images: (2N, C)."""
    layer, mirrored = body.get_submodule("classifier"), replace(faces, images=faces.images.flip(3))
    read = [read_inputs(body, layer, one, 4 * batch, torch.float32) for one in (faces, mirrored)]
    return torch.cat(read)


# ---- what is measured -------------------------------------------------------------------------------------


def measured(family: Family, model: nn.Module, faces: FaceSet) -> dict[str, Any]:
    """Means over the attributes, each attribute's own, and what the SE vector says.

    ``only_…`` and ``without_…``: of the network's own *yes* decisions the share that stays with the top
    decile of channels alone and without it, by gates, by influence, drawn at random, or of another face.
    ``moved``: the standard deviation of a gate over faces, averaged over channels. ``empty``: the share of
    faces on which the paper's rule selects nothing.
    """
    gated = bool(attached(model))
    place = next(model.parameters()).device
    if not gated:
        attach_se(model, to_device(faces.batch([0, 1]), place), at=family.site)
    try:
        cache, block = cache_features(model, faces.loader(100)), attached(model)[""]
        scores = attribute_scores(cache.logits.cpu(), faces.targets)
        found: dict[str, Any] = {name: float(score.nanmean()) for name, score in scores.items()}
        found["each"] = {
            name: [round(value, 5) for value in score.tolist()] for name, score in scores.items()
        }
        yes = cache.logits > 0
        kinds = channel_test(block, cache, task="multilabel")
        names = {"random": "random_{}"}
        if gated:
            names |= {"gates": "original_{}_top", "another": "another_{}"}
        for name, key in names.items():
            for end in ("only", "without"):
                found[f"{end}_{name}"] = float(kinds[key.format(end)][yes].double().mean())
        best = channel_test(block, cache, task="multilabel", ranking=_influence(model, cache))
        for end in ("only", "without"):
            found[f"{end}_influence"] = float(best[f"original_{end}_top"][yes].double().mean())
        return found | (_said(block, cache.squeezed) if gated else {})
    finally:
        if not gated:
            detach_se(model)


def _influence(model: nn.Module, cache: Any) -> Tensor:
    """Each output's own influences (N, K, C), of a classifier behind average pooling."""
    weight = model.get_submodule("classifier").weight
    means = cache.maps.flatten(2).mean(2)[:, None]  # (N, 1, C)
    scales = cache.scales if cache.scales.ndim == 3 else cache.scales[:, None]
    return weight * means * scales


@torch.no_grad()
def _said(block: SEBlock, squeezed: Tensor) -> dict[str, float]:
    """What the gates (N, C), or (N, K, C), are like."""
    gates = torch.cat([block.excite(part) for part in squeezed.split(200)])
    empty = NormalQuantile().selects_nothing(gates.flatten(0, -2))
    values = {"open": gates > 0.5, "moved": gates.std(0), "empty": empty}
    return {name: float(value.double().mean()) for name, value in values.items()}


# ---- training all of them ---------------------------------------------------------------------------------


def train_all(name: str, root: Path | None, folder: Path, seeds: Sequence[int], epochs: int | None) -> None:
    """Train the arms of a network, and write records and networks to ``folder`` after each."""
    family = FAMILIES[name]
    if epochs:
        family = replace(family, epochs=epochs, standing_epochs=epochs)
    data = sets(family, root)
    about: dict[str, Any] = {"network": family.about, "epochs": family.epochs, "lr": family.lr}
    about |= {"faces": {split: len(faces) for split, faces in data.items()}, "classes": data["train"].classes}
    about |= {"versions": versions(), "machine": machine(str(accelerator().device))}
    for seed in seeds:
        runs: list[dict[str, Any]] = []
        networks: dict[str, Tensor] = {}
        body = train(family, ARMS[WITHOUT], data, seed)
        features = pooled(body, data["train"], family.batch)
        for title in family.arms:
            arm, started = ARMS[title], time.perf_counter()
            if title == WITHOUT:
                model = body
            elif arm.when == "standing":
                model = train_standing(family, arm, body, features, data, seed)
            else:
                model = train(family, arm, data, seed)
            record: dict[str, Any] = {"arm": title, "seed": seed, "seconds": time.perf_counter() - started}
            record |= {split: measured(family, model, data[split]) for split in ("val", "test")}
            runs.append(record)
            short = {key: round(value, 4) for key, value in record["val"].items() if key != "each"}
            print(name, title, seed, f"{record['seconds']:.0f} s", short, flush=True)
            if title in family.stored:
                networks |= {f"{title}/{seed}/{key}": value for key, value in kept(arm, model).items()}
            file = folder / f"faces-{name}-{seed}"
            write_text(file.with_suffix(".json"), json.dumps(about | {"runs": runs}, indent=1) + "\n")
            write(file.with_suffix(".safetensors"), networks, {})


def kept(arm: Arm, model: nn.Module) -> dict[str, Tensor]:
    """What is stored of an arm: of those on standing features, block and classifier alone."""
    state = halved(model)
    if arm.when == "standing":
        state = {
            name: value
            for name, value in state.items()
            if "selib_se" in name or name.startswith("classifier")
        }
    return {name: value.cpu() for name, value in state.items()}


# ---- what is committed ------------------------------------------------------------------------------------

SHIPPED_ARMS = {
    "fine": {WITHOUT: 3, PUBLISHED: 3, "λ = 0.1": 1, "standing, a block each, λ = 0.3": 3},
    "coarse": {WITHOUT: 1},
    "lite0": {WITHOUT: 1},
}  # and how many seeds of each


def gather(name: str, folder: Path) -> None:
    """Join the records of all seeds, and of the networks those that are shipped."""
    files = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"faces-{name}-?.json"))
    ]
    runs = [run for file in files for run in file["runs"]]
    write_text(folder / f"faces-{name}.json", json.dumps(files[0] | {"runs": runs}, indent=1) + "\n")
    networks: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"faces-{name}-?.safetensors")):
        for key, value in load_file(file).items():
            arm, seed, _ = key.split("/")
            if int(seed) < SHIPPED_ARMS[name].get(arm, 0):
                networks[key] = value
    write(folder / f"faces-{name}.safetensors", networks, {})


def network(name: str, title: str, seed: int = 0, folder: Path = SHIPPED) -> nn.Module:
    """A shipped network, in evaluation mode; its outputs are the attributes in CelebA's order."""
    family, arm = FAMILIES[name], ARMS[title]
    model = gated(build(family.architecture, 40, image_size=family.size, **family.options), family, arm)
    kept = load_file(folder / f"faces-{name}.safetensors")
    titles = (
        [WITHOUT, title] if arm.when == "standing" else [title]
    )  # its body is that of the network without
    state = model.state_dict()
    for part in titles:
        begin = f"{part}/{seed}/"
        own = {key.removeprefix(begin): value for key, value in kept.items() if key.startswith(begin)}
        if not own:
            raise ValueError(f"faces-{name}.safetensors has no network {part!r} of seed {seed}")
        state |= {key: value.to(state[key].dtype) for key, value in own.items()}
    model.load_state_dict(state)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.face_networks", description=__doc__)
    parser.add_argument("network", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--gather", action="store_true", help="join what the seeds have written")
    asked = parser.parse_args()
    if asked.gather:
        gather(asked.network, asked.folder)
        return
    seeds = asked.seeds or range(FAMILIES[asked.network].seeds)
    train_all(asked.network, asked.data, asked.folder, seeds, asked.epochs)


if __name__ == "__main__":
    main()
