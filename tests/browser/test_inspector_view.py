"""The browser half of the token inspector: what it draws, what keys and buttons ask for, and that text stays text."""

from dataclasses import replace

import numpy as np
import pytest
from browser.alone import Alone
from widgets.routed import GREEDY, GROUPED, routed_trace

from workbench.edits import Ablate, Bias, Force
from workbench.errors import RequestError
from workbench.widgets.inspection import Alternative, Inspection, RoutedLayer, Word, groups_kept, inspect_trace
from workbench.widgets.inspector import TokenInspector

pytestmark = pytest.mark.browser

TEXTS = ["<user>", "hi", " there", " you", " end"]
EVIL = '<img src=x onerror="window.hacked=1">'


@pytest.fixture
def trace():
    return routed_trace(TEXTS)


def whole(seen):
    """The inspection with the parts that a live model adds."""
    layers = [
        replace(
            layer,
            routed_norm=2.0,
            shared_norm=4.0,
            cosine=0.5,
            lens={e: (Word(" word", 1.5),) * 5 for e in layer.experts},
        )
        for layer in seen.layers
    ]
    rows = (Alternative(seen.id, seen.text, 0.5, 0.8), Alternative(7, " other", 0.2, 0.0))
    return replace(seen, layers=tuple(layers), alternatives=rows)


def bars(view, mark=None):
    return [int(bar.get_attribute("data-expert")) for bar in view.page.locator(f".wbi-bar{mark or ''}").all()]


def test_a_new_view_asks_until_it_is_answered(page, monkeypatch):
    view = Alone(page, TokenInspector(), monkeypatch)
    page.wait_for_function("window.sent.length >= 2")
    view.settle()
    assert page.get_by_text("No token is open").is_visible()
    asked = len(view.sent("ready"))
    page.wait_for_timeout(2500)
    assert len(view.sent("ready")) == asked


