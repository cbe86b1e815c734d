"""Tables and comparisons over training runs, in the form that results files and reports hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from studies.benchmark import LOWER_IS_BETTER, Scores
from studies.metrics import Interval, bootstrap, holm, p_value, paired

HEADINGS = {
    "near": "energy within one cell",
    "energy": "energy inside",
    "iou": "IoU",
    "ap": "AP",
    "road": "ROAD",
}

UNDECIDED, PRIMARY = "no difference detected", "primary"


def spec(caption: str, columns: str, rows: Sequence[Sequence[Any]], *notes: str) -> dict[str, Any]:
    """A table as results files hold it; ``columns`` are its headings, with " | " between them."""
    table: dict[str, Any] = {"caption": caption, "columns": columns.split(" | "), "rows": list(rows)}
    return table | {"notes": list(notes)} if notes else table


def heading(metric: str) -> str:
    """The metric's column heading with the direction that is better."""
    return f"{HEADINGS.get(metric, metric)} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def over_runs(runs: Sequence[Scores], explainer: str, metric: str) -> NDArray[np.float64]:
    """One cell averaged over training runs, image by image, where every run has it: (n,)."""
    stacked = np.stack([run.cell(explainer, metric) for run in runs])
    return np.asarray(stacked[:, ~np.isnan(stacked).any(0)].mean(0))


def score_table(
    runs: Sequence[Scores],
    caption: str,
    *,
    notes: Sequence[str] = (),
    resamples: int = 2000,
    synthetic: bool = False,
    unit: str = "images",
) -> dict[str, Any]:
    """Explainers × metrics, averaged over training runs on the same images (or what ``unit`` says)."""
    explainers = list(runs[0].values)
    metrics = list(runs[0].values[explainers[0]])
    rows, sizes = [], {}
    for name in explainers:
        cells = [over_runs(runs, name, metric) for metric in metrics]
        sizes[name] = [len(cell) for cell in cells]
        values = [list(bootstrap(cell, resamples=resamples)) for cell in cells]
        rows.append([f"{name} (n = {max(sizes[name])})", *values])
    most = sizes[explainers[0]]
    counts = ", ".join(f"{HEADINGS.get(m, m)} {n}" for m, n in zip(metrics, most, strict=True))
    fewer = any(found < most for found in sizes.values())
    slow = ["Rows of different n are over different images: compare them by paired gains."] if fewer else []
    columns = " | ".join(["map", *map(heading, metrics)])
    table = spec(caption, columns, rows, f"{unit.capitalize()}: {counts}.", *slow, *notes)
    return table | ({"synthetic": True} if synthetic else {})


def difference(runs: Sequence[tuple[ArrayLike, ArrayLike]], *, resamples: int = 2000) -> Interval:
    """mean(a - b), paired over images; with several training runs the interval is over runs and images."""
    a, b = (np.stack([np.asarray(run[side], dtype=np.float64) for run in runs]) for side in (0, 1))
    return paired(a, b, resamples=resamples)


def common(runs: Sequence[Scores], names: Sequence[str], metric: str) -> NDArray[np.int64]:
    """The places of the images on which every run measured all these explainers."""
    cells = np.stack([run.cell(name, metric) for run in runs for name in names])
    return np.flatnonzero(~np.isnan(cells).any(0))


def compare(
    runs: Sequence[Scores],
    a: str,
    b: str,
    metric: str,
    *,
    rows: NDArray[np.int64] | None = None,
    resamples: int = 2000,
) -> Interval:
    """The gain of explainer ``a`` over ``b``, positive where ``a`` is better, on the images of both.

    Args:
        rows: on these images only.
    """
    return difference(_pairs(runs, a, b, metric, rows), resamples=resamples)


