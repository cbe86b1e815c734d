"""Faces with masks: pairs, moved faces, four faces, parts blurred out; the shipped networks and records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selib
from selib.forward import attached
from selib.pixels import normalize
from studies import face_networks, face_records, real_faces, real_parts
from studies.benchmark import Scores
from studies.data import FaceSet, load_faces
from studies.data.faces import dealt
from studies.real_faces import Pairs
from studies.twins.faces import ATTRIBUTES

NAMES = ("nose", "mouth", "glasses", "hair")


class Red(nn.Module):
    """Every logit is the mean red of the image minus a half."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(40))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].mean((2, 3)) * self.gain


def faces_of(count: int = 6) -> FaceSet:
    """Grey faces of 40x32 with a nose, a mouth and glasses, each a box; the mouth of every second is red."""
    images = torch.full((count, 3, 40, 32), 100, dtype=torch.uint8)
    parts = torch.zeros(count, 40, 32, dtype=torch.uint8)
    parts[:, 18:22, 14:18] = 1
    parts[:, 28:32, 10:22] = 2
    parts[: count // 2, 10:15, 6:26] = 3
    images[::2, 0, 28:32, 10:22] = 255
    return FaceSet(
        "hand", "test", images, torch.zeros(count, 40, dtype=torch.long), list(ATTRIBUTES), parts=parts,
        part_names=NAMES, files=[f"{i}.jpg" for i in range(count)],
    )  # fmt: skip


def test_pairs_are_faces_of_which_all_networks_say_yes() -> None:
    faces = faces_of()
    pairs = real_faces.pairs_of(faces, [Red()], ATTRIBUTES, 10)
    assert len(pairs) == 0  # grey is under the mean of ImageNet's red
    bright = replace(faces, images=faces.images + 60)
    pairs = real_faces.pairs_of(bright, [Red()], ATTRIBUTES, 2)
    names = {ATTRIBUTES[k] for k in pairs.targets.tolist()}
    assert {"Eyeglasses", "Smiling", "Big_Nose"} <= names and "Black_Hair" not in names  # nobody shows hair
    assert int(pairs.targets.bincount().max()) == 2
    glasses = (pairs.targets == ATTRIBUTES.index("Eyeglasses")).nonzero().flatten()
    assert (pairs.faces[glasses] < 3).all()  # the others wear none
    for place in range(len(pairs)):
        region = bright.region(ATTRIBUTES[int(pairs.targets[place])], [int(pairs.faces[place])])[0]
        assert torch.equal(pairs.masks[place], region)


def test_a_moved_face_takes_its_mask_along() -> None:
    image = torch.zeros(3, 40, 32, dtype=torch.uint8)
    image[:, 10:20, 8:16] = 255  # what is white is the part
    count = 30
    mask = image[0] > 0
    pairs = Pairs(
        image.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.long), mask.expand(count, -1, -1),
        torch.arange(count),
    )  # fmt: skip

    class Yes(Red):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 100

    found = real_faces.moved(pairs, [Yes()])
    assert len(found) == 4 * count
    white = found.images[:, 0] > 127
    overlap = (white & found.masks).flatten(1).sum(1) / (white | found.masks).flatten(1).sum(1)
    assert float(overlap.min()) > 0.6 and float(overlap.mean()) > 0.85
    sizes = found.masks.flatten(1).double().sum(1)
    assert sizes.max() < 80 and sizes.min() > 12  # all are shrunk, to half at the most
    centres = torch.stack([one.nonzero().double().mean(0) for one in found.masks])
    assert (centres.std(0) > 2).all()
    assert len(real_faces.moved(pairs, [Red()])) < len(found)  # a no is left out


def test_intervals_are_over_faces_not_pairs() -> None:
    pairs = Pairs(
        torch.zeros(5, 3, 4, 4),
        torch.zeros(5).long(),
        torch.ones(5, 4, 4).bool(),
        torch.tensor([7, 7, 7, 2, 2]),
    )
    values = np.array([0.0, 0.3, 0.6, 1.0, np.nan])
    assert real_faces.by_face(values, pairs, np.ones(5, bool)).tolist() == [1.0, pytest.approx(0.3)]
    scores = Scores(np.arange(5), {"a": {"ap": values}, "b": {"ap": values * 0}})
    gain, count = real_faces.gains(scores, pairs, [("a", "b")], np.ones(5, bool), resamples=50)["a", "b"]
    assert count == 2 and gain.mean == pytest.approx(0.65)


