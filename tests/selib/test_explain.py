"""Explanations: closed forms, ablation of the whole model as the oracle, and a model left as it was."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import tiny_models as zoo
import torch
import torchvision
from tiny_models import K, close, hooks, image, open_and_close, random, run, same, snapshot
from torch import Tensor, nn

import selib
from selib.attach import attach_se, detach_se
from selib.explainer import SEExplainer, explain
from selib.explanation import METHODS, Explanation
from selib.forward import logits_of, tensors
from selib.heatmap import normalize, resize
from selib.native import native_se
from selib.se import SEBlock
from selib.select import Channels, NormalQuantile, TopFraction, TopK

LINEAR = [
    "resnet",
    "densenet",
    "efficientnet",
    "swin",
    "r3d",
    "functional",
    "dict output",
    "sequential",
    "audio",
]
OTHER = [name for name in zoo.ZOO if name not in LINEAR]


def gated(name: str, *, at: str | None = None) -> tuple[nn.Module, Any, SEBlock]:
    """A model of the zoo with gates that differ between channels and samples."""
    model, example = zoo.build(name)
    return model, example, open_and_close(attach_se(model, example, at=at, reduction=2))


def head_layer(model: nn.Module) -> nn.Linear:
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "selib_se" not in n][-1]


def ablated(model: nn.Module, example: Any, block: SEBlock, channels: list[int], targets: Tensor) -> Tensor:
    """The influence of some channels by running the whole model: (B, len(channels))."""
    base, columns = run(model, example).gather(1, targets[:, None])[:, 0], []
    for channel in channels:

        def without(gates: Tensor, channel: int = channel) -> Tensor:
            gates = gates.clone()
            gates[:, channel] = 0
            return gates

        with block.override(without):
            columns.append(base - run(model, example).gather(1, targets[:, None])[:, 0])
    return torch.stack(columns, 1)


# ---- influence ----------


@pytest.mark.parametrize("name", LINEAR)
def test_the_influence_map_averages_to_the_logit_without_its_bias(name: str) -> None:
    model, example, _ = gated(name)
    ex = explain(model, example)
    bias = head_layer(model).bias.detach()
    for target in (None, 0, K - 1):
        index = ex.predicted if target is None else torch.full((len(ex.logits),), target)
        logit = ex.logits.gather(1, index[:, None])[:, 0]
        mean = ex.map("influence", target).flatten(1).mean(1)
        assert close(mean + bias[index], logit)
        assert close(ex.influence(target).sum(1) + bias[index], logit)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_ablating_gates_in_the_head_is_ablating_them_in_the_model(name: str) -> None:
    model, example, block = gated(name)
    ex = explain(model, example)
    assert torch.equal(ex.logits, run(model, example))
    channels = list(range(0, block.channels, max(1, block.channels // 6)))
    targets = torch.arange(len(ex.logits)) % K
    expected = ablated(model, example, block, channels, targets)
    found = ex.influence(targets)
    assert found.shape == (len(ex.logits), block.channels) and found.dtype == torch.float32
    assert close(found[:, channels], expected, ex.logits)
    assert expected.abs().max() > 1e-3 * ex.logits.abs().max()  # there is something to compare


@pytest.mark.parametrize("name", zoo.ZOO)
def test_other_gates_in_the_head_are_other_gates_in_the_model(name: str) -> None:
    model, example, block = gated(name)
    ex = explain(model, example)
    rule = TopFraction(0.5)
    new = torch.rand(ex.gates.shape, generator=torch.Generator().manual_seed(0))
    for gates in (
        lambda s: s * rule.mask(s),
        lambda s: s * ~rule.mask(s),
        new,
        torch.zeros(1),
        torch.ones(block.channels),
    ):
        with block.override(gates):
            expected = run(model, example)
        assert close(ex.with_gates(gates), expected, ex.logits)
    assert close(ex.with_gates(ex.gates), ex.logits)


@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n != "r3d"])
def test_batch_mates_do_not_matter(name: str) -> None:
    model, example, _ = gated(name)
    ex = explain(model, example)
    alone = {k: v[1:2] for k, v in example.items()} if isinstance(example, dict) else example
    alone = tuple(t[1:2] for t in alone) if isinstance(alone, tuple) else alone
    one = explain(model, alone[1:2] if isinstance(alone, Tensor) else alone)
    assert (one.gates - ex.gates[1:2]).abs().max() <= 1e-5
    scale = ex.logits.abs().max()
    assert (one.influence(2) - ex.influence(2)[1:2]).abs().max() <= 1e-5 * scale
    warnings.filterwarnings("ignore", "the normal-quantile rule")  # pytest puts the filters back
    for method in METHODS:
        assert (one.heatmap(method, 2) - ex.heatmap(method, 2)[1:2]).abs().max() <= 1e-3  # maps are stretched


def test_influence_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[..., None, None])
        model[3].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
    x = torch.tensor([[[[1.0, 0.0], [0.0, 3.0]], [[0.0, 2.0], [0.0, 0.0]]]])  # channel means 1 and 1/2
    block = attach_se(model, x)
    with block.override(torch.tensor([0.25, 0.5])):  # identity form: scales 1/2 and 1
        ex = explain(model, x)
        assert ex.gates.tolist() == [[0.25, 0.5]]
    assert torch.allclose(ex.influence(0), torch.tensor([[0.5, 1.0]]))  # 1 · 1/2 · 1, 2 · 1 · 1/2
    assert torch.allclose(ex.influence(1), torch.tensor([[1.5, -2.0]]))
    assert torch.allclose(ex.map("influence", 1), torch.tensor([[[1.5, -8.0], [0.0, 4.5]]]))
    assert torch.allclose(ex.map("influence", 1, Channels([0])), torch.tensor([[[1.5, 0.0], [0.0, 4.5]]]))
    assert torch.allclose(ex.map("gate"), torch.tensor([[[0.25, 1.0], [0.0, 0.75]]]))
    assert torch.allclose(ex.map("top-gate", select=TopK(1)), x[:, 1])
    assert torch.allclose(ex.map("top-gate", select=TopK(2)), x.mean(1))
    assert torch.allclose(ex.heatmap("gate"), torch.tensor([[[0.25, 1.0], [0.0, 0.75]]]))
    # evidence against the class is cut off
    assert torch.allclose(ex.heatmap("influence", 1), torch.tensor([[[1 / 3, 0.0], [0.0, 1.0]]]))


@pytest.mark.parametrize("name", OTHER)
def test_in_other_heads_a_channels_influence_is_spread_by_its_map(name: str) -> None:
    model, example, block = gated(name)
    ex = explain(model, example)
    influence = ex.influence(1)
    share = (
        ex.features.abs()
        / ex.features.abs().flatten(2).mean(2).clamp_min(1e-30)[(...,) + (None,) * (ex.features.ndim - 2)]
    )
    expected = (influence[(...,) + (None,) * (ex.features.ndim - 2)] * share).sum(1)
    assert close(ex.map("influence", 1), expected)
    alive = ex.features.abs().flatten(2).amax(2) > 0
    assert close(ex.map("influence", 1).flatten(1).mean(1), (influence * alive).sum(1), influence)
    assert block.channels == ex.features.shape[1]


@pytest.mark.parametrize("name", ["functional", "in-place head"])
def test_the_map_is_shown_as_the_head_reads_it(name: str) -> None:
    at = {"functional": "conv2", "in-place head": "body"}[name]
    model, example, block = gated(name, at=at)
    ex = explain(model, example)
    assert (ex.features < 0).any()
    assert close(ex.map("gate"), (ex.gates[:, :, None, None] * ex.features.relu()).sum(1))
    channels = list(range(block.channels))
    assert close(
        ex.influence(0), ablated(model, example, block, channels, torch.zeros(3, dtype=torch.long)), ex.logits
    )
    assert close(ex.with_gates(ex.gates), ex.logits)
    assert close(ex.map("gate"), (ex.gates[:, :, None, None] * ex.features.relu()).sum(1))


class Cosine(nn.Linear):
    """A linear layer by name: it normalises its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight.norm(dim=1)


