"""The cache meter and the memory section of a panel: what they say, when they say nothing, and what a switch does."""

import gc
import json
import time
import weakref

import ipywidgets
import numpy as np
import pytest
from PIL import Image

import workbench as wb
from workbench.errors import RequestError
from workbench.lens.baselines import baselines
from workbench.widgets.cachemeter import CacheMeter, usual

SECONDS = 60
RAMBLE = wb.Sampling(temperature=50.0, top_p=1.0, max_tokens=2000, seed=3)  # so hot that pocket rambles on


@pytest.fixture
def bench():
    return wb.load("pocket", cache="bf16")


@pytest.fixture
def meter(bench):
    meter = CacheMeter(bench)
    yield meter
    meter.close()


@pytest.fixture
def panel(bench):
    panel = wb.chat(bench, sampling=wb.Sampling(temperature=0, max_tokens=30))
    yield panel
    panel.close()


@pytest.fixture
def told(meter, monkeypatch):
    messages = []
    monkeypatch.setattr(meter, "_tell", lambda message, buffers=(): messages.append(message))
    return messages


@pytest.fixture
def wire(monkeypatch):
    """(time, bytes, widget) of everything any widget sends."""
    sent = []

    def send(self, message, buffers=None):
        size = len(json.dumps(message, default=str)) + sum(memoryview(buffer).nbytes for buffer in buffers or ())
        sent.append((time.monotonic(), size, type(self).__name__))

    monkeypatch.setattr(ipywidgets.Widget, "_send", send)
    return sent


def say(bench, text="What is an expert?", **settings):
    return bench.generate(text, wb.Sampling(**({"temperature": 0, "max_tokens": 30} | settings)))


def ask(panel, text="What is an expert?"):
    panel.send(text)
    panel.wait(SECONDS)
    return panel.history[-1]


# What it says


def test_it_says_what_is_held(bench, meter, told):
    say(bench)
    meter._snapshot("v")
    show, cache = told[-1], bench.engine.cache
    assert (show["kind"], show["view"], show["format"]) == ("show", "v", "bf16")
    assert (show["tokens"], show["blocks"]) == (cache.lengths[0], cache.blocks)
    assert show["packed"] + show["windows"] == cache.nbytes and show["layers"] is None
    facts = show["facts"]
    assert [one[:1] + one[2:] for one in facts["baselines"]] == [
        [one.name, one.nbytes, one.own] for one in baselines(bench.config).values()
    ]
    assert {one["name"]: sum(one["parts"]) for one in facts["formats"]}["q6"] == 68
    json.dumps(show)


def test_news_are_short_few_and_only_news(bench, meter, told):
    meter._snapshot("v")
    meter.refresh()
    assert len(told) == 1, "nothing has changed"
    say(bench)
    meter.refresh()
    say(bench, "And what is a router? Tell me all of it.", max_tokens=60)
    meter._look()
    assert [message["kind"] for message in told[1:]] == ["grow"], "the second comes too soon"
    assert len(json.dumps(told[-1])) < 200
    time.sleep(0.6)
    meter._look()
    assert len(told) == 3 and told[-1]["tokens"] == bench.engine.cache.lengths[0]


def test_alone_it_follows_a_stream_from_when_it_is_displayed(bench, meter, told):
    assert not meter.sampler.running
    meter._handle_custom_msg({"kind": "ready", "view": "v"}, [])
    assert meter.sampler.running
    say(bench, temperature=50.0, top_p=1.0, max_tokens=250, seed=1)
    time.sleep(1.2)
    grown = [message["tokens"] for message in told if message["kind"] == "grow"]
    assert grown[-1] == bench.engine.cache.lengths[0] and len(grown) <= 20
    meter.close()
    assert not meter.sampler.running


def test_the_table_has_every_scheme_for_the_same_tokens(bench, meter):
    say(bench)
    table, tokens = meter.table(), bench.engine.cache.lengths[0]
    assert table.loc["MHA (bf16)"].tolist()[:2] == [6144, 6144 * tokens]
    assert table.loc["this cache (bf16), rows written"].tolist() == [960, 960 * tokens, 1.0]
    assert table.loc["this cache, allocated"].iloc[1] == bench.engine.cache.nbytes
    assert table.loc["latent (bf16)"].iloc[2] == 1.0


