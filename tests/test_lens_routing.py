"""What is said of routing is what a direct count, a direct simulation or a search of every possibility says."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from traces import POCKET, random_trace

from workbench.edits import Ablate, TopK, to_dict
from workbench.errors import RequestError
from workbench.lens.difference import diff
from workbench.lens.load import counts, load, null_load
from workbench.lens.reuse import hit_rates, reuse_distances
from workbench.trace import Trace, new_header


def trace_of(
    experts, *, n_experts=8, layers=None, gates=None, ids=None, texts=None, logprobs=None, phases=None, **more
):
    """A trace of one sequence; experts [T, L, K], -1 where a slot is not used."""
    experts = np.array(experts)
    used, count = experts >= 0, len(experts)
    gates = np.where(used, 1.0, 0.0) if gates is None else np.array(gates, float)
    lengths = more.pop("lengths", [count])
    position = np.concatenate([range(length) for length in lengths])
    tokens = pd.DataFrame({"sequence": np.repeat(range(len(lengths)), lengths), "position": position})
    tokens["id"] = range(count) if ids is None else ids
    tokens["text"] = [f"t{n}" for n in range(count)] if texts is None else texts
    tokens["phase"] = "decode" if phases is None else phases
    tokens["logprob"] = np.nan if logprobs is None else logprobs
    tokens = tokens.assign(probability=np.nan, entropy=np.nan, ms=np.nan, cache_bytes=-1)
    events = more.pop("events", None)
    header = new_header("hand", "1", {"n_routed_experts": n_experts}, **{"sequences": [{}] * len(lengths)} | more)
    where = range(1, experts.shape[1] + 1) if layers is None else layers
    return Trace(header, tokens, where, experts, gates, np.where(used, 0.0, np.nan), None, events)


# difference


def test_a_trace_does_not_differ_from_itself():
    trace = random_trace(scores=True)
    found = diff(trace, trace)
    assert found.identical and found.first is None and found.header.empty and found.tokens["same"].all()
    assert "identical: 8 tokens" in found.summary()
    assert set(found.tokens["overlap"].dropna()) == {1.0} and (found.routing["gate shift"] == 0).all()


def test_overlap_and_gate_shift_are_those_worked_out_by_hand():
    a = trace_of([[[0, 1, 2], [3, 4, 5]], [[-1, -1, -1]] * 2], gates=[[[3, 2, 1], [1, 1, 2]], [[0, 0, 0]] * 2])
    b = trace_of([[[1, 6, 7], [5, 3, 4]], [[0, 1, 2]] * 2], gates=[[[2, 1, 1], [4, 2, 2]], [[1, 1, 1]] * 2])
    found = diff(a, b)
    assert found.tokens["overlap"].tolist()[0] == pytest.approx((1 / 5 + 1) / 2)
    assert np.isnan(found.tokens["overlap"][1])  # a has not read it
    first, second = found.routing.itertuples(index=False)
    assert (first.sequence, first.position, first.layer, first.overlap) == (0, 0, 1, 0.2)
    assert (first[4], first[5]) == ((0, 2), (6, 7)) and (second[4], second[5]) == ((), ())
    assert first[6] == pytest.approx((3 / 6 + abs(2 / 6 - 2 / 4) + 1 / 6 + 1 / 4 + 1 / 4) / 2)
    assert second[6] == 0  # the same shares under another scale
    assert "Routing overlap 0.600" in found.summary() and not found.identical


def test_tokens_are_aligned_by_position_and_part_where_the_ids_do():
    experts = [[[n]] for n in range(6)]
    a = trace_of(
        experts, ids=[7, 8, 9, 1, 1, 1], texts=list("abcxyz"), logprobs=[-1, -2, -3, -4, -5, -6], lengths=[3, 3]
    )
    b = trace_of(
        experts, ids=[7, 8, 9, 4, 1, 2], texts=list("abcdyz"), logprobs=[-1, -1, -3, -4, -4, -6], lengths=[4, 2]
    )
    found = diff(a, b)
    assert found.tokens["sequence"].tolist() == [0] * 4 + [1] * 3
    assert found.tokens["position"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert found.tokens["same"].tolist() == [True, True, True, False, True, False, False]
    assert (found.first, found.parted) == (3, {0: 3, 1: 1})
    assert found.tokens["logprob difference"].tolist()[:3] == [0, 1, 0] and found.tokens["text b"][3] == "d"
    assert found.tokens[["text a", "overlap"]].isna().values[3].all()
    words = found.summary()
    assert "Sequence 0 parts at position 3: nothing in a, 'd' in b." in words
    assert "Sequence 1 parts at position 1: 'y' in a, 'z' in b." in words
    assert "of the 4 same tokens: in b +0.250 nats" in words


def test_routing_is_averaged_apart_before_and_after_the_tokens_part():
    a = trace_of([[[0, 1]], [[2, 3]], [[4, 5]]], ids=[1, 2, 3])
    b = trace_of([[[0, 1]], [[2, 4]], [[6, 7]]], ids=[1, 2, 9])
    words = diff(a, b).summary()
    assert f"overlap {(1 + 1 / 3) / 2:.3f}" in words and "of 2 tokens before they part" in words
    assert "overlap 0.000, gate shift 1.000: the mean of 1 tokens after they part" in words


def test_what_was_set_differently_is_named_in_words():
    edits = [to_dict(Ablate(2, [3, 5])), to_dict(TopK(None, 1))]
    a = random_trace(edits=edits, sampling={"temperature": 0.3, "top_p": 0.9})
    b = random_trace(sampling={"temperature": 0.7, "top_p": 0.9}, sequences=[{"seed": 1}, {"seed": 1}])
    found = diff(a, b)
    assert found.header["a"]["edits"] == "without experts 3, 5 in layer 2; 1 expert per token in every layer"
    assert found.header["b"]["edits"] == "none" and found.header["a"]["sampling.temperature"] == 0.3
    assert found.header.loc["sequences[0].seed"].tolist() == [0, 1]
    assert not {"sampling.top_p", "sequences[1].seed", "created", "config.n_routed_experts"} & set(found.header.index)
    assert "sampling.temperature: 0.3 in a, 0.7 in b." in found.summary() and not found.identical
    joined = diff(Trace.join([a, b]), Trace.join([b, a]))
    assert joined.header["a"]["sequences[0].edits"] == found.header["a"]["edits"]


def test_an_edit_of_another_version_does_not_prevent_a_comparison():
    found = diff(random_trace(edits=[{"kind": "Swap", "layer": 1}]), random_trace())
    assert "Swap" in found.header["a"]["edits"]


def test_layers_that_both_have_are_compared():
    a, b = random_trace(layers=(1, 2, 4)), random_trace(layers=(2, 3, 4), k=2)
    found = diff(a, b)
    assert found.layers == (2, 4) and set(found.routing["layer"]) == {2, 4}
    assert found.header.loc["layers"].tolist() == [[1, 2, 4], [2, 3, 4]]
    for row in found.routing.itertuples():
        at = 5 * row.sequence + row.position
        mine, theirs = (set(t.experts[at, t.layers.index(row.layer)].tolist()) for t in (a, b))
        assert row.overlap == len(mine & theirs) / len(mine | theirs)
        assert (set(row[5]), set(row[6])) == (mine - theirs, theirs - mine)
    with pytest.raises(RequestError, match=r"no layer in common: a has \[1, 2, 4\], b has \[3, 5\]"):
        diff(a, random_trace(layers=(3, 5)))


def test_a_difference_is_shown_escaped():
    a, b = trace_of([[[0]]], ids=[1], texts=["<b>"]), trace_of([[[0]]], ids=[2], texts=["<i>"])
    page = diff(a, b)._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and "<i>" not in page


# load

HAND = trace_of(
    [[[0, 1]], [[0, 2]], [[0, 1]], [[-1, -1]]],
    n_experts=4, gates=[[[3, 1]], [[1, 1]], [[2, 2]], [[0, 0]]], phases=["prefill", "prefill", "decode", "decode"],
)  # fmt: skip


def test_load_is_that_worked_out_by_hand():
    row = load(HAND).loc[1]  # loads 3 2 1 0
    assert (
        row["tokens"] == 3
        and row["dead"] == 0.25
        and row["max_over_mean"] == 2
        and row["top_share"] == pytest.approx(5 / 6)
    )
    assert row["cv"] == pytest.approx(np.sqrt(1.25) / 1.5)
    shares = np.array([3, 2, 1]) / 6
    assert row["entropy"] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(4))


def test_load_by_gate_and_by_phase():
    assert counts(HAND).values.tolist() == [[3, 2, 1, 0]] and counts(HAND).index.tolist() == [1]
    assert counts(HAND, by="gate").values.tolist() == [[6, 3, 1, 0]]
    assert counts(HAND, "decode").values.tolist() == [[1, 1, 0, 0]]
    assert load(HAND, "prefill", "gate").loc[1, "max_over_mean"] == 4 / 1.5
    assert load(HAND, "decode")["tokens"].item() == 1


def test_counts_are_those_of_the_routing_table():
    trace = random_trace((40, 9), seed=3)
    table = trace.routing.groupby(["layer", "expert"])["gate"].agg(["size", "sum"])
    for kind, column in (("count", "size"), ("gate", "sum")):
        long = counts(trace, by=kind).stack()
        assert np.allclose(long[long > 0], table[column]) and long.sum() == pytest.approx(table[column].sum())


def test_an_even_load_and_a_load_on_one_expert_are_the_ends_of_the_scale():
    even, one = trace_of([[[n]] for n in range(8)]), trace_of([[[5]]] * 8)
    assert load(even).loc[1].tolist() == pytest.approx([8, 0, 1, 0, 1, 1 / 8])
    assert load(one).loc[1].tolist() == pytest.approx([8, np.sqrt(7), 0, 7 / 8, 8, 1])
    assert load(trace_of([[[0]]], n_experts=1))["entropy"].item() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phase": "prefill"}, "no token of phase prefill"),
        ({"phase": "later"}, "phase must be"),
        ({"by": "weight"}, "by must be"),
    ],
)
@pytest.mark.parametrize("function", [load, counts, null_load])
def test_what_cannot_be_counted_is_refused(function, options, words):
    with pytest.raises(RequestError, match=words):
        function(trace_of([[[0]]]), **options)


def test_chance_leaves_experts_unused_in_a_short_text():
    trace = trace_of([[[0, 1]], [[2, 3]], [[4, 5]]], n_experts=16)
    dead = null_load(trace, rounds=2000).loc[1, "dead"]
    assert dead["observed"] == 10 / 16 and dead["null_mean"] == pytest.approx((14 / 16) ** 3, abs=0.01)
    assert not dead["outside"]


def test_a_router_that_chooses_by_chance_is_within_its_null():
    table = null_load(random_trace((400,), layers=range(10), experts=20, seed=1), rounds=200)
    assert table["outside"].mean() < 0.2 and len(table) == 50
    assert (table["null_low"] <= table["null_mean"]).all() and (table["null_mean"] <= table["null_high"]).all()


def test_a_router_with_favourites_is_outside():
    table = null_load(trace_of([[[0, 1]]] * 50))
    assert table.loc[1, "outside"].all() and table.loc[(1, "top_share"), "observed"] == 1


def test_the_null_keeps_to_groups_where_the_router_does():
    """Two tokens, 4 groups of 2 experts, one group a token: an expert has 2 tokens in 1/4 of cases; else in 13/28."""
    trace = trace_of([[[0, 1]], [[2, 3]]])
    groups = {"n_routed_experts": 8, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}
    arrays = (trace.layers, trace.experts, trace.gates, trace.margins)
    grouped = Trace(trace.header | {"config": groups}, trace.tokens, *arrays)
    for each, chance in ((trace, 13 / 28), (grouped, 1 / 4)):
        mean = null_load(each, rounds=4000).loc[(1, "max_over_mean"), "null_mean"]
        assert mean == pytest.approx(2 + 2 * chance, abs=0.05)


def test_the_null_gives_the_gates_of_a_token_to_experts_by_chance():
    trace = trace_of([[[0, 1]]], gates=[[[3, 1]]], n_experts=4)
    row = null_load(trace, by="gate").loc[(1, "max_over_mean")]
    assert row["observed"] == row["null_mean"] == row["null_low"] == 3


def test_a_null_can_be_had_again_in_parts_too_and_needs_rounds(monkeypatch):
    trace = random_trace((30,), experts=32, k=4, config=POCKET)
    assert null_load(trace, 20, seed=4).equals(null_load(trace, 20, seed=4))
    assert not null_load(trace, 20, seed=4).equals(null_load(trace, 20, seed=5))
    whole = null_load(trace, 20, seed=4)
    monkeypatch.setattr("workbench.lens.load.CHUNK", 7 * 32)
    assert null_load(trace, 20, seed=4).equals(whole)
    with pytest.raises(RequestError, match="two rounds"):
        null_load(trace, 1)


# reuse


def batches(trace):
    """What is asked for together, in order: (layer, expert) pairs, the one with the largest gate first."""
    asked = [
        [(layer, int(expert)) for expert in trace.experts[token, n] if expert >= 0]
        for token in range(len(trace))
        for n, layer in enumerate(trace.layers)
    ]
    return [each for each in asked if each]


def lru(asked, capacity):
    cache, hits = [], 0  # the pair used last comes first
    for batch in asked:
        hits += sum(pair in cache for pair in batch)
        cache = (batch + [pair for pair in cache if pair not in batch])[:capacity]
    return hits


def best(asked, capacity):
    """The most hits of any policy: after every batch, each way to keep pairs is tried."""
    states = {frozenset(): 0}
    for batch in asked:
        after = {}
        for held, hits in states.items():
            there = held | set(batch)
            hits += len(held & set(batch))
            for kept in combinations(sorted(there), min(capacity, len(there))):
                after[frozenset(kept)] = max(hits, after.get(frozenset(kept), 0))
        states = after
    return max(states.values())


def pinned(asked, capacity):
    uses = pd.Series([pair for batch in asked for pair in batch]).value_counts()
    return sum(uses.iloc[:capacity] - 1)


@pytest.mark.parametrize("seed", range(6))
def test_hit_rates_are_those_of_a_simulation_and_of_a_search(seed):
    k = 1 + seed % 3
    trace = random_trace((6, 4), layers=(1, 3), k=k, experts=4, seed=seed)
    asked, capacities = batches(trace), [1, 2, 3, 5, 8, 100]
    table = hit_rates(trace, capacities)
    total = sum(map(len, asked))
    assert table.index.tolist() == capacities and table.columns.tolist() == ["lru", "oracle", "pinned"]
    for column, policy in (("lru", lru), ("oracle", best), ("pinned", pinned)):
        assert (table[column] * total).tolist() == pytest.approx([policy(asked, c) for c in capacities])


def test_lru_of_a_longer_trace_is_that_of_a_simulation_at_every_capacity():
    trace = random_trace((150, 50), layers=(1, 2, 3), k=3, experts=20, seed=9)
    asked, capacities = batches(trace), list(range(1, 70, 4))
    total = sum(map(len, asked))
    table = hit_rates(trace, capacities)
    assert (table["lru"] * total).tolist() == pytest.approx([lru(asked, c) for c in capacities])
    assert (table["oracle"] >= table[["lru", "pinned"]].max(axis=1)).all()
    assert table["lru"].is_monotonic_increasing and table["oracle"].is_monotonic_increasing


def test_reuse_distance_counts_the_other_pairs_used_in_between():
    rows = reuse_distances(trace_of([[[0, 1]], [[2, 0]], [[1, 2]], [[0, 3]]]))
    assert rows["distance"].tolist() == [np.inf, np.inf, np.inf, 0, 2, 0, 2, np.inf]
    assert rows.columns.tolist() == ["token", "layer", "expert", "distance"]
    assert rows["expert"].tolist() == [0, 1, 2, 0, 1, 2, 0, 3]


def test_the_same_expert_number_in_two_layers_is_two_experts():
    assert np.isinf(reuse_distances(trace_of([[[0], [0]]]))["distance"]).all()


def test_a_phase_is_looked_at_alone():
    trace = trace_of([[[0]], [[0]], [[1]]], phases=["prefill", "decode", "decode"])
    assert hit_rates(trace, [8])["lru"].item() == 1 / 3 and hit_rates(trace, [8], "decode")["lru"].item() == 0
    assert reuse_distances(trace, "decode")["token"].tolist() == [1, 2]


def test_what_the_run_hit_is_there_only_if_the_trace_knows():
    kinds = ["hit", "hit", "miss", "hit", "load"]
    table = pd.DataFrame(
        {"token": [0, 1, 1, 1, 1], "kind": kinds, "layer": 1, "expert": 0, "bytes": 8, "ms": np.nan}
    )  # fmt: skip
    trace = trace_of([[[0]], [[0]]], events=table, phases=["prefill", "decode"])
    assert hit_rates(trace, [1, 2])["realised"].tolist() == [0.75, 0.75]
    assert hit_rates(trace, [1], "decode")["realised"].item() == pytest.approx(2 / 3)
    assert "realised" not in hit_rates(trace_of([[[0]]], events=table[4:].assign(token=0)), [1])


@pytest.mark.parametrize("capacities", [[], [0], [-1], [1.5], [True]])
def test_a_capacity_is_a_whole_number(capacities):
    with pytest.raises(RequestError, match="capacities are whole numbers"):
        hit_rates(trace_of([[[0]]]), capacities)


def test_a_trace_without_routing_has_no_reuse():
    with pytest.raises(RequestError, match="no routing to look at"):
        hit_rates(random_trace(unread=1.0), [1])
    with pytest.raises(RequestError, match="no routing of phase prefill"):
        reuse_distances(trace_of([[[0]]]), "prefill")
