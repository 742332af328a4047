"""Traffic says what a store did: counts by hand, by a plain recount, and beside what a perfect cache would have hit."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import offload
import pytest

from workbench.errors import RequestError
from workbench.experts import Resident
from workbench.lens.capacity import decayed
from workbench.traffic import Traffic
from workbench.transfers import NEAR, Transfers, Visit

BLOCK = 4096


def drive(store, passes):
    """Each pass visits all layers: ids[layer] of it are lists of experts, a list a token. How many each visit hit."""
    hits = []
    for layers in passes:
        for layer, ids in enumerate(layers, start=1):
            near = set(np.flatnonzero(store.where()[layer - 1] == NEAR))
            hits.append(len(near & {expert for token in ids for expert in token}))
            offload.visit(store, layer, ids)
    return hits


BY_HAND = [  # two layers, each a list of tokens of two experts
    [[[0, 1], [2, 1], [2, 0]], [[0, 1], [1, 0], [0, 1]]],
    [[[1, 2]], [[1, 2]]],
    [[[1, 0]], [[2, 1]]],
]


def test_a_table_by_hand():
    store, shelf = offload.pages(layers=2, experts=5, chosen=2, slots=4, policy="lru")
    drive(store, BY_HAND)
    traffic = Traffic.of(store)
    prompt, answer = traffic.table.loc["prompt"], traffic.table.loc["answer"]
    wanted = {
        "passes": (1, 2), "tokens": (3, 2), "accesses": (5, 8), "hits": (0, 6), "from_far": (0, 0),
        "from_disk": (5, 2), "early": (0, 0), "computed_far": (0, 0), "hit_rate": (0, 0.75),
        "disk_bytes": (5 * BLOCK, 2 * BLOCK), "link_bytes": (0, 0),
    }  # fmt: skip
    assert {name: (prompt[name], answer[name]) for name in wanted} == wanted
    assert traffic.hit_rate == traffic.oracle == traffic.lru == 0.75
    assert traffic.chance == 4 / 10 and traffic.slots == 4 and traffic.block == BLOCK
    assert len(shelf.reads) == 7
    rows = store.transfers.rows
    ends = rows[[1, 3, 5], -1]
    assert answer["seconds"] == pytest.approx(ends[2] - ends[0])
    assert answer["tokens_per_second"] == pytest.approx(2 / answer["seconds"])
    assert prompt["waited"] == pytest.approx(rows[:2, -2].sum()) and np.isnan(answer["foretold"])


def test_a_table_by_hand_with_main_memory_behind():
    store, shelf = offload.pages(layers=2, experts=5, chosen=2, slots=2, far=10, policy="lru", computed=False)
    drive(store, BY_HAND)
    table = Traffic.of(store).table
    assert len(shelf.reads) == 6  # b2 is the only one that the prompt did not read
    assert table.loc["prompt", ["hits", "from_far", "from_disk"]].tolist() == [0, 0, 5]
    assert table.loc["answer", ["hits", "from_far", "from_disk"]].tolist() == [0, 7, 1]
    assert table["link_bytes"].tolist() == [5 * BLOCK, 8 * BLOCK]
    there, _ = offload.pages(layers=2, experts=5, chosen=2, slots=2, far=10, policy="lru", computed=True)
    drive(there, BY_HAND)
    table = Traffic.of(there).table
    # of the prompt b0 and b1 were brought near, and no answer drives them out
    assert table.loc["answer", ["hits", "computed_far", "link_bytes"]].tolist() == [2, 6, 0]
    assert table.loc["answer", "disk_bytes"] == BLOCK


def wandering(rng, layers, experts, chosen, passes):
    """Tokens like favourites, which change slowly."""
    favour = rng.random((layers, experts)) ** 4
    for number in range(passes):
        favour += 0.1 * rng.random(favour.shape) ** 8
        tokens = 6 if number % 17 == 0 else 1
        yield [
            [rng.choice(experts, chosen, replace=False, p=row / row.sum()).tolist() for _ in range(tokens)]
            for row in favour
        ]


@pytest.mark.parametrize("policy", ["lru", "lfu", "blended", 2.5])
@pytest.mark.parametrize("slots", [3, 5, 14, 25, 33])
def test_a_recount_and_the_oracle(slots, policy):
    rng = np.random.default_rng()
    store, shelf = offload.pages(slots=slots, policy=policy)
    passes = list(wandering(rng, 3, 11, 3, 60))
    hits = drive(store, passes)
    traffic = Traffic.of(store)
    asked = [len({expert for token in ids for expert in token}) for layers in passes for ids in layers]
    alone = np.repeat([len(layers[0]) == 1 for layers in passes], 3)
    for phase, which in (("prompt", ~alone), ("answer", alone)):
        row = traffic.table.loc[phase]
        assert row["hits"] == np.array(hits)[which].sum() and row["accesses"] == np.array(asked)[which].sum()
        assert row["tokens"] == sum(len(layers[0]) for layers in passes if (len(layers[0]) == 1) == (phase == "answer"))
    assert traffic.table["disk_bytes"].sum() == len(shelf.reads) * BLOCK
    by_visit = np.bincount(traffic.accesses.visit, traffic.hits, len(hits))
    assert by_visit.tolist() == hits
    # what was asked for, in order
    wanted = [
        (layer, expert)
        for layers in passes
        for layer, ids in enumerate(layers, 1)
        for expert in sorted({expert for token in ids for expert in token})
    ]
    assert list(zip(traffic.accesses.layer.tolist(), traffic.accesses.expert.tolist())) == wanted
    assert traffic.hit_rate == pytest.approx(np.array(hits)[alone].sum() / np.array(asked)[alone].sum())
    assert traffic.oracle >= traffic.hit_rate - 1e-12
    assert traffic.chance == slots / 33
    if slots == 33:
        assert traffic.oracle == traffic.hit_rate


def test_from_a_visit_on_and_of_prompts_alone():
    store, _ = offload.pages(layers=2, experts=5, chosen=2, slots=4, policy="lru")
    drive(store, BY_HAND)
    traffic = Traffic.of(store, since=4)
    assert traffic.table.index.tolist() == ["answer"] and traffic.table.loc["answer", "accesses"] == 4
    assert traffic.table.loc["answer", "hits"] == 3 == traffic.hits.sum() and traffic.hit_rate == 0.75
    drive(store, BY_HAND[:1])
    prompts = Traffic.of(store, since=6)
    assert prompts.table.index.tolist() == ["prompt"]
    assert prompts.hit_rate == prompts.table.loc["prompt", "hit_rate"] > 0
    assert prompts.oracle <= prompts.hit_rate or prompts.oracle == 0, "the oracle begins empty, the store did not"


def test_nothing_to_report():
    store, _ = offload.pages(layers=2, experts=5, chosen=2, slots=4)
    with pytest.raises(RequestError, match="nothing"):
        Traffic.of(store)
    drive(store, BY_HAND)
    with pytest.raises(RequestError, match="nothing"):
        Traffic.of(store, since=store.transfers.visits)
    with pytest.raises(RequestError, match="memory"):
        Traffic.of(Resident())


def test_what_was_foretold():
    store, shelf = offload.pages(ahead=3, slots=25)
    drive(store, wandering(np.random.default_rng(), 3, 11, 3, 40))
    traffic = Traffic.of(store)
    row = traffic.table.loc["answer"]
    ahead = row["disk_bytes"] / BLOCK - row["from_disk"]
    assert ahead > 0 and row["foretold"] == pytest.approx(min(1, row["early"] / ahead)) and 0 <= row["foretold"] <= 1
    assert row["accesses"] == row["hits"] + row["early"] + row["from_far"] + row["from_disk"]
    assert traffic.table["disk_bytes"].sum() == (len(shelf.reads) - store.reads) * BLOCK


def test_what_is_said():
    store, _ = offload.pages(layers=2, experts=5, chosen=2, slots=4, policy="lru")
    drive(store, BY_HAND)
    traffic = Traffic.of(store)
    said = json.loads(json.dumps(traffic.to_dict(), default=float))
    assert said["phases"]["answer"]["hits"] == 6 and said["slots"] == 4 and said["chance"] == 0.4
    text = str(traffic)
    assert "4 slots" in text and "hits 75.0% of 8" in text and "40.0%" in text
    curve = traffic.curve()
    assert curve["belady"].max() <= 1 and (curve["belady"] >= curve["lru"] - 1e-12).all()
    assert traffic.working_set()["max"].max() <= 10


class Busy(Transfers):
    """Another thread is always a little further when the next thing is asked for."""

    rows = property(lambda self: self.visited(Transfers.rows.fget(self)))

    def visited(self, found):
        self.add(Visit(9, 1, 1, 2, *range(8)), np.array([0, 1]), np.array([True, False]))
        return found


def test_a_report_while_the_model_runs():
    store, _ = offload.pages(layers=2, experts=5, chosen=2, slots=4, policy="lru")
    drive(store, BY_HAND)
    store.transfers.__class__ = Busy
    assert Traffic.of(store).table.loc["answer", "hits"] >= 6


def test_passes_of_threads_that_take_turns():
    store, _ = offload.pages(layers=2, experts=5, chosen=2, slots=4)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for layer in (1, 2):  # two passes of one token, layer by layer
            for thread in (one, other):
                thread.submit(offload.visit, store, layer, [[0, 1]]).result()
    row = Traffic.of(store).table.loc["answer"]
    assert (row["passes"], row["tokens"]) == (2, 2)


@pytest.mark.parametrize("policy, half_life", [("lru", 0.0), ("lfu", np.inf), ("blended", 64.0)])
def test_the_store_is_as_good_as_its_policy(policy, half_life):
    """As lens.capacity has it, where every visit fits."""
    rng = np.random.default_rng(5)
    store, _ = offload.pages(layers=4, experts=24, chosen=3, slots=30, policy=policy)
    drive(store, [[ids[:1] for ids in layers] for layers in wandering(rng, 4, 24, 3, 300)])
    traffic = Traffic.of(store)
    assert traffic.hits.mean() >= decayed(traffic.accesses, 30, half_life).mean() - 0.01


def test_transfers_grow():
    transfers = Transfers()
    rng, asked = np.random.default_rng(), []
    for number in range(700):
        keys = rng.integers(1000, size=int(rng.integers(1, 40)))
        hits = rng.random(len(keys)) < 0.5
        view = transfers.rows
        transfers.add(Visit(number, 1, 1, len(keys), *range(8)), keys, hits)
        asked += [(number, key, hit) for key, hit in zip(keys.tolist(), hits.tolist())]
        assert len(view) == number
    visit, key = transfers.accesses
    assert list(zip(visit.tolist(), key.tolist(), transfers.hits.tolist())) == asked
    assert transfers.rows[:, 0].tolist() == list(range(700)) and transfers.nbytes < 1 << 20
