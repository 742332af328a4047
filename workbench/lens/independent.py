"""How often two experts would read the same token if a layer chose each of them independently of the others.

A set of K different experts, from few groups, cannot be chosen quite independently; the closest there is: among all
distributions over the sets the router could choose that have the observed rates, the one of highest entropy. In it a
set is as likely as the product of its experts' weights: conditional Bernoulli sampling (Chen, Dempster and Liu 1994,
Biometrika 81:457). Probabilities are ratios of sums over sets, which are coefficients of products of (1 + weight x).

E experts, K chosen, G groups.
"""

import numpy as np

FIT, STEPS = 1e-9, 50  # how closely the rates are met, in how many steps


def pair_rates(rates: np.ndarray, k: int, groups: np.ndarray, limit: int) -> np.ndarray:
    """Probability [E, E] that both experts are chosen; on the diagonal that one is.

    rates [E]: share of the tokens each expert reads, sum k. groups [E]: the group of each expert. limit: from how many
    groups a set may come; that of all groups is no limit. Rates at the edge of what is possible, because one expert
    reads every token, say, are met as closely as `STEPS` steps of fitting do.
    """
    out = np.zeros((len(rates), len(rates)))
    seen = np.flatnonzero(rates > 0)
    if len(seen) <= k:  # one set is left
        out[np.ix_(seen, seen)] = 1.0
        return out
    names = np.unique(groups[seen])
    members = [np.flatnonzero(groups[seen] == name) for name in names]
    out[np.ix_(seen, seen)] = _fitted(rates[seen], k, members, min(limit, len(members)))
    return out


def _fitted(rates: np.ndarray, k: int, members: list[np.ndarray], limit: int) -> np.ndarray:
    """Newton's method on the log likelihood of the log weights: concave, its gradient what is missing to the rates."""
    logs = np.log(rates)
    both, total = _both(np.exp(logs), k, members, limit)
    for _ in range(STEPS):
        single = both.diagonal()
        missing = rates - single
        if np.abs(missing).max() < FIT:
            break
        covariance = both - np.outer(single, single) + 1e-9 * np.eye(len(rates))
        step = np.linalg.solve(covariance, missing)
        step *= min(1.0, 4.0 / np.abs(step).max())
        for _ in range(30):
            ahead = logs + step - (logs + step).mean()
            both_ahead, total_ahead = _both(np.exp(ahead), k, members, limit)
            if rates @ ahead - np.log(total_ahead) >= rates @ logs - np.log(total):
                break
            step /= 2
        else:
            break
        logs, both, total = ahead, both_ahead, total_ahead
    return both


def _both(weights: np.ndarray, k: int, members: list[np.ndarray], limit: int) -> tuple[np.ndarray, float]:
    """Probability of both of two experts [E, E], and the sum over all sets."""
    whole = [_sums(weights[None, own], k)[0] for own in members]
    total = _sets(whole, k, limit)[k]
    out = np.empty((len(weights), len(weights)))
    for g, own in enumerate(members):
        w = weights[own]
        elsewhere = _sets(whole[:g] + whole[g + 1 :], k, limit - 1)
        i, j = np.triu_indices(len(own), 1)
        pair = np.arange(len(i))
        others = np.tile(w, (len(i), 1))
        others[pair, i] = others[pair, j] = 0.0
        in_pair = w[i] * w[j] * (_sums(others, k - 2) @ elsewhere[k - 2 :: -1]) if k > 1 else 0.0
        out[own[i], own[j]] = out[own[j], own[i]] = in_pair
        out[own, own] = _with(w, k) @ elsewhere[::-1]
        for h in range(g):
            elsewhere = _sets([whole[n] for n in range(len(whole)) if n not in (g, h)], k, limit - 2)
            left = k - np.add.outer(np.arange(k + 1), np.arange(k + 1))  # experts from other groups
            between = np.where(left >= 0, elsewhere[left], 0.0)
            both = _with(w, k) @ between @ _with(weights[members[h]], k).T
            out[np.ix_(own, members[h])], out[np.ix_(members[h], own)] = both, both.T
    return out / total, total


def _with(weights: np.ndarray, k: int) -> np.ndarray:
    """Of one group [n]: for each expert the sums over sets that it is in, by size: [n, k + 1]."""
    others = np.where(np.eye(len(weights), dtype=bool), 0.0, weights)
    return weights[:, None] * np.pad(_sums(others, k - 1), ((0, 0), (1, 0)))


def _sums(weights: np.ndarray, k: int) -> np.ndarray:
    """For each row of weights [R, n] the sums over its sets of 0 to k, of the product of their weights: [R, k + 1]."""
    sums = np.zeros((len(weights), k + 1))
    sums[:, 0] = 1.0
    for w in weights.T:
        sums[:, 1:] += w[:, None] * sums[:, :-1]
    return sums


def _sets(groups: list[np.ndarray], k: int, limit: int) -> np.ndarray:
    """The sums of several groups [k + 1 each], put together, for sets from at most `limit` of them: [k + 1]."""
    if limit < 0:
        return np.zeros(k + 1)
    table = np.zeros((limit + 1, k + 1))  # by groups used and experts used
    table[0, 0] = 1.0
    for sums in groups:
        more = [np.convolve(row, np.concatenate([[0.0], sums[1:]]))[: k + 1] for row in table[:-1]]
        table[1:] += np.reshape(more, (limit, k + 1))
    return table.sum(0)
