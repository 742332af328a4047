"""Two traces side by side: what differs is marked, what one side lacks is not made up."""

import json

import numpy as np
import pytest
from widgets.routed import Wire, routed_trace

from workbench.edits import Ablate, to_dict
from workbench.errors import RequestError
from workbench.trace import Trace
from workbench.widgets.compare import UNKNOWN, SideBySide
from workbench.widgets.selection import Selection

A = ["<user>", "hi", "The", " latent", " is", " small"]
B = ["<user>", "hi", "The", " cache", " <b>"]


@pytest.fixture
def pair():
    """The same until position 3, where the second says something else; its routing of layer 2 differs throughout."""
    a = routed_trace(A)
    b = routed_trace(B, edits=[to_dict(Ablate(2, (17,)))])
    experts, gates, margins = (np.array(values[:5]) for values in (a.experts, a.gates, a.margins))
    experts[:, 1] = (experts[:, 1] + 1) % 32
    experts[-1], gates[-1], margins[-1] = -1, 0, np.nan
    return a, Trace(b.header, b.tokens, b.layers, experts, gates, margins)


@pytest.fixture
def made(pair, monkeypatch):
    """made(...) is the view of the pair and what it sends."""
    opened = []

    def make(**options):
        wire = Wire()
        monkeypatch.setattr(
            SideBySide,
            "send",
            lambda self, content, buffers=None: wire.append(
                (json.loads(json.dumps(content, allow_nan=False)), buffers)
            ),
        )
        opened.append(SideBySide(*pair, **options))
        return opened[-1], wire

    yield make
    for view in opened:
        view.close()


def press(view, kind, **content):
    view._handle_custom_msg({"kind": kind, "view": "v"} | content, [])


def test_the_numbers_are_those_of_the_tokens(made, pair):
    view, _ = made()
    summary = view.summary()
    assert summary["first"] == 3 and summary["generated"] == 4 and summary["equal"] == 0.25
    a, b = pair
    shared = [
        len(set(x) & set(y)) / len(set(x) | set(y))
        for token in range(3)
        for x, y in zip(a.experts[token].tolist(), b.experts[token].tolist())
    ]
    assert summary["overlap"][0] == pytest.approx(np.mean(shared))
    by_layer = view.by_layer()
    assert by_layer.loc[1, "before"] == by_layer.loc[5, "before"] == 1 > by_layer.loc[2, "before"]
    assert summary["logprob"] == 0 and summary["compared"] == 1


def test_what_one_side_lacks_stays_empty(made):
    view, wire = made()
    press(view, "ready")
    [(message, (logprobs, shared))] = wire
    assert message["texts"][1] == [*B, None] and message["same"] == [1, 1, 1, 0, 0, 0]
    logprobs, shared = np.frombuffer(logprobs, "<f4").reshape(6, 2), np.frombuffer(shared, "u1").reshape(6, 3)
    assert np.isnan(logprobs[:2]).all() and np.isnan(logprobs[5, 1]) and logprobs[4, 1] == -0.5
    assert (shared[4:] == UNKNOWN).all(), "a token that one side never read shares nothing known"
    assert (shared[:3, 0] == 254).all() and message["prompt"] == 2 and message["view"] == "v"


def test_what_was_set_differently_is_said_in_words(made):
    view, wire = made()
    press(view, "ready")
    assert ["edits", "none", "without expert 17 in layer 2"] in wire.of("show")[0]["settings"]
    assert "without expert 17 in layer 2" in repr(view)


def test_a_cursor_tells_which_experts_only_one_side_chose(made, pair):
    view, wire = made()
    press(view, "move", row=2)
    layers = {layer: (only_a, only_b) for layer, _, only_a, only_b in wire.of("moved")[0]["layers"]}
    a, b = (set(trace.experts[2, 1].tolist()) for trace in pair)
    assert layers[1] == ([], []) and set(layers[2][0]) == a - b and set(layers[2][1]) == b - a
    press(view, "move", row=5)
    assert wire.of("moved")[1]["layers"] == []
    with pytest.raises(RequestError, match="no row 6"):
        view.move(6)


def test_the_selection_moves_the_cursor_and_hears_of_it_once(made):
    selection = Selection()
    view, wire = made(selection=selection)
    selection.token = 2
    assert view.row == 2 and len(wire.of("moved")) == 1
    press(view, "move", row=3)
    assert selection.token == 3 and len(wire.of("moved")) == 2
    press(view, "layer", layer=2)
    assert selection.layer == 2 and wire.of("layer") == [{"kind": "layer", "layer": 2, "view": "v"}]
    selection.layer = 77
    assert view.layer == -1, "a layer that was not recorded means all"
    view.close()
    selection.token = 0
    assert view.row == 3


def test_equal_traces_have_no_difference():
    trace = routed_trace(A)
    summary = SideBySide(trace, trace).summary()
    assert summary["first"] is None and summary["equal"] == 1 and summary["overlap"] == [1, None]


def test_what_cannot_be_compared_is_refused():
    trace = routed_trace(A)
    with pytest.raises(RequestError, match=r"'edited' has 2 sequences.*sequence\(n\)"):
        SideBySide(trace, Trace.join([trace, trace]))
    with pytest.raises(RequestError, match="no layer in common"):
        SideBySide(trace, routed_trace(A, layers=(3,)))


def test_a_saved_notebook_shows_both_as_text_table_and_picture(made):
    view, _ = made(labels=("<i>", "edited"))
    page = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in page
    assert "parts at position 3" in page["text/plain"]
    assert "<b>" not in page["text/html"] and "<i>" not in page["text/html"] and "&lt;b&gt;" in page["text/html"]
    assert page["image/png"].startswith(b"\x89PNG") and len(page["image/png"]) < 100_000


def test_a_line_break_in_a_token_can_be_drawn_too():
    lists = ["<user>", "list", "1", "\n", "2\r\n\t"]
    page = SideBySide(routed_trace(lists), routed_trace([*lists[:3], " ", "3"]))._repr_mimebundle_()
    assert page["image/png"]
