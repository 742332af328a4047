"""How evenly experts are used, and how evenly chance alone would use them.

T tokens, L layers, K slots, E experts. The load of an expert is the number of tokens it read, or with `by="gate"` the
sum of its gates. Names elsewhere: NeMo logs cv, dead (dead_expert_frac) and load over mean (expert_utilization); vLLM
and SGLang log 1 / max_over_mean, of devices in place of experts (balancedness).
"""

import numpy as np
import pandas as pd

from workbench.errors import RequestError
from workbench.trace import PHASES, Trace

CHUNK = 1 << 22  # random router scores held at once
BY = ("count", "gate")


def load(trace: Trace, phase: str | None = None, by: str = "count") -> pd.DataFrame:
    """A row a layer. RequestError where no token of that phase was read.

    tokens         that were read
    cv             coefficient of variation of the loads: standard deviation over mean; 0 is even
    entropy        of the shares, over that of an even load: 1 is even, 0 is one expert for all
    dead           share of experts without any load
    max_over_mean  the largest load over the mean; 1 is even
    top_share      share of the load on the K busiest experts; 1 where every token goes to the same ones
    """
    weights = _weights(trace, phase, by)
    figures = _figures(_loads(trace.experts, weights, trace.n_experts), trace.k)
    tokens = (trace.experts[tokens_of(trace, phase)] >= 0).any(-1).sum(0)
    return pd.DataFrame({"tokens": tokens} | figures, index=_index(trace))


def counts(trace: Trace, phase: str | None = None, by: str = "count") -> pd.DataFrame:
    """The load of every expert, layers x experts."""
    loads = _loads(trace.experts, _weights(trace, phase, by), trace.n_experts)
    if by == "count":
        loads = loads.astype(np.int64)
    return pd.DataFrame(loads, index=_index(trace), columns=pd.RangeIndex(trace.n_experts, name="expert"))


def null_load(
    trace: Trace, rounds: int = 200, seed: int = 0, phase: str | None = None, by: str = "count"
) -> pd.DataFrame:
    """What `load` gives, beside what it would give if every token chose by chance. A row a layer and figure.

    A short text leaves experts unused by chance alone. Here every router score is random, all else is as it was: how
    many experts a token has in a layer, their gates, and the limit on groups where the config has one.

    observed
    null_mean, null_low, null_high  mean and the central 95 % of `rounds` repetitions
    outside                         the observed value is not within them
    """
    if rounds < 2:
        raise RequestError(f"a null needs at least two rounds to vary; got {rounds}.")
    weights = _weights(trace, phase, by)
    read = (weights != 0).any((1, 2))
    weights, rng = weights[read], np.random.default_rng(seed)
    null = np.zeros((rounds, len(trace.layers), trace.n_experts))
    size = max(1, CHUNK // trace.n_experts)
    for loads in null:
        for start in range(0, len(weights), size):
            part = weights[start : start + size]
            # the same choice in every layer: the layers' own figures vary as they should, and only those are asked for
            ids = _by_chance(rng, len(part), trace)
            loads += _loads(np.broadcast_to(ids[:, None], part.shape), part, trace.n_experts)
    observed, by_chance = load(trace, phase, by), _figures(null, trace.k)
    tables = {}
    for name, values in by_chance.items():
        low, high = np.quantile(values, (0.025, 0.975), axis=0)
        seen = observed[name].to_numpy()
        columns = {"observed": seen, "null_mean": values.mean(0), "null_low": low, "null_high": high}
        tables[name] = pd.DataFrame(columns | {"outside": (seen < low) | (seen > high)}, index=observed.index)
    table = pd.concat(tables, names=["figure", "layer"]).swaplevel()
    return table.reindex([(layer, name) for layer in trace.layers for name in tables])


def tokens_of(trace: Trace, phase: str | None) -> np.ndarray:
    """bool [T]: the tokens of that phase; all of them for None."""
    if phase not in (None, *PHASES):
        raise RequestError(f"phase must be 'prefill', 'decode' or None; got {phase!r}.")
    return np.ones(len(trace), bool) if phase is None else (trace.tokens["phase"] == phase).to_numpy()


def _weights(trace: Trace, phase: str | None, by: str) -> np.ndarray:
    """[T, L, K]: how much a choice counts; 0 for unused slots and other phases."""
    if by not in BY:
        raise RequestError(f"by must be 'count' or 'gate'; got {by!r}.")
    used = (trace.experts >= 0) & tokens_of(trace, phase)[:, None, None]
    if not used.any():
        raise RequestError(f"no token{f' of phase {phase}' if phase else ''} of this trace was read by experts.")
    return used.astype(np.float64) if by == "count" else trace.gates * used


def _loads(experts: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """[L, E]"""
    each = [
        np.bincount(np.maximum(experts[:, n], 0).ravel(), weights[:, n].ravel(), count) for n in range(experts.shape[1])
    ]
    return np.stack(each)


def _by_chance(rng: np.random.Generator, tokens: int, trace: Trace) -> np.ndarray:
    """[T, K] experts by random scores, strongest first, as a router that knows nothing would choose them."""
    config, experts = trace.header["config"], trace.n_experts
    scores = rng.random((tokens, experts), np.float32)
    if config.get("topk_method") == "group_limited_greedy":
        groups = scores.reshape(tokens, config.get("n_group") or 1, -1)
        best = groups.max(-1)
        limit = np.sort(best, -1)[:, -(config.get("topk_group") or 1), None]
        groups -= (best < limit)[..., None]  # below all that are kept
    chosen = np.argpartition(-scores, min(trace.k, experts - 1), -1)[:, : trace.k]
    order = np.argsort(-np.take_along_axis(scores, chosen, -1), -1)
    return np.take_along_axis(chosen, order, -1)


def _figures(loads: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Of loads [..., E]; NaN where there is no load at all."""
    experts = loads.shape[-1]
    with np.errstate(invalid="ignore"):
        mean = loads.mean(-1)
        share = loads / loads.sum(-1, keepdims=True)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
        return {
            "cv": loads.std(-1) / mean,
            "entropy": entropy / np.log(experts) if experts > 1 else np.ones_like(entropy),
            "dead": (loads == 0).mean(-1),
            "max_over_mean": loads.max(-1) / mean,
            "top_share": np.sort(share, -1)[..., -k:].sum(-1),
        }


def _index(trace: Trace) -> pd.Index:
    return pd.Index(trace.layers, name="layer")
