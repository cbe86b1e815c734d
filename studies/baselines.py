"""Rival methods, and the controls every table needs, all behind one call: (images, targets) -> heatmaps.

An :data:`Explainer` takes images float (B, C, H, W) and targets int64 (B,) and returns heatmaps float32
(B, H, W) in [0, 1]: negative values are cut off, then each map is resized to the images and scaled. It runs
the model in evaluation mode and leaves it as it was.

``layer`` is a module of the model or its name, whose output is a map (B, C, h, w). In a model with an SE
block it is usually ``block.site``, whose output is F', the map that feeds the classifier: at
``block.features``, which is F, gradients would run through the gates too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selib.attach import attached
from selib.forward import bare, call, evaluating, hooked, logits_of
from selib.heatmap import normalize, resize, weighted_sum

Explainer = Callable[[Tensor, Tensor], Tensor]
Layer = nn.Module | str


# ---- formulas: f is the map, g the gradient of the target's logit there ----------


def _grad_cam_plus_plus(f: Tensor, g: Tensor) -> Tensor:
    alpha = g**2 / (2 * g**2 + f.sum((2, 3), keepdim=True) * g**3 + 1e-6)  # equation 19
    return weighted_sum(f, (alpha * g.relu()).sum((2, 3)))


def _xgrad_cam(f: Tensor, g: Tensor) -> Tensor:
    return weighted_sum(f, (g * f).sum((2, 3)) / (f.sum((2, 3)) + 1e-8))


def _eigen_cam(f: Tensor) -> Tensor:
    """The projection of F, centred, on its first principal component over the positions."""
    positions = f.float().flatten(2)
    centred = positions - positions.mean(2, keepdim=True)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    maps = (values[:, :1] * directions[:, 0]).unflatten(1, f.shape[2:])
    # The sign is left to chance: the larger extreme is the object (Seg-Eigen-CAM, 2025, equation 13).
    upside_down = maps.amax((1, 2), keepdim=True) < -maps.amin((1, 2), keepdim=True)
    return torch.where(upside_down, -maps, maps)


def _fem(f: Tensor) -> Tensor:
    """Channels weighted by the share of their positions that exceed mean + 2 standard deviations."""
    limit = f.mean((2, 3), keepdim=True) + 2 * f.std((2, 3), keepdim=True, correction=0)
    return weighted_sum(f, (f > limit).float().mean((2, 3)))


OF_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Grad-CAM": lambda f, g: weighted_sum(f, g.mean((2, 3))),  # Selvaraju et al., 2017
    "Grad-CAM++": _grad_cam_plus_plus,  # Chattopadhay et al., 2018
    "HiResCAM": lambda f, g: (g * f).sum(1),  # Draelos and Carin, 2020
    "LayerCAM": lambda f, g: (g.relu() * f).sum(1),  # Jiang et al., 2021
    "XGrad-CAM": _xgrad_cam,  # Fu et al., 2020
}
OF_MAP: dict[str, Callable[[Tensor], Tensor]] = {
    "Eigen-CAM": _eigen_cam,  # Muhammad and Yeasin, 2020
    "FEM": _fem,  # Fuad et al., 2020
}


# ---- methods ----------


def cams(model: nn.Module, layer: Layer, *, batch_size: int = 256) -> dict[str, Explainer]:
    """The CAM family at one layer, by name.

    Score-CAM and Ablation-CAM run the model once for every channel, ``batch_size`` images at a time.
    """
    model = bare(model)
    module = _find(model, layer)

    def by_gradient(formula: Callable[[Tensor, Tensor], Tensor]) -> Explainer:
        def explain(images: Tensor, targets: Tensor) -> Tensor:
            def score(logits: Tensor) -> Tensor:
                return logits.gather(1, targets[:, None]).sum()

            return formula(*_map_and_gradient(model, module, images, score))

        return _finish(explain)

    found = {name: by_gradient(formula) for name, formula in OF_GRADIENT.items()}
    found["Score-CAM"] = _score_cam(model, module, batch_size)
    found["Ablation-CAM"] = _ablation_cam(model, module, batch_size)
    return found | {name: _of_map(model, module, formula) for name, formula in OF_MAP.items()}


def _of_map(model: nn.Module, module: nn.Module, formula: Callable[[Tensor], Tensor]) -> Explainer:
    return _finish(lambda images, targets: formula(features_of(model, module, images)[0]))


def _map_and_gradient(
    model: nn.Module, module: nn.Module, inputs: Any, score: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The module's output and the gradient of ``score(logits)`` there; what comes before has no graph."""
    seen: list[Tensor] = []

    def start_here(m: nn.Module, args: Any, output: Any) -> Tensor:
        seen.append(_checked(output).detach().requires_grad_())
        torch.set_grad_enabled(True)  # until `evaluating` ends
        return seen[0].clone()  # an in-place layer may follow

    with torch.inference_mode(False), evaluating(model), hooked((module, start_here)):
        (gradient,) = torch.autograd.grad(score(logits_of(call(model, inputs))), seen)
    return seen[0].detach(), gradient


