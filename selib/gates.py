"""Sparse, label-free gates: make the SE vector of a trained network say which channels its predictions rest on.

The network is frozen. Only the SE block learns, to keep the network's own predictions with as few open gates as possible:

    loss = KL( softmax(y_original) || softmax(y_gated) ) + λ · mean(s)

Where every output is a decision of its own (``task="multilabel"``), the divergences of the K decisions are summed: it is that of
their joint distribution, and λ weighs the same however many outputs there are, since a channel that one of them needs is worth as much
among forty as among two. Where every output has gates of its own, its own λ · mean(s_k) joins it:

    loss = Σ_k KL( Bernoulli(σ(y_k)) || Bernoulli(σ(ŷ_k)) ) + λ · mean(s)        or, per target,    + λ · Σ_k mean(s_k)

No labels are used. The feature maps are computed once, pooled where the head allows it, so a fit takes seconds on a CPU.

Of a model that answers once a frame, the divergence is the mean over the frames. Several blocks, of streams side by side, learn together:

    loss = mean over frames of the divergence + λ · mean over blocks of mean(s)

There the maps that one block reads depend on the gates of others, so nothing is kept: the frozen network runs in every pass.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from selib.attach import (
    Task,
    agrees,
    attach_se,
    attached,
    bare,
    call,
    check_task,
    decisions,
    detach_se,
    evaluating,
    logits_of,
    to_device,
)
from selib.explanation import Explanation, SEExplainer
from selib.head import Head, Trace, other_forwards
from selib.se import SEBlock, TargetSEBlock, scaled
from selib.select import Select, TopFraction

CACHE_LIMIT = 8 * 2**30  # bytes of feature maps held in memory
PORTION = 1024  # samples at a time where their gates are (n, K, C)


def bernoulli_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL( Bernoulli(σ(a)) || Bernoulli(σ(b)) ) in nats, element by element, from logits of any size."""
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    return yes + (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))


@dataclass(frozen=True)
class FeatureCache:
    """One pass of a network over a loader: all that the gates and the head need.

    Attributes:
        maps: (N, …) F as the head reads it, rectified and pooled where that changes nothing. N clips are all equally long.
        squeezed: (N, C) z, what the SE block reads.
        scales: (N, C) the scale that the maps had in that pass: 1 for a block at its identity start; (N, K, C) where the outputs had
            different ones.
        logits: (N, K) of the network in that pass, or (N, T, K) with an answer a frame.
        targets: (N,) or (N, K) when the loader has them, (N, T) of frames.
        seconds: how long the pass took.
    """

    maps: Tensor
    squeezed: Tensor
    scales: Tensor
    logits: Tensor
    targets: Tensor | None
    head: Head
    seconds: float

    def run(self, scales: Tensor, rows: Tensor | slice = slice(None), batch: int = 1024) -> Tensor:
        """Logits (n, K) of the cached maps multiplied by ``scales`` (n, C), or for each output by its own, (n, K, C) or (n, 1, C)."""
        maps = self.maps[rows]
        parts = [
            self.head(scaled(m, s, 1.0, self.head.layout)) if s.ndim == 2 else self.head.per_target(m, s)
            for m, s in zip(maps.split(batch), scales.split(batch), strict=True)
        ]
        return torch.cat(parts)

    def influence(self, target: int | None = None) -> Tensor:
        """Influence (N, C) of each channel on a logit in the cached pass, w[k,c]·scale[c]·mean(F[c]): the largest one, or ``target``.

        Raises:
            ValueError: no such output, or the head is not global average pooling + linear; use :meth:`selib.Explanation.influence` there.
        """
        if self.head.linear is None:
            raise ValueError(
                "the head is not global average pooling + linear: use selib.explain(model, images).influence()"
            )
        images, outputs = self.logits.shape
        if target is not None and not 0 <= target < outputs:
            raise ValueError(f"target={target} is not among the {outputs} outputs 0..{outputs - 1}")
        largest = self.logits.argmax(1)
        index = largest if target is None else torch.full_like(largest, target)
        every = torch.arange(images, device=index.device)
        scales = self.scales if self.scales.ndim == 2 else self.scales[every, index]
        pooled = scaled(self.maps, scales, 1.0, self.head.layout).flatten(1)
        return self.head.linear.weight[index] * pooled

    def influences(self) -> Tensor:
        """Influence (N, K, C) of each channel on every logit; see :meth:`influence`."""
        return torch.stack([self.influence(target) for target in range(self.logits.shape[1])], 1)


