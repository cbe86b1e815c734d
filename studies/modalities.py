"""What each stream is worth to a network that says who speaks, read from its fusion gates and from the twin.

What becomes of the answer when a stream falls silent is asked of the twin alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selib import Explanation, TopFraction, explain
from studies import metrics, tables
from studies.data import SpeakerSet, draw_clips
from studies.data.speakers import inputs_of
from studies.metrics import Interval, bootstrap, percentile
from studies.networks import ActiveSpeaker
from studies.speakers import (
    Frames,
    Setup,
    clip_logits,
    labels_of,
    precision,
    rows_by_condition,
    scored,
    speaking_clips,
)

Clips = Sequence[tuple[Mapping[str, Tensor], Sequence[int]]]  # (inputs of one clip, its labels)


@dataclass(frozen=True)
class Worth:
    """What each of M modalities is worth in N clips, over their speaking frames."""

    names: tuple[str, ...]
    influence: NDArray[np.float64]  # (N, M) mean fall of the logit when the modality's gates are zero
    share: NDArray[np.float64]  # (N, M) mean magnitude of that fall, as a share of all modalities'
    gate_share: NDArray[np.float64]  # (N, M) mean gate, as a share: how the authors of BIAS read it


def worth(model: nn.Module, clips: Clips) -> Worth:
    """The worth of the modalities in clips."""
    influence, share, gates = [], [], []
    names: tuple[str, ...] = ()
    for inputs, labels in clips:
        found = explain(model, dict(inputs)).modalities(0)
        names = tuple(found.names)
        falls = found.influence[0].double().cpu().numpy()[:, np.asarray(labels, bool)]  # (M, speaking frames)
        size = np.abs(falls).mean(1)
        influence.append(falls.mean(1))
        share.append(size / max(size.sum(), 1e-12))
        gates.append(found.gate_share[0].double().cpu().numpy())
    return Worth(names, np.stack(influence), np.stack(share), np.stack(gates))


def worth_by_condition(model: nn.Module, clips: SpeakerSet, count: int) -> dict[str, Worth]:
    """:func:`worth` in the first ``count`` speaking clips under each condition."""
    conditions = [name for name in rows_by_condition(clips) if name != "all"]
    chosen = {name: speaking_clips(clips, count, conditions=[name]) for name in conditions}
    return {name: worth(model, batches_of(clips, rows)) for name, rows in chosen.items()}


def batches_of(clips: SpeakerSet, rows: Sequence[int]) -> Clips:
    """(inputs, labels) of some clips."""
    return [(clips.clip(i)[0], clips.clips[i].labels.tolist()) for i in rows]


def drawn_again(
    clips: SpeakerSet,
    rows: Sequence[int],
    *,
    muted: Sequence[str] = (),
    change: Mapping[str, Any] | None = None,
) -> Clips:
    """(inputs, labels) of clips of the twin, drawn again with streams muted or parameters changed."""
    found = draw_clips([({**clips.params(i), **(change or {})}, tuple(muted)) for i in rows])
    return [(inputs_of(clip, clips.streams), clip.labels.tolist()) for clip in found]


@dataclass(frozen=True)
class Muting:
    """Modality influence beside the truth: (N, M) each, over the speaking frames of N clips."""

    names: tuple[str, ...]
    influence: NDArray[np.float64]
    drop: NDArray[np.float64]  # of the logit when the clip is drawn again with the modality muted


def muting(model: nn.Module, clips: SpeakerSet, rows: Sequence[int]) -> Muting:
    """What the fusion gates say a modality is worth, and what the network loses when it is muted."""

    def speaking_logits(some: Clips) -> NDArray[np.float64]:
        logits = clip_logits(model, [inputs for inputs, _ in some])
        return np.array(
            [x[np.asarray(labels, bool)].mean() for x, (_, labels) in zip(logits, some, strict=True)]
        )

    whole = batches_of(clips, rows)
    said, before = worth(model, whole), speaking_logits(whole)
    drops = [before - speaking_logits(drawn_again(clips, rows, muted=(name,))) for name in said.names]
    return Muting(said.names, said.influence, np.stack(drops, 1))


def spearman_interval(studies: Mapping[str, Muting], *, resamples: int) -> Interval:
    """Spearman's correlation of influence and drop over clips and modalities; its interval over clips."""

    def correlation(drawn: Sequence[NDArray[np.int64]]) -> float:
        chosen = list(zip(studies.values(), drawn, strict=True))
        said = np.concatenate([study.influence[rows].ravel() for study, rows in chosen])
        true = np.concatenate([study.drop[rows].ravel() for study, rows in chosen])
        return float(metrics.spearman(torch.from_numpy(said)[None], torch.from_numpy(true)[None])[0])

    sizes = [len(study.drop) for study in studies.values()]
    return percentile(
        correlation([np.arange(n) for n in sizes]),
        lambda rng: correlation([rng.integers(n, size=n) for n in sizes]),
        resamples=resamples,
    )


