"""The methods to compare with, and the controls every table needs, all behind one call: (images, targets) -> heatmaps.

An :data:`Explainer` takes images float (B, C, H, W) and targets int64 (B,) and returns heatmaps float32 (B, H, W) in
[0, 1]. All of them are finished alike: negative values cut off, resized bicubically to the images' size, each map
scaled to [0, 1]. A call runs the model in evaluation mode and leaves its modes, gradients, buffers and hooks as they
were.

``layer`` is a module of the model or its name; its output must be (B, C, h, w). For a model with an SE block it is
usually ``block.features``, which is F, the map before the gates.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selib.attach import attached, bare, evaluating, hooked, logits_of
from selib.heatmap import normalize, resize, weighted_sum

Explainer = Callable[[Tensor, Tensor], Tensor]
Layer = nn.Module | str


def cams(
    model: nn.Module, layer: Layer, *, earlier: Sequence[Layer] = (), batch_size: int = 256
) -> dict[str, Explainer]:
    """The CAM family at one layer, by name.

    Grad-CAM, LayerCAM, XGrad-CAM and Score-CAM are torchcam's. Grad-CAM++, HiResCAM and FEM are grad-cam's: torchcam
    0.5 lacks the last two, and its Grad-CAM++ leaves out the denominator of equation 19 (it divides a copy).
    :func:`ablation_cam` and :func:`eigen_cam` say why they are ours. RefineCAM, the product of the Grad-CAM++ maps of
    several layers, joins when ``earlier`` layers are named. Score-CAM and Ablation-CAM run the model once per channel,
    ``batch_size`` images at a time.

    Raises:
        ValueError: if a layer is not part of the model.
    """
    import pytorch_grad_cam as grad_cam  # type: ignore[import-untyped]
    from torchcam import methods as torchcam

    model = bare(model)
    module = _find(model, layer)
    plus_plus = [
        _finish(_grad_cam(grad_cam.GradCAMPlusPlus, model, m))
        for m in [module, *(_find(model, e) for e in earlier)]
    ]

    def refine(images: Tensor, targets: Tensor) -> Tensor:
        return normalize(torch.stack([explain(images, targets) for explain in plus_plus]).prod(0))

    found = {
        "Grad-CAM": _finish(_torchcam(torchcam.GradCAM, model, module)),
        "Grad-CAM++": plus_plus[0],
        "HiResCAM": _finish(_grad_cam(grad_cam.HiResCAM, model, module)),
        "LayerCAM": _finish(_torchcam(torchcam.LayerCAM, model, module)),
        "XGrad-CAM": _finish(_torchcam(torchcam.XGradCAM, model, module)),
        "Score-CAM": _finish(_torchcam(torchcam.ScoreCAM, model, module, batch_size=batch_size)),
        "Ablation-CAM": ablation_cam(model, module, batch_size=batch_size),
        "Eigen-CAM": eigen_cam(model, module),
        "FEM": _finish(_grad_cam(grad_cam.FEM, model, module)),
    }
    return found | ({"RefineCAM": refine} if earlier else {})


def ablation_cam(model: nn.Module, layer: Layer, *, batch_size: int = 256) -> Explainer:
    """Ablation-CAM (Desai and Ramaswamy, 2020, equation 3): Σ_c (y - y_c)·F[c], y_c the target's logit with F[c] = 0.

    The paper's division by y is left out: it only scales a map, except where y < 0, when it would turn it over. Ours,
    because grad-cam swaps modules inside the model, ablates with -10⁷ instead of 0 unless the map's minimum is 0, and
    draws a progress bar for each image. Where they should agree, a test holds it against grad-cam's.
    """
    model = bare(model)
    module = _find(model, layer)

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        features, logits = features_of(model, module, images)
        channels = features.shape[1]
        ablated = []
        for part in torch.arange(len(images) * channels, device=images.device).split(batch_size):
            image, channel = part // channels, part % channels
            without = features[image]
            without[torch.arange(len(part), device=images.device), channel] = 0
            with evaluating(model), hooked((module, lambda m, a, output, without=without: without)):
                ablated.append(logits_of(model(images[image])).gather(1, targets[image, None]))
        drop = logits.gather(1, targets[:, None]) - torch.cat(ablated).view(len(images), channels)
        return weighted_sum(features, drop)

    return _finish(explain)


def eigen_cam(model: nn.Module, layer: Layer) -> Explainer:
    """Eigen-CAM (Muhammad and Yeasin, 2020): the projection of F on its first principal component over positions.

    Centred, as in grad-cam. Ours, because grad-cam leaves the sign to chance and computes C × C directions to use one.
    The larger extreme is taken as the object (Seg-Eigen-CAM, 2025, equation 13).
    """
    model = bare(model)
    module = _find(model, layer)

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        features, _ = features_of(model, module, images)
        positions = features.float().flatten(2)
        _, values, directions = torch.linalg.svd(
            positions - positions.mean(2, keepdim=True), full_matrices=False
        )
        maps = (values[:, :1] * directions[:, 0]).view(-1, *features.shape[2:])
        return torch.where(maps.amax((1, 2), keepdim=True) < -maps.amin((1, 2), keepdim=True), -maps, maps)

    return _finish(explain)


def integrated_gradients(model: nn.Module, *, steps: int = 16, batch_size: int = 256) -> Explainer:
    """Integrated gradients (Sundararajan et al., 2017) by captum, summed over colours in magnitude: Σ_colour |IG|.

    The path starts at 0, the mean colour of normalised images; ``steps`` points of Gauss-Legendre quadrature.
    """
    from captum.attr import IntegratedGradients  # type: ignore[import-untyped]

    model = bare(model)

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        with gradients(model):
            method = IntegratedGradients(lambda x: logits_of(model(x)))
            size = max(batch_size, len(images))  # captum runs one step at a time at least
            parts = method.attribute(images, target=targets, n_steps=steps, internal_batch_size=size)
        return parts.abs().sum(1)

    return _finish(explain)


def clip_grad_cam(model: nn.Module, inputs: Mapping[str, Tensor], stream: str, target: int = 0) -> Tensor:
    """Grad-CAM (Selvaraju et al., 2017) of one clip by captum, (T, H, W): one weight a channel, for the target's logits of all frames.

    It needs gradients, and a forward function of positional tensors made for it.

    Args:
        inputs: {stream: (1, T, …)}, as the model takes it.
        stream: whose SE block stands behind the map that is shown.
    """
    from captum.attr import LayerGradCam

    names = list(inputs)
    block = attached(model)[stream]

    def total(*tensors: Tensor) -> Tensor:
        return logits_of(model(**dict(zip(names, tensors, strict=True))))[..., target].sum(1)

    with gradients(model):
        leaves = tuple(x.detach().clone().requires_grad_() for x in inputs.values())
        raw = LayerGradCam(total, block.features).attribute(leaves, relu_attributions=True)
    return normalize(resize(raw[:, 0].detach(), inputs[stream].shape[1:]))[0]


# ---- controls --------------------------------------------------------------------------------------------------------


def controls(model: nn.Module, layer: Layer, *, count: int, seed: int = 0) -> dict[str, Explainer]:
    """What a map must beat to have said anything: noise, the centre, all channels alike, ``count`` random channels."""
    return {
        "uniform noise": uniform_noise(seed),
        "centre prior": centre_prior,
        "mean of channels": mean_of_channels(model, layer),
        f"{count} random channels": random_channels(model, layer, count, seed),
    }


def uniform_noise(seed: int = 0, *, cells: int = 8) -> Explainer:
    """Independent uniform values on a grid of ``cells`` × ``cells``, resized as every map is.

    As coarse as a feature map: noise from pixel to pixel would also differ from a CAM in smoothness. The values come
    from the seed and the image's content, so an image has the same map in every batch.
    """

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        maps = [torch.rand(cells, cells, generator=generator_of(seed, image)) for image in images]
        return torch.stack(maps).to(images.device)

    return _finish(explain)


def centre_prior(images: Tensor, targets: Tensor) -> Tensor:
    """A Gaussian at the centre of every image, its σ a quarter of each side: where photographers put the object."""
    rows, columns = (
        (torch.arange(n, device=images.device) - (n - 1) / 2) * (4 / n) for n in images.shape[2:]
    )
    hill = torch.exp(-0.5 * (rows[:, None].square() + columns.square()))
    return normalize(hill.expand(len(images), *images.shape[2:]))


def mean_of_channels(model: nn.Module, layer: Layer) -> Explainer:
    """The mean of all channels of the feature map: what it shows before any method has weighted it."""
    return _finish(_weighted(model, layer, lambda image, channels: torch.ones(channels)))


def random_channels(model: nn.Module, layer: Layer, count: int, seed: int = 0) -> Explainer:
    """The mean of ``count`` random channels, drawn for each image from the seed and its content.

    Raises:
        ValueError: when called, if the layer has fewer than ``count`` channels.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")

    def choose(image: Tensor, channels: int) -> Tensor:
        if count > channels:
            raise ValueError(f"count={count} random channels were asked for, but the layer has {channels}")
        chosen = torch.randperm(channels, generator=generator_of(seed, image))[:count]
        return torch.zeros(channels).index_fill_(0, chosen, 1)

    return _finish(_weighted(model, layer, choose))


