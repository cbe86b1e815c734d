"""The study of attributes: each measure against an answer known beforehand, and real CelebA in a dry run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selib
import studies.data
import studies.networks
from selib.features import only_block
from studies import explainers, face_parts, shortcut
from studies import faces as attributes
from studies import recipes as recipe
from studies.baselines import Explainer
from studies.data import FaceSet, load_faces
from studies.data import faces as celeba
from studies.faces import Pairs
from studies.profiles import PROFILES
from studies.twins.faces import ATTRIBUTES, PARTS

SMOKE = PROFILES["smoke"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faces")


@pytest.fixture(scope="module")
def faces(root: Path) -> FaceSet:
    return load_faces("synth-faces", "test", root=root, limit=60)


@pytest.fixture(scope="module")
def item(root: Path) -> recipe.Recipe:
    small = replace(SMOKE, face_train=64, face_test=60)
    return attributes.faces_of(small, root)


@pytest.fixture(scope="module")
def shipped(item: recipe.Recipe) -> nn.Module:
    return recipe.network(item, se=True, seed=0).eval()


def index(name: str) -> int:
    return ATTRIBUTES.index(name)


# ---- data and networks -----------------------------------------------------------------------------------


def test_one_attribute_makes_a_binary_study_that_starts_from_nothing(root: Path) -> None:
    small = replace(SMOKE, face_train=64, face_test=30, lone_train=64, lone_epochs=3)
    lone = attributes.faces_of(small, root, attributes=["Smiling"], split="spurious")
    assert lone.train.targets.shape == (64, 1) and lone.train.classes == ["Smiling"] and lone.shipped is None
    assert lone.epochs == 3 and lone.train.split == "spurious" and lone.val.split == "test"
    assert lone.name == "synth-faces-spurious-Smiling"
    with pytest.raises(ValueError, match=r"attributes=\['Beautiful'\] are unknown"):
        attributes.faces_of(small, root, attributes=["Beautiful"])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "mobilenet_v3_large"])
def test_other_networks_can_be_studied_with_the_same_measures(root: Path, architecture: str) -> None:
    small = replace(SMOKE, face_train=64, face_test=30)
    other = attributes.faces_of(small, root, architecture=architecture)
    assert other.name == f"synth-faces-{architecture}" and other.shipped is None
    model = recipe.network(other, se=True, seed=0).eval()
    images, targets = other.val.batch(slice(0, 2)), torch.tensor([31, 15])
    assert model(images).shape == (2, 40)
    makers = attributes.explainers_of(model, model, 0)
    cam = "Grad-CAM" if architecture.startswith("mobilenet") else explainers.SAME_AS_CAM
    for name in ("SE influence", cam, "mean of channels", explainers.SAME_COUNT):
        assert makers[name](images, targets).shape == (2, 88, 72), name
    assert explainers.last_map(recipe.network(other, se=False, seed=0)) in ("layer4", "features")


def test_the_shipped_network_names_the_attributes_of_faces_it_has_not_seen(item: recipe.Recipe) -> None:
    assert item.shipped is not None
    logits, targets = selib.predict(recipe.network(item, se=False, seed=0), item.val.loader(60))
    assert float(((logits > 0) == (targets > 0)).double().mean()) > 0.95


@pytest.mark.slow
def test_the_recipe_for_real_celeba_runs_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    celeba.write_faces(tmp_path / "made", {"train": 8, "val": 2, "test": 4}, seed=0)
    (tmp_path / "made" / "celeba").rename(tmp_path / "celeba")
    monkeypatch.setattr(attributes, "on_gpu", lambda device: True)
    real = attributes.faces_of(PROFILES["full"], tmp_path)
    assert (real.name, real.architecture, real.image_size) == ("celeba", "resnet18_small_image", (112, 92))
    assert (
        real.epochs == PROFILES["full"].face_gpu_epochs and not real.train.synthetic and real.shipped is None
    )
    assert PROFILES["full"].celeba_limit is None, "all 162,770 images"
    for per_target in (False, True):
        model = recipe.network(real, se=True, seed=0, per_target=per_target)
        history = selib.fit(
            model,
            real.train.loader(4, train=True),
            epochs=1,
            optimizer="adamw",
            lr=2e-3,
            task="multilabel",
            progress=False,
        )
        assert len(history) == 1 and history[0]["loss"] > 0
        ex = selib.explain(model.eval(), real.val.batch([0]))
        assert ex.heatmap(target=31).shape == (1, 112, 92)


# ---- where the maps lie ----------------------------------------------------------------------------------


def test_pairs_show_each_attribute_on_faces_that_have_it(item: recipe.Recipe, shipped: nn.Module) -> None:
    pairs = attributes.explained_pairs(item, [shipped], 3)
    assert isinstance(item.val, FaceSet) and item.val.parts is not None
    assert {pairs.faces.classes[k] for k in pairs.targets.unique().tolist()} <= set(attributes.LOCALISED)
    assert bool((item.val.targets[pairs.rows, pairs.targets] > 0).all())
    assert int(pairs.targets.bincount().max()) <= 3
    truth = pairs.truth(torch.arange(len(pairs)))
    glasses = (pairs.targets == index("Eyeglasses")).nonzero().flatten()
    for place in glasses.tolist():
        assert torch.equal(truth[place], item.val.parts[pairs.rows[place]] == 1 + PARTS.index("glasses"))
    # batch mates and order do not matter
    assert torch.equal(pairs.truth(torch.tensor([4, 1])), truth[[4, 1]])
    whole = replace(item, val=attributes.pick(item.val, ["Male", "Young"]))
    with pytest.raises(ValueError, match="none of Male, Young has a place in a face"):
        attributes.explained_pairs(
            whole, [recipe.network(replace(whole, from_shipped=False), se=False, seed=0)], 3
        )


@pytest.mark.slow
def test_a_map_of_the_part_itself_has_all_its_energy_there_and_one_of_everything_has_the_area(
    item: recipe.Recipe, shipped: nn.Module
) -> None:
    pairs = attributes.explained_pairs(item, [shipped], 2)
    scores = attributes.localise(shipped, shipped, pairs, slow=2, seed=0)
    truth = pairs.truth(torch.arange(len(pairs)))
    area = truth.flatten(1).double().mean(1).numpy()
    assert np.allclose(scores.cell(attributes.CHANCE, "energy"), area, atol=1e-6)
    near = scores.cell("SE influence", "near")
    assert (near >= scores.cell("SE influence", "energy") - 1e-9).all() and near.mean() > scores.cell(
        "uniform noise", "near"
    ).mean()


# ---- what only a twin can answer -------------------------------------------------------------------------


class Sum(nn.Module):
    """Logit k is the mean of colour k: its fall without a part can be computed from two pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) + self.nothing


