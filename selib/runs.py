"""A training run on disk: what decides how it ends, and where it stands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selib.atomic import write_text
from selib.checkpoint import describe_blocks, load_weights, read, write
from selib.forward import bare, tensors


@dataclass(frozen=True)
class Run:
    """The run of :func:`selib.fit` in a folder, told from others by what ``decides`` how it ends."""

    folder: Path
    decides: dict[str, Any]

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, float]]
    ) -> None:
        """Weights, momentum and history in one file, so that no crash can leave them at different epochs."""
        kept = {f"model.{name}": value for name, value in bare(model).state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            kept |= {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        metadata = {"history": json.dumps(history), "settings": json.dumps(self.decides)}
        write(self.folder / "state.safetensors", kept, metadata)
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
        """Put model and optimizer where the run stands; its history, empty where there is none.

        Raises:
            ValueError: if the folder holds another run.
        """
        path = self.folder / "state.safetensors"
        if not path.exists():
            return []
        kept, metadata = read(path)
        before = json.loads(metadata.get("settings", "{}"))
        then = {name: before.get(name, "not recorded") for name in self.decides}
        changed = [f"{k} was {then[k]}, now {now}" for k, now in self.decides.items() if then[k] != now]
        if changed:
            what = "; ".join(changed)
            raise ValueError(f"{self.folder} holds another run ({what}): remove it, or pass another out=")
        load_weights(model, path, prefix="model.")
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in kept.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        history: list[dict[str, float]] = json.loads(metadata["history"])
        return history


def start(model: nn.Module, train: Iterable[Any], val: Iterable[Any] | None) -> dict[str, Any]:
    """What a run starts from, by the names that an error gives it."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "training data": data_fingerprint(train),
        "validation data": None if val is None else data_fingerprint(val),
        "parameters": sum(size for size, _ in sizes),
        "parameters that learn": sum(size for size, learns in sizes if learns),
        "initial weights": fingerprint(model),
    }


def fingerprint(model: nn.Module, *decisions: object) -> str:
    """16 hex digits over a model's weights and SE blocks, and the ``repr`` of whatever else is given."""
    return _digest(bare(model).state_dict(), describe_blocks(model), decisions)


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
        return _digest(None, known, batches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in (dataset, loader):
            getattr(part, "set_epoch", lambda epoch: None)(0)
        return _digest(list(islice(loader, 2)), batches)


def _digest(holds: Any, *decisions: object) -> str:
    digest = hashlib.sha256(repr(decisions).encode())
    for x in tensors(holds):
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
