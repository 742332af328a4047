"""What the chat is told of its tokens beside their records, and of the one the explorer looks at: once, and little."""

import json
import threading
import time
from base64 import b64decode
from types import SimpleNamespace

import numpy as np
import pytest
from widgets.routed import GREEDY, routed_trace

import workbench as wb
from workbench.config import Config
from workbench.widgets import looked
from workbench.widgets.geometry import last_margin
from workbench.widgets.tint import readings, tint_facts

SECONDS = 60
MS, CACHE = 7, 8  # of a step


@pytest.fixture(scope="module")
def bench():
    return wb.load("pocket")


@pytest.fixture
def panel(bench):
    panel = wb.chat(bench, sampling=wb.Sampling(temperature=0, max_tokens=30))
    yield panel
    panel.close()


@pytest.fixture
def wire(panel, monkeypatch):
    sent = []
    monkeypatch.setattr(panel._view, "send", lambda content, buffers=None: sent.append(json.loads(json.dumps(content))))
    press(panel, "ready", view="v")
    return sent


def press(panel, kind, **content):
    panel._view._handle_custom_msg({"kind": kind} | content, [])


def ask(panel, text="What is an expert?"):
    panel.send(text)
    panel.wait(SECONDS)
    return panel.history[-1]


def rows(wire, turn):
    """The steps of a reply as a view has them after these messages."""
    known = []
    for message in wire:
        if message["kind"] == "path":
            known = next((each["steps"] for each in message["turns"] if each["key"] == turn.key), known)
        elif message["kind"] == "steps" and message["turn"] == turn.key:
            known = known[: message["from"]] + message["steps"]
    return known


def parts(wire, turn):
    return [part for message in wire for part in message.get("readings", []) if part["turn"] == turn.key]


def unpacked(part, layers=5, dtype="<u1"):
    """(experts [n, layers], margins [n], rows [n])"""
    experts, margins, places = (b64decode(part[name]) for name in ("experts", "margins", "rows"))
    ids = np.frombuffer(experts, dtype).reshape(-1, layers)
    return ids, np.frombuffer(margins, "<f4"), np.frombuffer(places, "<u1")


def expected(turn):
    """As the trace has it, for the tokens of the reply that were read."""
    first = turn.steps[0].position
    experts, margins = turn.trace.experts[first:-1], turn.trace.margins[first:-1]
    narrow = last_margin(experts, margins)
    return experts[..., 0], narrow.min(1), narrow.argmin(1)


def assert_same(part, wanted):
    for got, want in zip(unpacked(part), wanted, strict=True):
        assert np.array_equal(got, want)


def test_steps_say_how_long_they_took_and_what_the_cache_held(panel, wire):
    turn = ask(panel)
    sent, own = rows(wire, turn), turn.trace.tokens[turn.trace.tokens["phase"] == "decode"]
    assert [row[MS] for row in sent] == pytest.approx(own["ms"].tolist(), rel=1e-3)
    assert [row[CACHE] for row in sent] == own["cache_bytes"].tolist()
    del wire[:]
    press(panel, "ready", view="another")
    assert [row[CACHE] for row in rows(wire, turn)] == own["cache_bytes"].tolist()


def test_what_was_put_by_hand_or_given_was_not_measured(panel, wire):
    ask(panel)
    panel.branch(-1, 2, 100)
    panel.wait(SECONDS)
    sent = rows(wire, panel.history[-1])
    assert [row[CACHE] for row in sent[:3]] == [None] * 3 and sent[3][CACHE] > 0
    assert sent[2][MS] is None and sent[1][MS] > 0 and sent[2][6] == 1


def test_an_imported_conversation_was_not_measured(panel, wire):
    ask(panel)
    panel.load(json.loads(json.dumps(panel.export())))
    press(panel, "readings", view="v", on=True)
    assert wire[-1] == {"kind": "readings", "readings": []}
    assert {row[CACHE] for row in rows(wire, panel.history[-1])} == {None}


def test_readings_are_sent_to_a_view_that_wants_them_and_no_longer(panel, wire):
    turn = ask(panel)
    assert parts(wire, turn) == []
    press(panel, "readings", view="v", on=True)
    (part,) = wire[-1]["readings"]
    assert part["from"] == 0
    assert_same(part, expected(turn))
    press(panel, "readings", view="v", on=False)
    del wire[:]
    assert parts(wire, ask(panel, "Tell me more.")) == []


def test_while_a_reply_grows_every_reading_is_sent_once(panel, wire):
    press(panel, "readings", view="v", on=True)
    panel.sampling = wb.Sampling(temperature=50.0, top_p=1.0, max_tokens=300, seed=3)
    turn = ask(panel)
    news = parts(wire, turn)
    assert len(news) > 1 and len(turn.steps) > 50
    assert [part["from"] for part in news] == [0, *(part["to"] for part in news[:-1])]
    whole = [np.concatenate(each) for each in zip(*map(unpacked, news), strict=True)]
    for got, want in zip(whole, expected(turn), strict=True):
        assert np.array_equal(got, want)


def test_a_version_that_is_shown_later_brings_its_readings(panel, wire):
    first = ask(panel)
    panel.regenerate()
    panel.wait(SECONDS)
    press(panel, "readings", view="v", on=True)
    assert parts(wire, first) == []
    panel.select(first)
    (part,) = wire[-1]["readings"]
    assert_same(part, expected(first))


