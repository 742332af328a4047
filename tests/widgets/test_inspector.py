"""A token opened: what a trace knows of it, what it does not, and an edit for every button."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from widgets.routed import GREEDY, Wire, routed_trace

from workbench.config import PRESETS
from workbench.edits import Ablate, Bias, Force, TopK, to_dict
from workbench.errors import RequestError
from workbench.ops import groups_kept as reference
from workbench.trace import Trace
from workbench.widgets.inspection import Alternative, Inspection, RoutedLayer, groups_kept, inspect_trace
from workbench.widgets.inspector import TokenInspector
from workbench.widgets.selection import Selection

TEXTS = ["<user>", "hi", " there", "<b>", " end"]
SECONDS = 10


@pytest.fixture
def trace():
    return routed_trace(TEXTS)


@pytest.fixture
def made(monkeypatch):
    """made(...) is a TokenInspector and what it sends."""
    opened = []

    def make(*arguments, **options):
        wire = Wire()
        monkeypatch.setattr(
            TokenInspector,
            "send",
            lambda self, content, buffers=None: wire.append(
                (json.loads(json.dumps(content, allow_nan=False)), buffers)
            ),
        )
        opened.append(TokenInspector(*arguments, **options))
        return opened[-1], wire

    yield make
    for inspector in opened:
        inspector.close()


def press(inspector, kind, **content):
    """As the browser does it."""
    inspector._handle_custom_msg({"kind": kind, "view": "v"} | content, [])


def test_a_trace_with_scores_tells_all_of_them_and_the_groups_that_were_kept(trace):
    seen = inspect_trace(trace, 2)
    assert [layer.layer for layer in seen.layers] == [1, 2, 5]
    for place, layer in enumerate(seen.layers):
        np.testing.assert_array_equal(layer.scores, trace.scores[2, place])
        assert {expert // 4 for expert in layer.experts} <= set(layer.groups_kept)
        allowed = [e for e in range(32) if e // 4 in layer.groups_kept and e not in layer.experts]
        assert layer.margin == pytest.approx(min(layer.scores[list(layer.experts)]) - max(layer.scores[allowed]))


def test_the_groups_kept_are_those_of_the_router():
    config = PRESETS["v2"]
    for probs in torch.rand(50, config.n_routed_experts, generator=torch.Generator().manual_seed(0)):
        kept = reference(probs[None], config)[0].nonzero().flatten().tolist()
        assert list(groups_kept(probs.numpy(), config.n_group, config.topk_group)) == kept


def test_without_scores_only_what_was_chosen_is_known():
    layer = inspect_trace(routed_trace(TEXTS, scores=False), 2).layers[0]
    assert len(layer.experts) == len(layer.gates) == len(layer.margins) == 4
    assert layer.scores is None and layer.groups_kept is None and layer.lens is None and layer.routed_norm is None


def test_greedy_routing_has_no_groups():
    seen = inspect_trace(routed_trace(TEXTS, config=GREEDY), 2)
    assert (seen.n_group, seen.n_experts, len(seen.layers[0].experts)) == (1, 64, 6)
    assert seen.layers[0].groups_kept is None


def test_a_token_that_was_generated_last_was_read_by_nobody(trace):
    seen = inspect_trace(trace, len(trace) - 1)
    assert seen.layers == ()
    page = TokenInspector()
    page.show(seen)
    assert "no pass has read it" in page._repr_mimebundle_()["text/plain"]


def test_facts_are_those_of_the_trace_and_what_was_not_measured_is_none(trace):
    prompt, answer = inspect_trace(trace, 0), inspect_trace(trace, 3)
    assert prompt.phase == "prefill" and prompt.probability is None and prompt.entropy is None and prompt.ms is None
    assert (answer.probability, answer.entropy, answer.ms, answer.logprob) == (0.75, 1.25, 12.5, -0.5)
    assert (answer.before, answer.text, answer.after) == ("<user>hi there", "<b>", " end")
    assert answer.alternatives is None


def test_a_joined_trace_keeps_sequences_and_their_edits_apart(trace):
    edited = routed_trace(["<user>", "x", "y"], edits=[to_dict(TopK(None, 1))])
    both = Trace.join([trace, edited])
    assert inspect_trace(both, 4).after == "" and inspect_trace(both, 5).before == ""
    assert inspect_trace(both, 4).edits == () and inspect_trace(both, 6).edits == ("1 expert per token in every layer",)


@pytest.mark.parametrize("token", [-1, 5, True, "2", None])
def test_a_token_that_is_not_there_is_refused(trace, token):
    with pytest.raises(RequestError, match="the trace has 5"):
        inspect_trace(trace, token)


def test_a_new_page_hears_everything_and_only_that_page(made, trace):
    inspector, wire = made(lambda token: inspect_trace(trace, token))
    press(inspector, "ready")
    assert wire.of("show")[-1]["inspection"] is None
    inspector.open(2)
    wire.clear()
    press(inspector, "ready")
    [(message, buffers)] = wire
    assert message["view"] == "v" and message["inspection"]["text"] == " there" and message["layer"] == 1
    scores = np.frombuffer(buffers[0], "<f4").reshape(3, 32)
    np.testing.assert_array_equal(scores, trace.scores[2])


def test_unknown_numbers_are_null_on_the_wire(made):
    inspector, wire = made()
    nan = float("nan")
    layer = RoutedLayer(3, (7, 8), (0.5, nan), (nan, nan), routed_norm=nan)
    inspector.show(Inspection(0, 0, 1, "x", "decode", 32, layers=(layer,), ms=nan))
    sent = wire.of("show")[-1]["inspection"]
    assert sent["ms"] is None and sent["layers"][0]["gates"] == [0.5, None] and sent["layers"][0]["routed"] is None


def test_half_a_character_can_be_sent(made):
    inspector, wire = made()
    inspector.show(Inspection(0, 0, 1, "\ud83e", "decode", 32, alternatives=(Alternative(1, "\ud83e", 0.5, 0.5),)))
    wire.of("show")[-1]["inspection"]["text"].encode()


def test_every_button_is_an_edit_of_the_layer_looked_at(made, trace):
    edits = []
    inspector, wire = made(lambda token: inspect_trace(trace, token), on_edit=edits.append)
    inspector.open(2)
    press(inspector, "edit", edit="ablate", layer=5, expert=17, amount=2, here=False)
    press(inspector, "edit", edit="force", layer=5, expert=3, amount=2, here=True)
    press(inspector, "edit", edit="bias", layer=1, expert=3, amount=-1.5, here=False)
    assert edits == [Ablate(5, (17,)), Force(5, (3,), positions=(2, 3)), Bias(1, 3, -1.5)]
    assert wire.of("edited")[0]["text"] == "without expert 17 in layer 5"
    assert inspector.edit("ablate", 4) == edits[-1] == Ablate(1, (4,))


def test_an_edit_that_cannot_be_is_told_to_the_page(made, trace):
    def refuse(edit):
        raise RequestError("still answering: stop() first, or wait().")

    inspector, wire = made(lambda token: inspect_trace(trace, token), on_edit=refuse)
    inspector.open(2)
    press(inspector, "edit", edit="ablate", layer=1, expert=3)
    press(inspector, "edit", edit="ablate", layer=1, expert=32)
    press(inspector, "edit", edit="ablate", layer=0, expert=3)
    said = [message["text"] for message in wire.of("notice")]
    assert "still answering" in said[0] and "no expert 32" in said[1] and "layer 0 was not recorded" in said[2]
    inspector.on_edit = None
    with pytest.raises(RequestError, match="on_edit"):
        inspector.edit("ablate", 3)


def test_the_selection_opens_tokens_and_hears_what_is_looked_at(made, trace):
    selection = Selection()
    inspector, wire = made(lambda token: inspect_trace(trace, token), selection)
    selection.token = 3
    inspector.wait(SECONDS)
    assert inspector.inspection.token == 3
    press(inspector, "choose", layer=5, expert=17)
    assert (selection.layer, selection.expert) == (5, 17)
    press(inspector, "open", token=2)
    inspector.wait(SECONDS)
    assert selection.token == 2 and inspector.layer == 5, "the next token opens in the same layer"
    wire.clear()
    selection.layer = 2
    assert inspector.layer == 2
    assert len(wire.of("chosen")) == 1, "told once, not back and forth"
    selection.layer = 99
    assert inspector.layer == 2, "a layer of another model is left alone"


def test_after_close_the_selection_is_followed_no_more(made, trace):
    selection, asked = Selection(), []
    inspector, _ = made(lambda token: asked.append(token) or inspect_trace(trace, token), selection)
    inspector.close()
    selection.token = 3
    assert asked == []


def test_of_many_tokens_asked_for_only_the_newest_is_fetched(made, trace):
    started, go, asked = threading.Event(), threading.Event(), []

    def slow(token):
        asked.append(token)
        started.set()
        assert go.wait(SECONDS)
        return inspect_trace(trace, token)

    selection = Selection()
    inspector, _ = made(slow, selection)
    selection.token = 0
    assert started.wait(SECONDS)
    for token in (1, 2, 3):
        selection.token = token
    with pytest.raises(TimeoutError):
        inspector.wait(0.01)
    go.set()
    inspector.wait(SECONDS)
    assert asked == [0, 3] and selection.token == 3 and inspector.inspection.token == 3


def test_a_token_the_source_refuses_leaves_the_one_that_is_open(made, trace):
    inspector, wire = made(lambda token: inspect_trace(trace, token))
    inspector.open(2)
    press(inspector, "open", token=99)
    inspector.wait(SECONDS)
    assert inspector.inspection.token == 2 and "no token 99" in wire.of("notice")[0]["text"]


def test_a_saved_notebook_shows_the_routing_as_text_table_and_picture(trace):
    inspector = TokenInspector(lambda token: inspect_trace(trace, token))
    assert "no token is open" in inspector._repr_mimebundle_()["text/html"]
    inspector.open(3)
    page = inspector._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in page
    assert "<b>" not in page["text/html"] and "&lt;b&gt;" in page["text/html"]
    first = inspector.inspection.layers[0]
    assert f"layer 1: experts {first.experts[0]} (gate {first.gates[0]:.3g}" in page["text/plain"]
    assert page["image/png"].startswith(b"\x89PNG") and len(page["image/png"]) < 50_000


def test_a_saved_trace_is_looked_at_without_torch():
    code = "import sys, workbench.widgets.inspector, workbench.widgets.compare; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
