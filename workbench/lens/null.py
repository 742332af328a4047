"""A claim beside its null: is what was observed more than what chance alone gives?"""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from workbench.errors import RequestError


class Comparison(NamedTuple):
    """`observed` against what it is where the claim does not hold.

    effect: how many standard deviations of the null lie between the observed value and the null's mean
    chance: the share of values as low as the observed one, itself counted among them (a one-sided permutation test)
    """

    observed: float
    null_mean: float
    null_sd: float
    effect: float
    chance: float


def lower(observed: float, null: Sequence[float]) -> Comparison:
    """For the claim that `observed` is lower than under the null. RequestError for fewer than two values of that."""
    if len(null) < 2:
        raise RequestError(f"a null needs at least two values to vary; got {len(null)}.")
    mean, spread = fmean(null), stdev(null)
    chance = (1 + sum(value <= observed for value in null)) / (1 + len(null))
    return Comparison(observed, mean, spread, (mean - observed) / spread if spread else 0.0, chance)