def muting_table(
    models: Mapping[str, nn.Module], setups: Mapping[str, Setup], studies: Mapping[str, Muting]
) -> dict[str, Any]:
    """Single-stream tasks: mAP, influence of every modality, and what muting it costs, means over clips."""
    rows = []
    for task, study in studies.items():
        clips = setups[task].test
        mean_ap = 100 * precision(scored(models[task], clips), labels_of(clips))
        rows.append([task, len(study.drop), mean_ap, *study.influence.mean(0), *study.drop.mean(0)])
    names = next(iter(studies.values())).names
    headings = [*(f"influence of {name}" for name in names), *(f"fall without {name}" for name in names)]
    table = tables.spec(
        "Tasks that one stream alone solves: modality influence beside the fall of the logit when the clip "
        "is drawn again with the modality muted",
        " | ".join(["the stream that tells", "clips", "mAP in %", *headings]),
        rows,
        "In logits, over the speaking frames; one network for each task, trained with SE, one seed.",
    )
    return table | {"synthetic": True}


def shares_of(found: Mapping[str, Worth], *, resamples: int) -> dict[str, dict[str, Interval]]:
    """{condition: {modality: its share of influence, with its interval over clips}}."""
    return {
        condition: {
            name: bootstrap(share, resamples=resamples)
            for name, share in zip(w.names, w.share.T, strict=True)
        }
        for condition, w in found.items()
    }


def share_table(found: Mapping[str, Worth], *, resamples: int) -> dict[str, Any]:
    """Modality shares by condition: influence, and the gates as the authors of BIAS read them."""
    rows = []
    for condition, shares in shares_of(found, resamples=resamples).items():
        gates = found[condition].gate_share.mean(0).tolist()
        rows.append([condition, *(list(share) for share in shares.values()), *gates])
    names = next(iter(found.values())).names
    headings = [
        *(f"{name}: share of influence" for name in names),
        *(f"{name}: share of gates" for name in names),
    ]
    return tables.spec(
        "What each modality is worth, by condition",
        " | ".join(["condition", *headings]),
        rows,
        "Speaking frames. Influence: the fall of the logit when the modality's segment of the fusion gates "
        "is set to zero. Intervals over clips.",
    )


def share_change(after: Worth, before: Worth, modality: str, *, resamples: int) -> Interval:
    """How a modality's share of influence changes between the same clips drawn twice: after - before."""
    m = after.names.index(modality)
    return bootstrap(after.share[:, m] - before.share[:, m], resamples=resamples)


def share_between(a: Worth, b: Worth, modality: str, *, resamples: int) -> Interval:
    """How a modality's share of influence differs between two groups of clips, a - b, resampling both."""
    x, y = (w.share[:, w.names.index(modality)] for w in (a, b))
    return percentile(
        float(x.mean() - y.mean()),
        lambda rng: rng.choice(x, len(x)).mean() - rng.choice(y, len(y)).mean(),
        resamples=resamples,
    )


