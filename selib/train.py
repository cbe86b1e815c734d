"""Training and evaluation loops on accelerate: any device, mixed precision, several processes; safetensors checkpoints."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from selib.atomic import replacing, write_text
from selib.attach import (
    BlockOptions,
    Task,
    attach_blocks,
    attached,
    bare,
    call,
    check_task,
    decisions,
    evaluating,
    logits_of,
    to_device,
)
from selib.se import TargetSEBlock
from studies.networks import build, sides


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is in hardware: AVX512-BF16 on a CPU, compute capability 8 on an NVIDIA GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def accelerator(device: str = "auto") -> Accelerator:
    """The accelerator for ``device`` ("auto", "cpu" or "cuda"), with bf16 autocast where the hardware has it.

    Raises:
        ValueError: for an unknown device, or "cuda" where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device={device!r} is unknown: use "auto", "cpu" or "cuda"')
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device="cuda", but PyTorch sees no GPU: use "auto" or "cpu"')
    on_gpu = device != "cpu" and torch.cuda.is_available()
    bf16 = has_fast_bf16(torch.device("cuda" if on_gpu else "cpu"))
    return Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not on_gpu)


def _rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Answers of frames, logits (B, T, K) or (B·T, K) with targets (B, T) or (B, T, K), as a row each: (B·T, K) and (B·T, …).

    Raises:
        ValueError: targets that are not one a frame.
    """
    if logits.ndim == 3:
        if targets.shape[:2] != logits.shape[:2]:
            raise ValueError(
                f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}: the model answers once a frame, (B, T, …)"
            )
        return logits.flatten(0, 1), targets.flatten(0, 1)
    by_frame = targets.ndim > 1 and len(targets) != len(logits) == targets.shape[:2].numel()
    return logits, targets.flatten(0, 1) if by_frame else targets


def _loss(logits: Tensor, targets: Tensor, task: Task, smoothing: float = 0.0) -> Tensor:
    logits, targets = _rows(logits, targets)
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(logits.float(), _columns(targets, logits).float())
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def _columns(targets: Tensor, logits: Tensor) -> Tensor:
    """Targets (N,) of a single output as (N, 1)."""
    return targets[:, None] if targets.ndim == 1 and logits.shape[1] == 1 else targets


def _auxiliary(output: Any, targets: Tensor, task: Task, smoothing: float) -> Tensor | float:
    """The sum of the losses of a training-mode output's "auxiliary" logits, 0 if it has none."""
    further = output.get("auxiliary") if isinstance(output, Mapping) else None
    losses = [_loss(logits_of(logits), targets, task, smoothing) for logits in (further or {}).values()]
    return torch.stack(losses).sum() if losses else 0.0


def _channels_last(batch: Any) -> Any:
    return (
        batch.contiguous(memory_format=torch.channels_last)
        if isinstance(batch, Tensor) and batch.ndim == 4
        else batch
    )


def _one_cycle(step: int, steps: int, warmup: float = 0.2) -> float:
    """Learning-rate factor of the one-cycle policy (Smith & Topin, 2019), linear both ways, as a pure function of the step."""
    peak = max(1, round(warmup * steps))
    return step / peak if step < peak else max(0.0, (steps - step) / max(1, steps - peak))