def _weighted(model: nn.Module, layer: Layer, weights: Callable[[Tensor, int], Tensor]) -> Explainer:
    """Mean over the channels of the layer's map, weighted by ``weights(image, C)`` for each image."""
    model = bare(model)
    module = _find(model, layer)

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        features, _ = features_of(model, module, images)
        w = torch.stack([weights(image, features.shape[1]) for image in images]).to(features.device)
        return weighted_sum(features, w / w.sum(1, keepdim=True))

    return explain


def generator_of(seed: int, image: Tensor) -> torch.Generator:
    """Random numbers that belong to an image's content, wherever it stands in a batch or a set."""
    content = image.detach().cpu().float().contiguous().numpy().tobytes()
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


# ---- one way in, one way out -----------------------------------------------------------------------------------------


def _finish(raw: Explainer) -> Explainer:
    """Cut off negative values, resize bicubically to the images, scale each map to [0, 1]."""

    def explain(images: Tensor, targets: Tensor) -> Tensor:
        maps = raw(images.detach(), targets.to(images.device)).detach().to(images.device).float().relu()
        return normalize(resize(maps, images.shape[2:]))

    return explain


def _find(model: nn.Module, layer: Layer) -> nn.Module:
    names = {module: name for name, module in model.named_modules()}
    if isinstance(layer, str):
        module = dict(model.named_modules()).get(layer)
        if module is None or not layer:
            close = difflib.get_close_matches(layer, names.values(), n=3, cutoff=0.3)
            raise ValueError(
                f"layer={layer!r}: the model has no such module; close: {', '.join(close) or 'none'}"
            )
        return module
    if layer not in names:
        raise ValueError(
            f"layer={type(layer).__name__} is not part of the model: pass one of its modules, or a name"
        )
    return layer


