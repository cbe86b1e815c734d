"""Training, evaluation and checkpoints: what is learned, what is resumed, what is written, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models as zoo
import torch
import torchmetrics.functional.classification as tm
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import image, open_and_close, random, run, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selib import train as t
from selib.attach import attach_se, attached
from selib.explanation import explain
from selib.train import (
    attribute_scores,
    evaluate,
    fit,
    load_checkpoint,
    load_weights,
    predict,
    save_checkpoint,
)
from studies.data import ImageSet
from studies.networks import build
from studies.networks.small_resnet import small_resnet

WIDTHS = (4, 6, 8)


class Toy(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(x).mean((2, 3))))


def toy(*, se: bool = False, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = Toy(classes)
    if se:
        attach_se(model, torch.zeros(1, 3, 8, 8), start="paper", reduction=2)
    return model


def colours(n: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with the red, green or blue channel raised."""
    labels = torch.arange(n) % 3
    return random(n, 3, 8, 8, seed=seed) + 2 * torch.eye(3)[labels][..., None, None], labels


def loader(n: int = 96, seed: int = 0, *, shuffle: bool = True) -> DataLoader:
    return DataLoader(TensorDataset(*colours(n, seed)), 16, shuffle=shuffle)


QUIET: dict[str, Any] = {"lr": 0.1, "progress": False, "device": "cpu"}


# ---- learning ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("se", [False, True])
def test_a_separable_problem_is_learned(se: bool) -> None:
    model = toy(se=se)
    before = evaluate(model, loader(seed=9))
    history = fit(model, loader(), loader(seed=9), epochs=5, **QUIET)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert set(history[0]) == {"epoch", "loss", "val_accuracy", "val_loss", "seconds"}
    after = evaluate(model, loader(seed=9))
    assert before["accuracy"] < 0.7 and after["accuracy"] > 0.95
    assert history[-1]["val_accuracy"] == after["accuracy"] and history[-1]["val_loss"] == pytest.approx(
        after["loss"]
    )


def test_the_seed_decides() -> None:
    losses = []
    for seed in (0, 0, 1):
        model = toy()
        torch.manual_seed(len(losses))
        losses.append([row["loss"] for row in fit(model, loader(), epochs=2, seed=seed, **QUIET)])
    assert losses[0] == losses[1] != losses[2]


