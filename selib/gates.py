"""Sparse, label-free gates: make the SE vector of a trained network say which channels its predictions rest on.

The network is frozen. Only the SE block learns, to keep the network's own predictions with few open gates:

    loss = KL( softmax(y_original) || softmax(y_gated) ) + λ · mean(s)

Where every output is a decision of its own (``task="multilabel"``), the divergences of the K decisions are summed:
λ then weighs the same however many outputs there are. Where every output has gates of its own, so has λ:

    loss = Σ_k KL( Bernoulli(σ(y_k)) || Bernoulli(σ(ŷ_k)) ) + λ · mean(s)       per target: + λ · Σ_k mean(s_k)

No labels are used. The feature maps are computed once, pooled where the head allows it, so a fit takes seconds.
Of a model that answers once a frame, the divergence is the mean over the frames.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from selib.attach import attach_se, detach_se
from selib.features import PORTION, FeatureCache, cache_features, channel_test, inputs_of, only_block
from selib.forward import Task, attached, bare, check_task, decisions, evaluating, to_device
from selib.se import SEBlock, TargetSEBlock


@dataclass(frozen=True)
class GateReport:
    """What :func:`fit_gates` reached, on held-out images, against the network's own predictions (no labels).

    All figures but the last three are shares: ``open_gates`` of gates above ½; ``only_top`` and ``without_top`` of
    the predictions kept when only the top decile of gates is left, or is removed, in the gated network; the
    ``original_`` ones with the same channels in the ungated network, and the ``random_`` ones with as many random
    channels there.

    For ``multilabel`` the agreement is over decisions, each output's yes or no; ``agreement_positive`` is over those
    that were yes, since no need not rest on any channel.
    """

    sparsity: float
    agreement: float
    agreement_positive: float
    open_gates: float
    only_top: float
    without_top: float
    original_only_top: float
    original_without_top: float
    random_only: float
    random_without: float
    images: int
    cache_seconds: float
    fit_seconds: float

    def as_dict(self) -> dict[str, float]:
        """The fields as plain numbers, for a results file."""
        return asdict(self)


def fit_gates(
    model: nn.Module,
    loader: Iterable[Any] | FeatureCache,
    sparsity: float = 1.0,
    *,
    agreement: float | None = None,
    task: Task = "multiclass",
    per_target: bool = False,
    epochs: int | None = None,
    lr: float = 1e-2,
    reduction: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> GateReport:
    """Train only the SE block to keep the network's own predictions with as few open gates as possible.

    The block is attached first if there is none, and started anew. The loader should not augment or shuffle in ways
    that the network would not see; its labels are ignored. One image in ten is held out for the report. The
    network's weights, mode and gradients are untouched. The gated network is F' = s·F.

    Args:
        model: a trained network with one SE block or none; for several see :func:`selib.fit_stream_gates`.
        loader: yields inputs or (inputs, labels); or the :class:`FeatureCache` of an earlier pass.
        sparsity: λ.
        agreement: instead of λ, the sparsest gates that keep this share of the predictions on held-out images.
        task: ``"multilabel"`` where every output is a decision of its own, yes when its logit is positive.
        per_target: attach gates for each output; the head must be global average pooling + linear.
        epochs: passes over the cached features, by default enough for about 1,000 steps.
        reduction: r of the block, when it is attached here; by default 1, and 4 for ``per_target``. To know which
            channels a prediction rests on, the block must know the prediction: a bottleneck narrower than the number
            of classes costs agreement, but each of many blocks has one decision to know.

    Raises:
        ValueError: an argument out of range, an empty loader, a head that other inputs bypass, clips of several
            lengths, several SE blocks, or ``per_target`` with an attached block that all outputs share.
    """
    _check(sparsity, agreement, task, epochs)
    model = bare(model)
    fresh = False
    if not isinstance(loader, FeatureCache) and not attached(model):
        fresh = True
        reduction = reduction if reduction is not None else 4 if per_target else 1
        loader = _attach_first(model, loader, reduction, seed, per_target)
    block = only_block(model)
    if per_target and not isinstance(block, TargetSEBlock):
        raise ValueError(
            "per_target=True, but the attached SE block is shared by all outputs: call selib.detach_se first"
        )
    try:
        cache = loader
        if not isinstance(cache, FeatureCache):
            cache = cache_features(model, cache, progress=progress)
        if len(cache.logits) < 2:
            raise ValueError("fit_gates needs at least two images: one of them is held out")
    except BaseException:
        if fresh:
            detach_se(model)
        raise
    started = time.perf_counter()
    order = torch.randperm(len(cache.logits), generator=torch.Generator().manual_seed(seed))
    order = order.to(cache.logits.device)
    held, kept = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    epochs = epochs or max(1, round(1000 / -(-len(kept) // batch_size)))

    def attempt(strength: float) -> float:
        _fit(block, cache, kept, task, strength, epochs, lr, batch_size, seed, progress)
        return _agreement(block, cache, held, task)

    if agreement is not None:
        sparsity = _sparsest(attempt, agreement)
    attempt(sparsity)
    return _report(block, cache, held, task, sparsity, seed, time.perf_counter() - started)


def _check(sparsity: float, agreement: float | None, task: Task, epochs: int | None) -> None:
    check_task(task)
    if sparsity < 0:
        raise ValueError(f"sparsity={sparsity}: it must be 0 or more")
    if agreement is not None and not 0 < agreement < 1:
        raise ValueError(f"agreement={agreement}: it is a share of the predictions, between 0 and 1")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1 is needed")


def _attach_first(
    model: nn.Module, loader: Iterable[Any], reduction: int, seed: int, per_target: bool
) -> Iterable[Any]:
    """Attach a block by the first batch of a loader; returns the loader with that batch still in it."""
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("the loader is empty: there are no images to learn the gates from")
    device = next(iter(model.parameters()), torch.empty(0)).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        example = to_device(inputs_of(first)[0], device)
        attach_se(model, example, reduction=reduction, per_target=per_target)
    return chain([first], loader) if isinstance(loader, Iterator) else loader


def _fit(
    block: SEBlock,
    cache: FeatureCache,
    rows: Tensor,
    task: Task,
    sparsity: float,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
    progress: bool,
) -> None:
    weights = [*block.fc1.parameters(), *block.fc2.parameters()]
    with torch.random.fork_rng(devices=[]), learning(cache.head.model, weights):
        torch.manual_seed(seed)
        block.restart("paper")
        steps = epochs * -(-len(rows) // batch)
        step = stepper(weights, lr, steps)
        # Each output with gates and a decision of its own is a problem of its own, with a λ of its own.
        strength = sparsity
        if isinstance(block, TargetSEBlock) and task == "multilabel":
            strength *= block.targets
        bar = tqdm(total=steps, desc=f"gates λ={sparsity:g}", disable=not progress, leave=False)
        for _ in range(epochs):
            for index in rows[torch.randperm(len(rows)).to(rows.device)].split(batch):
                gates = block.excite(cache.squeezed[index])
                gated = cache.run(gates, index)
                step(divergence(cache.logits[index], gated, task) + strength * gates.mean())
                bar.update()
        bar.close()


def divergence(teacher: Tensor, student: Tensor, task: Task) -> Tensor:
    """KL of the student's decisions from the teacher's: the mean over samples or frames of logits (…, K)."""
    if task == "multilabel":
        return bernoulli_kl(teacher, student).sum(-1).mean()
    teacher, student = (logits.flatten(0, -2).log_softmax(1) for logits in (teacher, student))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def bernoulli_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL( Bernoulli(σ(a)) || Bernoulli(σ(b)) ) in nats, element by element, from logits of any size."""
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return yes + (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


def stepper(weights: Sequence[nn.Parameter], lr: float, steps: int) -> Callable[[Tensor], None]:
    """A step of AdamW on a loss, under a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(weights, lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2))

    def step(loss: Tensor) -> None:
        # Gradients of the blocks alone: backward() would also fill those of the frozen head.
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()
        schedule.step()

    return step


@contextmanager
def learning(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """The model in evaluation mode, but for weights that take gradients; all is put back afterwards."""
    # cuDNN's recurrent layers have gradients in training mode only, which is the same without dropout.
    recurrent = [(m, m.dropout) for m in model.modules() if isinstance(m, nn.RNNBase)]
    learns = [weight.requires_grad for weight in weights]
    with evaluating(model), torch.enable_grad():
        try:
            for layer, _ in recurrent:
                layer.training, layer.dropout = True, 0.0
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            for layer, dropout in recurrent:
                layer.training, layer.dropout = False, dropout
            for weight, before in zip(weights, learns, strict=True):
                weight.grad = None
                weight.requires_grad_(before)


def _portions(block: SEBlock, rows: Tensor) -> tuple[Tensor, ...]:
    """Rows in portions whose gates fit into memory."""
    return rows.split(PORTION if isinstance(block, TargetSEBlock) else max(1, len(rows)))


@torch.no_grad()
def _agreement(block: SEBlock, cache: FeatureCache, rows: Tensor, task: Task) -> float:
    with evaluating(cache.head.model):
        parts = [cache.run(block.excite(cache.squeezed[part]), part) for part in _portions(block, rows)]
    return float((decisions(torch.cat(parts), task) == decisions(cache.logits[rows], task)).double().mean())


def _sparsest(
    attempt: Callable[[float], float],
    agreement: float,
    low: float = 1e-2,
    high: float = 30.0,
    rounds: int = 5,
) -> float:
    """The largest λ, by bisection of its logarithm, whose gates keep the agreement; each round is one fit."""
    if attempt(low) < agreement:
        warnings.warn(
            f"even λ={low:g} keeps less than {agreement:.1%} of the predictions; its gates are kept",
            stacklevel=3,
        )
        return low
    for _ in range(rounds):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attempt(middle) >= agreement else (low, middle)
    return low


@torch.no_grad()
def _report(
    block: SEBlock, cache: FeatureCache, held: Tensor, task: Task, sparsity: float, seed: int, seconds: float
) -> GateReport:
    kinds = channel_test(block, cache, task=task, rows=held, seed=seed)
    scores = {name: float(kind.double().mean()) for name, kind in kinds.items()}
    yes = kinds["gated"][cache.logits[held] > 0] if task == "multilabel" else kinds["gated"]
    opened = [(block.excite(cache.squeezed[part]) > 0.5).flatten() for part in _portions(block, held)]
    count = torch.cat(opened)
    return GateReport(
        sparsity=sparsity,
        agreement=scores["gated"],
        agreement_positive=float(yes.double().mean()) if len(yes) else 1.0,
        open_gates=int(count.sum()) / count.numel(),
        only_top=scores["only_top"],
        without_top=scores["without_top"],
        original_only_top=scores["original_only_top"],
        original_without_top=scores["original_without_top"],
        random_only=scores["random_only"],
        random_without=scores["random_without"],
        images=len(cache.logits),
        cache_seconds=cache.seconds,
        fit_seconds=seconds,
    )
