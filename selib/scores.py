"""How well outputs are predicted, and how well scores rank what they should find."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selib.forward import decisions


def attribute_scores(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """How well each of K yes-or-no outputs is predicted, yes when its logit is positive.

    Logits and targets, 0 or 1, are (N, K). The scores are (K,) float64 each: ``accuracy``,
    ``balanced_accuracy`` (the mean of the shares of yes and of no that are found) and ``ap`` (average
    precision). The last two are NaN where all targets are alike.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(f"logits and targets must be (N, K), not {[*logits.shape]} and {[*targets.shape]}")
    if not ((targets == 0) | (targets == 1)).all():
        raise ValueError(f"targets are 0 or 1 for each output, got {targets.unique()[:5].tolist()}")
    said, yes = decisions(logits, "multilabel"), targets.bool()
    found = (said & yes).sum(0).double() / yes.sum(0)  # NaN where there is no yes
    refused = (~said & ~yes).sum(0).double() / (~yes).sum(0)
    balanced = (found + refused) / 2
    ap = ranked_precision(logits.T, yes.T).where(balanced.isfinite(), torch.nan)
    return {"accuracy": (said == yes).double().mean(0), "balanced_accuracy": balanced, "ap": ap}


def ranked_precision(scores: Tensor, hits: Tensor) -> Tensor:
    """AP = Σ_n (R_n - R_{n-1}) P_n over the distinct scores of each row: scores and hits bool (B, N) -> (B,).

    NaN for a row without a hit.
    """
    values, order = scores.double().sort(1, descending=True)
    hits = hits.gather(1, order)
    position = torch.arange(hits.shape[1], device=hits.device).expand_as(hits)
    precision = hits.cumsum(1).double() / (position + 1)
    # The precision at the last of each run of equal scores: the nearest end of a run from the right.
    ends = position.where(last_of_run(values), position.amax())
    last = ends.flip(1).cummin(1).values.flip(1)
    return (precision.gather(1, last) * hits).sum(1) / hits.sum(1)


def last_of_run(values: Tensor) -> Tensor:
    """Where a run of equal values ends in sorted rows (..., N)."""
    return F.pad(values[..., 1:] != values[..., :-1], (0, 1), value=True)
