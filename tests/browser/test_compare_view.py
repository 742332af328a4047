"""The browser half of side by side: tokens beside each other, one cursor for both, and text that stays text."""

import time

import numpy as np
import pytest
from widgets.routed import routed_trace

from workbench.trace import Trace
from workbench.widgets.compare import SideBySide
from workbench.widgets.selection import Selection

pytestmark = pytest.mark.browser

A = ["<user>", "hi", "The", " latent", " is", " small", "."]
B = ["<user>", "hi", "The", " cache", " is\n"]
EVIL = '<img src=x onerror="window.hacked=1">'


def pair(a=A, b=B):
    """Their routing differs in layer 2 alone."""
    first, second = routed_trace(a), routed_trace(b)
    experts = np.array(first.experts[: len(b)])
    gates, margins = np.array(first.gates[: len(b)]), np.array(first.margins[: len(b)])
    experts[:, 1] = (experts[:, 1] + 1) % 32
    experts[-1], gates[-1], margins[-1] = -1, 0, np.nan
    return first, Trace(second.header, second.tokens, second.layers, experts, gates, margins)


def rows(view, mark=""):
    return [int(cell.get_attribute("data-row")) for cell in view.page.locator(f".wbs-pairs .wbs-cell{mark}").all()]


def focus(view):
    view.page.locator(".wbs-pairs").focus()


def apart(view):
    return view.page.locator(".wbs-share").evaluate_all(
        "all => all.map((e) => Number(e.style.getPropertyValue('--apart')))"
    )


def test_tokens_stand_beside_each_other_and_differences_are_marked(opened):
    view = opened(SideBySide(*pair()))
    assert rows(view) == [2, 3, 4, 5, 6] and rows(view, ".wbs-other") == [3, 4, 5, 6]
    assert view.page.locator(".wbs-pairs .wbs-b").all_inner_texts()[:3] == ["The", " cache", " is\u21b5"]
    assert view.page.locator(".wbs-fork + .wbs-cell").get_attribute("data-row") == "3"
    assert view.page.locator(".wbs-none").count() == 2, "the shorter one has nothing there"
    tiles = view.page.locator(".wbs-tile").all_inner_texts()
    assert "position 3" in tiles[0] and "\u2423latent or \u2423cache" in tiles[0] and "20 %" in tiles[1]


def test_the_arrows_move_both_and_the_experts_of_that_token_are_told(opened):
    widget = SideBySide(*pair())
    view = opened(widget)
    focus(view)
    for _ in range(3):
        view.page.keyboard.press("ArrowRight")
    view.page.keyboard.press("ArrowLeft")
    view.page.wait_for_function("window.sent.some((message) => message.kind === 'move')")
    view.settle()
    assert widget.row == 3 and len(view.sent("move")) == 1, "a held key is told once"
    cursor = view.page.locator(".wbs-cursor")
    assert "Position 3" in cursor.inner_text() and "\u2423cache" in cursor.inner_text()
    detail = cursor.locator("tr").all_inner_texts()
    _, shared, only_a, only_b = widget._layers_of(3)[1]
    assert len(detail) == 2, "layer 2 is the only one that differs"
    assert ", ".join(map(str, only_a)) in detail[1] and ", ".join(map(str, only_b)) in detail[1] and shared < 1


def test_n_goes_from_difference_to_difference(opened):
    view = opened(SideBySide(*pair()))
    focus(view)
    found = []
    for _ in range(2):
        view.page.keyboard.press("n")
        view.settle()
        found.append(view.page.locator("[aria-selected=true]").get_attribute("data-row"))
    assert found == ["3", "4"]


def test_the_prompt_is_there_when_it_is_asked_for(opened):
    view = opened(SideBySide(*pair()))
    view.page.get_by_role("button", name="Prompt").click()
    assert rows(view) == list(range(7)) and rows(view, ".wbs-prompt") == [0, 1]


def test_the_lines_are_about_the_layer_that_is_chosen(opened):
    widget = SideBySide(*pair(), selection=Selection())
    view = opened(widget)
    mean = apart(view)
    view.page.get_by_role("button", name="Layer 2").click()
    view.settle()
    assert widget.selection.layer == 2
    one = apart(view)
    assert 0 < mean[0] < one[0]
    widget.selection.layer = 1
    assert apart(view)[0] == 0, "layer 1 is routed alike"
    focus(view)
    view.page.keyboard.press("ArrowUp")
    view.settle()
    assert widget.layer == -1 and apart(view) == mean


def test_the_selection_moves_the_cursor(opened):
    widget = SideBySide(*pair(), selection=Selection())
    view = opened(widget)
    widget.selection.token = 4
    assert view.page.locator("[aria-selected=true]").get_attribute("data-row") == "4"
    assert "Position 4" in view.page.locator(".wbs-cursor").inner_text()


def test_html_stays_text(opened):
    widget = SideBySide(*pair(["<user>", "hi", EVIL, EVIL], ["<user>", "hi", EVIL, "x"]), labels=(EVIL, EVIL))
    view = opened(widget)
    focus(view)
    view.page.keyboard.press("n")
    assert view.page.locator("img").count() == 0 and view.page.evaluate("window.hacked") is None
    assert EVIL in view.page.locator(".wbs-head").inner_text()


def test_equal_traces_are_said_to_be_equal(opened):
    first, _ = pair()
    view = opened(SideBySide(first, first))
    text = view.page.locator(".wbs").inner_text()
    assert "no token differs" in text and "Nothing was set differently" in text and "they part" not in text
    assert view.page.get_by_role("button", name="Next difference").is_disabled()


def test_two_thousand_tokens_are_drawn_at_once(opened):
    texts = ["<user>", *(f" w{n}" for n in range(2000))]
    widget = SideBySide(*pair(texts, [*texts[:1500], *(f" v{n}" for n in range(400))]))
    began = time.monotonic()
    view = opened(widget)
    assert len(view.page.locator(".wbs-cell").all()) == 1999
    assert time.monotonic() - began < 8  # about one second where nothing else runs
    focus(view)
    view.page.keyboard.press("End")
    cell = view.page.locator("[aria-selected=true]")
    assert cell.get_attribute("data-row") == "2000" and cell.bounding_box()["y"] > 0
    box, around = cell.bounding_box(), view.page.locator(".wbs-pairs").bounding_box()
    assert around["y"] <= box["y"] and box["y"] + box["height"] <= around["y"] + around["height"]
