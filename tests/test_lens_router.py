"""What the lens says of a router is what the model's own op does, and its counts are exact."""

from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from traces import random_trace

from workbench import ops
from workbench.benchmarks.mixture import experts_by_k
from workbench.blocks import Bank
from workbench.config import Config
from workbench.errors import RequestError
from workbench.lens.mixture import left_out, sliced
from workbench.lens.router import (
    choice,
    cuts,
    dealt,
    differ,
    flips,
    limit,
    limit_by_chance,
    newcomers,
    rounding,
    sets,
)

CONFIG = replace(
    Config.preset("pocket"),
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=4.0,
)
GREEDY = replace(CONFIG, topk_method="greedy")
# groups (0 1) (2 3) (4 5) (6 7): the best experts are 2 and 6, so 4, which is third of all, is dropped with its group
LOGITS = torch.tensor([8.0, 6.0, 16.0, 2.0, 10.0, 9.0, 12.0, 1.0]).log()


def test_a_choice_says_who_was_dropped_and_who_came_instead():
    table = choice(LOGITS, CONFIG)
    assert table.index[table["chosen"]].tolist() == [2, 3, 6]
    assert table["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert table["place"].tolist() == [5, 6, 1, 7, 3, 4, 2, 8]
    assert table["kept"].tolist() == [False, False, True, True, False, False, True, True]
    assert table["probability"].tolist() == pytest.approx([n / 64 for n in (8, 6, 16, 2, 10, 9, 12, 1)], rel=1e-5)
    assert table["gate"].tolist() == pytest.approx([0, 0, 1.0, 0.125, 0, 0, 0.75, 0], abs=1e-6)
    assert choice(LOGITS, GREEDY)["kept"].all()


def test_a_choice_is_of_one_token():
    with pytest.raises(RequestError, match=r"one token are \[E\]; got \(2, 8\)"):
        choice(LOGITS.expand(2, 8), CONFIG)


def test_the_limit_is_measured_against_the_same_router_without_it():
    unharmed = torch.tensor([16.0, 12.0, 10.0, 1.0, 2.0, 3.0, 4.0, 5.0]).log()  # its best three are in two groups
    row = limit({7: torch.stack([LOGITS, unharmed])}, CONFIG).loc[7]
    assert row["tokens"] == 2 and row["changed"] == 0.5
    assert row["lost"] == pytest.approx((1 - (16 + 12 + 2) / (16 + 12 + 10)) / 2, rel=1e-5)
    assert row["groups"] == 2 and row["groups, free"] == 2.5
    with pytest.raises(RequestError, match="not from groups"):
        limit({7: LOGITS[None]}, GREEDY)


@pytest.mark.parametrize(("experts", "groups", "kept", "k"), [(8, 4, 2, 3), (12, 3, 2, 4), (6, 6, 2, 2), (8, 2, 2, 3)])
def test_sets_are_counted_as_if_one_by_one(experts, groups, kept, k):
    config = replace(CONFIG, n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=k)
    each = experts // groups
    allowed = sum(len({n // each for n in one}) <= kept for one in combinations(range(experts), k))
    assert sets(config) == allowed
    assert limit_by_chance(config) == pytest.approx(1 - allowed / comb(experts, k))
    assert sets(replace(config, topk_method="greedy")) == comb(experts, k)


def test_chance_is_what_a_random_router_does():
    config = Config.preset("pocket")
    scores = torch.randn(4000, config.n_routed_experts, generator=torch.Generator().manual_seed(0))
    assert limit({0: scores}, config)["changed"][0] == pytest.approx(limit_by_chance(config), abs=0.03)


def test_a_cut_is_the_difference_of_logits_within_the_kept_groups():
    table = cuts({3: torch.stack([LOGITS, LOGITS + 5])}, CONFIG)
    assert table[3].tolist() == pytest.approx(
        [np.log(2 / 1)] * 2, rel=1e-4
    )  # 3 was chosen, 7 was not, 4 does not count
    assert cuts({3: LOGITS[None]}, GREEDY)[3][0] == pytest.approx(np.log(10 / 9), rel=1e-3)


def test_noise_flips_nothing_where_it_is_small_and_more_where_it_grows():
    scores = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    table = flips({1: scores, 2: 10 * scores}, CONFIG, [0.0, 0.1, 10.0])
    assert table.loc[0.0].tolist() == [0, 0] and table[1].is_monotonic_increasing
    assert table.loc[0.1, 2] < table.loc[0.1, 1]  # margins ten times as wide
    assert table.equals(flips({1: scores, 2: 10 * scores}, CONFIG, [0.0, 0.1, 10.0]))


def test_rounding_leaves_clear_choices_alone():
    wide = torch.arange(8.0)[:, None] * torch.ones(8, 2)
    table = rounding({4: torch.eye(2)}, {4: wide}, CONFIG)
    assert table.index.tolist() == ["4", "any"] and table.columns.tolist() == ["input", "logits", "softmax"]
    assert (table == 0).all().all()


def test_only_what_is_rounded_can_flip():
    """Two experts whose logits differ by less than bf16 can tell at 300."""
    weight = torch.tensor([[300.0], [300.9]])
    config = replace(GREEDY, n_routed_experts=2, num_experts_per_tok=1)
    for way, flipped in rounding({0: torch.ones(1, 1)}, {0: weight}, config).loc["any"].items():
        low = weight.bfloat16().float().flatten() if way != "input" else weight.flatten()
        assert flipped == float(low.argmax() != weight.argmax())
    assert weight.bfloat16().unique().numel() == 1


def test_any_layer_counts_a_token_once():
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(2))
    routers = {n: 0.05 * torch.randn(8, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 2)}
    table = rounding({1: x, 2: x}, routers, CONFIG)
    for way in table:
        assert table.loc[["1", "2"], way].max() <= table.loc["any", way] <= table.loc[["1", "2"], way].sum() + 1e-6
    assert 0 < table.loc["any", "logits"] < 1


def test_other_order_is_no_difference():
    assert differ(torch.tensor([[1, 2], [1, 2]]), torch.tensor([[2, 1], [1, 3]])).tolist() == [False, True]


def test_newcomers_are_counted_by_token():
    before, after = torch.tensor([[0, 1], [0, 2], [3, 4]]), torch.tensor([[1, 5], [2, 5], [4, 3]])
    assert newcomers(before, after, 6).to_dict() == {5: 2}


def test_dealt_routing_keeps_the_load_and_stays_in_its_sequence():
    trace = random_trace((30, 20), scores=True, seed=3)
    other = dealt(trace, seed=1)
    assert other.tokens.equals(trace.tokens) and other != trace
    for number in range(2):
        a, b = trace.sequence(number), other.sequence(number)
        rows = [np.concatenate([t.experts, t.gates, t.margins], -1).reshape(len(t), -1) for t in (a, b)]
        order = [row[np.lexsort(np.nan_to_num(row).T)] for row in rows]
        assert np.array_equal(*order, equal_nan=True)
    assert ((other.experts < 0) == (trace.experts < 0)).all()
    assert dealt(trace, seed=1) == other and dealt(trace, seed=2) != other


def block():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 5, generator=generator), torch.randn(5, 12, generator=generator)


@pytest.mark.parametrize("parts", [1, 3, 12])
def test_a_block_is_the_sum_of_its_parts(parts):
    gate_up, down = block()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    whole = ops.linear(ops.swiglu(ops.linear(x, gate_up)), down)
    slices = zip(*sliced(gate_up, down, parts))
    outputs = torch.stack([ops.linear(ops.swiglu(ops.linear(x, g)), d) for g, d in slices], 1)
    assert outputs.shape == (7, parts, 5) and torch.allclose(outputs.sum(1), whole, atol=1e-4)


def test_a_block_is_cut_into_equal_parts_only():
    with pytest.raises(RequestError, match="width 12 cannot be cut into 5"):
        sliced(*block(), 5)


def test_what_is_left_out_is_missing():
    outputs = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 5.0], [12.0, 0.0]]])
    table = left_out(outputs)
    assert table["best"].tolist() == pytest.approx([(3 / 5 + 5 / 13) / 2, 0.0])
    assert table["at random"][2] == pytest.approx(0) and table["at random"][1] >= table["best"][1]


def test_every_number_of_experts_is_timed():
    gate_up, down = torch.randn(4, 6, 5), torch.randn(4, 5, 3)
    table = experts_by_k(torch.randn(2, 5), torch.randn(4, 5), Bank(gate_up, down), ks=(1, 4), repeats=3)
    assert table.index.tolist() == [1, 4] and (table > 0).all().all()
    assert (table["fastest"] <= table["median"]).all() and (table["median"] <= table["slowest"]).all()
