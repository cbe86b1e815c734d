"""Gates through the classifier, and networks that a fit of gates leaves as they are, bit for bit."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models as zoo
import torch
import torchvision
from tiny_models import K, hooks, image, open_and_close, random, run, same, snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selib import gates as g
from selib.attach import attach_se, detach_se
from selib.checkpoint import load_checkpoint, save_checkpoint
from selib.explainer import explain
from selib.explanation import METHODS
from selib.forward import attached
from selib.gates import fit_gates
from selib.heatmap import normalize, resize, weighted_sum
from selib.se import HeadSEBlock, SEBlock, TargetSEBlock
from selib.select import TopK
from selib.train import fit
from studies.networks.small_resnet import small_resnet

SPREAD = math.sqrt(102 / 36 / 5)  # the standard deviation of the weights 1, 0, 2, 0, 1, 1
LINEAR = ["resnet", "densenet", "efficientnet", "swin", "r3d", "functional", "dict output", "sequential"]


def sigmoid(*x: float) -> Tensor:
    return torch.tensor([1 / (1 + math.exp(-one)) for one in x])


class Paper(nn.Module):
    """Three 1x2 maps that pass as they are, and two classes that are a draw where the means are 1, 2, 3."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(3)[..., None, None])
            self.fc.weight.copy_(torch.tensor([[1.0, 0, 2], [0, 1, 1]]))
            self.fc.bias.copy_(torch.tensor([0.0, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def paper() -> tuple[nn.Module, Tensor]:
    means = torch.tensor([[1.0, 2, 3]])
    return Paper().eval(), means[:, :, None, None] + torch.tensor([-0.5, 0.5])


def paper_of_draws() -> Tensor:
    """Thirty samples whose two logits, z1 + 2 z3 and z2 + z3 + 2, differ by 0.1 to 0.6."""
    means = torch.tensor([[1.0, 2, 3]]).repeat(30, 1)
    means[:, 0] += torch.linspace(0.1, 0.6, 30) * torch.tensor([1.0, -1]).repeat(15)
    return means[:, :, None, None] + torch.tensor([-0.5, 0.5])


@torch.no_grad()
def learned(block: SEBlock, slope: float = 2.0, seed: int = 0) -> HeadSEBlock:
    assert isinstance(block, HeadSEBlock)
    block.slope.fill_(slope)
    block.sharpness.fill_(3)
    block.offset.copy_(random(block.channels, seed=seed))
    return block


# ---- the block ----------


def test_gates_one_can_check_on_paper() -> None:
    model, x = paper()
    block = attach_se(model, x, form="head", start="paper")
    assert isinstance(block, HeadSEBlock) and block.layer is model.fc
    with torch.no_grad():
        block.slope.fill_(2.0)
        block.offset.copy_(torch.tensor([0.0, -1, 1]))
    ex = explain(model, x)
    # Wz + b = 7, 7 and p = ½, ½; Wᵀp = ½, ½, 1½; z = 1, 2, 3, whose deviation is 1
    shared = sigmoid(2 * 0.5 / SPREAD, 2 * 1 / SPREAD - 1, 2 * 4.5 / SPREAD + 1)
    first = sigmoid(2 * 1 / SPREAD, -1, 2 * 6 / SPREAD + 1)
    second = sigmoid(0, 2 * 2 / SPREAD - 1, 2 * 3 / SPREAD + 1)
    for found, expected in (
        (ex.gates, shared),
        (ex.gates_of(), shared),
        (ex.gates_of(0), first),
        (ex.gates_of([1]), second),
    ):
        assert torch.allclose(found, expected[None], atol=1e-6)
    means = shared * torch.tensor([1.0, 2, 3])
    assert torch.allclose(ex.logits, (means @ model.fc.weight.T + model.fc.bias)[None], atol=1e-6)
    assert torch.allclose(ex.map("top-gate", 1, TopK(2)), x[:, 1:].mean(1))  # channels 1 and 2
    assert torch.allclose(ex.map("top-gate", 0, TopK(2)), x[:, [0, 2]].mean(1))  # channels 0 and 2
    assert torch.equal(ex.map("top-gate", None, TopK(1)), x[:, 2])
    assert torch.allclose(ex.map("gate", 1), weighted_sum(x, second[None]), atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_the_identity_start_changes_no_output_and_target_gates_are_those_of_one_hot(name: str) -> None:
    model, example = zoo.build(name)
    outputs, state = run(model, example), list(model.state_dict())
    block = attach_se(model, example, form="head")
    assert isinstance(block, HeadSEBlock) and torch.equal(run(model, example), outputs)
    added = set(model.state_dict()) - set(state)
    assert {key.rpartition(".")[2] for key in added} == {"slope", "offset", "sharpness"}  # no weight twice
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))
    learned(block)
    ex = explain(model, example)
    assert not torch.equal(run(model, example), outputs)
    maps = ex.features.relu() if block.rectifies else ex.features
    z = maps.flatten(2).mean(2)
    for target in (0, K - 1):
        e = z / z.std(1, keepdim=True) * block.layer.weight[target] / block.layer.weight.std()
        expected = torch.sigmoid(2 * e + block.offset)
        assert torch.allclose(ex.gates_of(target), expected, atol=1e-5)
    assert block.rectifies == (name in ("densenet", "functional"))
    p = (3 * (z @ block.layer.weight.T + block.layer.bias)).softmax(1)
    e = z / z.std(1, keepdim=True) * (p @ block.layer.weight) / block.layer.weight.std()
    assert torch.allclose(ex.gates, torch.sigmoid(2 * e + block.offset), atol=1e-5)


def test_maps_and_weights_without_spread_give_numbers() -> None:
    model, _ = paper()
    x = torch.ones(2, 3, 1, 2) * torch.tensor([1.0, 0])[:, None, None, None]
    outputs = run(model, x)
    attach_se(model, random(2, 3, 1, 2), form="head")
    assert torch.equal(run(model, x), outputs)  # 0 · e, and e is finite
    nn.init.zeros_(model.fc.weight)
    learned(model.selib_se)
    assert run(model, x).isfinite().all() and explain(model, x).gates.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, example = zoo.build("sequential")
    reference = copy.deepcopy(model)
    learned(attach_se(reference, example, form="head"))
    model, example = model.to(dtype), example.to(dtype)
    outputs = run(model, example)
    learned(attach_se(model, example, form="head"), 0.0)
    model[3][0].selib_se.offset.data.zero_()
    assert torch.equal(run(model, example), outputs)
    learned(attached(model)[""])
    gates = explain(model, example).gates
    assert gates.dtype == torch.float32 and run(model, example).dtype == dtype
    slack = 1e-5 if dtype == torch.float64 else 0.1
    assert (gates - explain(reference, example.float()).gates).abs().max() < slack
    assert gates.bfloat16().float().ne(gates).any()  # float32 throughout, not rounded on the way


def test_training_with_labels_moves_slope_and_offset_and_the_network() -> None:
    x = random(64, 3, 32, 32)
    data = DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), 16)
    model, _ = zoo.build("sequential")
    block = attach_se(model, x[:2], form="head")
    assert isinstance(block, HeadSEBlock)
    before = block.layer.weight.clone()
    fit(model, data, epochs=2, lr=0.1, device="cpu", progress=False)
    assert float(block.slope.detach()) != 0 and block.offset.abs().min() > 0
    assert not torch.equal(block.layer.weight, before) and not block.transparent
    with pytest.raises(ValueError, match="was trained with the network, which needs it"):
        fit_gates(model, data)


