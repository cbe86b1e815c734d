"""Influence on the log-odds: it does not know what a classifier's rows share, and is exact for any head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_models as zoo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import K, open_and_close, random, run
from torch import Tensor, nn

from selib.attach import attach_se
from selib.explainer import explain
from selib.forward import attached


def log_odds(logits: Tensor, target: int) -> Tensor:
    """log p_k/(1 - p_k), in float64, by the definition."""
    p = logits.double().softmax(-1)
    return (p[..., target] / (p.sum(-1) - p[..., target])).log()


def linear(outputs: int = 4, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network of 6 channels, pooling and one linear layer, with gates that act."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, outputs)
    ).eval()
    zoo.liven(model)
    x = random(3, 3, 12, 12, seed=seed)
    open_and_close(attach_se(model, x))
    return model, x


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_one_vector_added_to_all_rows_changes_nothing(seed: int, target: int) -> None:
    model, x = linear(seed=seed)
    found = []
    for vector in (torch.zeros(6), random(6, seed=seed + 1)):
        with torch.no_grad():
            model[4].weight += vector
        ex = explain(model, x)
        plain, contrast = ex.influence(target), ex.influence(target, contrast=True)
        found.append((plain, contrast, ex.map("influence", target, contrast=True), ex.logits.softmax(1)))
    (plain, *before), (moved, *after) = found
    for one, two in zip(before, after, strict=True):
        assert (one - two).abs().max() <= 1e-5 * one.abs().max().clamp_min(1)
    assert (plain - moved).abs().max() > 1e-3


def test_an_example_by_hand() -> None:
    """Three classes, p = ½, ¼, ¼."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[..., None, None])
        model[3].weight.copy_(torch.tensor([[1.0, 0], [0, 2], [4, 0]]))
        model[3].bias.copy_(torch.tensor([math.log(2) - 1, -4, -4]))  # the logits are log 2, 0, 0
    x = torch.tensor([1.0, 2])[None, :, None, None] + torch.tensor([-0.5, 0.5])  # means 1 and 2
    attach_se(model.eval(), x)
    ex = explain(model, x)
    assert torch.allclose(ex.logits.softmax(1), torch.tensor([[0.5, 0.25, 0.25]]))
    # w_0 - ½w_1 - ½w_2 = -1, -1; w_1 - ⅔w_0 - ⅓w_2 = -2, 2; times the means
    assert torch.allclose(ex.influence(0, contrast=True), torch.tensor([[-1.0, -2]]), atol=1e-6)
    assert torch.allclose(ex.influence(1, contrast=True), torch.tensor([[-2.0, 4]]), atol=1e-6)
    assert torch.allclose(ex.map("influence", 1, contrast=True)[0], -2 * x[0, 0] + 2 * x[0, 1], atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "densenet", "sequential"])
def test_the_closed_form_s_weights_are_the_gradient_of_the_log_odds(name: str) -> None:
    model, example = zoo.build(name)
    block = attach_se(model, example)
    open_and_close(block)
    with torch.no_grad():  # probabilities that are not all or nothing
        ex = explain(model, example)
        final = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == K][-1]
        final.weight /= ex.logits.abs().max()
    ex = explain(model, example)
    for channel in range(0, block.channels, max(1, block.channels // 4)):
        step = 1e-3

        def moved(s: Tensor, by: float, channel: int = channel) -> Tensor:
            s = s.clone()
            s[:, channel] *= 1 + by
            return s

        ends = [log_odds(ex.with_gates(lambda s, by=by: moved(s, by)), 3) for by in (-step, step)]
        slope = (ends[1] - ends[0]) / (2 * step)  # ∂/∂log s of that channel: its weight times its mean
        found = ex.influence(3, contrast=True)[:, channel]
        assert (found - slope).abs().max() <= 2e-3 * ex.influence(3, contrast=True).abs().max() + 1e-3


@pytest.mark.parametrize("name", ["vgg", "vit", "gru head", "two inputs"])
def test_other_heads_are_run_and_the_fall_is_exact(name: str) -> None:
    model, example = zoo.build(name)
    block = attach_se(model, example)
    open_and_close(block)
    ex = explain(model, example)
    for target in (0, 3):
        found = ex.influence(target, contrast=True)
        for channel in range(0, block.channels, max(1, block.channels // 4)):

            def without(s: Tensor, channel: int = channel) -> Tensor:
                s = s.clone()
                s[:, channel] = 0
                return s

            with block.override(without):
                fallen = log_odds(ex.logits, target) - log_odds(run(model, example), target)
            assert (found[:, channel] - fallen).abs().max() <= 1e-3 * (1 + fallen.abs().max())
        assert not torch.allclose(found, ex.influence(target), atol=1e-2)


def test_where_outputs_are_decisions_of_their_own_it_is_the_plain_one() -> None:
    for outputs, task in ((1, "multiclass"), (4, "multilabel")):
        model, x = linear(outputs)
        attached(model)[""].task = task
        ex = explain(model, x)
        assert torch.equal(ex.influence(0, contrast=True), ex.influence(0))
        assert torch.equal(ex.heatmap(target=0, contrast=True), ex.heatmap(target=0))
        vgg, example = zoo.build("vgg")
        if outputs == 1:
            vgg.classifier[6] = nn.Linear(16, 1)
        attach_se(vgg, example).task = task
        ex = explain(vgg, example)
        assert torch.equal(ex.influence(0, contrast=True), ex.influence(0))
    model, x = linear(4)
    assert not torch.equal(explain(model, x).influence(0, contrast=True), explain(model, x).influence(0))


@pytest.mark.parametrize("name", ["sequential", "vgg", "gru head"])
def test_very_confident_logits_stay_finite(name: str) -> None:
    model, example = zoo.build(name)
    attach_se(model, example)
    final = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == K][-1]
    with torch.no_grad():
        final.weight *= 1e4
    ex = explain(model, example)
    assert ex.logits.softmax(1).max() == 1  # 1 - p is zero in float32
    for target in (None, *range(K)):
        found = ex.influence(target, contrast=True)
        assert found.isfinite().all() and found.abs().max() > 1
        assert ex.heatmap(target=target, contrast=True).isfinite().all()


def test_gates_have_no_contrast() -> None:
    model, x = linear()
    for method in ("gate", "top-gate"):
        with pytest.raises(ValueError, match='contrast=True belongs to "influence"'):
            explain(model, x).heatmap(method, contrast=True)  # type: ignore[arg-type]


def test_targets_with_gates_of_their_own_have_their_log_odds_too() -> None:
    """The gradient of the log-odds when one channel's mean grows, under each class's own gates."""
    model, example = zoo.build("sequential")
    block = attach_se(model, example, per_target=True, reduction=2)
    open_and_close(block)
    ex = explain(model, example)
    layer: Any = model[3][0]
    z = ex.features.flatten(2).mean(2).double().requires_grad_()
    scales = (block.gain * ex.gates).double()
    y = (scales * z[:, None] * layer.weight.detach().double()).sum(2) + layer.bias.detach().double()
    score = (y[:, 2] - y[:, [0, 1, 3, 4]].logsumexp(1)).sum()
    expected = torch.autograd.grad(score, z)[0] * z.detach()
    assert torch.allclose(
        ex.influence(2, contrast=True).double(), expected, atol=1e-4 * ex.logits.abs().max()
    )