def _inputs(batch: Any) -> tuple[Any, Tensor | None]:
    """What a loader yields, as inputs and labels: (inputs, labels) or the inputs alone."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    return batch, None


_BYPASSED = (
    "the head reads more than the gated map (other streams or inputs bypass it): fit_gates needs a map that everything "
    "passes through"
)


def cache_features(
    model: nn.Module, loader: Iterable[Any], *, gated: bool = True, progress: bool = False
) -> FeatureCache:
    """Run the model once over a loader of inputs or (inputs, labels), and keep what precedes the head.

    Args:
        gated: False holds the block at scale 1 meanwhile: the network that was there before ``fit_gates``.

    Raises:
        ValueError: an empty loader, several SE blocks, a head that reads more than the gated map, clips that differ in length, or maps
            beyond the memory limit.
    """
    started = time.perf_counter()
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    targets: list[Tensor] = []
    head: Head | None = None
    block = _only_block(model)
    size = 0
    with (
        SEExplainer(model) as explainer,
        nullcontext() if gated else block.override(lambda s: torch.ones_like(s) / block.gain),
    ):
        for batch in tqdm(loader, desc="features", disable=not progress, leave=False):
            inputs, labels = _inputs(batch)
            ex = explainer(inputs)
            assert isinstance(ex, Explanation)
            if head is None:
                head = ex._head
                head.prepare()
                if len(ex.logits) > 1 and not head.reads_only_the_map():
                    raise ValueError(_BYPASSED)
            maps = head.effective(ex._raw)
            size += maps.numel() * maps.element_size()
            if size > CACHE_LIMIT:
                raise ValueError(
                    f"the feature maps exceed {CACHE_LIMIT / 2**30:.0f} GB: use a loader with fewer images"
                )
            found.append((maps, block.squeeze(ex._raw), _common(block.gain * ex.gates), ex.logits))
            if labels is not None:
                targets.append(labels.to(ex.logits.device))
    if head is None:
        raise ValueError("the loader is empty: there are no images to learn the gates from")
    lengths = {row[3].shape[1] for row in found if row[3].ndim == 3}
    if len(lengths) > 1:
        raise ValueError(
            f"clips of {min(lengths)} to {max(lengths)} frames: to be kept in memory they must be equally long; cut them alike, or "
            'attach with at={"…": module}, whose gates are fitted without it'
        )
    if len({row[2].ndim for row in found}) > 1:
        found = [
            (m, z, s if s.ndim == 3 else s[:, None].expand(-1, y.shape[1], -1), y) for m, z, s, y in found
        ]
    maps, squeezed, scales, logits = (torch.cat([row[i] for row in found]) for i in range(4))
    answers = torch.cat(targets) if targets else None
    cache = FeatureCache(maps, squeezed, scales, logits, answers, head, time.perf_counter() - started)
    if len(logits) > 1 and not head.shared:  # a first batch of one image could not tell
        with evaluating(model):
            if not agrees(cache.run(scales), logits):
                raise ValueError(_BYPASSED)
    return cache


def _common(scales: Tensor) -> Tensor:
    """Scales (n, K, C) that are the same for all K as (n, C): those of an identity start need no K times the memory."""
    return scales[:, 0].clone() if scales.ndim == 3 and bool((scales == scales[:, :1]).all()) else scales


@contextmanager
def _recurrent_gradients(model: nn.Module) -> Iterator[None]:
    """Let gradients pass through recurrent layers: cuDNN's have them in training mode only, which is the same without dropout."""
    layers = [(m, m.training, m.dropout) for m in model.modules() if isinstance(m, nn.RNNBase)]
    try:
        for layer, _, _ in layers:
            layer.training, layer.dropout = True, 0.0
        yield
    finally:
        for layer, training, dropout in layers:
            layer.training, layer.dropout = training, dropout


