"""Training and evaluation loops, for one device or several processes (accelerate)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tqdm.auto import tqdm

from selib.attach import attached
from selib.checkpoint import History, resume_run, save_run, start
from selib.forward import Task, bare, call, check_task, decisions, evaluating, hooked, logits_of, to_device
from selib.scores import attribute_scores

Precision = Literal["float32", "bf16"]
PRECISION: Precision = "float32"  # of training, unless `fit` is told otherwise; for results files
PEAK = {"sgd": 0.2, "adamw": 8e-3}  # learning rate
DECAY = {"sgd": 5e-4, "adamw": 0.02}


def accelerator(device: str = "auto") -> Accelerator:
    """The accelerator for ``device``: "cpu", "cuda", or "auto" for a GPU where there is one."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device={device!r} is unknown: use "auto", "cpu" or "cuda"')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device="cuda", but PyTorch sees no GPU: use "auto" or "cpu"')
    on_gpu = device != "cpu" and torch.cuda.is_available()
    acc = Accelerator(mixed_precision="no", cpu=not on_gpu)
    if (acc.device.type == "cuda") != on_gpu:  # accelerate keeps the device that a process began with
        raise ValueError(f"device={device!r}, but this process began on {acc.device}: start another one")
    return acc


# ---- training ----------


def fit(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    epochs: int,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    lr: float | None = None,
    task: Task = "multiclass",
    gate_sparsity: float = 0.0,
    auxiliary: float = 0.4,
    seed: int = 0,
    device: str = "auto",
    precision: Precision = PRECISION,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> History:
    """Train in place with a one-cycle learning rate. 2-D convolutions run with the channels last in memory.

    Args:
        model: returns logits (B, K), or (B, T, K) or (B·T, K) with an answer for each frame of a clip.
        train: a DataLoader of (inputs, targets), or what else has a length and yields them. It is told the
            epoch if it or its dataset has ``set_epoch``.
        val: evaluated after every epoch.
        optimizer: SGD with Nesterov momentum 0.9, or AdamW; biases and norms do not decay.
        lr: peak learning rate; by default 0.2 for SGD and 8e-3 for AdamW, for batches of 64 to 128.
        task: ``"multiclass"`` (targets (B,) int64) or ``"multilabel"`` (targets (B, K) of 0 and 1); frames
            have (B, T) or (B, T, K).
        gate_sparsity: λ of the penalty λ·mean(s) on the gates of attached SE blocks; 0 as in the paper.
        auxiliary: weight of the losses of single streams (TalkNet, Light-ASD): of the logits in a dict
            "auxiliary", which the model returns beside "logits" in training mode.
        seed: random numbers of epoch e start from (seed, e), so a resumed run repeats an unbroken one.
        device, precision: see :func:`accelerator`; ``"bf16"`` runs the forward pass in bfloat16 (autocast).
        out: folder for ``metrics.jsonl`` and ``state.safetensors``. A run found there is resumed, a finished
            one just loaded, if settings, data and initial weights are the same.

    Returns:
        One dict per epoch: epoch, loss, seconds, and of ``val`` what :func:`evaluate` says, as val_accuracy …
        ValueError for a loss that is not finite, another run in ``out``, or an unknown argument.
    """
    check_task(task)
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1 is needed")
    if optimizer not in PEAK:
        raise ValueError(f'optimizer={optimizer!r} is unknown: use "sgd" or "adamw"')
    if precision not in ("float32", "bf16"):
        raise ValueError(f'precision={precision!r} is unknown: use "float32" or "bf16"')
    lr = PEAK[optimizer] if lr is None else lr
    settings = _Settings(epochs, optimizer, lr, task, gate_sparsity, auxiliary, seed, precision)
    return _train(accelerator(device), model, train, val, settings, out and Path(out), progress)


@dataclass(frozen=True)
class _Settings:
    epochs: int
    optimizer: str
    lr: float
    task: Task
    gate_sparsity: float
    auxiliary: float
    seed: int
    precision: str


def _train(
    acc: Accelerator, model: nn.Module, train: Any, val: Any, settings: _Settings, out: Any, progress: bool
) -> History:
    """All epochs, but for those that the run in ``out`` has behind it."""
    decides: dict[str, Any] = {}
    if out:
        decides = asdict(settings) | {"processes": acc.num_processes} | start(model, train, val)
    for block in attached(model).values():
        block.task = settings.task
    optimizer = _optimizer(model, settings)
    wrapped, stepper, loader = acc.prepare(model, optimizer, train)
    hidden = not progress or not acc.is_main_process
    try:
        history = resume_run(out, decides, model, optimizer) if out else []
        for epoch in range(len(history), settings.epochs):
            started = time.perf_counter()
            torch.manual_seed(hash((settings.seed, epoch, acc.process_index)) % 2**31)
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)  # accelerate's loader tells the dataset
            title = f"epoch {epoch + 1}/{settings.epochs}"
            bar = tqdm(loader, desc=title, disable=hidden, leave=False, mininterval=1)
            row = {"epoch": epoch + 1, "loss": _train_epoch(acc, wrapped, stepper, bar, epoch, settings)}
            if val is not None:
                row |= {f"val_{k}": v for k, v in evaluate(model, val, task=settings.task).items()}
            history.append(row | {"seconds": time.perf_counter() - started})
            if out and acc.is_main_process:
                save_run(out, decides, model, optimizer, history)
    finally:
        for module in (model, bare(model)):  # else accelerate would not prepare the model a second time
            vars(module).pop("_is_accelerate_prepared", None)
    acc.wait_for_everyone()
    return history


