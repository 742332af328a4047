"""The router: why a token went where it went, what the limit on groups changes, and how narrow the choice is.

N tokens, D hidden, E experts, G groups, K chosen. `logits` are what passes moe.router_logits: [N, E] of one sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import comb

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench import ops
from workbench.config import Config
from workbench.errors import RequestError
from workbench.trace import Trace

LOW = torch.bfloat16


def choice(logits: Tensor, config: Config) -> pd.DataFrame:
    """The choice of one token, from its logits [E]: a row an expert.

    group, logit, probability (softmax over all experts), place (1: the most probable), kept (its group was), chosen,
    gate (weight of its output, 0 where it was not chosen).
    """
    if logits.dim() != 1:
        raise RequestError(f"logits of one token are [E]; got {tuple(logits.shape)}.")
    routing, kept = ops.route(logits, config), _kept(logits, config)
    experts = len(logits)
    groups = torch.arange(experts) // (experts // len(kept))
    chosen = torch.zeros(experts, dtype=torch.bool).scatter(0, routing.ids, True)
    columns = {
        "group": groups,
        "logit": logits,
        "probability": routing.probs,
        "place": logits.argsort(descending=True, stable=True).argsort() + 1,
        "kept": kept[groups],
        "chosen": chosen,
        "gate": torch.zeros(experts).scatter(0, routing.ids, routing.gates),
    }
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()}).rename_axis(index="expert")


def limit(logits: Mapping[int, Tensor], config: Config) -> pd.DataFrame:
    """What choosing from `topk_group` groups changes: a row a layer.

    tokens
    changed        share of them that would go to other experts if every group were open
    lost           of the probability that the K best experts have, the share that the limit gives away; mean
    groups         how many groups the chosen experts are in; mean
    groups, free   the same, if every group were open
    RequestError for a model without groups.
    """
    open_to_all = replace(_limited(config), topk_method="greedy")
    rows = {}
    for layer, values in logits.items():
        free, bound = ops.route(values, open_to_all), ops.route(values, config)
        best, chosen = (each.scores[:, : config.num_experts_per_tok].sum(1) for each in (free, bound))
        rows[layer] = {
            "tokens": len(values),
            "changed": float(differ(free.ids, bound.ids).float().mean()),
            "lost": float((1 - chosen / best).mean()),
            "groups": _groups_used(bound.ids, config),
            "groups, free": _groups_used(free.ids, config),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="layer")


def sets(config: Config) -> int:
    """How many different sets of experts one layer could send a token to; the limit on groups allows for fewer."""
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    if config.topk_method != "group_limited_greedy":
        return comb(experts, k)
    each, within = experts // config.n_group, 0
    for used in range(1, config.topk_group + 1):  # sets with experts of exactly so many groups
        of_these = sum((-1) ** (used - n) * comb(used, n) * comb(n * each, k) for n in range(1, used + 1))
        within += comb(config.n_group, used) * of_these
    return within


def limit_by_chance(config: Config) -> float:
    """Share of tokens whose choice the limit on groups would change if router scores were random. Exact."""
    return 1 - sets(_limited(config)) / comb(config.n_routed_experts, config.num_experts_per_tok)


def cuts(logits: Mapping[int, Tensor], config: Config) -> pd.DataFrame:
    """How narrowly the last chosen expert was chosen: its logit less that of the best one left out, a column a layer.

    Experts of dropped groups do not count as left out.
    """
    rows = {}
    for layer, values in logits.items():
        last, next_best = ops.route(values, config).scores[:, -2:].T
        rows[layer] = (last / next_best).log().numpy()
    return pd.DataFrame(rows).rename_axis(index="token", columns="layer")


def flips(logits: Mapping[int, Tensor], config: Config, noise: Sequence[float], seed: int = 0) -> pd.DataFrame:
    """Share of the tokens that go to other experts when normal noise is added to every logit.

    A row a standard deviation, a column a layer. Every row has the same noise, only stronger.
    """
    table = {}
    for layer, values in logits.items():
        random = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
        ids = ops.route(values, config).ids
        moved = [differ(ids, ops.route(values + size * random, config).ids) for size in noise]
        table[layer] = [float(each.float().mean()) for each in moved]
    index = pd.Index(list(noise), name="standard deviation of the noise")
    return pd.DataFrame(table, index=index).rename_axis(columns="layer")


def rounding(inputs: Mapping[int, Tensor], routers: Mapping[int, Tensor], config: Config) -> pd.DataFrame:
    """Share of the tokens that go to other experts when less than the whole router is in fp32.

    inputs   by layer, what passes mlp.in, [N, D]; routers: by layer, the weights [E, D]
    Columns: only the input is rounded to bf16 · logits are computed in bf16 · and the softmax too. A row a layer, and
    "any": in at least one of them. Rounding in one layer does not reach the next here, as it would in a model.
    """
    moved = {}
    for layer, x in inputs.items():
        weight = routers[layer]
        low = ops.linear(x.to(LOW), weight.to(LOW))
        ways = {
            "input": ops.router_logits(x.to(LOW), weight),
            "logits": low.float(),
            "softmax": low.softmax(-1).float().log(),
        }
        ids = ops.route(ops.router_logits(x, weight), config).ids
        moved[layer] = {name: differ(ids, ops.route(values, config).ids) for name, values in ways.items()}
    rows = {str(layer): {name: each.float().mean() for name, each in way.items()} for layer, way in moved.items()}
    names = next(iter(moved.values()))
    rows["any"] = {name: torch.stack([way[name] for way in moved.values()]).any(0).float().mean() for name in names}
    return pd.DataFrame.from_dict(rows, orient="index").astype(float).rename_axis(index="layer")


def dealt(trace: Trace, seed: int = 0) -> Trace:
    """The same trace with its routing dealt to other tokens of the same sequence: a null for who reads what.

    A token gets experts and gates of another one in all layers, so every expert reads as many tokens as before. Tokens
    that were never read stay so.
    """
    random, order = np.random.default_rng(seed), np.arange(len(trace))
    read = (trace.experts >= 0).any((1, 2))
    for number in range(len(trace.header["sequences"])):
        own = np.flatnonzero(read & (trace.tokens["sequence"] == number).to_numpy())
        order[own] = random.permutation(own)
    scores = None if trace.scores is None else trace.scores[order]
    arrays = (each[order] for each in (trace.experts, trace.gates, trace.margins))
    return Trace(trace.header, trace.tokens, trace.layers, *arrays, scores)


def differ(a: Tensor, b: Tensor) -> Tensor:
    """bool [N]: whether ids [N, K] name other experts, in whatever order."""
    return (a.sort(-1).values != b.sort(-1).values).any(-1)


def newcomers(before: Tensor, after: Tensor, experts: int) -> pd.Series:
    """How many tokens each expert reads after, [N, K] ids, and did not before; without the experts that have none."""
    member = torch.zeros(2, len(before), experts, dtype=torch.bool)
    member[0].scatter_(1, before, True)
    member[1].scatter_(1, after, True)
    counts = pd.Series((member[1] & ~member[0]).sum(0).numpy(), name="new tokens").rename_axis("expert")
    return counts[counts > 0].sort_values(ascending=False, kind="stable")


def _limited(config: Config) -> Config:
    if config.topk_method != "group_limited_greedy":
        raise RequestError(
            f"topk_method is {config.topk_method!r}: this model chooses from all experts, not from groups."
        )
    return config


def _kept(logits: Tensor, config: Config) -> Tensor:
    return ops.groups_kept(logits.softmax(-1), config).bool()


def _groups_used(ids: Tensor, config: Config) -> float:
    used = torch.zeros(len(ids), config.n_group).scatter(1, ids // (config.n_routed_experts // config.n_group), 1.0)
    return float(used.sum(1).mean())
