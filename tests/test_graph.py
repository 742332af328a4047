"""Lean passes, and steps that are replayed: the same as Model.forward, whatever changes between two steps.

There is no GPU here. What a CUDA graph would hold is traced instead: every value that came from the host while tracing
is a constant of the replay, so a step that asked the host for anything that changes would give a wrong one.
"""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from workbench import door
from workbench.cache import LatentCache
from workbench.editing import Editing
from workbench.edits import Ablate, Bias, Force
from workbench.engine import Engine
from workbench.formats import CACHE_FORMATS
from workbench.graph import DecodeGraph
from workbench.model import Model
from workbench.probe import OFF, both
from workbench.recorder import Recorder
from workbench.ring import RoutingRing
from workbench.sampling import Sampling


def traced(step):
    graph = make_fx(step, tracing_mode="real")()
    return graph


def counted(step, replays):
    """`step`, noting whether it was a replay."""

    def counting(self, *args):
        before = self.replays
        logits = step(self, *args)
        replays.append(self.replays - before)
        return logits

    return counting


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU, but every operation is answered by its reference body."""
    monkeypatch.setattr(door, "present", lambda x: True)
    monkeypatch.setattr("workbench.model.present", lambda x: True)
    monkeypatch.setattr("workbench.lean.present", lambda x: True)
    monkeypatch.setattr("workbench.engine.present", lambda x: True)
    monkeypatch.setattr(door, "kernel", lambda name: None)


def passes(model, cache, spans, probe=OFF):
    with torch.inference_mode():
        return torch.cat([model(span, cache, probe) for span in spans], 1)


def draw(model, *shape):
    return torch.randint(model.config.vocab_size, shape)


@pytest.mark.parametrize("format", list(CACHE_FORMATS))
@pytest.mark.parametrize("name", ["v2", "lite"])
def test_a_lean_pass_is_the_pass(name, format, model, gpu, monkeypatch):
    model = model(name)
    tokens = draw(model, 2, 90)
    spans = tokens.split([70, 1, 1, 3, 15], 1)
    lean_cache, plain = (LatentCache.for_model(model.config, 2, format) for _ in range(2))
    assert model.explain(lean_cache, OFF) is None
    ours = passes(model, lean_cache, spans)
    monkeypatch.setattr(Model, "fuse", False)
    theirs = passes(model, plain, spans)
    scale = theirs.std()
    assert (ours - theirs).abs().max() < (2e-4 if format in ("fp32", "bf16") else 0.1) * scale
    if format == "fp32":
        for mine, its in zip(lean_cache.pool.layers, plain.pool.layers, strict=True):
            assert torch.allclose(mine[0][:90], its[0][:90], atol=1e-5)


class Steps:
    """A model's answer token by token, by replays and by passes, each with its own cache, recorder and edits."""

    def __init__(self, model, format="fp32", batch=1, live=False, edits=()):
        self.model, self.batch = model, batch
        self.sides = [self.side(format, edits, live) for _ in range(2)]
        self.graph = DecodeGraph(model, traced)

    def side(self, format, edits, live):
        ring = RoutingRing(self.model.config, capacity=40)
        editing = Editing(edits, self.model.config, live=live) if edits or live else OFF
        ring.to(*[ring.log() for _ in range(self.batch)])
        return LatentCache.for_model(self.model.config, self.batch, format), ring, editing

    def read(self, tokens):
        for cache, ring, editing in self.sides:
            passes(self.model, cache, [tokens], both(editing, ring))

    def step(self, tokens):
        (cache, ring, editing), (plain, other, edits) = self.sides
        with torch.no_grad():
            ours = self.graph.step(tokens, cache, both(editing, ring)).clone()
            theirs = self.model(tokens, plain, both(edits, other), logits="last")
        return ours, theirs

    def agree(self, rounds):
        for _ in range(rounds):
            ours, theirs = self.step(draw(self.model, self.batch, 1))
            assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)
        self.same_routing()

    def same_routing(self):
        for mine, its in zip(*(side[1]._logs for side in self.sides), strict=True):
            ours, theirs = mine.rows(), its.rows()
            assert len(ours.experts) == len(theirs.experts) == self.sides[0][0].lengths[0]
            assert (ours.experts == theirs.experts).all()
            assert abs(ours.gates - theirs.gates).max() < 1e-3


