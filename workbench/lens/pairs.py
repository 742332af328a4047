"""Experts that read tokens together: in one layer, and from one layer to the next. A Trace in, tables out.

N tokens that were read, K experts of a token, E experts of a layer.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.lens.independent import pair_rates
from workbench.lens.null import Comparison, higher, spread, swapped
from workbench.trace import PHASES, Trace


def coactivation(trace: Trace, layer: int, phase: str | None = None) -> pd.DataFrame:
    """How many tokens both experts of a pair read in `layer`: int [E, E]; on the diagonal, how many one expert read.

    phase: "prefill" or "decode" alone. RequestError for a layer that was not recorded and where nothing was read.
    """
    read = _chosen(trace, layer, phase)[0]
    return _square(_together(read, trace.n_experts), layer)


def lift(trace: Trace, layer: int, phase: str | None = None) -> pd.DataFrame:
    """Observed co-activation over that of independent choice: float [E, E], 1 is chance; NaN where none is expected.

    Independent choice (`lens.independent`) keeps how often each expert is chosen, that the experts of a token are
    different, and in a group-limited model that they come from topk_group groups; this last makes experts of one group
    meet more often than others, which is no affinity. Without it where an edit broke the limit in this trace. Tokens
    with another number of experts (edits) are expected apart and added. A router whose logits are unrelated comes
    within some per cent of this null, not nearer: its groups are those of its best experts.
    """
    read = _chosen(trace, layer, phase)[0]
    observed = _together(read, trace.n_experts)
    groups, limit = _groups(trace, read)
    used = (read >= 0).sum(1)
    expected = np.zeros(observed.shape)
    for k in np.unique(used).tolist():
        own = read[used == k]
        rates = np.bincount(own[own >= 0], minlength=trace.n_experts) / len(own)
        expected += len(own) * pair_rates(rates, k, groups, limit)
    np.fill_diagonal(expected, 0.0)
    ratio = np.divide(observed, expected, out=np.full(observed.shape, np.nan), where=expected > 0)
    return _square(ratio, layer)


class PairNull(NamedTuple):
    """Co-activation beside a permutation null.

    observed  [E, E] counts, as `coactivation`
    expected  [E, E] mean of the null
    z         [E, E] standard deviations of the null between them; NaN on the diagonal and where the null does not vary
    share     share of the pairs that vary with |z| > 1.96, against that share in the null itself
    """

    observed: pd.DataFrame
    expected: pd.DataFrame
    z: pd.DataFrame
    share: Comparison


def beyond_chance(trace: Trace, layer: int, phase: str | None = None, *, rounds: int = 200, seed: int = 0) -> PairNull:
    """Co-activation against `rounds` tables in which it was shuffled which tokens chose each expert.

    Every token keeps its number of experts, every expert its number of tokens, and a group-limited model its limit
    (`lens.null.swapped`). The null takes tokens as exchangeable: a trace of several subjects, or of one token again and
    again, goes beyond it without any affinity of experts for one another. So does, in thousands of tokens, the little
    that unrelated logits differ from it (see `lift`): look at z and lift together.
    """
    if rounds < 20:
        raise RequestError(f"rounds must be 20 or more, to know how far the null varies; got {rounds}.")
    read = _chosen(trace, layer, phase)[0]
    observed = _together(read, trace.n_experts)
    groups, limit = _groups(trace, read)
    limited = groups if limit <= groups.max() else None
    null = np.stack([_together(each, trace.n_experts) for each in swapped(read, rounds, seed, limited, limit)])
    mean, sd = null.mean(0), null.std(0, ddof=1)
    varies = sd > 0
    np.fill_diagonal(varies, False)
    z = np.divide(observed - mean, sd, out=np.full(mean.shape, np.nan), where=varies)
    pairs = np.triu(varies)
    if not pairs.any():
        raise RequestError(f"layer {layer}: no pair of experts could have been otherwise; record more tokens.")
    every = np.concatenate([observed[None], null])[:, pairs]  # the observed among them: then the test is exact
    far = (np.abs(every - every.mean(0)) > 1.96 * every.std(0, ddof=1)).mean(1)
    share = higher(float(far[0]), far[1:].tolist())
    return PairNull(_square(observed, layer), _square(mean, layer), _square(z, layer), share)


def strongest(
    trace: Trace, layer: int, n: int = 10, phase: str | None = None, *, rounds: int = 200, seed: int = 0
) -> pd.DataFrame:
    """The `n` pairs farthest above the null of `beyond_chance`, a row each.

    Columns expert, with, together (tokens), expected, lift (their ratio), z. Of many pairs some are far out by chance:
    beyond_chance(...).share says whether more are than should be.
    """
    found = beyond_chance(trace, layer, phase, rounds=rounds, seed=seed)
    a, b = np.triu_indices(trace.n_experts, 1)
    table = pd.DataFrame({"expert": a, "with": b})
    for name, square in (("together", found.observed), ("expected", found.expected), ("z", found.z)):
        table[name] = square.to_numpy()[a, b]
    table.insert(4, "lift", table["together"] / table["expected"].where(table["expected"] > 0))
    return table.dropna().nlargest(n, "z").reset_index(drop=True)


def transitions(trace: Trace, layer_a: int, layer_b: int, by: str = "count", phase: str | None = None) -> pd.DataFrame:
    """P(expert in layer_b | expert in layer_a) for one slot of a token in each: float [E, E], rows sum to 1.

    by="count": all slots of a token weigh the same, so K times a value is the share of the tokens of the row's expert
    that also chose the column's. by="gate": slots weigh as their gates. An expert that was never chosen: a row of NaN.
    """
    joint = _joint(*_shares(trace, layer_a, layer_b, by, phase))
    total = joint.sum(1, keepdims=True)
    table = np.divide(joint, total, out=np.full(joint.shape, np.nan), where=total > 0)
    return pd.DataFrame(table).rename_axis(index=f"layer {layer_a}", columns=f"layer {layer_b}")


def mutual_information(
    trace: Trace,
    layer_a: int,
    layer_b: int,
    by: str = "count",
    phase: str | None = None,
    *,
    rounds: int = 200,
    seed: int = 0,
) -> Comparison:
    """What one expert of a token in layer_a says about one in layer_b, in bits, beside a shuffled null.

    The joint distribution is that of `transitions`. The null pairs the choices in layer_a with those of another token
    in layer_b; its mean is not 0, because few tokens always look a little dependent, so read observed - null_mean.
    Both layers see the same token: that alone makes one say much about the other.
    """
    a, b = _shares(trace, layer_a, layer_b, by, phase)
    random = np.random.default_rng(seed)
    null = [_bits(_joint(a, random.permutation(b))) for _ in range(rounds)]
    return higher(_bits(_joint(a, b)), null)


def chains(trace: Trace, n: int = 10, phase: str | None = None) -> pd.DataFrame:
    """The `n` most frequent paths of a token's strongest expert through all recorded layers, a row each.

    Columns: the layers, by number; tokens (on this path); share of all; expected (tokens, were the layers independent);
    ids (how many different tokens of the vocabulary: 1 says that the path is one token's); text (the most frequent).
    """
    read = _in_phase(trace, phase) & (trace.experts[:, :, 0] >= 0).all(1)
    if not trace.layers or not read.any():
        raise RequestError("no token was read by every recorded layer; record more, or another phase.")
    paths = trace.experts[read][:, :, 0]
    tokens = trace.tokens[read]
    each, path, count = np.unique(paths, axis=0, return_inverse=True, return_counts=True)
    path = path.reshape(-1)
    order = np.argsort(-count, kind="stable")[:n]
    shares = [np.bincount(column, minlength=trace.n_experts) / len(paths) for column in paths.T]
    expected = len(paths) * np.prod([share[column] for share, column in zip(shares, each.T)], axis=0)
    table = pd.DataFrame(each[order], columns=list(trace.layers))
    table["tokens"] = count[order]
    table["share"] = count[order] / len(paths)
    table["expected"] = expected[order]
    on = [tokens[path == number] for number in order]
    table["ids"] = [own["id"].nunique() for own in on]
    table["text"] = [own["text"].mode().iloc[0] for own in on]
    return table


def _chosen(trace: Trace, layer: int, phase: str | None, read: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Experts [N, K] and gates [N, K] of the tokens that `layer` read; or of those in `read` [T]."""
    if layer not in trace.layers:
        known = ", ".join(map(str, trace.layers)) or "none"
        raise RequestError(f"layer {layer} has no recorded routing; recorded: {known}.")
    at = trace.layers.index(layer)
    if read is None:
        read = _in_phase(trace, phase) & (trace.experts[:, at] >= 0).any(1)
    if not read.any():
        raise RequestError(f"layer {layer} read no token{f' in {phase}' if phase else ''} of this trace.")
    return trace.experts[read, at].astype(np.int64), trace.gates[read, at].astype(float)


def _in_phase(trace: Trace, phase: str | None) -> np.ndarray:
    if phase not in (None, *PHASES):
        raise RequestError(f"phase must be 'prefill', 'decode' or None; got {phase!r}.")
    return np.ones(len(trace), bool) if phase is None else (trace.tokens["phase"] == phase).to_numpy()


def _groups(trace: Trace, read: np.ndarray) -> tuple[np.ndarray, int]:
    """The group of each expert [E], and from how many groups a token's may come."""
    config, experts = trace.header["config"], trace.n_experts
    if config.get("topk_method") != "group_limited_greedy":
        return np.zeros(experts, int), 1
    groups = np.arange(experts) // (experts // config["n_group"])
    limit = config["topk_group"]
    return (groups, limit) if spread(read, groups).max() <= limit else (np.zeros(experts, int), 1)


def _members(read: np.ndarray, experts: int, weights: np.ndarray | None = None) -> np.ndarray:
    """[N, E]: the weight (1) of each expert of a token, 0 for the others."""
    out = np.zeros((len(read), experts + 1), np.float32)
    np.put_along_axis(out, read, 1.0 if weights is None else weights, 1)  # -1, not used, goes into the last column
    return out[:, :experts]


def _together(read: np.ndarray, experts: int) -> np.ndarray:
    members = _members(read, experts)
    return (members.T @ members).round().astype(np.int64)


def _shares(trace: Trace, layer_a: int, layer_b: int, by: str, phase: str | None) -> tuple[np.ndarray, np.ndarray]:
    """For each token the shares of the experts in both layers, [N, E] each; in layer_b they sum to 1.

    In layer_a they sum to what the token weighs: 1 with by="count", its gates there with by="gate".
    """
    if by not in ("count", "gate"):
        raise RequestError(f"by must be 'count' or 'gate'; got {by!r}.")
    ats = [trace.layers.index(layer) for layer in (layer_a, layer_b) if layer in trace.layers]
    read = _in_phase(trace, phase) & (trace.experts[:, ats] >= 0).any(2).all(1)
    out = []
    for layer in (layer_a, layer_b):
        ids, gates = _chosen(trace, layer, phase, read)
        shares = _members(ids, trace.n_experts, np.where(ids >= 0, 1.0 if by == "count" else gates, 0.0)).astype(float)
        total = shares.sum(1, keepdims=True)
        out.append(shares / np.where(total > 0, total, 1.0))
    return out[0], out[1]


def _joint(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.T @ b / len(a)


def _bits(joint: np.ndarray) -> float:
    """Mutual information of a joint distribution [A, B]."""
    alone = np.outer(joint.sum(1), joint.sum(0))
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / alone[seen])).sum())


def _square(values: np.ndarray, layer: int) -> pd.DataFrame:
    return pd.DataFrame(values).rename_axis(index=f"layer {layer}", columns=f"layer {layer}")