def fit(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    epochs: int,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    lr: float | None = None,
    weight_decay: float | None = None,
    label_smoothing: float = 0.0,
    task: Task = "multiclass",
    gate_sparsity: float = 0.0,
    auxiliary: float = 0.4,
    seed: int = 0,
    device: str = "auto",
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train in place with a one-cycle learning rate.

    Args:
        model: returns logits (B, K), or (B, T, K) or (B·T, K) with an answer for each frame of a clip.
        train: a DataLoader of (inputs, targets), or what else has a length and yields them; if it or its dataset has ``set_epoch``, it is
            told the epoch.
        val: evaluated after every epoch.
        optimizer: ``"sgd"``, with Nesterov momentum 0.9, or ``"adamw"``.
        lr: peak learning rate; by default 0.2 for SGD and 8e-3 for AdamW, for batches of 64 to 128.
        weight_decay: by default 5e-4 for SGD and 0.02 for AdamW; biases and norms do not decay.
        task: ``"multiclass"`` (targets (B,) int64) or ``"multilabel"`` (targets (B, K) of 0 and 1). Frames have (B, T) or (B, T, K).
        gate_sparsity: λ of the penalty λ·mean(s) on the gates of attached SE blocks; 0 is the paper's training.
        auxiliary: weight of further losses, one for each entry of the dict "auxiliary" beside the "logits" in what the model returns in
            training mode (as TalkNet and Light-ASD train their streams); of no account for other models.
        seed: random numbers of epoch e start from (seed, e), so a resumed run repeats an unbroken one.
        out: folder for ``metrics.jsonl`` and ``state.safetensors``; a run found there is resumed, a finished one just loaded.

    Returns:
        One dict per epoch: epoch, loss, seconds, and what :func:`evaluate` returns as val_accuracy, val_loss … when ``val`` is given.

    Raises:
        ValueError: a loss that is not finite, a state of another architecture in ``out``, an unknown task.
    """
    check_task(task)
    if epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1 is needed")
    if optimizer not in ("sgd", "adamw"):
        raise ValueError(f'optimizer={optimizer!r} is unknown: use "sgd" or "adamw"')
    lr = lr if lr is not None else {"sgd": 0.2, "adamw": 8e-3}[optimizer]
    weight_decay = weight_decay if weight_decay is not None else {"sgd": 5e-4, "adamw": 0.02}[optimizer]
    acc = accelerator(device)
    for p in model.parameters():
        if p.ndim == 4:  # Module.to would refuse a model with 3-D convolutions
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [
        p for p in model.parameters() if p.requires_grad and p.ndim <= 1
    ]  # biases and norms do not decay
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    raw_optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
        if optimizer == "sgd"
        else torch.optim.AdamW(groups, lr=lr)
    )
    forwards = [(module, vars(module).get("forward")) for module in (model, bare(model))]
    wrapped, stepper, loader = acc.prepare(model, raw_optimizer, train)
    steps_per_epoch = len(loader)
    folder = Path(out) if out is not None else None
    settings = {
        "optimizer": optimizer,
        "epochs": epochs,
        "steps": steps_per_epoch,
        "lr": lr,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "task": task,
        "gate_sparsity": gate_sparsity,
        "auxiliary": auxiliary,
        "seed": seed,
    }
    gates: list[Tensor] = []
    handles = (
        [
            block.vector.register_forward_hook(lambda m, args, o: gates.append(o.mean()))
            for block in attached(model).values()
        ]
        if gate_sparsity
        else []
    )
    try:
        history = _resume(folder, model, raw_optimizer, settings) if folder else []
        for epoch in range(len(history), epochs):
            started, total = time.perf_counter(), 0.0
            torch.manual_seed(hash((seed, epoch, acc.process_index)) % 2**31)
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(
                    epoch
                )  # accelerate's loader tells the data set, and counts from 0 in a resumed run
            wrapped.train()
            bar = tqdm(
                loader,
                desc=f"epoch {epoch + 1}/{epochs}",
                disable=not progress or not acc.is_main_process,
                leave=False,
                mininterval=1,
            )
            for index, (inputs, targets) in enumerate(bar):
                for group in raw_optimizer.param_groups:
                    group["lr"] = lr * _one_cycle(
                        epoch * steps_per_epoch + index + 1, epochs * steps_per_epoch + 1
                    )
                gates.clear()
                inputs, targets = to_device(
                    (inputs, targets), acc.device
                )  # a loader that is no DataLoader leaves them where they are
                output = call(wrapped, _channels_last(inputs))
                loss = _loss(logits_of(output), targets, task, label_smoothing)
                objective = loss + gate_sparsity * torch.stack(gates).mean() if gates else loss
                objective = objective + auxiliary * _auxiliary(output, targets, task, label_smoothing)
                stepper.zero_grad()
                acc.backward(objective)
                stepper.step()
                total += float(loss.detach())
                if not math.isfinite(total):
                    raise ValueError(
                        f"the loss is no longer finite in epoch {epoch + 1}, step {index + 1}: lower lr={lr}"
                    )
                bar.set_postfix(loss=f"{total / (index + 1):.3f}")
            row: dict[str, float] = {"epoch": epoch + 1, "loss": total / max(1, steps_per_epoch)}
            if val is not None:
                row |= {f"val_{k}": v for k, v in evaluate(model, val, task=task, device=device).items()}
            history.append(row | {"seconds": time.perf_counter() - started})
            if folder and acc.is_main_process:
                _save_state(folder, model, raw_optimizer, history, settings)
    finally:
        for handle in handles:
            handle.remove()
        # accelerate leaves autocast in the model's forward, but what comes after training is in float32; and a mark by which it
        # would not prepare the model again.
        for module, forward in forwards:
            for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                vars(module).pop(name, None)
            vars(module).update({} if forward is None else {"forward": forward})
    acc.wait_for_everyone()
    return history


@torch.no_grad()
def predict(
    model: nn.Module, loader: Iterable[Any], *, device: str = "auto", progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) float32 and targets (N, …) of a whole loader, in evaluation mode, on the CPU, in the loader's order.

    Of a model that answers once a frame, every frame is a row, clip after clip; clips may differ in length from batch to batch.
    """
    place = next(iter(model.parameters())).device if device == "auto" else torch.device(device)
    outputs, answers = [], []
    with evaluating(model, eager=False):
        for inputs, targets in tqdm(loader, desc="predict", disable=not progress, leave=False):
            logits = logits_of(call(model, _channels_last(to_device(inputs, place))))
            logits, targets = _rows(logits.float().cpu(), targets.cpu())
            outputs.append(logits)
            answers.append(targets)
    if not outputs:
        raise ValueError("the loader is empty: nothing to predict")
    if len({t.ndim for t in answers}) > 1:  # frames (B·T,), and clips of a single one, (B, 1)
        answers = [t.flatten() for t in answers]
    return torch.cat(outputs), torch.cat(answers)


def evaluate(
    model: nn.Module, loader: Iterable[Any], *, task: Task = "multiclass", device: str = "auto"
) -> dict[str, float]:
    """Accuracy and loss; for ``multilabel`` the means of :func:`attribute_scores` over the outputs that have them.

    These are accuracy, balanced_accuracy and mean_ap, the mean average precision.
    """
    logits, targets = predict(model, loader, device=device)
    loss = float(_loss(logits, targets, task))
    if task == "multiclass":
        return {"accuracy": float((decisions(logits, task) == targets).double().mean()), "loss": loss}
    scores = attribute_scores(logits, _columns(targets, logits))
    means = {name: float(score.nanmean()) for name, score in scores.items()}
    means["mean_ap"] = means.pop("ap")
    return means | {"loss": loss}


def attribute_scores(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """How well each of K yes-or-no outputs is predicted (torchmetrics), yes when its logit is positive.

    Args:
        logits: (N, K).
        targets: (N, K) of 0 and 1.

    Returns:
        (K,) float64 each: ``accuracy``, ``balanced_accuracy`` (the mean of the shares of yes and of no that are found) and ``ap``
        (average precision). The last two are NaN for an output whose targets are all yes or all no: take ``nanmean`` over outputs.

    Raises:
        ValueError: shapes that differ, or targets that are not 0 or 1.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit: both are (N, K), one column an output"
        )
    answers = targets.long()
    if not bool(((answers == targets) & (answers >= 0) & (answers <= 1)).all()):
        raise ValueError(f"targets are 0 or 1 for each output, got {targets.unique()[:5].tolist()}")
    columns = zip(decisions(logits, "multilabel").long().T, logits.double().T, answers.T, strict=True)
    rows = [_one_output(said, logit, answer) for said, logit, answer in columns]
    names = ("accuracy", "balanced_accuracy", "ap")
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).T, strict=True))


def _one_output(said: Tensor, logit: Tensor, answer: Tensor) -> list[float]:
    """Accuracy, balanced accuracy and average precision of one output, from (N,) each."""
    from torchmetrics.functional import (
        classification as tm,
    )  # its multilabel functions refuse a single output

    accuracy = float(tm.binary_accuracy(said, answer))
    if len(answer.unique()) < 2:
        return [accuracy, math.nan, math.nan]
    balanced = float(tm.binary_recall(said, answer) + tm.binary_specificity(said, answer)) / 2
    # Only the order counts, and a sigmoid of large logits would lose it.
    places = logit.unique(return_inverse=True)[1]
    return [
        accuracy,
        balanced,
        float(tm.binary_average_precision(places / places.max().clamp_min(1), answer)),
    ]


# ---- files ---------------------------------------------------------------------------------------------------------------


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with replacing(path) as part:
        save_file({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, part, metadata)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file, or is cut short ({error}): save it again"
        ) from error


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, prefix: str = "") -> None:
    """Load the parameters of a safetensors file into a model of the same architecture, all or nothing.

    A checkpoint of the bare model loads into one with SE blocks attached.

    Raises:
        FileNotFoundError, ValueError: no such file, no safetensors, or another architecture (the differing names are given).
    """
    model = bare(model)
    tensors, _ = _read(Path(path))
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    own = model.state_dict()
    blocks = {k for k in own if "selib_se." in k}
    expected = set(own) if any("selib_se." in k for k in weights) else set(own) - blocks
    wrong = [f"{k} is missing" for k in sorted(expected - set(weights))] + [
        f"{k} is not in the model" for k in sorted(set(weights) - expected)
    ]
    wrong += [
        f"{k} is {tuple(weights[k].shape)}, the model has {tuple(own[k].shape)}"
        for k in sorted(expected & set(weights))
        if weights[k].shape != own[k].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise ValueError(f"{path} is a checkpoint of another architecture: {'; '.join(wrong[:2])}{more}")
    model.load_state_dict(weights)


def _save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    settings: dict[str, Any],
) -> None:
    """Weights, momentum and history in one file, so that no crash can leave them at different epochs."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    _write(
        folder / "state.safetensors",
        tensors,
        {"history": json.dumps(history), "settings": json.dumps(settings)},
    )
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def _resume(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> list[dict[str, float]]:
    path = folder / "state.safetensors"
    if not path.exists():
        return []
    tensors, metadata = _read(path)
    # Runs that do not name it are older, and had no auxiliary losses to weigh.
    before = {"auxiliary": settings["auxiliary"]} | json.loads(metadata.get("settings", "{}"))
    changed = [f"{k} was {before.get(k)}, now {v}" for k, v in settings.items() if before.get(k) != v]
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): remove it, or use another out="
        )
    load_weights(model, path, prefix="model.")
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    history: list[dict[str, float]] = json.loads(metadata["history"])
    return history


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    architecture: str,
    classes: list[str],
    image_size: int | Sequence[int],
    task: Task = "multiclass",
    **options: object,
) -> None:
    """Write weights and all that is needed to rebuild the model, SE blocks included, to a safetensors file.

    Args:
        architecture, options: as :func:`studies.networks.build` takes them. A network that takes no images has a method ``example()``
            that returns a batch of what it takes, if SE blocks are attached to it.
        classes: the names of the outputs.
        image_size: side of square images, or (height, width).
        task: ``"multilabel"`` where every output is a decision of its own.

    Raises:
        ValueError: an unknown task, or a size that is none.
    """
    check_task(task)
    sides(image_size)
    blocks = [
        {
            "stream": b.stream,
            "at": b.site,
            "start": "identity" if b.gain == 2 else "paper",
            "layout": b.layout,
            "pool": b.pool,
            "bottleneck": b.bottleneck,
            "channels": b.channels,
            "per_target": isinstance(b, TargetSEBlock),
        }
        for b in attached(model).values()
    ]
    meta = {
        "architecture": architecture,
        "options": options,
        "classes": classes,
        "image_size": image_size if isinstance(image_size, int) else list(image_size),
        "task": task,
        "se": blocks,
    }
    _write(Path(path), bare(model).state_dict(), {"selib": json.dumps(meta)})


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of :func:`save_checkpoint`, in evaluation mode, and its metadata (architecture, classes, image_size, task, …).

    Raises:
        FileNotFoundError, ValueError: no such file, not written by ``save_checkpoint``, or weights that do not fit.
    """
    _, metadata = _read(Path(path))
    if "selib" not in metadata:
        raise ValueError(
            f"{path} holds weights only: build the model yourself, then selib.load_weights(model, path)"
        )
    meta: dict[str, Any] = {"task": "multiclass"} | json.loads(
        metadata["selib"]
    )  # older files do not name it
    try:
        height, width = sides(meta["image_size"])
        meta["image_size"] = meta["image_size"] if isinstance(meta["image_size"], int) else (height, width)
        model = build(
            meta["architecture"], len(meta["classes"]), image_size=meta["image_size"], **meta["options"]
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: the network cannot be built again: {error}") from error
    if meta["se"]:
        # Not zeros: whether a map is rectified before it is averaged shows only where it is negative.
        noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        say = getattr(model, "example", None)  # a network that takes something else than images says what
        example = say() if callable(say) else noise
        options = {
            b["stream"]: BlockOptions(
                max(1, b["channels"] // b["bottleneck"]),
                b["start"],
                b["layout"],
                b["pool"],
                b.get("per_target", False),
            )
            for b in meta["se"]
        }
        attach_blocks(model, example, {b["stream"]: b["at"] for b in meta["se"]}, options)
    load_weights(model, path)
    return model.eval(), meta
