"""The browser half of the expert map, alone in a page: where each expert is by colour, and the words of `describe`."""

import re

import numpy as np
import offload
import pytest
from browser.alone import FRAME

from workbench.transfers import FAR, MOVING
from workbench.widgets import expertmap
from workbench.widgets.expertmap import ExpertMap

pytestmark = pytest.mark.browser

COLOURS = """([points]) => {
  const canvas = document.querySelector(".wbe-canvas");
  const [pen, ratio] = [canvas.getContext("2d"), devicePixelRatio || 1];
  return points.map(([x, y]) => [...pen.getImageData(Math.round(x * ratio), Math.round(y * ratio), 1, 1).data].slice(0, 3));
}"""  # noqa: E501
LEFT, RIGHT, TOP = 58, 14, 22  # around the cells, see SIDE in expertmap.js


@pytest.fixture
def shown(opened, page, monkeypatch):
    """shown(store): its map, alone in the page."""
    monkeypatch.setattr(expertmap, "INTERVAL", 1e6)  # it looks when the test says so
    yield lambda store: opened(ExpertMap(store))
    page.emulate_media(reduced_motion="no-preference", color_scheme="light")


@pytest.fixture
def rng():
    return np.random.default_rng()


def ask(store, ids):
    """A pass of one token that every layer sends to these experts."""
    for layer in store.layers:
        offload.visit(store, layer, [ids])


def visits(rng, store, count=1):
    for _ in range(count):
        for layer in store.layers:
            offload.visit(store, layer, rng.choice(store.experts, (1, 3), replace=False))


def look(view):
    view.widget.update()
    view.page.evaluate(FRAME)


def pitches(view):
    wide = view.page.locator(".wbe-canvas").bounding_box()["width"]
    pitch = (wide - LEFT - RIGHT) / view.widget.experts
    return pitch, max(6, min(22, round(pitch * 1.1)))


def colours(view, down=0.75):
    """[layers, experts] of "r, g, b", so far down in each cell."""
    pitch, tall = pitches(view)
    rows, experts = len(view.widget.layers), view.widget.experts
    points = [
        [LEFT + (expert + 0.4) * pitch, TOP + (row + down) * tall] for row in range(rows) for expert in range(experts)
    ]
    found = [", ".join(map(str, colour)) for colour in view.page.evaluate(COLOURS, [points])]
    return np.array(found).reshape(rows, experts)


