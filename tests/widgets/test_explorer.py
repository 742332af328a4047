"""Below the conversation: what it follows, what it says over the wire, and what its buttons start. On pocket itself."""

import json
import threading
import time

import ipywidgets
import numpy as np
import pytest

import workbench as wb
from workbench.edits import to_dict
from workbench.errors import RequestError

SECONDS = 60
# so hot that pocket rambles on
RAMBLE = wb.Sampling(temperature=50.0, top_p=1.0, max_tokens=2000, seed=3)


@pytest.fixture(scope="module")
def bench():
    return wb.load("pocket")


@pytest.fixture
def panel(bench):
    panel = wb.chat(bench, sampling=wb.Sampling(temperature=0, max_tokens=30))
    yield panel
    panel.close()


def ask(panel, text="What is an expert?"):
    panel.send(text)
    panel.wait(SECONDS)
    return panel.history[-1]


@pytest.fixture
def wire(monkeypatch):
    """(time, bytes) of everything any widget sends: custom messages and traits, buffers included."""
    sent = []

    def send(self, message, buffers=None):
        size = len(json.dumps(message, default=str)) + sum(memoryview(buffer).nbytes for buffer in buffers or ())
        sent.append((time.monotonic(), size))

    monkeypatch.setattr(ipywidgets.Widget, "_send", send)
    return sent


def test_a_reply_has_a_trace_of_prompt_and_answer(panel):
    turn = ask(panel)
    trace = turn.trace
    assert trace.tokens["id"].tolist()[-len(turn.tokens) :] == turn.tokens
    assert trace.header["sequences"][0]["prompt_tokens"] == turn.stats["prompt_tokens"]
    assert (trace.experts[:-1] >= 0).all() and (trace.experts[-1] == -1).all()


def test_a_second_turn_knows_where_the_tokens_of_the_first_went(panel):
    first = ask(panel)
    second = ask(panel, "Tell me more.")
    assert second.stats["reused_tokens"] > 0
    shared = len(first.trace) - 1
    assert np.array_equal(first.trace.experts[:shared], second.trace.experts[:shared])
    assert len(first.trace) == first.stats["prompt_tokens"] + len(first.steps), "the earlier trace is as it was"


def test_a_reply_that_was_continued_has_one_whole_trace(panel):
    panel.sampling = wb.Sampling(temperature=0, max_tokens=5)
    turn = ask(panel)
    assert turn.finish == "length"
    panel.sampling = wb.Sampling(temperature=0, max_tokens=40)
    panel.continue_()
    panel.wait(SECONDS)
    decode = turn.trace.tokens[turn.trace.tokens["phase"] == "decode"]
    assert decode["id"].tolist() == turn.tokens
    assert decode["logprob"].notna().all() and decode["ms"].notna().all()
    assert turn.trace.header["sequences"][0]["prompt_tokens"] == len(turn.trace) - len(turn.tokens)