def test_all_scores_stand_in_order_with_the_cut_before_the_best_one_left_out(opened, trace):
    inspector = TokenInspector(lambda token: inspect_trace(trace, token))
    layer = inspector.open(2).layers[0]
    view = opened(inspector)
    assert bars(view) == np.argsort(-layer.scores, kind="stable").tolist()
    assert set(bars(view, ".wbi-chosen")) == set(layer.experts)
    assert set(bars(view, ".wbi-dropped")) == {e for e in range(32) if e // 4 not in layer.groups_kept}
    allowed = [e for e in np.argsort(-layer.scores).tolist() if e // 4 in layer.groups_kept]
    next_to_cut = view.page.locator(".wbi-cut + .wbi-bar")
    assert int(next_to_cut.get_attribute("data-expert")) == allowed[4]
    kept = view.page.locator(".wbi-chip:not(.wbi-out) b").all_inner_texts()
    assert {f"group {group}" for group in layer.groups_kept} == set(kept)


def test_what_was_passed_over_with_its_group_is_said(opened):
    scores = np.full(32, 0.001, np.float32)
    scores[[0, 1, 4, 8]], scores[12] = [0.3, 0.05, 0.2, 0.15], 0.1
    layer = RoutedLayer(
        1, (0, 4, 8, 1), (1.2, 0.8, 0.6, 0.2), (0.299, 0.199, 0.149, 0.049), scores, groups_kept(scores, 8, 3)
    )
    inspector = TokenInspector()
    inspector.show(Inspection(0, 0, 1, "x", "decode", 32, 8, 3, (layer,)))
    view = opened(inspector)
    assert (
        view.page.get_by_text("Grey although they score above the weakest chosen").inner_text().endswith("12 (0.100).")
    )


def test_a_forced_expert_is_told_from_one_that_was_chosen(opened):
    scores = np.linspace(0.1, 0.01, 64, dtype=np.float32)
    layer = RoutedLayer(1, (0, 1, 50), (0.1, 0.1, 0.02), (0.003, 0.001, -0.06), scores)
    inspector = TokenInspector()
    inspector.show(Inspection(0, 0, 1, "x", "decode", 64, layers=(layer,)))
    view = opened(inspector)
    assert bars(view, ".wbi-forced") == [50] and bars(view, ".wbi-chosen") == [0, 1]
    assert int(view.page.locator(".wbi-cut + .wbi-bar").get_attribute("data-expert")) == 2
    assert view.page.get_by_text("An edit forced the choice").is_visible()


def test_by_group_the_groups_stand_apart(opened, trace):
    inspector = TokenInspector(lambda token: inspect_trace(trace, token))
    layer = inspector.open(2).layers[0]
    view = opened(inspector)
    view.page.get_by_role("button", name="By group").click()
    assert bars(view) == list(range(32))
    names = view.page.locator(".wbi-group-name").all_inner_texts()
    assert names == [f"{group} {'kept' if group in layer.groups_kept else 'dropped'}" for group in range(8)]
    assert view.page.locator(".wbi-level").count() == 1


def test_arrow_keys_go_through_layers_and_experts_and_enter_leads_to_the_buttons(opened, trace):
    edits = []
    inspector = TokenInspector(lambda token: inspect_trace(trace, token), on_edit=edits.append)
    seen = inspector.open(2)
    view = opened(inspector)
    view.page.get_by_role("listbox", name="Layers").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft"):
        view.page.keyboard.press(key)
    view.settle()
    assert inspector.layer == 2, "the last layer is the end"
    chosen = view.page.get_by_role("listbox", name="Layers").get_attribute("aria-activedescendant")
    assert view.page.locator(f"[id='{chosen}']").get_attribute("data-layer") == "2"
    view.page.get_by_role("listbox", name="Router scores").focus()
    view.page.keyboard.press("ArrowRight")
    view.settle()
    best = int(seen.layers[1].scores.argmax())
    assert inspector.expert == best
    view.page.keyboard.press("Enter")
    view.page.keyboard.press("Enter")
    view.settle()
    assert edits == [Ablate(2, (best,))]
    assert view.page.get_by_role("status").inner_text() == f"Asked for: without expert {best} in layer 2"


def test_buttons_emit_edits(opened, trace):
    edits = []
    inspector = TokenInspector(lambda token: inspect_trace(trace, token), on_edit=edits.append)
    expert = inspector.open(2).layers[0].experts[1]
    view = opened(inspector)
    button = lambda name: view.page.get_by_role("button", name=f"{name}: expert {expert}", exact=True)  # noqa: E731
    button("Ablate").click()
    view.settle()
    assert view.page.locator("tr.wbi-current b").inner_text() == str(expert)
    assert view.page.evaluate("document.activeElement.textContent") == "Ablate", "drawn anew under the finger"
    button("Force").click()
    view.page.get_by_label("Bias by, in logits").fill("1.5")
    button("Bias \u2212").click()
    view.page.get_by_label("Where an edit acts").select_option("this token only")
    button("Bias +").click()
    view.settle()
    assert edits == [
        Ablate(1, (expert,)),
        Force(1, (expert,)),
        Bias(1, expert, -1.5),
        Bias(1, expert, 1.5, positions=(2, 3)),
    ]


def test_an_expert_that_was_not_chosen_gets_its_row_and_buttons_by_a_click(opened, trace):
    edits = []
    inspector = TokenInspector(lambda token: inspect_trace(trace, token), on_edit=edits.append)
    inspector.open(2)
    view = opened(inspector)
    other = bars(view, ".wbi-open")[0]
    view.page.locator(f".wbi-bar[data-expert='{other}']").click()
    assert "not chosen" in view.page.locator("tr.wbi-current").inner_text()
    view.page.get_by_role("button", name=f"Force: expert {other}", exact=True).click()
    view.settle()
    assert edits == [Force(1, (other,))]


def test_without_somebody_to_edit_there_are_no_buttons(opened, trace):
    inspector = TokenInspector(lambda token: inspect_trace(trace, token))
    inspector.open(2)
    view = opened(inspector)
    assert view.page.get_by_role("button", name="Ablate").count() == 0


def test_missing_parts_are_said_and_how_to_get_them(opened):
    trace = routed_trace(TEXTS, scores=False)
    inspector = TokenInspector(lambda token: inspect_trace(trace, token))
    seen = inspector.open(2)
    view = opened(inspector)
    assert bars(view) == list(seen.layers[0].experts)
    said = " ".join(view.page.locator(".wbv-missing").all_inner_texts())
    for part in ("alternatives", "scores of the other experts", "what each expert pushes towards", "lengths"):
        assert f"{part} not recorded" in said
    assert "scores=True" in said and "live model" in said
    assert view.page.locator(".wbi-chip").count() == 0, "nothing is known of groups"


def test_a_token_nobody_read_says_so(opened, trace):
    inspector = TokenInspector(lambda token: inspect_trace(trace, token))
    inspector.open(len(trace) - 1)
    view = opened(inspector)
    assert view.page.get_by_text("no pass has read it").is_visible()
    assert view.page.locator(".wbi-bar:visible").count() == 0


def test_what_a_live_model_adds_is_shown(opened, trace):
    inspector = TokenInspector()
    inspector.show(whole(inspect_trace(trace, 2)))
    view = opened(inspector)
    text = view.page.locator(".wbi-body").inner_text()
    assert "Cosine between the two: 0.500" in text and "\u2423word" in text and "not recorded" not in text
    rows = view.page.locator(".wbi-origin tr").all_inner_texts()
    assert "50 %" in rows[1] and "80 %" in rows[1] and "\u2713" in rows[1] and "cut" in rows[2]


def test_html_stays_text(opened, trace):
    seen = whole(inspect_trace(trace, 2))
    layers = tuple(replace(each, lens={e: (Word(EVIL, 1.0),) for e in each.experts}) for each in seen.layers)
    inspector = TokenInspector(on_edit=lambda edit: None)
    inspector.show(
        replace(
            seen, text=EVIL, before=EVIL, after=EVIL, model=EVIL, edits=(EVIL,), layers=layers,
            alternatives=(Alternative(1, EVIL, 0.5, 0.5),), how=dict.fromkeys(seen.how, EVIL),
        )
    )  # fmt: skip
    view = opened(inspector)
    view.tell({"kind": "notice", "text": EVIL})
    assert view.page.locator("img").count() == 0 and view.page.evaluate("window.hacked") is None
    assert view.page.locator(".wbi-context mark").inner_text() == EVIL


def test_page_keys_ask_for_the_tokens_before_and_after(opened, trace):
    inspector = TokenInspector(lambda token: inspect_trace(trace, token))
    inspector.open(1)
    view = opened(inspector)
    view.page.get_by_role("listbox", name="Layers").focus()
    view.page.keyboard.press("PageDown")
    view.page.keyboard.press("PageDown")
    assert [message["token"] for message in view.sent("open")] == [2, 3]
    view.page.get_by_role("button", name="Previous token").click()
    assert view.sent("open")[-1]["token"] == 2


def test_a_refusal_is_read_out_and_the_token_stays(opened, trace):
    def refuse(edit):
        raise RequestError("still answering")

    inspector = TokenInspector(lambda token: inspect_trace(trace, token), on_edit=refuse)
    inspector.open(2)
    view = opened(inspector)
    view.page.get_by_role("button", name="Ablate").first.click()
    view.settle()
    assert view.page.get_by_role("alert").inner_text().endswith("still answering")
    assert len(bars(view)) == 32


def test_what_another_view_chose_is_shown_and_the_own_choice_not_repeated(opened, trace):
    inspector = TokenInspector(lambda token: inspect_trace(trace, token))
    inspector.open(2)
    view = opened(inspector)
    view.tell({"kind": "chosen", "layer": 5, "expert": 3, "view": "another"})
    assert view.page.locator(".wbi-layer").inner_text().startswith("Layer 5")
    me = view.sent("ready")[0]["view"]
    view.tell({"kind": "chosen", "layer": 1, "expert": -1, "view": me})
    assert view.page.locator(".wbi-layer").inner_text().startswith("Layer 5")


def test_plain_keys_do_not_reach_the_notebook(opened, trace):
    inspector = TokenInspector(lambda token: inspect_trace(trace, token))
    inspector.open(2)
    view = opened(inspector)
    view.page.evaluate("window.keys = []; document.addEventListener('keydown', (event) => window.keys.push(event.key))")
    view.page.get_by_role("listbox", name="Router scores").focus()
    for key in ("d", "ArrowRight", "ArrowDown", "Control+z"):
        view.page.keyboard.press(key)
    assert view.page.evaluate("window.keys.filter((key) => key !== 'Control')") == ["z"]


@pytest.mark.parametrize(
    ("config", "layers"),
    [(GROUPED, 5), (GREEDY, 26), (GROUPED | {"n_routed_experts": 160, "num_experts_per_tok": 6}, 59)],
    ids=["pocket", "v2-lite", "v2"],
)
@pytest.mark.parametrize("width", [1000, 560])
def test_every_size_fits(opened, config, layers, width):
    trace = routed_trace(TEXTS, config=config, layers=tuple(range(1, layers + 1)))
    inspector = TokenInspector(on_edit=lambda edit: None)
    inspector.show(whole(inspect_trace(trace, 2)))
    view = opened(inspector)
    view.page.set_viewport_size({"width": width, "height": 900})
    view.settle()
    assert len(bars(view)) == config["n_routed_experts"]
    spill = "(name) => { const e = document.querySelector(name); return e.scrollWidth - e.clientWidth; }"
    assert view.page.evaluate(spill, ".wbi-bars") <= 1
    assert view.page.evaluate(spill, ".wbi-body") <= 1
    assert view.page.evaluate(spill, ".wbi-table") <= 1


def test_a_closed_view_listens_no_more(opened, trace):
    view = opened(TokenInspector())
    view.page.evaluate("window.close_view()")
    assert view.page.evaluate("window.listeners.size") == 0
