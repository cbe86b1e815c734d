"""Models as safetensors files: the weights, and what it takes to build the model again with its SE blocks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from selib.atomic import replacing
from selib.attach import BlockOptions, attach_blocks, attached
from selib.forward import Task, bare, check_task
from selib.pixels import sides
from selib.se import TargetSEBlock


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, whole or not at all."""
    with replacing(path) as part:
        save_file({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, part, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is cut short ({error}): save it again"
        ) from error


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, prefix: str = "") -> None:
    """Load the weights of a safetensors file into a model of the same architecture, all or nothing.

    A checkpoint of the bare model loads into one with SE blocks attached.

    Args:
        prefix: load only the weights whose names start with it.

    Raises:
        FileNotFoundError, ValueError: no such file, no safetensors, or another architecture.
    """
    model = bare(model)
    weights = {k.removeprefix(prefix): w for k, w in read(Path(path))[0].items() if k.startswith(prefix)}
    gated = any("selib_se." in name for name in weights)
    saved = {name: tuple(w.shape) for name, w in weights.items()}
    own = {k: tuple(w.shape) for k, w in model.state_dict().items() if gated or "selib_se." not in k}
    wrong = [
        f"{name} is {saved.get(name, 'missing')}, in the model {own.get(name, 'missing')}"
        for name in sorted(saved.keys() | own.keys())
        if saved.get(name) != own.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise ValueError(f"{path} is a checkpoint of another architecture: {'; '.join(wrong[:2])}{more}")
    model.load_state_dict(weights)


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    architecture: str,
    classes: Sequence[str],
    image_size: int | Sequence[int],
    task: Task = "multiclass",
    **options: object,
) -> None:
    """Write weights and all that is needed to rebuild the model, SE blocks included, to a safetensors file.

    Args:
        architecture, options: the network's name and its further arguments, for :func:`load_checkpoint`.
        classes: the names of the outputs.
        image_size: side of square images, or (height, width).
        task: ``"multilabel"`` where every output is a decision of its own.

    Raises:
        ValueError: an unknown task, or a size that is none.
    """
    check_task(task)
    sides(image_size)
    meta = {
        "architecture": architecture,
        "options": options,
        "classes": list(classes),
        "image_size": image_size if isinstance(image_size, int) else list(image_size),
        "task": task,
        "se": describe_blocks(model),
    }
    write(Path(path), bare(model).state_dict(), {"selib": json.dumps(meta)})


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of :func:`save_checkpoint`, in evaluation mode, and its metadata (architecture, classes, …).

    torchvision's classifiers are built by name. Other networks come from installed packages, by entry points
    of the group ``selib.networks``: functions ``build(architecture, num_classes, image_size=…, **options)``
    that raise ValueError for a name they do not know. A network that takes no images has a method
    ``example()`` that returns a batch of what it takes, by which SE blocks are attached.

    Raises:
        FileNotFoundError, ValueError: no such file, not written by ``save_checkpoint``, a network that
            nothing installed can build, or weights that do not fit.
    """
    _, metadata = read(Path(path))
    if "selib" not in metadata:
        raise ValueError(f"{path} holds weights only: build the model, then selib.load_weights(model, path)")
    meta: dict[str, Any] = {"task": "multiclass"} | json.loads(metadata["selib"])  # older files name no task
    try:
        height, width = sides(meta["image_size"])
        if not isinstance(meta["image_size"], int):
            meta["image_size"] = (height, width)
        model = _build(meta["architecture"], len(meta["classes"]), meta["image_size"], meta["options"])
        blocks = {block["stream"]: _options_of(block) for block in meta["se"]}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: the network cannot be built again: {error}") from error
    if blocks:
        # Not zeros: whether a map is rectified before it is averaged shows only where it is negative.
        noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        said = getattr(model, "example", None)
        example = said() if callable(said) else noise
        attach_blocks(model, example, {block["stream"]: block["at"] for block in meta["se"]}, blocks)
    load_weights(model, path)
    return model.eval(), meta


def _build(
    architecture: str, num_classes: int, image_size: int | tuple[int, int], options: Mapping[str, Any]
) -> nn.Module:
    refusals = []
    try:
        from torchvision import models

        if architecture in models.list_models(models):
            return models.get_model(architecture, weights=None, num_classes=num_classes, **options)
        refusals.append("torchvision has no such classifier")
    except ImportError:
        refusals.append("torchvision's classifiers need it: pip install 'selib[study]'")
    for plugin in entry_points(group="selib.networks"):
        try:
            model: nn.Module = plugin.load()(architecture, num_classes, image_size=image_size, **options)
            return model
        except ValueError as error:
            refusals.append(f"{plugin.name}: {error}")
    raise ValueError(
        f"architecture={architecture!r} is unknown ({'; '.join(refusals)}): install what builds it"
    )


def describe_blocks(model: nn.Module) -> list[dict[str, Any]]:
    """How the attached SE blocks were made, ready for JSON."""
    return [
        {
            "stream": block.stream,
            "at": block.site,
            "start": "identity" if block.gain == 2 else "paper",
            "layout": block.layout,
            "grid": block.grid,
            "bottleneck": block.bottleneck,
            "channels": block.channels,
            "per_target": isinstance(block, TargetSEBlock),
        }
        for block in attached(model).values()
    ]


def _options_of(block: Mapping[str, Any]) -> BlockOptions:
    if block.get("pool", "sample") != "sample":
        raise ValueError(
            f"its gates are shared over a batch, pool={block['pool']!r}, which selib no longer does"
        )
    reduction = max(1, block["channels"] // block["bottleneck"])
    grid = tuple(block["grid"]) if block.get("grid") else None  # older files have no grid and no per_target
    return BlockOptions(reduction, block["start"], block["layout"], grid, block.get("per_target", False))