def _by_channel(logit: Callable[[Tensor, Tensor], Tensor], features: Tensor, batch_size: int) -> Tensor:
    """``logit`` of every pair of image and channel, given as two index tensors, in batches: (B, C)."""
    count = features.shape[1]
    pairs = torch.arange(len(features) * count, device=features.device)
    return torch.cat([logit(p // count, p % count) for p in pairs.split(batch_size)]).view(-1, count)


def _score_cam(model: nn.Module, module: nn.Module, batch_size: int) -> Explainer:
    """Wang et al., 2020: channels weighted by the softmax of the logits of images masked by their maps."""

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        features, _ = features_of(model, module, images)
        masks = features - features.amin((2, 3), keepdim=True)
        masks /= masks.amax((2, 3), keepdim=True) + 1e-8

        def logit(image: Tensor, channel: Tensor) -> Tensor:
            mask = F.interpolate(masks[image, channel][:, None], images.shape[2:], mode="bilinear")
            with evaluating(model):
                return logits_of(model(images[image] * mask)).gather(1, targets[image, None])

        return weighted_sum(features, _by_channel(logit, features, batch_size).softmax(1))

    return _finish(explain)


def _ablation_cam(model: nn.Module, module: nn.Module, batch_size: int) -> Explainer:
    """Desai and Ramaswamy, 2020, equation 3: channels weighted by the fall of the logit without them.

    The paper's division by the logit is left out: it scales the map, or turns it over where the logit is < 0.
    """

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        features, logits = features_of(model, module, images)

        def logit(image: Tensor, channel: Tensor) -> Tensor:
            ablated = features[image]
            ablated[torch.arange(len(image), device=image.device), channel] = 0
            with evaluating(model), hooked((module, lambda m, args, output: ablated)):
                return logits_of(model(images[image])).gather(1, targets[image, None])

        fall = logits.gather(1, targets[:, None]) - _by_channel(logit, features, batch_size)
        return weighted_sum(features, fall)

    return _finish(explain)


def clip_grad_cam(model: nn.Module, inputs: Mapping[str, Tensor], stream: str, target: int = 0) -> Tensor:
    """Grad-CAM of a stream of one clip {stream: (1, T, …)}: (T, H, W), a channel has one weight."""
    module = attached(model)[stream].features
    # cuDNN differentiates recurrent layers in training mode only.
    with torch.backends.cudnn.flags(enabled=False):
        f, g = _map_and_gradient(model, module, inputs, lambda logits: logits[..., target].sum())
    maps = weighted_sum(f, g.flatten(2).mean(2)).relu()
    return normalize(resize(maps, inputs[stream].shape[1:]))[0]


def integrated_gradients(model: nn.Module, *, steps: int = 16) -> Explainer:
    """Integrated gradients (Sundararajan et al., 2017), summed over colours in magnitude: Σ_colour |IG|.

    The path starts at 0, the mean colour of normalised images; ``steps`` points of Gauss-Legendre quadrature.
    """
    model = bare(model)
    points, weights = np.polynomial.legendre.leggauss(steps)

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        with torch.inference_mode(False), evaluating(model), torch.enable_grad():
            total = torch.zeros_like(images)
            for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
                x = (float(point) * images.clone()).requires_grad_()
                logits = logits_of(model(x)).gather(1, targets[:, None])
                total += float(weight) * torch.autograd.grad(logits.sum(), x)[0]
        return (total * images).abs().sum(1)

    return _finish(explain)


# ---- controls: what a map must beat to have said anything ----------


def controls(model: nn.Module, layer: Layer, *, count: int, seed: int = 0) -> dict[str, Explainer]:
    """Noise, the centre, all channels alike, and ``count`` random channels."""
    return {
        "uniform noise": uniform_noise(seed),
        "centre prior": centre_prior,
        "mean of channels": mean_of_channels(model, layer),
        f"{count} random channels": random_channels(model, layer, count, seed),
    }


def uniform_noise(seed: int = 0, *, cells: int = 8) -> Explainer:
    """Uniform values on ``cells`` × ``cells``, as coarse as a feature map, by the seed and the image."""

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([torch.rand(cells, cells, generator=generator_of(seed, x)) for x in images])

    return _finish(explain)


def centre_prior(images: Tensor, targets: Tensor) -> Tensor:
    """A Gaussian at the centre, its σ a quarter of each side: where photographers put the object."""
    height, width = images.shape[2:]
    rows = (torch.arange(height, device=images.device) - (height - 1) / 2) * (4 / height)
    columns = (torch.arange(width, device=images.device) - (width - 1) / 2) * (4 / width)
    hill = torch.exp(-0.5 * (rows[:, None].square() + columns.square()))
    return normalize(hill.expand(len(images), height, width))


def mean_of_channels(model: nn.Module, layer: Layer) -> Explainer:
    """The mean of all channels of the feature map: what it shows before any method has weighted it."""
    model = bare(model)
    return _of_map(model, _find(model, layer), lambda f: f.float().mean(1))


def random_channels(model: nn.Module, layer: Layer, count: int, seed: int = 0) -> Explainer:
    """The mean of ``count`` random channels, drawn for each image by the seed and its content."""
    model = bare(model)
    module = _find(model, layer)

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        features, _ = features_of(model, module, images)
        channels = features.shape[1]
        if not 1 <= count <= channels:
            raise ValueError(f"count={count} random channels of a layer that has {channels}")
        drawn = [torch.randperm(channels, generator=generator_of(seed, x))[:count] for x in images]
        chosen = torch.stack(drawn).to(features.device)[:, :, None, None]
        return features.float().take_along_dim(chosen, 1).mean(1)

    return _finish(explain)


def generator_of(seed: int, image: Tensor) -> torch.Generator:
    """Random numbers that belong to an image's content, wherever it stands in a batch or a set."""
    content = image.detach().cpu().float().contiguous().numpy().tobytes()
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


# ---- one way in, one way out ----------


def features_of(model: nn.Module, layer: Layer, images: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output (B, C, h, w) and the logits (B, K) of one forward pass."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(_checked(output).clone())  # an in-place layer may follow

    with evaluating(model), hooked((_find(model, layer), keep)):
        logits = logits_of(model(images))
    return seen[0], logits


def _find(model: nn.Module, layer: Layer) -> nn.Module:
    modules = dict(model.named_modules())
    found = modules.get(layer) if isinstance(layer, str) else layer
    if found is None or found not in modules.values():
        name = layer if isinstance(layer, str) else type(layer).__name__
        raise ValueError(f"layer={name} is not part of the model: pass one of its modules, or its name")
    return found


def _checked(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim not in (4, 5):  # 5 of a clip
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the layer's output must be a map (B, C, h, w), got {what}: name another layer")
    return output


def _finish(raw: Explainer) -> Explainer:
    def explain(images: Tensor, targets: Tensor) -> Tensor:
        maps = raw(images.detach(), targets.to(images.device)).detach().to(images.device).float().relu()
        return normalize(resize(maps, images.shape[2:]))

    return explain


def rivals(model: nn.Module) -> dict[str, Explainer]:
    """What the explorer can compare with, but for what runs once a channel.

    Empty unless the model has one attached SE block on a map (B, C, h, w).
    """
    blocks = list(attached(model).values())
    if len(blocks) != 1 or blocks[0].layout != "BC*" or blocks[0].grid:
        return {}
    found = cams(model, blocks[0].site)
    found["mean of channels"] = mean_of_channels(model, blocks[0].features)  # a control: before the gates
    return {name: one for name, one in found.items() if name not in ("Score-CAM", "Ablation-CAM")}
