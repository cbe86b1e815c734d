"""Networks trained with labels, with an SE block and without: what the block costs, and what its vector says.

``python -m studies.premise NETWORK FOLDER`` trains every arm of a network and writes what was measured to
``NETWORK.json``, and the networks of the first seed to ``NETWORK.safetensors``. The committed ones lie in
``studies/networks/premise``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from selib import NormalQuantile, attach_se, cache_features, channel_test, fit
from selib.atomic import write_text
from selib.checkpoint import write
from selib.forward import attached, to_device
from selib.train import accelerator
from studies.data import ImageSet, load, tiny_at, tiny_wnids
from studies.features import OnFeatures, feature_loader, pooled
from studies.metrics import Interval, non_inferiority, t_interval
from studies.networks import build, cifar_resnet, pretrained
from studies.results import machine, versions
from studies.tables import signed, spec

SHIPPED = Path(__file__).parent / "networks" / "premise"


@dataclass(frozen=True)
class Arm:
    """A block, by the arguments of :func:`selib.attach_se`, or none; λ of λ·mean(s), added to the loss."""

    block: Mapping[str, Any] | None
    sparsity: float = 0.0


WITHOUT, PUBLISHED = "without", "as published"
ARMS = {
    WITHOUT: Arm(None),
    PUBLISHED: Arm({"start": "paper"}),
    "identity start": Arm({"start": "identity"}),
    "λ = 0.03": Arm({"start": "paper"}, 0.03),
    "λ = 0.1": Arm({"start": "paper"}, 0.1),
    "λ = 0.3": Arm({"start": "paper"}, 0.3),
    "λ = 1": Arm({"start": "paper"}, 1.0),
    "through the classifier": Arm({"form": "head", "start": "paper"}),
    "through the classifier, λ = 0.1": Arm({"form": "head", "start": "paper"}, 0.1),
}
COMPARED = (WITHOUT, PUBLISHED, "identity start")  # arms of the accuracy table, with more seeds


@dataclass(frozen=True)
class Family:
    """A network, its data, and how every arm of it is trained.

    Attributes:
        start: a seed -> the network before training, without a block.
        train: a seed -> batches of inputs and targets.
        val: batches of the images that are reported on.
        site: the module whose output the block gates.
        seeds: of the arms that are compared for accuracy, and of the others.
    """

    name: str
    about: str
    start: Callable[[int], nn.Module]
    train: Callable[[int], DataLoader]
    val: DataLoader
    site: str
    epochs: int
    settings: Mapping[str, Any]
    seeds: tuple[int, int]


def small(root: Path | None, work: Path) -> Family:
    """The study's small network, from nothing."""
    train, val = (load("tiny-imagenet", split, root=root) for split in ("train", "val"))

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build("small_resnet", len(train.classes), image_size=train.size)

    about = "small_resnet (0.25 M parameters) from nothing, Tiny-ImageNet-50 at 64 px"
    settings = {"optimizer": "adamw", "lr": 8e-3}
    batches = _batches(train, 256)
    return Family("small", about, start, batches, val.loader(500), "stages", 30, settings, (5, 3))


def resnet20(root: Path | None, work: Path) -> Family:
    """ResNet-20 from its published weights."""
    train, val = (load("cifar10", split, root=root) for split in ("train", "val"))

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return cifar_resnet(20, root)

    about = "ResNet-20 from its published weights, five epochs of CIFAR-10"
    settings = {"optimizer": "sgd", "lr": 0.02}
    batches = _batches(train, 128)
    return Family("resnet20", about, start, batches, val.loader(500), "layer3", 5, settings, (5, 3))


def lite0(root: Path | None, work: Path) -> Family:
    """SE block and linear layer on features of EfficientNet-Lite0, which stays as it is."""
    sets = {split: tiny_at(128, split, root) for split in ("train", "val")}
    body = pretrained("lite0", tiny_wnids(root)).model.to(accelerator().device)
    features = {split: pooled(body, data, work) for split, data in sets.items()}
    targets = {split: data.targets for split, data in sets.items()}
    channels, classes = features["train"].shape[1], len(sets["train"].classes)

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return OnFeatures(channels, classes)

    def batches(seed: int) -> DataLoader:
        return feature_loader(features["train"], targets["train"], 256, seed=seed)

    about = "linear layer on frozen EfficientNet-Lite0 features, Tiny-ImageNet-50 at 128 px"
    settings = {"optimizer": "adamw", "lr": 2e-3}
    val = feature_loader(features["val"], targets["val"], 500)
    return Family("lite0", about, start, batches, val, "map", 20, settings, (10, 3))


