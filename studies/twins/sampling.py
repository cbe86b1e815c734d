"""Random choices that go through JSON unchanged: rounded numbers, plain booleans and strings."""

import numpy as np


def between(rng: np.random.Generator, low: float, high: float) -> float:
    return round(low + (high - low) * rng.random(), 4)


def chance(rng: np.random.Generator, p: float) -> bool:
    return bool(rng.random() < p)


def one_of(rng: np.random.Generator, **weights: float) -> str:
    """One of the names, by weight."""
    return str(rng.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values())))
