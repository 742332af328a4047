"""The memory timeline: rows and marks as they come, each once, and the whole of it after a thinning."""

import json
import time

import pytest

import workbench as wb
from workbench import timeline
from workbench.meter import Meter
from workbench.timeline import Sampler
from workbench.widgets.timeline import MemoryTimeline


@pytest.fixture
def bench():
    return wb.load("pocket", cache="bf16")


@pytest.fixture
def sampler(bench):
    return Sampler(Meter(bench))


@pytest.fixture
def view(sampler, monkeypatch):
    view = MemoryTimeline(sampler)
    view.told = []
    monkeypatch.setattr(view, "_tell", lambda message, buffers=(): view.told.append(message))
    yield view
    view.close()


def grow(bench, sampler, times):
    cache = bench.new_cache()
    for _ in range(times):
        cache.reserve(30)
        cache.advance(30)
        sampler.sample()
    return cache


def replayed(messages):
    """What a page knows after these messages."""
    rows, marks = [], []
    for message in messages:
        if message["kind"] == "show":
            rows, marks = list(message["rows"]), list(message["marks"])
        else:
            rows[message["from"] :] = message["rows"]
            marks += message["marks"]
    return rows, marks


def test_a_page_learns_everything_once_and_in_order(bench, sampler, view):
    view._snapshot("v")
    cache = grow(bench, sampler, 5)
    view.refresh()
    sampler.mark("format", "bf16 to q6")
    cache.truncate(10)
    sampler.sample()
    view.refresh()
    rows, marks = replayed(view.told)
    assert [message["kind"] for message in view.told] == ["show", "grow", "grow"]
    assert [row[1] for row in rows] == sampler.timeline()["tokens"].tolist() == [0, 30, 60, 90, 120, 150, 10]
    assert [row[3] for row in rows] == sampler.timeline()["cache rows"].tolist()
    assert [row[2] for row in rows] == [row[1] * 960 for row in rows]
    assert [mark[2] for mark in marks] == [mark.kind for mark in sampler.marks]
    json.dumps(view.told)


def test_a_moved_reading_takes_the_place_of_the_one_they_know(bench, sampler, view):
    for _ in range(3):
        sampler.sample()
    view._snapshot("v")
    time.sleep(0.05)
    sampler.sample()  # nothing has changed: the last one is moved on
    grow(bench, sampler, 1)
    view.refresh()
    rows, _ = replayed(view.told)
    assert [row[0] for row in rows] == pytest.approx(sampler.timeline().index.tolist(), abs=0.01)


def test_after_a_thinning_all_is_told_anew(bench, sampler, view, monkeypatch):
    monkeypatch.setattr(timeline, "LIMIT", 10)
    view._snapshot("v")
    grow(bench, sampler, 25)
    view.refresh()
    assert [message["kind"] for message in view.told] == ["show", "show"]
    assert [row[1] for row in view.told[-1]["rows"]] == sampler.timeline()["tokens"].tolist()


def test_messages_are_two_seconds_apart_and_none_while_it_is_not_live(bench, sampler, view):
    view._snapshot("v")
    grow(bench, sampler, 20)
    assert len(view.told) == 1
    view.live = False
    view._last = 0.0
    grow(bench, sampler, 3)
    assert len(view.told) == 1
    view.live = True
    assert len(view.told) == 2 and len(replayed(view.told)[0]) == len(sampler.readings)


def test_with_a_bench_it_samples_from_the_first_display_on(bench):
    view = MemoryTimeline(bench)
    assert not view.sampler.running
    view._handle_custom_msg({"kind": "ready", "view": "v"}, [])
    assert view.sampler.running
    view.close()
    assert not view.sampler.running and view.sampler.meter is None


def test_the_table_is_by_time_or_by_token(bench, sampler, view):
    grow(bench, sampler, 3)
    assert view.table().index.name == "seconds" and view.table("tokens").index.name == "tokens"


def test_without_a_browser_there_is_a_picture_and_a_table(bench, sampler, view):
    cache = grow(bench, sampler, 5)
    page = view._repr_mimebundle_()
    assert page["image/png"][:4] == b"\x89PNG" and f"{cache.nbytes}" in page["text/html"]
    assert "5 readings" in page["text/plain"] and "sampling took" in page["text/plain"]
    assert "image/png" not in MemoryTimeline(Sampler(Meter(bench)))._repr_mimebundle_()
