"""The kernel's half of the token strip, and replaying a trace: nothing that was not measured looks like a zero."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from workbench.edits import Ablate, to_dict
from workbench.errors import RequestError
from workbench.trace import Trace, new_header
from workbench.widgets.geometry import Geometry
from workbench.widgets.replay import replay
from workbench.widgets.selection import Selection
from workbench.widgets.tokens import COLOURS, PROMPT, SPECIAL, TokenStrip
from workbench.widgets.view import View

CONFIG = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "topk_method": "group_limited_greedy", "n_group": 4,
    "topk_group": 2, "num_hidden_layers": 3, "first_k_dense_replace": 1,
}  # fmt: skip
NAN = float("nan")


@pytest.fixture
def trace():
    """Five tokens: two of a prompt, two that were generated and read, and the last, which was not read."""
    tokens = pd.DataFrame(
        {
            "sequence": 0, "position": range(5), "id": [0, 10, 11, 12, 1],
            "text": ["<｜begin▁of▁sentence｜>", "why", " <b>", "x\n", "<｜end▁of▁sentence｜>"],
            "phase": ["prefill", "prefill", "decode", "decode", "decode"],
            "logprob": [NAN, NAN, np.log(0.5), np.log(0.25), 0.0], "probability": [NAN, NAN, 0.75, 0.5, 1.0],
            "entropy": [NAN, NAN, 1.5, 2.0, 0.0], "ms": [NAN, NAN, 20.0, 10.0, 12.0],
            "cache_bytes": [100, 200, 300, 400, -1],
        }
    )  # fmt: skip
    experts = np.full((5, 2, 2), -1, np.int16)
    experts[:4] = [[[0, 7], [1, 2]], [[3, 0], [2, 1]], [[7, 3], [5, 4]], [[3, 7], [2, 5]]]
    gates = np.where(experts >= 0, [0.6, 0.3], 0).astype(np.float32)
    margins = np.where(experts >= 0, [0.4, 0.125], NAN).astype(np.float32)
    header = new_header(
        "<script>", "hash", CONFIG, sampling={"temperature": 0.7, "stop": []}, edits=[to_dict(Ablate(1, (6,)))],
        sequences=[{"label": "first"}],
    )  # fmt: skip
    return Trace(header, tokens, (1, 2), experts, gates, margins)


@pytest.fixture
def told(monkeypatch):
    messages = []
    monkeypatch.setattr(View, "_tell", lambda self, message, buffers=(): messages.append((message, list(buffers))))
    return messages


def test_every_colour_is_a_number_of_the_trace_and_nan_where_none_was_measured(trace):
    strip = TokenStrip(trace)
    assert strip.values("probability")[2:] == pytest.approx([0.5, 0.25, 1.0])
    assert strip.values("sampled")[2:].tolist() == [0.75, 0.5, 1.0]
    assert strip.values("surprise")[3] == pytest.approx(np.log(4))
    assert strip.values("entropy")[2:].tolist() == [1.5, 2.0, 0.0]
    assert strip.values("ms")[2:].tolist() == [20.0, 10.0, 12.0]
    assert strip.values("cache_bytes")[:4].tolist() == [100, 200, 300, 400]
    for name in ("probability", "sampled", "surprise", "entropy", "ms"):
        assert np.isnan(strip.values(name)[:2]).all()
    assert np.isnan(strip.values("cache_bytes")[4]) and np.isnan(strip.values("margin")[4])


def test_expert_and_margin_are_of_the_selected_layer_and_slot(trace):
    strip = TokenStrip(trace)
    assert strip.values("expert").tolist() == [0, 3, 7, 3, -1]
    strip.selection.layer, strip.slot = 2, 1
    assert strip.values("expert").tolist() == [2, 1, 4, 5, -1]
    assert strip.values("margin")[:4] == pytest.approx([0.125] * 4)


def test_a_push_is_one_message_and_prompt_and_special_tokens_are_flagged(trace, told):
    strip = TokenStrip(geometry=Geometry.of_trace(trace))
    strip.push(0, trace.tokens, trace.experts, trace.gates, trace.margins)
    [(message, buffers)] = told
    assert message["kind"] == "tokens" and message["pieces"] == trace.tokens["text"].tolist()
    flags = np.frombuffer(buffers[2], np.uint8).tolist()
    assert flags == [PROMPT | SPECIAL, PROMPT, 0, 0, SPECIAL]
    measured = np.frombuffer(buffers[0], np.float32).reshape(5, 5)
    assert np.isnan(measured[0, 0]) and measured[2, 2] == 1.5 and np.isnan(measured[4, 4])
    assert sum(map(len, buffers)) <= 40 * 5


def test_text_alone_can_be_pushed_and_taken_back(told):
    strip = TokenStrip()
    strip.push(0, {"text": ["a", "b", "\udc80"]})
    strip.push(2, {"text": ["c", "d"], "ms": [1.0, 2.0]})
    assert len(strip) == 4 and strip.values("ms")[3] == 2 and np.isnan(strip.values("ms")[0])
    json.dumps(told[0][0]).encode()
    assert told[0][0]["pieces"][2] == "\ufffd"
    with pytest.raises(RequestError, match="the next is 4"):
        strip.push(9, {"text": ["x"]})


def test_selecting_layer_and_expert_tells_one_column(trace, told):
    strip = TokenStrip(trace)
    told.clear()
    with strip.hold_trait_notifications():  # as when both come from one click
        strip.layer, strip.expert = 1, 7
    [(message, [chosen, _, gates])] = told
    assert message == {"kind": "column"}
    assert np.frombuffer(chosen, np.int16).tolist() == [0, 3, 7, 3, -1]
    assert (np.frombuffer(gates, np.float32) > 0).tolist() == [True, False, True, True, False]


def test_history_is_in_no_synced_trait(trace):
    state = TokenStrip(Trace.join([trace] * 50)).get_state()
    assert len(json.dumps({k: v for k, v in state.items() if k not in ("_esm", "_css")}, default=str)) < 2000
    assert len(state["_esm"]) + len(state["_css"]) < 60_000


def test_sequences_of_a_trace_stand_apart(trace, told):
    TokenStrip(Trace.join([trace, trace]))
    assert told[-1][0]["facts"]["breaks"] == [(0, "first"), (5, "first")]


@pytest.mark.parametrize("name", COLOURS)
def test_a_saved_notebook_shows_boxes_with_all_text_escaped(trace, name):
    strip = TokenStrip(Trace.join([trace] * 120))
    strip.colour_by = name
    page = strip._repr_mimebundle_()
    html = page["text/html"]
    assert html.count("<code") == 400 and "… and 200 more" in html
    assert "&lt;b&gt;" in html and "<b>" not in html
    if name not in ("cache_bytes", "margin"):
        assert 'dashed rgba(128,128,128,.6)" title="not measured"' in html
    assert len(html) < 80_000 and len(page["image/png"]) < 60_000
    assert Image.open(io.BytesIO(page["image/png"])).width == 1800


def test_a_colour_that_is_not_there_is_refused(trace):
    with pytest.raises(Exception, match="colour_by"):
        TokenStrip(trace).colour_by = "mood"


def test_a_replay_links_its_views_and_says_where_the_trace_comes_from(trace):
    shown = replay(trace)
    shown.strip.token = 3
    assert shown.scope.token == shown.selection.token == 3
    about = shown.children[0].value
    assert "&lt;script&gt;" in about and "<script>" not in about
    assert "without expert 6 in layer 1" in about and "temperature 0.7" in about and "stop" not in about
    page = shown._repr_mimebundle_()
    assert "image/png" in page and page["text/html"].count("<code") == 5 and "<table" in page["text/html"]


def test_a_replay_repeats_a_warning_of_the_header(trace):
    arrays = trace.experts, trace.gates, trace.margins
    warned = Trace(trace.header | {"synthetic": "random <weights>"}, trace.tokens, trace.layers, *arrays)
    assert "Synthetic</b>: random &lt;weights&gt;" in replay(warned).children[0].value


def test_a_strip_joins_a_selection_that_is_made_already(trace):
    strip = TokenStrip(trace, selection=Selection(token=2, layer=2))
    assert strip.token == 2 and strip.values("expert").tolist() == [1, 2, 5, 2, -1]


def test_a_trace_of_a_model_without_experts_has_its_tokens_all_the_same(trace):
    none = np.zeros((5, 0, 0), np.float32)
    dense = Trace(trace.header | {"config": {"num_hidden_layers": 3}}, trace.tokens, (), none, none, none)
    shown = replay(dense)
    assert len(shown.strip) == 5 and np.isnan(shown.strip.values("margin")).all()
    page = shown._repr_mimebundle_()
    assert page["text/html"].count("<code") == 5 and "image/png" not in page
