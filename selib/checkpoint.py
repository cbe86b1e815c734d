"""Models and training runs as safetensors files: the weights, and what it takes to build or train on."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_convert

from selib.atomic import replacing, write_text
from selib.attach import BlockOptions, attach_blocks, attached
from selib.forward import Task, bare, check_task, tensors
from selib.pixels import sides
from selib.se import HeadSEBlock, TargetSEBlock

History = list[dict[str, float]]  # of training: a row for each epoch


def write(path: Path, kept: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file, whole or not at all."""
    with replacing(path) as part:
        save_file({k: v.detach().contiguous().cpu().clone() for k, v in kept.items()}, part, metadata)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        said = f"{path} is not a safetensors file, or is cut short ({error}): save it again"
        raise ValueError(said) from error


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, prefix: str = "") -> None:
    """Load the weights of a safetensors file into a model of the same architecture, all or nothing.

    A checkpoint of the bare model loads into one with SE blocks attached. Of a file that holds more, those
    weights are loaded whose names start with ``prefix``.
    """
    model = bare(model)
    weights = {k.removeprefix(prefix): w for k, w in read(Path(path))[0].items() if k.startswith(prefix)}
    gated = any("selib_se." in name for name in weights)
    own = {k: w for k, w in model.state_dict().items() if gated or "selib_se." not in k}
    for name in sorted(weights.keys() | own.keys()):
        saved, wanted = (tuple(x[name].shape) if name in x else "missing" for x in (weights, own))
        if saved != wanted:
            said = f"{name} is {saved}, in the model {wanted}"
            raise ValueError(f"{path} is a checkpoint of another architecture: {said}")
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
    """
    check_task(task)
    meta = {
        "architecture": architecture,
        "options": options,
        "classes": list(classes),
        "image_size": sides(image_size),
        "task": task,
        "se": describe_blocks(model),
    }
    write(Path(path), bare(model).state_dict(), {"selib": json.dumps(meta)})


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of :func:`save_checkpoint`, in evaluation mode, and its metadata (architecture, classes, …).

    Networks are built by installed packages, through entry points of the group ``selib.networks``: functions
    ``build(architecture, num_classes, image_size=…, **options)`` that raise ValueError for a name they do not
    know. This package's own builds torchvision's classifiers, too. A network that takes no images has a
    method ``example()`` that returns a batch of what it takes, by which SE blocks are attached.
    """
    _, metadata = read(Path(path))
    if "selib" not in metadata:
        raise ValueError(f"{path} holds weights only: build the model, then selib.load_weights(model, path)")
    meta: dict[str, Any] = {"task": "multiclass"} | json.loads(metadata["selib"])  # older files name no task
    try:
        meta["image_size"] = size = sides(meta["image_size"])
        model = _build(meta["architecture"], len(meta["classes"]), size, meta["options"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: the network cannot be built again: {error}") from error
    if meta["se"]:
        # Not zeros: whether a map is rectified before it is averaged shows only where it is negative.
        noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        example = model.example() if hasattr(model, "example") else noise
        places = {block["stream"]: block["at"] for block in meta["se"]}
        made = attach_blocks(model, example, places, {b["stream"]: _options(b) for b in meta["se"]})
        for saved in meta["se"]:
            block = made[saved["stream"]]
            block.transparent, block.task = saved.get("transparent", False), saved.get("task", meta["task"])
    load_weights(model, path)
    return model.eval(), meta


def _build(architecture: str, num_classes: int, size: tuple[int, int], options: Mapping[str, Any]) -> Any:
    refusals = []
    for package in entry_points(group="selib.networks"):
        try:
            return package.load()(architecture, num_classes, image_size=size, **options)
        except (ValueError, ImportError) as error:
            refusals.append(f"{package.name}: {error}")
    said = "; ".join(refusals)
    raise ValueError(f"architecture={architecture!r} is unknown ({said}): install what builds it")


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
            "form": "head" if isinstance(block, HeadSEBlock) else "bottleneck",
            "transparent": block.transparent,
            "task": block.task,
        }
        for block in attached(model).values()
    ]


