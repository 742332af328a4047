"""An offloaded model says what the resident one says, bit for bit, and its store survives whatever interrupts it."""

import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import offload
import packs
import pytest
import torch

from workbench import fetching, packed
from workbench.blocks import PAGE
from workbench.cache import LatentCache
from workbench.edits import Ablate, Add, Bias, Force, ReplayRouting, Scale, TopK
from workbench.engine import Engine
from workbench.errors import BudgetError, CheckpointError, RequestError
from workbench.offloaded import Offloaded
from workbench.opening import open_model
from workbench.packing import pack
from workbench.recipe import Recipe
from workbench.recorder import Recorder
from workbench.sampling import Sampling
from workbench.transfers import DISK, FAR, MOVING, NEAR

WAYS = {  # 48 experts in three layers, 4 of a layer for a token
    "least": {"slots": 4, "ahead": 0},
    "least, ahead": {"slots": 4},
    "lru": {"slots": 9, "ahead": 3, "policy": "lru"},
    "lfu": {"slots": 13, "ahead": 0, "policy": "lfu"},
    "a half-life": {"slots": 30, "policy": 1.5},
    "whole": {"slots": 1000, "policy": "blended"},
    "least far": {"slots": 4, "far": 4, "ahead": 0},
    "far, ahead": {"slots": 5, "far": 11, "ahead": 2, "policy": "lru"},
    "computed there": {"slots": 4, "far": 13, "computed": True},
    "copied": {"slots": 12, "far": 1000, "computed": False, "policy": "lfu"},
}
PINNED = [(1, 3), (2, 5), (3, 0), (3, 15), (1, 11)]
HOT = Sampling(temperature=1, top_p=1, max_tokens=4, seed=4)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def whole():
    """whole(case, recipe, dtype) -> the resident model."""
    made = {}

    def make(case="lite", recipe="int4", dtype=torch.float32):
        key = case, recipe, dtype
        if key not in made:
            made[key] = offload.resident(offload.CASES[case], recipe, dtype)
        return made[key]

    return make


@pytest.fixture
def shelf(whole):
    return offload.Shelf(whole())


def tokens(*shape):
    return torch.randint(offload.LITE.vocab_size, shape)


def script(given):
    """A use of everything: logits of a model in order. Prompts, a ragged batch, answers, a fork, a truncation."""
    prompts, answer = given

    def run(model):
        yield model(prompts)
        cache = LatentCache(model.config, 2, "fp32")
        yield model(prompts[:1], cache.only(0))
        yield model(prompts[1:, :7], cache.only(1))
        for one in answer.split(1, 1):
            yield model(one, cache)
        alone = cache.only(1)
        for one in answer[1:].split(1, 1):
            yield model(one, alone)
        other = alone.fork()
        yield model(answer[:1, :3], other)
        yield model(answer[1:, 1:2], alone)
        yield model(answer[:1, :1], other)
        alone.truncate(5)
        yield model(answer[:1, 2:3], alone)

    return run


def same(one, other, given):
    run = script(given)
    for number, (wanted, got) in enumerate(zip(run(one), run(other), strict=True)):
        assert torch.equal(wanted, got), (number, (wanted - got).abs().max())


@pytest.fixture(scope="module")
def given():
    return tokens(2, 41), tokens(2, 4)


# the same numbers


@pytest.mark.parametrize("case", offload.CASES)
@pytest.mark.parametrize("way", WAYS)
def test_it_says_what_the_resident_model_says(way, case, whole, given):
    model, shelf = whole(case), offload.Shelf(whole(case))
    other = offload.offloaded(model, shelf, **WAYS[way])
    same(model, other, given)
    offload.check(other.store)
    assert len(shelf.reads) == offload.total(other.store, "read") + other.store.reads
    if way == "whole":
        assert len(shelf.reads) == len(set(shelf.reads)), "with room for all, nothing is read twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ["int4", "int8", "int3", "fp8", "bf16", "int6", "int4,*.down_proj.weight=fp8"])
def test_every_recipe_in_both_types(recipe, dtype, whole, given):
    model = whole("v2", recipe, dtype)
    for way in ("least, ahead", "computed there"):
        other = offload.offloaded(model, offload.Shelf(model), recipe, **WAYS[way])
        same(model, other, given)
        offload.check(other.store)


