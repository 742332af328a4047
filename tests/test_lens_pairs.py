"""Experts together: counts are counts, and what is called more than chance is more than chance."""

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from routings import choose, routed

from workbench.errors import RequestError
from workbench.lens.independent import pair_rates
from workbench.lens.null import adjusted, higher, lower, spread, swapped
from workbench.lens.pairs import (
    beyond_chance,
    chains,
    coactivation,
    lift,
    mutual_information,
    strongest,
    transitions,
)

SMALL = [[[0, 1]], [[1, 2]], [[0, 1]], [[3, -1]], [[-1, -1]]]  # 5 tokens, 1 layer, 2 slots


def router(seed, tokens, experts=32, k=4, groups=8, limit=3):
    """One layer's choices [N, 1, k] from logits without any affinity, some experts liked more than others."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)) + rng.normal(size=experts)
    return choose(logits, k, groups, limit)[:, None]


def test_coactivation_counts_tokens_that_both_experts_read():
    table = coactivation(routed(SMALL, experts=5), 1)
    assert table.loc[0, 1] == table.loc[1, 0] == 2 and table.loc[1, 2] == 1 and table.loc[0, 2] == 0
    assert np.diag(table).tolist() == [2, 3, 1, 1, 0] and table.to_numpy().dtype.kind == "i"


def test_a_phase_alone():
    trace = routed(SMALL, phase=["prefill", "prefill", "decode", "decode", "decode"])
    assert coactivation(trace, 1, "decode").loc[0, 1] == 1
    with pytest.raises(RequestError, match="phase must be"):
        coactivation(trace, 1, "answer")


def test_what_is_not_there_is_said():
    trace = routed(SMALL)
    with pytest.raises(RequestError, match="layer 7 has no recorded routing; recorded: 1"):
        coactivation(trace, 7)
    with pytest.raises(RequestError, match="read no token in decode"):
        coactivation(trace, 1, "decode")
    with pytest.raises(RequestError, match="by must be"):
        transitions(trace, 1, 1, by="weight")


@pytest.mark.parametrize(
    "experts, k, groups, limit", [(7, 3, 1, 1), (8, 3, 4, 2), (9, 4, 3, 2), (8, 2, 4, 1), (6, 1, 3, 2)]
)
def test_independent_pairs_are_those_of_all_sets_written_out(experts, k, groups, limit):
    weights = np.random.default_rng(experts).gamma(1.0, size=experts) + 0.05
    group = np.arange(experts) // (experts // groups)
    expected, total = np.zeros((experts, experts)), 0.0
    for chosen in map(list, itertools.combinations(range(experts), k)):
        if len(set(group[chosen])) <= limit:
            expected[np.ix_(chosen, chosen)] += weights[chosen].prod()
            total += weights[chosen].prod()
    expected /= total
    assert pair_rates(expected.diagonal().copy(), k, group, limit) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("groups, limit", [(1, 1), (4, 2)])
def test_rates_at_the_edge_of_what_is_possible_are_met(tokens, groups, limit):
    for seed in range(10):
        ids = router(seed, tokens, 8, 3, groups, limit)[:, 0]
        rates = np.bincount(ids.ravel(), minlength=8) / tokens
        found = pair_rates(rates, 3, np.arange(8) // (8 // groups), limit)
        assert found.diagonal() == pytest.approx(rates, abs=1e-6) and found.min() >= 0


def test_lift_of_two_that_always_come_together():
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(8)[:2] for _ in range(300)])
    ids[:60] = [8, 9]
    table = lift(routed(ids[:, None], experts=12), 1)
    assert table.loc[8, 9] > 4 and table.loc[8, 9] == table.loc[9, 8]
    assert table.loc[8, 0] == 0  # expected, and never seen
    assert np.isnan(table.loc[8, 8]) and np.isnan(table.loc[0, 11])  # itself; an expert never chosen


def test_the_group_limit_is_no_affinity():
    ids = router(0, 2000)
    same = np.equal.outer(np.arange(32) // 4, np.arange(32) // 4) & ~np.eye(32, dtype=bool)
    limited, blind = routed(ids, experts=32, groups=(8, 3)), routed(ids, experts=32)
    together = coactivation(limited, 1).to_numpy()[same]
    for trace, low, high in ((blind, 1.5, 3), (limited, 0.9, 1.1)):
        ratio = lift(trace, 1).to_numpy()[same]
        seen = ratio > 0
        assert low < together[seen].sum() / (together[seen] / ratio[seen]).sum() < high


def test_lift_where_an_edit_changed_the_number_of_experts_or_left_the_groups():
    ids = np.stack([np.random.default_rng(n).permutation(8)[:3] for n in range(400)])[:, None]
    ids[200:, :, 1:] = -1  # these read one expert: they expect no pair
    table = lift(routed(ids, groups=(4, 1)), 1).to_numpy()  # and 1 group is not kept
    assert np.nanmean(table) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("groups, limit", [(None, 0), (np.array([0, 0, 1, 2]), 2)])
def test_swapped_tables_are_all_tables_alike(groups, limit):
    start = np.array([[0, 1], [1, 2], [2, 3], [0, 3]])
    rows = list(itertools.combinations(range(4), 2))
    tables = [t for t in itertools.product(rows, repeat=4) if Counter(sum(t, ())) == Counter(start.ravel().tolist())]
    seen = Counter(
        tuple(map(tuple, np.sort(ids, 1).tolist())) for ids in swapped(start, 5000, 1, groups, limit, sweeps=4)
    )
    assert set(seen) == set(tables)
    assert sum((n - 5000 / len(tables)) ** 2 * len(tables) / 5000 for n in seen.values()) < 150  # chi2, 89 free: 1e-4


@pytest.mark.parametrize("groups, limit", [(8, 3), (1, 1)])
def test_swapping_keeps_what_it_says_it_keeps(groups, limit):
    ids = router(3, 41, groups=groups, limit=limit)[:, 0]
    ids[::7, 2:] = -1
    group = np.arange(32) // (32 // groups)
    for other in swapped(ids, 3, 0, group if groups > 1 else None, limit):
        assert ((other >= 0).sum(1) == (ids >= 0).sum(1)).all()
        assert Counter(other.ravel().tolist()) == Counter(ids.ravel().tolist())
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in other)
        assert spread(other, group).max() <= max(limit, 1) and (other != ids).any()


def test_two_that_come_together_are_found_and_chance_is_not():
    ids = router(1, 300)
    mixed = next(swapped(ids[:, 0], 1, 5, np.arange(32) // 4, 3, sweeps=60))
    at_chance = beyond_chance(routed(mixed[:, None], experts=32, groups=(8, 3)), 1, rounds=100)
    assert at_chance.share.chance > 0.05 and at_chance.share.observed < 0.1
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(300, 32))
    logits[:, 20] = logits[:, 3] + rng.normal(size=300) / 4  # of another group
    found = beyond_chance(routed(choose(logits, 4, 8, 3)[:, None], experts=32, groups=(8, 3)), 1, rounds=100)
    assert found.z.loc[3, 20] > 6 and np.isnan(found.z.loc[3, 3])
    assert found.observed.loc[3, 20] > 2 * found.expected.loc[3, 20]
    table = strongest(routed(choose(logits, 4, 8, 3)[:, None], experts=32, groups=(8, 3)), 1, 5, rounds=100)
    assert (table.loc[0, "expert"], table.loc[0, "with"]) == (3, 20) and len(table) == 5
    assert table.loc[0, "lift"] == pytest.approx(table.loc[0, "together"] / table.loc[0, "expected"])


@pytest.mark.parametrize("groups, limit", [(8, 3), (1, 1)])
def test_both_nulls_expect_the_same(groups, limit):
    ids = router(4, 500, groups=groups, limit=limit)
    trace = routed(ids, experts=32, groups=(groups, limit) if groups > 1 else None)
    shuffled = beyond_chance(trace, 1, rounds=100).expected.to_numpy()
    exact = coactivation(trace, 1).to_numpy() / lift(trace, 1).replace(0, np.nan).to_numpy()
    both = np.isfinite(exact) & (exact > 2)
    assert np.corrcoef(exact[both], shuffled[both])[0, 1] > 0.999
    assert exact[both].sum() == pytest.approx(shuffled[both].sum(), rel=0.02)


def test_one_token_has_nothing_to_shuffle():
    with pytest.raises(RequestError, match="could have been otherwise"):
        beyond_chance(routed([[[0, 1]]]), 1)


LAYERS = [
    [[0, 1], [2, 3]],
    [[0, 1], [2, 4]],
    [[2, 3], [0, 1]],
    [[2, 3], [-1, -1]],
]  # 2 layers; the last is unread in one
GATES = np.array([[[3.0, 1], [4, 0]], [[1, 1], [2, 6]], [[1, 1], [1, 1]], [[1, 1], [0, 0]]])


def test_transitions_by_hand():
    table = transitions(routed(LAYERS), 1, 2)
    assert table.loc[0, [2, 3, 4]].tolist() == [0.5, 0.25, 0.25] and table.loc[2, [0, 1]].tolist() == [0.5, 0.5]
    assert table.loc[5].isna().all()
    assert table.dropna().sum(axis=1).tolist() == pytest.approx([1] * 4)


def test_transitions_by_gate_by_hand():
    table = transitions(routed(LAYERS, gates=GATES), 1, 2, by="gate")
    # expert 0 weighs 3/4 in the first token and 1/2 in the second; there layer 2 gives (1, 0) and (1/4, 3/4)
    assert table.loc[0, [2, 3, 4]].tolist() == pytest.approx([(0.75 + 0.125) / 1.25, 0, 0.375 / 1.25])


def test_mutual_information_of_layers_that_copy_and_of_layers_that_do_not():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, (600, 1, 1))
    copied = mutual_information(routed(np.concatenate([first, (first + 3) % 8], 1)), 1, 2)
    assert copied.observed == pytest.approx(3, abs=0.05) and copied.effect > 50 and copied.chance < 0.01
    chance = mutual_information(routed(np.concatenate([first, rng.integers(0, 8, first.shape)], 1)), 1, 2)
    assert chance.chance > 0.05 and chance.observed == pytest.approx(chance.null_mean, abs=0.03)
    assert chance.null_mean > 0.02  # what a finite sample gives by itself


def test_chains_are_paths_of_the_strongest_expert():
    ids = np.array([[[0, 5], [1, 5]]] * 3 + [[[0, 5], [2, 5]]] + [[[4, 5], [-1, -1]]])
    table = chains(routed(ids, tokens=[7, 7, 8, 9, 9], layers=(1, 3)), 1)
    assert table.loc[0, [1, 3, "tokens", "share", "ids", "text"]].tolist() == [0, 1, 3, 0.75, 2, "w7"]
    assert table.loc[0, "expected"] == pytest.approx(4 * 1 * 0.75)


def test_chains_of_a_trace_nothing_was_read_in():
    with pytest.raises(RequestError, match="no token was read"):
        chains(routed([[[-1, -1]]]))


def test_higher_is_lower_turned_round():
    assert higher(5.0, [2.0, 3.0, 4.0]) == (5.0, 3.0, 1.0, 2.0, 0.25)
    assert higher(2.0, [2.0, 3.0])[4] == 1.0 and lower(2.0, [2.0, 3.0])[4] == pytest.approx(2 / 3)


def test_adjusted_is_the_procedure_of_benjamini_and_hochberg():
    p = np.array([0.041, 0.001, 0.039, 0.008, 0.9])
    ranked = sorted(p)
    for level in (0.02, 0.05, 0.07):
        passed = max((n for n in range(1, 6) if ranked[n - 1] <= level * n / 5), default=0)
        assert ((adjusted(p) <= level) == (p <= (ranked[passed - 1] if passed else -1))).all()
    assert adjusted(p.reshape(5, 1)).shape == (5, 1) and adjusted(np.array([0.5])) == 0.5


def test_lenses_of_traces_need_no_torch():
    code = "import sys; from workbench.lens import affinity, pairs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
