"""What an engine holds between answers is used again only where it is right: same text, same edits, all of it."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from watched import EDITS, GREEDY, HELLO, PROMPTS, logprobs, same

import workbench as wb
from workbench.edits import Ablate, Bias, Scale, TopK, describe
from workbench.engine import Engine
from workbench.errors import RequestError, WorkbenchError
from workbench.probe import Probe, both
from workbench.trace import Trace
from workbench.watching import Watch


@pytest.fixture(scope="module")
def bench():
    return wb.load(device="cpu", dtype="fp32")


@pytest.fixture
def fresh(bench):
    """fresh() -> an engine with nothing in its cache."""
    return lambda: Engine(bench.model, bench.tokenizer, "fp32", "pocket")


def turns(*said):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]


def test_the_next_turn_knows_the_routing_of_what_it_found_in_the_cache(fresh):
    engine = fresh()
    first = engine.generate(HELLO, GREEDY)
    before = first.trace
    conversation = [*HELLO, {"role": "assistant", "content": first.text, "tokens": first.tokens}, *turns("And you?")]
    second = engine.generate(conversation, GREEDY)
    assert second.stats.reused_tokens > first.prompt_tokens
    assert same(second, fresh().generate(conversation, GREEDY))
    assert (second.trace.experts[:-1] >= 0).all()
    third = engine.generate("Hello, who", GREEDY)  # shares a beginning only, and cuts the cache
    assert same(third, fresh().generate("Hello, who", GREEDY))
    assert first.trace.tokens.equals(before.tokens) and np.array_equal(first.trace.experts, before.experts)
    assert same(second, fresh().generate(conversation, GREEDY))


def test_a_trace_not_read_before_the_next_turn_is_still_its_own(fresh):
    engine = fresh()
    first = engine.generate(HELLO, GREEDY)
    engine.generate([*HELLO, *turns("", "And now something else.")[1:]][:1] + turns("", "ok", "And more?")[1:], GREEDY)
    engine.generate("Hello, who are they?", GREEDY)
    assert same(first, fresh().generate(HELLO, GREEDY))


def test_what_was_read_under_other_edits_is_never_used_again(fresh):
    engine, expected = fresh(), {}
    for name, edits in {"none": [], **EDITS}.items():
        expected[name] = fresh().generate(PROMPTS[2], GREEDY, edits=edits)
    for name in EDITS:
        assert logprobs(expected[name]) != pytest.approx(logprobs(expected["none"]), abs=5e-3), name
    order = ["none", "ablate", "none", "wide", "ablate", "decode", "none", "prefill", "decode", "positions", "prefill"]
    for name in order:
        done = engine.generate(PROMPTS[2], GREEDY, edits=EDITS.get(name, []))
        assert done.stats.reused_tokens == 0 and same(done, expected[name])
        again = engine.generate(PROMPTS[2], GREEDY, edits=EDITS.get(name, []))
        assert again.stats.reused_tokens == again.prompt_tokens - 1 and same(again, expected[name])


@pytest.mark.parametrize("name", EDITS)
def test_edits_over_several_turns_are_those_of_reading_it_all_anew(name, fresh):
    """An answer becomes part of the next prompt, so an edit of one phase acts elsewhere in the next turn."""
    engine, conversation = fresh(), list(HELLO)
    for text in ("Why?", "And then?", "Go on."):
        done = engine.generate(conversation, GREEDY, edits=EDITS[name])
        assert same(done, fresh().generate(conversation, GREEDY, edits=EDITS[name]))
        phase = any(edit.phase for edit in EDITS[name])
        assert (done.stats.reused_tokens > 0) == (len(conversation) > 1 and not phase)
        conversation += [{"role": "assistant", "content": done.text, "tokens": done.tokens}, *turns(text)]


def test_watching_reads_a_cached_prompt_anew(fresh):
    engine = fresh()
    plain = engine.generate(HELLO, GREEDY)
    seen = engine.generate(HELLO, GREEDY, watch=("resid.mid",))
    assert seen.stats.reused_tokens == 0 and same(seen, plain)
    assert seen.watched.recorder["resid.mid", 0].shape[1] == len(seen.trace) - 1
    after = engine.generate(HELLO, GREEDY)
    assert after.stats.reused_tokens > 0 and same(after, plain)


def test_a_stopped_answer_has_a_trace_and_what_comes_after_it_is_right(fresh, tmp_path):
    engine, stop = fresh(), threading.Event()
    stream = engine.stream(HELLO, replace(GREEDY, max_tokens=50), stop=stop)
    empty = stream.trace()
    assert len(empty) == stream.stats.prompt_tokens and (empty.experts == -1).all()
    for _ in range(4):
        next(stream)
    partial = stream.trace()
    stop.set()
    assert list(stream) == [] and stream.stats.finish == "stopped"
    trace = stream.trace()
    assert len(trace) == len(partial) == stream.stats.prompt_tokens + 4
    assert np.array_equal(trace.experts[:-1], partial.experts[:-1]) and (partial.experts[:-1] >= 0).all()
    trace.save(tmp_path / "stopped.parquet")
    assert Trace.load(tmp_path / "stopped.parquet") == trace
    assert same(engine.generate(HELLO, GREEDY), fresh().generate(HELLO, GREEDY))
    closed = engine.stream(HELLO, GREEDY)
    next(closed)
    closed.close()
    assert len(closed.trace()) == closed.stats.prompt_tokens + 1
    assert same(engine.generate(HELLO, GREEDY), fresh().generate(HELLO, GREEDY))


class Breaks(Probe):
    """Fails at one site of the pass with this number."""

    def __init__(self, site, number):
        self.site, self.number, self.passes = site, number, 0

    def begin(self, config, positions, dtype):
        self.passes += 1
        return self

    def __call__(self, site, x):
        if site == self.site and self.passes == self.number:
            raise WorkbenchError("broken on purpose")
        return x


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("site", ["embed", "moe.gates", "logits"])
@pytest.mark.parametrize("edits", [[], EDITS["ablate"]], ids=["none", "ablate"])
def test_after_an_error_in_the_middle_the_engine_goes_on(edits, site, number, fresh, monkeypatch):
    engine, breaks, probe = fresh(), Breaks(site, number), Watch.probe
    monkeypatch.setattr(Watch, "probe", lambda self, watched: both(probe(self, watched), breaks))
    stream = engine.stream(HELLO, GREEDY, edits=edits)
    with pytest.raises(WorkbenchError, match="broken on purpose"):
        list(stream)
    monkeypatch.undo()
    assert len(stream.trace()) == stream.stats.prompt_tokens + number - 1
    done = engine.generate(HELLO, GREEDY, edits=edits)
    assert same(done, fresh().generate(HELLO, GREEDY, edits=edits))
    assert done.stats.reused_tokens == (done.prompt_tokens - 1 if number > 1 else 0)


def test_a_refused_edit_costs_nothing(fresh):
    engine = fresh()
    plain = engine.generate(HELLO, GREEDY)
    for wrong in ([Ablate(0, 3)], [Ablate(1, 99)], [Scale("resid.past", 1)], [TopK(1, 2), "Ablate"]):
        for ask in (
            engine.stream,
            engine.generate,
            lambda prompt, *rest, **options: engine.batch([prompt], *rest, **options),
        ):
            with pytest.raises(RequestError):
                ask(HELLO, GREEDY, edits=wrong)
    with pytest.raises(RequestError, match="no site called 'resid.past'"):
        engine.stream(HELLO, GREEDY, watch=("resid.past",))
    again = engine.generate(HELLO, GREEDY)
    assert again.stats.reused_tokens > 0 and same(again, plain)


@pytest.mark.parametrize(
    "edit", [Ablate(1, 3, positions=(500, 600)), Scale("attn.v", 0, positions=(400, 401))], ids=describe
)
def test_an_edit_that_no_token_met_is_an_error_at_the_end(edit, fresh):
    engine, seen = fresh(), []
    with pytest.raises(RequestError, match=r"no token met .*: the text ended before these positions"):
        for step in engine.stream(HELLO, GREEDY, edits=[Bias(1, 3, 1), edit]):
            seen.append(step)
    assert len(seen) == 10
    with pytest.raises(RequestError, match="no token met"):
        engine.batch(PROMPTS, GREEDY, edits=[edit])
    with pytest.raises(RequestError, match="no token met"):
        engine.generate(HELLO, replace(GREEDY, max_tokens=1), edits=[Ablate(1, 3, phase="decode")])
    assert same(engine.generate(HELLO, GREEDY), fresh().generate(HELLO, GREEDY))


def test_an_edit_that_met_tokens_in_the_cache_is_none(fresh):
    engine, edits = fresh(), [Ablate(1, 3, positions=(0, 2))]
    engine.generate(HELLO, GREEDY, edits=edits)
    again = engine.generate(HELLO, GREEDY, edits=edits)
    assert again.stats.reused_tokens > 2


def test_two_streams_at_once_keep_out_of_each_other(fresh):
    engine = fresh()
    engine.generate(HELLO, GREEDY)
    streams = [engine.stream(HELLO, GREEDY, edits=edits) for edits in ([], EDITS["ablate"], [])]
    for steps in zip(*streams, strict=True):
        assert len({step.position for step in steps}) == 1
    for stream, edits in zip(streams, ([], EDITS["ablate"], []), strict=True):
        alone = fresh().generate(HELLO, GREEDY, edits=edits)
        assert [step.token for step in stream.steps] == [step.token for step in alone.steps]
        assert np.array_equal(stream.trace().experts, alone.trace.experts)
    assert same(engine.generate(HELLO, GREEDY), fresh().generate(HELLO, GREEDY))
