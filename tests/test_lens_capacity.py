"""What a cache of experts would hit is what a search of every possibility or a plain simulation says."""

import math
from itertools import combinations

import numpy as np
import pytest
from routings import routed
from traces import random_trace

import workbench as wb
from workbench.errors import RequestError
from workbench.lens.accesses import Accesses
from workbench.lens.capacity import (
    belady,
    capacity_curve,
    decayed,
    ladder,
    lru,
    lru_distances,
    most_used,
    pinned,
    reuse,
    speed_limit,
    working_set,
)
from workbench.trace import Trace

BLOCKS = 40


def accesses_of(visits, *, layers=1, blocks=BLOCKS):
    """visits: the experts of each, in order; a pass has so many layers, visited in turn."""
    number = np.repeat(np.arange(len(visits)), [len(visit) for visit in visits])
    experts = [expert for visit in visits for expert in visit]
    return Accesses(number, number % layers, experts, number // layers, blocks=blocks)


def chance(seed, *, passes=12, layers=2, experts=5, most=3, skew=0.0):
    """Visits of 1 to `most` experts; with skew the low ones are used more, and what was used a while ago comes back."""
    rng = np.random.default_rng(seed)
    popular = (1 + np.arange(experts)) ** -skew
    visits = []
    for place in range(passes * layers):
        size = rng.integers(1, most + 1)
        if skew and place > 3 * layers and rng.random() < 0.4:
            visits.append(visits[place - layers * rng.integers(1, 4)])
        else:
            visits.append(rng.choice(experts, size, replace=False, p=popular / popular.sum()).tolist())
    return accesses_of(visits, layers=layers, blocks=layers * experts)


def visits_of(accesses):
    """The visits as lists of (layer, expert), and the pass of each."""
    pairs = list(zip(accesses.layer.tolist(), accesses.expert.tolist()))
    starts = [*np.unique(accesses.visit, return_index=True)[1], len(pairs)]
    return [(pairs[a:b], int(accesses.moving[a])) for a, b in zip(starts, starts[1:])]


def best(accesses, capacity):
    """Most hits over everything a cache could do: a search through every content it can have after each visit."""
    states = {frozenset(): 0}
    for visit, _ in visits_of(accesses):
        asked, after = frozenset(visit), {}
        for held, hits in states.items():
            there, missed = sorted(held | asked), asked - held
            hits += len(held & asked)
            for kept in map(frozenset, combinations(there, min(capacity, len(there)))):
                allowed = asked <= kept if len(asked) <= capacity else kept & missed
                if allowed:
                    after[kept] = max(hits, after.get(kept, 0))
        states = after
    return max(states.values())


def simulated(accesses, capacity, value):
    """One block after the other, with plain lists: bool, the hits. value(block, its passes so far, now): what it is
    worth; of equal ones the one that was used longest ago is worth less."""
    held, recent, uses, hits = [], [], {}, []
    for visit, now in visits_of(accesses):
        recency = {block: place for place, block in enumerate(recent)}
        in_order = sorted(visit, key=lambda block: -recency.get(block, -1))
        hits += [block in held for block in visit]
        missed = [block for block in in_order if block not in held]
        for block in in_order:
            recent = [other for other in recent if other != block] + [block]
            uses.setdefault(block, []).append(now)
        # rounded: the same sum, in whatever order it was added up
        worth = {block: (round(value(block, uses[block], now), 9), recent.index(block)) for block in recent}
        for block in sorted(missed, key=worth.get):
            if len(held) == capacity:
                safe = visit if len(visit) <= capacity else []
                held.remove(min((other for other in held if other not in safe), key=worth.get))
            held.append(block)
    return np.array(hits)


CASES = [(seed, skew) for seed in range(6) for skew in (0.0, 1.2)]
CAPACITIES = range(1, 12)  # more than the 10 blocks at the end; visits of up to 3 are larger than the first


# the oracle


@pytest.mark.parametrize("seed,skew", CASES)
def test_belady_is_the_best_of_everything_a_cache_could_do(seed, skew):
    accesses = chance(seed, passes=8, experts=4, skew=skew)
    for capacity in range(1, 9):
        assert belady(accesses, capacity).sum() == best(accesses, capacity), capacity


def test_belady_keeps_what_is_needed_soonest():
    #                          a    b    c    a    b    c: with two places, one of c's rivals has to go
    hits = belady(accesses_of([[0], [1], [2], [0], [1], [2]]), 2)
    assert hits.tolist() == [False, False, False, True, False, True]


@pytest.mark.parametrize("seed,skew", [(20, 0.0), (21, 1.0), (22, 2.0)])
def test_no_policy_beats_belady_at_any_capacity(seed, skew):
    accesses = chance(seed, passes=80, layers=3, experts=9, most=4, skew=skew)
    chosen = most_used(accesses, 27)
    for capacity in range(1, 28):
        most = belady(accesses, capacity).sum()
        others = [decayed(accesses, capacity, half_life) for half_life in (0, 0.5, 4, 64, math.inf)]
        others += [lru(accesses, capacity), pinned(accesses, capacity, chosen[: capacity // 2])]
        assert max(hits.sum() for hits in others) <= most, capacity


# policies


@pytest.mark.parametrize("seed,skew", CASES)
def test_every_policy_does_what_a_plain_simulation_does(seed, skew):
    accesses = chance(seed, passes=15, skew=skew)
    chosen = most_used(chance(seed + 100, passes=15, skew=skew), 4)
    for capacity in CAPACITIES:
        pins = chosen[:capacity]
        for found, value in (
            (lru(accesses, capacity), lambda block, uses, now: 0),
            (decayed(accesses, capacity, math.inf), lambda block, uses, now: len(uses)),
            (decayed(accesses, capacity, 0.7), lambda block, uses, now: sum(2 ** ((use - now) / 0.7) for use in uses)),
            (decayed(accesses, capacity, 9), lambda block, uses, now: sum(2 ** ((use - now) / 9) for use in uses)),
            (pinned(accesses, capacity, pins), lambda block, uses, now: int(block in pins)),  # noqa: B023
        ):
            assert (found == simulated(accesses, capacity, value)).all(), capacity


@pytest.mark.parametrize("most", [1, 4])
def test_a_short_memory_is_lru_and_a_long_one_lfu(most):
    accesses = chance(7, passes=60, experts=9, most=most, skew=0.8)
    with np.errstate(over="raise"):
        decayed(accesses, 5, 1e-320)  # 2^(passes / that) is no number any more, which warns of nothing
    for capacity in range(1, 19):
        recent, often = lru(accesses, capacity), decayed(accesses, capacity, math.inf)
        for half_life in (0, 1e-320, 1e-3):
            assert (decayed(accesses, capacity, half_life) == recent).all()
        assert (decayed(accesses, capacity, 1e30) == often).all()
    assert any((lru(accesses, c) != decayed(accesses, c, math.inf)).any() for c in range(1, 19))


def test_a_distance_counts_the_other_blocks_used_since():
    accesses = accesses_of([[0, 1], [2, 0], [1, 2], [0, 3], [3]])
    inf = math.inf
    #    0 is used before 2, which is new; of 1 and 2, which were then used less and more recently, 2 comes first
    assert lru_distances(accesses).tolist() == [inf, inf, inf, 1, 2, 0, 2, inf, 0]


def test_distances_are_those_of_a_list_at_any_length():
    accesses = chance(3, passes=150, layers=3, experts=21, most=6, skew=0.5)
    recent, expected = [], []
    for visit, _ in visits_of(accesses):
        depth = {block: place for place, block in enumerate(recent)}
        expected += [depth.get(block, math.inf) for block in visit]
        for block in sorted(visit, key=lambda block: depth.get(block, math.inf)):
            recent = [block] + [other for other in recent if other != block]
    assert lru_distances(accesses).tolist() == expected


def test_a_larger_cache_of_a_stack_policy_loses_no_hit():
    accesses = chance(11, passes=60, experts=9, most=4, skew=1.0)
    for smaller in range(1, 19):
        assert not (lru(accesses, smaller) & ~lru(accesses, smaller + 1)).any()
        assert belady(accesses, smaller).sum() <= belady(accesses, smaller + 1).sum()


def test_a_cache_of_all_blocks_misses_only_what_is_new():
    accesses = chance(5, passes=40, skew=1.0)
    first = np.zeros(len(accesses), bool)
    first[np.unique(accesses.layer * 100 + accesses.expert, return_index=True)[1]] = True
    whole = accesses.blocks
    for hits in (
        belady(accesses, whole),
        lru(accesses, whole),
        decayed(accesses, whole, 3),
        pinned(accesses, whole, []),
    ):
        assert (hits == ~first).all()


def test_a_visit_larger_than_the_cache_streams_through():
    accesses = accesses_of([[0, 1, 2, 3]] * 3)
    #  the last two stay, and are used first the next time: then the other two come last
    assert lru(accesses, 2).tolist() == [False] * 4 + [False, False, True, True] + [True, True, False, False]
    assert belady(accesses, 2).sum() == 4 and lru(accesses, 3).sum() == belady(accesses, 3).sum() == 6
    often = accesses_of([[0], [0], [0], [1, 2, 3], [0]])
    assert (
        not lru(often, 2)[-1] and decayed(often, 2, math.inf)[-1]
    )  # what has been used may give way, and what is rare does
    assert not decayed(often, 1, math.inf)[-1]  # nothing is computed without a place in the cache


def test_blocks_of_one_visit_do_not_give_way_for_each_other():
    #  2 and 3 are new and rare, 0 and 1 are worth more: they go all the same, because 2 and 3 are needed together
    accesses = accesses_of([[0, 1], [0, 1], [0, 1], [2, 3], [2, 3]])
    assert decayed(accesses, 2, math.inf)[-2:].all() and pinned(accesses, 2, [(0, 0), (0, 1)])[-2:].all()
    assert belady(accesses, 2)[-2:].all()


def test_the_same_expert_of_two_layers_is_two_blocks():
    assert not lru(accesses_of([[0], [0]], layers=2), 9).any() and lru(accesses_of([[0], [0]]), 9).tolist() == [
        False,
        True,
    ]


def test_what_is_pinned_stays_once_it_was_used():
    accesses = accesses_of([[0], [1], [2], [3], [0]])
    assert not lru(accesses, 2)[-1] and pinned(accesses, 2, [(0, 0)])[-1]
    assert not pinned(accesses, 2, [(1, 0)])[-1]  # another layer's
    with pytest.raises(RequestError, match="3 blocks cannot be pinned in a cache of 2"):
        pinned(accesses, 2, [(0, 0), (0, 1), (0, 2)])


def test_most_used_are_counted_by_visit():
    accesses = accesses_of([[3, 1], [2], [1], [0], [3, 0]], layers=2)
    assert most_used(accesses, 2) == [(0, 1), (0, 3)] and most_used(accesses, 99)[-1] == (1, 2)
    assert len(most_used(accesses, 99)) == 5


# curves


def test_the_curve_is_that_of_the_policies():
    accesses = chance(2, passes=50, experts=8, skew=1.0)
    table = capacity_curve(accesses, [1, 4, 9, 16], half_life=5)
    assert table.columns.tolist() == ["share", "belady", "lru", "lfu", "blended", "static", "random"]
    assert table.index.tolist() == [1, 4, 9, 16] and table["share"].tolist() == [1 / 16, 4 / 16, 9 / 16, 1]
    counts = np.sort(np.bincount(accesses.layer * 8 + accesses.expert))[::-1]
    for capacity, row in table.iterrows():
        assert row["belady"] == belady(accesses, capacity).mean() and row["lru"] == lru(accesses, capacity).mean()
        assert row["lfu"] == decayed(accesses, capacity, math.inf).mean()
        assert row["blended"] == decayed(accesses, capacity, 5).mean()
        assert row["static"] == pytest.approx(counts[:capacity].sum() / len(accesses))
        assert row["random"] == row["share"]
    assert (table["belady"] >= table[["lru", "lfu", "blended"]].max(axis=1)).all() and table["static"].iloc[-1] == 1


def test_the_passes_that_warm_the_cache_are_not_counted():
    accesses = accesses_of([[0], [1], [0], [1], [0]], layers=1)
    assert capacity_curve(accesses, [2])[["lru", "static"]].values.tolist() == [[3 / 5, 1]]
    table = capacity_curve(accesses, [1, 2], warm=2)
    assert table["lru"].tolist() == [0, 1] and table["belady"].tolist() == [0, 1] and table["lfu"].tolist() == [0, 1]
    assert table["static"].tolist() == [2 / 3, 1]
    for warm in (5, -1):
        with pytest.raises(RequestError, match=f"there are 5 passes: no {warm}"):
            capacity_curve(accesses, [2], warm=warm)


def test_a_set_chosen_by_chance_hits_as_often_as_it_is_large():
    accesses = chance(4, passes=40, experts=6, skew=1.0)
    rng, found = np.random.default_rng(0), []
    blocks = [(layer, expert) for layer in range(2) for expert in range(6)]
    for _ in range(2000):
        there = {blocks[n] for n in rng.choice(12, 5, replace=False)}
        found.append(np.mean([pair in there for pair in zip(accesses.layer.tolist(), accesses.expert.tolist())]))
    assert capacity_curve(accesses, [5])["random"].item() == pytest.approx(np.mean(found), abs=0.02)


def test_the_ladder_leads_from_a_visit_to_all_blocks():
    accesses = accesses_of([[0, 1, 2], [3, 4, 5], [0, 2, 6], list(range(20))])
    assert ladder(accesses) == [3, 6, 12, 24, 40] == capacity_curve(accesses).index.tolist()


@pytest.mark.parametrize("wrong", [[], [0], [-3], [1.5], [True]])
def test_capacities_and_windows_are_whole_numbers(wrong):
    accesses = accesses_of([[0], [1]])
    for ask in (capacity_curve, working_set, reuse):
        with pytest.raises(RequestError, match="whole number, 1 or more"):
            ask(accesses, wrong)
    for policy in (belady, lru, lambda *given: decayed(*given, 3), lambda *given: pinned(*given, [])):
        with pytest.raises(RequestError, match="whole number, 1 or more"):
            policy(accesses, wrong[0] if wrong else 0)


@pytest.mark.parametrize("half_life", [-1, math.nan])
def test_a_half_life_is_not_negative(half_life):
    with pytest.raises(RequestError, match="0 .LRU. to infinity"):
        decayed(accesses_of([[0]]), 1, half_life)


# windows and reuse


def test_the_working_set_is_that_of_every_window():
    accesses = chance(6, passes=30, experts=12, most=5, skew=0.7)
    of = [{pair for visit, now in visits_of(accesses) if now == p for pair in visit} for p in range(30)]
    table = working_set(accesses, (1, 2, 7, 30, 99))
    for window, row in table.iterrows():
        sizes = [len(set().union(*of[p : p + window])) for p in range(max(1, 31 - window))]
        assert row["mean"] == pytest.approx(np.mean(sizes)) and row["max"] == max(sizes)
        assert row["share"] == pytest.approx(np.mean(sizes) / 24)
    assert table["max"].iloc[-1] == len({*zip(accesses.layer.tolist(), accesses.expert.tolist())})


def test_a_layer_visited_twice_in_a_pass_counts_its_blocks_once():
    accesses = Accesses([0, 1, 2, 3], [0] * 4, [5, 5, 5, 6], [7, 7, 9, 9], blocks=8)
    assert working_set(accesses, [1, 2])["mean"].tolist() == [1.5, 2]
    assert reuse(accesses, [1])["observed"].item() == 1 and lru(accesses, 1).tolist() == [False, True, True, False]
    once = Accesses([0, 1, 2], [0] * 3, [5, 5, 6], [7, 7, 9], blocks=8)
    assert reuse(once, [1])["observed"].item() == 0  # the same pass is not a later one


def test_reuse_counts_uses_that_come_again_soon_enough():
    #  by hand: of nine uses before the last pass, 0, 1 and 0 come in the next one; of six before the last three, one
    #  (1, in the third pass) does not come within three
    table = reuse(accesses_of([[0, 2], [0, 1], [1, 3], [0, 2], [0], [3]]), (1, 3))
    assert table["observed"].tolist() == pytest.approx([3 / 9, 5 / 6])
    with pytest.raises(RequestError, match="6 passes later: there are 6 passes"):
        reuse(accesses_of([[0]] * 6), [6])
    with pytest.raises(RequestError, match="at least two rounds"):
        reuse(accesses_of([[0]] * 6), [1], rounds=1)


def test_draws_by_chance_are_reused_as_chance_has_it_and_a_habit_is_not():
    rng = np.random.default_rng(8)
    popular = 1 / (1 + np.arange(20))
    visits = [rng.choice(20, 3, replace=False, p=popular / popular.sum()).tolist() for _ in range(400)]
    loose = reuse(accesses_of(visits), rounds=100, seed=1)
    assert not loose["outside"].any() and loose["ratio"].tolist() == pytest.approx([1, 1], abs=0.1)
    held = reuse(
        accesses_of(sorted(map(sorted, visits))), rounds=100, seed=1
    )  # the very same visits, those alike together
    assert held["outside"].all() and held["ratio"][1] > 1.3 and held["ratio"][8] > 1.02
    assert held["null_mean"].tolist() == pytest.approx(loose["null_mean"].tolist(), rel=0.02)
    uses = np.bincount(np.concatenate(visits))
    for within, row in loose.iterrows():  # none of the other uses of a block is among the next passes
        never = [math.comb(399 - within, use - 1) / math.comb(399, use - 1) for use in uses]
        assert row["null_mean"] == pytest.approx(1 - (uses * never).sum() / uses.sum(), abs=0.005)
    assert reuse(accesses_of(visits), rounds=5, seed=2).equals(reuse(accesses_of(visits), rounds=5, seed=2))


def test_less_reuse_than_by_chance_is_told_as_well():
    table = reuse(accesses_of([[0], [1]] * 30), [1], rounds=50)
    assert table["observed"].item() == table["ratio"].item() == 0 and table["outside"].item()


def test_what_is_used_once_has_no_null_to_be_compared_with():
    table = reuse(accesses_of([[0], [1], [2]]), [1], rounds=3)
    assert table["observed"].item() == 0 and np.isnan(table["ratio"].item()) and not table["outside"].item()


def test_speed_is_limited_by_what_misses():
    # 59 layers x 6 experts of 12 MB, three quarters at hand, over a disk of 3 GB/s
    assert speed_limit(0.75, 12e6, 59 * 6, 3e9) == pytest.approx(3e9 / (88.5 * 12e6))
    assert speed_limit(1, 12e6, 354, 3e9) == math.inf and type(speed_limit(np.float64(1), 1, 1, 1)) is float
    for wrong, what in (((1.1, 1, 1, 1), "share"), ((math.nan, 1, 1, 1), "share"), ((0.5, 1, 0, 1), "above 0")):
        with pytest.raises(RequestError, match=what):
            speed_limit(*wrong)


# accesses


@pytest.mark.parametrize("chunk", [1, 2, 512])
def test_a_trace_is_read_in_chunks_of_the_prompt_and_then_token_by_token(chunk):
    prompt = np.array([[[4, 1], [0, -1]], [[1, 2], [0, 3]], [[5, 4], [3, 7]]])
    answer = np.array([[[6, 0], [1, 2]], [[-1, -1], [-1, -1]]])  # the last token was never read
    parts = [routed(prompt, layers=(2, 5)), routed(answer, layers=(2, 5), phase="decode")]
    other = Trace.join([parts[0], parts[0]])
    trace = Trace.join([*parts, other])
    found = visits_of(Accesses.from_trace(trace, chunk))
    chunks = [prompt[n : n + chunk] for n in range(0, 3, chunk)]
    passes = [*chunks, answer[:1], *chunks, *chunks]
    expected = []
    for number, tokens in enumerate(passes):
        for place, layer in enumerate((2, 5)):
            expected.append(([(layer, e) for e in sorted({*tokens[:, place].ravel().tolist()} - {-1})], number))
    assert found == expected and Accesses.from_trace(trace, chunk).blocks == 16


def test_a_prompt_after_an_answer_is_another_pass():
    trace = random_trace((9,), layers=(1,), k=1, unread=0)
    tokens = trace.tokens.assign(phase=["prefill"] * 2 + ["decode"] * 2 + ["prefill"] * 3 + ["decode"] * 2)
    talk = Trace(trace.header, tokens, trace.layers, trace.experts, trace.gates, trace.margins)
    used = trace.experts[:-1, 0, 0].tolist()
    groups = [used[:2], used[2:3], used[3:4], used[4:7], used[7:8]]
    assert [[e for _, e in visit] for visit, _ in visits_of(Accesses.from_trace(talk))] == [
        sorted({*g}) for g in groups
    ]
    answers = Accesses.from_trace(talk, phase="decode")
    assert answers.expert.tolist() == [used[2], used[3], used[7]] and answers.moving.tolist() == [0, 1, 2]
    assert len(visits_of(Accesses.from_trace(talk, phase="prefill"))) == 2


def test_without_accesses_there_is_nothing_to_measure():
    with pytest.raises(RequestError, match="no accesses"):
        Accesses([], [], [], [], blocks=4)
    with pytest.raises(RequestError, match="no token of this trace"):
        Accesses.from_trace(random_trace(unread=1.0))
    with pytest.raises(RequestError, match="no token of phase decode"):
        Accesses.from_trace(routed([[[0]]]), phase="decode")
    with pytest.raises(RequestError, match="chunk of 0"):
        Accesses.from_trace(routed([[[0]]]), chunk=0)


@pytest.mark.parametrize(
    "parts,what",
    [
        (([0, 0], [1, 1], [2, 3], [0]), "one entry of each"),
        (([1, 0], [1, 1], [2, 3], [0, 0]), "visit must never fall"),
        (([0, 1], [1, 1], [2, 3], [1, 0]), "moving must never fall"),
        (([0, 0], [1, 2], [2, 3], [0, 0]), "layer must be the same"),
        (([0, 0], [1, 1], [2, 3], [0, 1]), "moving must be the same"),
        (([0, 0, 0], [1, 1, 1], [2, 3, 2], [0, 0, 0]), "twice in a visit"),
        (([0, 1], [1, -1], [2, 3], [0, 0]), "numbered from 0"),
        (([0, 1], [1, 1], [2, 3.5], [0, 0]), "expert must be a row of whole numbers"),
        (([0, 1], [1, 1], [2, math.nan], [0, 0]), "whole numbers"),
        (([0, 1, 2], [1, 1, 1], [2, 3, 4], [0, 0, 0]), "3 different blocks were asked for, but there are 2"),
    ],
)
def test_accesses_that_cannot_be_are_refused(parts, what):
    with pytest.raises(RequestError, match=what):
        Accesses(*parts, blocks=2)


def test_the_log_of_a_store_is_read_as_it_is():
    rows = np.array([[3, 1], [3, 2], [4, 1]], float)  # pass and layer of each visit
    visit, key = np.array([0, 0, 1, 2, 2], np.int32), np.array([1, 6, 9, 6, 7], np.int32)
    accesses = Accesses(visit, rows[visit, 1], key % 8, rows[visit, 0], blocks=16)
    assert visits_of(accesses) == [([(1, 1), (1, 6)], 3), ([(2, 1)], 3), ([(1, 6), (1, 7)], 4)]
    key[:] = 0
    assert accesses.expert.tolist() == [1, 6, 1, 6, 7]  # a copy: the log goes on
    assert lru(accesses, 16).tolist() == [False, False, False, True, False]


def test_the_experts_of_a_real_answer():
    trace = wb.load("pocket").generate([{"role": "user", "content": "Hello! What is 2 + 3?"}]).trace
    accesses = Accesses.from_trace(trace)
    read = (trace.experts >= 0).any((1, 2))
    decode = (trace.tokens["phase"] == "decode").to_numpy()
    assert accesses.blocks == 5 * 32 and accesses.moving[-1] == (read & decode).sum()
    answers = Accesses.from_trace(trace, phase="decode")
    assert len(answers) == (trace.experts[decode] >= 0).sum()
    table = capacity_curve(accesses)
    assert table.index[-1] == 160 and (table["belady"] >= table[["lru", "lfu", "blended"]].max(axis=1)).all()
    assert (
        table["belady"].iloc[-1]
        == table["lru"].iloc[-1]
        == 1 - len(np.unique(accesses.layer * 32 + accesses.expert)) / len(accesses)
    )
    assert working_set(answers)["mean"].iloc[0] == 20 and reuse(answers, [1])["observed"].item() > 0
