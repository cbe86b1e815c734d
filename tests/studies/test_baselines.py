"""Baselines against closed forms and the libraries' own pipelines; nothing of the model may change."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import selib
from selib.attach import attach_se
from selib.heatmap import normalize, resize
from studies import baselines as b
from studies import explainers
from studies.networks import build as build_network

TARGETS = torch.tensor([2, 0, 1, 2])


class Net(nn.Module):
    """Convolutions, global average pooling and a linear head: every CAM has a closed form at ``body``."""

    def __init__(self, stride: int = 2, channels: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride, 1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, channels, 3, 1, 1), nn.ReLU(inplace=True))
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.norm(self.stem(x))).mean((2, 3)))


def net(stride: int = 2) -> Net:
    torch.manual_seed(0)
    model = Net(stride)
    model.norm.running_mean.normal_()
    nn.init.constant_(
        model.fc.bias, 3.0
    )  # positive logits: Ablation-CAM in the paper's and in our form agree
    return model.eval()


def images(batch: int = 4, height: int = 10, width: int = 12) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features(model: Net, x: Tensor) -> Tensor:
    return model.body(model.norm(model.stem(x)))


def finish(maps: Tensor, x: Tensor) -> Tensor:
    return normalize(resize(maps.relu(), x.shape[2:]))


def everything(model: nn.Module, layer: b.Layer) -> dict[str, b.Explainer]:
    found = b.cams(model, layer, batch_size=7) | b.controls(model, layer, count=2)
    return found | {"integrated gradients": b.integrated_gradients(model, steps=4)}


ALL = sorted(everything(net(), "body"))


def test_every_baseline_of_the_design_is_there() -> None:
    cams = [
        "Grad-CAM",
        "Grad-CAM++",
        "HiResCAM",
        "LayerCAM",
        "XGrad-CAM",
        "Score-CAM",
        "Ablation-CAM",
        "Eigen-CAM",
        "FEM",
    ]
    assert list(b.cams(net(), "body")) == cams
    others = [
        "uniform noise",
        "centre prior",
        "mean of channels",
        "2 random channels",
        "integrated gradients",
    ]
    assert set(ALL) == {*cams, *others}


# ---- closed forms on global average pooling + linear ----------


def closed_form(name: str, model: Net, x: Tensor) -> Tensor:
    f = features(model, x)
    w = model.fc.weight.detach()[TARGETS][:, :, None, None]
    g = w / f[0, 0].numel()  # the gradient of the logit, the same at every position
    weights = {
        "Grad-CAM": w,
        "HiResCAM": w,
        "XGrad-CAM": w,
        "LayerCAM": w.relu(),
        "Ablation-CAM": w * f.mean((2, 3), keepdim=True),
        "Grad-CAM++": g.relu() * g**2 / (2 * g**2 + f.sum((2, 3), keepdim=True) * g**3 + 1e-6),
        "FEM": (f > f.mean((2, 3), keepdim=True) + 2 * f.std((2, 3), keepdim=True, correction=0))
        .double()
        .mean((2, 3), True),
        "mean of channels": torch.ones_like(w),
    }
    return finish((weights[name] * f).sum(1), x)


@pytest.mark.parametrize(
    "name",
    [
        "Grad-CAM",
        "HiResCAM",
        "XGrad-CAM",
        "LayerCAM",
        "Ablation-CAM",
        "Grad-CAM++",
        "FEM",
        "mean of channels",
    ],
)
def test_closed_form_on_pooling_and_a_linear_head(name):
    model, x = net(), images()
    found = everything(model, model.body)[name](x, TARGETS)
    expected = closed_form(name, model, x)
    assert expected.amax((1, 2)).tolist() == [1, 1, 1, 1]  # no map is empty, so the comparison says something
    assert torch.allclose(found, expected, atol=1e-4)


def test_score_cam_by_its_definition():
    model, x = net(), images()
    f = features(model, x)
    expected = torch.zeros_like(x[:, 0])
    for i, target in enumerate(TARGETS.tolist()):
        gain = []
        for channel in f[i]:
            mask = (channel - channel.min()) / (channel.max() - channel.min())
            mask = nn.functional.interpolate(mask[None, None], x.shape[2:], mode="bilinear")
            with torch.no_grad():
                gain.append(model(x[i : i + 1] * mask)[0, target] - model(x[i : i + 1])[0, target])
        weighted = torch.stack(gain).softmax(0) @ f[i].flatten(1)
        expected[i] = finish(weighted.view(1, *f.shape[2:]), x)[0]
    assert torch.allclose(b.cams(model, "body")["Score-CAM"](x, TARGETS), expected, atol=1e-4)


def test_eigen_cam_is_the_principal_component_turned_to_its_larger_extreme():
    model, x = net(), images()
    f = features(model, x).flatten(2).double().numpy()
    maps = []
    for sample in f:
        centred = (sample - sample.mean(1, keepdims=True)).T
        values, vectors = np.linalg.eigh(centred.T @ centred)
        component = centred @ vectors[:, values.argmax()]
        maps.append(component if component.max() >= -component.min() else -component)
    shape = features(model, x).shape[2:]
    expected = finish(torch.tensor(np.array(maps)).view(-1, *shape), x)
    assert torch.allclose(b.cams(model, "body")["Eigen-CAM"](x, TARGETS), expected, atol=1e-4)


def test_integrated_gradients_of_a_linear_model_are_weight_times_input():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 10 * 12, 3))
    x = images()
    weight = model[1].weight.detach()[TARGETS].view_as(x)
    found = b.integrated_gradients(model)(x, TARGETS)
    assert torch.allclose(found, normalize((weight * x).abs().sum(1)), atol=1e-4)


def test_integrated_gradients_of_a_cubic_model_in_closed_form() -> None:
    class Cubic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, 10, 12, generator=torch.Generator().manual_seed(2)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bchw,kchw->bk", x**3, self.weight)

    model, x = Cubic(), images()
    # ∫ 3 a² w x² da · x = w x³; two points are enough for a square
    expected = normalize((model.weight.detach()[TARGETS] * x**3).abs().sum(1))
    for steps in (2, 16):
        assert torch.allclose(b.integrated_gradients(model, steps=steps)(x, TARGETS), expected, atol=1e-5)


# ---- against grad-cam's own pipeline ----------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("Grad-CAM", "GradCAM"),
        ("Grad-CAM++", "GradCAMPlusPlus"),
        ("HiResCAM", "HiResCAM"),
        ("LayerCAM", "LayerCAM"),
        ("XGrad-CAM", "XGradCAM"),
        ("FEM", "FEM"),
        ("Ablation-CAM", "AblationCAM"),
    ],
)
def test_same_map_as_grad_cam_itself(name: str, theirs: str) -> None:
    """Not Score-CAM, whose masks it stretches to the corners, nor Eigen-CAM with its sign left to chance."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = net(stride=1), images()  # the map has the size of the image: no resizing on either side
    model.body = nn.Sequential(
        *model.body, nn.Conv2d(5, 5, 3, 1, 1), nn.ReLU(), nn.Flatten(1), nn.Unflatten(1, (5, 10, 12))
    )
    assert features(model, x).amin() == 0  # else grad-cam ablates with a huge negative value
    assert (model(x) > 0).all()
    with getattr(pytorch_grad_cam, theirs)(model, [model.body[2]]) as cam:
        expected = torch.from_numpy(cam(x, [ClassifierOutputTarget(t) for t in TARGETS.tolist()]))
    assert torch.allclose(b.cams(model, "body.2")[name](x, TARGETS), expected, atol=1e-4)