def test_a_ratio_names_its_baseline(bench, meter):
    assert str(meter.ratio) == "84.4% less than MHA (bf16)", "also before anything is cached"
    meter.baseline = "DeepSeek-67B (GQA, bf16)"
    assert str(meter.ratio).endswith("less than DeepSeek-67B (GQA, bf16)")
    with pytest.raises(RequestError, match="no baseline called 'MLA'"):
        meter.baseline = "MLA"
    assert [usual(wb.Config.preset(name)).name for name in ("v2", "v2-lite")] == [
        "DeepSeek-67B (GQA, bf16)", "MHA (bf16)",
    ]  # fmt: skip


# Switching


def test_a_switch_converts_the_rows_and_says_what_it_cost(bench, meter, told):
    say(bench)
    before = bench.engine.cache.nbytes
    loss = meter.switch("q6")
    after = bench.engine.cache.nbytes
    assert meter.format == bench.engine.cache.format == "q6" and after == before * 68 // 160
    assert len(loss) == 6 and (loss["latent"] > 0.005).all() and (loss["rotary key"] < loss["latent"] / 5).all()
    message = next(message for message in told if message["kind"] == "switched")
    assert message["switched"]["held"] == (before, after) and message["format"] == message["next"] == "q6"
    assert np.allclose(message["switched"]["errors"], loss.to_numpy(), rtol=1e-3)
    assert str(meter.ratio) == "93.4% less than MHA (bf16)"
    assert (meter.switch("bf16")["latent"] < loss["latent"] / 5).all(), "the loss is that of the last switch"


def test_a_switch_before_anything_is_cached_counts_from_the_next_reply_on(bench, meter):
    assert meter.switch("int8").empty and meter.switched.held == (0, 0) and not meter.switched.dropped
    say(bench)
    assert bench.engine.cache.format == "int8"


def test_rows_with_a_window_are_dropped_and_read_anew(bench, meter):
    first = say(bench)
    assert meter.switch("int8+64").empty and meter.switched.dropped and meter.held.tokens == 0
    again = say(bench)
    assert again.stats.reused_tokens == 0 and again.tokens == first.tokens
    held = meter.held
    assert held.windows == 6 * 64 * 80 * 2 and meter.ratio.nbytes > held.row * 6, "windows are in the ratio"


def test_the_page_switches_and_is_told_what_there_is_not(bench, meter, told):
    meter._handle_custom_msg({"kind": "switch", "format": "int4"}, [])
    assert bench.engine.cache_format == "int4"
    meter._handle_custom_msg({"kind": "switch", "format": "int5"}, [])
    assert told[-1]["kind"] == "notice" and "no cache format called 'int5'" in told[-1]["text"]
    meter._handle_custom_msg({"kind": "baseline", "name": "MQA (bf16)"}, [])
    assert meter.baseline == "MQA (bf16)"


# In a panel


def test_closed_nothing_is_made_read_or_sent(panel, wire):
    ask(panel)
    assert panel.explorer.memory.children == () and not {name for *_, name in wire} & {"CacheMeter", "MemoryTimeline"}
    panel.metering = True
    assert panel.explorer.meter.sampler.running and panel.explorer.memory.children
    ask(panel)
    panel.metering = False
    assert not panel.explorer.meter.sampler.running
    del wire[:]
    ask(panel)
    time.sleep(0.3)
    assert not {name for *_, name in wire} & {"CacheMeter", "MemoryTimeline", "WhatIf"}


def test_opened_it_knows_what_was_cached_before(panel):
    turn = ask(panel)
    panel._view._handle_custom_msg({"kind": "explore", "of": "memory", "on": True}, [])
    assert panel.metering and not panel.exploring
    assert panel.explorer.meter.held.tokens == turn.stats["prompt_tokens"] + turn.stats["tokens"] - 1


def test_the_timeline_is_told_only_while_it_is_unfolded(panel, monkeypatch):
    panel.metering = True
    told = []
    monkeypatch.setattr(panel.explorer.memory.timeline, "_tell", lambda message, buffers=(): told.append(message))
    ask(panel)
    assert told == []
    panel.explorer.memory._sections.selected_index = 0
    ask(panel, "Tell me more.")
    assert told and [mark.kind for mark in panel.explorer.meter.sampler.marks].count("end") == 2
    panel.metering = False
    del told[:]
    ask(panel)
    assert told == []


