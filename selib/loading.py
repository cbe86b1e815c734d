"""A model from a file of weights and the name of its architecture, with what it needs to see images."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from selib import checkpoint
from selib.attach import attach_se
from selib.explanation import Method
from selib.forward import Task, attached
from selib.gates import fit_gates
from selib.images import Preparation, preparation_of
from selib.native import native_se
from selib.pixels import sides

INSIDE = ("state_dict", "model_state_dict", "model", "net")  # where training scripts put the weights
WRAPPERS = ("module.", "_orig_mod.", "model.")  # prefixes of DataParallel, torch.compile, Lightning


@dataclass(frozen=True)
class Loaded:
    """A network in evaluation mode, and what is known of it.

    Attributes:
        assumed: what nobody said, a line each.
    """

    model: nn.Module
    classes: Sequence[str]
    task: Task
    preparation: Preparation
    assumed: tuple[str, ...] = ()


def load(
    path: str | Path,
    architecture: str | None = None,
    *,
    classes: str | Path | None = None,
    image_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resize: str | None = None,
) -> Loaded:
    """The model of a checkpoint: of :func:`selib.save_checkpoint`, or a plain state dict.

    Args:
        path: a safetensors file, or one of ``torch.save(model.state_dict(), path)``.
        architecture: torchvision's or timm's name, for a plain state dict.
        classes: a text file with a name on each line.
        image_size: one side, or height and width.
        mean, std: of the RGB channels in [0, 1].
        resize: ``"stretch"``, or the shorter side in pixels before the centre is cropped. What is not said
            comes from the architecture's own configuration.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no weights, a pickled model, an unknown architecture, weights or classes that do not fit.
    """
    path = Path(path)
    weights, metadata = _weights(path)
    if "selib" in metadata:
        if architecture is not None:
            raise ValueError(f"{path} says itself what it is: leave --arch {architecture} out")
        model, meta = checkpoint.load_checkpoint(path)
        loaded = Loaded(model, meta["classes"], meta["task"], Preparation(meta["image_size"], None))
    elif architecture is None:
        raise ValueError(f"{path} holds weights only: say --arch, a name of torchvision or timm")
    else:
        loaded = _of_state_dict(path, _unwrapped(weights), architecture)
    if classes is not None:
        loaded = _named(loaded, Path(classes))
    return replace(loaded, preparation=_as_said(loaded.preparation, image_size, mean, std, resize))


def _weights(path: Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, and the metadata of safetensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return checkpoint.read(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except UnpicklingError:
        remedy = "torch.save(model.state_dict(), path)"
        raise ValueError(f"{path} holds pickled Python, which is not loaded: save {remedy} instead") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no file of weights, or is cut short ({why}): save it again") from None


def _unwrapped(weights: Any) -> dict[str, Tensor]:
    """The state dict inside of what a training script saved, without the prefixes of wrappers."""
    for name in INSIDE:
        if isinstance(weights, Mapping) and isinstance(weights.get(name), Mapping):
            weights = weights[name]
    if not isinstance(weights, Mapping):
        return {}
    found = {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    for prefix in WRAPPERS:
        if found and all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _of_state_dict(path: Path, weights: Mapping[str, Tensor], architecture: str) -> Loaded:
    """The first of torchvision's and timm's networks of that name that the weights fit."""
    if not weights:
        raise ValueError(f"{path} holds no weights: save torch.save(model.state_dict(), path)")
    refusals = []
    for library, build in _builders(architecture):
        with torch.device("meta"):
            shapes = {name: tuple(value.shape) for name, value in build().state_dict().items()}
        refusal, outputs = _fit(weights, shapes)
        if refusal:
            refusals.append(f"{library}'s {refusal}")
            continue
        model = build(num_classes=outputs) if outputs else build()
        model.load_state_dict(dict(weights))
        count = outputs or int(getattr(model, "num_classes", 1000))
        how = _configured(architecture) if library == "torchvision" else preparation_of(model)
        names: Sequence[str] = _imagenet() if count == 1000 else [f"class {k}" for k in range(count)]
        named = f"{count} classes, " + ("named as ImageNet's" if count == 1000 else "without names")
        return Loaded(model.eval(), names, "multiclass", how, (f"{architecture} of {library}", named))
    raise ValueError(f"{path} holds other weights than those of {architecture}: {'; '.join(refusals)}")


def _builders(architecture: str) -> Iterator[tuple[str, Callable[..., nn.Module]]]:
    """Who builds networks of that name: the library, and a function of num_classes."""
    import timm
    from torchvision import models

    known = [name for name in models.list_models() if "." not in name]  # not detection.…, segmentation.…
    if architecture not in known and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, {*known, *timm.list_models()}, 4)
        raise ValueError(f"--arch {architecture} is no name of torchvision or timm: {', '.join(near)} …")
    if architecture in known:
        yield "torchvision", lambda **options: models.get_model(architecture, weights=None, **options)
    if timm.is_model(architecture):
        yield "timm", lambda **options: timm.create_model(architecture, pretrained=False, **options)


def _fit(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int | None]:
    """Why the weights do not fit a network with these shapes, else ""; and how many outputs it must have.

    The number of outputs is None where all shapes agree.
    """
    for name in sorted(weights.keys() ^ shapes.keys()):
        return f"network has {'no' if name in weights else 'also'} {name}", None
    other = {name: tuple(weights[name].shape) for name in shapes if weights[name].shape != shapes[name]}
    outputs = {shape[:1] for shape in other.values()}
    wrong = [name for name, shape in other.items() if shape[1:] != shapes[name][1:]]
    if wrong or len(outputs) > 1:
        name = (wrong or list(other))[0]
        return f"{name} is {shapes[name]}, not {other[name]}", None
    return "", outputs.pop()[0] if outputs else None


def _configured(architecture: str) -> Preparation:
    """How torchvision's usual weights of an architecture see pictures."""
    from torchvision import models

    how = models.get_model_weights(architecture).DEFAULT.transforms()
    size = (how.crop_size[0], how.crop_size[0])
    return Preparation(size, how.resize_size[0], tuple(how.mean), tuple(how.std))