def test_it_follows_the_newest_reply_and_shows_all_of_it(panel):
    panel.exploring = True
    for text in ("What is an expert?", "Hello!"):
        turn = ask(panel, text)
        scope, strip = panel.explorer.scope, panel.explorer.strip
        assert len(scope) == len(strip) == len(turn.trace)
        for token in (0, len(turn.trace) // 2, len(turn.trace) - 2):
            table = scope.table(token)
            assert table["expert"].tolist() == turn.trace.experts[token].flatten().tolist()
            assert table["gate"].tolist() == turn.trace.gates[token].flatten().tolist()
    panel.select(panel.history[1])
    assert panel.explorer.turn in panel.history


def test_closed_it_says_nothing_and_opened_it_shows_what_is_there(panel, wire):
    scope = panel.explorer.scope
    ask(panel)
    assert len(scope) == 0
    panel.exploring = True
    assert len(scope) == len(panel.history[-1].trace)


def test_look_opens_the_token_in_every_view(panel):
    turn = ask(panel)
    panel.look(1, 3)
    panel.explorer.inspector.wait(SECONDS)
    seen = panel.explorer.inspector.inspection
    assert panel.exploring and panel.explorer.scope.token == panel.explorer.strip.token == turn.steps[3].position
    assert seen.position == turn.steps[3].position and seen.id == turn.tokens[3]
    assert [each.id for each in seen.alternatives] == [each.token for each in turn.steps[3].alternatives]
    layer = seen.layers[0]
    assert layer.scores.sum() == pytest.approx(1, abs=1e-5) and len(layer.groups_kept) == 3
    assert layer.experts == tuple(turn.trace.experts[seen.position, 0].tolist())
    assert layer.lens.keys() == set(layer.experts) and layer.shared_norm > 0
    with pytest.raises(RequestError, match="no token 999"):
        panel.look(1, 999)


def test_ablating_the_top_expert_of_a_token_reruns_the_reply_and_compares(panel):
    turn = ask(panel)
    panel.look(1, 3)
    panel.explorer.inspector.wait(SECONDS)
    expert = panel.explorer.inspector.inspection.layer(1).experts[0]
    panel.explorer.inspector.choose(1)
    panel.explorer.inspector.edit("ablate", expert)
    panel.wait(SECONDS)
    again = panel.history[-1]
    assert again is not turn and again.versions == [turn, again]
    assert again.edits == (wb.Ablate(1, expert),) and again.settings == turn.settings or again.settings.seed is not None
    assert not (again.trace.experts[:, 0] == expert).any()
    assert again.trace.header["edits"] == [to_dict(wb.Ablate(1, expert))]
    beside = panel.explorer.compared
    assert beside.a is turn.trace and beside.b is again.trace


def test_the_same_seed_without_edits_gives_the_same_reply(panel):
    # few candidates: what is reused of the prompt rounds differently, and among many unlikely ones a tie would decide
    panel.sampling = wb.Sampling(temperature=1.0, top_k=4, max_tokens=20)
    turn = ask(panel)
    panel.rerun([])
    panel.wait(SECONDS)
    assert panel.history[-1].tokens == turn.tokens and panel.history[-1] is not turn


def test_edits_count_from_the_next_reply_on_and_are_exported(panel, bench):
    plain = ask(panel)
    panel.edits = [wb.TopK(None, 2)]
    assert panel.explorer.edits.edits == (wb.TopK(None, 2),)
    panel.exploring = True
    panel.regenerate()
    panel.wait(SECONDS)
    edited = panel.history[-1]
    assert plain.edits == () and edited.trace.experts.shape[2] == 2 and len(panel.explorer.scope) == len(edited.trace)
    data = json.loads(json.dumps(panel.export()))
    panel.load(data)
    assert panel.history[-1].edits == (wb.TopK(None, 2),)
    assert panel.explorer.conversation is panel.conversation
    with pytest.raises(RequestError, match="dense"):
        panel.edits = [wb.Ablate(0, 1)]


def test_what_was_seen_is_saved_under_a_name_that_is_not_taken(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="no complete reply"):
        panel.explorer.save()
    turn = ask(panel)
    panel.exploring = True
    panel.explorer.keep.click()
    panel.explorer.keep.click()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace-1.parquet", "trace-2.parquet"]
    assert wb.Trace.load(tmp_path / "trace-2.parquet") == turn.trace


def test_an_edit_while_answering_is_refused_and_the_reply_goes_on(panel):
    ask(panel)
    panel.sampling = RAMBLE
    panel.send("Tell me everything.")
    with pytest.raises(RequestError, match="still answering"):
        panel.rerun([wb.TopK(None, 1)], turn=1)
    panel.stop()
    panel.wait(SECONDS)


def test_a_long_answer_with_everything_open_is_gentle_to_the_wire(panel, wire):
    panel.exploring = True
    panel.sampling = RAMBLE
    for message in ({"kind": "ready", "view": "v"}, {"kind": "readings", "view": "v", "on": True}):  # tokens by expert
        panel._view._handle_custom_msg(message, [])
    del wire[:]
    panel.send("Tell me everything.")
    panel.wait(SECONDS)
    turn = panel.history[-1]
    assert len(turn.steps) > 500
    times = np.array([when for when, _ in wire])
    busiest = max(((times >= start) & (times < start + 1)).sum() for start in times)
    per_token = sum(size for _, size in wire) / len(turn.steps)
    print(f"{len(turn.steps)} tokens, {busiest} messages in the busiest second, {per_token:.0f} bytes a token")
    assert per_token < 1000
    assert busiest <= 20


def test_stop_is_heard_within_half_a_second_with_everything_open(panel):
    panel.exploring = True
    panel.sampling = RAMBLE
    panel.send("Tell me everything.")
    while len(panel.history[-1].steps) < 50:
        time.sleep(0.01)
    started = time.monotonic()
    panel.stop()
    panel.wait(SECONDS)
    assert time.monotonic() - started < 0.5
    assert len(panel.explorer.scope) == len(panel.history[-1].trace)


def test_looking_while_it_answers_disturbs_nothing(panel):
    panel.exploring = True
    panel.sampling = RAMBLE
    panel.send("Tell me everything.")
    while len(panel.history[-1].steps) < 20:
        time.sleep(0.01)
    panel.look(1, 5)
    panel.explorer.inspector.wait(SECONDS)
    assert panel.explorer.inspector.inspection.position == panel.history[-1].steps[5].position
    panel.stop()
    panel.wait(SECONDS)
    assert threading.active_count() < 20


def test_a_panel_for_a_bench_without_a_model_or_experts_still_talks(fake_bench):
    panel = wb.chat(fake_bench)
    panel.exploring = True
    panel.send("hi")
    panel.wait(SECONDS)
    assert panel.history[-1].text
    panel.close()