def test_a_reply_that_is_continued_is_read_on(panel, wire):
    press(panel, "readings", view="v", on=True)
    panel.sampling = wb.Sampling(temperature=0, max_tokens=5)
    turn = ask(panel)
    panel.sampling = wb.Sampling(temperature=0, max_tokens=40)
    panel.continue_()
    panel.wait(SECONDS)
    news = parts(wire, turn)
    again = next(n for n in range(1, len(news)) if news[n]["from"] == 0)  # the reply was sent anew, from its tokens
    whole = [np.concatenate(each) for each in zip(*map(unpacked, news[again:]), strict=True)]
    for got, want in zip(whole, expected(turn), strict=True):
        assert np.array_equal(got, want)


def test_a_view_that_starts_anew_has_to_ask_again(panel, wire):
    ask(panel)
    press(panel, "readings", view="v", on=True)
    press(panel, "ready", view="w")
    assert wire[-1]["kind"] == "path" and wire[-1]["readings"] == []


def test_a_token_of_v2_costs_less_than_a_hundred_bytes():
    config, layers = GREEDY | {"n_routed_experts": 160}, tuple(range(1, 60))
    trace = routed_trace(["x"] * 101, prompt=0, config=config, layers=layers, scores=False)
    steps = [SimpleNamespace(position=n) for n in range(101)]
    part = readings(SimpleNamespace(key=1, steps=steps, trace=trace, stream=None), 0, 160)
    assert part["to"] == 100 and len(json.dumps(part)) < 100 * 100
    experts, margins, _ = unpacked(part, 59)
    assert np.array_equal(experts, trace.experts[:100, :, 0])
    assert np.array_equal(margins, last_margin(trace.experts, trace.margins)[:100].min(1))


def test_more_experts_than_eight_bits_count_take_sixteen():
    config = GREEDY | {"n_routed_experts": 320}
    trace = routed_trace(["x"] * 9, prompt=0, config=config, layers=(1,), scores=False)
    steps = [SimpleNamespace(position=n) for n in range(9)]
    part = readings(SimpleNamespace(key=1, steps=steps, trace=trace, stream=None), 3, 320)
    assert (part["from"], part["to"]) == (3, 8)
    assert np.array_equal(unpacked(part, 1, "<u2")[0], trace.experts[3:8, :, 0])


def test_a_model_without_experts_has_facts_and_no_readings(fake_bench):
    facts = tint_facts(fake_bench.config)
    assert (facts["layers"], facts["experts"]) == ((), 0)
    panel = wb.chat(fake_bench)
    press(panel, "readings", view="v", on=True)
    ask(panel)
    assert readings(panel.history[-1], 0, 0) is None
    panel.close()


def test_facts_name_the_layers_groups_and_colours_of_the_strip():
    facts = tint_facts(Config.preset("v2"))
    assert (len(facts["layers"]), facts["experts"], facts["groups"]) == (59, 160, 8)
    names = [colour["name"] for colour in facts["colours"]]
    assert names == ["probability", "entropy", "ms", "cache_bytes", "margin", "expert"]


def of_looked(wire):
    return [(message["turn"], message["index"]) for message in wire if message["kind"] == "looked"]


def settle():
    time.sleep(1.5 * looked.INTERVAL)


def test_the_token_that_is_looked_at_is_told_once_a_change(panel, wire):
    turn = ask(panel)
    panel.look(1, 3)
    settle()
    panel.explorer.selection.token = turn.steps[3].position
    assert of_looked(wire) == [(turn.key, 3)]
    settle()
    panel.explorer.selection.layer = 2
    panel.explorer.strip.token += 1
    settle()
    assert of_looked(wire) == [(turn.key, 3), (turn.key, 4)]
    panel.explorer.selection.token = 1  # of the prompt
    settle()
    panel.explorer.selection.token = -1
    settle()
    assert of_looked(wire)[2:] == [(None, None)]


def test_of_many_changes_the_last_counts(panel, wire):
    turn = ask(panel)
    panel.exploring = True
    for record in turn.steps:
        panel.explorer.selection.token = record.position
        time.sleep(0.005)
    settle()
    told = of_looked(wire)
    assert told[0] == (turn.key, 0) and told[-1] == (turn.key, len(turn.steps) - 1)
    assert len(told) <= 3 + 0.02 * len(turn.steps) / looked.INTERVAL


def test_closing_the_explorer_lets_the_token_go_and_a_new_view_hears_of_it(panel, wire):
    turn = ask(panel)
    panel.look(1, 3)
    settle()
    del wire[:]
    press(panel, "ready", view="w")
    assert of_looked(wire) == [(turn.key, 3)]
    press(panel, "explore", on=False)
    settle()
    assert of_looked(wire)[1:] == [(None, None)]


def test_a_closed_panel_says_nothing_late(panel, wire):
    turn = ask(panel)
    panel.look(1, 0)
    panel.explorer.selection.token = turn.steps[1].position  # waits
    panel.retire()
    del wire[:]
    settle()
    assert of_looked(wire) == [] and not any(isinstance(each, threading.Timer) for each in threading.enumerate())