def test_pinned_experts_stay(whole, given, shelf):
    model = whole()
    other = offload.offloaded(model, shelf, slots=22, ahead=0)
    other.store.pin(PINNED)
    same(model, other, given)
    offload.check(other.store)
    for layer, expert in PINNED:
        assert other.store.where()[layer - 1, expert] == NEAR
        assert shelf.reads.count((layer, expert)) == 1, "all are asked for by the first prompt, and stay"


EDITS = {
    "ablate": lambda trace: [Ablate(None, (0, 3, 7, 9))],
    "force": lambda trace: [Force(2, (5, 6)), Force(None, (1,), gate=0.4, phase="decode")],
    "bias": lambda trace: [Bias(1, 4, 3.0), Bias(None, 2, -3.0)],
    "one expert": lambda trace: [TopK(None, 1)],
    "more than the slots": lambda trace: [TopK(None, 7), Force(3, (15,))],
    "replay": lambda trace: [ReplayRouting(trace)],
    "replay gates": lambda trace: [ReplayRouting(trace, gates=True)],
    "scale": lambda trace: [Scale("moe.gates", 0.0, index=0), Scale("resid.mid", 1.1, layer=1)],
    "add": lambda trace: [Add("moe.expert_out", (0.3,), index=2), Add("moe.router_logits", (1.0,) + (0.0,) * 15)],
}


@pytest.mark.parametrize("case", ["lite", "v2"])
@pytest.mark.parametrize("name", EDITS)
def test_edits_and_traces(name, case, whole, tokenizer):
    model = whole(case)
    engines = [Engine(model, tokenizer, "fp32", chunk=9)]
    recorded = engines[0].generate("How many experts read it?", HOT).trace
    for way in ("least", "far, ahead", "computed there"):
        other = offload.offloaded(model, offload.Shelf(model), **WAYS[way])
        engines.append(Engine(other, tokenizer, "fp32", chunk=9))
    prompt = "Which ones, and why these?"
    wanted, *found = [
        engine.generate(prompt, HOT, edits=EDITS[name](recorded), watch=["moe.expert_out", "logits"], scores=True)
        for engine in engines
    ]
    plain = engines[0].generate(prompt, HOT, watch=["logits"])
    for got, engine in zip(found, engines[1:], strict=True):
        assert got.tokens == wanted.tokens
        for part in ("experts", "gates", "margins", "scores"):
            assert np.array_equal(getattr(got.trace, part), getattr(wanted.trace, part), equal_nan=True), part
        offload.check(engine.model.store)
    assert plain.tokens != wanted.tokens or not np.array_equal(plain.trace.gates, wanted.trace.gates), "no edit acted"


def test_probes_see_the_same(whole, given, shelf):
    model = whole()
    sites = ("moe.expert_out", "moe.experts", "moe.gates", "resid.post", "moe.routed_out")
    wanted = Recorder(*sites)
    model(given[0], None, wanted)
    for way in ("least", "far, ahead"):
        found = Recorder(*sites)
        offload.offloaded(model, shelf, **WAYS[way])(given[0], None, found)
        for site in sites:
            for layer in wanted.layers_of(site):
                assert torch.equal(wanted[site, layer], found[site, layer])


@pytest.mark.parametrize("way", ["least, ahead", "lru", "far, ahead", "computed there"])
def test_several_threads_on_one_store(way, whole, shelf):
    model = whole()
    other = offload.offloaded(model, shelf, **WAYS[way])
    shelf.before = lambda layer, expert: time.sleep(random.random() / 2000)
    each = [(tokens(2, 11 + 6 * number), tokens(2, 4)) for number in range(3)]

    def run(given):
        with torch.inference_mode():
            return list(script(given)(other))

    with ThreadPoolExecutor(3) as pool:
        for given, found in zip(each, pool.map(run, each)):
            assert all(map(torch.equal, script(given)(model), found))
    offload.check(other.store)


def test_two_generations_at_once(whole, shelf, tokenizer):
    model = whole()
    engine = Engine(offload.offloaded(model, shelf, slots=6), tokenizer, "fp32")
    alone = Engine(model, tokenizer, "fp32")
    prompts = ["The first of two", "and the second, which is a little longer than the first"]
    streams = [engine.stream(prompt, HOT) for prompt in prompts]
    turns = [[step.token for step in pair] for pair in zip(*streams)]
    for prompt, found in zip(prompts, zip(*turns), strict=True):
        assert list(found) == alone.generate(prompt, HOT).tokens
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda prompt: engine.generate(prompt, HOT, scores=True), prompts * 2)
        for prompt, found in zip(prompts * 2, done):
            wanted = alone.generate(prompt, HOT, scores=True)
            assert found.tokens == wanted.tokens and np.array_equal(found.trace.experts, wanted.trace.experts)
    together = engine.batch(prompts, HOT, slots=2)
    assert [one.tokens for one in together] == [one.tokens for one in alone.batch(prompts, HOT, slots=2)]
    offload.check(engine.model.store)


