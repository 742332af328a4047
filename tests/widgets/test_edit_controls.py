"""Edits built by hand: the fields make the edits they describe, and a wrong entry loses nothing."""

import pytest
from widgets.routed import routed_trace

from workbench.config import PRESETS
from workbench.edits import Ablate, Add, Bias, Force, ReplayRouting, Scale, TopK
from workbench.errors import RequestError
from workbench.widgets.editing import EVERY, KINDS, EditControls


@pytest.fixture
def controls():
    return EditControls(PRESETS["pocket"])


def enter(controls, kind, **values):
    """As a reader does it: choose a kind, fill in the fields, press Add."""
    controls.kind.value = kind
    for name, value in values.items():
        controls.fields[name].value = value
    controls.add_button.click()


def shown(controls):
    """The edits in the list, as they are read, and the buttons beside them."""
    rows = controls.children[-1].children[:-1]
    return [row.children[1].value for row in rows], [row.children[0] for row in rows]


@pytest.mark.parametrize(
    ("kind", "values", "edits"),
    [
        ("Ablate", {"layer": 3, "experts": "3, 17"}, [Ablate(3, (3, 17))]),
        ("Ablate", {"experts": "4-7 1"}, [Ablate(None, (4, 5, 6, 7, 1))]),
        ("Force", {"layer": 1, "experts": "2"}, [Force(1, (2,))]),
        ("Force", {"layer": 1, "experts": "2", "gate": "0.5"}, [Force(1, (2,), 0.5)]),
        ("Bias", {"layer": 2, "experts": "5", "amount": -1.5}, [Bias(2, 5, -1.5)]),
        ("Bias", {"layer": 2, "experts": "5 6", "amount": 1}, [Bias(2, 5, 1), Bias(2, 6, 1)]),
        ("TopK", {"k": 1}, [TopK(None, 1)]),
        ("Scale", {"site": "attn.z", "layer": 0, "index": "2", "factor": 0}, [Scale("attn.z", 0, 0, 2)]),
        ("Scale", {"site": "logits", "factor": 2}, [Scale("logits", 2)]),
        ("TopK", {"k": 2, "phase": "decode"}, [TopK(None, 2, phase="decode")]),
        ("TopK", {"k": 2, "positions": "3-8"}, [TopK(None, 2, positions=(3, 9))]),
        ("TopK", {"k": 2, "positions": "5"}, [TopK(None, 2, positions=(5, 6))]),
    ],
)
def test_the_fields_make_the_edit_they_describe(controls, kind, values, edits):
    enter(controls, kind, **values)
    assert list(controls.edits) == edits and controls.error.value == ""


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("Ablate", {"experts": ""}, "at least one expert"),
        ("Ablate", {"experts": "3, x"}, "whole numbers such as 3, 17 or 4-7; got &#x27;x&#x27;"),
        ("Ablate", {"experts": "7-4"}, "got &#x27;7-4&#x27;"),
        ("Ablate", {"experts": "0-999999999999"}, "there are 32"),
        ("Force", {"experts": "32"}, "no expert 32"),
        ("Force", {"experts": "1", "gate": "big"}, "the gate must be a number"),
        ("Force", {"experts": "0-4"}, "cannot be forced"),
        ("Ablate", {"experts": "0-31"}, "experts would be left"),
        ("TopK", {"k": 13}, "12"),
        ("TopK", {"positions": "8-3"}, "positions"),
        ("TopK", {"positions": "<b>"}, "positions are from-to"),
        ("Scale", {"index": "1.5"}, "whole number"),
        ("Scale", {"site": "attn.z", "index": "8"}, "8"),
    ],
)
def test_a_wrong_entry_is_answered_and_nothing_is_lost(controls, kind, values, words):
    controls.add(TopK(None, 2, phase="decode"))
    enter(controls, kind, **values)
    assert words in controls.error.value and "<b>&" not in controls.error.value
    assert controls.edits == (TopK(None, 2, phase="decode"),) and controls.kind.value == kind
    assert all(controls.fields[name].value == value for name, value in values.items())


def test_the_answer_to_a_wrong_entry_goes_with_the_next_right_one(controls):
    enter(controls, "Ablate", experts="x")
    enter(controls, "Ablate", experts="1")
    assert controls.error.value == ""


def test_only_layers_with_experts_are_offered_and_for_attention_all(controls):
    controls.kind.value = "Ablate"
    assert controls.fields["layer"].label == "every layer"
    assert [layer for _, layer in controls.fields["layer"].options] == [EVERY, 1, 2, 3, 4, 5]
    controls.kind.value = "Scale"
    controls.fields["site"].value = "attn.z"
    assert [layer for _, layer in controls.fields["layer"].options] == [EVERY, 0, 1, 2, 3, 4, 5]
    with pytest.raises(RequestError, match="layer 0 is dense"):
        controls.add(Ablate(0, (1,)))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["pocket", "v2-lite", "v2"])
def test_only_the_fields_of_a_kind_are_there(kind, name):
    controls = EditControls(PRESETS[name])
    controls.kind.value = kind
    there = {field for field, control in controls.fields.items() if control in controls.children[0].children}
    wanted = {"Ablate": "experts", "Force": "experts gate", "Bias": "experts amount", "TopK": "k",
              "Scale": "site index factor"}  # fmt: skip
    assert there == {"layer", "phase", "positions", *wanted[kind].split()}


def test_the_list_says_each_edit_in_words_and_takes_it_back(controls):
    controls.add(Ablate(3, (3, 17)))
    controls.add(TopK(None, 1))
    words, buttons = shown(controls)
    assert words == ["Ablate: without experts 3, 17 in layer 3", "TopK: 1 expert per token in every layer"]
    buttons[0].click()
    assert controls.edits == (TopK(None, 1),)
    controls.clear_button.click()
    assert controls.edits == ()
    with pytest.raises(RequestError, match="no edit 0"):
        controls.remove(0)


def test_edits_of_other_kinds_can_be_added(controls):
    controls.add(ReplayRouting(routed_trace(["<user>", "hi", " end"])))
    controls.add(Add("resid.post", (0.5,) * PRESETS["pocket"].hidden_size))
    assert len(shown(controls)[0]) == 2


def test_whoever_asked_hears_of_every_change_and_only_of_changes(controls):
    heard = []
    controls.observe_edits(heard.append)
    controls.add(TopK(None, 1))
    with pytest.raises(RequestError):
        controls.add(Ablate(0, (1,)))
    controls.remove(-1)
    controls.clear()
    assert heard == [(TopK(None, 1),), ()]


def test_a_saved_notebook_shows_the_edits_in_words(controls):
    assert "No edits" in controls._repr_mimebundle_()["text/html"]
    page = EditControls(PRESETS["pocket"], [TopK(None, 1)])._repr_mimebundle_()
    assert "<li>1 expert per token in every layer</li>" in page["text/html"]
    assert "- 1 expert per token" in page["text/plain"] and "application/vnd.jupyter.widget-view+json" in page