def test_falls_are_those_of_the_face_drawn_again(faces: FaceSet) -> None:
    assert faces.params is not None
    falls = face_parts.Removals.draw(faces, {0: ["mouth", "hair"], 3: ["nose"]}).falls(Sum())
    assert falls[0].shape == (2, 3) and falls[3].shape == (1, 3)
    again = torch.from_numpy(celeba.rendered([(faces.params[0], ["hair"])], (88, 72))[:, :3])
    want = faces.batch([0]).mean((2, 3)) - studies.data.normalize(again).mean((2, 3))
    assert torch.allclose(falls[0][1], want[0], atol=1e-5) and float(want.abs().max()) > 0.01


def test_part_deletion_knows_a_true_map_from_a_false_one(faces: FaceSet) -> None:
    assert faces.parts is not None
    rows = torch.tensor([0, 1, 2])
    pairs = Pairs(faces, rows, torch.zeros(3, dtype=torch.long))
    shown = {row: face_parts.visible(faces, row) for row in rows.tolist()}

    class Known(face_parts.Removals):
        def falls(self, model: nn.Module) -> dict[int, Tensor]:
            # the logit falls by the place of the part in the list: a true map has that much energy on each
            return {row: torch.arange(len(parts)).float()[:, None] for row, parts in self.parts.items()}

    def of_energy(sign: int) -> Explainer:
        def maps(images: Tensor, targets: Tensor) -> Tensor:
            out = torch.zeros(3, 88, 72)
            for place, (row, parts) in enumerate(shown.items()):
                for rank, part in enumerate(parts):
                    mask = faces.parts[row] == 1 + PARTS.index(part)  # type: ignore[index]
                    out[place][mask] = (100 + sign * rank) / float(mask.sum())
            return out

        return maps

    found = face_parts.part_deletion(
        Sum(), pairs, {"true": of_energy(1), "false": of_energy(-1)}, Known(shown, torch.empty(0))
    )
    assert np.allclose(found["true"], 1) and np.allclose(found["false"], -1)
    assert (np.abs(found["area of the part"]) < 1).all()
    table = face_parts.correlation_table({"net": found}, resamples=20)
    assert table["rows"][0] == ["true", [1.0, 1.0, 1.0]]


