"""A generation that is watched and edited: its trace is what a whole pass over the same tokens shows."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from watched import EDITS, GREEDY, HELLO, PROMPTS, logprobs, same

import workbench as wb
from workbench.editing import Editing
from workbench.edits import Ablate, ReplayRouting, Scale, TopK, from_dict
from workbench.engine import CHUNK, Engine
from workbench.errors import RequestError, WorkbenchError
from workbench.probe import both
from workbench.recorder import Recorder
from workbench.sampling import Sampling

SITES = ("moe.experts", "moe.gates", "moe.scores")
edited = pytest.mark.parametrize("edits", [[], *EDITS.values()], ids=["none", *EDITS])


@pytest.fixture(scope="module")
def bench():
    return wb.load(device="cpu", dtype="fp32")


@pytest.fixture
def fresh(bench):
    """fresh() -> an engine with nothing in its cache."""
    return lambda: Engine(bench.model, bench.tokenizer, "fp32", "pocket")


def whole(bench, trace, edits, *sites):
    """A Recorder over one pass of all tokens of a trace but the last."""
    recorder, tokens = Recorder(*sites), torch.tensor([trace.tokens["id"].tolist()[:-1]])
    prompt = trace.header["sequences"][0]["prompt_tokens"]
    with torch.no_grad():
        bench.model(tokens, probe=both(Editing(edits, bench.config, prompt), recorder))
    return recorder


def routing(recorder, layers, slots):
    def stacked(site, unused):
        parts = [recorder[site, n][0] for n in layers]
        return torch.stack(
            [torch.nn.functional.pad(x, (0, slots - x.shape[-1]), value=unused) for x in parts], 1
        ).numpy()

    margins = {}
    for n in layers:
        scores = recorder["moe.scores", n]
        margins["moe.scores", n] = scores[..., :-1] - scores[..., -1:]
    experts = stacked("moe.experts", -1)
    parts = [torch.nn.functional.pad(x[0], (0, slots - x.shape[-1])) for x in margins.values()]
    return experts, stacked("moe.gates", 0), np.where(experts >= 0, torch.stack(parts, 1).numpy(), np.nan)


@edited
def test_a_trace_is_what_a_whole_pass_over_the_same_tokens_shows(edits, bench, fresh):
    done = fresh().generate(HELLO, GREEDY, edits=edits, scores=True)
    trace = done.trace
    recorder = whole(bench, trace, edits, *SITES, "moe.router_probs", "logits")
    experts, gates, margins = routing(recorder, trace.layers, trace.k)
    assert np.array_equal(trace.experts[:-1], experts)
    assert np.allclose(trace.gates[:-1], gates, rtol=1e-3, atol=1e-5)
    assert np.allclose(trace.margins[:-1], margins, rtol=1e-3, atol=1e-5, equal_nan=True)
    probabilities = torch.stack([recorder["moe.router_probs", n][0] for n in trace.layers], 1).numpy()
    assert np.allclose(trace.scores[:-1], probabilities, atol=1e-5)
    assert (trace.experts[-1] == -1).all() and np.isnan(trace.scores[-1]).all() and not trace.gates[-1].any()
    expected = recorder["logits", None][0].log_softmax(-1)
    ids = trace.tokens["id"].tolist()
    for position in range(done.prompt_tokens, len(ids)):
        assert trace.tokens["logprob"][position] == pytest.approx(
            expected[position - 1, ids[position]].item(), abs=1e-4
        )


def test_the_columns_and_the_header_of_a_trace(bench, fresh):
    edits = [Ablate(1, 3), Scale("attn.z", 0, 1, index=2)]
    done = fresh().generate(HELLO, replace(GREEDY, seed=7), edits=edits)
    trace, prompt = done.trace, done.prompt_tokens
    table = trace.tokens
    assert len(table) == prompt + len(done.steps) and table["position"].tolist() == list(range(len(table)))
    assert table["phase"].tolist() == ["prefill"] * prompt + ["decode"] * len(done.steps)
    assert table["id"].tolist()[prompt:] == [step.token for step in done.steps]
    assert table["logprob"][:prompt].isna().all() and (table["cache_bytes"][:prompt] == -1).all()
    for column, values in {
        "logprob": logprobs(done),
        "probability": [step.choice.probability for step in done.steps],
        "entropy": [step.choice.entropy for step in done.steps],
        "ms": [1000 * step.seconds for step in done.steps],
        "cache_bytes": [step.cache_bytes for step in done.steps],
    }.items():
        assert table[column][prompt:].tolist() == pytest.approx(values, rel=1e-6)
    assert [from_dict(each) for each in trace.header["edits"]] == edits
    assert trace.header["sampling"]["seed"] == 7 and trace.header["model"] == "pocket"
    about = {"cache": "fp32", "prompt_tokens": prompt, "seed": 7, "finish": done.stats.finish}
    assert trace.header["sequences"] == [about]
    assert trace.scores is None and trace.n_experts == 32 and trace.k == 4
    again = fresh().generate(HELLO, GREEDY, edits=[from_dict(each) for each in trace.header["edits"]])
    assert same(again, done)


@edited
def test_a_batch_gives_each_the_answer_and_the_trace_it_has_alone(edits, fresh):
    alone = [fresh().generate(prompt, GREEDY, edits=edits) for prompt in PROMPTS]
    for slots in (1, 3):
        together = fresh().batch(PROMPTS, GREEDY, slots=slots, edits=edits)
        for one, other in zip(together, alone, strict=True):
            assert same(one, other)


def test_scores_and_sites_of_a_batch_are_those_of_each_alone(fresh):
    watch = ("attn.pattern", "attn.v", "resid.post", "logits")
    together = fresh().batch(PROMPTS, GREEDY, slots=3, watch=watch, scores=True)
    for prompt, one in zip(PROMPTS, together, strict=True):
        alone = fresh().generate(prompt, GREEDY, watch=watch, scores=True)
        assert same(one, alone) and np.allclose(one.trace.scores, alone.trace.scores, atol=1e-5, equal_nan=True)
        for site in watch:
            key = (site, None if site == "logits" else 2)
            got, wanted = one.watched.recorder[key], alone.watched.recorder[key]
            assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-3)


def test_what_was_watched_is_what_a_whole_pass_shows(bench, fresh):
    sites = ("resid.post", "attn.pattern", "attn.k_content", "moe.expert_out", "logits", "final.norm")
    done = fresh().generate(HELLO, GREEDY, watch=sites, edits=EDITS["decode"])
    recorder, seen = whole(bench, done.trace, EDITS["decode"], *sites), done.watched.recorder
    for site in sites:
        assert seen.layers_of(site) == recorder.layers_of(site)
        for layer in seen.layers_of(site):
            assert seen[site, layer].shape == recorder[site, layer].shape, site
            assert torch.allclose(seen[site, layer], recorder[site, layer], atol=2e-3), site
    assert (
        fresh().generate(HELLO, GREEDY, watch="logits").watched.recorder["logits", None].shape[1] == len(done.trace) - 1
    )


def test_a_long_prompt_in_chunks_has_one_trace(bench, fresh):
    prompt = torch.randint(0, 4000, (CHUNK + 90,), generator=torch.Generator().manual_seed(1)).tolist()
    edits = [Ablate(1, 3), TopK(2, 2, positions=(CHUNK - 3, CHUNK + 3))]
    trace = fresh().generate(prompt, replace(GREEDY, max_tokens=3), edits=edits).trace
    experts, gates, _ = routing(whole(bench, trace, edits, *SITES), trace.layers, trace.k)
    assert (trace.experts[:-1] == experts).mean() > 0.999  # of 9,000 choices a few are near ties
    assert np.allclose(np.sort(trace.gates[:-1], -1), np.sort(gates, -1), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("gates, tolerance", [(False, 1e-5), (True, 1e-2)])  # a trace holds gates in half precision
@pytest.mark.parametrize("edits", [[], EDITS["wide"], EDITS["ablate"]], ids=["none", "wide", "ablate"])
def test_replaying_the_trace_of_an_answer(edits, gates, tolerance, bench, fresh):
    done = fresh().generate(HELLO, GREEDY, edits=edits)
    replay = [ReplayRouting(done.trace, gates)]
    if edits and edits[0] == EDITS["ablate"][0]:
        replay = [*edits, *replay]  # the probabilities of now weigh what is replayed, so they must be the same
    again = fresh().generate(HELLO, GREEDY, edits=replay)
    assert again.tokens == done.tokens and logprobs(again) == pytest.approx(logprobs(done), abs=max(tolerance, 1e-4))
    assert np.array_equal(again.trace.experts, done.trace.experts)
    tokens = torch.tensor([done.trace.tokens["id"].tolist()[:-1]])
    with torch.no_grad():
        plain = bench.model(tokens, probe=Editing(edits, bench.config))
        replayed = bench.model(tokens, probe=Editing(replay, bench.config))
    assert (plain - replayed).abs().max() <= tolerance * max(1, plain.abs().max())
    saved = [from_dict(each) for each in again.trace.header["edits"]]
    assert saved == replay and same(fresh().generate(HELLO, GREEDY, edits=saved), again)


def test_replaying_another_answer_changes_what_is_said(fresh):
    plain, other = fresh().generate(HELLO, GREEDY), fresh().generate(PROMPTS[0], GREEDY)
    done = fresh().generate(HELLO, GREEDY, edits=[ReplayRouting(other.trace)])
    assert done.tokens != plain.tokens or logprobs(done) != pytest.approx(logprobs(plain), abs=1e-2)


def test_a_trace_can_be_taken_in_another_thread_at_any_moment(fresh):
    stream = fresh().stream(HELLO, Sampling(temperature=0, max_tokens=60), scores=True)
    traces, wrong, done = [], [], threading.Event()

    def take():
        while not done.is_set():
            try:
                traces.append(stream.trace())
            except (WorkbenchError, ValueError, RuntimeError, IndexError) as error:
                wrong.append(repr(error))

    thread = threading.Thread(target=take)
    thread.start()
    list(stream)
    done.set()
    thread.join()
    assert not wrong, wrong[:2]
    final = stream.trace()
    assert len(traces) > 3 and len(traces[-1]) <= len(final)
    for trace in traces:
        read = (trace.experts[:, 0, 0] >= 0).sum()
        assert np.array_equal(trace.experts[:read], final.experts[:read])
        assert trace.tokens["id"].tolist() == final.tokens["id"].tolist()[: len(trace)]


def test_many_prompts_are_one_trace(bench, fresh):
    trace = bench.trace(PROMPTS, GREEDY, labels=["en", "en", "en", "zh"], slots=2, edits=EDITS["wide"], scores=True)
    for number, prompt in enumerate(PROMPTS):
        alone, one = fresh().generate(prompt, GREEDY, edits=EDITS["wide"], scores=True).trace, trace.sequence(number)
        assert np.array_equal(one.experts, alone.experts) and np.allclose(
            one.scores, alone.scores, atol=1e-5, equal_nan=True
        )
        assert trace.header["sequences"][number]["label"] == ("zh" if number == 3 else "en")
    with pytest.raises(RequestError, match="4 prompts but 1 labels"):
        bench.trace(PROMPTS, GREEDY, labels=["en"])
