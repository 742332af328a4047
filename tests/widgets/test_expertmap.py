"""The expert map: what it says is what the store did, and a page that hears its few bytes knows the same."""

import gc
import json
import threading
import weakref
from collections import Counter

import numpy as np
import offload
import pytest
import torch

from workbench.errors import RequestError
from workbench.experts import Resident
from workbench.traffic import Traffic
from workbench.transfers import DISK, FAR, NEAR, Visit
from workbench.widgets import expertmap, tally
from workbench.widgets.expertmap import ExpertMap, gaps, packed, small


class Page:
    """Decodes what the browser half is told."""

    def __init__(self, view):
        self.sizes, self.kinds, self.cells = [], [], 0
        view._tell = self.hear

    def hear(self, message, buffers=()):
        said = json.dumps(message)
        self.sizes.append(len(said) + sum(map(len, buffers)))
        self.kinds.append(message["kind"])
        message = json.loads(said)
        getattr(self, message["kind"])(message, [np.frombuffer(part, np.uint8) for part in buffers])

    def show(self, message, buffers):
        states, uses, seen = buffers
        self.cells = len(message["facts"]["layers"]) * message["facts"]["experts"]
        self.states = codes(states, self.cells)
        self.uses, self.seen = wide(uses, self.cells), wide(seen, self.cells)
        self.tokens, self.done, self.best = message["tokens"], message["done"], message["best"]

    def news(self, message, buffers):
        if not self.cells:
            return
        changed, states, used = buffers
        if len(changed):
            keys = ungapped(changed)
            self.states[keys] = codes(states, len(keys))
        elif len(states):
            self.states = codes(states, self.cells)
        passes, start = message.get("passes", []), 0
        for at, length in zip(passes[::2], passes[1::2], strict=True):
            part, start = used[start : start + length], start + length
            bits = length == -(-self.cells // 8)
            keys = np.flatnonzero(np.unpackbits(part, bitorder="little")) if bits else ungapped(part)
            self.uses[keys] += 1
            self.seen[keys] = self.tokens = at
        assert start == len(used)
        self.done += message.get("done", [])
        self.best = message.get("best", self.best)


def codes(packed, count):
    return ((packed[:, None] >> np.array([0, 2, 4, 6])) & 3).reshape(-1)[:count].astype(np.uint8)


def wide(numbers, count):
    return numbers.view(f"<u{len(numbers) // count}").astype(np.int64) if len(numbers) else np.zeros(count, np.int64)


def ungapped(coded):
    keys, key = [], -1
    for gap in coded.tolist():
        key += gap
        if gap < 255:
            key += 1
            keys.append(key)
    return np.array(keys, dtype=int)


@pytest.fixture
def made():
    views = []

    def make(store):
        views.append(ExpertMap(store))
        return views[-1]

    yield make
    for view in views:
        view.close()


@pytest.fixture
def rng():
    return np.random.default_rng()


def tokens_of(rng, store, count, favour=None):
    """A pass of `count` tokens: what each layer was asked for."""
    asked = []
    for layer in store.layers:
        chosen = store.config.num_experts_per_tok
        weights = None if favour is None else favour[layer - 1] / favour[layer - 1].sum()
        ids = np.stack([rng.choice(store.experts, chosen, replace=False, p=weights) for _ in range(count)])
        offload.visit(store, layer, ids)
        asked.append(set(ids.reshape(-1).tolist()))
    return asked


SHAPES = {
    "small": {"layers": 3, "experts": 11, "chosen": 3, "slots": 13},
    "staged": {"layers": 4, "experts": 37, "chosen": 2, "slots": 9, "far": 31, "computed": False},
    "wide": {"layers": 2, "experts": 700, "chosen": 3, "slots": 40, "ahead": 2},
}


def test_it_says_where_each_is_and_when_it_was_used(made, rng):
    store, _ = offload.pages(**SHAPES["staged"])
    view, uses, seen, tokens = made(store), Counter(), {}, 0
    for count in (5, 1, 1, 3, 1):
        tokens += count
        for layer, asked in zip(store.layers, tokens_of(rng, store, count), strict=True):
            for expert in asked:
                uses[layer, expert] += 1
                seen[layer, expert] = tokens
    view.update()
    where = store.where()
    names = {NEAR: "near", FAR: "far", DISK: "disk"}
    assert view.counts() == Counter(names[code] for code in where.reshape(-1).tolist()) | {"moving": 0}
    assert view.where().loc[2].tolist() == [names[code] for code in where[1]]
    words = {NEAR: "in place of VRAM", FAR: "in main memory", DISK: "on disk"}
    for layer in store.layers:
        for expert in range(store.experts):
            said = f"layer {layer}, expert {expert}: {words[where[layer - 1, expert]]}, "
            ago = tokens - seen.get((layer, expert), 0)
            when = {0: "just now", 1: "1 token ago"}.get(ago, f"{ago} tokens ago")
            times = uses[layer, expert]
            said += {0: "never used", 1: f"used once, {when}"}.get(times, f"used {times} times, last {when}")
            assert view.describe(layer, expert) == said
    for wrong in ((0, 1), (5, 1), (1, 37), (1, -1)):
        with pytest.raises(RequestError, match="37, numbered from 0, in each of the layers 1 to 4"):
            view.describe(*wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_page_knows_what_the_kernel_knows(made, rng, shape, monkeypatch):
    store, _ = offload.pages(**SHAPES[shape])
    view = made(store)
    page = Page(view)
    tokens_of(rng, store, 4)
    view.update()
    view._show(None)
    page.kinds.clear()
    real, size = store.where, len(store.layers) * store.experts
    for turn in range(30):
        for _ in range(rng.integers(0, 4)):
            tokens_of(rng, store, int(rng.choice([1, 1, 1, 20])))
        if turn % 3:  # whatever it says, of as many as may change between two looks
            told = real().reshape(-1)
            told[rng.choice(size, int(size * rng.random()), replace=False)] = rng.integers(4)
            monkeypatch.setattr(store, "where", lambda told=told: told.reshape(len(store.layers), -1).copy())
        view.update()
        assert (page.states == view._where.reshape(-1)).all()
        assert (page.uses == view._tally.uses).all()
        assert (page.seen == view._tally.seen).all() and page.tokens == view._tally.tokens
        assert [row[0] for row in page.done] == view.passes()["tokens"].tolist()
    assert set(page.kinds) == {"news"}
    told = len(page.kinds)
    view.best  # noqa: B018
    view.update()
    assert len(page.kinds) == told + 1 and page.best[2] == view.best.passes
    view.update()
    assert len(page.kinds) == told + 1, "nothing is said while nothing happens"


def test_a_page_that_heard_nothing_for_long_is_told_anew(made, rng):
    store, _ = offload.pages(**SHAPES["small"])
    view = made(store)
    page = Page(view)
    view._show(None)
    for _ in range(1200):
        tokens_of(rng, store, 1)
    view.update()
    assert page.kinds == ["show", "show"] and (page.uses == view._tally.uses).all()
    assert len(page.done) == expertmap.SHOWN
    tokens_of(rng, store, 1)
    view.update()
    assert page.kinds[-1] == "news" and len(page.done) == expertmap.SHOWN + 1 and page.tokens == 1201


def test_a_token_of_the_large_model_is_a_few_hundred_bytes(made, rng):
    store, _ = offload.pages(layers=59, experts=160, chosen=6, slots=2000)
    view = made(store)
    page = Page(view)
    favour = rng.random((59, 160)) ** 9
    tokens_of(rng, store, 3, favour)
    view._show("new")
    assert page.sizes[0] < 25_000
    for _ in range(3):
        before = store.where()
        view.update()
        tokens_of(rng, store, 1, favour)
        changed = int((store.where() != before).sum())
        view.update()
        assert page.kinds[-1] == "news" and page.sizes[-1] <= 354 + 1.25 * changed + 60 + 150, changed
    assert page.sizes[-1] < 1000


def test_keys_far_apart_and_codes_come_back(rng):
    for keys in ([], [0], [254], [255], [256], [0, 1, 255, 256, 511, 512, 9439], [9000]):
        assert ungapped(np.frombuffer(gaps(np.array(keys, int)), np.uint8)).tolist() == keys
    for count in (0, 1, 4, 9439):
        some = rng.integers(0, 4, count).astype(np.uint8)
        assert (codes(np.frombuffer(packed(some), np.uint8), count) == some).all()
    for most in (0, 255, 256, 65_535, 65_536):
        numbers = np.array([most, 0, 0])
        assert (wide(np.frombuffer(small(numbers), np.uint8), 3) == numbers).all()


def test_nothing_without_foresight_beats_the_perfect_cache(made, rng, monkeypatch):
    monkeypatch.setattr(tally, "WINDOW", 12)
    for policy in ("lru", "lfu", "blended"):
        store, _ = offload.pages(layers=3, experts=11, chosen=3, slots=14, policy=policy)
        view, favour = made(store), rng.random((3, 11)) ** 3
        for number in range(40):
            tokens_of(rng, store, 1, favour)
            best = view.best
            assert best.passes == min(12, number + 1) and best.own <= best.oracle <= 1
            if number < 12:
                traffic = Traffic.of(store)
                assert (best.own, best.oracle) == (traffic.hit_rate, traffic.oracle)
        assert best.own == store.transfers.hits[-12 * 9 :].mean()
        # one with a slot for each keeps what it has, whatever came before the window
    store, _ = offload.pages(layers=3, experts=11, chosen=3, slots=33)
    for _ in range(40):
        tokens_of(rng, store, 1)
    assert made(store).best[:2] == (1.0, 1.0) or not (store.where() == NEAR).all()


def test_passes_are_summed_and_a_stopped_one_counts_when_the_next_begins(made, rng):
    store, _ = offload.pages(**SHAPES["small"])
    view = made(store)
    assert view.best is None and view.passes().empty
    tokens_of(rng, store, 6)
    offload.visit(store, 1, [[0, 1, 2]])
    view.update()
    assert view.passes().index.tolist() == [0]
    offload.visit(store, 2, [[0, 1, 2]])
    view.update()
    tokens_of(rng, store, 1)
    view.update()
    table, traffic = view.passes(), Traffic.of(store)
    assert table["tokens"].tolist() == [6, 1, 1] and table["needed"].tolist()[1:] == [6, 9]
    read = store.transfers.rows[:, 8]
    assert table["MB a token"].tolist() == pytest.approx(
        [read[:3].sum() * 4096 / 6e6, read[3:5].sum() * 4096 / 1e6, read[5:].sum() * 4096 / 1e6]
    )
    assert table["ms waited a token"].iloc[-1] == pytest.approx(1e3 * store.transfers.rows[5:, 10].sum())
    answers = table.iloc[1:]
    assert (answers["hit rate"] * answers["needed"]).sum() == traffic.table.loc["answer", "hits"]


def test_a_visit_that_is_being_written_waits_for_the_next_look(made, rng):
    store, _ = offload.pages(**SHAPES["small"])
    view = made(store)
    tokens_of(rng, store, 1)
    moves = store.transfers
    moves._rows[moves.visits] = Visit(2, 1, 1, 2, 0, 0, 2, 0, 2, 0, 0.0, 0.0)
    moves._keys[moves.asked : moves.asked + 2] = [4, 7]
    moves._of[moves.asked : moves.asked + 2] = moves.visits
    moves.asked += 2  # it is not counted yet
    view.update()
    assert view._tally.uses.sum() == 9 and view._tally.tokens == 1
    moves.visits += 1
    view.update()
    assert view._tally.uses.sum() == 11 and view._tally.tokens == 2 and "just now" in view.describe(1, 7)


def test_it_looks_while_the_store_works(made, rng):
    store, _ = offload.pages(layers=3, experts=37, chosen=3, slots=20, far=40, ahead=2)
    view = made(store)
    page = Page(view)
    view._show(None)
    work = threading.Thread(target=lambda: [tokens_of(rng, store, 1) for _ in range(150)])
    work.start()
    while work.is_alive():
        view.update()
        assert view.best is None or 0 <= view.best.own <= 1
    work.join()
    view.update()
    assert (page.uses == np.bincount(store.transfers.accesses[1], minlength=111)).all()
    assert (page.states == store.where().reshape(-1)).all() and len(view.passes()) == 150


def test_its_thread_begins_with_a_page_and_ends_with_it(rng, monkeypatch):
    monkeypatch.setattr(expertmap, "INTERVAL", 0.01)
    store, _ = offload.pages(**SHAPES["small"])
    view = ExpertMap(store)
    page, told = Page(view), threading.Event()
    tokens_of(rng, store, 1)
    running = lambda: [t for t in threading.enumerate() if t.name == "workbench-expertmap"]  # noqa: E731
    assert not running()
    view._handle_custom_msg({"kind": "ready", "view": "one"}, [])
    view._handle_custom_msg({"kind": "ready", "view": "two"}, [])
    assert len(running()) == 1 and page.kinds.count("show") == 2
    news, page.news = page.news, lambda *said: (news(*said), told.set())
    tokens_of(rng, store, 1)
    assert told.wait(5), "it looks by itself"
    view.close()
    assert not running()
    kept = weakref.ref(store)
    del store
    gc.collect()
    assert kept() is None, "a closed map holds no weights"
    assert sum(view.counts().values()) == 33 and "layer 1" in view.describe(1, 0)


def test_a_model_without_far_experts_is_told_to_be_opened_with_a_budget():
    with pytest.raises(RequestError, match="all experts of this model are in memory.*budget"):
        ExpertMap(Resident())


def test_without_a_browser_there_are_a_picture_and_a_table(made, rng):
    store, _ = offload.pages(**SHAPES["staged"])
    view = made(store)
    empty = view._repr_mimebundle_()
    assert empty["image/png"][:4] == b"\x89PNG" and "148 on disk" in empty["text/html"]
    tokens_of(rng, store, 1)
    page = view._repr_mimebundle_()
    assert page["image/png"] != empty["image/png"]
    assert f"{view.counts()['near']} in place of VRAM" in page["text/plain"]
    view.best  # noqa: B018
    assert "a perfect cache of the same size" in view._repr_mimebundle_()["text/html"]
    assert "MB a token" in page["text/html"]


def test_a_real_answer_is_seen(made):
    model = offload.resident()
    lent = offload.offloaded(model, offload.Shelf(model), slots=20)
    view = made(lent.store)
    with torch.inference_mode():
        lent(torch.randint(0, 600, (1, 9)))
    view.update()
    assert view.passes()["tokens"].tolist() == [9] and view.counts()["near"] <= 20
    assert "in memory" in repr(view)