def test_visible_parts_are_large_enough_to_be_seen(faces: FaceSet) -> None:
    assert faces.parts is not None and faces.params is not None
    for row in range(10):
        parts = face_parts.visible(faces, row)
        for part in parts:
            assert int((faces.parts[row] == 1 + PARTS.index(part)).sum()) >= attributes.PIXELS
        assert ("hat" in parts) == (faces.params[row]["Wearing_Hat"])


def test_the_shortcut_is_compared_pair_by_pair(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = load_faces("synth-faces", "test", root=root, limit=120)
    lone = attributes.pick(many, ["Eyeglasses"])
    networks = []
    for seed in range(2):
        pair = {}
        for name in ("clean", "spurious"):
            torch.manual_seed(10 * seed + len(name))
            pair[name] = studies.networks.build("small_resnet", 1, image_size=88, widths=(8, 8, 16)).eval()
            nn.init.constant_(pair[name].classifier.bias, 99.0)  # all of them say glasses, always
            selib.attach_se(pair[name], lone.batch([0]), start="paper")
        networks.append(pair)
    study = shortcut.study(networks, lone, resamples=50)
    both = (lone.targets[:, 0] * many.targets[:, index("Wearing_Hat")]).nonzero().flatten()
    assert study["rows"].tolist() == both.tolist()
    rise = {name: np.subtract(runs["spurious"], runs["clean"]) for name, runs in study["energy"].items()}
    assert rise["SE influence"].shape == (2, len(both))
    assert study["rise"]["SE influence"].mean == pytest.approx(rise["SE influence"].mean())
    beyond = rise["SE influence"] - rise["mean of channels"]
    assert study["beyond"]["SE influence"].mean == pytest.approx(beyond.mean())
    assert study["rise"][attributes.CHANCE].mean == pytest.approx(0.0)
    assert study["fooled"]["clean"] == {"hat": 1.0, "bare head": 1.0}
    table = shortcut.table(study, resamples=50)
    assert [row[0] for row in table["rows"]][-2:] == [
        "truth: fall of the logit without the hat",
        "truth: fall of the logit without the glasses",
    ]


@pytest.mark.slow
def test_the_shipped_pairs_know_glasses_and_half_of_them_the_hat(root: Path) -> None:
    lone = attributes.pick(load_faces("synth-faces", "test", root=root, limit=400), ["Eyeglasses"])
    for pair in shortcut.pairs():
        for model in pair.values():
            said = selib.predict(model, lone.loader(200))[0] > 0
            assert float((said == (lone.targets > 0)).double().mean()) > 0.85
    fooled = shortcut.study(shortcut.pairs(), lone, resamples=20)["fooled"]
    assert fooled["spurious"]["hat"] > fooled["clean"]["hat"] + 0.03


def test_with_and_without_is_the_same_face_drawn_again(shipped: nn.Module, faces: FaceSet) -> None:
    images, targets, titles = face_parts.with_and_without(shipped, faces, ["Eyeglasses", "Wearing_Hat"])
    assert len(images) == len(targets) == len(titles) == 4
    assert titles[0].startswith("with\nEyeglasses") and titles[1].startswith("drawn without\nEyeglasses")
    logits = shipped(studies.data.normalize(images))[torch.arange(4), targets]
    assert logits[0] > 0 > logits[1] and logits[2] > 0 > logits[3], "the attribute goes with its part"


def test_without_parameters_the_other_picture_is_of_the_same_person(
    shipped: nn.Module, faces: FaceSet
) -> None:
    persons = torch.arange(len(faces)) % 3
    known = replace(faces, params=None, identities=persons)
    images, _, titles = face_parts.with_and_without(shipped, known, ["Smiling"])
    row = next(r for r in range(len(faces)) if torch.equal(faces.images[r], images[0]))
    other = next(r for r in range(len(faces)) if torch.equal(faces.images[r], images[1]))
    assert persons[row] == persons[other] and faces.targets[other, index("Smiling")] == 0
    assert titles[1].startswith("without\nSmiling")
    _, _, titles = face_parts.with_and_without(
        shipped, replace(faces, params=None, identities=None), ["Smiling"]
    )
    assert titles[1].startswith("another, without\nSmiling")
    everybody = replace(faces, params=None, targets=torch.ones_like(faces.targets))
    with pytest.raises(ValueError, match="of no face the network says Smiling, or every face has it"):
        face_parts.with_and_without(shipped, everybody, ["Smiling"])


def test_failures_are_wrong_and_the_surest_first(shipped: nn.Module, faces: FaceSet) -> None:
    rows, about, titles = attributes.failures(shipped, faces, 5)
    logits, targets = selib.predict(shipped, faces.loader(60))
    margin = logits[rows, about]
    assert bool(((margin > 0) != (targets[rows, about] > 0)).all())
    assert margin.abs().tolist() == sorted(margin.abs().tolist(), reverse=True)
    assert len(set(rows.tolist())) == len(rows) == len(titles)


@pytest.mark.slow
def test_an_audit_finds_what_a_rule_rests_on(shipped: nn.Module, faces: FaceSet) -> None:
    table, cells = face_parts.audit(shipped, faces, ["Attractive", "No_Such"], most=12, resamples=20)
    assert list(cells) == ["Attractive"]
    falls = {part: fall for part, (_, fall) in cells["Attractive"].items() if fall is not None}
    assert max(falls, key=falls.__getitem__) == "mouth", "lipstick and a smile make it in the planted rule"
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    real = replace(faces, params=None, parts=None, part_names=())
    _, boxes = face_parts.audit(shipped, real, ["Male"], most=6, resamples=20)
    assert "mouth" in boxes["Male"] and boxes["Male"]["mouth"][1] is None


def test_gates_keep_the_answers_and_name_the_channels(item: recipe.Recipe) -> None:
    plain = recipe.network(item, se=False, seed=0).eval()
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    gated, _, test = attributes.gates_for(item, plain, per_target=True, sparsity=0.3, epochs=40, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items()), (
        "the network itself is not touched"
    )
    assert selib.explain(gated, item.val.batch([0, 1])).gates.shape == (2, 40, 128)
    right = selib.channel_test(only_block(gated), test, task="multilabel", seed=0)
    yes = test.logits > 0
    kept = {name: float(values[yes].double().mean()) for name, values in right.items()}
    assert kept["original_only_top"] > kept["random_only"]
    assert kept["original_without_top"] < kept["random_without"]
