"""The meter and its timeline: three numbers that agree where they must, said to be unknown where they are."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace

import pandas as pd
import psutil
import pytest
import torch

import workbench as wb
from workbench import timeline
from workbench.cache import BLOCK, LatentCache
from workbench.config import Config
from workbench.errors import RequestError
from workbench.footprint import Footprint, RowBytes, count_weights
from workbench.formats import CACHE_FORMATS, Row, cache_format
from workbench.meter import Meter
from workbench.recorder import Recorder
from workbench.session import Conversation
from workbench.storages import weigh
from workbench.timeline import Sampler

SECONDS = 60
RAMBLE = wb.Sampling(temperature=50.0, top_p=1.0, max_tokens=300, seed=3)  # so hot that pocket goes on and on
SHAPES = ("pocket", "v2-lite", "v2")


@pytest.fixture
def bench():
    return wb.load("pocket", cache="bf16")


def conversation(bench, **settings):
    return Conversation(bench, sampling=replace(RAMBLE, **settings))


# Arithmetic


@pytest.mark.parametrize("name", SHAPES)
def test_the_kinds_of_weights_are_all_weights(name):
    config = Config.preset(name)
    assert sum(count_weights(config).values()) == config.parameters().total


def test_tied_and_dense_models_are_counted_too():
    tied = replace(Config.preset("pocket"), tie_word_embeddings=True, n_routed_experts=None, n_shared_experts=None)
    counts = count_weights(tied)
    assert sum(counts.values()) == tied.parameters().total
    assert counts["head"] == counts["routed experts"] == counts["shared experts"] == 0 < counts["dense"]


@pytest.mark.parametrize("format", [*CACHE_FORMATS, "q6+128"])
@pytest.mark.parametrize("row", [Row(512, 64), Row(64, 16), Row(100, 6)])
def test_the_parts_of_a_row_are_all_of_it(format, row):
    format = cache_format(format)
    assert sum(RowBytes.of(format, row)) == format.nbytes(row)


def test_the_published_cache_at_its_full_length():
    """8.44 GiB, 69,120 B a token, in bf16; 26,160 B in the 6-bit format, 93.28 % less than 389,120 B."""
    full = Footprint(Config.preset("v2"), 131_072)
    assert (full.per_token, sum(full.cache.values())) == (69_120, 69_120 * 131_072)
    packed = Footprint(Config.preset("v2"), 131_072, 4, "q6")
    assert packed.per_token == 26_160 and sum(packed.cache.values()) == 4 * 131_072 * 26_160
    assert full.nbytes == sum(full.to_frame()["bytes"]) and full.to_frame()["share"].sum() == pytest.approx(1)


@pytest.mark.parametrize("format", [*CACHE_FORMATS, "int8+96"])
def test_arithmetic_is_what_a_cache_allocates(format):
    config = Config.preset("pocket")
    cache = LatentCache.for_model(config, 3, format)
    cache.reserve(130)
    cache.advance(130)
    assert cache.nbytes == sum(Footprint(config, 130, 3, format).cache.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tokens": 2049}, "context of 2,048"), ({"batch": 0}, "at least 1"), ({"format": "int5"}, "no cache format")],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(RequestError, match=message):
        Footprint(**({"config": Config.preset("pocket"), "tokens": 1} | change))


# What is allocated

AUDIT = """
import gc, torch, workbench as wb
from workbench.meter import Meter
bench = wb.load("pocket", cache="q6+32")
kept = bench.generate("Tell me", wb.Sampling(max_tokens=100, temperature=50., top_p=1., seed=1), watch=["resid.post"])
mine = bench.new_cache(batch=2, format="int8")
bench.model(torch.randint(0, 4096, (2, 70)), mine)
other = mine.fork()
gc.collect()
found = {}
for each in gc.get_objects():
    if isinstance(each, torch.Tensor):
        storage = each.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