FAMILIES: dict[str, Callable[[Path | None, Path], Family]] = {
    "small": small,
    "resnet20": resnet20,
    "lite0": lite0,
}


def _batches(data: ImageSet, size: int) -> Callable[[int], DataLoader]:
    return lambda seed: data.loader(size, train=True, seed=seed)


def runs_of(family: Family) -> list[tuple[str, int]]:
    """(arm, seed) of every training run."""
    more, fewer = family.seeds
    return [(arm, seed) for arm in ARMS for seed in range(more if arm in COMPARED else fewer)]


def untrained(family: Family, arm: str, seed: int) -> nn.Module:
    """The network of an arm before training: all arms of a seed have the same weights beside the block."""
    model, block = family.start(seed), ARMS[arm].block
    if block is not None:
        inputs, _ = next(iter(family.val))
        attach_se(model, inputs[:2], at=family.site, **block)
    return model


def train(family: Family, arm: str, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """One training run: the network in evaluation mode, and its record."""
    model, started = untrained(family, arm, seed), time.perf_counter()
    history = fit(
        model,
        family.train(seed),
        epochs=family.epochs,
        seed=seed,
        gate_sparsity=ARMS[arm].sparsity,
        progress=False,
        **family.settings,
    )
    seconds = time.perf_counter() - started
    record = {"arm": arm, "seed": seed, "loss": [row["loss"] for row in history], "seconds": seconds}
    return model.eval(), record | measured(model, family.val, family.site)


def measured(model: nn.Module, val: Iterable[Any], site: str) -> dict[str, float]:
    """Accuracy, and what the SE vector says: shares over the validation images.

    ``only_…`` and ``without_…`` of the network's own predictions that stay with the top decile of channels
    alone and without it, by the gates, by influence, drawn at random, or taken from another image.
    ``moved`` is the standard deviation of a gate over images, averaged over the channels.
    """
    trained = bool(attached(model))
    if not trained:
        model = copy.deepcopy(model)
        attach_se(model, to_device(next(iter(val))[0][:2], next(model.parameters()).device), at=site)
    cache, block = cache_features(model, val), attached(model)[""]
    assert cache.targets is not None
    found = {"accuracy": float((cache.logits.argmax(1) == cache.targets).double().mean())}
    by_influence = channel_test(block, cache, ranking=cache.influence())
    kinds = channel_test(block, cache)
    shares = {
        "only_influence": by_influence["original_only_top"],
        "without_influence": by_influence["original_without_top"],
        "only_random": kinds["random_only"],
        "without_random": kinds["random_without"],
    }
    if trained:
        with torch.no_grad():
            gates = block.excite(cache.squeezed)
        shares |= {
            "only_gates": kinds["original_only_top"],
            "without_gates": kinds["original_without_top"],
            "only_another": kinds["another_only"],
            "without_another": kinds["another_without"],
            "open": gates > 0.5,
            "rule_empty": NormalQuantile().selects_nothing(gates),
            "moved": gates.std(0),
        }
    return found | {name: float(values.double().mean()) for name, values in shares.items()}


# ---- what is committed ------------------------------------------------------------------------------------


def records(network: str, folder: Path = SHIPPED) -> list[dict[str, Any]]:
    """The records of all training runs of a network."""
    return list(json.loads((folder / f"{network}.json").read_text(encoding="utf-8"))["runs"])


def shipped(family: Family, arm: str, folder: Path = SHIPPED) -> nn.Module:
    """The network of the first seed of an arm, in evaluation mode."""
    model = untrained(family, arm, 0)
    kept = load_file(folder / f"{family.name}.safetensors")
    weights = {k.removeprefix(f"{arm}/"): w for k, w in kept.items() if k.startswith(f"{arm}/")}
    model.load_state_dict({k: w.to(model.state_dict()[k].dtype) for k, w in weights.items()})
    return model.eval()


def found(root: Path | None, work: Path, *, again: bool) -> dict[str, list[dict[str, Any]]]:
    """The records of all networks: the committed ones, or of networks that are trained here."""
    folder = work / "premise" if again else SHIPPED
    if again:
        for make in FAMILIES.values():
            train_all(make(root, work), folder)
    return {network: records(network, folder) for network in FAMILIES}


def halved(model: nn.Module) -> dict[str, Tensor]:
    """A network's state in half precision, as it is shipped."""
    return {k: w.half() if w.is_floating_point() else w for k, w in model.state_dict().items()}


def train_all(family: Family, folder: Path, part: str = "0/1") -> None:
    """Train every arm, and write records and networks to ``folder`` after each run.

    Args:
        part: "i/n": every n-th run from the i-th, for n processes side by side; see :func:`gather`.
    """
    index, count = map(int, part.split("/"))
    name = family.name if count == 1 else f"{family.name}-{index}"
    about: dict[str, Any] = {"network": family.about, "epochs": family.epochs, "settings": family.settings}
    about |= {"versions": versions(), "machine": machine(str(accelerator().device)), "runs": []}
    networks: dict[str, Tensor] = {}
    for arm, seed in runs_of(family)[index::count]:
        model, record = train(family, arm, seed)
        print({key: value for key, value in record.items() if key != "loss"}, flush=True)
        about["runs"].append(record)
        if seed == 0:
            networks |= {f"{arm}/{key}": value for key, value in halved(model).items()}
        write_text(folder / f"{name}.json", json.dumps(about, indent=1) + "\n")
        if networks:
            write(folder / f"{name}.safetensors", networks, {})


def gather(network: str, folder: Path) -> None:
    """Join what processes side by side have written."""
    parts = sorted(folder.glob(f"{network}-*.json"))
    files = [json.loads(part.read_text(encoding="utf-8")) for part in parts]
    order = list(ARMS)
    runs = [run for file in files for run in file["runs"]]
    runs.sort(key=lambda run: (order.index(run["arm"]), run["seed"]))
    networks: dict[str, Tensor] = {}
    for part in parts:
        if part.with_suffix(".safetensors").is_file():  # else none of its runs had the first seed
            networks |= load_file(part.with_suffix(".safetensors"))
    write_text(folder / f"{network}.json", json.dumps(files[0] | {"runs": runs}, indent=1) + "\n")
    write(folder / f"{network}.safetensors", networks, {})


# ---- tables -----------------------------------------------------------------------------------------------

MARGIN = 0.5  # points of accuracy that a block may cost and still be called harmless; fixed beforehand
Records = Sequence[Mapping[str, Any]]


def gains(runs: Records, arm: str) -> Interval:
    """Accuracy minus that without a block, paired by seed, in points: mean and t-interval over seeds."""
    without = {run["seed"]: run["accuracy"] for run in runs if run["arm"] == WITHOUT}
    return t_interval([100 * (run["accuracy"] - without[run["seed"]]) for run in runs if run["arm"] == arm])


def accuracy_table(found: Mapping[str, Records]) -> dict[str, Any]:
    """What the block costs: {network: records} -> accuracy, paired difference, verdict."""
    rows = []
    for network, runs in found.items():
        for arm in COMPARED:
            count = sum(run["arm"] == arm for run in runs)
            row: list[Any] = [network, arm, count, means(runs, arm)["accuracy"]]
            if arm == WITHOUT:
                row += [None, None]
            else:
                gain = gains(runs, arm)
                row += [list(gain), non_inferiority(gain, MARGIN)]
            rows.append(row)
    return spec(
        "Top-1 accuracy with and without the SE block",
        "network | block | seeds | accuracy | difference in points | verdict",
        rows,
        "The same recipe, seed by seed. Brackets: 95 % t-interval over seeds of the paired difference. "
        f"Non-inferior: the interval lies above -{MARGIN:g} points, a margin fixed beforehand; harmed: below "
        "zero and reaching under the margin; else undecided.",
    )


def means(runs: Records, arm: str) -> dict[str, float]:
    """The means over seeds of what was measured on an arm."""
    mine = [run for run in runs if run["arm"] == arm]
    measures = [key for key in mine[0] if key not in ("arm", "seed", "loss", "seconds")]
    return {key: float(np.mean([run[key] for run in mine])) for key in measures}


PREMISE = {
    "accuracy": "accuracy",
    "open": "gates open",
    "rule_empty": "rule selects nothing",
    "moved": "moved",
    "gates": "only / without: by gates",
    "another": "another image's",
    "random": "random",
    "influence": "influence",
}


def premise_table(found: Mapping[str, Records]) -> dict[str, Any]:
    """What the SE vector says, arm by arm: means over seeds."""
    rows = []
    for network, runs in found.items():
        for arm in ARMS:
            mean, count = means(runs, arm), sum(run["arm"] == arm for run in runs)
            row: list[Any] = [network, f"{arm} ({count})", mean["accuracy"]]
            row += [f"{100 * mean[key]:.0f} %" if key in mean else "" for key in ("open", "rule_empty")]
            row.append(f"{mean['moved']:.3f}" if "moved" in mean else "")
            for kind in ("gates", "another", "random", "influence"):
                pair = [mean.get(f"{end}_{kind}") for end in ("only", "without")]
                row.append(" / ".join(f"{value:.2f}" for value in pair if value is not None))
            rows.append(row)
    return spec(
        "Networks trained with labels: does the SE vector name the channels that matter?",
        " | ".join(["network", "block (seeds)", *PREMISE.values()]),
        rows,
        "λ: λ·mean(s) added to the loss from the first step. Only / without: the share of the network's own "
        "predictions that stay with the top decile of channels alone, and without it. Where another image's "
        "gates do as well, the gates are a fixed pruning. Moved: standard deviation of a gate over images.",
    )


def frontier(found: Mapping[str, Records]) -> dict[str, dict[str, tuple[Interval, int, float, float]]]:
    """For :func:`studies.figures.frontier_plot`: the published block by λ, from labels alone on."""
    points: dict[str, dict[str, tuple[Interval, int, float, float]]] = {}
    for network, runs in found.items():
        points[network] = {}
        for arm in (PUBLISHED, *(name for name in ARMS if name.startswith("λ"))):
            mean, count = means(runs, arm), sum(run["arm"] == arm for run in runs)
            label = "0" if arm == PUBLISHED else arm.removeprefix("λ = ")
            points[network][label] = gains(runs, arm), count, mean["only_gates"], mean["without_gates"]
    return points


def findings(runs_of_networks: Mapping[str, Records]) -> list[str]:
    """What the records say, in sentences."""
    said = []
    for network, runs in runs_of_networks.items():
        for row in accuracy_table({network: runs})["rows"]:
            if row[4] is not None:
                said.append(
                    f"{network}, block {row[1]}: accuracy {signed(row[4], 2)} points, {row[5]} (margin "
                    f"{MARGIN:g} points, {row[2]} seeds)."
                )
        for arm in (PUBLISHED, "λ = 1", "through the classifier"):
            mean, count = means(runs, arm), sum(run["arm"] == arm for run in runs)
            said.append(
                f"{network}, trained with labels, {arm}: the top decile of gates alone keeps "
                f"{mean['only_gates']:.0%} of the predictions, {mean['without_gates']:.0%} are left without "
                f"it (random channels: {mean['only_random']:.0%} and {mean['without_random']:.0%}; another "
                f"image's: {mean['only_another']:.0%} and {mean['without_another']:.0%}); the paper's rule "
                f"selects nothing on {mean['rule_empty']:.0%} of images; accuracy "
                f"{signed(gains(runs, arm), 2)} points ({count} seeds)."
            )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.premise", description=__doc__)
    parser.add_argument("network", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--part", default="0/1", help="i/n: every n-th run from the i-th")
    parser.add_argument("--gather", action="store_true", help="join the parts that are in the folder")
    chosen = parser.parse_args()
    if chosen.gather:
        gather(chosen.network, chosen.folder)
    else:
        train_all(FAMILIES[chosen.network](chosen.data, chosen.folder), chosen.folder, chosen.part)


if __name__ == "__main__":
    main()
