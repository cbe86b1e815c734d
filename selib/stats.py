"""Bootstrap intervals over images, and over seeds and images. Seeded: the same numbers give the same interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CELLS = 4_000_000  # numbers drawn at once: 2,000 resamples of 10,000 images would fill a small memory


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap interval of the mean of values (n,) (Efron, 1979).

    Raises:
        ValueError: fewer than two values, values that are not finite, ``level`` outside (0, 1), ``resamples`` below 1.
    """
    x = _vector("values", values)

    def means(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        return x[rng.integers(len(x), size=(count, len(x)))].mean(1)

    return _interval(x.mean(), means, len(x), level, resamples, seed)


def paired(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Interval of mean(a - b), with a[i] and b[i] (n,) measured on the same image.

    Raises:
        ValueError: as in :func:`bootstrap`, or different lengths.
    """
    return bootstrap(_difference("a and b", a, b), level=level, resamples=resamples, seed=seed)


def paired_over_seeds(
    runs: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    same_images: bool = True,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of mean(a - b) over several training runs: each resample draws runs, then images.

    What it covers: the images that might have been drawn, and the seeds that might have been used. Every run has the
    same weight. With three seeds the second part is rough: the bootstrap takes the spread of three runs for the whole
    spread, so that where seeds vary more than images a nominal 95 % interval covers about 75 %. Report the runs one by
    one beside it.

    Args:
        runs: for each seed (a, b), both (n,), with a[i] and b[i] measured on the same image.
        same_images: True when row i is the same image in every run, as with a fixed test set: a resample then takes the
            same images in all runs, for averaging runs does not average out the choice of images. False when every run
            has its own images: they are then drawn run by run, and n may differ.

    Raises:
        ValueError: fewer than two runs, runs of different lengths with ``same_images``, or as in :func:`bootstrap`.
    """
    if len(runs) < 2:
        raise ValueError(f"paired_over_seeds needs at least two runs, got {len(runs)}: use paired for one")
    differences = [_difference(f"run {i}", a, b) for i, (a, b) in enumerate(runs)]
    sizes = [len(d) for d in differences]
    if same_images and len(set(sizes)) > 1:
        raise ValueError(f"runs have {sizes} images: pass the same images in every run, or same_images=False")

    def means(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        drawn = rng.integers(len(runs), size=(count, len(runs)))
        if same_images:
            weights = (drawn[:, :, None] == np.arange(len(runs))).mean(1)
            images = rng.integers(sizes[0], size=(count, sizes[0]))
            return np.take_along_axis(weights @ np.stack(differences), images, 1).mean(1)
        total = np.zeros(count)
        for run, d in enumerate(differences):
            rows, _ = np.nonzero(drawn == run)  # a run drawn twice gets two independent draws of its images
            np.add.at(total, rows, d[rng.integers(len(d), size=(len(rows), len(d)))].mean(1))
        return total / len(runs)

    mean = float(np.mean([d.mean() for d in differences]))
    return _interval(mean, means, max(sizes) * (1 if same_images else len(runs)), level, resamples, seed)


def percentile(
    value: float,
    draw: Callable[[np.random.Generator], float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic that is no mean (a precision, a correlation).

    Args:
        value: the statistic of the data as they are.
        draw: the statistic of one resample.

    Raises:
        ValueError: ``level`` outside (0, 1), ``resamples`` below 1.
    """
    return _interval(
        value, lambda rng, count: np.array([draw(rng) for _ in range(count)]), 1, level, resamples, seed
    )


def _interval(
    mean: float,
    means: Callable[[np.random.Generator, int], NDArray[np.float64]],
    width: int,
    level: float,
    resamples: int,
    seed: int,
) -> Interval:
    """Percentile interval of ``resamples`` draws of ``means(rng, count)``, each of about ``width`` numbers."""
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level must lie in (0, 1) and resamples be at least 1, got {level} and {resamples}")
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS // width)
    drawn = np.concatenate([means(rng, min(chunk, resamples - i)) for i in range(0, resamples, chunk)])
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean), float(low), float(high))


def _vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        what = (
            f"shape {x.shape}"
            if x.ndim != 1 or len(x) < 2
            else f"{int((~np.isfinite(x)).sum())} that are not finite"
        )
        raise ValueError(f"{name}: an interval needs at least two finite values in one row, got {what}")
    return x


def _difference(name: str, a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(
            f"{name}: paired values must have the same length, got shapes {x.shape} and {y.shape}"
        )
    return _vector(name, x - y)
