"""Trained networks that the notebooks share: each is trained once, and found again by all that decided it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from torch import nn

from selib import attach_se, fit
from selib.checkpoint import data_fingerprint, fingerprint
from selib.forward import attached, to_device
from selib.train import accelerator

Network = TypeVar("Network", bound=nn.Module)
History = list[dict[str, float]]


def on_gpu(device: str = "auto") -> bool:
    """Whether training on ``device`` ("auto", "cpu" or "cuda") runs on a GPU."""
    return accelerator(device).device.type == "cuda"


def train_once(
    model: Network,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    out: Path,
    name: str,
    device: str = "auto",
    progress: bool = False,
    **settings: Any,
) -> tuple[Network, History]:
    """Train a network in float32, or load it where a notebook has trained the very same one.

    Its folder ends in a fingerprint of the network before training, the data and the settings: with another
    of these it is trained again, in another folder. A notebook that runs beside this one waits for it.

    Args:
        out: the folder of all networks.
        name: of this one, to be read by people.
        settings: of :func:`selib.fit`.

    Returns:
        The network in evaluation mode and the history of :func:`selib.fit`.
    """
    data = data_fingerprint(train), val is not None and data_fingerprint(val)
    folder = out / f"{name}-{fingerprint(model, data, sorted(settings.items()))}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        history = fit(model, train, val, out=folder, device=device, progress=progress, **settings)
    return model.eval(), history


def with_new_gates(model: Network, example: Any, *, seed: int, **options: Any) -> Network:
    """A copy of a trained network with SE blocks that start from ``seed``.

    Args:
        example: a batch as the network takes it.
        options: of :func:`selib.attach_se`.
    """
    gated = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach_se(gated, to_device(example, next(model.parameters()).device), **options)
    return gated


@contextmanager
def acting(model: nn.Module) -> Iterator[None]:
    """Let the gates scale the maps, though a fit of gates has left the network as it was."""
    with ExitStack() as stack:
        for block in attached(model).values():
            stack.enter_context(block.override(lambda gates: gates))
        yield
