"""A mean, and how far off it may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """The mean of `count` values, and the interval that holds the middle 95 % of the means of as many drawn from them
    with replacement (the percentile bootstrap of Efron, 1979)."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f}–{self.high:.4f})"


def mean_of(values: Sequence[float], resamples: int = RESAMPLES) -> Mean:
    """The same values give the same interval. `ValueError` without any."""
    if not len(values):
        raise ValueError("there are no values to take the mean of")
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(0)
    means = [array[generator.integers(0, len(array), len(array))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(array.mean()), float(low), float(high), len(array))
