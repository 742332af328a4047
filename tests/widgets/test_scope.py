"""The kernel's half of the routing scope: few bytes a token, exact numbers in tables, one selection for all views."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from workbench.errors import RequestError
from workbench.widgets.geometry import Geometry, last_margin
from workbench.widgets.scope import RoutingScope
from workbench.widgets.selection import Selection
from workbench.widgets.view import View

SIZES = {
    "pocket": Geometry(tuple(range(1, 6)), 32, 4, 8, 3),
    "v2-lite": Geometry(tuple(range(1, 27)), 64, 6),
    "v2": Geometry(tuple(range(1, 60)), 160, 6, 8, 3),
    "many": Geometry((0, 1), 300, 8),
}
BYTES = {"pocket": 50, "v2-lite": 400, "v2": 800, "many": 60}


def routing(geometry, tokens, seed=0):
    """Random choices: experts, gates, margins [tokens, layers, k]."""
    rng = np.random.default_rng(seed)
    shape = tokens, len(geometry.layers), geometry.k
    scores = rng.dirichlet(np.full(geometry.n_experts, 0.3), shape[:2]).astype(np.float32)
    order = np.argsort(-scores, -1)
    gates = np.take_along_axis(scores, order[..., : geometry.k], -1)
    best_left_out = np.take_along_axis(scores, order[..., geometry.k : geometry.k + 1], -1)
    return order[..., : geometry.k].astype(np.int16), gates, gates - best_left_out


@pytest.fixture
def told(monkeypatch):
    """What views tell the browser: (message, buffers), in order."""
    messages = []
    monkeypatch.setattr(View, "_tell", lambda self, message, buffers=(): messages.append((message, list(buffers))))
    return messages


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


def unpacked(message, buffers, geometry):
    """The message as `answer.js` reads it."""
    shape = -1, len(geometry.layers), geometry.k
    kind = np.uint8 if geometry.n_experts <= 255 else np.uint16
    ids = np.frombuffer(buffers[0], kind).reshape(shape).astype(int)
    ids[ids == np.iinfo(kind).max] = -1
    gates = message["scale"] * (np.frombuffer(buffers[1], np.uint8).reshape(shape) / 255) ** 2
    codes = np.frombuffer(buffers[2], np.int8).reshape(shape[:2]).astype(float)
    margins = np.where(codes == -128, np.nan, np.sign(codes) * (codes / 127) ** 2)
    return ids, gates, margins


def test_a_push_is_one_message_of_few_bytes_that_says_what_happened(size, told):
    geometry = SIZES[size]
    scope = RoutingScope(geometry=geometry)
    experts, gates, margins = routing(geometry, 20)
    scope.push(0, ["word"] * 20, experts, gates, margins)
    [(message, buffers)] = told
    assert (message["kind"], message["from"], len(message["pieces"])) == ("tokens", 0, 20)
    assert sum(map(len, buffers)) / 20 <= BYTES[size]
    ids, near_gates, near_margins = unpacked(message, buffers, geometry)
    assert (ids == experts).all()
    assert np.abs(near_gates - gates).max() <= message["scale"] / 255
    assert np.abs(near_margins - margins[..., -1]).max() <= 1 / 127


def test_a_token_that_nobody_read_is_told_apart_from_expert_0(told):
    geometry = SIZES["pocket"]
    shape = 1, 5, 4
    scope = RoutingScope(geometry=geometry)
    scope.push(0, ["end"], np.full(shape, -1), np.zeros(shape), np.full(shape, np.nan))
    ids, gates, margins = unpacked(*told[-1], geometry)
    assert (ids == -1).all() and not gates.any() and np.isnan(margins).all()
    assert scope.table().empty and not scope.heat().to_numpy().any()


def test_fewer_experts_than_slots_leave_the_margin_of_the_last_that_was_chosen():
    experts = np.array([[3, 1, -1], [-1, -1, -1]])
    margins = np.array([[0.5, 0.25, np.nan], [np.nan] * 3], np.float32)
    assert last_margin(experts, margins)[0] == 0.25 and np.isnan(last_margin(experts, margins)[1])


def test_a_forced_choice_keeps_its_sign(told):
    geometry = Geometry((1,), 8, 2)
    scope = RoutingScope(geometry=geometry)
    scope.push(0, ["x"], [[[0, 7]]], [[[0.5, 0.01]]], [[[0.4, -0.2]]])
    assert unpacked(*told[-1], geometry)[2][0, 0] == pytest.approx(-0.2, abs=0.01)


def test_a_new_view_is_told_all_at_once_and_alone(told):
    geometry = SIZES["pocket"]
    scope = RoutingScope(geometry=geometry, label="pocket")
    experts, gates, margins = routing(geometry, 5)
    scope.push(0, list("abc"), experts[:3], gates[:3], margins[:3])
    scope.push(3, list("de"), experts[3:], gates[3:], margins[3:])
    scope._hear(scope, {"kind": "ready", "view": "v7"}, [])
    message, buffers = told[-1]
    assert (message["kind"], message["view"], message["pieces"]) == ("show", "v7", list("abcde"))
    assert (unpacked(message, buffers, geometry)[0] == experts).all()
    facts = message["facts"]
    assert (facts["layers"], facts["experts"], facts["groups"], facts["kept"]) == (geometry.layers, 32, 8, 3)
    json.dumps(message)


def test_history_is_in_no_synced_trait():
    geometry = SIZES["v2"]
    scope = RoutingScope(geometry=geometry)
    scope.push(0, ["a longer piece of text"] * 200, *routing(geometry, 200))
    state = {name: value for name, value in scope.get_state().items() if name not in ("_esm", "_css")}
    assert len(json.dumps(state, default=str)) < 2000
    assert sum(len(scope.get_state()[name]) for name in ("_esm", "_css")) < 60_000


def test_a_smaller_number_takes_back_and_a_gap_is_refused(told):
    geometry = SIZES["pocket"]
    scope = RoutingScope(geometry=geometry)
    experts, gates, margins = routing(geometry, 6)
    scope.push(0, list("abcd"), experts[:4], gates[:4], margins[:4])
    scope.selection.token = 3
    scope.push(1, ["B"], experts[4:5], gates[4:5], margins[4:5])
    assert len(scope) == 2 and scope.selection.token == -1
    assert scope.heat().to_numpy().sum() == 2 * 5 * 4
    assert scope.table(1)["expert"].tolist() == experts[4].ravel().tolist()
    before = len(told)
    with pytest.raises(RequestError, match="the next is 2"):
        scope.push(3, ["x"], experts[:1], gates[:1], margins[:1])
    with pytest.raises(RequestError, match=r"experts must be .* = \[2, 5, 4\]; got \[1, 5, 4\]"):
        scope.push(2, ["x", "y"], experts[:1], gates[:1], margins[:1])
    assert len(scope) == 2 and len(told) == before


def test_tables_hold_the_exact_numbers():
    geometry = SIZES["pocket"]
    scope = RoutingScope(geometry=geometry)
    experts, gates, margins = routing(geometry, 8)
    scope.push(0, ["w"] * 8, experts, gates, margins)
    scope.selection.token = 2
    table = scope.table()
    assert list(table) == ["layer", "slot", "expert", "gate", "margin"]
    assert (table["gate"].to_numpy() == gates[2].ravel()).all() and set(table["layer"]) == {1, 2, 3, 4, 5}
    counts, sums = scope.heat("count"), scope.heat("gate")
    for row, layer in enumerate(geometry.layers):
        for expert in range(32):
            used = experts[:, row] == expert
            assert counts.loc[layer, expert] == used.sum()
            assert sums.loc[layer, expert] == pytest.approx(gates[:, row][used].sum(), abs=1e-6)
    load = scope.load()
    assert (load["chosen by tokens"] == counts.max(axis=1)).all()
    assert (load["never chosen"] == (counts == 0).sum(axis=1)).all()
    with pytest.raises(RequestError, match="no token 8: there are 8"):
        scope.table(8)


def test_the_browser_may_ask_for_the_exact_numbers_of_a_token(told):
    geometry = SIZES["pocket"]
    scope = RoutingScope(geometry=geometry)
    experts, gates, margins = routing(geometry, 3)
    scope.push(0, list("abc"), experts, gates, margins)
    scope._hear(scope, {"kind": "exact", "token": 1, "view": "v"}, [])
    message, buffers = told[-1]
    assert message == {"kind": "exact", "token": 1}
    assert (np.frombuffer(buffers[0], np.float32) == gates[1].ravel()).all()
    assert (np.frombuffer(buffers[1], np.float32) == margins[1].ravel()).all()
    before = len(told)
    scope._hear(scope, {"kind": "exact", "token": 99, "view": "v"}, [])
    assert len(told) == before


def test_a_saved_notebook_shows_a_picture_and_a_table(size):
    geometry = SIZES[size]
    scope = RoutingScope(geometry=geometry, label="<b>model</b>")
    scope.push(0, ["<i>"] * 50, *routing(geometry, 50))
    page = scope._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in page and "50 tokens" in page["text/plain"]
    assert "<table" in page["text/html"] and "<b>" not in page["text/html"] and "<i>" not in page["text/html"]
    assert len(page["image/png"]) < 60_000 and len(page["text/html"]) < 30_000
    image = Image.open(io.BytesIO(page["image/png"]))
    assert image.width > 400 and len(image.getcolors(100)) > 8


def test_a_scope_without_tokens_shows_no_picture():
    page = RoutingScope(geometry=SIZES["pocket"])._repr_mimebundle_()
    assert "image/png" not in page and "5 layers" in page["text/html"]


def test_selecting_in_one_view_selects_in_all_and_nothing_goes_round():
    selection = Selection()
    views = [RoutingScope(geometry=SIZES["pocket"], selection=selection) for _ in range(3)]
    heard = []
    selection.observe(lambda change: heard.append((change["name"], change["new"])))
    for view in views:
        view.observe(lambda change: heard.append((change["name"], change["new"])), ["token", "layer", "expert"])
    views[1].token = 12
    assert [view.token for view in views] == [12] * 3 and selection.token == 12
    assert heard == [("token", 12)] * 4
    selection.layer = 3
    assert [view.layer for view in views] == [3] * 3 and len(heard) == 8
    views[0].close()
    selection.expert = 5
    assert [view.expert for view in views] == [-1, 5, 5]


def test_a_view_that_joins_looks_where_the_others_look():
    selection = Selection(token=4, layer=2, expert=30)
    scope = RoutingScope(geometry=SIZES["pocket"], selection=selection)
    assert (scope.token, scope.layer, scope.expert) == (4, 2, 30)


def test_geometry_of_a_config():
    config = {
        "num_hidden_layers": 6, "first_k_dense_replace": 1, "moe_layer_freq": 2, "n_routed_experts": 32,
        "num_experts_per_tok": 4, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
    }  # fmt: skip
    assert Geometry.of(config) == Geometry((2, 4), 32, 4, 8, 3)
    assert Geometry.of(config | {"topk_method": "greedy"}, layers=(2,), k=6) == Geometry((2,), 32, 6)
    assert Geometry.of({"num_hidden_layers": 6, "n_routed_experts": None}).layers == ()
    assert "4 chosen from 3 of 8 groups" in str(Geometry.of(config))


def test_watching_and_replaying_need_no_torch():
    code = "import sys, workbench.widgets.replay; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
