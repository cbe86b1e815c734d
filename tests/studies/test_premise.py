"""Networks with and without SE: what is committed, what is made of it, and a training in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selib.forward import attached
from studies import premise
from studies.features import OnFeatures, feature_loader
from studies.premise import ARMS, COMPARED, PUBLISHED, WITHOUT, Family

NUMBERS = ["accuracy", "open", "rule_empty", "moved"]
NUMBERS += [
    f"{end}_{kind}" for end in ("only", "without") for kind in ("gates", "another", "random", "influence")
]


def runs(accuracy: dict[str, list[float]], **numbers: float) -> list[dict[str, Any]]:
    """Records {arm: accuracies, seed by seed}, all other numbers 0.5 or as given."""
    rest = dict.fromkeys(NUMBERS, 0.5) | numbers
    return [
        {"arm": arm, "seed": seed, "loss": [], "seconds": 1.0, **rest, "accuracy": value}
        for arm, values in accuracy.items()
        for seed, value in enumerate(values)
    ]


def everywhere(value: float) -> dict[str, list[float]]:
    return {arm: [value, value + 0.01, value + 0.02] for arm in ARMS}


def tiny(seeds: tuple[int, int] = (2, 1)) -> Family:
    """Three classes that can be told apart, in seconds."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    features = torch.rand(60, 6, generator=generator)
    features[torch.arange(60), targets] += 1

    def start(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return OnFeatures(6, 3)

    settings = {"optimizer": "adamw", "lr": 0.05}
    val = feature_loader(features, targets, 30)
    return Family(
        "tiny",
        "dots",
        start,
        lambda s: feature_loader(features, targets, 20, seed=s),
        val,
        "map",
        6,
        settings,
        seeds,
    )


@pytest.mark.parametrize("network", premise.FAMILIES)
def test_the_committed_records_have_every_arm_and_the_same_seeds(network: str) -> None:
    found = premise.records(network)
    seeds = {arm: [run["seed"] for run in found if run["arm"] == arm] for arm in ARMS}
    assert {run["arm"] for run in found} == set(ARMS)
    for arm, mine in seeds.items():
        assert mine == list(range(len(mine))) and len(mine) >= (5 if arm in COMPARED else 2)
        assert set(mine) <= set(seeds[WITHOUT]), "every difference is paired"
    if network == "lite0":
        assert all(len(seeds[arm]) == 10 for arm in COMPARED)
    for run in found:
        shares = [
            value for key, value in run.items() if key not in ("arm", "seed", "loss", "seconds", "moved")
        ]
        assert all(0 <= value <= 1 for value in shares)
        assert ("only_gates" in run) == (run["arm"] != WITHOUT)


def test_differences_are_paired_by_seed_and_judged_by_the_margin() -> None:
    plain = [0.70, 0.80, 0.90]
    found = {
        "net": runs({WITHOUT: plain, PUBLISHED: [0.70, 0.801, 0.899], "identity start": [0.68, 0.78, 0.88]})
    }
    gain = premise.gains(found["net"], PUBLISHED)
    assert gain.mean == pytest.approx(0) and gain.high == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    without, published, identity = premise.accuracy_table(found)["rows"]
    assert without[:4] == ["net", WITHOUT, 3, pytest.approx(0.8)] and without[4:] == [None, None]
    assert published[5] == "non-inferior" and identity[4][0] == pytest.approx(-2) and identity[5] == "harmed"
    wide = {"net": runs({WITHOUT: plain, PUBLISHED: [0.68, 0.82, 0.90], "identity start": plain})}
    assert premise.accuracy_table(wide)["rows"][1][5] == "undecided"


def test_the_tables_and_sentences_are_means_over_seeds() -> None:
    found = {"net": runs(everywhere(0.8), only_gates=0.25, rule_empty=1.0)}
    rows = premise.premise_table(found)["rows"]
    assert [row[1] for row in rows] == [f"{arm} (3)" for arm in ARMS]
    assert rows[1][2] == pytest.approx(0.81) and rows[1][4] == "100 %" and "0.25 / 0.50" in rows[1]
    points = premise.frontier(found)["net"]
    assert list(points) == ["0", "0.03", "0.1", "0.3", "1"]
    assert points["1"][1:] == (3, pytest.approx(0.25), pytest.approx(0.5))
    said = premise.findings(found)
    assert "+0.00 [+0.00, +0.00] points, non-inferior (margin 0.5 points, 3 seeds)" in said[0]
    assert "keeps 25% of the predictions" in said[2] and "selects nothing on 100% of images" in said[2]


def test_a_training_in_parts_is_gathered_and_what_is_shipped_answers_as_trained(tmp_path: Path) -> None:
    family = tiny()
    for part in ("0/2", "1/2"):
        premise.train_all(family, tmp_path, part)
    premise.gather("tiny", tmp_path)
    found = premise.records("tiny", tmp_path)
    assert [(run["arm"], run["seed"]) for run in found] == premise.runs_of(family)
    for arm in (WITHOUT, PUBLISHED, "λ = 1", "through the classifier"):
        model = premise.shipped(family, arm, tmp_path)
        assert bool(attached(model)) == (arm != WITHOUT) and not model.training
        again = premise.measured(model, family.val, family.site)
        then = next(run for run in found if run["arm"] == arm and run["seed"] == 0)
        assert again["accuracy"] == pytest.approx(then["accuracy"], abs=0.02)  # in half precision
    assert max(run["accuracy"] for run in found) > 0.9


def test_a_part_without_a_first_seed_is_gathered_too(tmp_path: Path) -> None:
    family = tiny((3, 3))
    count = len(premise.runs_of(family))
    premise.train_all(family, tmp_path, f"1/{count}")  # seed 1 of the first arm alone
    premise.train_all(family, tmp_path, f"0/{count}")
    premise.gather("tiny", tmp_path)
    assert [run["seed"] for run in premise.records("tiny", tmp_path)] == [0, 1]


def test_all_arms_of_a_seed_start_from_the_same_weights() -> None:
    family = tiny()
    weights = [premise.untrained(family, arm, 3).classifier.weight for arm in ARMS]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert not torch.equal(premise.untrained(family, WITHOUT, 4).classifier.weight, weights[0])


def test_records_say_where_they_come_from() -> None:
    for network in premise.FAMILIES:
        about = json.loads((premise.SHIPPED / f"{network}.json").read_text(encoding="utf-8"))
        assert {"network", "epochs", "settings", "versions", "machine", "runs"} <= set(about)
        assert len(about["versions"]["commit"]) >= 12
