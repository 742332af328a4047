"""Edits as data: what they accept, how they are written down and read back, and which models have no place for them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from traces import random_trace

from workbench.config import Config
from workbench.editcheck import check
from workbench.editing import Editing
from workbench.edits import Ablate, Add, Bias, Edit, Force, ReplayRouting, Scale, TopK, describe, from_dict, to_dict
from workbench.errors import RequestError

POCKET = Config.preset("pocket")  # 32 experts in 8 groups of 4, 3 kept, 4 chosen; layer 0 is dense
LITE = Config.preset("v2-lite")  # 64 experts, 6 chosen, no groups
DENSE = replace(LITE, n_routed_experts=None)

EDITS = [
    Ablate(1, 3),
    Ablate(None, (3, 4), positions=(2, 9), phase="decode"),
    Force(2, [5, 1]),
    Force(2, 5, gate=0.25, phase="prefill"),
    Bias(1, 3, -1.5),
    Bias(None, 0, 2),
    TopK(1, 2),
    TopK(None, 8, positions=(0, 1)),
    Scale("attn.z", 0, layer=3, index=2),
    Scale("logits", -1.5),
    Add("resid.mid", [0.1, -0.2, 1e-30], layer=1),
    Add("moe.router_logits", 0.5, index=3, positions=(4, 5)),
]


@pytest.mark.parametrize("edit", EDITS, ids=describe)
def test_an_edit_is_the_same_after_json(edit):
    again = from_dict(json.loads(json.dumps(to_dict(edit), allow_nan=False)))
    assert again == edit and type(again) is type(edit) and hash(again) == hash(edit)
    assert to_dict(edit)["kind"] == type(edit).__name__


def test_edits_of_numpy_and_torch_numbers_are_edits_of_numbers():
    made = [
        Ablate(np.int64(1), np.array([3, 4])),
        Force(1, torch.tensor([3]), gate=np.float32(0.5)),
        TopK(np.int32(1), np.int64(2), positions=(np.int64(1), np.int64(3))),
        Bias(1, np.int64(2), np.float64(1)),
        Add("logits", torch.ones(3)),
        Add("logits", np.float32(1)),
        Scale("attn.z", 1, index=np.int64(1)),
    ]
    plain = [
        Ablate(1, (3, 4)),
        Force(1, 3, 0.5),
        TopK(1, 2, positions=(1, 3)),
        Bias(1, 2, 1.0),
        Add("logits", (1.0, 1.0, 1.0)),
        Add("logits", 1.0),
        Scale("attn.z", 1.0, index=1),
    ]
    assert made == plain
    assert json.dumps([to_dict(edit) for edit in made]) == json.dumps([to_dict(edit) for edit in plain])


def test_a_range_is_positions():
    assert Ablate(1, 3, positions=range(2, 5)) == Ablate(1, 3, positions=(2, 5)) == Ablate(1, 3, positions=[2, 5])


def test_an_expert_named_twice_is_one():
    assert Ablate(1, (3, 3, 4)) == Ablate(1, (3, 4))


def test_a_replayed_trace_is_the_same_after_json():
    for gates in (False, True):
        edit = ReplayRouting(random_trace(), gates, positions=(0, 3), phase="prefill")
        again = from_dict(json.loads(json.dumps(to_dict(edit))))
        assert again == edit and hash(again) == hash(edit) and again.gates is gates
        assert np.array_equal(again.experts, edit.experts) and np.array_equal(again.weights, edit.weights)
        assert (again.layers, again.positions, again.phase) == (edit.layers, (0, 3), "prefill")
        assert again != replace_gates(edit) and again != Ablate(1, 3)


def replace_gates(edit):
    return ReplayRouting(edit.trace, not edit.gates, positions=edit.positions, phase=edit.phase)


def test_a_replayed_trace_goes_by_the_positions_of_its_tokens():
    trace = random_trace().sequence(0)
    tokens = trace.tokens.assign(position=trace.tokens["position"] * 2 + 1)
    moved = type(trace)(trace.header, tokens, trace.layers, trace.experts, trace.gates, trace.margins)
    edit = ReplayRouting(moved)
    assert np.array_equal(edit.experts[1::2], trace.experts) and (edit.experts[0::2] == -1).all()
    assert np.array_equal(edit.weights[1::2], trace.gates)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Ablate(1, ()), "experts must be whole numbers"),
        (lambda: Ablate(1, -1), "experts must be"),
        (lambda: Ablate(1, 1.5), "experts must be"),
        (lambda: Ablate(1, "3"), "experts must be"),
        (lambda: Ablate(1, True), "experts must be"),
        (lambda: Ablate("1", 3), "layer must be a whole number"),
        (lambda: Ablate(-1, 3), "layer must be"),
        (lambda: Ablate(1.0, 3), "layer must be"),
        (lambda: Force(1, 3, gate=float("nan")), "gate must be a finite number"),
        (lambda: Force(1, 3, gate="1"), "gate must be"),
        (lambda: Bias(1, 3, float("inf")), "amount must be a finite number"),
        (lambda: Bias(1, (3, 4), 1), "expert must be"),
        (lambda: TopK(1, 0), "k must be a whole number, 1 or more"),
        (lambda: TopK(1, 2.0), "k must be"),
        (lambda: Scale("attn.z", float("nan")), "factor must be a finite number"),
        (lambda: Scale("attn.z", 1, index=-1), "index must be"),
        (lambda: Scale("attn.z", 1, index=1.5), "index must be"),
        (lambda: Scale(["attn.z"], 1), "site must be the name"),
        (lambda: Add("logits", ()), "vector must be"),
        (lambda: Add("logits", [1.0, float("nan")]), "vector must be"),
        (lambda: Add("logits", "1"), "vector must be"),
        (lambda: Add("logits", [[1.0]]), "vector must be"),
        (lambda: Ablate(1, 3, phase="prompt"), "phase must be 'prefill', 'decode' or None"),
        (lambda: Ablate(1, 3, positions=(3, 3)), "are empty"),
        (lambda: Ablate(1, 3, positions=(5, 3)), "are empty"),
        (lambda: Ablate(1, 3, positions=(-2, 3)), "positions must be"),
        (lambda: Ablate(1, 3, positions=5), "positions must be"),
        (lambda: Ablate(1, 3, positions=(1, 2, 3)), "positions must be"),
        (lambda: Ablate(1, 3, positions=range(0, 9, 2)), "positions must be"),
    ],
)
def test_what_is_no_edit_is_refused_where_it_is_written(make, says):
    with pytest.raises(RequestError, match=says):
        make()


def test_a_trace_without_routing_cannot_be_replayed():
    trace = random_trace().sequence(0)
    unread = type(trace)(
        trace.header,
        trace.tokens,
        trace.layers,
        np.full_like(trace.experts, -1),
        np.zeros_like(trace.gates),
        np.full_like(trace.margins, np.nan),
    )
    with pytest.raises(RequestError, match="no routing to replay"):
        ReplayRouting(unread)


REPLAY = to_dict(ReplayRouting(random_trace()))


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "Ablate",
        {},
        {"kind": None},
        {"kind": []},
        {"kind": "Ablation", "layer": 1},
        {"kind": "Ablate"},
        {"kind": "Ablate", "layer": 1, "experts": [3], "colour": "red"},
        {"kind": "Ablate", "layer": "one", "experts": [3]},
        {"kind": "Ablate", "layer": 1, "experts": None},
        {"kind": "Ablate", "layer": 1, "experts": [3], "positions": 4},
        {"kind": "Ablate", "layer": 1, "experts": [3], "positions": ["a", "b"]},
        {"kind": "Ablate", "layer": 1, "experts": [3], "phase": []},
        {"kind": "Bias", "layer": 1, "expert": 3, "amount": None},
        {"kind": "TopK", "layer": 1, "k": "2"},
        {"kind": "Scale", "site": None, "factor": 1},
        {"kind": "Add", "site": "logits", "vector": {"a": 1}},
        {"kind": "Add", "site": "logits", "vector": None},
        {"kind": "ReplayRouting"},
        REPLAY | {"shape": [1, 1, 1]},
        REPLAY | {"shape": None},
        REPLAY | {"shape": [REPLAY["shape"][0] * REPLAY["shape"][1], 1, REPLAY["shape"][2]]},
        REPLAY | {"experts": "not base64!"},
        REPLAY | {"experts": "AAAA"},
        REPLAY | {"experts": None},
        REPLAY | {"layers": [1]},
        {key: value for key, value in REPLAY.items() if key != "weights"},
    ],
    ids=repr,
)
def test_what_was_not_written_by_to_dict_is_refused(data):
    with pytest.raises(RequestError, match="no edit called|is no .* edit|must be|has no routing"):
        from_dict(data)


@pytest.mark.parametrize(
    "edit, config, says",
    [
        (Ablate(0, 3), POCKET, "layer 0 is dense: it has no router. Layers with experts: 1 to 5"),
        (TopK(0, 2), POCKET, "layer 0 is dense"),
        (Bias(6, 3, 1), POCKET, "layer 6 does not exist"),
        (Force(1, 32), POCKET, "no expert 32; there are 32, counted from 0"),
        (Ablate(1, (0, 99)), POCKET, "no expert 99"),
        (Bias(1, 64, 1), LITE, "no expert 64"),
        (Ablate(1, range(59)), LITE, "as few as 5 experts would be left, and 6 are to be chosen"),
        (Ablate(1, range(29)), POCKET, "as few as 3 experts would be left, and 4"),
        (
            Ablate(1, [e for e in range(32) if e % 4]),
            POCKET,
            "3 of 8 groups are kept, as few as 3 experts would be left",
        ),
        (TopK(1, 65), LITE, "as few as 64 experts would be left, and 65"),
        (TopK(None, 13), POCKET, "3 of 8 groups are kept, as few as 12 experts would be left, and 13"),
        (Force(1, range(5)), POCKET, "5 experts cannot be forced where 4 are chosen"),
        (Ablate(None, 3), DENSE, "this model has no routed experts"),
        (Scale("resid.past", 1), POCKET, "no site called 'resid.past'"),
        (Scale("moe.experts", 1), POCKET, "moe.experts can only be watched; change what is chosen with Force"),
        (Add("moe.scores", 1), POCKET, "moe.scores can only be watched"),
        (Scale("attn.q_latent", 1), LITE, "attn.q_latent never fires in this model"),
        (Scale("moe.gates", 1, layer=0), POCKET, "moe.gates never fires in layer 0; it is in layers 1 to 5"),
        (Scale("resid.pre", 1, layer=6), POCKET, "resid.pre never fires in layer 6"),
        (Scale("logits", 1, layer=5), POCKET, "outside the layers: leave layer out"),
        (Scale("attn.z", 1, index=8), POCKET, "index 8 is not in 0 to 7, of B T H V"),
        (Scale("attn.v", 1, index=8), POCKET, "index 8 is not in 0 to 7, of B S H V"),
        (Scale("moe.gates", 1, index=4), POCKET, "index 4 is not in 0 to 3"),
        (Add("resid.mid", [1.0, 2.0]), POCKET, "the vector has 2 numbers; resid.mid takes 1 or 192"),
        (Add("attn.z", [1.0] * 256), POCKET, "attn.z takes 1 or 32"),
        (Add("attn.scores", [1.0] * 5), POCKET, "attn.scores takes 1 or 1"),
        (Add("moe.gates", [1.0] * 4, index=1), POCKET, "the vector has 4 numbers"),
    ],
    ids=lambda value: describe(value) if isinstance(value, Edit) else "",
)
def test_an_edit_that_a_model_has_no_place_for_is_refused(edit, config, says):
    with pytest.raises(RequestError, match=says) as refused:
        Editing([edit], config)
    assert str(refused.value).startswith(describe(edit))


@pytest.mark.parametrize(
    "edits, says",
    [
        ([Ablate(1, range(20)), Ablate(1, range(20, 32))], "as few as 0 experts would be left"),
        ([Ablate(None, range(20)), Ablate(2, range(20, 30))], "in every layer, .* in layer 2: .* as few as 2 experts"),
        ([Ablate(1, range(16)), TopK(1, 12), Ablate(1, 16)], "as few as 11 experts would be left, and 12"),
        ([Force(1, (0, 1, 2)), Force(1, (3, 4))], "5 experts cannot be forced where 4"),
        ([TopK(1, 1), Force(1, (3, 4))], "2 experts cannot be forced where 1"),
        ([Force(1, (0, 1, 2)), Force(None, (3, 4), positions=(5, 9))], "5 experts cannot be forced"),
        ([Add("moe.gates", [0.1] * 4), TopK(1, 2)], "change how many slots there are"),
    ],
)
def test_edits_that_leave_one_token_too_little_are_refused_together(edits, says):
    for one in edits:
        check([one], replace(POCKET, topk_group=8) if isinstance(one, TopK) else POCKET)
    with pytest.raises(RequestError, match=says):
        Editing(edits, POCKET)


@pytest.mark.parametrize(
    "edits",
    [
        [Ablate(1, range(20)), Ablate(2, range(20, 32))],
        [Ablate(1, range(16), positions=(0, 5)), Ablate(1, range(16, 32), positions=(5, 9))],
        [Ablate(1, range(16), phase="prefill"), Ablate(1, range(16, 32), phase="decode")],
        [Force(1, (0, 1, 2), positions=(0, 5)), Force(1, (3, 4), positions=(5, 9))],
        [Ablate(1, range(30)), TopK(1, 2)],
        [Force(1, range(6)), TopK(1, 6)],
        [TopK(1, 1), Force(1, 3)],
        [Ablate(1, range(28))],
        [Scale("moe.gates", 0, index=7), TopK(1, 8)],
        [Add("moe.gates", 0.1), TopK(1, 8)],
        [Ablate(1, 3), Force(1, 3, gate=1)],
    ],
)
def test_edits_that_leave_enough_are_not(edits):
    Editing(edits, POCKET, prompts=3)


@pytest.mark.parametrize("edit", ["Ablate", None, {"kind": "TopK", "layer": 1, "k": 2}, Ablate])
def test_something_else_in_the_list_is_refused(edit):
    with pytest.raises(RequestError, match="edits are made with wb.Ablate"):
        Editing([edit], POCKET)


def test_a_phase_needs_to_know_where_the_prompt_ends():
    with pytest.raises(RequestError, match=r"needs to know where the prompt ends: Editing\(..., prompts=n\)"):
        Editing([Ablate(1, 3, phase="decode")], POCKET)


def test_the_trace_of_another_model_is_refused():
    for config in (POCKET, LITE):
        with pytest.raises(RequestError, match="this trace is of another model"):
            Editing([ReplayRouting(other_trace(config))], config)


def other_trace(config):
    trace = random_trace().sequence(0)
    header = trace.header | {"config": trace.header["config"] | {"n_routed_experts": 300}}
    experts = trace.experts.copy()
    experts[experts == experts.max()] = 299
    return type(trace)(header, trace.tokens, trace.layers, experts, trace.gates, trace.margins)


def test_in_words():
    assert describe(Ablate(3, (7, 9))) == "without experts 7, 9 in layer 3"
    assert describe(Force(None, 7, gate=0.5)) == "expert 7 forced in every layer, gate 0.5"
    assert describe(Bias(1, 3, -2)) == "router logit of expert 3 -2 in layer 1"
    assert describe(TopK(None, 1, phase="decode")) == "1 expert per token in every layer, decode only"
    assert describe(Scale("attn.z", 0, 2, index=5)) == "attn.z[5] x 0 in layer 2"
    assert describe(Scale("logits", 2)) == "logits x 2"
    assert describe(Add("resid.mid", 1, positions=(3, 5))) == "resid.mid + a vector in every layer, positions 3 to 4"
    assert "a trace of" in describe(ReplayRouting(random_trace(), gates=True))
