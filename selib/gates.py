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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm

from selib.attach import BlockOptions, attach_blocks, check_form, detach_se
from selib.features import PORTION, FeatureCache, cache_features, channel_test, inputs_of, only_block
from selib.forward import Task, attached, bare, check_task, decisions, evaluating, to_device
from selib.images import Transform, batches
from selib.se import Form, HeadSEBlock, SEBlock, TargetSEBlock
from selib.select import NormalQuantile

WINDOW = 25  # steps over which the loss is averaged, to see whether it still falls
LEAST, MOST, STEP = 0.01, 1000.0, 4.0  # the λ that a promise is tried with
HALVINGS = 3  # of the last step of log λ


@dataclass(frozen=True)
class GateReport:
    """What :func:`fit_gates` reached, on images held out from the fit, against the network's own predictions.

    Shares: ``agreement`` of the predictions that stay when the gates act, ``open_gates`` of gates above ½.
    ``only_top`` and ``without_top`` of the predictions that stay when only the top decile of gates is left,
    or is removed, in the gated network; ``original_…`` the same channels in the network as it is, and there
    as controls ``another_…``, the top decile of another image, and ``random_…``, as many channels at random.
    ``rule_empty``: of the images on which the paper's rule selects nothing.

    ``promise`` is the ``agreement=`` that was asked for; ``held_out`` of the ``images`` are reported on, and
    have chosen nothing. For ``multilabel`` the agreement is over decisions, each output's yes or no;
    ``agreement_positive`` is over those that were yes, since no need not rest on any channel.
    """

    sparsity: float
    agreement: float
    agreement_positive: float
    open_gates: float
    only_top: float
    without_top: float
    original_only_top: float
    original_without_top: float
    another_only: float
    another_without: float
    random_only: float
    random_without: float
    rule_empty: float
    promise: float | None
    images: int
    held_out: int
    cache_seconds: float
    fit_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, for a results file."""
        return asdict(self)


def fit_gates(
    model: nn.Module,
    loader: Any,
    sparsity: float = 1.0,
    *,
    transform: Transform | None = None,
    agreement: float | None = None,
    task: Task = "multiclass",
    form: Form | None = None,
    per_target: bool = False,
    sharpness: float = 4.0,
    epochs: int | None = None,
    lr: float | None = None,
    reduction: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> GateReport:
    """Train only the SE block to keep the network's own predictions with as few open gates as possible.

    The block is attached first if there is none, and started anew. The loader should not augment the images;
    its labels are ignored. One image in ten is held out for the report. Afterwards the network answers as
    before, bit for bit: the block is transparent, and ``heatmap("influence")`` explains the network as it is.

    Args:
        model: a trained network with one SE block or none; for several see :func:`selib.fit_stream_gates`.
        loader: yields inputs or (inputs, labels); or images, such as a folder, with their transform, as of
            :func:`selib.explain`; or the :class:`selib.FeatureCache` of an earlier pass.
        sparsity: λ.
        agreement: instead of λ, the sparsest gates that keep this share of the predictions on another tenth
            of the images. A report that falls short of it is a warning.
        task: ``"multilabel"`` where every output is a decision of its own, yes when its logit is positive.
        form: of a block that is attached here; by default ``"head"``, gates through the classifier, where the
            outputs are classes behind global average pooling + linear, else ``"bottleneck"``.
        per_target: attach gates for each output; the head must be global average pooling + linear.
        sharpness: t of gates through the classifier: at 1 they serve the answer and its rivals by their
            probabilities and may overturn it, the larger the more they are the gates of the answer alone.
        epochs: passes over the cached features at most (about 1,000 steps), while the loss falls.
        lr: by default 0.1 for ``"head"`` and 0.01 for bottlenecks.
        reduction: r of a bottleneck attached here; by default at most 256 units, and 4 for ``per_target``.

    Raises:
        ValueError: an argument out of range, an empty loader, a head that other inputs bypass, clips of
            several lengths, several SE blocks, or one of another kind than asked for, or trained with labels.
    """
    check_fit(task, sparsity, epochs)
    _check_options(agreement, sharpness, form, per_target)
    wanted = BlockOptions(reduction, per_target=per_target, form=form)
    loader = batches(model, loader, transform)
    with (
        _block_and_cache(bare(model), loader, wanted, task, seed, progress) as (block, cache),
        unless_it_fails([block]),
    ):
        fit = _Fit(block, cache, task, sharpness, epochs, lr, batch_size, seed, progress)
        if agreement is None:
            fit.learn(sparsity)
        else:
            sparsity = fit.keep(agreement)
        return fit.report(sparsity, agreement)


@contextmanager
def _block_and_cache(
    model: nn.Module,
    loader: Iterable[Any] | FeatureCache,
    wanted: BlockOptions,
    task: Task,
    seed: int,
    progress: bool,
) -> Iterator[tuple[SEBlock, FeatureCache]]:
    """The block and the features; a block that is attached here is taken out again if the fit fails."""
    fresh = not attached(model)
    try:
        if fresh and not isinstance(loader, FeatureCache):
            loader = _attach_first(model, loader, wanted, task, seed)
        block = only_block(model)
        _check_kind(block, wanted)
        if not isinstance(loader, FeatureCache):
            loader = cache_features(model, loader, progress=progress)
        yield block, loader
    except BaseException:
        if fresh and attached(model):
            detach_se(model)
        raise


@contextmanager
def unless_it_fails(blocks: Sequence[SEBlock]) -> Iterator[None]:
    """Blocks become transparent; interrupted or failing, they get their weights back and act as before."""
    before = [(copy.deepcopy(b.state_dict()), b.gain, b.transparent, b.task) for b in blocks]
    try:
        yield
        for block in blocks:
            block.transparent = True
    except BaseException:
        for block, (weights, gain, transparent, task) in zip(blocks, before, strict=True):
            block.load_state_dict(weights)
            block.gain, block.transparent, block.task = gain, transparent, task
        raise


def check_fit(task: Task, sparsity: float, epochs: int | None) -> None:
    """Raise ValueError for an argument out of range."""
    check_task(task)
    if not 0 <= sparsity < float("inf"):
        raise ValueError(f"sparsity={sparsity}: it must be 0 or more")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1 is needed")


def _check_options(agreement: float | None, sharpness: float, form: Form | None, per_target: bool) -> None:
    if agreement is not None and not 0 < agreement < 1:
        raise ValueError(f"agreement={agreement}: it is a share of the predictions, between 0 and 1")
    if not 0 < sharpness < float("inf"):
        raise ValueError(f"sharpness={sharpness}: it must be above 0")
    if form is not None:
        check_form(form, per_target)


def _attach_first(
    model: nn.Module, loader: Iterable[Any], wanted: BlockOptions, task: Task, seed: int
) -> Iterable[Any]:
    """Attach a block by the first batch of a loader; returns the loader with that batch still in it."""
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("the loader is empty: there are no images to learn the gates from")
    if wanted.form is None and (task == "multilabel" or wanted.per_target or wanted.reduction is not None):
        wanted = replace(wanted, form="bottleneck")
    device = next(iter(model.parameters()), torch.empty(0)).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach_blocks(model, to_device(inputs_of(first)[0], device), {"": None}, {"": wanted})
    return chain([first], loader) if isinstance(loader, Iterator) else loader


def _check_kind(block: SEBlock, wanted: BlockOptions) -> None:
    """Raise ValueError for an attached block of another kind than asked for."""
    if wanted.per_target and not isinstance(block, TargetSEBlock):
        asked, there = "per_target=True", "is shared by all outputs"
    elif wanted.form and (wanted.form == "head") != isinstance(block, HeadSEBlock):
        asked, there = f"form={wanted.form!r}", "has another form"
    else:
        return
    raise ValueError(f"{asked}, but the attached SE block {there}: call selib.detach_se first")


def refuse_trained(scales: Tensor) -> None:
    """Raise ValueError if gates act on the network that is to be kept: other scales of F than 1."""
    if not bool((scales == 1).all()):
        raise ValueError(
            "the SE block was trained with the network, which needs it: a fit would overwrite it. Explain "
            "the network as it is, or call selib.detach_se first"
        )


class _Fit:
    """Fits of one block to cached features, of which two images in ten are held out.

    One of them chooses λ where a promise is to be kept, the other is for the report.
    """

    def __init__(
        self,
        block: SEBlock,
        cache: FeatureCache,
        task: Task,
        sharpness: float,
        epochs: int | None,
        lr: float | None,
        batch_size: int,
        seed: int,
        progress: bool,
    ) -> None:
        if len(cache.logits) < 3:
            raise ValueError("fit_gates needs at least three images: two of them are held out")
        refuse_trained(cache.scales)
        self.block, self.cache, self.task = block, cache, task
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        self.lr = lr or (0.1 if isinstance(block, HeadSEBlock) else 0.01)
        order = torch.randperm(len(cache.logits), generator=torch.Generator().manual_seed(seed))
        order = order.to(cache.logits.device)
        tenth = max(1, len(order) // 10)
        self.held, self.choosing, self.kept = order.split([tenth, tenth, len(order) - 2 * tenth])
        batches = -(-len(self.kept) // batch_size)
        self.steps = epochs * batches if epochs else max(1000, batches)
        self.started = time.perf_counter()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            block.restart("paper")
            if isinstance(block, HeadSEBlock):
                block.sharpness.fill_(sharpness)
            self.evidence = block.evidence(cache.squeezed)
        block.task = task

    def keep(self, agreement: float) -> float:
        """Fit the sparsest gates that keep a promise, and return their λ.

        λ grows by steps of ``STEP`` until the promise breaks, then the last step is halved. Every fit starts
        from the gates of the last λ that kept it.
        """
        weights = copy.deepcopy(self.block.state_dict())
        low, high = 0.0, LEAST
        while high < MOST and self.learn(high) >= agreement:
            low, high = high, high * STEP
            weights = copy.deepcopy(self.block.state_dict())
        if not low:
            return high  # the report will say that the promise is not kept
        for _ in range(HALVINGS if high < MOST else 0):
            middle = (low * high) ** 0.5
            self.block.load_state_dict(weights)
            if self.learn(middle) >= agreement:
                low, weights = middle, copy.deepcopy(self.block.state_dict())
            else:
                high = middle
        self.block.load_state_dict(weights)
        return low

    def learn(self, sparsity: float) -> float:
        """Fit the block from where it stands; the share of the choosing images' predictions that stay."""
        weights, losses = list(self.block.parameters()), []
        with torch.random.fork_rng(devices=[]), learning(self.cache.head.model, weights):
            torch.manual_seed(self.seed)
            optimizer = torch.optim.AdamW(weights, self.lr)
            plateau = ReduceLROnPlateau(optimizer, factor=0.1, patience=1, threshold=0.01)
            bar = tqdm(
                total=self.steps, desc=f"gates λ={sparsity:.2g}", disable=not self.progress, leave=False
            )
            for number, rows in enumerate(islice(self._batches(), self.steps), 1):
                loss = self._loss(rows, sparsity)
                gradients_of(loss, weights)
                optimizer.step()
                losses.append(loss.detach())
                bar.update()
                if number % WINDOW == 0:
                    plateau.step(torch.stack(losses[-WINDOW:]).mean().item())
                    if optimizer.param_groups[0]["lr"] < self.lr / 50:  # reduced twice: it falls no longer
                        break
            bar.close()
        return self._agreement(self.choosing)

    def _batches(self) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(self.kept)).to(self.kept.device)
            yield from self.kept[order].split(self.batch_size)

    def _loss(self, rows: Tensor, sparsity: float) -> Tensor:
        block, cache = self.block, self.cache
        gates = block.opened(self.evidence[rows])
        # Each output with gates and a decision of its own is a problem of its own, with a λ of its own.
        if isinstance(block, TargetSEBlock) and self.task == "multilabel":
            sparsity *= block.targets
        return divergence(cache.logits[rows], cache.run(gates, rows), self.task) + sparsity * gates.mean()

    @torch.no_grad()
    def _agreement(self, rows: Tensor) -> float:
        same = []
        with evaluating(self.cache.head.model):
            for part in rows.split(PORTION):
                gated = self.cache.run(self.block.opened(self.evidence[part]), part)
                same.append(decisions(gated, self.task) == decisions(self.cache.logits[part], self.task))
        return float(torch.cat(same).double().mean())

    @torch.no_grad()
    def report(self, sparsity: float, promise: float | None) -> GateReport:
        """What the gates are worth on the held-out images, with a warning if a promise is not kept."""
        seconds = time.perf_counter() - self.started
        kinds = channel_test(self.block, self.cache, task=self.task, rows=self.held, seed=self.seed)
        scores = {name: float(kind.double().mean()) for name, kind in kinds.items()}
        yes = kinds["gated"]
        if self.task == "multilabel":
            yes = yes[self.cache.logits[self.held] > 0]
        gates = [self.block.opened(self.evidence[rows]) for rows in self.held.split(PORTION)]
        empty = torch.cat([NormalQuantile().selects_nothing(s).flatten() for s in gates])
        del scores["original"]
        if promise is not None and scores["gated"] < promise:
            warnings.warn(
                f"the gates keep {scores['gated']:.1%} of the predictions on {len(self.held)} held-out "
                f"images, not the {promise:.1%} that were asked for: give more images, or ask for less",
                stacklevel=4,  # past the decorator and fit_gates
            )
        return GateReport(
            sparsity=sparsity,
            agreement=scores.pop("gated"),
            agreement_positive=float(yes.double().mean()) if len(yes) else 1.0,
            open_gates=float(torch.cat([(s > 0.5).double().flatten() for s in gates]).mean()),
            rule_empty=float(empty.double().mean()),
            promise=promise,
            images=len(self.cache.logits),
            held_out=len(self.held),
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


def gradients_of(loss: Tensor, weights: Sequence[nn.Parameter]) -> None:
    """Set the gradients of these weights alone: backward() would also fill those of the frozen head."""
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.grad = gradient


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
