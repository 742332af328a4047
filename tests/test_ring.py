"""The static routing recorder: whatever way it writes and whenever it is read, the routing of every token, in order."""

import threading
import time
from dataclasses import replace

import checkpoints
import numpy as np
import pytest
import torch

from workbench.cache import LatentCache
from workbench.checkpoint import Random
from workbench.config import Config
from workbench.editing import Editing
from workbench.edits import Force, TopK
from workbench.model import Model
from workbench.probe import Probe, both
from workbench.recorder import Recorder
from workbench.ring import RoutingRing

SITES = ("moe.experts", "moe.gates", "moe.scores")


@pytest.fixture(autouse=True)
def without_gradients(request):
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


@pytest.fixture(scope="module")
def bench(model):
    return model("v2")


@pytest.fixture(scope="module")
def tokens():
    return torch.tensor([checkpoints.some_tokens(checkpoints.V2, 60, seed=31)])


def new_cache(bench, batch=1):
    return LatentCache(bench.config, batch=batch, format="fp32")


def expected(recorder, row=0, slots=None):
    """What a log should hold of one row, from what a Recorder saw."""
    layers = recorder.layers_of("moe.gates")
    experts, gates, margins = [], [], []
    for layer in layers:
        ids, weights, scores = (recorder[site, layer][row] for site in SITES)
        wide = (0, (slots or ids.shape[-1]) - ids.shape[-1])
        pad = torch.nn.functional.pad
        experts.append(pad(ids, wide, value=-1))
        gates.append(pad(weights, wide))
        margins.append(pad(scores[:, :-1] - scores[:, -1:], wide))
    ids = torch.stack(experts, 1).numpy()
    used = ids >= 0
    half = [torch.stack(parts, 1).to(torch.float16).float().numpy() for parts in (gates, margins)]
    return ids, np.where(used, half[0], 0), np.where(used, half[1], np.nan)


def check(rows, wanted):
    assert (rows.experts.dtype, rows.gates.dtype, rows.margins.dtype) == (np.int16, np.float32, np.float32)
    for got, value in zip(rows, wanted, strict=True):
        assert np.array_equal(got, value.astype(got.dtype), equal_nan=got.dtype != np.int16)


@pytest.mark.parametrize("capacity", [1024, 16, 3])
@pytest.mark.parametrize("name", ["v2", "lite", "moe_every_other_layer"])
def test_it_holds_what_passed(name, capacity, model, tokens):
    bench, recorder = model(name), Recorder(*SITES)
    ring = RoutingRing(bench.config, capacity=capacity)
    log, store = ring.log(), new_cache(bench)
    for chunk in tokens.split([9, *[1] * 20, 17, *[1] * 14], 1):
        bench(chunk, store, both(ring.to(log), recorder))
    check(log.rows(), expected(recorder))
    assert len(log) == 60
    check(log.rows(10, 20), [part[10:20] for part in expected(recorder)])
    assert len(log.rows(55, 99).experts) == 5


@pytest.mark.parametrize("capacity", [1024, 10])
def test_several_sequences_at_once_and_in_turn(capacity, bench, tokens):
    ring = RoutingRing(bench.config, capacity=capacity)
    logs, recorders, store = [ring.log() for _ in range(3)], [Recorder(*SITES) for _ in range(3)], new_cache(bench, 3)
    for row, length in enumerate((5, 1, 8)):
        bench(tokens[:, row : row + length], store.only(row), both(ring.to(logs[row]), recorders[row]))

    def together(rows, new, start):
        seen = Recorder(*SITES)
        given = tokens[:, start : start + new * len(rows)].view(len(rows), new)
        bench(given, store.only(*rows), both(ring.to(*(logs[row] for row in rows)), seen))
        for at, row in enumerate(rows):
            recorders[row]._keep({key: seen[key][at : at + 1] for key in seen._pieces})

    for step in range(6):
        together([0, 1, 2], 1, 9 + step)
    together([2, 0], 4, 20)
    together([1], 2, 30)
    for step in range(5):
        together([2, 1], 1, 40 + step)
    for log, recorder in zip(logs, recorders, strict=True):
        check(log.rows(), expected(recorder))


@pytest.mark.parametrize("experts, kind", [(254, torch.uint8), (255, torch.int16), (300, torch.int16)])
def test_ids_take_a_byte_where_they_fit(experts, kind, tokens):
    config = replace(
        Config.preset("pocket"),
        vocab_size=192,
        hidden_size=32,
        num_hidden_layers=2,
        n_routed_experts=experts,
        moe_intermediate_size=8,
        topk_method="greedy",
    )
    bench, recorder = Model(config, Random(config, seed=2, std=0.3)), Recorder(*SITES)
    ring = RoutingRing(config)
    log = ring.log()
    last = Editing([Force(1, (experts - 1, 0))], config)
    bench(tokens, probe=both(last, ring.to(log), recorder))
    assert ring._rings[0].dtype == kind and ring.nbytes == 1024 * 4 * (kind.itemsize + 4)
    check(log.rows(), expected(recorder))
    assert (log.rows().experts[..., 0] == experts - 1).all() and (log.rows().experts >= 0).all()