@pytest.mark.parametrize("format", ["fp32", "q6", "fp8"])
def test_replayed_steps_are_the_steps(format, model, gpu):
    """Over the end of a block and of the recorder's rings; storage that grows is captured anew, and nothing else is."""
    steps = Steps(model("v2"), format)
    steps.read(draw(steps.model, 1, 61))
    steps.agree(20)
    assert steps.graph.replays == 18 and steps.graph.captures == 2  # but the first step, and the first of a grown pool
    steps.agree(50)


def test_a_batch_of_ragged_sequences(model, gpu):
    steps = Steps(model("lite"), batch=3)
    steps.read(draw(steps.model, 3, 63))
    for cache, *_ in steps.sides:
        cache.truncate(20, 1)
    for _ in range(8):
        ours, theirs = steps.step(draw(steps.model, 3, 1))
        assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)
    assert steps.graph.replays > 4


def test_edits_are_live_under_replay(model, gpu):
    steps = Steps(model("v2"), live=True)
    steps.read(draw(steps.model, 1, 10))
    steps.agree(4)
    captures = steps.graph.captures
    before, _ = steps.step(token := draw(steps.model, 1, 1))
    for cache, *_ in steps.sides:
        cache.truncate(cache.lengths[0] - 1)
    layer = steps.sides[0][1].layers[0]
    for _, _, editing in steps.sides:
        editing.update([Ablate(layer, (0, 1, 2)), Bias(None, 5, 100.0)])
    ours, theirs = steps.step(token)
    assert torch.allclose(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-2) and steps.graph.captures == captures
    last = steps.sides[0][1]._logs[0].rows(-1).experts[0]
    assert (last == 5).any(-1).all() and not set(last[0]) & {0, 1, 2}


def test_what_cannot_be_replayed_is_carried_out(model, gpu):
    steps = Steps(model("v2"), edits=[Force(1, (0, 3))])
    steps.read(draw(steps.model, 1, 5))
    steps.agree(3)
    assert steps.graph.replays == 0
    cache, start = LatentCache.for_model(steps.model.config), torch.zeros(1, 1, dtype=torch.int64)
    watching = Recorder("resid.pre").begin(steps.model.config, start, torch.float32)
    assert "not made for replays" in steps.graph.refusal(cache, watching)
    assert "looks inside" in steps.model.explain(cache, watching)
    assert "wide" in steps.model.explain(LatentCache.for_model(steps.model.config, format="q6+64"), OFF)


def test_a_refused_token_leaves_everything_as_it_was(model, gpu):
    steps = Steps(model("v2"))
    steps.read(draw(steps.model, 1, 5))
    steps.agree(3)
    with pytest.raises(Exception, match="outside the vocabulary"):
        steps.graph.step(torch.tensor([[10**6]]), steps.sides[0][0], steps.sides[0][1])
    steps.agree(3)


def test_an_engine_gives_the_same_text_and_routing_by_replays(model, tokenizer, gpu, monkeypatch):
    monkeypatch.setattr("workbench.graph.captured", lambda step: traced(torch.no_grad()(step)))
    replays = []
    monkeypatch.setattr(DecodeGraph, "step", counted(DecodeGraph.step, replays))
    bench = model("v2")
    prompts = [draw(bench, length).tolist() for length in (3, 62, 20)]
    sampling = Sampling(temperature=0, max_tokens=12)
    found = [Engine(bench, tokenizer, "fp32").generate(prompt, sampling) for prompt in prompts]
    together = Engine(bench, tokenizer, "fp32").batch(prompts, sampling, slots=2)
    assert sum(replays) > 4  # a random model may end its answers early
    monkeypatch.setattr("workbench.engine.present", lambda x: False)
    for prompt, one, other in zip(prompts, found, together, strict=True):
        plain = Engine(bench, tokenizer, "fp32").generate(prompt, sampling)
        for side in (one, other):
            assert side.tokens == plain.tokens
            assert (side.trace.experts == plain.trace.experts).all()
