"""How much each modality counts, from gates on features side by side, a segment of channels each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Names = Sequence[str] | Mapping[str, int]


@dataclass(frozen=True)
class Modalities:
    """How much each of M modalities counts, by the gates on the fused features.

    Attributes:
        names: the modalities.
        gates: (B, M) the mean SE value of each modality's segment, as the authors of BIAS read it.
        influence: (B, M), or (B, M, T) with an answer a frame: how much the target's logit falls when all
            gates of a segment are set to zero and the others stay. It need not add up over the modalities.
        share: (B, M) the mean over time of the influence's magnitude, as a share of the modalities' sum.
        gate_share: (B, M) the gates as a share of their sum.
    """

    names: tuple[str, ...]
    gates: Tensor
    influence: Tensor
    share: Tensor
    gate_share: Tensor


def summarize(names: Sequence[str], member: Tensor, gates: Tensor, influence: Tensor) -> Modalities:
    """Modalities from their channels bool (M, C), the gates (B, C) and the influence (B, M[, T])."""
    means = gates @ member.to(gates).T / member.sum(1)
    size = influence.abs().flatten(2).mean(2) if influence.ndim == 3 else influence.abs()
    return Modalities(tuple(names), means, influence, _shares(size), _shares(means))


def _shares(parts: Tensor) -> Tensor:
    """Parts (B, M), none negative, as shares of their sum; zeros where that is zero."""
    total = parts.sum(1, keepdim=True)
    return parts / total.where(total > 0, torch.ones_like(total))


def members(segments: Mapping[str, int]) -> Tensor:
    """Which of C channels belong to which of M modalities: bool (M, C)."""
    index = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(list(segments.values())))
    return index == torch.arange(len(segments))[:, None]


def segments_of(names: Names | None, channels: int) -> dict[str, int]:
    """{modality: channels} of the fused channels, in their order.

    Raises:
        ValueError: no names, or names that do not fit the channels.
    """
    if names is None:
        raise ValueError(
            "the model has no attribute modalities that names the segments of the fused channels: pass names="
        )
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"names={names!r}: give the modalities in the order of their channels")
    if isinstance(names, Mapping):
        if any(width < 1 for width in names.values()) or sum(names.values()) != channels:
            raise ValueError(
                f"names={dict(names)}: the channels do not add up to the {channels} of the SE block"
            )
        return dict(names)
    if len(set(names)) < len(names) or channels % len(names):
        raise ValueError(
            f"names={tuple(names)}: {channels} channels are not {len(names)} equal segments of different "
            "names; pass {name: channels}"
        )
    return dict.fromkeys(names, channels // len(names))
