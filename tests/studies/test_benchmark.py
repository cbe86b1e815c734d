"""The benchmark on a model whose answers are known: a bright square decides."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from studies import benchmark, tables
from studies import metrics as m
from studies.benchmark import run
from studies.metrics import bootstrap, paired

SIZE, COUNT = 8, 24


class Squares:
    """Images of one bright 4 × 4 square on faint noise; the target tells whether it is in channel 0 or 1."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.targets = torch.randint(2, (COUNT,), generator=g)
        self.masks = torch.zeros(COUNT, SIZE, SIZE, dtype=torch.bool)
        self.images = 0.1 * torch.rand(COUNT, 3, SIZE, SIZE, generator=g)
        for i, (y, x) in enumerate(torch.randint(SIZE - 4, (COUNT, 2), generator=g).tolist()):
            self.masks[i, y : y + 4, x : x + 4] = True
            self.images[i, self.targets[i], y : y + 4, x : x + 4] += 3
        self.asked: list[list[int]] = []

    def batch(self, indices: Tensor) -> Tensor:
        self.asked.append(indices.tolist())
        return self.images[indices]

    def truth(self, indices: Tensor) -> Tensor:
        return self.masks[indices]


class Compare(nn.Module):
    """Logits: the mean of channel 0 and of channel 1, sharpened. Notes the mode it is called in."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(5.0))
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.modes.add(self.training)
        return self.gain * x[:, :2].mean((2, 3))


def bright(images: Tensor, targets: Tensor) -> Tensor:
    """The right answer."""
    return (images.amax(1) > 2).float()


def dark(images: Tensor, targets: Tensor) -> Tensor:
    return (images.amax(1) <= 2).float()


def soft(images: Tensor, targets: Tensor) -> Tensor:
    """Half the answer: the square at 1, the rest at 0.6, so that the IoU threshold matters."""
    return 0.6 + 0.4 * bright(images, targets)


EXPLAINERS = {"bright": bright, "dark": dark, "soft": soft}
TEST, VALIDATION = list(range(4, COUNT)), [0, 1, 2, 3]
ALL = (*benchmark.LOCALISATION, "iou", *benchmark.FAITHFULNESS)


@pytest.fixture(scope="module")
def scores() -> benchmark.Scores:
    return run(
        Compare(), Squares(), EXPLAINERS, TEST, metrics=ALL, threshold_indices=VALIDATION, batch_size=7
    )


def test_the_right_map_wins_every_column_and_the_wrong_one_loses(scores):
    table = scores.summary()
    for metric in ("pointing", "energy", "iou", "ap"):
        assert table["bright"][metric]["mean"] == 1
        assert table["dark"][metric]["mean"] < 0.35
        assert table["bright"][metric]["n"] == len(TEST)
    for metric in ("deletion", "insertion", "road"):
        gap = tables.compare([scores], "bright", "dark", metric)
        assert gap.mean > 0 and gap.low > 0


def test_each_value_is_the_measure_of_that_image(scores):
    data, model = Squares(), Compare()
    images, targets, masks = data.images[TEST], data.targets[TEST], data.masks[TEST]
    maps = soft(images, targets)
    row = scores.values["soft"]
    assert scores.indices.tolist() == TEST
    assert row["energy"] == pytest.approx(m.energy_in_mask(maps, masks).numpy())
    assert row["ap"] == pytest.approx(m.average_precision(maps, masks).numpy())
    for metric, measure in benchmark.FAITHFULNESS.items():
        assert row[metric] == pytest.approx(measure(model, images, maps, targets).numpy(), abs=1e-6)
    found = scores.summary()["soft"]["energy"]
    assert (found["mean"], found["low"], found["high"]) == bootstrap(row["energy"])
    expected = paired(row["energy"], scores.values["dark"]["energy"])
    assert tables.compare([scores], "soft", "dark", "energy") == expected


def test_the_threshold_is_that_of_the_validation_images(scores):
    data = Squares()
    for name, explain in EXPLAINERS.items():
        maps = explain(data.images[VALIDATION], data.targets[VALIDATION])
        threshold = m.best_threshold(maps, data.masks[VALIDATION])
        assert threshold == 0.625 or name != "soft"
        maps = explain(data.images[TEST], data.targets[TEST])
        assert scores.cell(name, "iou") == pytest.approx(m.iou(maps, data.masks[TEST], threshold).numpy())
    assert scores.summary()["soft"]["iou"]["mean"] == 1


def test_the_summary_is_json(scores):
    assert json.loads(json.dumps(scores.summary())) == scores.summary()
    assert scores.seconds.keys() == EXPLAINERS.keys() and min(scores.seconds.values()) >= 0


def test_two_runs_give_the_same_numbers_at_any_batch_size(scores):
    again = run(
        Compare(), Squares(), EXPLAINERS, TEST, metrics=ALL, threshold_indices=VALIDATION, batch_size=20
    )
    for name, row in again.values.items():
        for metric, values in row.items():
            assert values == pytest.approx(scores.values[name][metric], abs=1e-6)


def test_parts_nest_and_say_how_many():
    found = run(
        Compare(),
        Squares(),
        EXPLAINERS,
        TEST,
        metrics=["energy", "deletion"],
        limits={"dark": 6},
        faithfulness_images=9,
        batch_size=4,
    )
    counts = {name: {k: int(v["n"]) for k, v in row.items()} for name, row in found.summary().items()}
    assert counts == {
        "bright": {"energy": 20, "deletion": 9},
        "dark": {"energy": 6, "deletion": 6},
        "soft": {"energy": 20, "deletion": 9},
    }
    measured = ~np.isnan(found.values["bright"]["deletion"])
    dark_measured = ~np.isnan(found.values["dark"]["deletion"])
    assert (measured & dark_measured).sum() == 6  # the smaller part lies within the larger one
    assert np.flatnonzero(measured).tolist() != list(range(9))  # and is not the head of the list
    x, y = found.values["bright"]["energy"], found.values["dark"]["energy"]
    expected = paired(x[dark_measured], y[dark_measured])
    assert tables.compare([found], "bright", "dark", "energy") == expected


def test_a_set_without_truth_can_be_scored_on_faithfulness():
    data = Squares()
    data.truth = None  # type: ignore[assignment, method-assign]
    found = run(Compare(), data, {"bright": bright}, TEST, metrics=["deletion"])
    assert list(found.values["bright"]) == ["deletion"]


def test_the_task_reaches_the_faithfulness_measures():
    data, model = Squares(), Compare()
    found = run(model, data, {"bright": bright}, TEST, metrics=["deletion"], task="multilabel")
    images, targets = data.images[TEST], data.targets[TEST]
    expected = m.deletion(model, images, bright(images, targets), targets, task="multilabel")
    assert found.cell("bright", "deletion") == pytest.approx(expected.numpy(), abs=1e-6)


def test_the_model_is_asked_in_evaluation_mode_and_left_in_its_own():
    model = Compare().train()
    run(model, Squares(), {"bright": bright}, TEST, metrics=["insertion", "road"])
    assert model.modes == {False} and model.training and model.gain.grad is None


def test_time_is_the_explainers_alone(monkeypatch):
    clock = [0.0]

    def slow(images: Tensor, targets: Tensor) -> Tensor:
        clock[0] += 2.0 * len(images)
        return bright(images, targets)

    def measure(heatmaps: Tensor, truth: Tensor) -> Tensor:
        clock[0] += 100
        return m.energy_in_mask(heatmaps, truth)

    monkeypatch.setattr(benchmark, "_now", lambda device: clock[0])
    measures = {"energy": measure}
    found = run(Compare(), Squares(), {"slow": slow}, TEST, metrics=["energy"], localisation=measures)
    assert found.seconds["slow"] == 2.0


def test_images_are_asked_for_in_batches():
    data = Squares()
    run(Compare(), data, {"bright": bright}, TEST, metrics=["energy"], batch_size=8)
    assert [len(a) for a in data.asked] == [8, 8, 4]
    assert sorted(i for part in data.asked for i in part) == TEST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["energie"]}, "energie.*choose from ap"),
        ({"threshold_indices": []}, "threshold_indices"),
        ({"threshold_indices": [3, 4]}, "threshold_indices=…, images that are not in indices"),
        ({"limits": {"bright": 1}}, "two images"),
        ({"indices": [5]}, "two images"),
        ({"faithfulness_images": 1}, "two images"),
        ({"task": "regression"}, "task='regression' is unknown"),
    ],
)
def test_bad_arguments_are_named(options, message):
    options = {"indices": TEST, "metrics": ALL, "threshold_indices": VALIDATION} | options
    with pytest.raises(ValueError, match=message):
        run(Compare(), Squares(), EXPLAINERS, **options)


def test_asking_for_what_was_not_measured_lists_what_was(scores):
    with pytest.raises(ValueError, match="'grad-cam'.*bright, dark, soft"):
        scores.cell("grad-cam", "energy")
    with pytest.raises(ValueError, match="'f1'.*ap, pointing"):
        scores.cell("dark", "f1")


def test_a_measure_of_ones_own_stands_beside_the_others():
    def near(maps: Tensor, truth: Tensor) -> Tensor:
        return m.energy_in_mask(maps, m.dilate(truth, (1, 1)))

    data = Squares()
    even = {"even": lambda images, targets: torch.ones(len(images), SIZE, SIZE)}
    options = {"localisation": {"near": near, "energy": m.energy_in_mask}}
    scores = run(Compare(), data, even, range(COUNT), metrics=("near", "energy"), **options)
    grown = m.dilate(data.masks, (1, 1)).flatten(1).double().mean(1)
    assert np.allclose(scores.cell("even", "near"), grown)
    with pytest.raises(ValueError, match="'pointing'"):
        run(Compare(), data, even, range(COUNT), metrics=("pointing",), **options)
