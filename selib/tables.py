"""Tables and comparisons over training runs, in the form that results files and reports hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selib.benchmark import LOWER_IS_BETTER, Scores
from selib.stats import Interval, bootstrap, paired, paired_over_seeds

HEADINGS = {
    "pointing": "pointing", "energy": "energy in box", "rank": "rank accuracy", "iou": "IoU", "ap": "AP", "deletion": "deletion",
    "insertion": "insertion", "drop": "average drop", "increase": "increase", "road": "ROAD",
}  # fmt: skip


def heading(metric: str) -> str:
    """The metric's column heading with the direction that is better."""
    return f"{HEADINGS.get(metric, metric)} {'↓' if metric in LOWER_IS_BETTER else '↑'}"


def over_runs(runs: Sequence[Scores], explainer: str, metric: str) -> NDArray[np.float64]:
    """One cell averaged over training runs, image by image, where every run has it: (n,)."""
    stacked = np.stack([run.cell(explainer, metric) for run in runs])
    return np.asarray(stacked[:, ~np.isnan(stacked).any(0)].mean(0))


def score_table(
    runs: Sequence[Scores], caption: str, *, notes: Sequence[str] = (), resamples: int = 2000, synthetic: bool = False
) -> dict[str, Any]:
    """Explainers × metrics: means with the 95 % interval over images, each image averaged over the training runs.

    Every run must have scored the same images.
    """
    first = runs[0].values
    metrics = list(next(iter(first.values())))
    rows = [
        [name, *(list(bootstrap(over_runs(runs, name, metric), resamples=resamples)) for metric in metrics)]
        for name in first
    ]
    counts = {metric: len(over_runs(runs, next(iter(first)), metric)) for metric in metrics}
    images = ", ".join(f"{HEADINGS.get(m, m)} {n}" for m, n in counts.items())
    spec = {
        "caption": caption,
        "columns": ["map", *(heading(metric) for metric in metrics)],
        "rows": rows,
        "notes": [f"Images: {images}.", *notes],
    }
    return spec | ({"synthetic": True} if synthetic else {})


def difference(runs: Sequence[tuple[ArrayLike, ArrayLike]], *, resamples: int = 2000) -> Interval:
    """mean(a - b), paired over images; with several training runs the interval is over runs and images."""
    if len(runs) == 1:
        return paired(*runs[0], resamples=resamples)
    return paired_over_seeds(runs, resamples=resamples)


def compare(runs: Sequence[Scores], a: str, b: str, metric: str, *, resamples: int = 2000) -> Interval:
    """The gain of explainer ``a`` over ``b`` on a metric, positive where ``a`` is better, whichever way the metric points."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    pairs = []
    for run in runs:
        x, y = run.cell(a, metric), run.cell(b, metric)
        both = ~np.isnan(x) & ~np.isnan(y)
        pairs.append((sign * x[both], sign * y[both]))
    return difference(pairs, resamples=resamples)


def best(runs: Sequence[Scores], among: Sequence[str], metric: str) -> str:
    """The explainer with the best mean on a metric."""
    means = {name: float(over_runs(runs, name, metric).mean()) for name in among if name in runs[0].values}
    return (min if metric in LOWER_IS_BETTER else max)(means, key=means.__getitem__)


def verdict(interval: Sequence[float]) -> str:
    """In words what an interval of a gain says: "better", "worse", or "level with" when it holds zero."""
    _, low, high = interval
    return "better than" if low > 0 else "worse than" if high < 0 else "level with"


def signed(interval: Sequence[float], digits: int = 3) -> str:
    """An interval as text: "+0.012 [+0.003, +0.021]"."""
    mean, low, high = (f"{value:+.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"


def rank_scores(
    runs: Sequence[Scores], metrics: Sequence[str], *, resamples: int = 2000
) -> Mapping[str, Mapping[str, tuple[float, float, float]]]:
    """{heading: {explainer: (mean, low, high)}} for :func:`selib.plot.rank_plot`."""
    return {
        HEADINGS[metric]: {
            name: tuple(bootstrap(over_runs(runs, name, metric), resamples=resamples)) for name in runs[0].values
        }
        for metric in metrics
    }
