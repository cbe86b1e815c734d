"""Frozen networks: features that are kept, heads that start at them, gates, maps, mosaics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selib.attach import attach_se
from selib.explainer import explain
from selib.features import only_block
from selib.heatmap import normalize
from studies import baselines, frozen
from studies.data import ImageSet
from studies.features import OnFeatures, feature_loader, head_of, kept_maps, pooled
from studies.frozen import Photographs
from studies.metrics import average_precision

C, CLASSES = 12, 5


class Body(nn.Module):
    """A network with timm's names: 24 pixels -> 6 cells."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, C, 4, stride=4)
            self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.classifier = nn.Linear(C, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.global_pool(self.conv(x).relu()))


def images(count: int = 30, seed: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 24, 24), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[2, 3, 10, 12]]).repeat(count, 1)
    boxes[::5] = torch.tensor([0, 0, 24, 20])  # more than half of the picture
    return ImageSet("dots", "val", pixels, torch.arange(count) % CLASSES, list("abcde"), boxes=boxes)


def photographs(work: Path, seed: int = 0) -> Photographs:
    body, data = Body(seed).eval(), images(60)
    features = pooled(body, data, work)
    with torch.no_grad():
        body.classifier.weight *= 30
        body.classifier.bias.copy_(-body.classifier.weight @ features.mean(0))  # so that it says every class
    head = head_of(body)
    with torch.no_grad():
        data.targets[::2] = head(features[:, :, None, None]).argmax(1)[::2]  # right on every other image
    return Photographs("dots", body, head, features, features, data, data.truth(slice(None)))


def planted(count: int = 400) -> tuple[OnFeatures, Tensor]:
    """A head whose five classes read two channels each, and pooled features that switch two on."""
    head = OnFeatures(C, CLASSES).eval().requires_grad_(False)
    head.classifier.weight.copy_(3 * torch.eye(CLASSES).repeat_interleave(2, 1) @ torch.eye(10, C))
    head.classifier.bias.zero_()
    generator = torch.Generator().manual_seed(0)
    z = 0.4 * torch.rand(count, C, generator=generator)
    for row, k in enumerate(torch.randint(CLASSES, (count,), generator=generator).tolist()):
        z[row, 2 * k : 2 * k + 2] += 1
    return head, z


# ---- features ----------


def test_a_head_says_the_same_of_maps_of_their_means_and_as_the_network(tmp_path: Path) -> None:
    body, data = Body().eval(), images()
    maps, means = kept_maps(body, data, tmp_path), pooled(body, data, tmp_path)
    x = data.batch(slice(None))
    with torch.no_grad():
        F = body.conv(x).relu()
        assert maps.dtype == torch.float16 and torch.allclose(maps.float(), F, atol=1e-2)
        assert torch.allclose(means, F.mean((2, 3)), atol=1e-5)
        head = head_of(body)
        assert torch.allclose(head(F), body(x), atol=1e-5)
        assert torch.allclose(head(means[:, :, None, None]), body(x), atol=1e-5)


def test_what_is_kept_is_read_again_until_a_weight_or_an_image_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, data = Body().eval(), images()
    first = pooled(body, data, tmp_path)
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: pytest.fail("it ran again"))
    assert torch.equal(pooled(body, data, tmp_path), first)
    with torch.no_grad():
        body.classifier.weight += 1  # no part of the body
    assert torch.equal(pooled(body, data, tmp_path), first)
    monkeypatch.undo()
    other = images(seed=1)
    assert not torch.equal(pooled(body, other, tmp_path), first)
    with torch.no_grad():
        body.conv.weight += 0.1
    assert not torch.equal(pooled(body, data, tmp_path), first)
    assert len(list(tmp_path.glob("features-*"))) == 3