def test_the_format_is_a_property_of_the_panel(panel):
    assert panel.cache_format == "bf16"
    turn = ask(panel)
    figures = dict(turn.stats)
    panel.cache_format = "q6"
    assert panel.conversation.bench.engine.cache.format == panel.cache_format == "q6"
    facts = panel._publisher.facts
    assert facts["cache_format"] == "q6" and facts["cache_factor"] == pytest.approx(2 * 8 * 32 * 2 / 68)
    used = turn.stats["prompt_tokens"] + turn.stats["tokens"]
    assert facts["cache_held"] == [used, panel.conversation.bench.engine.cache.nbytes]
    assert turn.stats == figures, "what was measured then stays as it was"
    second = ask(panel, "Tell me more.")
    assert second.stats["reused_tokens"] > 0, "nothing was read again"
    panel.metering = True
    panel.cache_format = "int8"
    assert panel.explorer.meter.switched.after == "int8" and len(panel.explorer.meter.loss()) == 6


def test_a_switch_while_answering_is_refused_and_the_reply_goes_on(panel, monkeypatch):
    panel.metering = True
    meter, told = panel.explorer.meter, []
    monkeypatch.setattr(meter, "_tell", lambda message, buffers=(): told.append(message))
    panel.sampling = RAMBLE
    panel.send("Tell me everything.")
    while len(panel.history[-1].steps) < 20:
        time.sleep(0.01)
    with pytest.raises(RequestError, match="between two replies"):
        panel.cache_format = "q6"
    meter._handle_custom_msg({"kind": "switch", "format": "q6"}, [])
    assert [message["text"][:15] for message in told if message["kind"] == "notice"] == ["still answering"]
    assert panel.cache_format == "bf16" and meter.switched is None
    panel.stop()
    panel.wait(SECONDS)
    assert panel.history[-1].finish == "stopped"
    panel.cache_format = "q6"


def test_with_all_of_a_panel_open_the_wire_stays_quiet(panel, wire):
    panel.exploring = panel.metering = True
    panel.explorer.memory._sections.selected_index = 0
    panel.sampling = RAMBLE
    for message in ({"kind": "ready", "view": "v"}, {"kind": "readings", "view": "v", "on": True}):
        panel._view._handle_custom_msg(message, [])
    del wire[:]
    turn = ask(panel, "Tell me everything.")
    assert len(turn.steps) > 500
    times = np.array([when for when, *_ in wire])
    busiest = max(((times >= start) & (times < start + 1)).sum() for start in times)
    per_token = sum(size for _, size, _ in wire) / len(turn.steps)
    print(f"{len(turn.steps)} tokens, {busiest} messages in the busiest second, {per_token:.0f} bytes a token")
    assert busiest <= 20 and per_token < 1000
    del wire[:]
    time.sleep(1.5)
    assert len(wire) <= 2, "nothing happens, nothing is said"


def test_an_imported_conversation_is_followed(panel):
    panel.metering = True
    ask(panel)
    panel.load(panel.export())
    ask(panel, "Tell me more.")
    assert [mark.kind for mark in panel.explorer.meter.sampler.marks].count("end") == 2


def test_a_panel_that_is_closed_lets_the_model_go_and_still_shows_what_it_saw():
    panel = wb.chat(wb.load("pocket"))
    panel.metering = True
    ask(panel)
    meter, model = panel.explorer.meter, weakref.ref(panel.conversation.bench.model)
    tokens = meter.held.tokens
    panel.retire()
    gc.collect()
    assert model() is None and meter._state()["tokens"] == tokens and "let go" in repr(meter)
    meter._snapshot("v")
    panel.explorer.memory.timeline._snapshot("v")
    with pytest.raises(RequestError, match="let go"):
        meter.switch("q6")
    with pytest.raises(RequestError, match="let go"):
        panel.cache_format = "q6"


# Without a browser


def test_a_saved_notebook_keeps_the_comparison(bench, meter, tmp_path):
    say(bench)
    page = meter._repr_mimebundle_()
    assert "84.4% less than MHA (bf16)" in page["text/plain"] and "DeepSeek-67B" in page["text/html"]
    (tmp_path / "still.png").write_bytes(page["image/png"])
    assert Image.open(tmp_path / "still.png").size[0] > 1000
    gc.collect()
    state = meter.get_state()
    assert not {name for name in state if not name.startswith("_")} - {"layout", "tabbable", "tooltip"}, "no history"