def test_one_of_four_faces_has_it() -> None:
    faces = faces_of(40)
    target = ATTRIBUTES.index("Smiling")
    images = faces.images.clone()
    images[::2, 0] = 255  # says yes
    images[1::2] = 0
    targets = faces.targets.clone()
    targets[::2, target] = 1
    one = replace(faces, images=images, targets=targets)
    pictures, asked, places = real_faces.four_faces(one, [Red()], ["Smiling"], 12)
    assert pictures.shape == (12, 3, 80, 64) and (asked == target).all() and len(set(places.tolist())) > 2
    for picture, place in zip(pictures, places.tolist(), strict=True):
        quarters = [picture[0, y : y + 40, x : x + 32].float().mean() for y in (0, 40) for x in (0, 32)]
        assert int(torch.stack(quarters).argmax()) == place

    def reds(x: Tensor, k: Tensor) -> Tensor:
        return (x[:, 0] > 0).float()

    table, found = real_faces.quadrant_table(
        {"red": reds, "all": lambda x, k: torch.ones_like(x[:, 0])}, (pictures, asked, places), resamples=20
    )
    assert found["red"].mean == pytest.approx(1) and found["all"].mean == pytest.approx(0.25)
    assert [row[0] for row in table["rows"]] == ["red", "all"]


def test_a_part_is_replaced_from_around_it() -> None:
    image = torch.full((1, 3, 30, 30), 50, dtype=torch.uint8)
    mask = torch.zeros(1, 30, 30, dtype=torch.bool)
    mask[0, 10:16, 12:18] = True
    image[:, :, 10:16, 12:18] = 250
    without = real_parts.without_part(image, mask)
    assert (without == 50).all()  # nothing of the part is left
    far = ~real_parts.metrics.dilate(mask, (1, 1))[0]
    assert torch.equal(without[0][:, far], image[0][:, far])


def test_the_logit_falls_where_the_network_looks() -> None:
    faces = faces_of(8)

    def reds(x: Tensor, k: Tensor) -> Tensor:
        red = x[:, 0] - x[:, 0].amin((1, 2), keepdim=True)
        return red / red.amax((1, 2), keepdim=True).clamp_min(1e-6)

    rows = torch.tensor([0, 1])
    nose, mouth, glasses, hair = range(4)
    fall, area = real_parts.falls(faces, rows, 0, Red()), real_parts.areas(faces, rows)
    assert fall[0, mouth] > 0.01 > abs(fall[0, nose])  # the mouth of the first is red
    assert abs(fall[1, mouth]) < 1e-3 and np.isnan(fall[:, hair]).all()
    assert area[0, mouth] == pytest.approx(48 / 1280) and area[0, hair] == 0
    share = real_parts.energies(faces, rows, 0, reds)
    assert share[0, mouth] == pytest.approx(1, rel=1e-3) and share[0, glasses] == 0
    found = {"Smiling": (torch.tensor([0, 2]), fall[[0, 0]])}
    agreed = real_parts.agreement(faces, found, {"red": reds}, ["Smiling"])["Smiling"]
    assert set(agreed) == {"red", "area of the part"}
    yes = replace(faces, images=faces.images // 2 + 110)
    chosen = real_parts.audited(yes, Red(), ["Smiling"], ["Smiling"], 12)
    table, cells = real_parts.audit_table(yes, chosen, reds, ["Smiling"], resamples=20)
    assert table["rows"] == [] and cells == {"Smiling": {}}  # on fewer than ten faces nothing is said


def test_correlations_are_over_visible_parts() -> None:
    fall = np.array([[1.0, 2, 3, 4, np.nan], [4, 3, 2, 1, 0], [1, 1, 1, 1, 1]])
    energy = np.array([[0.1, 0.2, 0.3, 0.4, 0.0], [0.1, 0.2, 0.3, 0.4, 0.5], [1, 2, 3, 4, 5]])
    assert real_parts._correlations(fall, energy).tolist() == [pytest.approx(1), pytest.approx(-1), 0]


def test_people_are_in_one_split_alone() -> None:
    people = np.random.default_rng(0).integers(0, 300, 2000)
    split = dealt(people)
    assert {tuple(np.unique(split[people == who])) for who in np.unique(people)} <= {(0,), (1,), (2,)}
    shares = np.bincount(split) / len(split)
    assert np.allclose(shares, [0.7, 0.1, 0.2], atol=0.05)


# ---- the shipped networks and their records ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arm"), [(n, a) for n, arms in face_networks.SHIPPED_ARMS.items() for a in arms]
)
def test_shipped_networks_load_and_have_their_block(name: str, arm: str) -> None:
    model = face_networks.network(name, arm)
    height, width = face_networks.FAMILIES[name].size
    logits = model(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 40)
    assert bool(attached(model)) == (face_networks.ARMS[arm].block is not None)
    if not attached(model):
        selib.attach_se(model, torch.randn(2, 3, height, width), at=face_networks.FAMILIES[name].site)
    grid = {"fine": (22, 18), "coarse": (11, 9), "lite0": (4, 3)}[name]
    assert selib.explain(model, torch.randn(1, 3, height, width)).features.shape[2:] == grid