def test_fit_says_what_the_outputs_are() -> None:
    x = random(8, 3, 32, 32)
    model, _ = zoo.build("sequential")
    block = attach_se(model, x, form="head")
    data = DataLoader(TensorDataset(x, torch.ones(8, K).long()), 8)
    fit(model, data, epochs=1, task="multilabel", device="cpu", progress=False)
    assert block.task == "multilabel"


def test_a_classifier_put_in_place_of_the_gates_own_is_an_error() -> None:
    model, x = paper()
    attach_se(model, x, form="head")
    model.fc = copy.deepcopy(model.fc)
    with pytest.raises(ValueError, match="no longer the linear layer that the gates were attached to"):
        explain(model, x)


def test_deepcopy_and_pickle_read_the_weights_of_their_own_model() -> None:
    model, x = paper()
    learned(attach_se(model, x, form="head"))
    gates = explain(model, x).gates
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.selib_se.layer is twin.fc and torch.equal(explain(twin, x).gates, gates)
        nn.init.zeros_(twin.fc.weight)
        assert not torch.equal(explain(twin, x).gates, gates)
        assert torch.equal(explain(model, x).gates, gates)


# ---- what is refused ----------


def test_heads_that_are_not_linear_streams_and_other_forms() -> None:
    vgg, example = zoo.build("vgg")
    for refused in (
        lambda: attach_se(vgg, example, form="head"),
        lambda: fit_gates(vgg, [example], form="head"),
    ):
        with pytest.raises(
            ValueError, match="what follows 'avgpool' is not global average pooling and linear"
        ):
            refused()
        assert attached(vgg) == {}
    model, x = paper()
    with pytest.raises(ValueError, match=r'form="head" with the streams at=\{\'a\': \'body\'\}'):
        attach_se(model, x, at={"a": "body"}, form="head")
    with pytest.raises(ValueError, match="per_target=True has bottlenecks of its own"):
        attach_se(model, x, per_target=True, form="head")
    with pytest.raises(ValueError, match="form='tree' is unknown"):
        attach_se(model, x, form="tree")  # type: ignore[call-overload]
    assert attached(model) == {}
    for there, asked in (("bottleneck", "head"), ("head", "bottleneck")):
        attach_se(model, x, form=there)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match=f"form='{asked}', but the attached SE block has another form"):
            fit_gates(model, [x] * 3, form=asked)  # type: ignore[arg-type]
        assert not attached(model)[""].transparent
        detach_se(model)