# ---- clips ----------


class Listener(nn.Module):
    """Faces (B, T, H, W) and sound (B, T, 2) -> logits (B, T, 2), through a recurrent head."""

    def __init__(self) -> None:
        super().__init__()
        self.face = nn.Sequential(nn.Conv3d(1, 4, 3, (1, 2, 2), 1), nn.ReLU())
        self.gru, self.fc = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, face: Tensor, audio: Tensor) -> dict[str, Tensor]:
        seen = self.face(face[:, None]).mean((3, 4)).mT
        return {"logits": self.fc(self.gru(torch.cat([seen, audio], 2))[0])}


@pytest.mark.parametrize("target", [0, 1])
def test_grad_cam_of_a_clip_has_one_weight_a_channel_for_all_frames(target: int) -> None:
    torch.manual_seed(0)
    model = Listener()
    inputs = {"face": torch.randn(1, 6, 8, 12), "audio": torch.randn(1, 6, 2)}
    attach_se(model, inputs, at={"face": "face"}, reduction=2)
    found = b.clip_grad_cam(model, inputs, "face", target)
    assert model.training and not found.requires_grad and all(p.grad is None for p in model.parameters())

    plain = copy.deepcopy(model).eval()
    f = plain.face[:2](inputs["face"][:, None]).detach().requires_grad_()
    block = plain.selib_se["face"]
    gated = block.scale(f, block.gates(f)).mean((3, 4)).mT
    logits = plain.fc(plain.gru(torch.cat([gated, inputs["audio"]], 2))[0])
    (gradient,) = torch.autograd.grad(logits[..., target].sum(), f)
    raw = (gradient.mean((2, 3, 4), keepdim=True) * f.detach()).sum(1).relu()
    assert torch.allclose(found, normalize(resize(raw, (6, 8, 12)))[0], atol=1e-5)


# ---- every explainer ----------