def _options(block: Mapping[str, Any]) -> BlockOptions:
    reduction = max(1, block["channels"] // block["bottleneck"])
    grid = tuple(block["grid"]) if block["grid"] else None
    form = block.get("form", "bottleneck")  # files of version 0.1 had no other
    return BlockOptions(reduction, block["start"], block["layout"], grid, block["per_target"], form)


# ---- training runs: what decides how they end, and where they stand ----------


def save_run(
    folder: Path, decides: dict[str, Any], model: nn.Module, optimizer: Optimizer, history: History
) -> None:
    """Weights, momentum and history in one file, so that no crash can leave them at different epochs.

    What ``decides`` how a run ends tells it from others: its settings, and :func:`start`.
    """
    kept = {f"model.{name}": value for name, value in bare(model).state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        kept |= {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    metadata = {"history": json.dumps(history), "settings": json.dumps(decides)}
    write(folder / "state.safetensors", kept, metadata)
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def resume_run(folder: Path, decides: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> History:
    """Put model and optimizer where the run stands, and return its history, empty where there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return []
    kept, metadata = read(path)
    before = json.loads(metadata.get("settings", "{}"))
    for name, now in decides.items():
        then = before.get(name, "not recorded")
        if then != now:
            what = f"{name} was {then}, now {now}"
            raise ValueError(f"{folder} holds another run ({what}): remove it, or pass another out=")
    load_weights(model, path, prefix="model.")
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in kept.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state[int(index)][name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(state)})
    return list(json.loads(metadata["history"]))


def start(model: nn.Module, train: Iterable[Any], val: Iterable[Any] | None) -> dict[str, Any]:
    """What a run starts from, by the names that an error gives it."""
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    numbers = sum(p.numel() for p in learned.values())
    return {
        "training data": data_fingerprint(train),
        "validation data": None if val is None else data_fingerprint(val),
        "parameters that learn": f"{numbers} ({_digest(None, list(learned))})",
        "initial weights": fingerprint(model),
    }


def fingerprint(model: nn.Module, *decisions: object) -> str:
    """16 hex digits over a model's weights, modules and SE blocks, and the ``repr`` of what else is given."""
    model = bare(model)
    return _digest(model.state_dict(), repr(model), describe_blocks(model), decisions)


def data_fingerprint(loader: Iterable[Any]) -> str:
    """16 hex digits over what a loader yields, and in what batches.

    They come from its dataset's ``fingerprint`` (the loader's own, if it has no dataset), or from the first
    two batches where there is none. Data that are random by other means than torch's generator need one.
    """
    dataset: Any = getattr(loader, "dataset", loader)
    order = type(getattr(loader, "sampler", None)).__name__
    batches = (len(loader), getattr(loader, "batch_size", None), order)  # type: ignore[arg-type]
    known = getattr(dataset, "fingerprint", None)
    if known is not None:
        return _digest(None, known() if callable(known) else known, batches)
    owners = [getattr(part, "generator", None) for part in (loader, getattr(loader, "sampler", None))]
    states = [(owner, owner.get_state()) for owner in owners if owner is not None]
    with torch.random.fork_rng(devices=[]):
        for owner in (torch.default_generator, *(owner for owner, _ in states)):
            owner.manual_seed(0)
        for part in (dataset, loader):
            getattr(part, "set_epoch", lambda epoch: None)(0)
        first = default_convert(list(islice(loader, 2)))
    for owner, state in states:  # the run draws what it would draw without this look
        owner.set_state(state)
    return _digest(first, batches)


def _digest(holds: Any, *decisions: object) -> str:
    digest = hashlib.sha256(repr(decisions).encode())
    for x in tensors(holds):
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