def _check_map(module: nn.Module, args: Any, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim != 4:
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the layer's output must be a map (B, C, h, w) for this method, got {what}: name another layer"
        )


def features_of(model: nn.Module, layer: Layer, images: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output (B, C, h, w) and the logits (B, K) of one forward pass."""
    module = _find(model, layer)
    seen: list[Tensor] = []

    def keep(m: nn.Module, args: Any, output: Tensor) -> None:
        _check_map(m, args, output)
        seen.append(output.clone())  # an in-place layer may follow

    with evaluating(model), hooked((module, keep)):
        logits = logits_of(model(images))
    return seen[0], logits


@contextmanager
def gradients(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on, but for no parameter: no ``param.grad`` is touched, no graph is built for them."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for p, requires_grad in wanted:
            p.requires_grad_(requires_grad)


@contextmanager
def _graph_starts_at(module: nn.Module) -> Iterator[Callable[[], Any]]:
    """Make the module's output a leaf, so that gradients run through the head only.

    Yields a function to call once the library has set its own hooks: it adds the last one, which hands a copy on. An
    in-place ReLU behind the layer then changes the copy, not the map that the library holds.
    """

    def leaf(m: nn.Module, args: Any, output: Tensor) -> Tensor:
        _check_map(m, args, output)
        return output.detach().requires_grad_()

    handles = [module.register_forward_hook(leaf)]
    try:
        yield lambda: handles.append(module.register_forward_hook(lambda m, a, output: output.clone()))
    finally:
        for handle in handles:
            handle.remove()


def _torchcam(method: Callable[..., Any], model: nn.Module, module: nn.Module, **options: Any) -> Explainer:
    def raw(images: Tensor, targets: Tensor) -> Tensor:
        with (
            gradients(model),
            _graph_starts_at(module) as copy_downstream,
            method(model, module, **options) as cam,
        ):
            copy_downstream()
            return cam(targets.tolist(), logits_of(model(images)), normalized=False)[0]

    return raw


def _grad_cam(method: Callable[..., Any], model: nn.Module, module: nn.Module) -> Explainer:
    """The map of a grad-cam method before that library's own resizing, and without its ``zero_grad`` on the model."""

    def raw(images: Tensor, targets: Tensor) -> Tensor:
        with gradients(model), _graph_starts_at(module) as copy_downstream:
            cam = method(model, [module])
            try:
                copy_downstream()
                logits = logits_of(cam.activations_and_grads(images))
                if cam.uses_gradients:
                    logits.gather(1, targets[:, None]).sum().backward()
                seen = cam.activations_and_grads
                found = [
                    t.float().numpy() for t in (*seen.activations, *seen.gradients)
                ]  # F, and its gradient if any
                return torch.from_numpy(
                    cam.get_cam_image(images, module, targets, found[0], found[-1], False)
                )
            finally:
                cam.activations_and_grads.release()

    return raw
