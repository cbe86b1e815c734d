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
from tqdm.auto import tqdm

from selib.attach import attached
from selib.forward import Task, bare, call, check_task, decisions, evaluating, hooked, logits_of, to_device
from selib.runs import Run, start
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
) -> list[dict[str, float]]:
    """Train in place with a one-cycle learning rate. 2-D convolutions run with the channels last in memory.

    Args:
        model: returns logits (B, K), or (B, T, K) or (B·T, K) with an answer for each frame of a clip.
        train: a DataLoader of (inputs, targets), or what else has a length and yields them. If it or its
            dataset has ``set_epoch``, it is told the epoch.
        val: evaluated after every epoch.
        optimizer: SGD with Nesterov momentum 0.9, or AdamW; biases and norms do not decay.
        lr: peak learning rate; by default 0.2 for SGD and 8e-3 for AdamW, for batches of 64 to 128.
        task: ``"multiclass"`` (targets (B,) int64) or ``"multilabel"`` (targets (B, K) of 0 and 1); frames
            have (B, T) or (B, T, K).
        gate_sparsity: λ of the penalty λ·mean(s) on the gates of attached SE blocks; 0 as in the paper.
        auxiliary: weight of further losses, one for each entry of the dict "auxiliary" beside the "logits" in
            what the model returns in training mode (as TalkNet and Light-ASD train their streams).
        seed: random numbers of epoch e start from (seed, e), so a resumed run repeats an unbroken one.
        device: see :func:`accelerator`.
        precision: ``"bf16"`` runs the forward pass under bfloat16 autocast.
        out: folder for ``metrics.jsonl`` and ``state.safetensors``. A run found there is resumed, a finished
            one just loaded, if settings, data and initial weights are the same.

    Returns:
        One dict per epoch: epoch, loss, seconds, and of ``val`` what :func:`evaluate` says, as val_accuracy …
        ValueError for a loss that is not finite, another run in ``out``, or an unknown argument.
    """
    lr = PEAK.get(optimizer, 0.0) if lr is None else lr
    settings = _Settings(epochs, optimizer, lr, task, gate_sparsity, auxiliary, seed, precision)
    return _train(accelerator(device), model, train, val, settings, out, progress)


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

    def __post_init__(self) -> None:
        check_task(self.task)
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs}: at least 1 is needed")
        if self.optimizer not in PEAK:
            raise ValueError(f'optimizer={self.optimizer!r} is unknown: use "sgd" or "adamw"')
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f'precision={self.precision!r} is unknown: use "float32" or "bf16"')


def _train(
    acc: Accelerator,
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None,
    settings: _Settings,
    out: str | os.PathLike[str] | None,
    progress: bool,
) -> list[dict[str, float]]:
    """All epochs, but for those that the run in ``out`` has behind it."""
    run = None
    if out:
        decides = asdict(settings) | {"processes": acc.num_processes} | start(model, train, val)
        run = Run(Path(out), decides)
    optimizer = _optimizer(model, settings)
    wrapped, stepper, loader = acc.prepare(model, optimizer, train)
    try:
        history = run.resume(model, optimizer) if run else []
        for epoch in range(len(history), settings.epochs):
            started = time.perf_counter()
            torch.manual_seed(hash((settings.seed, epoch, acc.process_index)) % 2**31)
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)  # accelerate's loader tells the dataset
            loss = _train_epoch(acc, wrapped, stepper, loader, epoch, settings, progress)
            row: dict[str, float] = {"epoch": epoch + 1, "loss": loss}
            if val is not None:
                row |= {f"val_{k}": v for k, v in evaluate(model, val, task=settings.task).items()}
            history.append(row | {"seconds": time.perf_counter() - started})
            if run and acc.is_main_process:
                run.save(model, optimizer, history)
    finally:
        for module in (model, bare(model)):  # else accelerate would not prepare the model a second time
            vars(module).pop("_is_accelerate_prepared", None)
    acc.wait_for_everyone()
    return history


