"""Which channels to show: composable rules that turn channel weights (…, C) into a mask (…, C)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import torch
from torch import Tensor


class Select(Protocol):
    """A selection rule."""

    def mask(self, weights: Tensor) -> Tensor:
        """Channel weights (B, C), or (B, K, C) of targets, -> bool alike, at least one True in every row
        unless the rule says otherwise.
        """
        ...


def _top(weights: Tensor, k: int) -> Tensor:
    # Ties are reproducible: among equal weights the lower index wins. ONNX has no stable sort.
    k = min(k, weights.shape[-1])
    least = weights.topk(k, dim=-1).values[..., -1:]
    above, equal = weights > least, weights == least
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


@dataclass(frozen=True)
class All:
    """Every channel."""

    def mask(self, weights: Tensor) -> Tensor:
        return torch.ones_like(weights, dtype=torch.bool)


@dataclass(frozen=True)
class TopK:
    """The k channels of largest weight (all of them when there are fewer)."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"TopK needs k of at least 1, got {self.k}")

    def mask(self, weights: Tensor) -> Tensor:
        return _top(weights, self.k)


@dataclass(frozen=True)
class TopFraction:
    """The exact quantile: the ⌈q·C⌉ channels of largest weight, 0 < q ≤ 1."""

    q: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise ValueError(f"TopFraction needs 0 < q <= 1, got {self.q}")

    def count(self, channels: int) -> int:
        """How many of ``channels`` are kept, at least one."""
        # Rounded first: 0.07 * 100 is 7.000000000000001 in floating point and must not give 8.
        exact = round(self.q * channels, 9)
        return max(1, int(-(-exact // 1)))

    def mask(self, weights: Tensor) -> Tensor:
        return _top(weights, self.count(weights.shape[-1]))


@dataclass(frozen=True)
class Threshold:
    """Channels whose weight exceeds ``t``; a row may be empty."""

    t: float

    def mask(self, weights: Tensor) -> Tensor:
        return weights > self.t


@dataclass(frozen=True)
class Channels:
    """Hand-picked channel indices."""

    indices: Sequence[int]

    def mask(self, weights: Tensor) -> Tensor:
        channels = weights.shape[-1]
        wrong = [i for i in self.indices if not -channels <= i < channels]
        if wrong:
            raise ValueError(f"Channels: {wrong} are not among the {channels} channels")
        mask = torch.zeros_like(weights, dtype=torch.bool)
        mask[..., list(self.indices)] = True
        return mask


@dataclass(frozen=True)
class NormalQuantile:
    """The paper's rule: channels above mean + z·std of that sample's weights.

    z = 1.2816 is the 90 % quantile of a normal distribution; std is that of the sample (n - 1), as
    ``torch.std`` has it. A row of
    constant or saturated weights can leave nothing selected: such a row falls back to the exact quantile,
    with a warning.
    """

    z: float = 1.2816

    def above(self, weights: Tensor) -> Tensor:
        """Which channels the rule selects, in some rows perhaps none: (…, C) -> bool (…, C)."""
        if weights.shape[-1] < 2:
            return torch.ones_like(weights, dtype=torch.bool)
        spread = weights.std(-1, keepdim=True)
        # The mean of equal numbers is rounded: without the second test all of them might exceed it.
        constant = weights.amin(-1, keepdim=True) == weights.amax(-1, keepdim=True)
        return (weights > weights.mean(-1, keepdim=True) + self.z * spread) & ~constant

    def selects_nothing(self, weights: Tensor) -> Tensor:
        """Where the rule alone selects no channel: weights (…, C) -> bool (…)."""
        return ~self.above(weights).any(-1)

    def mask(self, weights: Tensor) -> Tensor:
        mask = self.above(weights)
        empty = ~mask.any(-1)
        if empty.any():
            warnings.warn(
                f"the normal-quantile rule selected no channel for {int(empty.sum())} of {empty.numel()} "
                f"samples (constant or saturated weights): the top {self.rest.q:.0%} were taken instead",
                stacklevel=3,
            )
            mask[empty] = self.rest.mask(weights[empty])
        return mask

    @property
    def rest(self) -> TopFraction:
        """The exact quantile, which takes its place where it selects nothing."""
        return TopFraction(max(1 - NormalDist().cdf(self.z), 1e-9))