@pytest.mark.parametrize("name", ALL)
def test_maps_are_heatmaps_and_do_not_depend_on_batch_mates(name):
    model, x = net(), images()
    explain = everything(model, "body")[name]
    together = explain(x, TARGETS)
    assert together.shape == (4, 10, 12) and together.dtype == torch.float32 and not together.requires_grad
    assert together.amin((1, 2)).tolist() == [0] * 4 and together.amax((1, 2)).tolist() == [1] * 4
    alone = torch.cat([explain(x[i : i + 1], TARGETS[i : i + 1]) for i in range(4)])
    assert torch.allclose(alone, together, atol=1e-4)
    order = [2, 0, 3, 1]
    assert torch.allclose(explain(x[order], TARGETS[order]), together[order], atol=1e-4)
    assert torch.equal(explain(x, TARGETS), together)


@pytest.mark.parametrize("name", ALL)
def test_the_model_and_the_random_state_are_left_as_they_were(name):
    model, x = net(), images().requires_grad_()
    model.train()
    model.norm.eval()  # modes are kept one by one
    model.stem.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    hooks = [model.body.register_forward_hook(lambda m, a, out: None)]
    explain = everything(model, "body")[name]

    def state() -> list[object]:
        counts = [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ]
        return [counts, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]]

    before, weights, random = state(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    explain(x, TARGETS)
    with torch.no_grad():
        explain(x, TARGETS)
    with torch.inference_mode():
        explain(x.detach(), TARGETS)
    assert state() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None and model.fc.bias.grad is None and model.body[1].weight.grad is None
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    hooks[0].remove()


@pytest.mark.parametrize("name", [n for n in ALL if "CAM" in n])
def test_nothing_stays_behind_when_the_model_fails(name):
    model, x = net(), images()
    explain = everything(model, "body")[name]
    model.fc = nn.Linear(99, 3)  # the head breaks after the hooks are set
    with pytest.raises(RuntimeError):
        explain(x, TARGETS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "Grad-CAM",
        "Grad-CAM++",
        "HiResCAM",
        "LayerCAM",
        "XGrad-CAM",
        "Score-CAM",
        "Ablation-CAM",
        "mean of channels",
    ],
)
def test_an_in_place_relu_behind_the_layer_changes_nothing(name):
    model, x = net(), images()
    plain = copy.deepcopy(model)
    plain.body[2] = nn.ReLU()
    found, expected = (everything(m, "body.1")[name](x, TARGETS) for m in (model, plain))
    assert torch.equal(found, expected)


def test_a_frozen_model_has_maps_all_the_same():
    model, x = net(), images()
    expected = b.cams(model, "body")["Grad-CAM"](x, TARGETS)
    model.requires_grad_(False)
    assert torch.equal(b.cams(model, "body")["Grad-CAM"](x, TARGETS), expected)


def test_an_attached_block_shows_f_inside_and_the_gated_map_at_its_site():
    model, x = net(), images()
    plain = features(model, x)
    block = attach_se(model, x, at="body", reduction=2)
    nn.init.ones_(block.fc1.bias)
    nn.init.normal_(block.fc2.weight, std=3)
    gated = features(model, x)
    assert not torch.allclose(plain, gated)
    for layer, f in ((block.features, plain), ("body", gated)):
        assert torch.allclose(b.mean_of_channels(model, layer)(x, TARGETS), finish(f.mean(1), x), atol=1e-5)
    at_site = b.cams(model, "body")["Grad-CAM"](x, TARGETS)
    assert torch.allclose(
        at_site, finish((model.fc.weight.detach()[TARGETS][:, :, None, None] * gated).sum(1), x), atol=1e-4
    )
    inside = b.cams(model, block.features)
    # The gradient at F runs through the gates too, and is the same everywhere: Grad-CAM and HiResCAM are one.
    assert torch.allclose(inside["Grad-CAM"](x, TARGETS), inside["HiResCAM"](x, TARGETS), atol=1e-4)


# ---- at F', what feeds the classifier ----------


def gated_net() -> tuple[Net, Tensor]:
    model, x = net(), images()
    block = attach_se(model, x, reduction=2)
    nn.init.ones_(block.fc1.bias)
    nn.init.normal_(block.fc2.weight, std=3)
    return model, x