def test_what_is_read_ahead_is_not_read_again_and_counts(whole, shelf, given):
    model = whole()
    ahead, without = (offload.offloaded(model, shelf, slots=20, ahead=count) for count in (4, 0))
    for one in (ahead, without):
        cache = LatentCache(model.config, 1, "fp32")
        for token in given[0][:1].split(1, 1):
            one(token, cache)
    assert offload.total(without.store, "early") == 0 < offload.total(ahead.store, "early")
    for one in (ahead, without):
        store = one.store
        assert (
            offload.total(store, "early") + offload.total(store, "disk") <= offload.total(store, "read") + store.reads
        )
        offload.check(store)
    assert len(shelf.reads) == sum(offload.total(one.store, "read") + one.store.reads for one in (ahead, without))


def test_the_router_of_the_next_layer_foretells_itself(whole, shelf):
    """With norms alike and what this layer reads in place of what the next one reads, some of them are right."""
    model = whole()
    other = offload.offloaded(model, shelf, slots=48, ahead=4)
    x = torch.randn(1, offload.LITE.hidden_size)
    ids = torch.tensor([[0, 1, 2, 3]])
    for _ in other.store.waves(1, ids, x):
        pass
    chosen = torch.nn.functional.linear(x, model.blocks[2].mlp.router).topk(4).indices[0].tolist()
    assert sorted(key - 16 for key in other.store.early) == sorted(chosen)


# errors


def test_what_cannot_be_is_refused(whole, shelf):
    config = whole().config
    block = 4 * shelf.layout.nbytes / 1e6
    for wrong in ({"slots": 3}, {"slots": 9, "far": 3}):
        with pytest.raises(BudgetError, match=f"needs 4 of a layer, {block:,.1f} MB"):
            Offloaded(config, shelf, **wrong)
    for policy in ("mru", "LRU", ""):
        with pytest.raises(RequestError, match="lru, lfu, blended"):
            Offloaded(config, shelf, 9, policy=policy)
    whole_layout, shelf.layout = shelf.layout, offload.pages(slots=3)[1].layout
    with pytest.raises(CheckpointError, match="layer 1"):
        offload.offloaded(whole(), shelf, slots=9)
    shelf.layout = whole_layout


