"""Sparse label-free gates: on a planted problem they must find exactly what was planted, and touch nothing
else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models as zoo
import torch
import torch.nn.functional as F
from tiny_models import K, gradients_seen, hooks, image, open_and_close, random, run, same, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selib import features as feats
from selib import gates as g
from selib.attach import attach_se, detach_se
from selib.explainer import explain
from selib.features import FeatureCache, cache_features, channel_test
from selib.forward import attached, call, logits_of
from selib.gates import fit_gates
from selib.select import TopFraction, TopK

PLANTED = [3, 11, 20]


class Planted(nn.Module):
    """Only three of thirty channels matter to the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(30, 30, 1, bias=False), nn.Linear(30, 4)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(30)[..., None, None])
            self.fc.weight.zero_()
            self.fc.weight[:, PLANTED] = 3 * torch.tensor(
                [[1.0, 1, 1], [-1, -1, 1], [1, -1, -1], [-1, 1, -1]]
            )
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def planted(n: int = 600, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    x = random(n, 30, 1, 1, seed=seed) + 0.5 * random(n, 30, 2, 2, seed=seed + 1)
    labels = torch.randint(4, (n,), generator=torch.Generator().manual_seed(seed))
    return Planted().eval(), x, labels


def batches(x: Tensor, labels: Tensor | None = None, size: int = 100) -> list[Any]:
    return (
        list(x.split(size)) if labels is None else list(zip(x.split(size), labels.split(size), strict=True))
    )


FAST: dict[str, Any] = {"epochs": 40, "batch_size": 64}


# ---- what is found ----------


def test_exactly_the_planted_channels_are_found() -> None:
    model, x, _ = planted()
    report = fit_gates(model, batches(x), **FAST)
    opened = explain(model, x).gates > 0.5
    assert opened.nonzero()[:, 1].unique().tolist() == PLANTED
    assert opened.float().mean() == pytest.approx(0.1, abs=0.02)
    assert report.open_gates == pytest.approx(0.1, abs=0.02)
    assert (
        report.agreement >= 0.95 and report.only_top >= 0.95 and report.original_only_top == 1
    )  # 3 of 30: the top decile
    assert report.original_without_top < 0.5 and report.without_top < 0.5
    assert report.random_only < 0.6 < report.random_without
    assert report.images == 600 and report.sparsity == 1 and report.fit_seconds > 0
    assert all(isinstance(v, int | float) for k, v in report.as_dict().items() if k != "promise")
    assert len(report.as_dict()) == 18 and report.promise is None and report.held_out == 60


@pytest.mark.slow
def test_more_sparsity_closes_more_gates() -> None:
    model, x, _ = planted()
    cache = None
    means = []
    for sparsity in (0.0, 0.3, 3.0, 30.0):
        fit_gates(model, cache or batches(x), sparsity, **FAST)
        cache = cache or cache_features(model, batches(x))
        means.append(float(explain(model, x).gates.mean()))
    assert means == sorted(means, reverse=True) and means[0] > 3 * means[-1]


@pytest.mark.slow
def test_the_promised_agreement_is_kept_and_a_smaller_one_buys_sparser_gates() -> None:
    model, x, _ = planted()
    loose, strict = (fit_gates(model, batches(x), agreement=promise, **FAST) for promise in (0.7, 0.97))
    assert strict.agreement >= 0.95 and loose.agreement >= 0.6  # on 60 images that chose nothing
    assert loose.sparsity > strict.sparsity and loose.open_gates <= strict.open_gates


def fit_of(model: nn.Module, x: Tensor) -> g._Fit:
    block = attach_se(model, x[:2])
    return g._Fit(block, cache_features(model, batches(x)), "multiclass", 4.0, 1, None, 64, 0, False)


@pytest.mark.parametrize("limit", [0.013, 0.02, 0.7, 5.0, 29.0])
def test_the_path_of_lambda_ends_just_below_the_limit(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise holds up to a limit. λ starts at 0.01 and grows by 4; the last step is halved three times.
    Every fit starts from the last gates that kept the promise, and these are left behind.
    """
    model, x, _ = planted(30)
    fit, asked, started = fit_of(model, x), [], []

    def learn(self: g._Fit, sparsity: float) -> float:
        asked.append(sparsity)
        started.append(float(self.block.fc2.bias[0]))
        with torch.no_grad():
            self.block.fc2.bias[0] = sparsity
        return 0.95 if sparsity <= limit else 0.5

    first = float(fit.block.fc2.bias[0])
    monkeypatch.setattr(g._Fit, "learn", learn)
    found = fit.keep(0.95)
    assert found in asked and found <= limit < found * 4 ** (1 / 8) * 1.0001
    assert float(fit.block.fc2.bias[0]) == pytest.approx(found)
    broken = [a for a in asked if a > limit]
    assert broken and min(broken) == pytest.approx(found * 4 ** (1 / 8))  # the next one that was tried
    kept, expected = first, []
    for sparsity in asked:
        expected.append(kept)
        kept = sparsity if sparsity <= limit else kept
    assert started == pytest.approx(expected)


@pytest.mark.parametrize(("limit", "found", "tries"), [(0.001, 0.01, 1), (1e6, 0.01 * 4**8, 9)])
def test_the_path_of_lambda_has_ends(
    limit: float, found: float, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = planted(30)
    fit, asked = fit_of(model, x), []
    monkeypatch.setattr(g._Fit, "learn", lambda self, λ: asked.append(λ) or float(λ <= limit))
    assert fit.keep(0.5) == pytest.approx(found) and len(asked) == tries


def test_three_disjoint_parts_fit_choose_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = planted(95)
    fit = fit_of(model, x)
    parts = [set(part.tolist()) for part in (fit.held, fit.choosing, fit.kept)]
    assert list(map(len, parts)) == [9, 9, 77] and set.union(*parts) == set(range(95))
    used: dict[str, set[int]] = {"learn": set(), "_agreement": set(), "test": set()}
    loss, agreement, test = g._Fit._loss, g._Fit._agreement, g.channel_test
    monkeypatch.setattr(
        g._Fit, "_loss", lambda self, rows, λ: (used["learn"].update(rows.tolist()), loss(self, rows, λ))[1]
    )
    monkeypatch.setattr(
        g._Fit,
        "_agreement",
        lambda self, rows: (used["_agreement"].update(rows.tolist()), agreement(self, rows))[1],
    )
    monkeypatch.setattr(
        g,
        "channel_test",
        lambda *a, rows, **o: (used["test"].update(rows.tolist()), test(*a, rows=rows, **o))[1],
    )
    fit.learn(1.0)
    report = fit.report(1.0, None)
    assert used == {"learn": parts[2], "_agreement": parts[1], "test": parts[0]}
    assert report.held_out == 9 and report.images == 95 and report.promise is None


def test_a_promise_that_is_not_kept_warns_and_stands_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = planted(60)
    monkeypatch.setattr(g._Fit, "learn", lambda self, sparsity: float(sparsity < 0.1))  # and learns nothing
    said = (
        r"the gates keep \d+\.\d% of the predictions on 6 held-out images, not the 99.0% that were asked for"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        report = fit_gates(model, batches(x), agreement=0.99, form="bottleneck")
    assert report.promise == 0.99 > report.agreement and caught[0].filename == __file__


# ---- what it must not depend on, and must not touch ----------


def block_of(loader: Any, **options: Any) -> dict[str, Tensor]:
    model, _, _ = planted(10)
    fit_gates(model, loader, **({"epochs": 3} | options))
    return {k: v.clone() for k, v in model.selib_se.state_dict().items()}


def test_labels_are_ignored_and_the_seed_decides() -> None:
    _, x, labels = planted(200)
    first = block_of(batches(x, labels))
    torch.rand(7)  # the global state of the random numbers plays no part
    assert same(block_of(batches(x, labels)), first)
    assert same(block_of(batches(x, labels.flip(0))), first)
    assert same(block_of(batches(x)), first)
    assert same(block_of(iter(batches(x))), first)  # an iterator, which gives every batch once
    assert same(block_of(DataLoader(TensorDataset(x, labels), 100)), first)
    assert not same(block_of(batches(x), seed=1), first)


def test_the_network_is_left_alone() -> None:
    model, x, _ = planted(120)
    model.train()
    model.body.eval()
    model.fc.weight.grad = torch.ones(4, 30)
    model.fc.bias.requires_grad_(False)
    before, n_hooks = snapshot(model), len(hooks(model))
    torch.manual_seed(4)
    rng = torch.get_rng_state()
    fit_gates(model, batches(x), epochs=2)
    assert torch.equal(torch.get_rng_state(), rng)
    block = model.selib_se
    assert same(snapshot(model), before) and block.gain == 1
    assert all(p.grad is None and p.requires_grad for p in block.parameters())
    detach_se(model)
    assert same(snapshot(model), before) and len(hooks(model)) == n_hooks and not any(hooks(model))


def test_a_frozen_network_can_be_fitted() -> None:
    model, x, _ = planted(120)
    attach_se(model, x[:2])
    model.requires_grad_(False)
    before = model.selib_se.fc1.weight.clone()
    fit_gates(model, batches(x), epochs=2)
    assert not torch.equal(model.selib_se.fc1.weight, before)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_block_that_acts_is_refused_and_left_alone() -> None:
    """Trained with labels: the network needs it."""
    model, x, _ = planted(200)
    open_and_close(attach_se(model, x[:2], reduction=4, start="paper"))
    logits, weights = run(model, x), copy.deepcopy(model.state_dict())
    cache = cache_features(model, batches(x))
    assert torch.allclose(cache.logits, logits) and torch.allclose(cache.run(cache.scales), logits, atol=1e-5)
    bare = copy.deepcopy(model)
    detach_se(bare)
    assert torch.allclose(cache.run(torch.ones_like(cache.scales)), run(bare, x), atol=1e-5)
    assert channel_test(model.selib_se, cache)["original"].all()  # "original" is the network as it was cached
    for loader in (cache, batches(x)):
        with pytest.raises(ValueError, match="the SE block was trained with the network, which needs it"):
            fit_gates(model, loader, 0.1, task="multilabel", **FAST)
    assert torch.equal(run(model, x), logits) and same(model.state_dict(), weights)
    assert not model.selib_se.transparent and model.selib_se.task == "multiclass"


# ---- the cache ----------

HEADS = ["resnet", "vgg", "densenet", "convnext", "vit", "swin", "gru head", "dict output", "audio"]


def halves(example: Any) -> list[Any]:
    """A loader of two batches, of two and of one sample."""
    if isinstance(example, dict):
        return [{k: v[:2] for k, v in example.items()}, {k: v[2:] for k, v in example.items()}]
    return [example[:2], example[2:]]


@pytest.mark.parametrize("name", HEADS)
def test_the_cached_maps_give_the_logits_back(name: str) -> None:
    model, example = zoo.build(name)
    block = attach_se(model, example)
    cache = cache_features(model, halves(example))
    logits = run(model, example)
    scale = logits.abs().max()
    assert (cache.logits - logits).abs().max() <= 1e-5 * scale
    assert (cache.run(torch.ones(3, block.channels)) - logits).abs().max() <= 1e-4 * scale
    assert (
        cache.run(torch.ones(2, block.channels), torch.tensor([2, 0])) - logits[[2, 0]]
    ).abs().max() <= 1e-4 * scale
    one_by_one = cache.run(torch.ones(3, block.channels), batch=1)
    assert (one_by_one - logits).abs().max() <= 1e-4 * scale
    scales = torch.rand(3, block.channels, generator=torch.Generator().manual_seed(0))
    with block.override(scales / block.gain):
        assert (cache.run(scales) - run(model, example)).abs().max() <= 1e-4 * scale
    assert torch.allclose(
        cache.squeezed, explain(model, example).features.flatten(2).mean(2), rtol=1e-4, atol=1e-4
    )
    assert cache.targets is None and cache.scales.eq(1).all()
    pooled = cache.maps.numel() == 3 * block.channels
    assert pooled == (name not in ("vgg", "vit", "gru head"))  # a pooled map is all that the other heads need


@pytest.mark.parametrize("name", ["vgg", "convnext", "vit", "gru head", "dict output", "densenet"])
def test_gates_learn_through_every_kind_of_head(name: str) -> None:
    model, example = zoo.build(name)
    mean = {}
    for sparsity in (0.0, 100.0):
        fit_gates(model, halves(example), sparsity, epochs=15, lr=0.1)
        gates = explain(model, example).gates
        mean[sparsity] = float(gates.mean())
        detach_se(model)
    assert mean[100.0] < 0.2 < mean[0.0]


def test_the_gradient_through_a_head_is_that_through_the_model() -> None:
    for name in ("vgg", "vit", "gru head"):
        model, example = zoo.build(name)
        block = attach_se(model, example, start="paper")
        cache = cache_features(model, [example])
        loss = cache.run(block.excite(cache.squeezed)).square().sum()
        found = torch.autograd.grad(loss, block.fc2.bias)[0]
        expected = torch.autograd.grad(logits_of(call(model, example)).square().sum(), block.fc2.bias)[0]
        assert (found - expected).abs().max() <= 1e-3 * expected.abs().max() > 0


def test_targets_are_kept() -> None:
    model, x, labels = planted(50)
    attach_se(model, x[:2])
    cache = cache_features(model, batches(x, labels, 20))
    assert cache.targets is not None and torch.equal(cache.targets, labels)
    assert cache.seconds > 0 and not hooks_alive(model)


def hooks_alive(model: nn.Module) -> bool:
    return sum(hooks(model)) > 2  # the block's own: on its module, and for state dicts without it


def test_the_influence_of_cached_features() -> None:
    model, x, _ = planted(12)
    open_and_close(attach_se(model, x[:2]))
    assert torch.allclose(
        cache_features(model, batches(x)).influence(), explain(model, x).influence(), atol=1e-5
    )
    vgg, example = zoo.build("vgg")
    attach_se(vgg, example)
    with pytest.raises(ValueError, match="not global average pooling"):
        cache_features(vgg, [example]).influence()


# ---- the channel test ----------


def tiny() -> tuple[nn.Module, Tensor]:
    """Two classes: logits are z0 + z2 and z1 + z3 (+ ½), of 1x2 maps whose means are the given numbers."""
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4)[..., None, None])
        model[3].weight.copy_(torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]))
        model[3].bias.copy_(torch.tensor([0.0, 0.5]))
    means = torch.tensor([[3.0, 0, 0, 1], [0, 4.0, 1, 0], [2.0, 2, 2, 0]])
    return model.eval(), means[:, :, None, None] + torch.tensor([-0.25, 0.25])


def test_channel_test_by_hand() -> None:
    model, x = tiny()
    block = attach_se(model, x)
    cache = cache_features(model, [x])
    assert torch.allclose(cache.logits, torch.tensor([[3.0, 1.5], [1, 4.5], [4, 2.5]]))  # classes 0, 1, 0
    with torch.no_grad():  # gates of 1, ½, ½ and 0 (up to 1e-9) whatever the image
        block.restart("paper")
        block.fc2.weight.zero_()
        block.fc2.bias.copy_(torch.tensor([20.0, 0, 0, -20]))
    found = channel_test(block, cache, select=TopK(1))  # channel 0
    expected = {
        "original": [True, True, True],
        "gated": [True, True, True],  # 3 : ½, ½ : 2½, 3 : 1½
        "only_top": [True, True, True],  # 3 : ½, 0 : ½, 2 : ½
        "without_top": [False, True, False],  # 0 : ½, ½ : 2½, 1 : 1½
        "original_only_top": [True, True, True],  # 3 : ½, 0 : ½, 2 : ½
        "original_without_top": [False, True, False],  # 0 : 1½, 1 : 4½, 2 : 2½
    }
    assert {k: v.tolist() for k, v in found.items() if k in expected} == expected
    others = {"another_only", "another_without", "random_only", "random_without"}
    assert set(found) == others | set(expected)

    by_influence = channel_test(
        block, cache, select=TopK(1), ranking=cache.influence()
    )  # channels 0, 1 and 0
    assert by_influence["original_only_top"].tolist() == [True, True, True]  # 3 : ½, 0 : 4½, 2 : ½
    assert by_influence["original_without_top"].tolist() == [False, False, False]  # 0 : 1½, 1 : ½, 2 : 2½
    two = channel_test(block, cache, select=TopK(1), ranking=cache.influence(), rows=slice(0, 2))
    assert two["another_only"].tolist() == [False, True]  # channels 1 and 0: 0 : ½, 0 : ½
    assert two["another_without"].tolist() == [True, True]  # 3 : 1½, 1 : 4½
    labels = torch.tensor([1, 1, 0])
    assert channel_test(block, cache, select=TopK(1), targets=labels)["original"].tolist() == [
        False,
        True,
        True,
    ]
    rows = torch.tensor([2, 0])
    assert channel_test(block, cache, select=TopK(1), rows=rows)["original_without_top"].tolist() == [
        False,
        False,
    ]
    assert channel_test(block, cache, select=TopK(1), rows=slice(1, 2))["original_without_top"].tolist() == [
        True
    ]


def test_as_many_random_channels_as_the_rule_took() -> None:
    model, x, _ = planted(300)
    block = attach_se(model, x[:2])
    cache = cache_features(model, batches(x))
    asked: list[Tensor] = []

    class Spy(FeatureCache):
        def run(self, scales: Tensor, rows: Any = slice(None), batch: int = 1024) -> Tensor:
            asked.append(scales)
            return super().run(scales, rows, batch)

    spy = Spy(**{k: getattr(cache, k) for k in cache.__dataclass_fields__})
    kinds = list(channel_test(block, spy, select=TopFraction(0.2), seed=1))
    scales = dict(zip(kinds, asked, strict=True))
    assert ((scales["random_only"] > 0).sum(1) == 6).all() and (
        (scales["random_without"] > 0).sum(1) == 24
    ).all()
    assert ((scales["random_only"] > 0) ^ (scales["random_without"] > 0)).all()
    counts = (scales["random_only"] > 0).sum(0)  # 300 samples, 6 of 30 channels: about 60 each
    assert counts.min() > 30 and counts.max() < 90
    again = channel_test(block, cache, select=TopFraction(0.2), seed=1)
    assert torch.equal(
        again["random_only"], channel_test(block, cache, select=TopFraction(0.2), seed=1)["random_only"]
    )
    assert not torch.equal(
        again["random_only"], channel_test(block, cache, select=TopFraction(0.2), seed=2)["random_only"]
    )


@pytest.mark.parametrize("form", ["bottleneck", "head"])
def test_the_loss_is_the_designs(form: Any) -> None:
    """One step of the fit against KL( softmax(y_original) || softmax(y_gated) ) + λ · mean(s)."""
    model, x, _ = planted(20)
    attach_se(model, x[:2], form=form)
    cache = cache_features(model, batches(x))
    with gradients_seen() as seen:
        fit_gates(model, cache, 0.7, epochs=1, batch_size=100)
    kept = torch.randperm(20, generator=torch.Generator().manual_seed(0))[4:]
    torch.manual_seed(0)
    model.selib_se.restart("paper")
    z = x[kept].mean((2, 3))
    gates = model.selib_se.gates(x[kept])
    teacher = model.fc(z).softmax(1)
    student = model.fc(gates * z).log_softmax(1)
    loss = (teacher * (teacher.log() - student)).sum(1).mean() + 0.7 * gates.mean()
    expected = torch.autograd.grad(loss, list(model.selib_se.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen[0], expected, strict=True))
    assert len(seen) == 1


# ---- errors ----------


def empty() -> Iterator[Tensor]:
    return iter(())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": -0.1}, r"sparsity=-0.1: it must be 0 or more"),
        ({"agreement": 95.0}, r"agreement=95.0: it is a share"),
        ({"agreement": 0.0}, r"agreement=0.0"),
        ({"epochs": 0}, r"epochs=0: at least 1"),
        ({"loader": []}, "the loader is empty"),
        ({"loader": empty()}, "the loader is empty"),
        ({"loader": [torch.zeros(2, 30, 2, 2)]}, "at least three images"),
        ({"sparsity": float("nan")}, "sparsity=nan: it must be 0 or more"),
        ({"sparsity": float("inf")}, "sparsity=inf: it must be 0 or more"),
        ({"sharpness": 0.0}, "sharpness=0.0: it must be above 0"),
        ({"sharpness": float("inf")}, "sharpness=inf: it must be above 0"),
        ({"agreement": float("nan")}, "agreement=nan: it is a share"),
        ({"form": "tree"}, "form='tree' is unknown"),
        ({"form": "head", "per_target": True}, "per_target=True has bottlenecks of its own"),
        ({"reduction": 0}, "reduction=0"),
        ({"reduction": 0, "per_target": True}, "reduction=0"),
    ],
)
def test_bad_arguments_leave_the_model_bare(options: dict[str, Any], message: str) -> None:
    model, x, _ = planted(10)
    before = hooks(model)
    with pytest.raises(ValueError, match=message):
        fit_gates(model, **({"loader": batches(x)} | options))
    assert attached(model) == {} and hooks(model) == before


@pytest.mark.parametrize("size", [1, 3])
def test_a_head_that_other_inputs_bypass(size: int) -> None:
    model, (images, meta) = zoo.build("two inputs")
    labels = torch.zeros(size)
    loader = [((images[i : i + size], meta[i : i + size]), labels) for i in range(0, 3, size)]
    with pytest.raises(ValueError, match="the head reads more than the gated map"):
        fit_gates(model, loader, epochs=1)
    assert attached(model) == {}


def test_one_block_is_needed() -> None:
    model, x, _ = planted(10)
    attach_se(model, x)
    cache = cache_features(model, [x])
    detach_se(model)
    with pytest.raises(ValueError, match="one attached SE block is needed, this one has: none"):
        fit_gates(model, cache)
    model, example = zoo.build("functional")
    with pytest.raises(ValueError, match="one attached SE block is needed, this one has: none"):
        cache_features(model, [example])
    attach_se(model, example, at={"a": "conv1", "b": "conv2"})
    with pytest.raises(ValueError, match="this one has: a, b"):
        cache_features(model, [example])
    assert set(attached(model)) == {"a", "b"}


def test_maps_beyond_the_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = zoo.build("vgg")
    attach_se(model, example)
    monkeypatch.setattr(feats, "CACHE_LIMIT", 4 * 12 * 49 * 4)
    with pytest.raises(ValueError, match="the feature maps exceed"):
        cache_features(model, [example, example])
    assert len(cache_features(model, [example]).maps) == 3


def test_a_loader_of_the_wrong_images() -> None:
    model, _ = zoo.build("functional")
    with pytest.raises(ValueError, match="the model cannot run on the example"):
        fit_gates(model, [random(2, 1, 32, 32)])
    assert attached(model) == {} and F.relu(run(model, image(32))).shape == (3, K)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_fit_leaves_the_model_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = planted(40)
    outputs = run(model, x)

    def stop(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(g, "divergence", stop)
        fit_gates(model, batches(x), epochs=2)
    assert attached(model) == {} and torch.equal(run(model, x), outputs)

    fit_gates(model, batches(x), epochs=2)
    weights, outputs = copy.deepcopy(model.state_dict()), run(model, x)
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(g, "divergence", stop)
        fit_gates(model, batches(x), epochs=2)
    assert zoo.same(model.state_dict(), weights) and torch.equal(run(model, x), outputs)