reading = Meter(bench).now()
print(sum(found.values()), reading.ours, sum(held.nbytes for held in reading.caches), mine.nbytes)
"""


def test_what_we_say_we_allocated_is_the_sum_of_all_tensors_there_are():
    """Counted by the garbage collector, in a process that holds nothing else."""
    run = subprocess.run([sys.executable, "-c", AUDIT], capture_output=True, text=True, check=True)
    every, ours, caches, mine = map(int, run.stdout.split())
    print(f"all tensors {every:,} B, said {ours:,} B: {ours / every - 1:+.3%}")
    assert abs(ours / every - 1) < 0.01
    assert caches > mine > 0


def test_the_cache_is_told_while_it_grows_and_when_it_is_gone(bench):
    meter = Meter(bench)
    assert meter.now().tokens == 0 and bench.engine.cache is None
    stream = bench.stream("What is an expert?", wb.Sampling(max_tokens=40))
    for step in stream:
        reading = meter.now(full=False)
        assert reading.tokens == step.position, "the newest token is not read yet"
        assert reading.allocated["cache rows"] == step.cache_bytes == bench.engine.cache.nbytes
        assert reading.theoretical["cache rows"] == step.position * Footprint(bench.config, 0).per_token
    held = reading.caches[0]
    assert len(set(held.layers)) == 1 and held.packed == held.blocks * BLOCK * held.row * bench.config.num_hidden_layers
    bench.engine.convert_cache("q6+32")  # a window belongs to its sequence, so the rows are dropped
    del stream
    gc.collect()
    assert meter.now().caches == ()


def test_forks_count_once_and_windows_apart(bench):
    cache = bench.new_cache(format="int4+32")
    bench.model(torch.randint(0, 4096, (1, 100)), cache)
    forks = [cache.fork() for _ in range(3)]
    bench.model(torch.randint(0, 4096, (1, 10)), forks[0])  # a block of its own, from the 64th token on
    reading = Meter(bench).now()
    assert reading.tokens == 100 + 110 - 64 and reading.blocks == 3
    assert reading.allocated["cache windows"] == reading.theoretical["cache windows"] == 4 * 6 * 32 * 80 * 2
    assert sum(held.nbytes for held in reading.caches) == cache.nbytes


def test_caches_and_recorders_of_ones_own_are_counted_when_named(bench):
    recorder, cache = Recorder("resid.post"), LatentCache.for_model(bench.config)
    bench.model(torch.randint(0, 4096, (1, 20)), cache, recorder)
    assert Meter(bench).now().tokens == 0
    reading = Meter(bench, recorder, cache).now()
    assert reading.tokens == 20 and reading.allocated["recorder"] == 6 * 20 * 192 * 4


def test_tied_weights_are_held_once(model):
    tied = model("tied_embeddings")
    assert tied.config.tie_word_embeddings
    weights = weigh(tied)
    assert weights.pop("rotary table") and sum(weights.values()) == 4 * tied.config.parameters().total
    assert weights["head"] == 0


# Process and device


def test_the_process_is_asked_and_what_nobody_tells_is_none(bench, monkeypatch):
    reading = Meter(bench).now()
    assert reading.process["rss"] > reading.ours
    assert set(reading.device.values()) == {None}
    table = reading.to_frame()["bytes"]
    assert table["device"].isna().all() and table["process", "rss"] == reading.process["rss"]
    assert "No GPU is in use" in reading.explain()

    def forbidden(self):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "memory_full_info", forbidden)
    hidden = Meter(bench).now()
    assert hidden.process["pss"] is None and hidden.process["rss"] and "PSS and USS are not known" in hidden.explain()


def test_a_device_is_asked_three_things(bench, monkeypatch):
    """On a machine without one: what the driver would say is put in its place."""
    meter = Meter(bench)
    meter.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * 2**30)
    reading = meter.now()
    assert reading.device == {
        "allocated": 5 * 2**30, "reserved": 6 * 2**30, "used": 20 * 2**30, "total": 80 * 2**30,
    }  # fmt: skip
    assert "+1,073,741,824 B kept after use" in reading.explain() and "not in it" in reading.explain()


def test_the_gap_is_explained_in_words(bench):
    bench.generate("What is an expert?", wb.Sampling(max_tokens=5))
    reading = Meter(bench).now()
    said = reading.explain()
    room = reading.allocated["cache rows"] - reading.theoretical["cache rows"]
    assert f"{room:+,} B are room: {reading.tokens} tokens" in said and "blocks of 64" in said
    assert "routing ring" in said and "weights that are not" not in said


# Timeline


def test_a_sampler_sees_the_cache_grow_and_marks_what_happened(bench):
    talk = conversation(bench)
    sampler = Sampler(Meter(bench), interval=0.01)
    sampler.follow(talk)
    with sampler:
        turn = talk.send("Tell me everything.")
        talk.wait(SECONDS)
        bench.engine.convert_cache("q6")
        sampler.sample()
    table, events = sampler.timeline(), sampler.events()
    assert len(table) > 10 and table.index.is_monotonic_increasing
    rows = table["cache rows"].diff().dropna()
    assert (rows > 0).any() and table["cache rows"].iloc[-1] < table["cache rows"].max()
    kinds = events["kind"].tolist()
    assert [kind for kind in kinds if kind not in ("block", "format")] == ["prompt", "prefill", "end"]
    assert kinds.count("block") >= 3 and events.query("kind == 'format'")["text"].tolist() == ["bf16 to q6"]
    each = sampler.per_token()
    assert each.index.tolist() == [step.position for step in turn.steps]
    assert each["cache rows"].tolist() == turn.trace.tokens["cache_bytes"].tolist()[-len(turn.steps) :]
    assert each["routed experts"].nunique() == 1 and each["device used"].isna().all()


def test_a_stop_is_marked(bench):
    talk = conversation(bench, max_tokens=1500)
    sampler = Sampler(Meter(bench))
    end = sampler.follow(talk)
    turn = talk.send("Tell me everything.")
    while len(turn.steps) < 20:
        time.sleep(0.01)
    talk.stop()
    talk.wait(SECONDS)
    assert [mark.kind for mark in sampler.marks][-1] == "stop"
    end()
    talk.regenerate()
    talk.stop()
    talk.wait(SECONDS)
    assert [mark.kind for mark in sampler.marks][-1] == "stop" and len(sampler.marks) == 3


def test_nothing_is_added_while_nothing_changes(bench):
    bench.generate("What is an expert?", wb.Sampling(max_tokens=5))
    sampler, called = Sampler(Meter(bench), interval=0.005), []
    sampler.listeners.append(lambda: called.append(len(sampler.readings)))
    with sampler:
        time.sleep(0.3)
    assert len(called) > 10 > len(sampler.readings)
    assert sampler.readings[-1].seconds - sampler.readings[0].seconds > 0.25, "the last one is moved on"


def test_long_runs_are_thinned_out(bench, monkeypatch):
    monkeypatch.setattr(timeline, "LIMIT", 20)
    sampler, cache = Sampler(Meter(bench)), bench.new_cache()
    for _ in range(100):
        cache.reserve(1)
        cache.advance(1)
        sampler.sample()
    tokens = sampler.timeline()["tokens"].tolist()
    assert len(tokens) <= 21 and tokens[0] == 1 and tokens[-1] == 100 and sampler.revision > 1


def test_the_thread_ends_with_its_owner(bench):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "workbench-meter"]

    before = len(threads())
    sampler = Sampler(Meter(bench), interval=0.01).start()
    gone = weakref.ref(sampler)
    time.sleep(0.05)
    assert len(threads()) == before + 1 and sampler.running
    del sampler
    gc.collect()
    time.sleep(0.1)
    assert gone() is None and len(threads()) == before
    sampler = Sampler(Meter(bench), interval=0.01).start()
    sampler.stop()
    assert not sampler.running and len(threads()) == before


def test_sampling_costs_less_than_a_hundredth_of_decoding(bench):
    sampler = Sampler(Meter(bench))
    with sampler:
        bench.generate("Tell me everything.", replace(RAMBLE, max_tokens=600))
    print(f"{sampler.cost:.3%} of a core, {len(sampler.readings)} readings")
    assert 0 < sampler.cost < 0.01


def test_empty_timelines_are_tables_too(bench):
    sampler = Sampler(Meter(bench))
    for table in (sampler.timeline(), sampler.per_token(), sampler.events()):
        assert isinstance(table, pd.DataFrame) and not len(table)