@pytest.mark.parametrize(
    "wrong", [{"policy": -1.0}, {"policy": float("nan")}, {"policy": None}, {"ahead": -1}], ids=str
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(RequestError):
        offload.pages(slots=9, **wrong)


@pytest.mark.parametrize("pair", [(1, 12), (1, -1), (9, 0), (1, 99)], ids=str)
def test_pins_that_are_nowhere(pair):
    with pytest.raises(RequestError):
        offload.pages(slots=9)[0].pin([pair])


@pytest.mark.parametrize("way", ["least, ahead", "lru", "far, ahead", "computed there"])
def test_a_damaged_block_is_an_error_until_it_is_repaired(way, whole, shelf, given):
    model = whole()
    other = offload.offloaded(model, shelf, **WAYS[way])
    broken = {(2, 6), (3, 1), (1, 9)}

    def before(layer, expert):
        if (layer, expert) in broken:
            raise CheckpointError(f"layer {layer}, expert {expert} is damaged")

    shelf.before = before
    while broken:
        with pytest.raises(CheckpointError, match="is damaged") as error:
            other(given[0])
        offload.check(other.store)
        with pytest.raises(CheckpointError, match="is damaged"):
            other(given[0])
        broken.remove(next(pair for pair in broken if f"layer {pair[0]}, expert {pair[1]} " in str(error.value)))
    same(model, other, given)
    offload.check(other.store)


def test_an_expert_that_could_not_be_read_ahead_fails_when_it_is_asked_for():
    store, shelf = offload.pages(layers=2, experts=8, chosen=2, ahead=2, slots=16)
    broken = True

    def before(layer, expert):
        if broken:
            raise CheckpointError("damaged")

    shelf.before = before
    with pytest.raises(CheckpointError):
        offload.visit(store, 1, [[0, 1]])
    shelf.before = lambda layer, expert: broken and layer == 2 and before(layer, expert)
    while not store.early:
        offload.visit(store, 1, [[0, 1]])
    foretold = [key - 8 for key in store.early]
    offload.visit(store, 1, [[0, 1]])  # takes in what is there; nobody asked for the others
    offload.check(store)
    with pytest.raises(CheckpointError, match="damaged"):
        offload.visit(store, 2, [[foretold[0], foretold[-1]]])
    offload.check(store)
    broken = False
    offload.visit(store, 2, [[foretold[0], foretold[-1]]])
    offload.check(store)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", ["least", "lru", "far, ahead", "computed there"])
def test_an_interrupt_while_experts_are_multiplied(way, error, whole, shelf, given, monkeypatch):
    model = whole()
    other = offload.offloaded(model, shelf, **WAYS[way])
    multiply, left = packed._by_expert, 5

    def interrupted(*args):
        nonlocal left
        left -= 1
        if left == 0:
            raise error
        multiply(*args)

    monkeypatch.setattr(packed, "_by_expert", interrupted)
    for _ in range(3):
        left = random.randint(1, 5)
        with suppress(error):
            other(given[0])
        offload.check(other.store)
    monkeypatch.undo()
    same(model, other, given)


@pytest.mark.parametrize("way", ["least", "far, ahead"])
def test_an_interrupt_while_blocks_are_awaited(way, whole, shelf, given, monkeypatch):
    """Where Ctrl-C mostly comes."""
    model = whole()
    other = offload.offloaded(model, shelf, **WAYS[way])
    shelf.before = lambda layer, expert: time.sleep(0.001)
    waiting, left = fetching.wait, 4

    def interrupted(reading, **how):
        nonlocal left
        left -= 1
        if how and left == 0:
            raise KeyboardInterrupt
        return waiting(reading, **how)

    monkeypatch.setattr(fetching, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:  # and with it the frames, that hold what they hold
        other(given[0])
    offload.check(other.store)
    del kept
    monkeypatch.undo()
    same(model, other, given)
    offload.check(other.store)


def test_an_error_while_looking_ahead(whole, shelf, given, monkeypatch):
    model = whole()
    other = offload.offloaded(model, shelf, slots=20)
    other(given[0])

    def interrupted(layer, x):
        raise KeyboardInterrupt

    for token in given[0][0, :9]:
        monkeypatch.setattr(other.store, "_look_ahead", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept:
            other(token.view(1, 1))
        monkeypatch.undo()
        offload.check(other.store)
        del kept
    same(model, other, given)


def test_a_packed_checkpoint_on_disk(tmp_path):
    """From the file to the logits, with as little memory as works, and a block that is damaged for a while."""
    folder = pack(packs.plain(tmp_path / "plain", packs.CASES["v2"]), tmp_path / "packed", "int4").path
    model = open_model(folder)
    with pytest.raises(BudgetError) as error:
        open_model(folder, vram=1, context=256)
    least = int(re.search(r"vram=(\d+)", str(error.value))[1])
    other = open_model(folder, vram=least, context=256)
    assert isinstance(other.store, Offloaded) and other.store.near.count == 2 and other.checksum == model.checksum
    prompt = torch.randint(150, (2, 30))
    assert torch.equal(other(prompt), model(prompt))
    other = open_model(folder, vram=least, context=256)
    file = folder / "experts-layer-002.safetensors"
    at = file.stat().st_size - 4096 + 77
    packs.flip(file, at)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="experts-layer-002"):
            other(prompt)
    packs.flip(file, at)
    assert torch.equal(other(prompt), model(prompt))


def test_an_interrupt_that_somebody_remembers(whole, shelf, given, monkeypatch):
    """A notebook keeps the last error, the error its frames, and they the store's lock."""
    model = whole()
    other = offload.offloaded(model, shelf, slots=4)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(packed, "_by_expert", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        other(given[0])
    monkeypatch.undo()

    def again():
        with torch.inference_mode():
            other(given[0])

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    thread.join(2)
    stuck = thread.is_alive()
    kept.value.__traceback__ = None
    del kept
    assert not stuck, "the store waits for a visit that nobody will end"


def test_an_interrupt_while_blocks_are_copied(monkeypatch):
    store, _ = offload.pages(slots=4, far=9)
    copy = store.link.copy

    def interrupted(pairs):
        copy(pairs[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(store.link, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        offload.visit(store, 1, [[0, 1, 2]])
    monkeypatch.undo()
    offload.check(store)
    del kept
    offload.visit(store, 1, torch.randint(11, (9, 3)))
    offload.check(store)


def test_a_reader_that_cannot_be_started(monkeypatch):
    store, _ = offload.pages(slots=4)
    submit, left = store.readers.submit, 2

    def refused(*args):
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("can't start new thread")
        return submit(*args)

    monkeypatch.setattr(store.readers, "submit", refused)
    with pytest.raises(RuntimeError, match="thread"):
        offload.visit(store, 1, [[0, 1, 2]])
    monkeypatch.undo()
    offload.check(store)
    offload.visit(store, 1, torch.randint(11, (9, 3)))


@pytest.mark.parametrize("kind", [OSError, MemoryError], ids=lambda kind: kind.__name__)
def test_an_error_that_no_shelf_should_raise(kind):
    store, shelf = offload.pages(slots=5, far=7)
    broken = True

    def before(layer, expert):
        if broken and expert % 2:
            raise kind("a reader died")

    shelf.before = before
    with pytest.raises(kind):
        offload.visit(store, 1, torch.arange(9).view(3, 3))
    offload.check(store)
    broken = False
    offload.visit(store, 1, torch.arange(9).view(3, 3))
    offload.check(store)


# what is always true


@pytest.mark.parametrize(
    "how",
    [
        {"slots": 3},
        {"slots": 4, "ahead": 3, "policy": "lru"},
        {"slots": 17, "ahead": 3, "policy": "lfu"},
        {"slots": 33, "ahead": 2},
        {"slots": 3, "far": 3, "ahead": 1},
        {"slots": 5, "far": 17, "ahead": 3, "policy": 2.0},
        {"slots": 6, "far": 12, "ahead": 3, "computed": True},
        {"slots": 12, "far": 5, "ahead": 2, "computed": True, "policy": "lru"},
        {"slots": 4, "far": 14, "ahead": 2, "computed": "some"},
    ],
    ids=str,
)
def test_random_visits_delays_failures_and_interrupts(how):
    store, shelf = offload.pages(**how)
    if how.get("computed") == "some":  # as a GPU shares the work
        store.link.split = lambda experts: random.randint(0, experts)
    seed = random.randrange(1 << 30)
    done = []

    def before(layer, expert):
        wait = random.random()
        time.sleep(wait / 2000 if wait < 0.5 else 0)
        if wait > 0.97:
            raise CheckpointError("damaged")

    def wander(seed):
        rng = np.random.default_rng(seed)
        for _ in range(45):
            layer = int(rng.integers(1, 4))
            ids = rng.integers(11, size=(int(rng.choice([1, 1, 2, 7])), 3))
            what = rng.random()
            pause = (lambda: time.sleep(0.0002)) if what < 0.3 else lambda: None
            waves = offload.checked(store, layer, ids, pause)
            try:
                for number, _ in enumerate(waves):
                    if what > 0.9 and number == int(rng.integers(2)):
                        raise KeyboardInterrupt
                    if what > 0.8 and number == 1:
                        break
            except (CheckpointError, KeyboardInterrupt) as error:
                done.append(type(error))
            finally:
                waves.close()

    def watch():
        while not stop.is_set():
            assert set(np.unique(store.where())) <= {NEAR, FAR, DISK, MOVING}
            rows = store.transfers.rows
            assert (rows[:, 3] == rows[:, 4:8].sum(1)).all()

    shelf.before = before
    stop = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        watching = pool.submit(watch)
        try:
            walks = [pool.submit(wander, seed + number) for number in range(3)]
            for walk in walks:
                walk.result(timeout=60)
        finally:
            stop.set()
        watching.result(timeout=60)
    assert done, f"nothing failed; seed {seed}"
    offload.check(store)
    for layer in store.layers:
        shelf.before = lambda layer, expert: None
        offload.visit(store, layer, np.arange(11)[:, None])
        offload.check(store)
    for slots in offload.tiers(store):
        assert np.count_nonzero(slots.key_of >= 0) <= slots.count
    assert offload.total(store, "read") + store.reads >= len(shelf.reads)


def test_memory_is_slots_blocks_and_a_page():
    store, shelf = offload.pages(slots=7, far=12)
    assert store.near.nbytes == 7 * 4096 + PAGE and store.far.nbytes == 12 * 4096 + PAGE
    assert store.near.slab.data_ptr() % PAGE == store.far.slab.data_ptr() % PAGE == 0
    more, _ = offload.pages(slots=1000, far=900)
    assert more.near.count == more.far.count == 33, "no slot that no expert can need"


def test_where_experts_are():
    store, _ = offload.pages(slots=3, far=6, policy="lru")
    assert (store.where() == DISK).all() and store.where().shape == (3, 11)
    offload.visit(store, 2, [[1, 4, 8]])
    assert store.where()[1].tolist() == [NEAR if expert in (1, 4, 8) else DISK for expert in range(11)]
    offload.visit(store, 3, [[0, 2, 5]])
    assert store.where()[1].tolist() == [FAR if expert in (1, 4, 8) else DISK for expert in range(11)]
    assert store.where()[2, [0, 2, 5]].tolist() == [NEAR] * 3


def test_where_experts_are_on_their_way():
    store, shelf = offload.pages(slots=3)
    begun, go_on = threading.Semaphore(0), threading.Event()

    def before(layer, expert):
        begun.release()
        go_on.wait(5)

    shelf.before = before
    thread = threading.Thread(target=offload.visit, args=(store, 2, [[1, 4, 8]]))
    thread.start()
    for _ in range(3):
        begun.acquire(timeout=5)
    seen = store.where()
    go_on.set()
    thread.join()
    assert seen[1].tolist() == [MOVING if expert in (1, 4, 8) else DISK for expert in range(11)]


# which expert goes


@pytest.mark.parametrize("policy, goes", [("lru", 0), ("lfu", 1), (1e9, 1), (1e-9, 0)])
def test_which_expert_goes(policy, goes):
    store, shelf = offload.pages(layers=1, experts=5, chosen=1, slots=3, policy=policy)
    for expert in (0, 0, 0, 1, 2, 2, 4):  # 0 often but long ago, 1 once
        offload.visit(store, 1, [[expert]])
    assert sorted(np.flatnonzero(store.where()[0] == NEAR)) == sorted({0, 1, 2, 4} - {goes})


def test_uses_fade_by_half_every_half_life():
    store, _ = offload.pages(layers=1, experts=6, chosen=1, slots=6, policy=3.0)
    asked = np.random.default_rng().integers(6, size=40)
    for expert in asked:
        offload.visit(store, 1, [[int(expert)]])
    by_hand = [sum(2 ** (-(39 - when) / 3) for when in np.flatnonzero(asked == expert)) for expert in range(6)]
    assert 2 ** (store.worth.value - 39 / 3) == pytest.approx(by_hand, rel=1e-9)


def test_a_long_run_does_not_overflow():
    store, _ = offload.pages(layers=1, experts=6, chosen=1, slots=3, policy=0.5)
    store.passes = 10**9
    for expert in (0, 1, 2, 0, 3):
        offload.visit(store, 1, [[expert]])
    assert np.isfinite(store.worth.value[:4]).all() and sorted(np.flatnonzero(store.where()[0] == NEAR)) == [0, 2, 3]


def test_pinned_experts_go_only_when_nothing_else_can():
    store, _ = offload.pages(layers=1, experts=9, chosen=2, slots=4, policy="lru")
    store.pin([(1, 0), (1, 1), (1, 2)])
    offload.visit(store, 1, [[0, 1], [2, 3]])
    offload.visit(store, 1, [[5, 5]])
    offload.visit(store, 1, [[6, 6]])
    assert np.flatnonzero(store.where()[0] == NEAR).tolist() == [0, 1, 2, 6]
    offload.visit(store, 1, [[5, 6], [7, 8]])  # four at once: the pinned ones make room
    assert np.flatnonzero(store.where()[0] == NEAR).tolist() == [5, 6, 7, 8]
    store.pin([])
    offload.check(store)


def test_passes_are_counted(whole, shelf, given):
    other = offload.offloaded(whole(), shelf, slots=9)
    cache = LatentCache(other.config, 1, "fp32")
    for part in (given[0][:1, :9], given[0][:1, 9:10], given[0][:1, 10:]):
        other(part, cache)
    assert other.store.transfers.rows[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert other.store.transfers.rows[:, 1].tolist() == [1, 2, 3] * 3
    assert other.store.transfers.rows[:, 2].tolist() == [9] * 3 + [1] * 3 + [31] * 3


def test_the_recipe_of_the_shelf_decides_the_layout(whole):
    model = whole("lite", "int4,*.down_proj.weight=fp8")
    layout = offload.Shelf(model).layout
    named = Recipe.named("int4,*.down_proj.weight=fp8").codec
    assert layout.down == named("model.layers.1.mlp.experts.0.down_proj.weight") != layout.gate_up
    assert layout.gate_up == offload.Shelf(whole()).layout.gate_up