@pytest.mark.parametrize("block", [False, True])
def test_four_cams_and_influence_are_one_map_after_the_gates(block: bool) -> None:
    model, x = gated_net() if block else (net(), images())
    assert explainers.last_map(model) == "body" and explainers.averages(model)
    at_site = b.cams(model, explainers.last_map(model))
    others = explainers.others_of(model)
    assert list(others) == [
        explainers.SAME_AS_CAM,
        "Grad-CAM++",
        "LayerCAM",
        "Score-CAM",
        "Ablation-CAM",
        "Eigen-CAM",
        "FEM",
        "Integrated gradients",
    ]
    one = others[explainers.SAME_AS_CAM](x, TARGETS)
    for name in explainers.COINCIDE:
        assert torch.allclose(at_site[name](x, TARGETS), one, atol=1e-5), name
    with torch.no_grad():
        f, w = model.body(model.norm(model.stem(x))), model.fc.weight[TARGETS]
        cam = (w[:, :, None, None] * f).sum(1)  # Zhou et al., 2016; the hook has gated F
    assert torch.allclose(finish(cam, x), one, atol=1e-5)
    if block:
        influence = selib.explain(model, x).heatmap("influence", TARGETS)
        assert torch.allclose(influence, one, atol=1e-5)
        before = b.cams(model, model.selib_se.features)["Grad-CAM"](x, TARGETS)
        assert not torch.allclose(before, one, atol=0.01)  # at F the gradient runs through the gates
        assert torch.equal(b.rivals(model)["Grad-CAM"](x, TARGETS), one)


def test_controls_do_not_know_the_gates() -> None:
    model, x = gated_net()
    block = model.selib_se
    with block.override(lambda s: torch.ones_like(s) / block.gain):
        plain = finish(features(model, x).mean(1), x)
    name = "mean of channels"
    for found in (explainers.controls_of(model, 0), b.rivals(model)):
        assert torch.allclose(found[name](x, TARGETS), plain, atol=1e-5)
    assert not torch.allclose(selib.explain(model, x).heatmap("gate"), plain, atol=0.01)


def test_where_the_head_is_not_linear_every_cam_has_its_row() -> None:
    model = net()
    model.fc = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    assert not explainers.averages(model)
    assert {*explainers.COINCIDE} <= explainers.others_of(model).keys()
    model.fc = nn.Linear(5, 3)
    block = attach_se(model, images(), per_target=True)
    nn.init.normal_(block.fc1.weight)
    for p in block.fc2.parameters():
        nn.init.normal_(p)
    assert not explainers.averages(model)  # each target has gates of its own: no one map feeds them all


def test_the_last_map_of_networks_without_a_block() -> None:
    lite = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    assert explainers.last_map(lite) == "bn2" and explainers.averages(lite)
    assert explainers.last_map(build_network("small_resnet", 10)) == "stages"


# ---- controls ----------


def test_the_centre_prior_is_a_symmetric_hill():
    hill = b.centre_prior(torch.zeros(2, 3, 9, 12), TARGETS[:2])
    assert (
        torch.equal(hill, hill.flip(1)) and torch.equal(hill, hill.flip(2)) and torch.equal(hill[0], hill[1])
    )
    assert (hill[0] == 1).nonzero().tolist() == [[4, 5], [4, 6]]


def test_noise_is_uniform_seeded_and_belongs_to_the_image():
    x = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    one = b.uniform_noise(0)(x, torch.zeros(200))
    assert one.mean().item() == pytest.approx(0.5, abs=0.02)
    assert len({tuple(h.flatten().tolist()) for h in one}) == 200
    assert torch.equal(b.uniform_noise(0)(x[7:8], TARGETS[:1]), one[7:8])
    assert not torch.equal(b.uniform_noise(1)(x, torch.zeros(200)), one)


def test_random_channels_are_count_channels_drawn_for_each_image():
    model, x = net(), images(12)
    f, targets = features(model, x), torch.zeros(12, dtype=torch.long)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    found = b.random_channels(model, "body", 2, seed=0)(x, targets)
    drawn = set()
    for i in range(12):
        hits = [
            p for p in pairs if torch.allclose(finish(f[i, list(p)].mean(0)[None], x)[0], found[i], atol=1e-5)
        ]
        assert len(hits) == 1
        drawn.add(hits[0])
    assert len(drawn) > 3
    assert not torch.equal(b.random_channels(model, "body", 2, seed=1)(x, targets), found)
    everything_mean = b.mean_of_channels(model, "body")(x, targets)
    assert torch.allclose(b.random_channels(model, "body", 5)(x, targets), everything_mean, atol=1e-5)


# ---- errors ----------


def test_layers_that_do_not_fit_are_named():
    model, x = net(), images()
    with pytest.raises(ValueError, match="layer=bodi is not part of the model: pass one of its modules"):
        b.cams(model, "bodi")
    with pytest.raises(ValueError, match="ReLU is not part of the model"):
        b.mean_of_channels(model, nn.ReLU())
    for name in ("Grad-CAM", "HiResCAM", "Ablation-CAM"):
        with pytest.raises(ValueError, match=r"\(4, 3\)"):
            b.cams(model, "fc")[name](x, TARGETS)
    with pytest.raises(ValueError, match="count=0"):
        b.random_channels(model, "body", 0)(x, TARGETS)
    with pytest.raises(ValueError, match="count=9.*has 5"):
        b.random_channels(model, "body", 9)(x, TARGETS)