def occlusion_table(
    found: Mapping[str, Worth], masked: Worth, *, resamples: int
) -> tuple[dict[str, Any], dict[str, dict[str, Interval]]]:
    """How the shares of influence change when the mouth is hidden.

    Args:
        found: by condition, on the twin.
        masked: of the clips of "optimal", drawn again with a mask.

    Returns:
        The table, and {modality: {"between": other clips, "paired": the same clips}}.
    """
    hidden, optimal = found["face occlusion"], found["optimal"]
    changes = {
        name: {
            "between": share_between(hidden, optimal, name, resamples=resamples),
            "paired": share_change(masked, optimal, name, resamples=resamples),
        }
        for name in masked.names
    }
    rows = [[name, *(list(change) for change in both.values())] for name, both in changes.items()]
    table = tables.spec(
        "How the shares of influence change when the mouth is hidden",
        "modality | face occlusion against optimal, other clips | the same clips with a mask, paired",
        rows,
        "Differences of shares; intervals over clips.",
    )
    return table | {"synthetic": True}, changes


# ---- how few gates will do ---------------------------------------------------------------------------------


def gate_variants(
    model: ActiveSpeaker, clips: SpeakerSet, *, seed: int
) -> dict[str, dict[str, list[NDArray[np.float64]]]]:
    """Scores of every clip when one modality's segment of the fusion gates is cut down, and the others stay.

    Returns:
        {modality: {"top 10 % by gate", "top 10 % by influence", "random 10 %", "none": scores of each clip}},
        and "all" for all segments at once. "none" closes the segment.
    """
    found: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    for row in range(len(clips)):
        ex = explain(model, clips.clip(row)[0]).streams["fusion"]
        for kind, masks in _cut_down(ex, len(model.modalities), seed * 100003 + row).items():
            cases = {"all": masks} if kind != "none" else {}
            for m, modality in enumerate(model.modalities):
                cases[modality] = [mask if i == m else torch.ones_like(mask) for i, mask in enumerate(masks)]
            for which, kept in cases.items():
                scores = ex.with_gates(ex.gates * torch.cat(kept)).flatten().double().cpu().numpy()
                found.setdefault(which, {}).setdefault(kind, []).append(scores)
    return {which: found[which] for which in (*model.modalities, "all")}


def _cut_down(ex: Explanation, modalities: int, seed: int) -> dict[str, list[Tensor]]:
    """By kind, for each modality, which of its fusion gates stay: (C,) of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    influence = ex.influence(0)[0].abs().mean(1)
    kept: dict[str, list[Tensor]] = {}
    for gates, effect in zip(ex.gates[0].chunk(modalities), influence.chunk(modalities), strict=True):
        chance = torch.rand(len(gates), generator=generator).to(gates)
        rankings = {"top 10 % by gate": gates, "top 10 % by influence": effect, "random 10 %": chance}
        for kind, ranking in rankings.items():
            kept.setdefault(kind, []).append(TopFraction(0.10).mask(ranking[None])[0].to(gates))
        kept.setdefault("none", []).append(torch.zeros_like(gates))
    return kept


def gate_table(model: ActiveSpeaker, clips: SpeakerSet, whole: Frames, *, seed: int) -> dict[str, Any]:
    """mAP when a tenth of a modality's fusion gates stay open (the table of BIAS), or as many random ones."""
    labels = labels_of(clips)
    found = gate_variants(model, clips, seed=seed)
    kinds = list(next(iter(found.values())))
    rows = []
    for which, cells in found.items():
        values = [100 * precision(cells[k], labels) if k in cells else None for k in kinds]
        rows.append([which, *values])
    return tables.spec(
        "mAP in % when one modality's segment of the fusion gates is cut down",
        " | ".join(["modality", *kinds]),
        rows,
        f"{len(clips)} test clips; with all gates {100 * precision(whole, labels):.1f} %. "
        'The other modalities keep theirs; "all": every segment is cut down.',
    )
