"""A cache of experts, seen from a trace: how far apart an expert's uses are, and what a cache of any size would hit.

Every token, in order, asks every layer, in order, for its experts: the K of one token and layer together. The cache is
one pool for all layers, empty at the start, of `capacity` (layer, expert) pairs. What was asked for need not be kept. A
prompt is counted token by token too, though a model reads it in one pass: `phase="decode"` leaves it out.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.lens.load import tokens_of
from workbench.trace import Trace


def reuse_distances(trace: Trace, phase: str | None = None) -> pd.DataFrame:
    """Rows of `trace.routing` (token, layer, expert) with `distance`: the LRU stack distance (Mattson et al. 1970).

    It is the number of other pairs used since this one was, infinite at its first use: an LRU cache hits where it is
    below the capacity. Of pairs last used together, those with the larger gates count as the later ones.
    """
    routing, pairs, batches = _requests(trace, phase)
    distances = np.empty(len(pairs))
    used = np.full(pairs.max() + 1, -1)  # when a pair was used last
    for start, stop in batches:
        now = pairs[start:stop]
        before = used[now]
        later = (used > before[:, None]).sum(1)
        distances[start:stop] = np.where(before < 0, np.inf, later)
        used[now] = np.arange(stop, start, -1)
    return routing.assign(distance=distances)


def hit_rates(trace: Trace, capacities: Sequence[int], phase: str | None = None) -> pd.DataFrame:
    """Share of requests that find their expert in the cache; a row a capacity, in pairs.

    lru       evicts the pair that was not used for the longest time
    oracle    knows the future and keeps what is needed soonest (Belady 1966): without loading ahead, nothing hits more
    pinned    keeps the pairs this very trace uses most from their first use on: the most a fixed choice can hit
    realised  what the run itself hit, at the capacity it had; there only if the trace has events "hit" or "miss"
    """
    wrong = [c for c in capacities if isinstance(c, bool) or not isinstance(c, int | np.integer) or c < 1]
    if wrong or not len(capacities):
        raise RequestError(f"capacities are whole numbers of experts, 1 or more, at least one; got {list(capacities)}.")
    distances = np.sort(reuse_distances(trace, phase)["distance"].to_numpy())
    _, pairs, batches = _requests(trace, phase)
    upcoming = _next_uses(pairs, batches)
    uses = np.sort(np.bincount(pairs))[::-1]
    again = np.cumsum(np.maximum(uses - 1, 0))  # hits of the n + 1 pairs used most
    table = pd.DataFrame(index=pd.Index([int(c) for c in capacities], name="capacity"))
    table["lru"] = [np.searchsorted(distances, c) / len(pairs) for c in table.index]
    table["oracle"] = [_oracle(pairs.tolist(), upcoming, batches, c) / len(pairs) for c in table.index]
    table["pinned"] = [again[min(c, len(again)) - 1] / len(pairs) for c in table.index]
    kinds = trace.events["kind"][tokens_of(trace, phase)[trace.events["token"]]]
    seen = kinds[kinds.isin(["hit", "miss"])]
    if len(seen):
        table["realised"] = (seen == "hit").mean()
    return table


def _requests(trace: Trace, phase: str | None) -> tuple[pd.DataFrame, np.ndarray, list[tuple[int, int]]]:
    """The requests, each one's pair as a number, and the (start, stop) of those made together."""
    routing = trace.routing[["token", "layer", "expert"]]
    routing = routing[tokens_of(trace, phase)[routing["token"]]]
    if not len(routing):
        raise RequestError(f"this trace has no routing{f' of phase {phase}' if phase else ''} to look at.")
    places = np.searchsorted(trace.layers, routing["layer"])
    pairs = places * trace.n_experts + routing["expert"].to_numpy()
    step = routing["token"].to_numpy() * len(trace.layers) + places
    bounds = [0, *(np.flatnonzero(np.diff(step)) + 1).tolist(), len(step)]
    return routing, pairs, list(zip(bounds, bounds[1:]))


def _next_uses(pairs: np.ndarray, batches: list[tuple[int, int]]) -> list[int]:
    """For each request, the number of the batch in which its pair is asked for again; -1 if it never is."""
    batch = np.repeat(np.arange(len(batches)), [stop - start for start, stop in batches])
    order = np.argsort(pairs, kind="stable")
    upcoming = np.full(len(pairs), -1)
    again = pairs[order[1:]] == pairs[order[:-1]]
    upcoming[order[:-1][again]] = batch[order[1:][again]]
    return upcoming.tolist()


def _oracle(pairs: list[int], upcoming: list[int], batches: list[tuple[int, int]], capacity: int) -> int:
    """Hits. After each batch, of what is there and what was asked for, the pairs that are needed soonest stay."""
    held: dict[int, int] = {}  # pair: batch of its next use
    farthest: list[tuple[int, int]] = []  # heap of (-batch, pair); entries that `held` does not confirm are outdated
    hits = 0
    for start, stop in batches:
        for pair, use in zip(pairs[start:stop], upcoming[start:stop]):
            hits += held.pop(pair, None) is not None
            if use >= 0:
                held[pair] = use
                heapq.heappush(farthest, (-use, pair))
        while len(held) > capacity:
            use, pair = heapq.heappop(farthest)
            if held.get(pair) == -use:
                del held[pair]
    return hits