def test_sgd_by_hand() -> None:
    """Two steps on one batch: Nesterov momentum, one-cycle learning rate, decay on matrices only."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x, y = random(6, 4), torch.tensor([0, 1, 1, 0, 1, 0])
    w, b = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    fit(
        model,
        DataLoader(TensorDataset(x, y), 6),
        epochs=2,
        lr=0.5,
        weight_decay=0.1,
        progress=False,
        device="cpu",
    )
    v, u = torch.zeros_like(w), torch.zeros_like(b)
    for rate in (0.5, 0.25):  # peak after one of three steps, and then down to nothing
        error = (x @ w.T + b).softmax(1) - torch.eye(2)[y]
        gw, gb = error.T @ x / 6 + 0.1 * w, error.mean(0)
        v, u = 0.9 * v + gw, 0.9 * u + gb
        w, b = w - rate * (gw + 0.9 * v), b - rate * (gb + 0.9 * u)
    assert torch.allclose(model[1].weight, w, atol=1e-6) and torch.allclose(model[1].bias, b, atol=1e-6)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [t._one_cycle(step, 11) for step in range(1, 11)]
    assert rates[1] == 1 == max(rates) and rates[0] == 0.5 and rates[-1] == pytest.approx(1 / 9)
    assert all(a > b for a, b in pairwise(rates[1:])) and t._one_cycle(11, 11) == 0


def test_multilabel() -> None:
    x, _ = colours()
    labels = (x.mean((2, 3)) > 0.7).long()
    data = DataLoader(TensorDataset(x, labels), 16, shuffle=True)
    model = toy(se=True)
    history = fit(model, data, data, epochs=6, task="multilabel", **QUIET)
    assert history[-1]["val_accuracy"] > 0.9 and history[-1]["val_mean_ap"] > 0.95
    assert history[-1]["loss"] < history[0]["loss"]


def test_multilabel_images_of_our_own() -> None:
    one = images()
    many = ImageSet(
        "toy", "train", one.images, torch.eye(3, dtype=torch.int64)[one.targets], one.classes, synthetic=True
    )
    history = fit(toy(), many.loader(16, train=True), many.loader(16), epochs=6, task="multilabel", **QUIET)
    assert history[-1]["val_accuracy"] > 0.9 and history[-1]["val_balanced_accuracy"] > 0.9
    logits, targets = predict(toy(), many.loader(16), device="cpu")
    assert logits.shape == targets.shape == (48, 3) and targets.dtype == torch.int64


def test_gate_sparsity_closes_gates() -> None:
    means = []
    for sparsity in (0.0, 3.0):
        model = toy(se=True)
        fit(model, loader(), epochs=3, gate_sparsity=sparsity, **QUIET)
        means.append(float(explain(model, colours()[0]).gates.mean()))
        assert all(not m._forward_hooks for m in model.selib_se.modules())
    assert means[1] < means[0] - 0.1


def test_frozen_parameters_stay() -> None:
    model = toy()
    model.body.requires_grad_(False)
    before = model.body[0].weight.clone()
    fit(model, loader(), epochs=1, **QUIET)
    assert torch.equal(model.body[0].weight, before)


def test_a_dict_of_inputs() -> None:
    model, example = zoo.build("dict output")
    data = [(example, torch.tensor([0, 1, 2]))] * 2
    first = fit(model, data, epochs=4, **QUIET)
    assert first[-1]["loss"] < first[0]["loss"]
    assert predict(model, data)[0].shape == (6, zoo.K)


# ---- bf16 ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(t, "has_fast_bf16", lambda device: True)
    yield
    AcceleratorState._reset_state(True)


def test_bf16_and_a_compiled_model(bf16: None) -> None:
    model = toy(se=True)
    compiled = torch.compile(model, backend="eager")
    before = set(vars(compiled)), set(vars(model))
    history = fit(compiled, loader(), epochs=3, **QUIET)
    assert history[-1]["loss"] < history[0]["loss"] and (set(vars(compiled)), set(vars(model))) == before
    x = colours()[0]
    assert torch.allclose(run(compiled.eval(), x), run(model, x), atol=1e-5)
    torch.compiler.reset()


def test_bf16_is_for_training_only(bf16: None) -> None:
    model, x = toy(se=True), colours()[0]
    seen: list[torch.dtype] = []
    handle = model.body[0].register_forward_hook(lambda m, args, output: seen.append(output.dtype))
    before = set(vars(model))
    fit(model, loader(), epochs=2, **QUIET)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    evaluate(model, loader())
    assert set(seen) == {torch.float32}
    handle.remove()
    assert set(vars(model)) == before and all(p.dtype == torch.float32 for p in model.parameters())
    ex = explain(model, x)
    assert torch.allclose(
        ex.influence(0).sum(1) + model.fc.bias[0].detach(), ex.logits[:, 0], rtol=1e-4, atol=1e-4
    )
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin.eval(), x), ex.logits)
        nn.init.zeros_(twin.fc.weight)
        assert not torch.equal(run(twin, x), ex.logits)
    handle = model.body[0].register_forward_hook(lambda m, args, output: seen.append(output.dtype))
    seen.clear()
    fit(model, loader(), epochs=1, **QUIET)
    assert set(seen) == {torch.bfloat16}  # a second time too
    handle.remove()


# ---- resuming -------------------------------------------------------------------------------------------------------------------


def images() -> ImageSet:
    x, y = colours(48)
    x = ((x - x.min()) / (x.max() - x.min()) * 255).round().to(torch.uint8)
    return ImageSet("toy", "train", x, y, ["r", "g", "b"], synthetic=True)


def shuffled(kind: str) -> DataLoader:
    return images().loader(16, train=True, seed=3) if kind == "ours" else loader(48)


@pytest.mark.parametrize("kind", ["ours", "torch"])
@pytest.mark.parametrize("after", [4, 7])
def test_a_resumed_run_is_an_unbroken_run(tmp_path: Path, kind: str, after: int) -> None:
    common = QUIET | {"epochs": 4, "seed": 5, "gate_sparsity": 0.1}
    whole = toy(se=True)
    expected = fit(whole, shuffled(kind), loader(seed=9), out=tmp_path / "whole", **common)

    steps: list[int] = []
    step = torch.optim.SGD.step

    def interrupted(self: torch.optim.SGD, *args: Any) -> Any:
        if len(steps) == after:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.SGD, "step", interrupted)
        fit(toy(se=True), shuffled(kind), loader(seed=9), out=tmp_path / "broken", **common)
    done = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert len(done) == after // 3

    model = toy(se=True)
    nn.init.zeros_(model.fc.weight)  # all of it comes from the file
    torch.manual_seed(99)
    found = fit(model, shuffled(kind), loader(seed=9), out=tmp_path / "broken", **common)
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows] for rows in (found, expected)]
    assert strip[0] == strip[1]
    assert same(dict(model.state_dict()), dict(whole.state_dict()))
    assert [
        json.loads(row) for row in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    ] == found
    assert sorted(os.listdir(tmp_path / "broken")) == ["metrics.jsonl", "state.safetensors"]


def test_a_finished_run_is_only_loaded(tmp_path: Path) -> None:
    model = toy()
    history = fit(model, loader(), epochs=1, out=tmp_path, **QUIET)
    other = toy()
    stamp = (tmp_path / "state.safetensors").stat().st_mtime_ns
    assert fit(other, loader(), epochs=1, out=tmp_path, **QUIET) == history
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert (tmp_path / "state.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.2}, "lr was 0.1, now 0.2"),
        ({"epochs": 3}, "epochs was 1, now 3"),
        ({"seed": 4}, "seed was 0, now 4"),
        ({"train": DataLoader(TensorDataset(*colours()), 8)}, "steps was 6, now 12"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)
    stored = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"holds a run with other settings .*{message}.*: remove it"):
        fit(**({"model": toy(), "train": loader(), "epochs": 1, "out": tmp_path} | QUIET | change))
    assert (tmp_path / "state.safetensors").read_bytes() == stored


def test_a_run_of_another_network_is_not_resumed(tmp_path: Path) -> None:
    fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"another architecture: fc.bias is \(3,\), the model has \(4,\)"):
        fit(toy(classes=4), loader(), epochs=1, out=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="another architecture: "):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), loader(), epochs=1, out=tmp_path, **QUIET)


def test_a_state_cut_short_is_an_error(tmp_path: Path) -> None:
    fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"state.safetensors is not a safetensors file, or is cut short"):
        fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)


# ---- errors of training -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_writes_nothing(tmp_path: Path) -> None:
    x, y = colours(48)
    x[40] = torch.nan
    model = toy(se=True)
    with pytest.raises(ValueError, match=r"no longer finite in epoch 1, step 3: lower lr=0.1"):
        fit(
            model,
            DataLoader(TensorDataset(x, y), 16),
            epochs=2,
            gate_sparsity=0.1,
            out=tmp_path / "run",
            **QUIET,
        )
    assert not (tmp_path / "run").exists()
    assert all(not m._forward_hooks for m in model.selib_se.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regression"}, "task='regression' is unknown"),
        ({"epochs": 0}, "epochs=0: at least 1"),
        ({"device": "tpu"}, "device='tpu' is unknown"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**({"model": toy(), "train": loader(), "epochs": 1} | QUIET | options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(ValueError, match='device="cuda", but PyTorch sees no GPU'):
        fit(toy(), loader(), epochs=1, device="cuda")


# ---- evaluating -------------------------------------------------------------------------------------------------------------------


def test_evaluate_against_torchmetrics() -> None:
    model = toy(se=True)
    logits, targets = predict(model, loader(shuffle=False))
    assert torch.equal(targets, colours()[1]) and torch.allclose(
        logits, run(model.eval(), colours()[0]), atol=1e-5
    )
    found = evaluate(model, loader())
    assert found["accuracy"] == pytest.approx(
        float(tm.multiclass_accuracy(logits, targets, 3, average="micro"))
    )
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-5)

    many = torch.stack([targets == 0, targets != 1, targets == 2], 1).long()
    found = evaluate(model, DataLoader(TensorDataset(colours()[0], many), 20), task="multilabel")
    assert found["accuracy"] == pytest.approx(float(tm.multilabel_accuracy(logits.sigmoid(), many, 3)))
    assert found["loss"] == pytest.approx(
        float(nn.functional.binary_cross_entropy_with_logits(logits, many.float())), rel=1e-5
    )
    aps = []
    for scores, truth in zip(logits.T.tolist(), many.T.tolist(), strict=True):
        ranked = [hit for _, hit in sorted(zip(scores, truth, strict=True), reverse=True)]
        aps.append(sum(sum(ranked[: i + 1]) / (i + 1) for i, hit in enumerate(ranked) if hit) / sum(ranked))
    assert found["mean_ap"] == pytest.approx(sum(aps) / 3, abs=1e-5)
    rates = [
        [float(((logits[:, k] > 0) == side)[many[:, k] == side].double().mean()) for side in (0, 1)]
        for k in range(3)
    ]
    assert found["balanced_accuracy"] == pytest.approx(sum(map(sum, rates)) / 6)
    assert set(found) == {"accuracy", "balanced_accuracy", "mean_ap", "loss"}


def test_attribute_scores_by_hand() -> None:
    logits = torch.tensor([[2.0, -1, 3, 5], [-1.0, 2, 1, 40], [1.0, 1, 2, 50], [0.0, -3, -1, 60]])
    targets = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]])
    scores = attribute_scores(logits, targets)
    assert {k: v.dtype for k, v in scores.items()} == dict.fromkeys(
        ("accuracy", "balanced_accuracy", "ap"), torch.float64
    )
    # yes, no, yes and, at a logit of exactly 0, no; all right; never a no; always yes
    assert scores["accuracy"].tolist() == pytest.approx([0.5, 1, 0.75, 0.5])
    assert scores["balanced_accuracy"].tolist() == pytest.approx([0.5, 1, torch.nan, 0.5], nan_ok=True)
    # places of the right ones: 1 and 3; 1 and 2; all; 1 and 2, though all three probabilities are 1 in floating point
    assert scores["ap"].tolist() == pytest.approx([(1 + 2 / 3) / 2, 1, torch.nan, 1], nan_ok=True)
    one = attribute_scores(logits[:, :1], targets[:, :1].bool())
    assert all(torch.equal(one[k], scores[k][:1]) for k in scores)


@pytest.mark.filterwarnings("error")
def test_an_output_without_a_yes_or_a_no_has_no_ap_and_means_skip_it() -> None:
    targets = torch.tensor([[0, 1, 1], [0, 0, 1]])
    scores = attribute_scores(torch.tensor([[1.0, 1, 1], [-1, -1, 1]]), targets)
    for name in ("ap", "balanced_accuracy"):
        assert scores[name].isnan().tolist() == [True, False, True] and scores[name].nanmean() == 1
    assert scores["accuracy"].tolist() == [0.5, 1, 1]

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.one

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(1))

    found = evaluate(
        Same(), [(torch.tensor([[1.0, 1, 1], [-1, -1, 1]]), targets)], task="multilabel", device="cpu"
    )
    assert found["mean_ap"] == found["balanced_accuracy"] == 1 and found["accuracy"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2), r"logits \(2, 3\) and targets \(2, 2\) do not fit"),
        (torch.zeros(2), torch.zeros(2), "do not fit"),
        (torch.zeros(2, 1), torch.tensor([[-1], [1]]), r"targets are 0 or 1 for each output, got \[-1, 1\]"),
        (torch.zeros(2, 1), torch.tensor([[0.5], [1]]), r"targets are 0 or 1"),
    ],
)
def test_scores_of_other_things(logits: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_scores(logits, targets)


def test_evaluating_leaves_the_mode_alone() -> None:
    model = toy()
    model.body.eval()
    state = copy.deepcopy(model.state_dict())
    evaluate(model, loader())
    assert model.training and model.drop.training and not model.body.training
    assert same(dict(model.state_dict()), dict(state))
    with pytest.raises(ValueError, match="the loader is empty"):
        evaluate(model, [])


# ---- checkpoints --------------------------------------------------------------------------------------------------------------------


def resnet(size: int, *, start: str | None = None, at: Any = None) -> nn.Module:
    torch.manual_seed(0)
    model = small_resnet(3, image_size=size, widths=WIDTHS)
    zoo.liven(model)
    if start:
        blocks = attach_se(model, torch.zeros(1, 3, size, size), start=start, reduction=3, at=at)
        for block in blocks.values() if isinstance(blocks, dict) else [blocks]:
            open_and_close(block)
    return model.eval()


META: dict[str, Any] = {"architecture": "small_resnet", "classes": ["cat", "dog", "ü"]}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize(
    ("start", "at"),
    [(None, None), ("identity", None), ("paper", "stem"), ("paper", {"a": "stem", "b": "stages"})],
)
def test_a_checkpoint_rebuilds_the_model(tmp_path: Path, size: int, start: str | None, at: Any) -> None:
    model, x = resnet(size, start=start, at=at), random(2, 3, size, size)
    save_checkpoint(model, tmp_path / "new" / "a.safetensors", image_size=size, widths=WIDTHS, **META)
    assert os.listdir(tmp_path / "new") == ["a.safetensors"]
    other, meta = load_checkpoint(tmp_path / "new" / "a.safetensors")
    assert not other.training and torch.equal(run(other, x), run(model, x))
    assert (
        meta["classes"] == META["classes"]
        and meta["image_size"] == size
        and meta["architecture"] == "small_resnet"
    )
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    ours, theirs = attached(model), attached(other)
    assert {n: (b.site, b.gain, b.channels, b.pool) for n, b in ours.items()} == {
        n: (b.site, b.gain, b.channels, b.pool) for n, b in theirs.items()
    }
    if start:
        one, two = explain(model, x), explain(other, x)
        if at is None or isinstance(at, str):
            assert torch.equal(one.gates, two.gates) and torch.equal(one.heatmap(), two.heatmap())


@pytest.mark.parametrize("size", [32, [40, 24], (24, 80)])
def test_rectangular_images_and_the_task(tmp_path: Path, size: Any) -> None:
    path = tmp_path / "a.safetensors"
    height, width = (size, size) if isinstance(size, int) else size
    model, x = small_resnet(3, image_size=size, widths=WIDTHS).eval(), random(2, 3, height, width)
    open_and_close(attach_se(model, x, reduction=3))
    assert model.stem[0].stride == ((1, 1) if max(height, width) <= 32 else (2, 2))
    save_checkpoint(model, path, image_size=size, task="multilabel", widths=WIDTHS, **META)
    other, meta = load_checkpoint(path)
    assert torch.equal(run(other, x), run(model, x)) and other.stem[0].stride == model.stem[0].stride
    assert (
        meta["image_size"] == (size if isinstance(size, int) else tuple(size))
        and meta["task"] == "multilabel"
    )


def test_older_checkpoints_name_no_task_and_no_per_target(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", resnet(32, start="paper")
    save_checkpoint(model, path, image_size=32, widths=WIDTHS, **META)
    with safe_open(path, "pt") as file:
        meta, tensors = json.loads(file.metadata()["selib"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    del meta["task"], meta["se"][0]["per_target"]
    save_file(tensors, path, {"selib": json.dumps(meta)})
    other, found = load_checkpoint(path)
    assert found["task"] == "multiclass" and torch.equal(run(other, image(32)), run(model, image(32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (32,)}, r"image_size=\(32,\): it is the side of a square"),
        ({"image_size": (32, 0)}, "image_size="),
        ({"image_size": [3, 32, 32]}, "image_size="),
        ({"task": "regression"}, "task='regression' is unknown"),
    ],
)
def test_a_checkpoint_that_could_not_be_read_is_not_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_checkpoint(resnet(32), tmp_path / "a.safetensors", **({"image_size": 32} | META | options))
    assert not list(tmp_path.iterdir())
    if "image_size" in options:
        with pytest.raises(ValueError, match=message):
            build("resnet18_small_image", 3, **options)


def test_a_torchvision_model_and_a_compiled_one(tmp_path: Path) -> None:
    path, x = tmp_path / "a.safetensors", random(1, 3, 64, 64)
    model = build("squeezenet1_1", 3).eval()
    open_and_close(attach_se(model, x))
    compiled = torch.compile(model, backend="eager")
    save_checkpoint(compiled, path, architecture="squeezenet1_1", classes=["a", "b", "c"], image_size=64)
    other, _ = load_checkpoint(path)
    assert torch.equal(run(other, x), run(model, x))
    expected = run(model, x)
    nn.init.zeros_(model.selib_se.fc2.bias)
    load_weights(compiled, path)
    assert torch.equal(run(model, x), expected)


def test_weights_of_the_bare_model_load_with_a_block_attached(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    bare = resnet(32)
    save_checkpoint(bare, path, image_size=32, widths=WIDTHS, **META)
    model = resnet(32, start="paper")
    nn.init.zeros_(model.classifier.weight)
    gates = model.selib_se.fc2.weight.clone()
    load_weights(model, path)
    assert torch.equal(model.classifier.weight, bare.classifier.weight)
    assert torch.equal(model.selib_se.fc2.weight, gates)


@pytest.mark.parametrize("keep", [0, 4, 7, 100, -1])
def test_a_checkpoint_cut_short(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(resnet(32), path, image_size=32, widths=WIDTHS, **META)
    path.write_bytes(path.read_bytes()[:keep])
    for load in (load_checkpoint, lambda p: load_weights(resnet(32), p)):
        with pytest.raises(
            ValueError, match=r"a\.safetensors is not a safetensors file, or is cut short"
        ) as error:
            load(path)
        assert "\n" not in str(error.value)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("weights, honestly " * 20)
    with pytest.raises(ValueError, match=r"text\.safetensors is not a safetensors file"):
        load_checkpoint(tmp_path / "text.safetensors")
    fit(toy(), loader(), epochs=1, out=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="holds weights only: build the model yourself"):
        load_checkpoint(tmp_path / "state.safetensors")


def test_another_architecture_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(resnet(32, start="paper"), path, image_size=32, widths=WIDTHS, **META)
    for model in (toy(), small_resnet(4, widths=WIDTHS), small_resnet(3), resnet(32)):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            ValueError, match=r"a\.safetensors is a checkpoint of another architecture: "
        ) as error:
            load_weights(model, path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        assert same(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize(
    "change", [{"architecture": "resnet19"}, {"classes": ["a", "b"]}, {"architecture": "squeezenet1_1"}]
)
def test_metadata_that_does_not_fit_the_weights(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(resnet(32), path, image_size=32, **({"widths": WIDTHS} | META | change))
    if change == {"architecture": "squeezenet1_1"}:
        save_checkpoint(resnet(32), path, image_size=32, **(META | change))
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(resnet(32), path, image_size=32, widths=WIDTHS, **META)
    before = path.read_bytes()

    def full(tensors: Any, name: str, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(t, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(resnet(32, start="paper"), path, image_size=32, widths=WIDTHS, **META)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


# ---- several processes ----------------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from selib.train import fit

torch.manual_seed(0)
x, y = torch.randn(32, 6), torch.arange(32) % 3
model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
history = fit(model, DataLoader(TensorDataset(x, y), 4), epochs=2, lr=0.5, device="cpu", out=sys.argv[1], progress=False)
rank = torch.distributed.get_rank()
torch.save({"weight": model[1].weight.detach(), "history": len(history)}, f"{sys.argv[1]}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one_with_batches_of_twice_the_size(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        script,
        tmp_path / "run",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"run-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one["weight"], two["weight"]) and one["history"] == two["history"] == 2
    torch.manual_seed(0)
    x, y = torch.randn(32, 6), torch.arange(32) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    fit(model, DataLoader(TensorDataset(x, y), 8), epochs=2, lr=0.5, device="cpu", progress=False)
    assert torch.allclose(model[1].weight, one["weight"], atol=1e-5)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
