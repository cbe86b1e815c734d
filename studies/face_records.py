"""What was measured on the networks of :mod:`studies.face_networks`: the committed records, as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from studies.face_networks import FAMILIES
from studies.metrics import Interval, non_inferiority, t_interval
from studies.premise import MARGIN, PUBLISHED, SHIPPED, WITHOUT
from studies.tables import signed, spec

File = Mapping[str, Any]  # of :func:`records`
Runs = Sequence[Mapping[str, Any]]


def records(name: str, folder: Path = SHIPPED) -> dict[str, Any]:
    """What :func:`gather` has joined: about the training, and its ``runs``."""
    found: dict[str, Any] = json.loads((folder / f"faces-{name}.json").read_text(encoding="utf-8"))
    return found


def mean(runs: Runs, title: str, split: str, key: str) -> float:
    """A measure of an arm, averaged over seeds; NaN where it has none."""
    values = [run[split].get(key, float("nan")) for run in runs if run["arm"] == title]
    return float(np.mean(values))


def chosen(runs: Runs, among: Sequence[str]) -> str:
    """The arm whose gates say most about the face, on validation faces: the yes decisions that the top decile
    keeps alone minus those that stay without it, less the same with another face's gates.
    """

    def worth(title: str) -> float:
        own, another = (
            mean(runs, title, "val", f"only_{kind}") - mean(runs, title, "val", f"without_{kind}")
            for kind in ("gates", "another")
        )
        return own - another

    return max(among, key=worth)


def gain(runs: Runs, title: str, reference: str = WITHOUT) -> Interval:
    """Accuracy on test faces minus that of another arm, paired by seed, in points: mean and t-interval."""
    scores = {(run["arm"], run["seed"]): run["test"]["accuracy"] for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    return t_interval([100 * (scores[title, seed] - scores[reference, seed]) for seed in seeds])


def accuracy_table(
    found: Mapping[str, Mapping[str, Any]], shown: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Accuracy, balanced accuracy and AP on test faces, and the paired difference to the network without."""
    rows = []
    for name, file in found.items():
        for title in shown[name]:
            means = [
                mean(file["runs"], title, "test", key) for key in ("accuracy", "balanced_accuracy", "ap")
            ]
            row: list[Any] = [name, title, *means]
            if title == WITHOUT:
                rows.append([*row, None, None])
            else:
                points = gain(file["runs"], title)
                rows.append([*row, list(points), non_inferiority(points, MARGIN)])
    sizes = next(iter(found.values()))["faces"]
    return spec(
        "Forty attributes of real faces, with and without the SE block",
        "network | block | accuracy | balanced accuracy | AP | difference in points | verdict",
        rows,
        f"CelebA: {sizes['train']} faces trained, {sizes['test']} test faces of other people; means over "
        "attributes and three seeds. Brackets: 95 % t-interval over seeds of the paired difference. "
        f"Non-inferior: the interval lies above -{MARGIN:g} points, a margin fixed beforehand.",
    )


def premise_table(found: Mapping[str, File]) -> dict[str, Any]:
    """What the SE vectors say on test faces, arm by arm."""
    rows = []
    for name, file in found.items():
        for title in FAMILIES[name].arms:
            value = partial(mean, file["runs"], title, "test")
            pairs = []
            for kind in ("gates", "another", "random", "influence"):
                only, without = value(f"only_{kind}"), value(f"without_{kind}")
                pairs.append("" if np.isnan(only) else f"{only:.2f} / {without:.2f}")
            shares = ["" if np.isnan(value(key)) else f"{value(key):.0%}" for key in ("open", "empty")]
            rows.append([name, title, value("accuracy"), *shares, *pairs])
    return spec(
        "Of the yes decisions: kept by the top decile of channels alone / without it",
        "network | block | accuracy | gates open | rule selects nothing | by gates | another face's gates | "
        "random | influence",
        rows,
        "Test faces, means over three seeds. λ: λ·mean(s) in the loss. Standing: block and classifier alone "
        "learn, on the features of the network without a block. A block each: one SE vector for every "
        "attribute. Where another face's gates do as well, the gates are a fixed pruning.",
    )


SAID = ("accuracy", "only_gates", "without_gates", "only_another", "without_another", "empty")


def by_attribute(runs: Runs, title: str, reference: str) -> list[Interval]:
    """Accuracy of each attribute minus that of another arm, paired by seed, in points, on test faces."""
    each = {(run["arm"], run["seed"]): np.array(run["test"]["each"]["accuracy"]) for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    points = np.stack([100 * (each[title, seed] - each[reference, seed]) for seed in seeds])
    return [t_interval(column) for column in points.T]


def findings(found: Mapping[str, File], best: str) -> list[str]:
    """What the records say, in sentences."""
    said = []
    for name, file in found.items():
        points = gain(file["runs"], PUBLISHED)
        word = non_inferiority(points, MARGIN)
        said.append(
            f"Real faces, {name}: the published block changes accuracy by {signed(points, 2)} points: {word}."
        )
    for name, title in (("fine", PUBLISHED), ("fine", best), ("lite0", best)):
        runs = found[name]["runs"]
        value = partial(mean, runs, title, "test")
        said.append(
            f"Real faces, {name}, {title}: of the yes decisions the top decile of gates alone keeps "
            f"{value('only_gates'):.0%}, {value('without_gates'):.0%} stay without it; another face's gates "
            f"{value('only_another'):.0%} and {value('without_another'):.0%}; the paper's rule selects "
            f"nothing on {value('empty'):.0%}; accuracy "
            f"{signed(gain(runs, title), 2)} points."
        )
    return said
