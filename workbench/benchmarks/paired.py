"""Differences between two ways of computing the same items, with an interval over the items."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000


class Interval(NamedTuple):
    """A mean, and the 95 % of resampled means around it."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def interval(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Interval:
    """Of the mean of `values`, items weighed by `weights`: a percentile bootstrap that draws items with replacement.

    For a paired comparison the values are differences, one an item. Items of weight 0 are left out.
    """
    values = np.asarray(values, float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, float)
    values, weights = values[weights > 0], weights[weights > 0]
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    means = (values * weights)[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values @ weights / weights.sum()), float(low), float(high))