def _imagenet() -> list[str]:
    from torchvision import models

    return list(models.ResNet50_Weights.DEFAULT.meta["categories"])


def _named(loaded: Loaded, path: Path) -> Loaded:
    """With the class names of a text file."""
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != len(loaded.classes):
        raise ValueError(f"{path} has {len(names)} names, but the model {len(loaded.classes)} outputs")
    assumed = tuple(line for line in loaded.assumed if " classes, " not in line)
    return replace(loaded, classes=names, assumed=assumed)


def _as_said(
    how: Preparation,
    image_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    resize: str | None,
) -> Preparation:
    """The preparation, but for what the user said."""
    if image_size is not None:
        size = sides(image_size[0] if len(image_size) == 1 else image_size)
        # As large a part of the picture as before.
        shorter = None if how.shorter is None else round(how.shorter * min(size) / min(how.size))
        how = replace(how, size=size, shorter=shorter)
    if mean is not None:
        how = replace(how, mean=tuple(mean))
    if std is not None:
        how = replace(how, std=tuple(std))
    if resize == "stretch":
        return replace(how, shorter=None)
    if resize is None:
        return how
    if not resize.isdecimal() or int(resize) < min(how.size):
        raise ValueError(f"--resize {resize}: say stretch, or pixels from {min(how.size)} on")
    return replace(how, shorter=int(resize))


def with_block(loaded: Loaded, method: Method, images: str | Path | None = None) -> str:
    """See to it that the model has an SE block that the method can read; the report of a fit as text.

    Args:
        images: a folder of unlabelled images to fit sparse gates on; without, a model gets a block that
            changes nothing, to read influence.

    Raises:
        ValueError: a model that takes no images, or one without gates for a method that reads them.
    """
    model, how = loaded.model, loaded.preparation
    if hasattr(model, "example"):
        raise ValueError("the network of the checkpoint does not take images")
    example = torch.zeros(1, 3, *how.size)
    if images is not None:
        return f"{fit_gates(model, images, transform=how, task=loaded.task)}\n"
    if not attached(model) and not native_se(model, example):
        if method != "influence":
            said = "the model has no SE block whose gates could be read: use influence, or --fit FOLDER"
            raise ValueError(f"--method {method}: {said}")
        attach_se(model, example)
    return ""
