"""How large a cache of experts has to be: hit rates at every capacity, beside the best there can be and beside chance.

The cache is one pool for all layers, empty at the start, of `capacity` blocks. In a visit the blocks that are there are
hits, and are used first. All others are misses and are brought in: none is computed without a place in the cache. Where
the visit fits, its own blocks do not give way for each other. Where it does not, they stream through, those that are
worth most last, and whatever has been used may give way.

Policies differ only in what a block is worth, and what is worth least gives way. All return bool [n]: which accesses
hit. A whole visit is asked for at once, so what each policy knows of a visit, it knows before anything gives way.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.lens.accesses import Accesses

HALF_LIFE = 64.0  # passes, as the store has it for "blended"


def belady(accesses: Accesses, capacity: int) -> np.ndarray:
    """Knows the future: the block whose next use is farthest gives way (Belady 1966). Without loading ahead, and with
    blocks of one size, nothing hits more often. O(n log n).
    """
    upcoming = _next_use(accesses, np.repeat(np.arange(len(accesses.visits)), _sizes(accesses)))
    return _replay(accesses, capacity, _ranks(-upcoming))


def lru(accesses: Accesses, capacity: int) -> np.ndarray:
    """The block that was not used for the longest time gives way. In a visit, what was used most recently counts as
    used first, see Accesses.clock. Hits where `lru_distances` is below the capacity.
    """
    _demand_whole([capacity], "a capacity")
    return lru_distances(accesses) < capacity


def lru_distances(accesses: Accesses) -> np.ndarray:
    """float64 [n]: the stack distance (Mattson et al. 1970), infinite at the first use of a block.

    It is the number of other blocks used since its last use. The order within a visit (Accesses.clock) is one in which
    those of the same visit that come before a block were all used since then already, so they change nothing.
    """
    clock, before = accesses.clock
    last = np.empty(len(accesses), np.int64)
    last[clock] = before
    place = np.arange(len(accesses))
    distances = np.where(last < 0, np.inf, place - last - 1 - _greater_before(last + 1))
    return distances[clock]


def decayed(accesses: Accesses, capacity: int, half_life: float) -> np.ndarray:
    """The block with the smallest sum over its past uses of 2^(-(now - use) / half_life) gives way; time in passes.

    LRFU (Lee et al. 2001): 0 is LRU, infinity is LFU. Uses are remembered of blocks that gave way; a use counts once,
    however many tokens of the pass it was for. Of equal sums the one that was used least recently gives way. Kept as
    the log2 of the sum of 2^(use / half_life), which has the same order at any time and need not fade.
    """
    if not half_life >= 0:
        raise RequestError(f"a half-life is a number of passes, 0 (LRU) to infinity (LFU); got {half_life}.")
    clock, _ = accesses.clock
    if half_life == 0:
        return _replay(accesses, capacity, clock)
    with np.errstate(over="ignore"):
        exponent = (accesses.moving - accesses.moving[0]) / half_life
    value, worth = np.full(len(accesses.pairs), -np.inf), np.empty(len(accesses))
    for start, stop in accesses.visits:
        now = accesses.key[start:stop]
        worth[start:stop] = value[now] = np.logaddexp2(value[now], exponent[start])
    return _replay(accesses, capacity, _ranks(worth, clock))


def pinned(accesses: Accesses, capacity: int, chosen: Sequence[tuple[int, int]]) -> np.ndarray:
    """The chosen (layer, expert) pairs, once used, give way only when nothing else can; the rest is LRU.

    `most_used` of another run chooses them. RequestError if there are more than the cache can hold.
    """
    _demand_whole([capacity], "a capacity")
    wanted = {(int(layer), int(expert)) for layer, expert in chosen}
    if len(wanted) > capacity:
        raise RequestError(f"{len(wanted)} blocks cannot be pinned in a cache of {capacity}: choose fewer.")
    stays = np.array([pair in wanted for pair in map(tuple, accesses.pairs.tolist())])
    return _replay(accesses, capacity, _ranks(stays[accesses.key], accesses.clock[0]))


def most_used(accesses: Accesses, count: int) -> list[tuple[int, int]]:
    """The (layer, expert) pairs that most visits asked for, most first; of equal ones the lower layer and expert."""
    uses = np.bincount(accesses.key)
    best = np.argsort(-uses, kind="stable")[:count]
    return [(layer, expert) for layer, expert in accesses.pairs[best].tolist()]


def capacity_curve(
    accesses: Accesses, capacities: Sequence[int] | None = None, warm: int = 0, half_life: float = HALF_LIFE
) -> pd.DataFrame:
    """Share of accesses that hit; a row a capacity, in blocks. None: `ladder`. The first `warm` passes fill the cache
    and are not counted.

    share    the capacity, of all blocks of the model
    belady   the most that any policy can hit
    lru, lfu
    blended  decayed with that half-life
    static   the best fixed set for the very accesses counted, there from the start: unlike all others it never has to
             bring in a block for the first time, so it can be above belady where few passes are counted
    random   a fixed set chosen by chance, on average: the null. A policy that is no better has found nothing
    """
    capacities = ladder(accesses) if capacities is None else list(capacities)
    _demand_whole(capacities, "a capacity")
    counted = accesses.passes >= warm
    if warm < 0 or not counted.any():
        raise RequestError(f"there are {accesses.passes[-1] + 1} passes: no {warm} of them can be left out as warm-up.")
    distances = lru_distances(accesses)
    often = np.cumsum(np.sort(np.bincount(accesses.key[counted]))[::-1]) / counted.sum()
    rows = [
        {
            "share": capacity / accesses.blocks,
            "belady": belady(accesses, capacity)[counted].mean(),
            "lru": (distances < capacity)[counted].mean(),
            "lfu": decayed(accesses, capacity, math.inf)[counted].mean(),
            "blended": decayed(accesses, capacity, half_life)[counted].mean(),
            "static": often[min(capacity, len(often)) - 1],
            "random": min(1.0, capacity / accesses.blocks),
        }
        for capacity in capacities
    ]
    return pd.DataFrame(rows, index=pd.Index(map(int, capacities), name="capacity"))


def ladder(accesses: Accesses) -> list[int]:
    """Capacities from the blocks of one visit (the median), doubling, to all blocks of the model."""
    steps, step = [], max(1, round(np.median(_sizes(accesses))))
    while step < accesses.blocks:
        steps.append(step)
        step *= 2
    return [*steps, accesses.blocks]


def working_set(accesses: Accesses, windows: Sequence[int] = (1, 8, 64)) -> pd.DataFrame:
    """Different blocks used in `window` passes that follow one another; a row a window.

    mean, max  over all places of the window. One longer than the run sees the run once
    share      the mean, of all blocks of the model
    """
    _demand_whole(windows, "a window")
    passes, count = accesses.passes, int(accesses.passes[-1]) + 1
    upcoming = _next_use(accesses, passes)
    rows = []
    for window in windows:
        # a use is in the windows that end at its pass or up to window - 1 later; the next use takes over from there
        ends = np.minimum(np.minimum(passes + window, upcoming), count).astype(np.int64)
        change = np.bincount(passes, minlength=count + 1) - np.bincount(ends, minlength=count + 1)
        inside = np.cumsum(change)[min(window, count) - 1 : count]
        rows.append({"mean": inside.mean(), "max": int(inside.max()), "share": inside.mean() / accesses.blocks})
    return pd.DataFrame(rows, index=pd.Index(map(int, windows), name="window"))


def reuse(accesses: Accesses, within: Sequence[int] = (1, 8), rounds: int = 200, seed: int = 0) -> pd.DataFrame:
    """Share of accesses whose block is used again within the next passes, beside what chance gives; a row a number of
    passes. Only accesses that so many passes follow are counted.

    The null: the same passes in an order by chance. Every block is used as often as it was, in as many passes, but
    when does not depend on what went before. Passes of a prompt use far more blocks than those of an answer:
    Accesses.from_trace with phase="decode" leaves them out.

    observed
    null_mean, null_low, null_high  mean and the central 95 % of `rounds` repetitions
    ratio    observed over null_mean, the size of the effect; NaN where chance gives none
    outside  the observed value is not within the central 95 %
    """
    _demand_whole(within, "a number of passes")
    count = int(accesses.passes[-1]) + 1
    if rounds < 2:
        raise RequestError(f"a null needs at least two rounds to vary; got {rounds}.")
    if max(within) >= count:
        raise RequestError(f"nothing can be seen {max(within)} passes later: there are {count} passes.")
    rng = np.random.default_rng(seed)
    observed = _again(accesses.key, accesses.passes, within, count)
    null = np.array(
        [_again(accesses.key, rng.permutation(count)[accesses.passes], within, count) for _ in range(rounds)]
    )
    low, high = np.quantile(null, (0.025, 0.975), axis=0)
    mean = null.mean(0)
    table = {"observed": observed, "null_mean": mean, "null_low": low, "null_high": high}
    ratio = np.divide(observed, mean, out=np.full(len(mean), np.nan), where=mean > 0)
    table |= {"ratio": ratio, "outside": (observed < low) | (observed > high)}
    return pd.DataFrame(table, index=pd.Index(map(int, within), name="within"))


def speed_limit(hit_rate: float, bytes_per_block: float, blocks_per_token: float, bandwidth: float) -> float:
    """Tokens a second that bringing in the misses allows, whatever else is free; infinite when nothing misses.

    blocks_per_token  over all layers: MoE layers x experts of a token
    bandwidth         bytes a second of where the misses come from
    """
    if not 0 <= hit_rate <= 1:
        raise RequestError(f"a hit rate is a share from 0 to 1; got {hit_rate}.")
    if not min(bytes_per_block, blocks_per_token, bandwidth) > 0:
        given = f"{bytes_per_block}, {blocks_per_token} and {bandwidth}"
        raise RequestError(f"bytes of a block, blocks of a token and bandwidth must be above 0; got {given}.")
    missed = (1 - hit_rate) * blocks_per_token * bytes_per_block
    return float(bandwidth / missed) if missed else math.inf


def _replay(accesses: Accesses, capacity: int, worth: np.ndarray) -> np.ndarray:
    """The hits. worth [n]: what the block of each access is worth from then on; all the numbers from 0 to n - 1."""
    _demand_whole([capacity], "a capacity")
    key, block = accesses.key.tolist(), accesses.key[np.argsort(worth)].tolist()  # block[w]: which one is worth w
    worth = worth.tolist()
    held: dict[int, int] = {}  # block: worth
    least: list[int] = []  # heap of worths; those that `held` does not confirm are outdated
    hits = np.zeros(len(accesses), bool)
    for start, stop in accesses.visits:
        visit = range(start, stop)
        missed = []
        for at in visit:
            if held.pop(key[at], None) is None:
                missed.append(at)
            else:
                hits[at] = True
        stays = visit
        if len(visit) > capacity:
            stays = [max(missed, key=worth.__getitem__)]  # brought in last
            for at in visit:
                if at != stays[0]:
                    held[key[at]] = worth[at]
                    heapq.heappush(least, worth[at])
        while len(held) > capacity - len(stays):
            out = heapq.heappop(least)
            if held.get(block[out]) == out:
                del held[block[out]]
        for at in stays:
            held[key[at]] = worth[at]
            heapq.heappush(least, worth[at])
    return hits


def _ranks(*by: np.ndarray) -> np.ndarray:
    """Place of each in ascending order of the first, of equal ones of the second, and so on."""
    ranks = np.empty(len(by[0]), np.int64)
    ranks[np.lexsort(by[::-1])] = np.arange(len(ranks))
    return ranks


def _next_use(accesses: Accesses, when: np.ndarray) -> np.ndarray:
    """float64 [n]: the `when` of the next access to the same block, infinite if there is none."""
    order = np.argsort(accesses.key, kind="stable")
    again = np.diff(accesses.key[order]) == 0
    upcoming = np.full(len(accesses), np.inf)
    upcoming[order[:-1][again]] = when[order[1:][again]]
    return upcoming


def _greater_before(values: np.ndarray) -> np.ndarray:
    """For each of the values [n], whole and 0 or more: how many before it are greater. O(n log n), a bit at a time.

    Of two numbers the greater has the 1 where they first differ. So: among those that agree in all higher bits.
    """
    counts, place = np.zeros(len(values), np.int64), np.arange(len(values))
    order = place
    for bit in reversed(range(int(values.max()).bit_length())):
        agreed, one = values[order] >> (bit + 1), (values[order] >> bit) & 1
        ones = np.cumsum(one) - one
        changes = np.concatenate([[True], agreed[1:] != agreed[:-1]])
        first = np.maximum.accumulate(np.where(changes, place, 0))
        counts[order] += np.where(one == 0, ones - ones[first], 0)
        order = order[np.argsort(values[order] >> bit, kind="stable")]
    return counts


def _again(key: np.ndarray, passes: np.ndarray, within: Sequence[int], count: int) -> np.ndarray:
    """Of the uses of a block in a pass, those that enough passes follow: the share that is used again so soon."""
    uses = np.sort(key * count + passes)
    uses = uses[np.diff(uses, prepend=-1) > 0]
    block, passes = np.divmod(uses, count)
    gap = np.where(np.diff(block, append=-1) == 0, np.diff(uses, append=0), count)
    return np.array([(gap[passes < count - window] <= window).mean() for window in within])


def _sizes(accesses: Accesses) -> np.ndarray:
    """Blocks of each visit."""
    return np.diff(accesses.visits, axis=1).reshape(-1)


def _demand_whole(numbers: Sequence[int], what: str) -> None:
    wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1]
    if wrong or not len(numbers):
        raise RequestError(f"{what} is a whole number, 1 or more; got {list(numbers)}.")
