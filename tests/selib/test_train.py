"""Training and evaluation: what is learned, in which precision, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sklearn.metrics as sk
import tiny_models as zoo
import torch
from tiny_models import random, run, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selib import train as t
from selib.attach import attach_se
from selib.explainer import explain
from selib.train import attribute_scores, evaluate, fit, predict
from studies.data import ImageSet


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


# ---- learning ----------


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
    fit(model, DataLoader(TensorDataset(x, y), 6), epochs=2, lr=0.5, progress=False, device="cpu")
    v, u = torch.zeros_like(w), torch.zeros_like(b)
    for rate in (0.5, 0.25):  # peak after one of three steps, and then down to nothing
        error = (x @ w.T + b).softmax(1) - torch.eye(2)[y]
        gw, gb = error.T @ x / 6 + 5e-4 * w, error.mean(0)
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
    x, y = colours(48)
    x = ((x - x.min()) / (x.max() - x.min()) * 255).round().to(torch.uint8)
    many = ImageSet("toy", "train", x, torch.eye(3, dtype=torch.int64)[y], ["r", "g", "b"], synthetic=True)
    history = fit(toy(), many.loader(16, train=True), many.loader(16), epochs=6, task="multilabel", **QUIET)
    assert history[-1]["val_accuracy"] > 0.9 and history[-1]["val_balanced_accuracy"] > 0.9
    logits, targets = predict(toy(), many.loader(16))
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


# ---- precision ----------


def seen_dtypes(model: nn.Module, work: Any) -> set[torch.dtype]:
    """What the first layer puts out meanwhile."""
    seen: list[torch.dtype] = []
    handle = model.body[0].register_forward_hook(lambda m, args, output: seen.append(output.dtype))
    work()
    handle.remove()
    return set(seen)


def test_the_weights_do_not_depend_on_what_the_processor_can(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        model = toy(se=True)
        assert seen_dtypes(model, lambda model=model: fit(model, loader(), epochs=2, **QUIET)) == {
            torch.float32
        }
        trained.append(dict(model.state_dict()))
    assert same(trained[0], trained[1])


def test_bf16_is_for_training_only_and_where_it_is_asked_for() -> None:
    model, x = toy(se=True), colours()[0]
    before = set(vars(model))
    half = QUIET | {"precision": "bf16"}
    assert seen_dtypes(model, lambda: fit(model, loader(), epochs=2, **half)) == {torch.bfloat16}
    assert seen_dtypes(model, lambda: evaluate(model, loader())) == {torch.float32}
    assert set(vars(model)) == before and all(p.dtype == torch.float32 for p in model.parameters())
    ex = explain(model, x)
    total = ex.influence(0).sum(1) + model.fc.bias[0].detach()
    assert torch.allclose(total, ex.logits[:, 0], rtol=1e-4, atol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin.eval(), x), ex.logits)
    # one run after another, each as it is told
    assert seen_dtypes(model, lambda: fit(model, loader(), epochs=1, **QUIET)) == {torch.float32}
    assert seen_dtypes(model, lambda: fit(model, loader(), epochs=1, **half)) == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_compiled_model_is_trained_and_left_as_it_was(precision: str) -> None:
    model = toy(se=True)
    compiled = torch.compile(model, backend="eager")
    before = set(vars(compiled)), set(vars(model))
    history = fit(compiled, loader(), epochs=3, precision=precision, **QUIET)
    assert history[-1]["loss"] < history[0]["loss"] and (set(vars(compiled)), set(vars(model))) == before
    x = colours()[0]
    assert torch.allclose(run(compiled.eval(), x), run(model, x), atol=1e-5)
    torch.compiler.reset()


# ---- errors of training ----------


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
        ({"optimizer": "adam"}, "optimizer='adam' is unknown"),
        ({"precision": "fp8"}, "precision='fp8' is unknown"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**({"model": toy(), "train": loader(), "epochs": 1} | QUIET | options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_process_that_began_on_the_cpu_does_not_go_on_as_if_on_a_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(toy(), loader(), epochs=1, **QUIET)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match=f"device='{device}', but this process began on cpu: start another one"
    ):
        t.accelerator(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(ValueError, match='device="cuda", but PyTorch sees no GPU'):
        fit(toy(), loader(), epochs=1, device="cuda")


# ---- evaluating ----------


def test_evaluate_against_scikit_learn() -> None:
    model = toy(se=True)
    logits, targets = predict(model, loader(shuffle=False))
    assert torch.equal(targets, colours()[1])
    assert torch.allclose(logits, run(model.eval(), colours()[0]), atol=1e-5)
    found = evaluate(model, loader())
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(targets, logits.argmax(1)))
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-5)

    many = torch.stack([targets == 0, targets != 1, targets == 2], 1).long()
    found = evaluate(model, DataLoader(TensorDataset(colours()[0], many), 20), task="multilabel")
    loss = nn.functional.binary_cross_entropy_with_logits(logits, many.float())
    assert found.pop("loss") == pytest.approx(float(loss), rel=1e-5)
    balanced = [sk.balanced_accuracy_score(many[:, k], logits[:, k] > 0) for k in range(3)]
    assert found == {
        "accuracy": pytest.approx(sk.accuracy_score(many.flatten(), (logits > 0).flatten())),
        "balanced_accuracy": pytest.approx(sum(balanced) / 3),
        "mean_ap": pytest.approx(sk.average_precision_score(many, logits)),
    }


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
    # places of the right ones: 1 and 3; 1 and 2; all; 1 and 2, though all three sigmoids are 1 in float32
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

    found = evaluate(Same(), [(torch.tensor([[1.0, 1, 1], [-1, -1, 1]]), targets)], task="multilabel")
    assert found["mean_ap"] == found["balanced_accuracy"] == 1 and found["accuracy"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2), r"must be \(N, K\), not \[2, 3\] and \[2, 2\]"),
        (torch.zeros(2), torch.zeros(2), r"must be \(N, K\)"),
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


# ---- several processes ----------

SCRIPT = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from selib.train import fit

torch.manual_seed(0)
x, y = torch.randn(32, 6), torch.arange(32) % 3
model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
data = DataLoader(TensorDataset(x, y), 4)
history = fit(model, data, epochs=2, lr=0.5, device="cpu", out=sys.argv[1], progress=False)
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
