"""A claim beside its null: is what was observed more than what chance alone gives?

N tokens, K experts that read a token, E experts of the layer.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import pandas as pd

from workbench.errors import RequestError


class Comparison(NamedTuple):
    """`observed` against what it is where the claim does not hold.

    effect: how many standard deviations of the null lie between the observed value and the null's mean
    chance: the share of values as extreme as the observed one, itself counted among them (a one-sided permutation test)
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


def higher(observed: float, null: Sequence[float]) -> Comparison:
    """For the claim that `observed` is higher than under the null; else as `lower`."""
    found = lower(-observed, [-value for value in null])
    return found._replace(observed=observed, null_mean=-found.null_mean)


def correlation(x: Sequence[float], y: Sequence[float], rounds: int = 999, seed: int = 0) -> Comparison:
    """For the claim that x and y rise together: their rank correlation (Spearman), beside that of y shuffled.

    1 is the same order, -1 the reverse. RequestError unless they are as many, three or more, and neither is constant.
    """
    if len(x) != len(y) or len(x) < 3:
        raise RequestError(f"x and y must be as many, three or more; got {len(x)} and {len(y)}.")
    a, b = (pd.Series(values).rank().to_numpy() for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a * a).sum() * (b * b).sum())
    if not size > 0:
        raise RequestError("one of the two is constant: there is no order to compare.")
    random = np.random.default_rng(seed)
    return higher(float(a @ b / size), [float(a @ random.permutation(b) / size) for _ in range(rounds)])


def alike(
    weights: Sequence[float], chosen: Sequence[int], rounds: int, seed: int = 0, within: float = 0.1, most: int = 8
) -> list[tuple[int, ...]]:
    """`rounds` random sets of at most `most` items that weigh as much as the `chosen` do, and hold none of them.

    What random experts of equal load are, for what was done to a few experts. A set is drawn item by item until its
    weight is within that share of the wanted one; a draw that cannot get there is thrown away. RequestError where such
    sets are hard to find.
    """
    weights = np.asarray(weights, float)
    wanted, free = weights[list(chosen)].sum(), np.setdiff1d(np.arange(len(weights)), list(chosen))
    random, found = np.random.default_rng(seed), []
    for _ in range(1000 * rounds):
        taken, total = [], 0.0
        for item in random.permutation(free).tolist():
            if total + weights[item] <= (1 + within) * wanted and len(taken) < most:
                taken.append(item)
                total += weights[item]
            if total >= (1 - within) * wanted:
                found.append(tuple(taken))
                break
        if len(found) == rounds:
            return found
    raise RequestError(
        f"hardly any {most} others weigh as much as these, {wanted:.3g}: choose fewer, or allow more with most= or "
        "within=."
    )


def adjusted(p: np.ndarray) -> np.ndarray:
    """p values of any shape to those of Benjamini and Hochberg (1995): of all with one <= q, a share q is false."""
    flat = np.asarray(p, float).ravel()
    order = flat.argsort()[::-1]  # from the largest down: each may not exceed the one above it
    ranks = np.arange(len(flat), 0, -1)
    out = np.empty_like(flat)
    out[order] = np.minimum.accumulate(flat[order] * len(flat) / ranks)
    return np.minimum(out, 1.0).reshape(np.shape(p))


def swapped(
    ids: np.ndarray, rounds: int, seed: int, groups: np.ndarray | None = None, limit: int = 0, sweeps: int | None = None
) -> Iterator[np.ndarray]:
    """Copies of ids [N, K] (-1: slot not used) in which tokens have traded experts, `rounds` of them.

    Every token keeps how many experts it has, all different, and every expert how many tokens. With `groups` [E] (the
    group of each expert) no token has experts of more than `limit` groups. In a sweep all tokens are paired by chance,
    and each pair shuffles a random part of the experts that only one of the two has: curveball trades (Strona et al.
    2014, Nature Communications 5:4114), which sample such matrices evenly (Carstens 2015). With groups, a trade that
    breaks the limit is not made; whether trades then still reach every matrix is not proved. `sweeps` lie between two
    copies and ten times as many before the first: by default 10, and 30 with groups, where most trades are refused.
    """
    random = np.random.default_rng(seed)
    ids = np.array(ids, np.int64)
    if sweeps is None:
        sweeps = 10 if groups is None else 30
    for number in range(rounds):
        for _ in range(sweeps if number else 10 * sweeps):
            order = random.permutation(len(ids))
            half = len(ids) // 2
            pairs = np.stack([order[:half], order[half : 2 * half]], 1)
            ids[pairs] = _traded(ids[pairs], random, groups, limit)
        yield ids.copy()


def _traded(pair: np.ndarray, random: np.random.Generator, groups: np.ndarray | None, limit: int) -> np.ndarray:
    """[P, 2, K] after one trade in each pair."""
    same = pair[:, 0, :, None] == pair[:, 1, None, :]
    free = ~np.stack([same.any(2), same.any(1)], 1) & (pair >= 0)
    if groups is not None:  # whole trades would nearly always break the limit
        free &= random.random(pair.shape) < random.random((len(pair), 1, 1))
    pool, free = (x.reshape(len(pair), 2 * pair.shape[2]) for x in (pair, free))
    # the free places in order, the free experts in random order; what is not free follows in order in both
    places = np.argsort(~free, axis=1, kind="stable")
    experts = np.argsort(np.where(free, random.random(pool.shape), 2.0), axis=1, kind="stable")
    new = np.empty_like(pool)
    np.put_along_axis(new, places, np.take_along_axis(pool, experts, 1), 1)
    new = new.reshape(pair.shape)
    if groups is None:
        return new
    allowed = (spread(new, groups) <= limit).all(1)
    return np.where(allowed[:, None, None], new, pair)


def spread(ids: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """In how many groups [E] the experts ids [..., K] of each token are: [...]."""
    used = np.sort(np.where(ids >= 0, groups[ids], -1), -1)
    return (used[..., :1] >= 0).sum(-1) + ((used[..., 1:] != used[..., :-1]) & (used[..., 1:] >= 0)).sum(-1)