def test_batches_of_features_are_mixed_by_the_seed_and_keep_their_targets() -> None:
    features, targets = torch.arange(10.0)[:, None], torch.arange(10)
    in_order = torch.cat([y for _, y in feature_loader(features, targets, 4)])
    assert in_order.tolist() == list(range(10))
    mixed = [torch.cat([y for _, y in feature_loader(features, targets, 4, seed=s)]) for s in (0, 0, 1)]
    assert torch.equal(mixed[0], mixed[1]) and not torch.equal(mixed[0], mixed[2])
    for x, y in feature_loader(features, targets, 4, seed=0):
        assert torch.equal(x.flatten(), y.float())


def test_a_linear_head_is_regularised_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 4, generator=generator), torch.arange(80) % 3
    x[:, 0] += y
    ours = frozen.linear_head(x, y, 3, decay=0.01)
    theirs = LogisticRegression(C=1 / (0.01 * 80), tol=1e-8, max_iter=1000).fit(x.numpy(), y.numpy())
    with torch.no_grad():
        p = ours(x[:, :, None, None]).softmax(1)
    assert np.allclose(p, theirs.predict_proba(x.numpy()), atol=2e-3)


# ---- gates ----------


def test_gates_of_planted_channels_suffice_and_those_of_another_image_do_not() -> None:
    head, z = planted()
    before = head.classifier.weight.clone()
    _, shares, report = frozen.gates(head, z[:300], z[300:], seed=0, sparsity=0.1)
    assert torch.equal(head.classifier.weight, before) and report.images == 300
    assert shares["agreement"] == shares["only"] == shares["only_mean"] == 1
    assert shares["without"] < 0.5 and shares["only_another"] < 0.5 and shares["rule_empty"] == 0
    assert shares["open"] <= 2 / C + 1e-9
    again = frozen.gates(head, z[:300], z[300:], seed=0, sparsity=0.1)[1]
    assert again == shares


def test_the_whole_network_has_the_gates_and_the_answers_of_its_head(tmp_path: Path) -> None:
    net = photographs(tmp_path)
    gated, _, _ = frozen.gates(net.head, net.unlabelled, net.held, epochs=2)
    model = frozen.whole(net, gated)
    x = net.val.batch(slice(0, 6))
    ex, on_features = explain(model, x), explain(gated, net.held[:6, :, None, None])
    assert only_block(model).transparent and torch.equal(ex.logits, net.body(x))
    assert torch.allclose(ex.gates, on_features.gates, atol=1e-5)
    assert torch.allclose(ex.logits, on_features.logits, atol=1e-5)


# ---- maps ----------


def test_explained_are_images_that_all_networks_are_right_on_and_that_leave_room(tmp_path: Path) -> None:
    nets = [photographs(tmp_path), photographs(tmp_path)]
    nets[1].val.targets[:10] = (nets[1].val.targets[:10] + 1) % CLASSES  # wrong there
    rows, others = frozen.explained_images(nets, 12, 4)
    assert len(others) == 4 and 0 < len(rows) <= 12 and not set(rows.tolist()) & set(others.tolist())
    for row in [*rows.tolist(), *others.tolist()]:
        assert row >= 10 and row % 5 and all(net.right[row] for net in nets)
    everything, few = frozen.explained_images(nets, 1000, 1000)
    both = set(everything.tolist()) | set(few.tolist())
    right = nets[0].right & nets[1].right
    assert both == {row for row in range(60) if right[row] and row % 5}