def _pairs(
    runs: Sequence[Scores], a: str, b: str, metric: str, rows: NDArray[np.int64] | None
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """For each run the values of both, signed so that more is better."""
    rows = common(runs, [a, b], metric) if rows is None else rows
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    return [(sign * run.cell(a, metric)[rows], sign * run.cell(b, metric)[rows]) for run in runs]


def best(
    runs: Sequence[Scores], among: Sequence[str], metric: str, rows: NDArray[np.int64] | None = None
) -> str:
    """The explainer with the best mean on the images that all have, or on ``rows``.

    The first of those that rounding alone tells apart.
    """
    there = [name for name in among if name in runs[0].values]
    rows = common(runs, there, metric) if rows is None else rows
    means = {name: round(float(np.mean([r.cell(name, metric)[rows] for r in runs])), 6) for name in there}
    return (min if metric in LOWER_IS_BETTER else max)(means, key=means.__getitem__)


def halves(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows in two halves by one fixed shuffle: one to choose on, one to report on."""
    shuffled = np.random.default_rng(1).permutation(rows)
    return shuffled[: len(rows) // 2], shuffled[len(rows) // 2 :]


def verdict(interval: Sequence[float]) -> str:
    """In words what an interval of a gain says; where it holds zero, no difference was detected."""
    _, low, high = interval
    return "better than" if low > 0 else "worse than" if high < 0 else UNDECIDED


def signed(interval: Sequence[float], digits: int = 3) -> str:
    """An interval as text: "+0.012 [+0.003, +0.021]"."""
    mean, low, high = (f"{value:+.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"


def differences(
    runs: Sequence[Scores], metrics: Sequence[str], *, reference: str, resamples: int = 2000
) -> dict[str, dict[str, tuple[Interval, int]]]:
    """{heading: {explainer: (paired gain over ``reference``, n)}}, for `figures.difference_plot`."""
    others = [name for name in runs[0].values if name != reference]
    return {
        HEADINGS.get(metric, metric): {
            name: (
                compare(runs, name, reference, metric, resamples=resamples),
                len(common(runs, [name, reference], metric)),
            )
            for name in others
        }
        for metric in metrics
    }


# ---- the tables of the object study ------------------------------------------------------------------------


def gain_table(
    scores: Mapping[str, Sequence[Scores]],
    pairs: Sequence[tuple[str, str, Sequence[str]]],
    family: Sequence[str],
    *,
    primary: Sequence[tuple[str, str, str, str]] = (),
    resamples: int = 2000,
) -> dict[str, Any]:
    """Paired gains of one map over another, positive where the first is better.

    Args:
        scores: {network: one :class:`Scores` per seed}.
        pairs: (map, rival, metrics); the rival "best" is the best of ``family``, the CAMs, on that metric.
        primary: the comparisons (network, map, rival, metric) that were named beforehand, with the rival as
            in ``pairs``; the p-values of all others are adjusted for their number.
    """
    rows: list[list[Any]] = []
    asked: list[tuple[str, str, str, str]] = []
    found: list[float] = []
    for network, runs in scores.items():
        for name, rival, metrics in pairs:
            for metric in metrics:
                other, images = _rival(runs, name, rival, family, metric)
                gain = compare(runs, name, other, metric, rows=images, resamples=resamples)
                shown = f"{other} (the best CAM here)" if rival == "best" else other
                rows.append([network, heading(metric), name, shown, list(gain), len(images)])
                asked.append((network, name, rival, metric))
                a, b = zip(*_pairs(runs, name, other, metric, images), strict=True)
                found.append(p_value(a, b))
    if unknown := [one for one in primary if one not in asked]:
        raise ValueError(f"primary={unknown} are not among the comparisons: {asked}")
    rest = [place for place, one in enumerate(asked) if one not in primary]
    adjusted = dict(zip(rest, holm([found[place] for place in rest]).tolist(), strict=True))
    return spec(
        "Paired gains, positive where the first map is better",
        "network | measure | map | against | gain | n | p (Holm)",
        [[*row, adjusted.get(place, PRIMARY)] for place, row in enumerate(rows)],
        "Each row: the n images that both maps have. The best CAM is picked on one half of the images that "
        "all CAMs have, and the gain is that on the other half.",
        f"p: sign flips over images, by Holm's method for {len(rest)} comparisons; those that were named "
        "beforehand are primary.",
    )


def _rival(
    runs: Sequence[Scores], name: str, rival: str, family: Sequence[str], metric: str
) -> tuple[str, NDArray[np.int64]]:
    """The map to compare with, and the images to compare on."""
    if rival != "best":
        return rival, common(runs, [name, rival], metric)
    there = [one for one in family if one in runs[0].values]
    chosen_on, reported_on = halves(common(runs, [name, *there], metric))
    return best(runs, there, metric, chosen_on), reported_on


def in_words(row: Sequence[Any]) -> str:
    """A row of :func:`gain_table` as a sentence."""
    network, measure, name, rival, gain, n, p = row
    said = verdict(gain) if p == PRIMARY or p < 0.05 else UNDECIDED
    what = f"{UNDECIDED} between {name} and {rival}" if said == UNDECIDED else f"{name} is {said} {rival}"
    adjusted = "" if p == PRIMARY else f", p = {p:.3f} after Holm"
    return f"{network}, {measure[:-2]}: {what} (n = {n}), {signed(gain)}{adjusted}."
