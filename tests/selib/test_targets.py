"""One SE block per target, and decisions that are yes or no: by hand, against the whole model, and on
planted problems.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_models as zoo
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import K, close, gradients_seen, hooks, image, open_and_close, random, run, same, snapshot
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

from selib import features as feats
from selib.attach import attach_se, detach_se
from selib.checkpoint import load_checkpoint, load_weights, save_checkpoint
from selib.explainer import SEExplainer, explain
from selib.explanation import METHODS, Explanation
from selib.features import FeatureCache, cache_features, channel_test
from selib.forward import attached, bare, call, logits_of
from selib.gates import bernoulli_kl, fit_gates
from selib.se import SEBlock, Stacked, TargetSEBlock
from selib.select import Channels, NormalQuantile, TopFraction, TopK
from selib.train import evaluate, fit
from studies.networks import build
from studies.networks.small_resnet import small_resnet

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


def every_influence(cache: FeatureCache) -> Tensor:
    """Influence (N, K, C) of each channel on every logit."""
    return torch.stack([cache.influence(k) for k in range(cache.logits.shape[1])], 1)


def gated(name: str, *, start: str = "identity") -> tuple[nn.Module, Any, TargetSEBlock]:
    """A model of the zoo whose targets have gates that differ between targets, channels and samples."""
    model, example = zoo.build(name)
    block = attach_se(model, example, reduction=2, per_target=True, start=start)
    assert isinstance(block, TargetSEBlock)
    open_and_close(block)
    return model, example, block


def final(model: nn.Module) -> nn.Linear:
    return [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "selib_se" not in n][-1]


class Paper(nn.Module):
    """Four 1x2 maps that pass as they are, and three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 3)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(4)[..., None, None])
            self.fc.weight.copy_(torch.tensor([[1.0, 2, 0, -1], [0, 1, 1, 0], [-2, 0, 1, 3]]))
            self.fc.bias.copy_(torch.tensor([0.5, -0.25, -1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def paper() -> tuple[nn.Module, Tensor]:
    """The model, and two images whose channel means are 1, 2, 0, 4 and 2, 0, 1, 1."""
    means = torch.tensor([[1.0, 2, 0, 4], [2, 0, 1, 1]])
    return Paper().eval(), means[:, :, None, None] + torch.tensor([-0.5, 0.5])


# ---- the block ----------


def test_logits_one_can_check_on_paper() -> None:
    model, x = paper()
    block = attach_se(model, x, per_target=True, start="paper")
    s = torch.tensor([[1.0, 0.5, 0, 0.25], [0.5, 0.5, 0.5, 0.5], [0, 1, 1, 1]])
    with block.override(s):
        # ½ + 1 + 2 - 1, -¼ + 1, -1 + 12; ½ + 2 - ¼, -¼ + ½, -1 + 1 + 3
        assert torch.allclose(run(model, x), torch.tensor([[2.5, 0.75, 11], [2.25, 0.25, 3]]))
        ex = explain(model, x)
    assert torch.equal(ex.gates, s.expand(2, 3, 4)) and torch.allclose(
        ex.logits, torch.tensor([[2.5, 0.75, 11], [2.25, 0.25, 3]])
    )
    assert torch.allclose(ex.influence(0), torch.tensor([[1.0, 2, 0, -1], [2, 0, 0, -0.25]]))
    assert torch.allclose(ex.influence([2, 1]), torch.tensor([[0.0, 0, 0, 12], [0, 0, 0.5, 0]]))
    assert torch.allclose(
        ex.map("influence", 0)[0], (x[0] * torch.tensor([1.0, 1, 0, -0.25])[:, None, None]).sum(0)
    )
    assert torch.allclose(ex.map("gate", 2)[0], x[0, 1:].sum(0))
    assert torch.allclose(ex.map("top-gate", 0, TopK(1)), x[:, 0])
    assert torch.allclose(ex.map("top-gate", 2, TopK(3))[0], x[0, 1:].mean(0))
    assert torch.equal(ex.gates_of([0, 2]), s[[0, 2]]) and torch.equal(ex.gates_of(1), s[[1, 1]])
    assert torch.equal(ex.gates_of(), s[[2, 2]])  # of the predicted one
    assert torch.allclose(ex.with_gates(torch.zeros(1)), model.fc.bias.expand(2, 3))
    assert torch.allclose(
        ex.with_gates(lambda s: s * torch.tensor([1.0, 0, 1])[:, None])[:, 1], model.fc.bias[1].expand(2)
    )


@pytest.mark.parametrize("start", ["identity", "paper"])
def test_the_gates_are_those_of_k_blocks_side_by_side(start: str) -> None:
    block = TargetSEBlock(6, 3, 2, start=start)  # type: ignore[arg-type]
    open_and_close(block)
    x, layer = random(5, 6, 3, 4), nn.Linear(6, 3)
    z = x.mean((2, 3))
    assert block.gates(x).shape == (5, 3, 6) and torch.allclose(block.gates(x), block.gates(z), atol=1e-6)
    for k in range(3):
        one = SEBlock(6, 2, start=start)  # type: ignore[arg-type]
        state = {
            "fc1.weight": block.fc1.weight.view(3, 3, 6)[k],
            "fc1.bias": block.fc1.bias.view(3, 3)[k],
            "fc2.weight": block.fc2.weight[k],
            "fc2.bias": block.fc2.bias.view(3, 6)[k],
        }
        one.load_state_dict(state)
        assert torch.allclose(block.gates(x)[:, k], one.gates(x), atol=1e-6)
        expected = (one(x).mean((2, 3)) * layer.weight[k]).sum(1) + layer.bias[k]
        assert torch.allclose(block.logits(layer, z, layer(z))[:, k], expected, atol=1e-5)


def test_every_block_starts_as_one_block_starts() -> None:
    torch.manual_seed(0)
    many, one = TargetSEBlock(64, 200, 4, start="paper"), SEBlock(64, 4, start="paper")
    assert many.bottleneck == one.bottleneck == 16
    for layer, inputs in (("fc1", 64), ("fc2", 16)):
        for kind in ("weight", "bias"):
            ours, theirs = (getattr(getattr(block, layer), kind).detach() for block in (many, one))
            bound = inputs**-0.5  # nn.Linear draws from -bound to bound, evenly
            assert 0.98 * bound < ours.abs().max() <= bound and 0.7 * bound < theirs.abs().max() <= bound
            assert ours.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert {p.ndim for n, p in many.named_parameters() if "bias" in n} == {1}  # which optimizers do not decay


def test_stacked_layers_are_linear_layers() -> None:
    stacked, x = Stacked(3, 4, 5), random(2, 3, 4)
    for k in range(3):
        expected = nn.functional.linear(x[:, k], stacked.weight[k], stacked.bias.view(3, 5)[k])
        assert torch.allclose(stacked(x)[:, k], expected, atol=1e-6)


def test_gates_of_a_target_do_not_depend_on_the_others_weights() -> None:
    model, example, block = gated("functional")
    before, outputs = explain(model, example), run(model, example)
    with torch.no_grad():
        block.fc2.weight[2] += 1
        block.fc1.bias.view(K, -1)[2] += 1
    after = explain(model, example)
    others = [k for k in range(K) if k != 2]
    assert torch.equal(after.gates[:, others], before.gates[:, others]) and not torch.equal(
        after.gates, before.gates
    )
    assert torch.equal(run(model, example)[:, others], outputs[:, others])
    assert not torch.allclose(run(model, example)[:, 2], outputs[:, 2])


@pytest.mark.parametrize("targets", [0, -1])
def test_a_block_needs_targets(targets: int) -> None:
    with pytest.raises(ValueError, match=f"targets={targets}"):
        TargetSEBlock(4, targets)
    with pytest.raises(ValueError, match=r"4 channels, but the feature map \(2, 5, 3\)"):
        TargetSEBlock(4, 2)(torch.zeros(2, 5, 3))


# ---- attaching ----------


@pytest.mark.parametrize("name", LINEAR)
def test_attaching_is_invisible_and_detaching_leaves_nothing(name: str) -> None:
    model, example = zoo.build(name)
    model.train()
    bare_state, before, before_hooks = copy.deepcopy(model.state_dict()), snapshot(model), hooks(model)
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    outputs = run(model.eval(), example)
    model.train()
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    block = attach_se(model, example, per_target=True)
    assert torch.equal(torch.get_rng_state(), rng) and same(snapshot(model), before)
    assert (
        isinstance(block, TargetSEBlock)
        and block.targets == K
        and attached(model) == {"": block}
        and block.training
    )
    assert block.site == zoo.ZOO[name][2]
    assert torch.equal(run(model.eval(), example), outputs)
    open_and_close(block)
    assert not torch.allclose(run(model, example), outputs, atol=1e-3)
    weights = block.fc2.weight.clone()
    model.load_state_dict(bare_state)  # strict
    assert torch.equal(block.fc2.weight, weights)
    detach_se(model.train())
    assert (
        list(model.state_dict()) == list(bare_state)
        and same(snapshot(model), before)
        and hooks(model) == before_hooks
    )
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes and attached(model) == {}
    assert torch.equal(run(model.eval(), example), outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_in_other_precisions_are_left_alone_too(dtype: torch.dtype) -> None:
    model, example = zoo.build("sequential")
    model, example = model.to(dtype), example.to(dtype)
    outputs = run(model, example)
    block = attach_se(model, example, per_target=True)
    assert torch.equal(run(model, example), outputs) and outputs.dtype == dtype
    open_and_close(block)
    ex = explain(model, example)
    assert ex.gates.dtype == ex.influence().dtype == torch.float32 and run(model, example).dtype == dtype


def test_bf16_autocast() -> None:
    model, example = zoo.build("resnet")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(model, example)
        block = attach_se(model, example, per_target=True)
        assert torch.equal(run(model, example), outputs) and outputs.dtype == torch.bfloat16
        logits = logits_of(call(model, example))
    logits.float().sum().backward()
    assert block.fc2.weight.grad is not None and block.fc2.weight.grad.dtype == torch.float32
    open_and_close(block)
    full = explain(model, example)
    with torch.autocast("cpu", torch.bfloat16):
        ex = explain(model, example)
    assert ex.gates.dtype == torch.float32 and (ex.gates - full.gates).abs().max() < 0.05
    assert (ex.influence(1) - full.influence(1)).abs().max() <= 0.05 * full.logits.abs().max()


@pytest.mark.parametrize("name", ["resnet", "sequential"])
def test_deepcopy_and_pickle_carry_the_block(name: str) -> None:
    model, example, block = gated(name)
    outputs = run(model, example)
    model(example)  # with a graph: nothing of it stays in the model
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other = attached(twin)[""]
        assert other is not block and torch.equal(run(twin, example), outputs)
        assert torch.equal(explain(twin, example).gates, explain(model, example).gates)
        nn.init.zeros_(other.fc2.bias)
        assert not torch.equal(run(twin, example), outputs) and torch.equal(run(model, example), outputs)
        detach_se(twin)
        assert attached(twin) == {} and torch.equal(run(twin, example), run(zoo.build(name)[0], example))
        assert torch.equal(run(model, example), outputs)


def test_the_state_dict_goes_round() -> None:
    model, example, _ = gated("resnet")
    other, _ = zoo.build("resnet", seed=1)
    attach_se(other, example, reduction=2, per_target=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other, example), run(model, example))
    with pytest.raises(RuntimeError, match=r"selib_se\.fc2\.bias"):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "selib_se.fc2.bias"})


@pytest.mark.slow
def test_compiled() -> None:
    model, example, block = gated("sequential")
    expected = run(model, example)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(run(compiled, example), expected, atol=1e-6)
    assert bare(compiled) is model and attached(compiled) == {"": block}
    assert torch.equal(explain(compiled, example).heatmap(), explain(model, example).heatmap())
    detach_se(compiled)
    assert torch.equal(run(compiled, example), run(zoo.build("sequential")[0], example))
    torch.compiler.reset()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    model, example, _ = gated("dict output")
    reference = copy.deepcopy(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for net in (parallel, reference):
            net.train()
            net(**example)["logits"].square().sum().backward()
        theirs = dict(reference.named_parameters())
        assert all(torch.allclose(p.grad, theirs[n].grad, atol=1e-5) for n, p in model.named_parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", OTHER)
def test_another_head_is_refused_and_left_alone(name: str) -> None:
    model, example = zoo.build(name)
    before, names = hooks(model), list(model.state_dict())
    with pytest.raises(ValueError, match=r"what follows '.*' is not global average pooling") as error:
        attach_se(model, example, per_target=True)
    assert "\n" not in str(error.value)
    assert hooks(model) == before and list(model.state_dict()) == names and attached(model) == {}


class Cosine(nn.Linear):
    """A linear layer by name: it normalises its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight.norm(dim=1)


def test_a_layer_that_only_looks_linear_or_comes_later_is_refused() -> None:
    model, example = zoo.build("dict output")
    model.fc = Cosine(6, K)
    with pytest.raises(ValueError, match="what follows 'body'"):
        attach_se(model, example, per_target=True)
    model, example = zoo.build("sequential")
    with pytest.raises(ValueError, match=r"what follows '0\.0'"):
        attach_se(model, example, at="0.0", per_target=True)  # a map before the one that is averaged


def test_several_streams_are_refused() -> None:
    model, example = zoo.build("functional")
    with pytest.raises(ValueError, match=r"per_target=True with the streams at=\{'a': 'conv2'\}") as error:
        attach_se(model, example, at={"a": "conv2"}, per_target=True)  # type: ignore[call-overload]
    assert "\n" not in str(error.value) and attached(model) == {}


@pytest.mark.slow
@pytest.mark.parametrize("per_target", [False, True])
@pytest.mark.parametrize("name", ["resnet18_small_image", "resnet50", "mobilenet_v3_large"])
def test_forty_attributes_on_the_study_s_networks(name: str, per_target: bool) -> None:
    torch.manual_seed(0)
    model, x = build(name, 40, image_size=(64, 96)).eval(), random(2, 3, 64, 96)
    outputs = run(model, x)
    if per_target and name == "mobilenet_v3_large":
        with pytest.raises(ValueError, match="what follows 'features'"):
            attach_se(model, x, per_target=True)
        return
    block = attach_se(model, x, per_target=per_target, reduction=64)
    assert torch.equal(run(model, x), outputs) and outputs.shape == (2, 40)
    assert explain(model, x).gates.shape == ((2, 40, block.channels) if per_target else (2, block.channels))
    assert explain(model, x).heatmap(target=39).shape == (2, 64, 96)


# ---- gradients ----------


def test_gradients_reach_every_block_and_from_each_logit_its_own() -> None:
    model, example, block = gated("functional")
    model(example).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for part in (block.fc2.weight.grad, block.fc2.bias.grad.view(K, -1), block.fc1.weight.grad.view(K, -1)):
        assert (part.flatten(1).abs().amax(1) > 0).all()
    model.zero_grad()
    model(example)[:, 3].sum().backward()
    reached = [k for k in range(K) if block.fc2.weight.grad[k].abs().max() > 0]
    assert reached == [3]


def test_the_identity_start_gives_the_gradients_of_the_bare_model_and_learns() -> None:
    model, example = zoo.build("resnet")
    model(example).square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    block = attach_se(model, example, per_target=True)
    model(example).square().sum().backward()
    assert all(
        torch.allclose(p.grad, grads[n], rtol=1e-4, atol=1e-4 * float(grads[n].abs().max()))
        for n, p in model.named_parameters()
        if n in grads
    )
    assert block.fc2.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["functional", "densenet", "resnet"])
def test_the_gradient_at_the_features_goes_through_the_gates(name: str) -> None:
    """What Grad-CAM at ``selib_se.features`` sees: the derivative of the equation, gates included."""
    model, example, block = gated(name)
    seen: list[Tensor] = []
    handle = block.features.register_forward_hook(lambda m, args, output: seen.append(output))
    logit = logits_of(call(model, example))[:, 2].sum()
    handle.remove()
    found = torch.autograd.grad(logit, seen[0])[0]
    maps = seen[0].detach().clone().requires_grad_()
    z = (maps.relu() if block.rectifies else maps).mean((2, 3))
    layer = final(model)
    y = (block.gain * block.excite(z)[:, 2] * z * layer.weight[2]).sum()
    expected = torch.autograd.grad(y, maps)[0]
    frozen = maps.detach().relu().sign() if block.rectifies else torch.ones_like(maps)
    without = (
        frozen * (block.gain * block.excite(z)[:, 2] * layer.weight[2])[:, :, None, None] / maps[0, 0].numel()
    )
    assert close(found, expected) and not close(found, without)


# ---- explaining ----------


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.parametrize("name", LINEAR)
def test_the_influence_map_averages_to_the_logit_without_its_bias(name: str, start: str) -> None:
    model, example, _ = gated(name, start=start)
    ex = explain(model, example)
    assert torch.equal(ex.logits, run(model, example)) and ex.gates.shape[1] == K
    bias = final(model).bias.detach()
    for target in (None, 0, K - 1, [k % K for k in range(len(ex.logits))]):
        index = ex.predicted if target is None else torch.as_tensor(target).expand(len(ex.logits))
        logit = ex.logits.gather(1, index[:, None])[:, 0]
        assert close(ex.map("influence", target).flatten(1).mean(1) + bias[index], logit, ex.logits)
        assert close(ex.influence(target).sum(1) + bias[index], logit, ex.logits)


@pytest.mark.parametrize("name", LINEAR)
def test_influence_is_what_the_whole_model_loses_without_a_gate(name: str) -> None:
    model, example, block = gated(name)
    ex = explain(model, example)
    for target in (0, 3):
        influence = ex.influence(target)
        for channel in range(0, block.channels, max(1, block.channels // 5)):

            def without(gates: Tensor, target: int = target, channel: int = channel) -> Tensor:
                gates = gates.clone()
                gates[:, target, channel] = 0
                return gates

            with block.override(without):
                lost = ex.logits - run(model, example)
            assert close(lost[:, target], influence[:, channel], ex.logits)
            assert torch.equal(lost[:, [k for k in range(K) if k != target]], torch.zeros(len(lost), K - 1))
            assert close(ex.logits - ex.with_gates(without), lost, ex.logits)


@pytest.mark.parametrize("name", ["resnet", "functional", "densenet"])
def test_other_gates_in_the_head_are_other_gates_in_the_model(name: str) -> None:
    model, example, block = gated(name)
    ex = explain(model, example)
    new = torch.rand(ex.gates.shape, generator=torch.Generator().manual_seed(0))
    for gates in (lambda s: s.square(), new, new[0], torch.zeros(1), torch.ones(block.channels)):
        with block.override(gates):
            expected = run(model, example)
            again = explain(model, example)
        assert close(ex.with_gates(gates), expected, ex.logits)
        assert close(again.influence(1).sum(1) + final(model).bias[1].detach(), expected[:, 1], ex.logits)


@pytest.mark.parametrize("name", ["resnet", "densenet", "swin", "functional"])
def test_batch_mates_do_not_matter(name: str) -> None:
    model, example, _ = gated(name)
    ex, one = explain(model, example), explain(model, example[1:2])
    assert (one.gates - ex.gates[1:2]).abs().max() <= 1e-5
    assert (one.influence(2) - ex.influence(2)[1:2]).abs().max() <= 1e-5 * ex.logits.abs().max()
    for method in METHODS:
        assert (
            one.heatmap(method, 2, select=TopK(3)) - ex.heatmap(method, 2, select=TopK(3))[1:2]
        ).abs().max() <= 1e-3


def test_all_maps_belong_to_a_target_now() -> None:
    model, example, block = gated("resnet")
    with block.override(random(3, K, 512).abs() / 5):
        ex = explain(model, example)
    assert torch.equal(ex.selected("top-gate", 2), NormalQuantile().mask(ex.gates[:, 2]))
    assert torch.equal(ex.channel_weights("gate", [0, 4, 2]), ex.gates[[0, 1, 2], [0, 4, 2]])
    for method in METHODS:
        assert not torch.equal(ex.heatmap(method, 0), ex.heatmap(method, 1))
        assert torch.equal(ex.heatmap(method), ex.heatmap(method, ex.predicted))
        for target in (K, [0, 1]):
            with pytest.raises(ValueError, match="target"):
                ex.heatmap(method, target)
    assert close(ex.map("gate", 1, Channels([3])), ex.gates[:, 1, 3, None, None] * ex.features[:, 3])


def test_gates_of_a_shared_block_know_no_target() -> None:
    model, example = zoo.build("resnet")
    open_and_close(attach_se(model, example))
    ex = explain(model, example)
    assert ex.gates_of() is ex.gates and ex.gates_of(3) is ex.gates


def test_a_map_before_a_relu_is_shown_as_it_is() -> None:
    model, example, block = gated("functional")  # F.relu follows the convolution
    ex = explain(model, example)
    assert block.rectifies and (ex.features < 0).any() and not gated("resnet")[2].rectifies
    assert torch.allclose(ex.gates, block.excite(ex.features.relu().mean((2, 3))), atol=1e-6)


def test_explaining_leaves_no_trace() -> None:
    model, example, _ = gated("densenet")
    model.train()
    before, before_hooks, inputs = snapshot(model), hooks(model), example.clone()
    weights = copy.deepcopy(dict(model.state_dict()))
    with SEExplainer(model) as explainer:
        ex = explainer(example)
        assert isinstance(ex, Explanation)
        ex.heatmap(), ex.influence(1), ex.with_gates(torch.zeros(1))
    assert same(snapshot(model), before) and hooks(model) == before_hooks and torch.equal(example, inputs)
    assert same(dict(model.state_dict()), weights)


def test_a_head_put_in_place_of_the_gated_one_is_an_error() -> None:
    model, example, _ = gated("resnet")
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, K))
    with pytest.raises(
        ValueError, match="no longer the linear layer that the gates were attached to"
    ) as error:
        explain(model, example)
    assert "\n" not in str(error.value)
    detach_se(model)
    assert sum(hooks(model)) == 0


# ---- training and files ----------


def test_training_with_a_penalty_closes_gates() -> None:
    x = random(96, 3, 8, 8)
    labels = (x.mean((2, 3)).repeat(1, 2)[:, :K] > 0).long()
    data, means = DataLoader(TensorDataset(x, labels), 32), []
    for sparsity in (0.0, 3.0):
        model, _ = zoo.build("sequential")
        attach_se(model, x[:2], per_target=True, reduction=2, start="paper")
        history = fit(
            model,
            data,
            data,
            epochs=8,
            lr=0.5,
            task="multilabel",
            gate_sparsity=sparsity,
            device="cpu",
            progress=False,
        )
        assert {"val_accuracy", "val_balanced_accuracy", "val_mean_ap", "val_loss"} < set(history[0])
        means.append(float(explain(model, x).gates.mean()))
        assert all(not m._forward_hooks for m in model[3][0].selib_se.modules())
    assert means[1] < means[0] - 0.1 and evaluate(model, data, task="multilabel")["loss"] > 0


@pytest.mark.parametrize("start", ["identity", "paper"])
def test_a_checkpoint_rebuilds_the_model(tmp_path: Path, start: str) -> None:
    path, x = tmp_path / "a.safetensors", random(2, 3, 44, 36)
    torch.manual_seed(0)
    model = small_resnet(3, image_size=(44, 36), widths=(4, 6, 8))
    zoo.liven(model)
    open_and_close(attach_se(model.eval(), x, per_target=True, reduction=3, start=start))  # type: ignore[call-overload]
    names = ["Smiling", "Bald", "ü"]
    save_checkpoint(
        model,
        path,
        architecture="small_resnet",
        classes=names,
        image_size=(44, 36),
        task="multilabel",
        widths=(4, 6, 8),
    )
    other, meta = load_checkpoint(path)
    assert meta["image_size"] == (44, 36) and meta["task"] == "multilabel" and meta["classes"] == names
    assert isinstance(attached(other)[""], TargetSEBlock) and meta["se"][0]["per_target"] is True
    assert torch.equal(run(other, x), run(model, x)) and same(
        dict(other.state_dict()), dict(model.state_dict())
    )
    assert torch.equal(
        explain(other, x).heatmap("top-gate", 1, select=TopK(2)),
        explain(model, x).heatmap("top-gate", 1, select=TopK(2)),
    )
    shared = small_resnet(3, image_size=(44, 36), widths=(4, 6, 8))
    attach_se(shared, x, reduction=3)
    with pytest.raises(ValueError, match="another architecture"):
        load_weights(shared, path)


@pytest.mark.slow
def test_whether_a_map_is_rectified_is_found_again_in_a_file(tmp_path: Path) -> None:
    path, x = tmp_path / "a.safetensors", image(64, batch=2)
    model = torchvision.models.densenet121(num_classes=3).eval()
    zoo.liven(model)
    block = attach_se(model, x, per_target=True, reduction=512)
    assert isinstance(block, TargetSEBlock) and block.rectifies
    open_and_close(block)
    save_checkpoint(model, path, architecture="densenet121", classes=["a", "b", "c"], image_size=64)
    other, _ = load_checkpoint(path)
    assert attached(other)[""].rectifies and torch.equal(run(other, x), run(model, x))
    assert torch.equal(explain(other, x).gates, explain(model, x).gates)


# ---- label-free gates ----------


@settings(max_examples=50, deadline=None)
@given(st.floats(-8, 8), st.floats(-8, 8))
def test_the_divergence_is_that_of_two_bernoullis(a: float, b: float) -> None:
    teacher, student = torch.tensor([a]), torch.tensor([b])
    expected = kl_divergence(Bernoulli(logits=teacher.double()), Bernoulli(logits=student.double()))
    assert torch.allclose(bernoulli_kl(teacher, student).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_divergence_is_stable_and_its_gradient_is_the_difference_of_probabilities() -> None:
    teacher = torch.tensor([-200.0, -30, 0, 2, 30, 200, 200])
    student = torch.tensor([200.0, -30, 0, -1, 35, 200, -200], requires_grad=True)
    found = bernoulli_kl(teacher, student)
    assert torch.allclose(found[[0, 6]], torch.tensor([200.0, 200.0]))  # saturated, and still with a gradient
    assert torch.allclose(found[[1, 2, 4, 5]], torch.zeros(4), atol=1e-6)
    gradient = torch.autograd.grad(found.sum(), student)[0]
    assert torch.allclose(gradient, student.detach().sigmoid() - teacher.sigmoid(), atol=1e-6)


C, OUTPUTS = 24, 6
PLANTED = torch.arange(18).view(OUTPUTS, 3)  # the channels that output k depends on; six more play no part


class Faces(nn.Module):
    """Each of six outputs depends on three channels of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(C, C, 1, bias=False), nn.Linear(C, OUTPUTS)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(C)[..., None, None])
            self.fc.weight.zero_().scatter_(1, PLANTED, 3.0)
            self.fc.bias.fill_(-9.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def faces(n: int = 600, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The model and maps whose means are positive; an output is yes when its channels are large, about one
    time in four.
    """
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(n, OUTPUTS, generator=generator) < 0.25
    means = 0.5 * torch.rand(n, C, generator=generator)
    means[:, :18] += 1.3 * there.repeat_interleave(3, 1)
    return Faces().eval(), means[:, :, None, None] + 0.1 * torch.tensor([[1.0, -1], [-1, 1]])


def batches(x: Tensor, size: int = 100) -> list[Any]:
    """(inputs, targets (B, K)), whose targets must play no part."""
    return [(part, torch.randint(2, (len(part), OUTPUTS))) for part in x.split(size)]


FAST: dict[str, Any] = {"epochs": 60, "batch_size": 64, "task": "multilabel"}


def opened(model: nn.Module, x: Tensor) -> Tensor:
    """Which channels each output's yes rests on, by the gates: (K, C), open for more than half of those
    images.
    """
    ex = explain(model, x)
    yes = ex.logits > 0
    gates = ex.gates if ex.gates.ndim == 3 else ex.gates[:, None].expand(-1, OUTPUTS, -1)
    return torch.stack([(gates[yes[:, k], k] > 0.5).float().mean(0) > 0.5 for k in range(OUTPUTS)])


@pytest.mark.slow
def test_gates_per_target_find_what_each_output_rests_on_and_shared_ones_cannot() -> None:
    model, x = faces()
    truth = torch.zeros(OUTPUTS, C, dtype=torch.bool).scatter_(1, PLANTED, True)
    report = fit_gates(model, batches(x), per_target=True, **FAST)
    found = opened(model, x)
    assert (found & truth).sum() >= 0.9 * truth.sum() and (found & ~truth).sum() == 0
    assert report.agreement >= 0.98 and report.agreement_positive >= 0.95 and report.open_gates < 0.15
    assert report.original_only_top == 1 and report.original_without_top < 0.85  # three of 24: the top decile
    assert report.random_only < 0.85 < report.random_without
    detach_se(model)
    shared = fit_gates(model, batches(x), **FAST)
    found = opened(model, x)
    assert shared.agreement >= 0.97 and isinstance(attached(model)[""], SEBlock)
    # open where another output is yes too: the channels of one cannot be told from those of another
    gates = explain(model, x).gates
    several = (run(faces()[0], x) > 0).sum(1) > 2
    assert ((gates[several] > 0.5).sum(1) > 3).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("per_target", [False, True])
@pytest.mark.parametrize("outputs", [2, 40])
def test_a_lambda_of_1_is_a_sensible_default_however_many_outputs_there_are(
    outputs: int, per_target: bool
) -> None:
    """Each output is yes one time in five, and rests on two of eighty channels."""
    generator = torch.Generator().manual_seed(0)
    there = (torch.rand(800, outputs, generator=generator) < 0.2).float()
    model = nn.Sequential(
        nn.Conv2d(80, 80, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, outputs)
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(80)[..., None, None])
        model[3].weight.copy_(5 * torch.eye(40).repeat(1, 2)[:outputs])
        model[3].bias.fill_(-7)
    means = 0.4 * torch.rand(800, 80, generator=generator)
    means[:, :outputs] += there
    means[:, 40 : 40 + outputs] += there
    x = means[:, :, None, None] + 0.1 * torch.tensor([[1.0, -1], [-1, 1]])
    report = fit_gates(model, list(x.split(200)), per_target=per_target, **FAST)
    assert report.agreement > 0.99 and report.agreement_positive > 0.97
    # what forty outputs share must stay open for the sake of each of them
    assert report.open_gates > 0.5 if outputs == 40 and not per_target else report.open_gates < 0.06
    assert report.original_only_top > 0.99 or (outputs == 40 and not per_target)


@pytest.mark.parametrize("per_target", [False, True])
def test_the_loss_is_the_docstrings(per_target: bool) -> None:
    model, x = faces(20)
    attach_se(model, x[:2], reduction=4, per_target=per_target)
    cache = cache_features(model, batches(x))
    with gradients_seen() as seen:
        fit_gates(model, cache, 0.7, task="multilabel", epochs=1, batch_size=100)
    kept = torch.randperm(20, generator=torch.Generator().manual_seed(0))[4:]
    torch.manual_seed(0)
    model.selib_se.restart("paper")
    z = x[kept].mean((2, 3))
    s = model.selib_se.excite(z)
    teacher = (z @ model.fc.weight.T + model.fc.bias).detach()
    student = ((s if per_target else s[:, None]) * z[:, None] * model.fc.weight).sum(2) + model.fc.bias
    loss = kl_divergence(Bernoulli(logits=teacher), Bernoulli(logits=student)).sum(1).mean()
    loss = loss + 0.7 * (s.mean((0, 2)).sum() if per_target else s.mean())
    expected = torch.autograd.grad(loss, list(model.selib_se.parameters()))
    assert len(seen) == 1
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(seen[0], expected, strict=True))


def test_labels_are_ignored_and_the_network_is_left_alone() -> None:
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # other labels
        model, x = faces(120)
        model.train()
        before, logits = snapshot(model), run(model, x)
        report = fit_gates(model, batches(x), per_target=True, task="multilabel", epochs=2)
        block = model.selib_se
        assert same(snapshot(model), before) and block.gain == 1 and block.bottleneck == C // 4
        assert all(p.grad is None and p.requires_grad for p in block.parameters())
        weights.append({k: v.clone() for k, v in block.state_dict().items()})
        detach_se(model)
        assert same(snapshot(model), before) and not any(hooks(model)) and torch.equal(run(model, x), logits)
        numbers = {k: v for k, v in report.as_dict().items() if k != "promise"}
        assert all(isinstance(v, int | float) for v in numbers.values()) and report.promise is None
        assert block.transparent and block.task == "multilabel" and torch.equal(run(model, x), logits)
    assert same(*weights)


def test_a_promise_is_a_share_of_decisions() -> None:
    model, x = faces(2000)
    report = fit_gates(model, batches(x), agreement=0.9, per_target=True, task="multilabel", epochs=4)
    # On 200 other images: all gates closed agree on the 75% that are no.
    assert 0.85 <= report.agreement < 1 and report.sparsity > 0.5


def test_a_class_is_predicted_by_gates_of_its_own_too() -> None:
    model, x = faces()
    report = fit_gates(model, [x], per_target=True, epochs=40, batch_size=64)
    assert report.agreement > 0.75 and report.agreement_positive == report.agreement  # chance: one in six
    assert report.original_only_top == 1 and report.open_gates < 0.1
    assert explain(model, x).gates.shape == (600, OUTPUTS, C)


def test_nothing_is_positive() -> None:
    model, x = faces(60)
    nn.init.constant_(model.fc.bias, -100.0)
    report = fit_gates(model, batches(x), task="multilabel", epochs=1)
    assert report.agreement == report.agreement_positive == 1


# ---- the cache and the channel test ----------


@pytest.mark.parametrize("name", LINEAR)
def test_the_cached_maps_give_the_logits_back(name: str) -> None:
    model, example, block = gated(name)
    halves = (
        [{k: v[:2] for k, v in example.items()}, {k: v[2:] for k, v in example.items()}]
        if isinstance(example, dict)
        else [example[:2], example[2:]]
    )
    halves = halves if name != "r3d" else [example]
    cache, outputs, ex = cache_features(model, halves), run(model, example), explain(model, example)
    n = len(outputs)
    assert close(cache.influence(), ex.influence(), ex.logits)
    assert close(every_influence(cache), torch.stack([ex.influence(k) for k in range(K)], 1), ex.logits)
    assert cache.maps.numel() == cache.squeezed.numel() == n * block.channels and cache.scales.shape == (
        n,
        K,
        block.channels,
    )
    assert close(cache.logits, outputs) and close(cache.run(cache.scales), outputs)
    assert close(cache.run(cache.scales, batch=1), outputs)
    assert close(cache.run(cache.scales[[n - 1, 0]], torch.tensor([n - 1, 0])), outputs[[n - 1, 0]], outputs)
    detach_se(model)
    attach_se(model, example, reduction=2, per_target=True)
    ungated = cache_features(model, halves)
    assert torch.equal(
        ungated.scales, torch.ones(n, block.channels)
    )  # one for all outputs: no K times the memory
    detach_se(model)
    assert close(ungated.run(ungated.scales), run(model, example)) and close(
        ungated.logits, run(model, example)
    )


def test_scales_of_both_kinds_in_one_pass() -> None:
    model, x = paper()
    block = attach_se(model, x, per_target=True)
    with block.override(lambda s: s if len(s) == 2 else s / (1 + torch.arange(3.0))[:, None]):
        cache = cache_features(model, [x, x[:1]])  # one scale for all outputs, then one for each
    assert cache.scales.shape == (3, 3, 4) and torch.equal(cache.scales[:2], torch.ones(2, 3, 4))
    assert torch.allclose(cache.scales[2, :, 0], torch.tensor([1.0, 0.5, 1 / 3]))
    assert close(cache.run(cache.scales), cache.logits)


def test_an_output_that_there_is_not() -> None:
    model, x = paper()
    attach_se(model, x)
    cache = cache_features(model, [x])
    for target in (3, -1):
        with pytest.raises(ValueError, match=f"target={target} is not among the 3 outputs 0..2"):
            cache.influence(target)


def fixed(block: SEBlock, s: Tensor) -> None:
    """Gates that are 0 or 1 (up to 1e-9) whatever the image."""
    with torch.no_grad():
        block.restart("paper")
        block.fc2.weight.zero_()
        block.fc2.bias.copy_((40 * s - 20).flatten())


def test_channel_test_per_target_by_hand() -> None:
    model, x = paper()  # ½ + 1 + 4 - 4, -¼ + 2, -1 - 2 + 12; ½ + 2 - 1, -¼ + 1, -1 - 4 + 1 + 3
    block = attach_se(model, x, per_target=True)
    cache = cache_features(model, [x])
    assert torch.allclose(cache.logits, torch.tensor([[1.5, 1.75, 9], [1.5, 0.75, -1]]))
    fixed(block, torch.tensor([[0.0, 0, 0, 1], [0, 1, 0, 0], [1.0, 0, 0, 0]]))
    found = channel_test(block, cache, task="multilabel", select=TopK(1))  # channels 3, 1 and 0
    expected = {
        "original": [[True, True, True], [True, True, True]],
        "gated": [[False, True, False], [False, False, True]],  # -3½, 1¾, -3; -½, -¼, -5
        "only_top": [[False, True, False], [False, False, True]],
        "without_top": [[True, False, False], [True, False, True]],  # ½, -¼, -1: the bias alone
        "original_only_top": [[False, True, False], [False, False, True]],
        "original_without_top": [[True, False, True], [True, True, False]],  # 5½, -¼, 11; 2½, ¾, 3
    }
    assert {k: v.tolist() for k, v in found.items() if k in expected} == expected
    others = {"another_only", "another_without", "random_only", "random_without"}
    assert set(found) == others | set(expected) and all(v.shape == (2, 3) for v in found.values())

    ranked = channel_test(block, cache, task="multilabel", select=TopK(1), ranking=every_influence(cache))
    # channels 1, 1, 3 and 0, 2, 3 by w·z
    assert ranked["original_only_top"].tolist() == [
        [True, True, True],
        [True, True, False],
    ]  # 4½, 1¾, 11; 2½, ¾, 2
    assert ranked["original_without_top"].tolist() == [
        [False, False, False],
        [False, False, True],
    ]  # -2½, -¼, -3; -½, -¼, -4
    labels = torch.tensor([[1, 0, 1], [0, 0, 0]])
    right = channel_test(block, cache, task="multilabel", select=TopK(1), targets=labels)["original"]
    assert right.tolist() == [[True, False, True], [False, False, True]]
    rows = channel_test(block, cache, task="multilabel", select=TopK(1), rows=torch.tensor([1, 0]))
    assert torch.equal(rows["original_without_top"], found["original_without_top"].flip(0))


def test_channel_test_of_shared_gates_by_hand() -> None:
    model, x = paper()
    block = attach_se(model, x)
    cache = cache_features(model, [x])
    fixed(block, torch.tensor([0.0, 0, 0, 1]))
    found = channel_test(block, cache, task="multilabel", select=TopK(1))  # channel 3 for all outputs
    assert found["gated"].tolist() == [[False, False, True], [False, False, False]]  # -3½, -¼, 11; -½, -¼, 2
    assert found["original_without_top"].tolist() == [
        [True, True, False],
        [True, True, True],
    ]  # 5½, 1¾, -3; 2½, ¾, -4
    by_one = channel_test(
        block, cache, task="multilabel", select=TopK(1), ranking=cache.influence(1)
    )  # channels 1 and 2
    assert by_one["original_without_top"].tolist() == [
        [False, False, True],
        [True, False, True],
    ]  # -2½, -¼, 9; 1½, -¼, -2
    each = channel_test(block, cache, task="multilabel", select=TopK(1), ranking=every_influence(cache))
    target = TargetSEBlock(4, 3)
    fixed(target, torch.tensor([0.0, 0, 0, 1]).expand(3, 4))
    assert same(
        each, channel_test(target, cache, task="multilabel", select=TopK(1), ranking=every_influence(cache))
    )
    predicted = channel_test(target, cache, select=TopK(1))  # a class: one answer for an image
    assert predicted["original"].tolist() == [True, True] and predicted["gated"].tolist() == [True, False]


def test_each_output_gets_random_channels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = faces(50)
    block = attach_se(model, x[:2], per_target=True)
    cache = cache_features(model, [x])
    asked: list[Tensor] = []

    class Spy(FeatureCache):
        def run(self, scales: Tensor, rows: Any = slice(None), batch: int = 1024) -> Tensor:
            asked.append(scales)
            return super().run(scales, rows, batch)

    spy = Spy(**{k: getattr(cache, k) for k in cache.__dataclass_fields__})
    kinds = list(channel_test(block, spy, task="multilabel", select=TopFraction(0.25), seed=1))
    only, rest = (dict(zip(kinds, asked, strict=True))[k] > 0 for k in ("random_only", "random_without"))
    assert only.shape == (50, OUTPUTS, C) and (only.sum(2) == 6).all() and (only ^ rest).all()
    assert not torch.equal(only[:, 0], only[:, 1])
    whole = channel_test(block, cache, task="multilabel", seed=1)
    monkeypatch.setattr(feats, "PORTION", 7)  # the portions are nobody's business
    assert same(channel_test(block, cache, task="multilabel", seed=1), whole)


def test_channels_for_each_output_need_a_linear_head() -> None:
    model, example = zoo.build("vgg")
    block = attach_se(model, example)
    cache = cache_features(model, [example])
    with pytest.raises(ValueError, match=r"give scales \(n, C\) for all targets"):
        channel_test(block, cache, task="multilabel", ranking=torch.rand(3, K, 12))
    assert channel_test(block, cache, task="multilabel")["original"].shape == (3, K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "binary"}, "task='binary' is unknown"),
        ({"loader": []}, "the loader is empty"),
        ({"loader": [torch.zeros(1, C, 2, 2)]}, "at least three images"),
    ],
)
def test_bad_arguments_leave_the_model_bare(options: dict[str, Any], message: str) -> None:
    model, x = faces(10)
    before = hooks(model)
    with pytest.raises(ValueError, match=message):
        fit_gates(model, **({"loader": batches(x), "per_target": True} | options))
    assert attached(model) == {} and hooks(model) == before


def test_a_shared_block_is_not_taken_for_another() -> None:
    model, x = faces(10)
    block = attach_se(model, x[:2])
    with pytest.raises(
        ValueError,
        match="per_target=True, but the attached SE block is shared by all outputs: call selib.detach_se",
    ):
        fit_gates(model, batches(x), per_target=True)
    with pytest.raises(ValueError, match="task='binary'"):
        channel_test(block, cache_features(model, [x]), task="binary")  # type: ignore[arg-type]
    vgg, example = zoo.build("vgg")
    with pytest.raises(ValueError, match="not global average pooling and linear"):
        fit_gates(vgg, [example], per_target=True)
    assert attached(vgg) == {}