def test_ablation_cam_is_what_a_pass_without_each_channel_gives() -> None:
    head, _ = planted()
    maps = torch.rand(6, C, 3, 3, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(6) % CLASSES
    slow = baselines.cams(head, "map")["Ablation-CAM"](maps, targets)
    attach_se(head, maps, at="map", form="head")
    assert torch.allclose(normalize(frozen.ablation_cam(head, maps, targets)), slow, atol=1e-5)


def test_scores_of_other_gates_take_over_what_no_gate_decides(tmp_path: Path) -> None:
    net = photographs(tmp_path)
    rows, others = frozen.explained_images([net], 8, 3)
    shown, other = (frozen.map_set(net, part, tmp_path) for part in (rows, others))
    heads = [frozen.gates(net.head, net.unlabelled, net.held, seed=s, epochs=5)[0] for s in (0, 1)]
    first = frozen.scores(heads[0], shown, other, seed=0)
    second = frozen.scores(heads[1], shown, other, seed=0, done=first)
    anew = frozen.scores(heads[1], shown, other, seed=0)
    assert set(second.values) == set(anew.values) == set(first.values)
    for name, row in anew.values.items():
        assert set(row) == {"ap", "pointing", "energy", "iou"}
        for metric, values in row.items():
            assert np.allclose(values, second.values[name][metric], equal_nan=True), (name, metric)
    mean = kept_maps(net.body, net.val.subset(rows), tmp_path).float().mean(1)
    by_hand = average_precision(frozen._at((24, 24), lambda m, t: mean)(None, None), net.truth[rows])
    assert np.allclose(first.values[frozen.MEAN]["ap"], by_hand)


def test_scores_of_parts_are_joined_in_order(tmp_path: Path) -> None:
    net = photographs(tmp_path)
    head, _, _ = frozen.gates(net.head, net.unlabelled, net.held, epochs=2)
    sets = [frozen.map_set(net, torch.tensor(part), tmp_path) for part in ([1, 2, 3], [4, 6])]
    parts = [frozen.scores(head, one, None, seed=0) for one in sets]
    both = frozen.joined(parts)
    assert both.indices.tolist() == [0, 1, 2, 3, 4]
    assert both.values[frozen.CAM]["ap"].tolist() == [v for p in parts for v in p.values[frozen.CAM]["ap"]]


def test_mosaics_are_made_of_images_that_the_network_is_right_and_sure_about(tmp_path: Path) -> None:
    net = photographs(tmp_path)
    grid = frozen.grids(net, 6, tmp_path, sure=0.0)
    assert grid.images.shape == (6, C, 12, 12) and grid.images.dtype == torch.float32
    with torch.no_grad():  # the upper left quarter is the map of an image of the first class
        said = net.head(grid.images[:, :, :6, :6]).argmax(1)
    assert torch.equal(said, grid.targets[:, 0])


# ---- tables ----------


def a_row(count: int, **changed: float) -> dict[str, object]:
    ends = ("", "_mean", "_another", "_random")
    row = {f"{kind}{end}": 0.5 for kind in ("only", "without") for end in ends}
    about = {"task": "dots, 5 classes", "form": "head", "count": count}
    return {**about, "agreement": 0.957, "open": 0.03, "rule_empty": 0.25, **row, **changed}


def test_the_table_and_the_sentences_say_what_the_numbers_say() -> None:
    rows = [a_row(100, only=0.944, without=0.044), a_row(500), a_row(2000, only_another=0.021)]
    table = frozen.gate_table(rows)
    first = table["rows"][0]
    assert first[:6] == ["dots, 5 classes", "through the classifier", 100, "95.7 %", "3.0 %", "25.0 %"]
    assert first[6] == "0.944 / 0.044" and len(first) == len(table["columns"])
    shares = np.full((8, 4), 0.4)
    game = {"dots": {frozen.CONTRAST: shares + 0.1, frozen.CAM: shares}}
    said = frozen.findings(rows, game, resamples=50)
    assert [text.split(" unlabelled")[0][-4:].strip() for text in said[:-1]] == ["100", "2000"]
    assert "agreement 95.7%" in said[0] and "(another image's: 2.1% and 50.0%)" in said[1]
    assert "log-odds 0.500, CAM 0.400, a gain of +0.100 [+0.100, +0.100] (n = 8" in said[-1]
    grid = frozen.grid_table(game, resamples=50)
    assert [row[1] for row in grid["rows"]] == [frozen.CONTRAST, frozen.CAM]
    assert grid["rows"][0][3] == pytest.approx([0.1] * 3) and grid["rows"][1][3] is None
