"""Sparse, label-free gates: make the SE vector of a trained network say which channels its predictions rest
on.

The network is frozen. Only the SE block learns, to keep the network's own predictions with few open gates:

    loss = KL( softmax(y_original) || softmax(y_gated) ) + λ · mean(s)

Where every output is a decision of its own (``task="multilabel"``), the divergences of the K decisions are
summed: λ then weighs the same however many outputs there are. Where every output has gates of its own, so has
λ:

    loss = Σ_k KL( Bernoulli(σ(y_k)) || Bernoulli(σ(ŷ_k)) ) + λ · mean(s)    per target: λ · Σ_k mean(s_k)

No labels are used. The feature maps are computed once, pooled where the head allows it, so a fit takes
seconds. Of a model that answers once a frame, the divergence is the mean over the frames.
"""

from __future__ import annotations

import copy
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

    All figures but the last three are shares: ``open_gates`` of gates above ½; ``only_top`` and
    ``without_top`` of the predictions kept when only the top decile of gates is left, or is removed, in the
    gated network; the ``original_`` ones with the same channels in the ungated network, and the ``random_``
    ones with as many random channels there.

    For ``multilabel`` the agreement is over decisions, each output's yes or no; ``agreement_positive`` is
    over those that were yes, since no need not rest on any channel.
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

    The block is attached first if there is none, and started anew. The loader should not augment the images;
    its labels are ignored. One image in ten is held out for the report. The network's weights, mode and
    gradients are untouched. The gated network is F' = s·F.

    Args:
        model: a trained network with one SE block or none; for several see :func:`selib.fit_stream_gates`.
        loader: yields inputs or (inputs, labels); or the :class:`selib.FeatureCache` of an earlier pass.
        sparsity: λ.
        agreement: instead of λ, the sparsest gates that keep this share of the predictions on held-out
            images.
        task: ``"multilabel"`` where every output is a decision of its own, yes when its logit is positive.
        per_target: attach gates for each output; the head must be global average pooling + linear.
        epochs: passes over the cached features, by default enough for about 1,000 steps.
        reduction: r of the block, when it is attached here; by default 1, and 4 for ``per_target``. To know
            which channels a prediction rests on, the block must know the prediction: a bottleneck narrower
            than the number of classes costs agreement, but each of many blocks has one decision to know.

    Raises:
        ValueError: an argument out of range, an empty loader, a head that other inputs bypass, clips of
            several lengths, several SE blocks, or ``per_target`` with an attached block that all outputs
            share.
    """
    check_fit(task, sparsity, epochs)
    if agreement is not None and not 0 < agreement < 1:
        raise ValueError(f"agreement={agreement}: it is a share of the predictions, between 0 and 1")
    fresh = not attached(model)
    cache = _features_of(bare(model), loader, per_target, reduction, seed, progress)
    try:
        with unless_it_fails([only_block(model)]):
            fit = _Fit(only_block(model), cache, task, epochs, lr, batch_size, seed, progress)
            if agreement is not None:
                sparsity = _sparsest(fit.agreement_at, agreement)
            fit.agreement_at(sparsity)
            return fit.report(sparsity)
    except BaseException:
        if fresh:
            detach_se(model)
        raise


@contextmanager
def unless_it_fails(blocks: Sequence[SEBlock]) -> Iterator[None]:
    """Blocks get back their weights and their gain when the ``with`` block is interrupted or fails."""
    before = [(copy.deepcopy(block.state_dict()), block.gain) for block in blocks]
    try:
        yield
    except BaseException:
        for block, (weights, gain) in zip(blocks, before, strict=True):
            block.load_state_dict(weights)
            block.gain = gain
        raise


def check_fit(task: Task, sparsity: float, epochs: int | None) -> None:
    """Raise ValueError for an argument out of range."""
    check_task(task)
    if sparsity < 0:
        raise ValueError(f"sparsity={sparsity}: it must be 0 or more")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1 is needed")


def _features_of(
    model: nn.Module,
    loader: Iterable[Any] | FeatureCache,
    per_target: bool,
    reduction: int | None,
    seed: int,
    progress: bool,
) -> FeatureCache:
    """What the gates are fitted on; a block that is attached here is taken out again after an error."""
    fresh = False
    if not isinstance(loader, FeatureCache) and not attached(model):
        fresh = True
        reduction = reduction if reduction is not None else 4 if per_target else 1
        loader = _attach_first(model, loader, reduction, seed, per_target)
    elif per_target and not isinstance(only_block(model), TargetSEBlock):
        raise ValueError(
            "per_target=True, but the attached SE block is shared by all outputs: call selib.detach_se first"
        )
    try:
        if not isinstance(loader, FeatureCache):
            loader = cache_features(model, loader, progress=progress)
        if len(loader.logits) < 2:
            raise ValueError("fit_gates needs at least two images: one of them is held out")
    except BaseException:
        if fresh:
            detach_se(model)
        raise
    return loader


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


class _Fit:
    """A fit of one block to cached features, of which one image in ten is held out."""

    def __init__(
        self,
        block: SEBlock,
        cache: FeatureCache,
        task: Task,
        epochs: int | None,
        lr: float,
        batch_size: int,
        seed: int,
        progress: bool,
    ) -> None:
        self.block, self.cache, self.task = block, cache, task
        self.lr, self.batch_size, self.seed, self.progress = lr, batch_size, seed, progress
        order = torch.randperm(len(cache.logits), generator=torch.Generator().manual_seed(seed))
        order = order.to(cache.logits.device)
        tenth = max(1, len(order) // 10)
        self.held, self.kept = order[:tenth], order[tenth:]
        self.batches = -(-len(self.kept) // batch_size)
        self.epochs = epochs or max(1, round(1000 / self.batches))
        self.started = time.perf_counter()

    def agreement_at(self, sparsity: float) -> float:
        """Fit the block anew with this λ; the share of held-out predictions that stay."""
        block, cache = self.block, self.cache
        weights = [*block.fc1.parameters(), *block.fc2.parameters()]
        with torch.random.fork_rng(devices=[]), learning(cache.head.model, weights):
            torch.manual_seed(self.seed)
            block.restart("paper")
            steps = self.epochs * self.batches
            step = stepper(weights, self.lr, steps)
            # Each output with gates and a decision of its own is a problem of its own, with a λ of its own.
            strength = sparsity
            if isinstance(block, TargetSEBlock) and self.task == "multilabel":
                strength *= block.targets
            bar = tqdm(total=steps, desc=f"gates λ={sparsity:g}", disable=not self.progress, leave=False)
            for _ in range(self.epochs):
                order = torch.randperm(len(self.kept)).to(self.kept.device)
                for index in self.kept[order].split(self.batch_size):
                    gates = block.excite(cache.squeezed[index])
                    gated = cache.run(gates, index)
                    step(divergence(cache.logits[index], gated, self.task) + strength * gates.mean())
                    bar.update()
            bar.close()
        return self._agreement()

    @torch.no_grad()
    def _agreement(self) -> float:
        with evaluating(self.cache.head.model):
            parts = [self.cache.run(self.block.excite(z), rows) for rows, z in self._held()]
        same = decisions(torch.cat(parts), self.task) == decisions(self.cache.logits[self.held], self.task)
        return float(same.double().mean())

    def _held(self) -> list[tuple[Tensor, Tensor]]:
        """The held-out rows and what the block reads of them, in portions whose gates fit into memory."""
        size = PORTION if isinstance(self.block, TargetSEBlock) else max(1, len(self.held))
        return [(rows, self.cache.squeezed[rows]) for rows in self.held.split(size)]

    @torch.no_grad()
    def report(self, sparsity: float) -> GateReport:
        seconds = time.perf_counter() - self.started
        kinds = channel_test(self.block, self.cache, task=self.task, rows=self.held, seed=self.seed)
        scores = {name: float(kind.double().mean()) for name, kind in kinds.items()}
        yes = kinds["gated"]
        if self.task == "multilabel":
            yes = yes[self.cache.logits[self.held] > 0]
        opened = torch.cat([(self.block.excite(z) > 0.5).flatten() for _, z in self._held()])
        del scores["original"]
        return GateReport(
            sparsity=sparsity,
            agreement=scores.pop("gated"),
            agreement_positive=float(yes.double().mean()) if len(yes) else 1.0,
            open_gates=int(opened.sum()) / opened.numel(),
            images=len(self.cache.logits),
            cache_seconds=self.cache.seconds,
            fit_seconds=seconds,
            **scores,
        )


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