def legend(view):
    """Colour of each kind in the legend."""
    read = "(swatches) => swatches.map((swatch) => getComputedStyle(swatch).backgroundColor)"
    found = view.page.locator(".wbe-legend .wbe-swatch").evaluate_all(read)
    return [re.search(r"\((.*)\)", colour)[1] for colour in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_cells_have_the_colour_of_their_place(shown, page, rng, monkeypatch, scheme):
    page.emulate_media(reduced_motion="reduce", color_scheme=scheme)  # without what glows
    store, _ = offload.pages(layers=3, experts=11, chosen=3, slots=9, far=8, computed=False)
    visits(rng, store, 4)
    where = store.where()
    where[rng.integers(3), rng.integers(11)] = MOVING
    monkeypatch.setattr(store, "where", lambda: where.copy())
    view = shown(store)
    if scheme == "dark":
        page.evaluate("() => { document.documentElement.style.colorScheme = 'dark'; }")
        page.evaluate("() => { document.body.className = 'dark'; }")
        page.evaluate(FRAME)
    assert view.page.locator(".wbe.wbe-dark").count() == (scheme == "dark")
    kinds = legend(view)
    assert len(kinds) == len(set(kinds)) == 4 and (colours(view) == np.array(kinds)[where]).all()
    upper = colours(view, down=0.25)
    assert (upper[where == FAR] == kinds[2]).all(), "half full, so that it is told apart without colours too"
    counts = [int((where == code).sum()) for code in range(4)]
    words = ["in place of VRAM", "in main memory", "on disk", "on its way"]
    said = [f"{count} {word}" for count, word in zip(counts, words, strict=True)]
    assert view.page.locator(".wbe-key").all_inner_texts() == said
    assert ", ".join(said) in view.page.get_by_role("img", name="3 layers by 11 experts").get_attribute("aria-label")


def test_it_follows_the_store(shown, page, rng):
    page.emulate_media(reduced_motion="reduce")
    store, _ = offload.pages(layers=3, experts=11, chosen=3, slots=9, far=8, computed=False)
    view = shown(store)
    assert "Nothing has been generated yet" in view.page.locator(".wbe-passes").inner_text()
    kinds = legend(view)
    for count in (1, 3):
        visits(rng, store, count)
        view.widget.update()
    page.wait_for_timeout(1100)  # where motion is not wanted, it is drawn once a second
    assert (colours(view) == np.array(kinds)[store.where()]).all()
    passes = view.widget.passes()
    read = view.page.locator(".wbe-panelhead b").all_inner_texts()
    rate = (passes["hit rate"] * passes["needed"]).sum() / passes["needed"].sum()
    assert float(read[0].removesuffix(" %")) == pytest.approx(100 * rate, abs=0.51)
    assert float(read[1]) == pytest.approx(passes["MB a token"].mean(), rel=0.02)
    assert f"perfect cache, same size: {100 * view.widget.best.oracle:.0f} %"[:24] in view.page.inner_text(
        ".wbe-perfect"
    )


def test_what_was_used_just_now_glows_and_fades(shown):
    store, _ = offload.pages(layers=3, experts=11, chosen=3, slots=33)
    ask(store, [8, 9, 10])
    for _ in range(20):
        ask(store, [3, 4, 5])
    ask(store, [0, 1, 2])
    view = shown(store)
    before, faded = colours(view), legend(view)[0]
    assert len(set(before[:, :3].flat)) == 1 and (before[:, 8:] == faded).all()
    assert before[0, 0] == legend(view)[-1] != before[0, 3] != faded, "one of a pass ago glows still, but less"
    assert "9 used just now" in view.page.locator(".wbe-legend").inner_text()
    for _ in range(9):
        ask(store, [8, 9, 10])
    look(view)
    after = colours(view)
    assert (after[:, 8:] == before[0, 0]).all() and (after[:, :3] == faded).all()


def test_keys_lead_to_every_expert_and_say_what_describe_says(shown, rng):
    store, _ = offload.pages(layers=3, experts=7, chosen=3, slots=5, far=6, computed=False)
    visits(rng, store, 3)
    view = shown(store)
    visits(rng, store, 2)
    look(view)
    field, readout = view.page.get_by_role("application"), view.page.locator(".wbe-readout")
    field.focus()
    view.page.keyboard.press("ArrowRight")
    for row, layer in enumerate(store.layers):
        for step in range(7):
            expert = step if row % 2 == 0 else 6 - step
            view.page.evaluate(FRAME)
            said = view.widget.describe(layer, expert)
            assert readout.inner_text() == said == view.page.locator("[role=status]").text_content()
            view.page.keyboard.press("ArrowDown" if step == 6 else "ArrowLeft" if row % 2 else "ArrowRight")
    for key, layer, expert in (
        ("Home", 3, 0),
        ("End", 3, 6),
        ("PageUp", 1, 6),
        ("PageDown", 3, 6),
        ("ArrowRight", 3, 6),
    ):
        view.page.keyboard.press(key)
        view.page.evaluate(FRAME)
        assert readout.inner_text() == view.widget.describe(layer, expert)
    view.page.keyboard.press("Escape")
    view.page.evaluate(FRAME)
    assert readout.inner_text() == ""


def test_what_the_pointer_is_on_is_described_in_a_large_model_too(shown, rng):
    """Two layers of 700: keys far apart, and counts that do not fit into one byte."""
    store, _ = offload.pages(layers=2, experts=700, chosen=3, slots=40, far=100, computed=False)
    for _ in range(300):
        ask(store, [0, 1, 2])
    view = shown(store)
    visits(rng, store, 30)
    ask(store, [3, 150, 2])
    look(view)
    pitch, tall = pitches(view)
    box, tip = view.page.locator(".wbe-canvas").bounding_box(), view.page.locator(".wbr-tip")
    for expert in [0, 3, 150, *rng.choice(250, 12, replace=False)]:
        row = int(rng.integers(2))
        view.page.mouse.move(box["x"] + LEFT + (expert + 0.5) * pitch, box["y"] + TOP + (row + 0.5) * tall)
        view.page.evaluate(FRAME)
        said = view.widget.describe(store.layers[row], int(expert))
        assert view.page.locator(".wbe-readout").inner_text() == said
        head, rest = said.split(": ")
        assert tip.locator("b").inner_text() == head
        assert ", ".join(tip.locator("div").all_inner_texts()) == rest
    view.page.mouse.move(box["x"] + 5, box["y"] + 5)
    view.page.evaluate(FRAME)
    assert not tip.is_visible()


def test_keys_are_no_shortcuts_of_the_notebook(shown, rng):
    store, _ = offload.pages(layers=2, experts=5, chosen=3, slots=4)
    view = shown(store)
    view.page.evaluate(
        "() => { window.heard = []; document.body.addEventListener('keydown', (e) => heard.push(e.key)); }"
    )
    view.page.get_by_role("application").focus()
    for key in ("ArrowDown", "d", "Escape", "Control+s"):
        view.page.keyboard.press(key)
    assert view.page.evaluate("window.heard") == ["Control", "s"]
