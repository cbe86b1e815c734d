"""Features of many images, computed once, and what a network still answers when channels are taken away."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from selib.explainer import SEExplainer
from selib.forward import Head, Task, agrees, attached, check_task, decisions, evaluating
from selib.se import SEBlock, TargetSEBlock, scaled
from selib.select import Select, TopFraction

CACHE_LIMIT = 8 * 2**30  # bytes of feature maps held in memory
PORTION = 1024  # samples at a time where their gates are (n, K, C)
_BYPASSED = (
    "the head reads more than the gated map (other streams or inputs bypass it): fit_gates needs a map that "
    "everything passes through"
)


@dataclass(frozen=True)
class FeatureCache:
    """One pass of a network over a loader: all that the gates and the head need.

    Attributes:
        maps: (N, …) F as the head reads it, rectified and pooled where that changes nothing.
        squeezed: (N, C) z, what the SE block reads.
        scales: (N, C) the scale of the maps in that pass: 1 for a block at its identity start; (N, K, C)
            where the outputs had different ones.
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
        """Logits (n, K) of the cached maps times ``scales`` (n, C), or (n, K, C) and (n, 1, C) for each
        output.
        """
        parts = []
        for maps, scale in zip(self.maps[rows].split(batch), scales.split(batch), strict=True):
            if scale.ndim == 2:
                parts.append(self.head(scaled(maps, scale, 1.0, self.head.layout)))
            else:
                parts.append(self.head.per_target(maps, scale))
        return torch.cat(parts)

    def influence(self, target: int | None = None) -> Tensor:
        """Influence (N, C) of each channel on a logit: that of the largest one, or ``target``.

        Raises:
            ValueError: no such output, or the head is not global average pooling + linear; use
                :meth:`selib.Explanation.influence` there.
        """
        if self.head.linear is None:
            raise ValueError(
                "the head is not global average pooling + linear: use selib.explain(…).influence()"
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


def inputs_of(batch: Any) -> tuple[Any, Tensor | None]:
    """What a loader yields, as inputs and labels: (inputs, labels) or the inputs alone."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    return batch, None


def only_block(model: nn.Module) -> SEBlock:
    """The attached block of a model that has exactly one."""
    blocks = attached(model)
    if list(blocks) != [""]:
        names = ", ".join(blocks) or "none"
        raise ValueError(f"a model with one attached SE block is needed, this one has: {names}")
    return blocks[""]


def cache_features(model: nn.Module, loader: Iterable[Any], *, progress: bool = False) -> FeatureCache:
    """Run the model once over a loader of inputs or (inputs, labels), and keep what precedes the head.

    Raises:
        ValueError: an empty loader, several SE blocks, a head that reads more than the gated map, clips that
            differ in length, or maps beyond the memory limit.
    """
    started = time.perf_counter()
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    targets: list[Tensor] = []
    head: Head | None = None
    block = only_block(model)
    size = 0
    with SEExplainer(model) as explainer:
        for batch in tqdm(loader, desc="features", disable=not progress, leave=False):
            inputs, labels = inputs_of(batch)
            ex = explainer(inputs)
            if head is None:
                head = ex._head
                head.prepare()
                if len(ex.logits) > 1 and not head.shared:
                    raise ValueError(_BYPASSED)
            maps = head.effective(ex._raw)
            size += maps.numel() * maps.element_size()
            if size > CACHE_LIMIT:
                raise ValueError(
                    f"the feature maps exceed {CACHE_LIMIT / 2**30:.0f} GB: use a loader with fewer images"
                )
            found.append((maps, block.squeeze(ex._raw), _common(ex._head.scales), ex.logits))
            if labels is not None:
                targets.append(labels.to(ex.logits.device))
    if head is None:
        raise ValueError("the loader is empty: there are no images to learn the gates from")
    _check_lengths([logits for _, _, _, logits in found])
    if len({scales.ndim for _, _, scales, _ in found}) > 1:
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
    """Scales (n, K, C) that are the same for all K as (n, C), which need no K times the memory."""
    return scales[:, 0].clone() if scales.ndim == 3 and bool((scales == scales[:, :1]).all()) else scales


def _check_lengths(logits: Iterable[Tensor]) -> None:
    lengths = {one.shape[1] for one in logits if one.ndim == 3}
    if len(lengths) > 1:
        raise ValueError(
            f"clips of {min(lengths)} to {max(lengths)} frames: to be kept in memory they must be equally "
            'long; cut them alike, or attach with at={"…": module} and use fit_stream_gates'
        )


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
    """Are the top channels sufficient and necessary? Which samples stay right with only them, and without
    them.

    Args:
        task: ``"multilabel"`` where every output is a decision of its own.
        select: which channels are the top ones; the top decile of each sample by default.
        ranking: (N, C), or (N, K, C) for each output, what they are ranked by; the block's gates by default.
        targets: (N,), or (N, K) of 0 and 1, what counts as right; the network's own decisions by default.
        rows: which samples of the cache.

    Returns:
        Bool (n,) each, for ``multilabel`` (n, K): ``original`` and ``gated`` (all channels), ``only_top`` and
        ``without_top`` in the gated network, ``original_only_top`` and ``original_without_top`` in the
        ungated one, and there also two controls: ``another_only`` and ``another_without``, the top channels
        of another sample, and ``random_only`` and ``random_without``, as many channels drawn at random.
        Gates whose control is as good are a fixed pruning, and say nothing about the sample.

    Raises:
        ValueError: an unknown task, or channels for each output with a head that is not global average
            pooling + linear.
    """
    check_task(task)
    rule = select or TopFraction(0.10)
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(len(cache.logits), device=cache.logits.device)[rows]
    right = decisions(cache.logits, task)
    if targets is not None:
        right = targets.bool() if task == "multilabel" else targets
    apart = isinstance(block, TargetSEBlock) or cache.scales.ndim == 3
    apart = apart or (ranking is not None and ranking.ndim == 3)
    found: dict[str, list[Tensor]] = {}

    def gates_and_top(part: Tensor) -> tuple[Tensor, Tensor]:
        gates = block.gain * block.excite(cache.squeezed[part])
        scores = gates if ranking is None else ranking[part]
        return gates, rule.mask(scores.flatten(0, -2)).view_as(scores)

    size = PORTION if apart else max(1, len(index))
    with evaluating(cache.head.model):
        for part, other in zip(index.split(size), _others(index, seed).split(size), strict=True):
            (gates, top), (_, another) = gates_and_top(part), gates_and_top(other)
            noise = torch.rand(top.shape, generator=generator).to(top.device)
            # The same number of channels as the rule took, sample by sample.
            random = noise.argsort(-1).argsort(-1) < top.sum(-1, keepdim=True)
            cases = gates, cache.scales[part], top, another, random
            lifted = (t[:, None] if apart and t.ndim == 2 else t for t in cases)
            for name, scale in _kept_and_removed(*lifted).items():
                found.setdefault(name, []).append(decisions(cache.run(scale, part), task) == right[part])
    return {name: torch.cat(parts) for name, parts in found.items()}


def _others(index: Tensor, seed: int) -> Tensor:
    """For every sample another one, whatever their order: each is shifted by one in a random order."""
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed)).to(index.device)
    return torch.empty_like(index).index_copy_(0, order, index[order.roll(1)])


def _kept_and_removed(
    gates: Tensor, base: Tensor, top: Tensor, another: Tensor, random: Tensor
) -> dict[str, Tensor]:
    """The scales of the maps in each case of :func:`channel_test`."""
    return {
        "original": base,
        "gated": gates,
        "only_top": gates * top,
        "without_top": gates * ~top,
        "original_only_top": base * top,
        "original_without_top": base * ~top,
        "another_only": base * another,
        "another_without": base * ~another,
        "random_only": base * random,
        "random_without": base * ~random,
    }