def test_the_sharper_the_more_are_the_gates_those_of_the_answer() -> None:
    x, distances = paper_of_draws(), []
    for sharpness in (1.0, 4.0, 1e4):
        model = Paper().eval()
        fit_gates(model, [x], epochs=1, sharpness=sharpness)
        ex = explain(model, x)
        assert model.selib_se.sharpness == sharpness
        own = torch.stack([ex.gates_of(int(k))[i] for i, k in enumerate(ex.predicted)])
        distances.append(float((ex.gates - own).abs().max()))
    assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-6


def test_which_form_fit_gates_chooses() -> None:
    x = random(6, 3, 32, 32)
    for options, kind in (
        ({}, HeadSEBlock),
        ({"task": "multilabel"}, SEBlock),
        ({"reduction": 2}, SEBlock),
        ({"form": "bottleneck"}, SEBlock),
        ({"form": "head", "task": "multilabel"}, HeadSEBlock),
        ({"per_target": True}, TargetSEBlock),
    ):
        model, _ = zoo.build("sequential")
        fit_gates(model, [x], epochs=1, **options)
        assert type(attached(model)[""]) is kind
    one = nn.Sequential(zoo.convolutions(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1)).eval()
    fit_gates(one, [x], epochs=1)  # the classes of one output cannot be told apart
    assert type(attached(one)[""]) is SEBlock
    wide = nn.Sequential(nn.Conv2d(3, 600, 3), nn.ReLU(), nn.Flatten(), nn.Linear(600 * 900, 2)).eval()
    assert attached(wide) == {} and fit_gates(wide, [x], epochs=1).images == 6
    assert attached(wide)[""].bottleneck == 300  # C // 2: at most 256, but for the rounding of r


# ---- as it was, bit for bit ----------

FORMS: list[dict[str, Any]] = [
    {"form": "head"},
    {"form": "bottleneck"},
    {"per_target": True},
    {"form": "bottleneck", "task": "multilabel"},
]