@pytest.mark.parametrize(
    "edits, slots",
    [
        ([TopK(None, 2)], 2),
        ([TopK(1, 2)], 6),
        ([TopK(1, 9)], 9),
        ([TopK(None, 8, phase="decode")], 8),
        ([TopK(2, 10, positions=(3, 5))], 10),
        ([TopK(1, 1, positions=(3, 40)), Force(1, 31, positions=(20, 30))], 6),
    ],
)
def test_an_edit_may_use_more_slots_or_fewer_in_some_layers_and_passes(edits, slots, bench, tokens):
    editing, seen = Editing(edits, bench.config, prompts=9), []
    assert max(editing.width.values()) == slots
    ring = RoutingRing(bench.config, slots=slots)
    log, store = ring.log(), new_cache(bench)
    for chunk in tokens[:, :30].split([9, *[1] * 8, 13], 1):
        seen.append(Recorder(*SITES))
        bench(chunk, store, both(editing, ring.to(log), seen[-1]))
    parts = [expected(recorder, slots=slots) for recorder in seen]
    check(log.rows(), [np.concatenate(part) for part in zip(*parts, strict=True)])


def test_too_few_slots_are_not_cut_off_in_silence(bench, tokens):
    ring = RoutingRing(bench.config)
    with pytest.raises(AssertionError, match="2 slots too few"):
        bench(tokens, probe=both(Editing([TopK(None, 8)], bench.config), ring.to(ring.log())))


def test_nothing_is_allocated_anew_and_nothing_moves(bench, tokens):
    """A captured graph writes to the addresses it was captured with."""
    ring, store = RoutingRing(bench.config, capacity=16), new_cache(bench)
    log = ring.log()

    def places():
        return [tensor.data_ptr() for tensor in (*ring._rings, ring._cursor)]

    before = places()
    for chunk in tokens.split([16, *[1] * 20, 8, 8, *[1] * 8], 1):
        bench(chunk, store, ring.to(log))
        if store.lengths[0] % 5 == 0:
            log.rows()
    assert places() == before and len(log) == 60 and ring.capacity == 16 and ring.static


def test_reading_from_another_thread_while_passes_go_on(bench, tokens):
    ring, recorder, store = RoutingRing(bench.config, capacity=16), Recorder(*SITES), new_cache(bench)
    log, stop, wrong, looked = ring.log(), threading.Event(), [], []

    def look():
        before = 0
        while not stop.is_set():
            rows = log.rows()
            count = len(log)
            sizes = {len(part) for part in rows}
            if len(sizes) != 1 or len(rows.experts) < before or count < len(rows.experts):
                wrong.append((sizes, before, count))
            before = len(rows.experts)
            looked.append(before)
            time.sleep(0.0005)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for chunk in tokens.repeat(1, 4).split([7, *[1] * 100, 13, *[1] * 120], 1):
        bench(chunk, store, both(ring.to(log), recorder))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and len(set(looked)) > 10
    check(log.rows(), expected(recorder))


class Fails(Probe):
    """Fails at a site; `layer` None: outside."""

    def __call__(self, site, x):
        if site == "final.norm":
            raise ValueError("in the middle")
        return x


def test_a_pass_that_fails_leaves_nothing(bench, tokens):
    ring, recorder, store = RoutingRing(bench.config), Recorder(*SITES), new_cache(bench)
    log = ring.log()
    bench(tokens[:, :9], store, both(ring.to(log), recorder))
    for new in (1, 5):
        with pytest.raises(ValueError, match="in the middle"):
            bench(tokens[:, 9 : 9 + new], store, both(ring.to(log), recorder, Fails()))
    bench(tokens[:, 9:12], store, both(ring.to(log), recorder))
    assert store.lengths == [12] and len(log) == 12
    check(log.rows(), expected(recorder))


def test_a_fork_goes_its_own_way(bench, tokens):
    ring, recorder, store = RoutingRing(bench.config), Recorder(*SITES), new_cache(bench)
    log = ring.log()
    bench(tokens[:, :9], store, both(ring.to(log), recorder))
    other, second = log.fork(4), RoutingRing(bench.config)
    store.truncate(4)
    bench(tokens[:, 20:23], store, second.to(other))
    check(log.rows(), expected(recorder))
    assert len(other) == 7 and len(log) == 9
    assert np.array_equal(other.rows(0, 4).experts, log.rows(0, 4).experts)


def test_with_gradients_no_graph_is_kept_alive(bench, tokens):
    ring, recorder = RoutingRing(bench.config), Recorder(*SITES)
    log = ring.log()
    bench.requires_grad_()
    try:
        bench(tokens[:, :3], probe=both(ring.to(log), recorder))
        assert not any(x.requires_grad for passed, _ in ring._kept for x in passed)
        assert recorder["moe.gates", 1].requires_grad
    finally:
        bench.requires_grad_(False)
    with torch.no_grad():
        assert np.array_equal(
            log.rows().experts, torch.stack([recorder["moe.experts", n][0] for n in (1, 2)], 1).numpy()
        )


def test_a_model_without_experts(tokens):
    config = replace(Config.preset("pocket"), vocab_size=192, hidden_size=32, num_hidden_layers=1)
    ring = RoutingRing(config)
    log = ring.log()
    Model(config, Random(config))(tokens, probe=ring.to(log))
    assert ring.layers == () and log.rows().experts.shape == (0, 0, config.num_experts_per_tok)