def _divergence(teacher: Tensor, student: Tensor, task: Task) -> Tensor:
    """KL of the student's decisions from the teacher's: the mean over samples or frames of logits (…, K)."""
    if task == "multilabel":
        return bernoulli_kl(teacher, student).sum(-1).mean()
    teacher, student = (logits.flatten(0, -2).log_softmax(1) for logits in (teacher, student))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@contextmanager
def _learning(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Weights that take gradients meanwhile, whether or not they did before, and have none afterwards."""
    learns = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, before in zip(weights, learns, strict=True):
            weight.grad = None
            weight.requires_grad_(before)


def _device(model: nn.Module) -> torch.device:
    return next(iter(model.parameters()), torch.empty(0)).device


def _only_block(model: nn.Module) -> SEBlock:
    blocks = attached(model)
    if list(blocks) != [""]:
        names = ", ".join(blocks) or "none"
        raise ValueError(f"a model with one attached SE block is needed, this one has: {names}")
    return blocks[""]


@dataclass(frozen=True)
class GateReport:
    """What ``fit_gates`` reached, on images held out from the fit, against the network's own predictions (no labels).

    All figures but the last three are fractions: ``open_gates`` is the mean share of gates above ½; ``only_top`` and
    ``without_top`` are the agreement when only the top decile of gates is kept or is removed in the gated network, the
    ``original_`` ones the same channels in the ungated network, and ``random_`` the same number of random channels there.

    The agreement is over predictions, and for ``multilabel`` over decisions, each output's yes or no. Where yes is rare, no need not
    rest on any channel: ``agreement_positive`` is over the decisions that were yes (1 when there was none). To name a class is a yes.
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


@dataclass(frozen=True)
class StreamsGateReport:
    """What ``fit_gates`` reached with several SE blocks, on batches held out from the fit.

    ``agreement`` and ``agreement_positive`` are those of :class:`GateReport`, over frames where there are any; ``open_gates`` is, for each
    stream, the mean share of gates above ½; ``held_out`` counts images or clips, ``epochs`` the passes, ``seconds`` are those of the whole.
    """

    sparsity: float
    agreement: float
    agreement_positive: float
    open_gates: dict[str, float]
    held_out: int
    epochs: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
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
) -> Any:
    """Train only the SE block to keep the network's own predictions with as few open gates as possible.

    The block is attached first if there is none, and started anew. The loader should not augment or shuffle in ways that the
    network would not see; its labels are ignored. One image in ten is held out for the report. The network's weights, mode and
    gradients are untouched. The gated network is F' = s·F.

    Several blocks that are attached already, ``at={stream: module}``, learn together. The network then runs in every pass, so the loader
    must be one that can be iterated again and gives the same batches; one in ten of them is held out. Clips may differ in length from
    batch to batch.

    Args:
        model: a trained network that returns logits (B, K), or (B, T, K) or (B·T, K) with an answer for each frame of a clip.
        loader: yields inputs or (inputs, labels); or the :class:`FeatureCache` of an earlier pass over this model.
        sparsity: λ.
        agreement: instead of a λ, a promise: the sparsest gates that keep this share of the predictions on held-out images.
        task: ``"multilabel"`` where every output is a decision of its own, yes when its logit is positive.
        per_target: attach gates for each output; the head must be global average pooling + linear. A block that is there already says
            by itself which kind it is.
        epochs: passes over the cached features, by default enough for about 1,000 steps; with several blocks passes over the loader, by
            default enough for about 300.
        lr, batch_size: of the fit; several blocks take the loader's batches.
        reduction: r of the block, when it is attached here; by default 1, and 4 for the blocks of ``per_target``. To know which channels
            a prediction rests on, the block must know the prediction: a bottleneck narrower than the number of classes costs
            agreement, but each of many blocks has one decision to know.

    Returns:
        A :class:`GateReport`, or a :class:`StreamsGateReport` for several blocks.

    Raises:
        ValueError: an argument out of range, an empty loader, a head that other inputs bypass, clips of several lengths before one block,
            ``per_target`` with an attached block that all outputs share, or, with several blocks, a promised agreement, a cache or a
            loader that can be iterated only once.
    """
    check_task(task)
    if sparsity < 0:
        raise ValueError(f"sparsity={sparsity}: it must be 0 or more")
    if agreement is not None and not 0 < agreement < 1:
        raise ValueError(f"agreement={agreement}: it is a share of the predictions, between 0 and 1")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs}: at least 1 is needed")
    model = bare(model)
    if attached(model) and list(attached(model)) != [""] and not isinstance(loader, FeatureCache):
        if agreement is not None or per_target:
            what = "per_target=True" if per_target else f"agreement={agreement}"
            raise ValueError(
                f"{what} is for one SE block, this model has {', '.join(attached(model))}: give sparsity="
            )
        return _fit_streams(model, loader, task, sparsity, epochs, lr, seed, progress)
    fresh = not isinstance(loader, FeatureCache) and not attached(model)
    if fresh:
        reduction = reduction if reduction is not None else 4 if per_target else 1
        loader = _attach_first(model, loader, reduction, seed, per_target)  # type: ignore[arg-type]
    elif per_target and not isinstance(_only_block(model), TargetSEBlock):
        raise ValueError(
            "per_target=True, but the attached SE block is shared by all outputs: call selib.detach_se first"
        )
    try:
        cache = (
            loader if isinstance(loader, FeatureCache) else cache_features(model, loader, progress=progress)
        )
        if len(cache.logits) < 2:
            raise ValueError("fit_gates needs at least two images: one of them is held out")
    except BaseException:
        if fresh:
            detach_se(model)
        raise
    block = _only_block(model)
    started = time.perf_counter()
    shuffled = torch.randperm(len(cache.logits), generator=torch.Generator().manual_seed(seed)).to(
        cache.logits.device
    )
    held, kept = shuffled[: max(1, len(shuffled) // 10)], shuffled[max(1, len(shuffled) // 10) :]
    epochs = epochs or max(1, round(1000 / -(-len(kept) // batch_size)))

    def attempt(strength: float) -> float:
        _fit(block, cache, kept, task, strength, epochs, lr, batch_size, seed, progress)
        return _agreement(block, cache, held, task)

    if agreement is not None:
        sparsity = _sparsest(attempt, agreement)
    attempt(sparsity)
    seconds = time.perf_counter() - started
    kinds = channel_test(block, cache, task=task, rows=held, seed=seed)
    scores = {name: float(kind.double().mean()) for name, kind in kinds.items()}
    yes = kinds["gated"][cache.logits[held] > 0] if task == "multilabel" else kinds["gated"]
    with torch.no_grad():
        opened = torch.cat(
            [(block.excite(cache.squeezed[part]) > 0.5).flatten() for part in _portions(block, held)]
        )
        open_gates = int(opened.sum()) / opened.numel()
    names = (
        "only_top",
        "without_top",
        "original_only_top",
        "original_without_top",
        "random_only",
        "random_without",
    )
    return GateReport(
        sparsity=sparsity,
        agreement=scores["gated"],
        agreement_positive=float(yes.double().mean()) if len(yes) else 1.0,
        open_gates=open_gates,
        images=len(cache.logits),
        cache_seconds=cache.seconds,
        fit_seconds=seconds,
        **{n: scores[n] for n in names},
    )


def _attach_first(
    model: nn.Module, loader: Iterable[Any], reduction: int, seed: int, per_target: bool
) -> Iterable[Any]:
    """Attach a block by the first batch of a loader; returns the loader with that batch still in it."""
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("the loader is empty: there are no images to learn the gates from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach_se(
            model, to_device(_inputs(first)[0], _device(model)), reduction=reduction, per_target=per_target
        )
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
    with (
        torch.random.fork_rng(devices=[]),
        evaluating(cache.head.model),
        _recurrent_gradients(cache.head.model),
        torch.enable_grad(),
        _learning(weights),
    ):
        torch.manual_seed(seed)
        block.restart("paper")
        steps = epochs * -(-len(rows) // batch)
        step = _stepper(weights, lr, steps)
        # Each output with gates and a decision of its own is a problem of its own, with a λ of its own.
        strength = sparsity * (
            block.targets if isinstance(block, TargetSEBlock) and task == "multilabel" else 1
        )
        bar = tqdm(total=steps, desc=f"gates λ={sparsity:g}", disable=not progress, leave=False)
        for _ in range(epochs):
            for index in rows[torch.randperm(len(rows)).to(rows.device)].split(batch):
                gates = block.excite(cache.squeezed[index])
                step(
                    _divergence(cache.logits[index], cache.run(gates, index), task) + strength * gates.mean()
                )
                bar.update()
        bar.close()


def _stepper(weights: Sequence[nn.Parameter], lr: float, steps: int) -> Callable[[Tensor], None]:
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


def _fit_streams(
    model: nn.Module,
    loader: Iterable[Any],
    task: Task,
    sparsity: float,
    epochs: int | None,
    lr: float,
    seed: int,
    progress: bool,
) -> StreamsGateReport:
    """``fit_gates`` of several blocks: the frozen network runs in every pass, the part behind the gates with gradients."""
    once = isinstance(loader, Iterator)
    if once:
        raise ValueError(
            "the loader is an iterator, which gives its batches once, but several SE blocks are fitted in several passes: give what can "
            "be iterated again, such as a DataLoader or a list"
        )
    started = time.perf_counter()
    blocks = attached(model)
    weights = [p for block in blocks.values() for p in (*block.fc1.parameters(), *block.fc2.parameters())]
    teachers = {block: copy.deepcopy(block) for block in blocks.values()}
    sites = [model.get_submodule(block.site) for block in blocks.values()]
    gates: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        return lambda s: gates.setdefault(name, s)

    def both(batch: Any) -> tuple[Tensor, Tensor]:
        """Logits of the network as it was and with the new gates. What no gate reaches is computed once."""
        inputs = to_device(_inputs(batch)[0], _device(model))
        trace = Trace(model, sites)
        gates.clear()
        before = other_forwards([(block, teacher.forward) for block, teacher in teachers.items()])
        with torch.no_grad(), before, trace.recording():
            teacher = logits_of(call(model, inputs), inputs).float()
        with ExitStack() as stack:
            for name, block in blocks.items():
                stack.enter_context(block.override(keep(name)))
            stack.enter_context(trace.replaying(reached=lambda t: t.requires_grad))
            return teacher, logits_of(call(model, inputs), inputs).float()

    frozen = [p for p in model.parameters() if p.requires_grad and all(p is not w for w in weights)]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(evaluating(model))
        stack.enter_context(_recurrent_gradients(model))
        for p in frozen:
            stack.callback(p.requires_grad_, True)
            p.requires_grad_(False)
        count = len(loader) if isinstance(loader, Sized) else sum(1 for _ in loader)
        if count < 2:
            raise ValueError(
                f"batches in the loader: {count}, but fit_gates needs at least two with several SE blocks, one of them is held out"
            )
        torch.manual_seed(seed)
        for block in blocks.values():
            block.restart("paper")
        held = {index for index in range(count) if index % 10 == 9} or {count - 1}
        epochs = epochs or max(1, round(300 / (count - len(held))))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_learning(weights))
        step = _stepper(weights, lr, epochs * (count - len(held)))
        bar = stack.enter_context(
            tqdm(total=epochs * count, desc=f"gates λ={sparsity:g}", disable=not progress, leave=False)
        )
        for _ in range(epochs):
            for index, batch in enumerate(loader):
                bar.update()
                if index not in held:
                    teacher, student = both(batch)
                    open_share = torch.stack([s.mean() for s in gates.values()]).mean()
                    step(_divergence(teacher, student, task) + sparsity * open_share)
        samples, right, yes = 0, [], []
        opened: dict[str, list[Tensor]] = {name: [] for name in blocks}
        for index, batch in enumerate(loader):
            if index in held:
                teacher, student = both(batch)
                wanted = decisions(teacher, task)
                right.append((decisions(student, task) == wanted).flatten())
                yes.append((wanted if task == "multilabel" else torch.ones_like(wanted)).flatten().bool())
                for name, s in gates.items():
                    opened[name].append((s > 0.5).flatten())
                samples += len(teacher)
    agree, positive = torch.cat(right).double(), torch.cat(yes)
    return StreamsGateReport(
        sparsity=sparsity,
        agreement=float(agree.mean()),
        agreement_positive=float(agree[positive].mean()) if bool(positive.any()) else 1.0,
        open_gates={name: float(torch.cat(shares).double().mean()) for name, shares in opened.items()},
        held_out=samples,
        epochs=epochs,
        seconds=time.perf_counter() - started,
    )


def _portions(block: SEBlock, rows: Tensor) -> tuple[Tensor, ...]:
    """Rows in portions whose gates fit into memory."""
    return rows.split(PORTION if isinstance(block, TargetSEBlock) else max(1, len(rows)))


@torch.no_grad()
def _agreement(block: SEBlock, cache: FeatureCache, rows: Tensor, task: Task) -> float:
    gated = torch.cat(
        [cache.run(block.excite(cache.squeezed[part]), part) for part in _portions(block, rows)]
    )
    return float((decisions(gated, task) == decisions(cache.logits[rows], task)).double().mean())


def _sparsest(
    attempt: Any, agreement: float, low: float = 1e-2, high: float = 30.0, rounds: int = 5
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
def channel_test(
    block: SEBlock,
    cache: FeatureCache,
    *,
    task: Task = "multiclass",
    select: Select | None = None,
    ranking: Tensor | None = None,
    targets: Tensor | None = None,
    rows: Tensor | slice = slice(None),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Are the top channels sufficient and necessary? Which samples stay right with only them, and without them.

    Args:
        task: ``"multilabel"`` where every output is a decision of its own.
        select: which channels are the top ones; the top decile of each sample by default.
        ranking: (N, C) what they are ranked by, or (N, K, C) for each output by itself; the block's gates by default.
        targets: (N,), or (N, K) of 0 and 1, what counts as right; the network's own decisions by default, labels for accuracy.
        rows: which samples of the cache.

    Returns:
        Bool (n,) each, for ``multilabel`` (n, K): ``original`` and ``gated`` (all channels), ``only_top`` and ``without_top`` in the
        gated network, ``original_only_top`` and ``original_without_top`` in the ungated one, and there also ``random_only`` and
        ``random_without``, as many channels drawn at random for each sample. Where gates or ranking are each output's own, so are
        the channels that are kept or removed for its logit.

    Raises:
        ValueError: an unknown task, or channels for each output with a head that is not global average pooling + linear.
    """
    check_task(task)
    rule = select or TopFraction(0.10)
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(len(cache.logits), device=cache.logits.device)[rows]
    right = (
        decisions(cache.logits, task)
        if targets is None
        else targets.bool()
        if task == "multilabel"
        else targets
    )
    apart = (
        isinstance(block, TargetSEBlock)
        or cache.scales.ndim == 3
        or (ranking is not None and ranking.ndim == 3)
    )
    size = PORTION if apart else max(1, len(index))
    found: dict[str, Tensor] = {}
    for number, part in enumerate(index.split(size)):
        gates = block.gain * block.excite(cache.squeezed[part])
        scores = gates if ranking is None else ranking[part]
        top = rule.mask(scores.flatten(0, -2)).view_as(scores)
        noise = torch.rand(top.shape, generator=generator).to(top.device)
        # The same number of channels as the rule took, sample by sample.
        random = noise.argsort(-1).argsort(-1) < top.sum(-1, keepdim=True)
        base = cache.scales[part]
        if apart:
            gates, base, top, random = (t if t.ndim == 3 else t[:, None] for t in (gates, base, top, random))
        scales = {
            "original": base,
            "gated": gates,
            "only_top": gates * top,
            "without_top": gates * ~top,
            "original_only_top": base * top,
            "original_without_top": base * ~top,
            "random_only": base * random,
            "random_without": base * ~random,
        }
        if not found:  # all at once: small results between large temporaries would leave holes in memory
            found = {name: torch.empty_like(right[index], dtype=torch.bool) for name in scales}
        for name, scale in scales.items():
            found[name][number * size :][: len(part)] = decisions(cache.run(scale, part), task) == right[part]
    return found