class InPlace(nn.Module):
    """BatchNorm and a ReLU in place behind the map."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.fc = nn.Conv2d(3, 6, 3, 4, 1), nn.BatchNorm2d(6), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.relu(self.norm(self.body(x)), inplace=True).mean((2, 3)))


def in_place() -> nn.Module:
    torch.manual_seed(0)
    model = InPlace()
    zoo.liven(model)
    return model.eval()


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", ["sequential", "densenet", "resnet", "in place"])
def test_a_fit_leaves_every_output_as_it_was(name: str, options: dict[str, Any]) -> None:
    x = image(64, batch=8)
    model = in_place() if name == "in place" else zoo.build(name)[0]
    outputs = run(model, x)
    model.train()
    before = snapshot(model)
    fit_gates(model, [x], epochs=3, **options)
    assert same(snapshot(model), before) and all(m.training for m in attached(model)[""].modules())
    model.eval()
    block = attached(model)[""]
    assert torch.equal(run(model, x), outputs) and block.transparent and not block.acts
    assert (explain(model, x).gates != 0.5).any()
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, x), outputs) and attached(twin)[""].transparent
    with block.override(lambda s: s):
        acting = run(model, x)
        assert block.acts and not torch.equal(acting, outputs)
    assert torch.allclose(explain(model, x).with_gates(lambda s: s), acting, atol=1e-4 * acting.abs().max())
    assert torch.equal(run(model, x), outputs)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_file_keeps_form_task_and_transparency(options: dict[str, Any], tmp_path: Path) -> None:
    path, x = tmp_path / "a.safetensors", image(32, batch=8)
    torch.manual_seed(0)
    model = small_resnet(3, image_size=32, widths=(4, 6, 8)).eval()
    zoo.liven(model)
    fit_gates(model, [x], epochs=3, **options)
    save_checkpoint(
        model, path, architecture="small_resnet", classes=["a", "b", "c"], image_size=32, widths=(4, 6, 8)
    )
    other, _ = load_checkpoint(path)
    block, wanted = attached(other)[""], attached(model)[""]
    assert (
        type(block) is type(wanted) and block.transparent and block.task == options.get("task", "multiclass")
    )
    assert torch.equal(run(other, x), run(model, x))
    mine, theirs = explain(model, x), explain(other, x)
    assert torch.equal(theirs.gates, mine.gates) and torch.equal(theirs.gates_of(1), mine.gates_of(1))
    for method in METHODS:
        assert torch.equal(theirs.heatmap(method, 1), mine.heatmap(method, 1))
    detach_se(model)
    attach_se(model, x, form="head")
    save_checkpoint(
        model, path, architecture="small_resnet", classes=["a", "b", "c"], image_size=32, widths=(4, 6, 8)
    )
    acting = attached(load_checkpoint(path)[0])[""]
    assert isinstance(acting, HeadSEBlock) and not acting.transparent


def test_torchvision_files_with_a_rectified_head(tmp_path: Path) -> None:
    path, x = tmp_path / "a.safetensors", image(64, batch=3)
    model = torchvision.models.densenet121(num_classes=3).eval()
    zoo.liven(model)
    learned(attach_se(model, x, form="head"))
    save_checkpoint(model, path, architecture="densenet121", classes=["a", "b", "c"], image_size=64)
    other, _ = load_checkpoint(path)
    block = attached(other)[""]
    assert isinstance(block, HeadSEBlock) and block.rectifies and block.layer is other.classifier
    assert torch.equal(run(other, x), run(model, x))


class Stops:
    """A loader that is interrupted after its first batch."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x
        raise KeyboardInterrupt


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_an_interrupted_fit_leaves_the_model_as_it_was(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = zoo.build("sequential")[0], image(32, batch=8)
    outputs, state, before = run(model, x), copy.deepcopy(dict(model.state_dict())), hooks(model)

    def interrupt() -> None:
        with pytest.raises(KeyboardInterrupt):
            fit_gates(model, Stops(x), **options)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(g, "gradients_of", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            fit_gates(model, [x], **options)

    interrupt()
    assert attached(model) == {} and hooks(model) == before and same(dict(model.state_dict()), state)
    kind = {key: value for key, value in options.items() if key != "task"}
    block = attach_se(model, x, start="identity", **kind)
    for transparent in (False, True):
        block.transparent, block.task = transparent, "multiclass"
        state = copy.deepcopy(dict(model.state_dict()))
        interrupt()
        assert attached(model)[""] is block and same(dict(model.state_dict()), state)
        assert (block.transparent, block.task, block.gain) == (transparent, "multiclass", 2.0)
        assert torch.equal(run(model, x), outputs)
        with torch.no_grad():  # then one that was fitted before: its weights are no start
            for p in block.parameters():
                p += 0.1


# ---- planted channels ----------


class Classes(nn.Module):
    """Each of five classes reads three channels of its own; ten more play no part."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(25, 25, 1, bias=False), nn.Linear(25, 5)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(25)[..., None, None])
            self.fc.weight.copy_(torch.cat([torch.eye(5).repeat_interleave(3, 1), torch.zeros(5, 10)], 1) * 2)
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def test_the_gates_open_what_each_image_s_class_reads_and_those_of_another_image_fail() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (400,), generator=generator)
    read = nn.functional.one_hot(labels, 5).repeat_interleave(3, 1)
    means = 0.6 * torch.rand(400, 25, generator=generator)
    means[:, :15] += read
    x = means[:, :, None, None] + torch.tensor([-0.1, 0.1])
    model = Classes().eval()
    report = fit_gates(model, [x], sparsity=0.1)
    ex = explain(model, x)
    assert torch.equal(ex.predicted, labels)
    played = torch.cat([read, torch.zeros(400, 10)], 1).bool()
    assert torch.equal(ex.selected("top-gate", select=TopK(3)), played)
    opened = ex.gates > 0.5
    assert not opened[~played].any() and opened[played].double().mean() > 0.85  # the price closes the weakest
    assert report.agreement == report.original_only_top == 1 and 0.1 < report.open_gates <= 0.12
    assert report.another_only < 0.5 and report.original_without_top < 0.5 and report.rule_empty == 0
    for target in range(5):
        wanted = torch.zeros(25, dtype=torch.bool)
        wanted[3 * target : 3 * target + 3] = True
        own = labels == target
        assert not (ex.gates_of(target)[own] > 0.5)[:, ~wanted].any()
        assert torch.equal(ex.selected("top-gate", target, TopK(3))[own], wanted.expand(int(own.sum()), 25))


# ---- influence, with and without gates ----------


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", ["resnet", "functional", "densenet", "gru head"])
def test_influence_after_a_fit_is_that_of_the_network_without_a_block(
    name: str, options: dict[str, Any]
) -> None:
    if name == "gru head" and options.get("form") != "bottleneck":
        return
    model, x = zoo.build(name)[0], image(64, batch=6)
    untouched = copy.deepcopy(model)
    attach_se(untouched, x)  # at its identity start: the network itself
    fit_gates(model, [x], epochs=3, **options)
    ex, bare = explain(model, x), explain(untouched, x)
    assert torch.equal(ex.logits, bare.logits)
    scale = bare.logits.abs().max()
    for target in (None, 2):
        assert (ex.heatmap("influence", target) - bare.heatmap("influence", target)).abs().max() <= 1e-6
        assert (ex.influence(target) - bare.influence(target)).abs().max() <= 1e-6 * scale
    with attached(model)[""].override(lambda s: s):
        acting = explain(model, x)
    for target in (0, 2):
        for contrast in (False, True):
            gated = ex.influence(target, contrast=contrast, gated=True)
            expected = acting.influence(target, contrast=contrast)
            assert (gated - expected).abs().max() <= 1e-4 * scale
            assert not torch.allclose(gated, ex.influence(target, contrast=contrast), atol=1e-3 * scale)
            found = ex.heatmap("gated-influence", target, contrast=contrast)
            assert (found - acting.heatmap("influence", target, contrast=contrast)).abs().max() <= 1e-3
    assert torch.equal(ex.channel_weights("gated-influence", 1), ex.influence(1, gated=True))


@pytest.mark.parametrize("form", ["bottleneck", "head"])
@pytest.mark.parametrize("name", ["resnet", "sequential", "swin"])
def test_influence_is_grad_cam_at_the_gated_map_and_not_at_the_map(name: str, form: Any) -> None:
    """Selvaraju et al., 2017, by autograd: ReLU(Σ_c mean(∂y/∂A_c)·A_c), with A = F' and with A = F."""
    model, x = zoo.build(name)
    block = attach_se(model, x, form=form, reduction=1)
    learned(block) if form == "head" else open_and_close(block)
    ex = explain(model, x)

    def grad_cam(module: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = module.register_forward_hook(
            lambda m, args, output: seen.append(output)
        )  # after selib's own
        logit = model(x)[:, 2].sum()
        handle.remove()
        slope = torch.autograd.grad(logit, seen[0])[0]
        maps, slope = (t.movedim(-1, 1) if block.layout == "B*C" else t for t in (seen[0].detach(), slope))
        cam = weighted_sum(maps, slope.flatten(2).mean(2)).relu()
        return normalize(resize(cam, (32, 32)))

    influence = ex.heatmap("influence", 2, size=(32, 32))
    gated_map = model.get_submodule(block.site)
    assert (grad_cam(gated_map) - influence).abs().max() <= 1e-5
    assert (grad_cam(block.features) - influence).abs().max() > 1e-2