def test_a_layer_that_only_looks_linear_is_run() -> None:
    model, example = zoo.build("dict output")
    model.fc = Cosine(6, K)
    block = open_and_close(attach_se(model, example, reduction=2))
    ex = explain(model, example)
    targets = torch.tensor([0, 1, 2])
    assert close(ex.influence(targets), ablated(model, example, block, list(range(6)), targets), ex.logits)


class Heads(nn.Module):
    """Heads that go wrong where many maps stand beside one sample's tensors."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body, self.out = kind, zoo.convolutions(), nn.Sequential(nn.Tanh(), nn.Linear(6, K))
        self.stages = [self.body]
        self.a, self.b = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.6))
        self.first, self.others = nn.Parameter(torch.randn(1, 6)), nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "a list":
            for stage in self.stages:
                maps = stage(x)
        else:
            maps = self.body(x)
        if self.kind == "by the input":
            return self.out(maps.flatten(2).mT.reshape(x.shape[0], -1, 6).mean(1))
        pooled = maps.mean((2, 3))
        if self.kind == "numbers":
            return self.out(pooled * torch.stack([self.a, self.b]).softmax(0)[0])
        if self.kind == "a table":
            return self.out(pooled + torch.cat([self.first, self.others], 0).mean(0))
        return self.out(pooled)


@pytest.mark.parametrize("kind", ["a list", "numbers", "a table", "by the input"])
def test_heads_beside_which_other_tensors_stand(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Heads(kind).eval(), image(32)
    block = open_and_close(attach_se(model, x, reduction=2))
    ex = explain(model, x)
    targets = torch.tensor([0, 1, 2])
    assert close(ex.influence(targets), ablated(model, x, block, list(range(6)), targets), ex.logits)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_sample_of_zeros_does_not_decide_how_the_head_reads() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 4, 4, bias=False), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, K))
    x = image(32)
    x[0] = 0
    model = nn.Sequential(body, head).eval()
    attach_se(model, x, at="0")
    assert explain(model, x).influence().shape == (3, 6)
    assert len(selib.cache_features(model, [x]).logits) == 3


def test_a_head_that_does_not_give_the_logits_back_is_an_error() -> None:
    class Random(zoo.GruHead):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(K)

    model, example = Random().eval(), image(32)
    attach_se(model, example)
    ex = explain(model, example)
    with pytest.raises(RuntimeError, match="does not give the logits back"):
        ex.influence()


# ---- heatmaps ----------


@pytest.mark.parametrize("name", zoo.ZOO)
def test_heatmaps_are_finite_in_the_unit_interval_and_as_large_as_the_input(name: str) -> None:
    model, example, _ = gated(name)
    ex = explain(model, example)
    size = tuple(tensors(example)[0].shape[1:] if name == "audio" else tensors(example)[0].shape[2:])
    other = tuple(n + 1 for n in size)
    for method in METHODS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the normal-quantile rule")
            maps = ex.heatmap(method)
        assert maps.shape == (len(ex.logits), *size) and maps.dtype == torch.float32
        assert maps.isfinite().all() and maps.amin() >= 0 and maps.amax() <= 1
        assert ex.heatmap(method, 0, select=TopK(2), size=other).shape[1:] == other
    space = ex.features.shape[2:]
    assert ex.map().shape == (len(ex.logits), *space) and len(space) == len(size)


def test_top_gate_is_the_mean_of_the_maps_whose_gates_stand_out() -> None:
    model, example, block = gated("resnet")
    with block.override(random(3, 512).abs() / 5):
        ex = explain(model, example)
    found = ex.map("top-gate")
    for i, (gates, features) in enumerate(zip(ex.gates, ex.features, strict=True)):
        chosen = gates > gates.mean() + 1.2816 * gates.std()
        assert 0 < chosen.sum() < len(gates)
        assert torch.allclose(found[i], features[chosen].mean(0), atol=1e-4)
    assert torch.equal(ex.selected("top-gate"), NormalQuantile().mask(ex.gates))
    expected = normalize(resize(found, (64, 64)))
    assert torch.equal(ex.heatmap("top-gate"), expected)
    assert torch.equal(ex.heatmap("top-gate", target=3), expected)  # it knows no class
    assert not torch.equal(ex.heatmap("influence", 0), ex.heatmap("influence", 1))


def test_selection_ranks_by_the_methods_own_weights() -> None:
    model, example, _ = gated("functional")
    ex = explain(model, example)
    assert torch.equal(ex.selected("influence", 2, TopK(2)), TopK(2).mask(ex.influence(2)))
    assert torch.equal(ex.selected("gate", 2, TopK(2)), TopK(2).mask(ex.gates))
    assert ex.selected("influence").all() and ex.selected("gate").all()
    picked = ex.map("gate", select=Channels([1, 4]))
    assert close(picked, (ex.gates[:, :, None, None] * ex.features.relu())[:, [1, 4]].sum(1))


def test_constant_gates_warn_and_still_give_a_map() -> None:
    model, example = zoo.build("resnet")
    attach_se(model, example)  # at the start every gate is ½
    ex = explain(model, example)
    assert torch.equal(ex.gates, torch.full((3, 512), 0.5))
    with pytest.warns(UserWarning, match="no channel for 3 of 3 samples"):
        maps = ex.heatmap("top-gate")
    assert maps.amax() == 1


def test_tokens_are_laid_out_on_their_grid_without_the_class_token() -> None:
    model, example, block = gated("vit")
    seen: list[Tensor] = []
    handle = block.features.register_forward_hook(lambda m, args, output: seen.append(output))
    ex = explain(model, example)
    handle.remove()
    assert ex.features.shape == (3, 32, 4, 4)
    assert torch.equal(ex.features[:, :, 1, 2], seen[0][:, 1 + 4 + 2])


# ---- targets and errors ----------


def test_targets() -> None:
    model, example, _ = gated("convnext")
    ex = explain(model, example)
    each = torch.cat([ex.influence(t)[i : i + 1] for i, t in enumerate([4, 0, 2])])
    for target in (
        [4, 0, 2],
        (4, 0, 2),
        torch.tensor([4, 0, 2]),
        torch.tensor([[4], [0], [2]], dtype=torch.int32),
    ):
        assert close(ex.influence(target), each, ex.logits)
    assert torch.equal(ex.predicted, ex.logits.argmax(1))
    assert torch.equal(ex.heatmap(), ex.heatmap(target=ex.predicted))
    assert torch.equal(ex.influence(torch.tensor(3)), ex.influence(3))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (K, rf"target=\[{K}\] is not among the {K} classes 0..{K - 1}"),
        (-1, r"target=\[-1\]"),
        ([0, 1, 9], r"target=\[0, 1, 9\]"),
        ([0, 1], "target has 2 entries, but the batch has 3 samples"),
        ([], "target has 0 entries"),
    ],
)
def test_targets_out_of_range(target: Any, message: str) -> None:
    model, example, _ = gated("functional")
    ex = explain(model, example)
    for ask in (ex.influence, lambda t: ex.heatmap(target=t)):
        with pytest.raises(ValueError, match=message):
            ask(target)


def test_an_unknown_method_and_a_size_that_does_not_fit() -> None:
    model, example, _ = gated("functional")
    ex = explain(model, example)
    with pytest.raises(ValueError, match="method='gradcam' is unknown: use one of influence, gate, top-gate"):
        ex.heatmap("gradcam")
    with pytest.raises(ValueError, match=r"size=\(4,\) does not fit a map with 2 spatial axes"):
        ex.heatmap(size=(4,))
    with pytest.raises(ValueError, match="target"):
        ex.heatmap("influence", 99, size=(4, 4))


def test_a_model_without_a_block() -> None:
    model, example = zoo.build("functional")
    before = hooks(model)
    with pytest.raises(ValueError, match="no SE block: call selib.attach_se"):
        explain(model, example)
    assert hooks(model) == before


def test_a_vector_has_gates_and_influence_but_no_heatmap() -> None:
    model, example, block = gated("two inputs", at="meta")
    ex = explain(model, example)
    assert ex.features.shape == (3, 6) and torch.allclose(ex.gates, block.gates(ex.features))
    targets = torch.tensor([0, 1, 2])
    assert close(ex.influence(targets), ablated(model, example, block, list(range(6)), targets), ex.logits)
    with pytest.raises(ValueError, match=r"sits on a vector \(B, C\): there is no heatmap"):
        ex.heatmap()


# ---- several streams ----------


def test_streams() -> None:
    torch.manual_seed(0)
    model, example = zoo.TwoStreams().eval(), (image(32), random(3, 1, 16, 16))
    blocks = attach_se(
        model, example, at={"face": "face_encoder", "body": "body_encoder", "fusion": "fuse"}, reduction=2
    )
    for seed, block in enumerate(blocks.values()):
        open_and_close(block, seed)
    ex = explain(model, example)
    assert set(ex.streams) == {"face", "body", "fusion"}
    assert torch.equal(ex.logits, run(model, example))
    targets = torch.tensor([0, 1, 2])
    for name, block in blocks.items():
        stream = ex.streams[name]
        channels = list(range(block.channels))
        assert close(stream.influence(targets), ablated(model, example, block, channels, targets), ex.logits)
        with block.override(torch.zeros(1)):
            assert close(stream.with_gates(torch.zeros(1)), run(model, example), ex.logits)
    assert ex.streams["face"].heatmap(size=(32, 32)).shape == (3, 32, 32)
    assert ex.streams["body"].heatmap(size=(16, 16)).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="vector"):
        ex.streams["fusion"].heatmap()
    with pytest.raises(ValueError, match="pass size="):  # faces and bodies differ in size
        ex.streams["face"].heatmap()


def test_one_named_stream_is_a_stream() -> None:
    model, example = zoo.build("functional")
    attach_se(model, example, at={"image": "conv2"})
    ex = explain(model, example)
    assert ex.streams["image"].heatmap().shape == (3, 32, 32)


# ---- blocks that the model was born with ----------


@pytest.mark.parametrize(
    ("name", "site", "excite"),
    [
        ("mobilenet_v3_small", "features.11.block.2", "scale_activation"),
        ("regnet_y_400mf", "trunk_output.block4.block4-5.f.se", "scale_activation"),
    ],
)
def test_native_blocks_are_read_without_training(name: str, site: str, excite: str) -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.get_model(name, weights=None, num_classes=K).eval(), image(64, batch=2)
    zoo.liven(model)
    assert native_se(model, x) == site
    before = hooks(model)
    ex = explain(model, x)
    assert hooks(model) == before
    block, seen = model.get_submodule(site), []
    handles = [
        block.get_submodule(excite).register_forward_hook(
            lambda m, args, output: seen.append(output.flatten(1))
        ),
        block.register_forward_hook(lambda m, args, output: seen.append(args[0])),
    ]
    logits = run(model, x)
    for handle in handles:
        handle.remove()
    assert (
        torch.equal(ex.gates, seen[0])
        and torch.equal(ex.features, seen[1])
        and torch.equal(ex.logits, logits)
    )
    channel = int(ex.gates[0].argmax())

    def without(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, channel] = 0
        return output

    handle = block.register_forward_hook(without)
    expected = run(model, x)
    handle.remove()
    gates = ex.gates.clone()
    gates[:, channel] = 0
    assert close(ex.with_gates(gates), expected, logits)
    assert not close(expected, logits)
    maps = ex.heatmap("gate")
    assert maps.shape == (2, 64, 64) and maps.amax() == 1


def test_an_attached_block_goes_before_a_native_one() -> None:
    model, example, block = gated("mobilenet_v3")
    assert explain(model, example).gates.shape[1] == block.channels == 96
    detach_se(model)
    assert explain(model, example).gates.shape[1] == 16  # the last inverted residual's own
    assert native_se(zoo.build("resnet")[0], example) is None


# ---- the model is left as it was ----------


@pytest.mark.parametrize("name", ["resnet", "vgg", "gru head", "two inputs"])
def test_explaining_leaves_no_trace(name: str) -> None:
    model, example, _ = gated(name)
    model.train()
    next(model.children()).eval()
    first = next(model.parameters())
    first.grad, first.requires_grad = torch.ones_like(first), False
    before, before_hooks, inputs = snapshot(model), hooks(model), copy.deepcopy(example)
    weights = copy.deepcopy(dict(model.state_dict()))
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    ex = explain(model, example)
    ex.heatmap(), ex.influence(1), ex.with_gates(torch.zeros(1))
    assert same(snapshot(model), before) and hooks(model) == before_hooks
    assert same(dict(model.state_dict()), weights)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(tensors(example), tensors(inputs), strict=True))
    assert not ex.logits.requires_grad and not ex.features.requires_grad
    gates, logits = ex.gates.clone(), ex.logits.clone()
    ex.heatmap(target=2)
    assert torch.equal(ex.gates, gates) and torch.equal(ex.logits, logits)


def test_an_explanation_takes_one_forward_pass() -> None:
    model, example, _ = gated("resnet")
    calls: list[int] = []
    handle = model.register_forward_hook(lambda m, args, output: calls.append(1))
    ex = explain(model, example)
    ex.heatmap(), ex.heatmap("gate"), ex.influence(0), ex.heatmap("top-gate", select=TopK(3))
    handle.remove()
    assert calls == [1]


def test_the_explainer_as_a_context_manager() -> None:
    model, example, _ = gated("functional")
    before = hooks(model)
    with SEExplainer(model) as explainer:
        batches = [explainer(example[:n]) for n in (3, 1, 2)]
        assert hooks(model) != before
    assert hooks(model) == before
    for n, ex in zip((3, 1, 2), batches, strict=True):
        alone = explain(model, example[:n])
        assert torch.equal(ex.gates, alone.gates) and torch.equal(ex.influence(1), alone.influence(1))
        assert torch.equal(ex.heatmap("influence", 1), alone.heatmap("influence", 1))


def test_hooks_do_not_outlive_an_error() -> None:
    model, example, _ = gated("functional")
    before = hooks(model)
    with pytest.raises(RuntimeError):
        explain(model, random(2, 4, 32, 32))
    assert hooks(model) == before and not any(m.training for m in model.modules())
    with pytest.raises(KeyError), SEExplainer(model) as explainer:
        explainer(example)
        raise KeyError
    assert hooks(model) == before


def test_the_explanation_follows_training() -> None:
    model, example, block = gated("functional")
    with SEExplainer(model) as explainer:
        before = explainer(example)
        nn.init.constant_(block.fc2.bias, 2.0)
        after = explainer(example)
    assert (after.gates > before.gates).any() and torch.equal(after.gates, explain(model, example).gates)


# ---- precision and wrappers ----------


@pytest.mark.parametrize("name", ["resnet", "vgg", "vit", "convnext"])
def test_under_bf16_autocast_what_comes_out_is_float32(name: str) -> None:
    model, example, _ = gated(name)
    full = explain(model, example)
    with torch.autocast("cpu", torch.bfloat16):
        ex = explain(model, example)
    # asked for outside of the autocast region
    influence, maps = ex.influence(1), ex.heatmap("gate")
    assert {t.dtype for t in (ex.gates, ex.logits, ex.features, influence, maps)} == {torch.float32}
    assert (ex.gates - full.gates).abs().max() < 0.05
    assert (influence - full.influence(1)).abs().max() <= 0.05 * full.logits.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_in_other_precisions(dtype: torch.dtype) -> None:
    for name in ("vgg", "sequential"):
        model, example, _ = gated(name)
        full = explain(model, example).influence(1)
        ex = explain(model.to(dtype), example.to(dtype))
        assert ex.gates.dtype == torch.float32 and ex.heatmap("gate").dtype == torch.float32
        slack = 1e-4 if dtype == torch.float64 else 0.05
        assert (ex.influence(1) - full).abs().max() <= slack * ex.logits.abs().max()


@pytest.mark.slow
def test_compiled_models() -> None:
    model, example, _ = gated("functional")
    expected = explain(model, example)
    whole = torch.compile(model, backend="eager")
    run(whole, example)
    assert torch.equal(explain(whole, example).heatmap(), expected.heatmap())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["inside", "in place"])
def test_models_with_compiled_parts_that_have_run(part: str) -> None:
    model, example = zoo.build("sequential")
    if part == "inside":
        model = nn.Sequential(torch.compile(model[:3], backend="eager"), model[3])
    else:
        model.compile(backend="eager")
    outputs = run(model, example)
    block = attach_se(model, example, reduction=2)
    assert torch.allclose(run(model, example), outputs, atol=1e-5)
    open_and_close(block)
    expected = run(model, example)
    assert not close(expected, outputs)
    ex = explain(model, example)
    assert close(ex.logits, expected) and close(ex.with_gates(ex.gates), expected)
    with block.override(torch.zeros(1)):
        assert close(ex.with_gates(torch.zeros(1)), run(model, example))
    assert close(run(model, example), expected)
    detach_se(model)
    assert torch.allclose(run(model, example), outputs, atol=1e-5)
    torch.compiler.reset()


def test_logits_of_what_models_return() -> None:
    logits = random(2, K)
    for output in (
        logits,
        {"logits": logits, "loss": random(2, 9)},
        {"embedding": logits},
        (logits, random(2, 3)),
        [logits],
    ):
        assert torch.equal(logits_of(output), logits)
    assert logits_of(random(4)).shape == (4, 1)  # one logit a sample
    assert torch.equal(logits_of(random(2, 3, 4)), random(2, 3, 4))  # an answer a frame
    for wrong in (None, {}, random(2, 3, 4, 5), "logits"):
        with pytest.raises(ValueError, match=r"class logits \(B, K\) are needed"):
            logits_of(wrong)


def test_one_logit() -> None:
    body = zoo.convolutions()
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1), nn.Flatten(0)).eval()
    attach_se(model, image(32))
    ex = explain(model, image(32))
    assert isinstance(ex, Explanation) and ex.logits.shape == (3, 1)
    assert close(ex.influence().sum(1) + model[3].bias.detach(), ex.logits[:, 0])