def _train_epoch(
    acc: Accelerator, model: nn.Module, optimizer: Optimizer, bar: Any, epoch: int, settings: _Settings
) -> float:
    """One pass over the data; the mean loss, without λ·mean(s) and the losses of single streams."""
    steps, total = len(bar), 0.0
    gates: list[Tensor] = []
    blocks = attached(model).values() if settings.gate_sparsity else ()
    model.train()
    with hooked(*((block.vector, lambda m, args, s: gates.append(s.mean())) for block in blocks)):
        for index, (inputs, targets) in enumerate(bar):
            step = epoch * steps + index + 1
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _one_cycle(step, settings.epochs * steps + 1)
            gates.clear()
            inputs, targets = to_device((inputs, targets), acc.device)
            with torch.autocast(acc.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                output = call(model, _channels_last(inputs))
            loss = objective = _loss(logits_of(output), targets, settings.task)
            if gates:
                objective = objective + settings.gate_sparsity * torch.stack(gates).mean()
            further = output.get("auxiliary", {}).values() if isinstance(output, Mapping) else ()
            if further:
                losses = [_loss(logits_of(logits), targets, settings.task) for logits in further]
                objective = objective + settings.auxiliary * torch.stack(losses).sum()
            optimizer.zero_grad()
            acc.backward(objective)
            optimizer.step()
            total += float(loss.detach())
            if not math.isfinite(total):
                where = f"epoch {epoch + 1}, step {index + 1}"
                raise ValueError(f"the loss is no longer finite in {where}: lower lr={settings.lr}")
            bar.set_postfix(loss=f"{total / (index + 1):.3f}")
    return total / max(1, steps)


def _one_cycle(step: int, steps: int, warmup: float = 0.2) -> float:
    """Factor of the learning rate, linear up and down: one cycle (Smith & Topin, 2019), by the step alone."""
    peak = max(1, round(warmup * steps))
    return step / peak if step < peak else max(0.0, (steps - step) / max(1, steps - peak))


def _optimizer(model: nn.Module, settings: _Settings) -> Optimizer:
    for p in model.parameters():
        p.data = _channels_last(p.data)  # Module.to would refuse a model with 3-D convolutions
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": DECAY[settings.optimizer]},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)
    return AdamW(groups, lr=settings.lr)


def _channels_last(x: Any) -> Any:
    is_map = isinstance(x, Tensor) and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if is_map else x


def _rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K) or, of frames, (B, T, K) -> (N, K), and their targets -> (N, K), or (N,) of classes."""
    if logits.ndim == 3 and targets.shape[:2] != logits.shape[:2]:
        shapes = f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}"
        raise ValueError(f"{shapes}: the model answers once a frame, (B, T, …)")
    rows = logits.float().flatten(0, -2)
    return rows, targets.reshape(rows.shape) if targets.numel() == rows.numel() else targets.flatten()


def _loss(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    logits, targets = _rows(logits, targets)
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, targets.float())
    return F.cross_entropy(logits, targets)


# ---- evaluation ----------


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and targets, (N, K) or (N,) of classes, of a whole loader, on the CPU, in order.

    The model runs where it is, in evaluation mode. If it answers once a frame, every frame is a row.
    """
    place = next(iter(model.parameters())).device
    batches = []
    with evaluating(model, eager=False):
        for inputs, targets in loader:
            logits = logits_of(call(model, _channels_last(to_device(inputs, place))))
            batches.append(_rows(logits.cpu(), targets.cpu()))
    if not batches:
        raise ValueError("the loader is empty: nothing to predict")
    outputs, answers = zip(*batches, strict=True)
    return torch.cat(outputs), torch.cat(answers)


def evaluate(model: nn.Module, loader: Iterable[Any], *, task: Task = "multiclass") -> dict[str, float]:
    """Accuracy and loss; for ``multilabel`` also balanced_accuracy and mean_ap, means over the outputs."""
    logits, targets = predict(model, loader)
    loss = float(_loss(logits, targets, task))
    if task == "multiclass":
        return {"accuracy": float((decisions(logits, task) == targets).double().mean()), "loss": loss}
    means = {name: float(score.nanmean()) for name, score in attribute_scores(logits, targets).items()}
    means["mean_ap"] = means.pop("ap")
    return means | {"loss": loss}