def _train_epoch(
    acc: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    epoch: int,
    settings: _Settings,
    progress: bool,
) -> float:
    """One pass over the data; the mean loss, without penalties."""
    steps, total = len(loader), 0.0
    gates: list[Tensor] = []
    blocks = attached(model).values() if settings.gate_sparsity else ()
    title = f"epoch {epoch + 1}/{settings.epochs}"
    hidden = not progress or not acc.is_main_process
    bar = tqdm(loader, desc=title, disable=hidden, leave=False, mininterval=1)
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
            loss = _loss(logits_of(output), targets, settings.task)
            optimizer.zero_grad()
            acc.backward(loss + _penalties(output, targets, gates, settings))
            optimizer.step()
            total += float(loss.detach())
            if not math.isfinite(total):
                where = f"epoch {epoch + 1}, step {index + 1}"
                raise ValueError(f"the loss is no longer finite in {where}: lower lr={settings.lr}")
            bar.set_postfix(loss=f"{total / (index + 1):.3f}")
    return total / max(1, steps)


def _penalties(output: Any, targets: Tensor, gates: list[Tensor], settings: _Settings) -> Tensor | float:
    """λ·mean(s), and the weighted losses of a training-mode output's "auxiliary" logits."""
    total: Tensor | float = settings.gate_sparsity * torch.stack(gates).mean() if gates else 0.0
    further = output.get("auxiliary") if isinstance(output, Mapping) else None
    if further:
        losses = [_loss(logits_of(logits), targets, settings.task) for logits in further.values()]
        total = total + settings.auxiliary * torch.stack(losses).sum()
    return total


def _one_cycle(step: int, steps: int, warmup: float = 0.2) -> float:
    """Factor of the learning rate, linear up and down: one cycle (Smith & Topin, 2019), by the step alone."""
    peak = max(1, round(warmup * steps))
    return step / peak if step < peak else max(0.0, (steps - step) / max(1, steps - peak))


def _optimizer(model: nn.Module, settings: _Settings) -> torch.optim.Optimizer:
    for p in model.parameters():
        p.data = _channels_last(p.data)  # Module.to would refuse a model with 3-D convolutions
    learned = [p for p in model.parameters() if p.requires_grad]
    weights, others = [p for p in learned if p.ndim > 1], [p for p in learned if p.ndim <= 1]
    decay = DECAY[settings.optimizer]
    groups = [{"params": weights, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.lr)


def _channels_last(x: Any) -> Any:
    is_map = isinstance(x, Tensor) and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if is_map else x


def _rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Frames as a row each: logits (B, T, K) or (B·T, K) and targets (B, T, …) -> (B·T, K) and (B·T, …)."""
    if logits.ndim == 3 and targets.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}: the model answers once "
            "a frame, (B, T, …)"
        )
    flat = targets.ndim > 1 and len(targets) != len(logits) == targets.shape[:2].numel()
    if logits.ndim == 3 or flat:
        targets = targets.flatten(0, 1)
    return logits.flatten(0, -2), targets


def _columns(targets: Tensor) -> Tensor:
    """Targets (N, K), or (N,) of a single output, as (N, K)."""
    return targets.reshape(len(targets), -1)


def _loss(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    logits, targets = _rows(logits.float(), targets)
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits, _columns(targets).float())
    return F.cross_entropy(logits, targets)


# ---- evaluation ----------


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and targets (N, …) of a whole loader, on the CPU, in the loader's order.

    The model runs where it is, in evaluation mode. If it answers once a frame, every frame is a row, clip
    after clip; clips may differ in length from batch to batch.
    """
    place = next(iter(model.parameters())).device
    outputs, answers = [], []
    with evaluating(model, eager=False):
        for inputs, targets in loader:
            logits = logits_of(call(model, _channels_last(to_device(inputs, place))))
            logits, targets = _rows(logits.float().cpu(), targets.cpu())
            outputs.append(logits)
            answers.append(targets)
    if not outputs:
        raise ValueError("the loader is empty: nothing to predict")
    if len({t.ndim for t in answers}) > 1:  # frames (B·T,), and clips of a single one, (B, 1)
        answers = [t.flatten() for t in answers]
    return torch.cat(outputs), torch.cat(answers)


def evaluate(model: nn.Module, loader: Iterable[Any], *, task: Task = "multiclass") -> dict[str, float]:
    """Accuracy and loss of a model, where it is.

    For ``multilabel`` also balanced_accuracy and mean_ap, :func:`attribute_scores` averaged over the outputs
    that have them.
    """
    logits, targets = predict(model, loader)
    loss = float(_loss(logits, targets, task))
    if task == "multiclass":
        return {"accuracy": float((decisions(logits, task) == targets).double().mean()), "loss": loss}
    scores = attribute_scores(logits, _columns(targets))
    means = {name: float(score.nanmean()) for name, score in scores.items()}
    means["mean_ap"] = means.pop("ap")
    return means | {"loss": loss}