def test_a_network_that_is_not_shipped_is_named() -> None:
    with pytest.raises(ValueError, match="has no network 'λ = 0.03' of seed 0"):
        face_networks.network("fine", "λ = 0.03")


def test_records_say_what_the_tables_say() -> None:
    records = {name: face_records.records(name) for name in ("fine", "coarse", "lite0")}
    runs = records["fine"]["runs"]
    assert face_records.chosen(runs, [a for a in face_networks.ARMS if "a block each" in a]).endswith(
        "λ = 0.3"
    )
    scores = {(run["arm"], run["seed"]): run["test"]["accuracy"] for run in runs}
    points = [100 * (scores["as published", seed] - scores["without", seed]) for seed in range(3)]
    assert face_records.gain(runs, "as published").mean == pytest.approx(np.mean(points))
    table = face_records.accuracy_table(
        records, {"fine": ["without", "as published"], "coarse": [], "lite0": []}
    )
    assert table["rows"][1][5][0] == pytest.approx(np.mean(points)) and table["rows"][1][6] == "non-inferior"
    by = face_records.by_attribute(runs, "as published", "without")
    assert len(by) == 40 and np.mean([one.mean for one in by]) == pytest.approx(np.mean(points), abs=1e-3)
    assert all(value is not None for row in face_records.premise_table(records)["rows"] for value in row)
    assert len(face_records.findings(records, "standing, a block each, λ = 0.3")) == 6


@pytest.mark.slow
def test_an_arm_is_trained_measured_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of every way of training, on faces of the twin."""
    few = load_faces("synth-faces", "test", root=tmp_path, limit=70)
    monkeypatch.setattr(
        face_networks, "sets", lambda family, root: dict.fromkeys(("train", "val", "test"), few)
    )
    arms = ("without", "λ = 0.3, late", "standing, no block", "standing, a block each, λ = 0.3")
    family = replace(face_networks.FAMILIES["coarse"], arms=arms, stored=arms)
    monkeypatch.setitem(face_networks.FAMILIES, "coarse", family)
    monkeypatch.setitem(face_networks.SHIPPED_ARMS, "coarse", dict.fromkeys(arms, 1))
    face_networks.train_all("coarse", None, tmp_path, [0], 3)
    face_networks.gather("coarse", tmp_path)
    runs = face_records.records("coarse", tmp_path)["runs"]
    assert [run["arm"] for run in runs] == list(arms) and "only_another" in runs[-1]["test"]
    for run in runs:
        model = face_networks.network("coarse", run["arm"], folder=tmp_path)
        right = (model(normalize(few.images)) > 0) == (few.targets > 0)
        assert float(right.double().mean()) == pytest.approx(
            run["test"]["accuracy"], abs=0.005
        )  # half precision
